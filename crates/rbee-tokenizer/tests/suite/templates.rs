//! Templates render as in transformers, and end in time.

use std::time::Duration;

use rbee_tokenizer::{ChatTemplate, Error, GenerationPrompt, Render, TokenizerConfig, message};
use serde_json::{Map, Value, json};

use crate::fixtures::{template, timed};

fn render(source: &str, messages: &[Value]) -> Result<String, Error> {
    render_with(source, messages, &Map::new())
}

fn render_with(source: &str, messages: &[Value], settings: &Map<String, Value>) -> Result<String, Error> {
    let config = TokenizerConfig::default();
    ChatTemplate::load(&config, Some(source.as_bytes()))?.expect("there is a template").render(&Render {
        messages,
        tools: &[],
        settings,
        generation_prompt: GenerationPrompt::Add,
        now: 1_735_689_599,
    })
}

#[track_caller]
fn check(source: &str, expected: &str) {
    let messages = [
        message("user", " Hi \"you\" "),
        json!({"role": "assistant", "content": "Ok", "data": {"b": [1, 2.0, null], "a": "é<&>'"}}),
    ];
    assert_eq!(render(source, &messages).unwrap(), expected, "{source}");
}

#[test]
fn templates_render_as_in_python() {
    check("{{ messages[1].data | tojson }}", r#"{"b": [1, 2.0, null], "a": "é<&>'"}"#);
    check(
        "{{ messages[1].data | tojson(indent=2) }}",
        "{\n  \"b\": [\n    1,\n    2.0,\n    null\n  ],\n  \"a\": \"é<&>'\"\n}",
    );
    check(
        "{{ messages[1].data | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
        r#"{"a":"\u00e9<&>'","b":[1,2.0,null]}"#,
    );
    check("{{ messages[0].content.strip().upper() }}", "HI \"YOU\"");
    check("{{ messages[0]['content'].split(' ')[1] }}", "Hi");
    check("{{ messages[1].data.items() | list | length }}", "2");
    check("{{ messages[1].get('nothing', 'none') }}", "none");
    check("{{ messages[0].tool_calls is defined }}", "False");
    check("{{ tools is iterable }}{{ messages is iterable }}\r\n|", "FalseTrue\n|");
    check("{{ tools is none }} {{ documents is none }}", "True True");
    // Block tags take their line with them.
    check("  {% if add_generation_prompt %}\nyes\n  {% endif %}\nend", "yes\nend");
    check(
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "assistant",
    );
    check(
        "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %},{%- generation -%} x {%- endgeneration -%}{% endfor %}",
        "user,xassistant,x",
    );
    check("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2");
    check("{{ strftime_now('%d %b %Y') }}", "31 Dec 2024");
    check("{{ messages[::-1][0].role }}{{ messages[1:] | length }}", "assistant1");
    check("{{ 'a' ~ 1 ~ true }}", "a1True");
    // Operands and subscripts in every position.
    check("{{ (messages + [messages[0]])[(2)].role + ('x' ~ (1 + 1)) }}", "userx2");
    check("{{ ((messages)[1:])[-1]['content'] == ('O' + 'k') }}", "True");
    check("{{ (messages[0].content | trim)[:2] in [('Hi'), ')'] }}", "True");
    check("{{ messages[(0 if (tools not in [1]) else 1)].role ~ (messages | length * 2) }}", "user4");
    check(
        "{% set n = namespace(x=[]) %}{% for m in messages %}{% set n.x = n.x + [m.role] %}{% endfor %}{{ n.x | join('+') }}",
        "user+assistant",
    );
    check("{{ messages[0].content.split(')')[0][1:4].split(' ')[0] == messages[0].content[1:3] }}", "True");
    check(
        "{{ (1, 2)[1] }}{{ {'a': messages[1].data.b}['a'][0] }}{{ messages[-1] is defined and not messages[0] is none }}",
        "21True",
    );
    check("{{ 'b' in messages[1].data and 'z' not in messages[1].data }}", "True");
    check("{{ 'user' if messages[0].role == messages[0]['role'] else 'x' }}", "user");
}

#[test]
fn a_template_says_why_it_refuses() {
    let source = "{% if messages[0].role != 'system' %}{{ raise_exception('roles must ' + 'alternate') }}{% endif %}";
    match render(source, &[message("user", "x")]) {
        Err(Error::TemplateRefused(why)) => assert_eq!(why, "roles must alternate"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn settings_reach_the_template_but_replace_nothing() {
    let settings = |name: &str| json!({name: false}).as_object().unwrap().clone();
    assert_eq!(render_with("{{ enable_thinking }}", &[], &settings("enable_thinking")).unwrap(), "False");
    for name in ["messages", "tools", "add_generation_prompt", "raise_exception"] {
        assert!(matches!(render_with("x", &[], &settings(name)), Err(Error::InvalidChat(_))));
    }
}

#[test]
fn named_tokens_and_named_templates_come_from_the_configuration() {
    let config = TokenizerConfig::from_json(
        json!({"bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>",
               "chat_template": [
                    {"name": "default", "template": "{{ bos_token }}plain{{ eos_token }}"},
                    {"name": "tool_use", "template": "with {{ tools[0].name }}"}]})
        .to_string()
        .as_bytes(),
    )
    .unwrap();
    let template = ChatTemplate::load(&config, None).unwrap().unwrap();
    let render = |tools: &[Value]| {
        template
            .render(&Render {
                messages: &[],
                tools,
                settings: &Map::new(),
                generation_prompt: GenerationPrompt::Omit,
                now: 0,
            })
            .unwrap()
    };
    assert_eq!(render(&[]), "<s>plain</s>");
    assert_eq!(render(&[json!({"name": "f"})]), "with f");
    // A file of its own comes first.
    assert!(ChatTemplate::load(&config, Some(b"x")).unwrap().is_some());
    assert!(ChatTemplate::load(&TokenizerConfig::default(), None).unwrap().is_none());
    assert!(TokenizerConfig::from_json(br#"{"chat_template": 3}"#).is_err());
    assert!(TokenizerConfig::from_json(b"[").is_err());
}

/// Cheap steps over a long text, as often as fuel allows.
fn looped(step: &str) -> String {
    let setup =
        "{% macro f(x) %}{% endmacro %}{% set a = 'x' * 1000000 %}{% set b = 'x' * 1000000 %}{% set m = {a: 1} %}";
    let each = "{% for i in range(9999) %}{% for i in range(9999) %}";
    format!("{setup}{each}{step}{{% endfor %}}{{% endfor %}}")
}

/// Loops, doubling, deep nesting, endless recursion, huge results: each ends as an error, in time.
#[test]
fn template_bombs_end_soon() {
    let bombs = [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}".to_owned(),
        "{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}".to_owned(),
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}".to_owned(),
        "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}".to_owned(),
        format!("{}{{{{ a }}}}", "{% set a = (a or 'ab') ~ (a or 'ab') %}".repeat(60)),
        "{{ 'a' * 1000000000 }}".to_owned(),
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}".to_owned(),
        "{{ ('a' * 1000000).replace('a', 'b' * 1000) }}".to_owned(),
        "{{ ('a' * 1000000) | list | tojson | tojson | tojson }}".to_owned(),
        "{{ messages | tojson(indent=100000000) }}".to_owned(),
        "{{ messages | tojson(separators=('x' * 100000, ':')) }}".to_owned(),
        "{{ 'x' | indent(100000000, true) }}".to_owned(),
        "{{ '%1000000000d' | format(1) }}".to_owned(),
        "{{ '{:1000000000}'.format(1) }}".to_owned(),
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}".to_owned(),
        "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}".to_owned(),
        "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}".to_owned(),
        format!("{}1{}", "{{ (", ")".repeat(5000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)),
        format!("{{{{ {}1{} }}}}", "[".repeat(5000), "]".repeat(5000)),
        "{% if true %}".repeat(5000),
        "{% include 'default' %}".to_owned(),
        "{% extends 'default' %}".to_owned(),
        "{{ range(1000000000) | list | length }}".to_owned(),
        "{{ strftime_now('%Y' * 10000000) }}".to_owned(),
        "{{ ([('x' * 1000000)] * 100000) | join }}".to_owned(),
        "{{ ''.join([('x' * 1000000)] * 100000) }}".to_owned(),
        "{{ ([('x' * 1000000)] * 100000) | string | length }}".to_owned(),
        "{{ (([('x' * 1000000)] * 100000) ~ 'y') | length }}".to_owned(),
        "{{ [('x' * 1000000)] * 100000 }}".to_owned(),
        "{% set a %}{{ [('x' * 1000000)] * 100000 }}{% endset %}".to_owned(),
        "{{ ([('x' * 1000000)] * 100000) | tojson }}".to_owned(),
        "{{ ([('x' * 1000000)] * 100000) | sort | first | length }}{{ 'a' * 1000000000 }}".to_owned(),
        "{{ ([('x' * 1000000)] * 100000) | unique | list | length }}{{ 'a' * 1000000000 }}".to_owned(),
        "{{ ([('x' * 1000000)] * 100000) | map('upper') | list | length }}".to_owned(),
        "{{ ([('x' * 1000000)] * 100000) | map('length') | list | length }}".to_owned(),
        "{{ ([1] * 1000000000) | list | length }}".to_owned(),
        "{{ ([1] * 1000000000) | length ~ 'a' * 1000000000 }}".to_owned(),
        "{{ ([1] * 1000000000) | reverse | first ~ 'a' * 1000000000 }}".to_owned(),
        "{{ ([1] * 1000000000)[::2] | length ~ 'a' * 1000000000 }}".to_owned(),
        "{{ ([1] * 1000000000) | last ~ 'a' * 1000000000 }}".to_owned(),
        "{{ (2 in [1] * 1000000000) ~ 'a' * 1000000000 }}".to_owned(),
        "{{ ([1] * 1000000000 == [1] * 1000000000) ~ 'a' * 1000000000 }}".to_owned(),
        "{{ ('{:999}' * 100000).format(1) }}".to_owned(),
        "{{ '{:{}}'.format(1, 1000000000) }}".to_owned(),
        "{{ ('{0}' * 10000).format('x' * 1000000) }}".to_owned(),
        "{{ ('{0}' * 10000).format(['x' * 1000000]) }}".to_owned(),
        "{{ 'a'.center(1000000000) }}".to_owned(),
        "{{ 10 ** 1000000000 }}{{ 'a' * 1000000000 }}".to_owned(),
        "{{ ([[1] * 1000000] * 1000) | sum(start=[]) | length }}".to_owned(),
        "{% macro f(x, n) %}{% if n > 0 %}{{ f(x + x, n - 1) }}{% endif %}{% endmacro %}{{ f([1], 100) }}".to_owned(),
        "{% set n = namespace(x={'a': 1}) %}{% for i in range(9999) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x ~ '' }}".to_owned(),
        "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == n.x }}{{ ([n.x] | tojson) }}".to_owned(),
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ (n.x == n.y) ~ 'a' * 1000000000 }}".to_owned(),
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ ([n.x, n.y] | unique | list | length) ~ 'a' * 1000000000 }}".to_owned(),
        "{% set n = namespace(x=(1,), y=(1,)) %}{% for i in range(40) %}{% set n.x = (n.x, n.x) %}{% set n.y = n.y, n.y %}{% endfor %}{{ (n.x == n.y) ~ 'a' * 1000000000 }}".to_owned(),
        "{% set n = namespace(x={}, y={}) %}{% for i in range(40) %}{% set n.x = dict(a=n.x, b=n.x) %}{% set n.y = dict(a=n.y, b=n.y) %}{% endfor %}{{ (n.x == n.y) ~ 'a' * 1000000000 }}".to_owned(),
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set n.x = ([n.x] * 2) | list %}{% set n.y = ([n.y] * 2) | list %}{% endfor %}{{ (n.x == n.y) ~ 'a' * 1000000000 }}".to_owned(),
        looped("{% if a == b %}{% endif %}"),
        looped("{% if a is lower %}{% endif %}"),
        looped("{% if a is startingwith b %}{% endif %}"),
        looped("{% if a.find('y') %}{% endif %}"),
        looped("{% if a.count('x') %}{% endif %}"),
        looped("{% if a.isalpha() %}{% endif %}"),
        looped("{% if 'y' in a %}{% endif %}"),
        looped("{% if a | length %}{% endif %}"),
        looped("{% if a[5:6] %}{% endif %}"),
        looped("{% if a[500000] %}{% endif %}"),
        looped("{% if a < b %}{% endif %}"),
        looped("{% if b in [a] %}{% endif %}"),
        looped("{% set c = {a: 1} %}"),
        looped("{% set c = m[a] %}"),
        looped("{% if a %}{% endif %}"),
        looped("{% set c = a | int %}"),
        looped("{% set c = a | first %}"),
        looped("{% set c = a | last %}"),
        looped("{% set c = a.strip('x') %}"),
        looped("{% set c = a | trim('x') %}"),
        looped("{% set c = a.endswith(b) %}"),
        looped("{% set c = a | default(b) %}"),
        looped("{% set c = f(a) %}"),
        looped("{% set c = a.splitlines() | length %}"),
        "{% set n = namespace(x=['x' * 1000000]) %}{% for i in range(17) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | unique | list | length }}".to_owned(),
        "{{ ('ab' * 1000000) | list | batch(1) | list | length ~ 'a' * 1000000000 }}".to_owned(),
        "{{ [1] | batch(1000000000, 'x') | list | length ~ 'a' * 1000000000 }}".to_owned(),
        "{{ [1] | slice(1000000000, 'x') | list | length ~ 'a' * 1000000000 }}".to_owned(),
        "{{ 1.5 | round(1000000000) ~ 'a' * 1000000000 }}".to_owned(),
            ];
    // Five times that, as on a busy machine anything may be interrupted.
    const PROMISED: Duration = Duration::from_millis(100);
    let messages = [message("user", "x")];
    let mut survivors = Vec::new();
    for bomb in &bombs {
        let tries = || (0..3).map(|_| timed(|| render(bomb, &messages)));
        let in_time = |(result, took): (_, Duration)| matches!(result, Err(Error::Template(_))) && took < 5 * PROMISED;
        if !tries().any(in_time) {
            survivors.push(format!("{bomb:.150}"));
        }
    }
    assert!(survivors.is_empty(), "{survivors:#?}");
}

#[test]
fn a_huge_template_is_refused_and_a_long_chat_is_not() {
    let huge = "x".repeat(600 << 10);
    assert!(matches!(render(&huge, &[]), Err(Error::TooLarge { .. })));

    let source = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}{% if m.role == 'user' %}<|user|>{% else %}<|bot|>{% endif %}{{ m.content | trim }}{{ '\n' }}{% endfor %}";
    let long: Vec<Value> = (0..4000).map(|n| message(["user", "assistant"][n % 2], &"word ".repeat(200))).collect();
    assert!(render(source, &long).unwrap().len() > 4000 * 999);
    let _ = template(source);
}
