//! Calls in the written form of every family, read back as calls.

use std::sync::Arc;

use rbee_tokenizer::{
    AnswerForm, AnswerReader, Begins, CallPart, Controls, Form, Most, Piece, Start, StopMatcher, TextStream, TokenId,
};
use serde_json::{Value, json};

use super::Drawer;
use super::checker::problem;
use crate::fixtures::*;

/// A family: what its template has, and its control tokens besides.
struct Family {
    template: &'static str,
    control: &'static [&'static str],
}

const FAMILIES: [Family; 8] = [
    Family { template: "<tool_call>", control: &[] },
    Family { template: "<tool_call>", control: &["<tool_call>", "</tool_call>"] },
    Family { template: "<tool_call>\n<function=", control: &[] },
    Family { template: "[TOOL_CALLS]", control: &["[TOOL_CALLS]"] },
    Family { template: "[TOOL_CALLS]", control: &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"] },
    Family { template: "<|tool_call|>", control: &["<|tool_call|>", "<|/tool_call|>"] },
    Family { template: "<|tool_call|>", control: &["<|tool_call|>"] },
    Family { template: "<|python_tag|>", control: &["<|python_tag|>"] },
];

fn tools() -> Vec<(String, Value)> {
    vec![
        (
            "weather".to_owned(),
            json!({"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}, "unit": {"enum": ["c", "f"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2}}, "required": ["city", "days"]}),
        ),
        ("time".to_owned(), Value::Null),
        (
            "note_it".to_owned(),
            json!({"type": "object", "additionalProperties": false, "required": ["text", "kind"], "properties": {
            "text": {"type": "string", "pattern": "^[a-z]+-\\d$", "maxLength": 20}, "at": {"type": "string", "format": "date"},
            "or": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}, "kind": {"$ref": "#/$defs/kind"}},
            "$defs": {"kind": {"enum": ["a", 1, true]}}}),
        ),
    ]
}

impl Family {
    fn drawer(&self) -> (Drawer, AnswerForm) {
        let mut file = byte_level_json();
        for (at, token) in self.control.iter().enumerate() {
            file["added_tokens"].as_array_mut().unwrap().push(added(260 + at as u32, token, true));
        }
        let mut drawer = Drawer::new(load(&file), "<|im_end|>");
        drawer.closing = "\n</parameter>\n";
        let form = AnswerForm::of(&template(&format!("{{# {} #}}", self.template)), &drawer.tokenizer);
        (drawer, form)
    }
}

/// What a reader makes of an answer: its text and its calls.
fn read(
    drawer: &Drawer,
    form: &AnswerForm,
    tools: &[(String, Value)],
    most: Most,
    ids: &[TokenId],
) -> (String, Vec<CallPart>) {
    let listed = tools
        .iter()
        .map(|(name, parameters)| json!({"type": "function", "function": {"name": name, "parameters": parameters}}));
    let listed: Arc<[Value]> = listed.collect();
    let detokenizer = drawer.tokenizer.detokenizer(Controls::Hide, Start::Fresh).showing(form.shown());
    let reader = AnswerReader::new(form, Begins::Fresh, listed, most);
    let mut stream = TextStream::new(detokenizer, StopMatcher::new::<&str>(&[]).unwrap()).with_reader(reader);
    let mut all = Piece::default();
    for &id in ids {
        all.append(stream.push(id).piece);
    }
    all.append(stream.finish());
    let mut calls: Vec<CallPart> = Vec::new();
    for part in all.calls {
        match part.name {
            Some(_) => calls.push(part),
            None => calls.last_mut().unwrap().arguments.push_str(&part.arguments),
        }
    }
    (all.text, calls)
}

#[test]
fn a_model_that_must_call_writes_calls_that_are_read_back() {
    for family in &FAMILIES {
        let (drawer, form) = family.drawer();
        for most in [Most::One, Most::Any] {
            let grammar = drawer.compile(&Form::Calls { form: form.clone(), tools: tools(), most });
            let mut counts = Vec::new();
            let mut named = Vec::new();
            for seed in 0..200 {
                let ids = drawer.ids(&grammar, seed);
                let (text, calls) = read(&drawer, &form, &tools(), most, &ids);
                let answer = drawer.tokenizer.decode(&ids, Controls::Show);
                assert!(text.trim().is_empty() && !calls.is_empty(), "{answer:?}: {text:?}, {calls:?}");
                counts.push(calls.len());
                for call in calls {
                    let name = call.name.unwrap();
                    let tool = tools().into_iter().find(|(tool, _)| *tool == name);
                    let (_, schema) = tool.unwrap_or_else(|| panic!("{answer:?} calls {name:?}"));
                    let value: Value = serde_json::from_str(&call.arguments)
                        .unwrap_or_else(|error| panic!("{error} in {:?} of {answer:?}", call.arguments));
                    let schema = if schema.is_null() { json!({"maxProperties": 0}) } else { schema };
                    if let Some(problem) = problem(&schema, &schema, &value) {
                        panic!("{problem} in {answer:?}");
                    }
                    named.push(name);
                }
            }
            assert!(
                tools().iter().all(|(name, _)| named.contains(name)),
                "all functions are called of {}",
                family.template
            );
            let single = most == Most::One || family.template == "<|python_tag|>";
            assert_eq!(single, counts.iter().all(|&count| count == 1), "{} calls {counts:?}", family.template);
        }
    }
}

/// A function that is named is the only one there is.
#[test]
fn a_named_function_is_the_one_that_is_called() {
    let (drawer, form) = FAMILIES[0].drawer();
    let grammar = drawer.compile(&Form::Calls { form, tools: tools()[1..2].to_vec(), most: Most::One });
    let whole = "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(drawer.takes(&grammar, whole), Ok(true));
    assert_eq!(drawer.takes(&grammar, "Well"), Err("W".to_owned()));
    assert_eq!(drawer.takes(&grammar, &format!("{whole}\n")), Err(format!("{whole}\n")));
}

#[test]
fn what_a_form_cannot_write_is_refused_by_name() {
    let tags = &FAMILIES[2];
    let named = &FAMILIES[4];
    let tool =
        |name: &str, property: Value| vec![(name.to_owned(), json!({"type": "object", "properties": {"a": property}}))];
    for (family, tools, why) in [
        (
            tags,
            tool("f", json!({"type": "string", "pattern": "^a|b"})),
            "the pattern \"^a|b\" cannot be enforced between tags",
        ),
        (
            tags,
            tool("f", json!({"type": "string", "allOf": [{}]})),
            "`allOf` cannot be enforced between tags, at /tools/0/",
        ),
        (tags, tool("f>", json!({})), "cannot be written in a tag"),
        (
            tags,
            vec![("f".to_owned(), json!({"anyOf": [{}]}))],
            "`anyOf` cannot be enforced where arguments are written in tags",
        ),
        (named, tool("f{", json!({})), "cannot write a call of a function named \"f{\""),
        (
            &FAMILIES[0],
            tool("f", json!({"not": {}})),
            "`not` cannot be enforced, at /tools/0/function/parameters/properties/a",
        ),
        (
            &FAMILIES[0],
            vec![("f".to_owned(), json!({"type": "array"}))],
            "arguments are of type \"object\", at /tools/0",
        ),
        (&FAMILIES[0], Vec::new(), "from one to"),
    ] {
        let (drawer, form) = family.drawer();
        let error = drawer.grammars.compile(&Form::Calls { form, tools, most: Most::Any }).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    }
    let (drawer, _) = FAMILIES[0].drawer();
    let none = Form::Calls { form: AnswerForm::default(), tools: tools(), most: Most::Any };
    assert!(drawer.grammars.compile(&none).err().unwrap().to_string().contains("no way of writing calls"));
}
