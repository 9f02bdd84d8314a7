//! Hostile forms: each compiles or is refused, in little time, on a small stack, and none stops the process.

use std::time::Duration;

use rbee_tokenizer::{AnswerForm, Form, Most};
use serde_json::{Map, Value, json};

use super::letters;
use crate::fixtures::*;

/// Far above what any takes on an idle machine: a bound that does not hold misses it by far.
const LONG: Duration = Duration::from_secs(3);

fn object(count: usize, member: impl Fn(usize) -> Value) -> Value {
    let properties: Map<String, Value> = (0..count).map(|at| (format!("p{at}"), member(at))).collect();
    json!({"type": "object", "properties": properties})
}

/// References from each to the next, each time through a property.
fn chain(length: usize) -> Value {
    let mut definitions: Map<String, Value> = (0..length)
        .map(|at| {
            (
                format!("d{at}"),
                json!({"type": "object", "properties": {"next": {"$ref": format!("#/$defs/d{}", at + 1)}}}),
            )
        })
        .collect();
    definitions.insert(format!("d{length}"), json!({"type": "null"}));
    json!({"$defs": definitions, "$ref": "#/$defs/d0"})
}

fn nested(depth: usize) -> Value {
    (0..depth).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}))
}

fn any(of: usize, count: usize) -> Value {
    let options =
        (0..count).map(|at| json!({"type": "object", "properties": {format!("k{of}_{at}"): {"type": "string"}}}));
    json!({"anyOf": options.collect::<Vec<_>>()})
}

/// Sixty tools of a hundred kilobytes.
fn many_tools() -> Vec<(String, Value)> {
    let description = "What this is good for, at some length, so that the model knows when to use it and what to give.";
    let parameter = |at: usize| match at % 4 {
        0 => json!({"type": "string", "description": description}),
        1 => json!({"type": "integer", "minimum": 0, "description": description}),
        2 => json!({"type": "array", "items": object(2, |_| json!({"type": "string"})), "description": description}),
        _ => json!({"anyOf": [{"type": "string"}, {"type": "null"}], "default": null, "description": description}),
    };
    (0..60).map(|at| (format!("function_{at}"), object(11, |n| parameter(n + at)))).collect()
}

/// The form, and whether it is one that must compile.
fn forms() -> Vec<(&'static str, Form, Option<bool>)> {
    let schema = Form::JsonSchema;
    let regex = |text: &str| Form::Regex(text.to_owned());
    let lark = |text: String| Form::Lark(text);
    let enumeration = |count: usize| json!({"enum": (0..count).map(|at| format!("value {at}")).collect::<Vec<_>>()});
    let words: Vec<String> = (0..8000).map(|at| format!("w{at}x")).collect();
    let rules = |count: usize, deep: usize| {
        let rule = |at: usize| format!("r{at}: {}r{}{} | \"x{at}\"\n", "(".repeat(deep), at + 1, ")".repeat(deep));
        format!("start: r0\n{}r{count}: \"y\"\n", (0..count).map(rule).collect::<String>())
    };
    vec![
        ("(a+)+b", regex("(a+)+b"), Some(true)),
        ("many as", regex("(?:(?:a|b)*a(?:a|b){20})+c"), None),
        ("repeats of repeats", regex("((a{1000}){1000}){1000}"), None),
        ("letters", regex(&r"\p{L}".repeat(1000)), None),
        ("parentheses", regex(&format!("{}a{}", "(".repeat(5000), ")+".repeat(5000))), Some(false)),
        ("words", regex(&words.join("|")), None),
        ("nothing matches", regex("[^\\x00-\\x{10ffff}]"), Some(false)),
        ("a long expression", regex(&"a".repeat(70_000)), Some(false)),
        ("rules", lark(rules(290, 0)), Some(true)),
        ("rules in groups", lark(rules(11, 25)), Some(true)),
        ("too many rules", lark(rules(240, 25)), Some(false)),
        ("a circle of rules", lark("start: a\na: b\nb: a\n".to_owned()), None),
        ("ambiguous rules", lark("start: a\na: a a | a a a | \"x\" |\n".to_owned()), None),
        ("repeated rules", lark("start: a{0,1000000}\na: b{0,1000000}\nb: \"x\"\n".to_owned()), None),
        (
            "parentheses of rules",
            lark(format!("start: {}\"a\"{}\n", "(".repeat(20_000), ")".repeat(20_000))),
            Some(false),
        ),
        ("a chain", schema(chain(30)), Some(true)),
        ("a long chain", schema(chain(900)), Some(false)),
        ("too long a chain", schema(chain(10_000)), Some(false)),
        ("nested", schema(nested(60)), Some(true)),
        ("as nested as JSON is read", schema(nested(120)), Some(false)),
        ("ten thousand schemas", schema(object(10_000, |at| json!({"const": at}))), Some(false)),
        (
            "ten thousand alternatives",
            schema(json!({"anyOf": (0..10_000).map(|at| json!({"const": format!("c{at}")})).collect::<Vec<_>>()})),
            None,
        ),
        ("properties", schema(object(256, |_| json!({"type": "string"}))), Some(true)),
        ("a long text", schema(json!({"type": "string", "maxLength": 524_288})), Some(true)),
        (
            "a text that must be long",
            schema(json!({"type": "string", "minLength": 524_288, "maxLength": 524_288})),
            None,
        ),
        (
            "a long text of a pattern",
            schema(json!({"type": "string", "maxLength": 524_288, "pattern": "a.*b.*c"})),
            None,
        ),
        (
            "long lists",
            schema(
                json!({"type": "array", "items": {"type": "array", "maxItems": 100_000}, "minItems": 1000, "maxItems": 1_000_000}),
            ),
            Some(true),
        ),
        ("an enumeration", schema(enumeration(5000)), Some(true)),
        ("a huge enumeration", schema(enumeration(100_000)), Some(false)),
        ("ranges", schema(object(250, |at| json!({"type": "integer", "minimum": at}))), None),
        (
            "patterns",
            schema(object(250, |at| json!({"type": "string", "pattern": format!("(a|b)*a(a|b){{{}}}c{at}", at % 12)}))),
            None,
        ),
        (
            "alternatives at once",
            schema(json!({"allOf": [any(0, 20), any(1, 20), any(2, 20), any(3, 20)]})),
            Some(false),
        ),
        (
            "alternatives of a large object",
            schema(
                json!({"anyOf": vec![json!({"type": "string"}); 1000], "properties": object(250, |_| json!(true))["properties"]}),
            ),
            Some(false),
        ),
        (
            "exclusive alternatives",
            schema(
                json!({"oneOf": (0..90).map(|at| json!({"type": "object", "properties": {"k": {"const": format!("c{at}")}}, "required": ["k"]})).collect::<Vec<_>>()}),
            ),
            Some(true),
        ),
        (
            "too many exclusive alternatives",
            schema(json!({"oneOf": (0..1000).map(|at| json!({"const": format!("c{at}")})).collect::<Vec<_>>()})),
            Some(false),
        ),
        (
            "no properties",
            schema(json!({"type": "object", "properties": {}, "additionalProperties": false})),
            Some(true),
        ),
    ]
}

/// Compiles on a stack of half of what threads have, and makes a few steps.
fn compile(form: Form) -> (Result<usize, String>, Duration) {
    let run = move || {
        let drawer = letters();
        let (grammar, took) = timed(|| drawer.grammars.compile(&form));
        let bytes = grammar.map_err(|error| error.to_string()).map(|grammar| {
            let mut matcher = grammar.start();
            let mut words = [0; 9];
            for _ in 0..20 {
                let Ok(()) = matcher.mask(&mut words) else { break };
                let first = (0..9 * 32).find(|id| words[id / 32] >> (id % 32) & 1 == 1).unwrap();
                // What takes too many steps is an error too.
                if matcher.accept(first as u32).unwrap_or(true) {
                    break;
                }
            }
            grammar.bytes()
        });
        (bytes, took)
    };
    std::thread::Builder::new().stack_size(1 << 20).spawn(run).unwrap().join().unwrap()
}

#[test]
fn hostile_forms_compile_or_are_refused_within_their_bounds() {
    let mut wrong = Vec::new();
    for (name, form, wanted) in forms() {
        let (result, took) = compile(form);
        println!("{:>8.1} ms {name}: {result:?}", took.as_secs_f64() * 1e3);
        let plain = |problem: &String| !problem.contains('\n') && problem.len() < 600 && !problem.contains("panicked");
        if took > LONG
            || result.as_ref().is_err_and(|problem| !plain(problem))
            || wanted.is_some_and(|wanted| wanted != result.is_ok())
        {
            wrong.push(format!("{name}, in {took:?}: {result:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn sixty_tools_compile_in_every_form() {
    let tools = many_tools();
    let size: usize = tools.iter().map(|(_, schema)| schema.to_string().len()).sum();
    assert!(size > 90_000, "{size}");
    for tags in [
        "<tool_call>",
        "<tool_call> <function=",
        "[TOOL_CALLS]",
        "[TOOL_CALLS] [ARGS]",
        "<|tool_call|>",
        "<|python_tag|>",
    ] {
        let form = AnswerForm::of(&template(&format!("{{# {tags} #}}")), &byte_level());
        let (result, took) = compile(Form::Calls { form, tools: tools.clone(), most: Most::Any });
        println!("{:>8.1} ms {tags}: {result:?}", took.as_secs_f64() * 1e3);
        assert!(took < LONG && result.is_ok(), "{tags}: {result:?} in {took:?}");
    }
}
