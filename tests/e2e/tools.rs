//! Tools and reasoning with the real worker, on a model that says what it is told to.

use rbee_testkit::{Cluster, Setup, scripted};
use rbee_wire::event::{Event, FinishReason};
use serde_json::{Value, json};

/// How the model's family writes the reasoning and the calls of earlier messages.
const HISTORY: &str = "{%- for call in message.tool_calls or [] %}\
    {{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}\
    {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{%- endif %}";

/// A model that calls two tools where it has any, and answers when it is told what they said. Its name.
pub fn model_that_calls(cluster: &Cluster) -> String {
    let calls: &[&str] = &[
        "<think>",
        "\nTwo",
        " tools.",
        "\n</think",
        ">\n\n",
        "Let me",
        " look.",
        "\n",
        "<tool_call>",
        "\n{\"name\": \"get_",
        "weather\", \"arguments\"",
        ": {\"city\": ",
        "\"Par",
        "is\"}}",
        "\n</tool_call>",
        "\n<tool_call>\n",
        "{\"name\": \"get_time\", ",
        "\"arguments\": {}}\n</tool_",
        "call>",
    ];
    let answers: &[(&str, &[&str])] =
        &[("messages[-1].role == 'tool'", &["Wa", "rm."]), ("tools", calls), ("true", &["No tools", " here."])];
    scripted::write(cluster.folder(), HISTORY, answers).display().to_string()
}

fn tools() -> Value {
    json!([
        { "type": "function", "function": { "name": "get_weather", "parameters": { "type": "object" } } },
        { "type": "function", "function": { "name": "get_time", "description": "The time." } },
    ])
}

#[test]
fn a_job_has_reasoning_text_and_calls_apart_and_the_end_says_that_there_are_calls() {
    let cluster = Setup::real().home();
    let model = model_that_calls(&cluster);
    cluster.rbee(&["up"]).exits(0);
    let chat = |more: Value| {
        let hi = json!([{ "role": "user", "content": "hi" }]);
        crate::with(json!({ "operation": "infer", "model": model, "messages": hi }), more)
    };
    let told = cluster.job(&chat(json!({ "tools": tools() })));
    let of = |told: &rbee_testkit::http::Told| {
        let (mut text, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
        for token in told.tokens() {
            text.push_str(&token.t);
            thought.push_str(&token.reasoning);
            for part in token.tool_calls {
                match part.name {
                    Some(name) => calls.push((part.id.unwrap(), name, part.arguments)),
                    None => calls[part.index as usize].2.push_str(&part.arguments),
                }
            }
        }
        (text, thought, calls)
    };
    let (text, thought, calls) = of(&told);
    assert_eq!((text.as_str(), thought.as_str()), ("Let me look.", "Two tools."));
    let called: Vec<_> = calls.iter().map(|(_, name, arguments)| (name.as_str(), arguments.as_str())).collect();
    assert_eq!(called, [("get_weather", "{\"city\": \"Paris\"}"), ("get_time", "{}")]);
    assert_eq!(told.done().choices[0].finish_reason, FinishReason::ToolCalls);
    assert_eq!(told.done().usage.unwrap().completion_tokens, 20);

    let back: Vec<Value> = calls
        .iter()
        .map(|(id, name, arguments)| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }))
        .collect();
    let results = calls.iter().map(|(id, ..)| json!({ "role": "tool", "content": "21", "tool_call_id": id }));
    let mut messages = vec![json!({ "role": "user", "content": "hi" })];
    messages.push(json!({ "role": "assistant", "content": text, "reasoning_content": thought, "tool_calls": back }));
    messages.extend(results);
    let told = cluster.job(&chat(json!({ "messages": messages, "tools": tools() })));
    assert_eq!((told.text().as_str(), told.done().choices[0].finish_reason), ("Warm.", FinishReason::Stop));

    // Its own end is not waited for: the answer is over with the first call.
    let told = cluster.job(&chat(json!({ "tools": tools(), "parallel_tool_calls": false })));
    assert_eq!((of(&told).2.len(), told.done().usage.unwrap().completion_tokens), (1, 14));
    // What the model would say of its own accord to a prompt without a template is text to the letter.
    let told = cluster.job(&crate::with(chat(json!({ "messages": null })), json!({ "prompt": "<|cue 1|>" })));
    assert!(told.text().starts_with("<think>\nTwo tools.\n</think>\n\nLet me look.\n<tool_call>"), "{}", told.text());
}

#[test]
fn a_model_without_a_place_for_tools_refuses_them_by_name() {
    let cluster = Setup::real().warm();
    let hi = json!([{ "role": "user", "content": "hi" }]);
    let asked = |more: Value| crate::with(json!({ "operation": "infer", "messages": hi }), more);
    let refused = |told: rbee_testkit::http::Told| match told.said.last().map(|said| said.event.clone()) {
        Some(Event::Error(error)) => error.details.unwrap()["violations"][0]["field"].clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(cluster.job(&asked(json!({ "tools": tools() })))), "tools");
    let told = cluster.job(&asked(json!({ "tools": tools(), "tool_choice": "none", "max_tokens": 4 })));
    assert_eq!(told.done().choices.len(), 1);
    let simulated = Setup::sim("").warm();
    assert_eq!(refused(simulated.job(&asked(json!({ "tools": tools() })))), "tools");
}

#[test]
fn reasoning_is_shown_beside_the_answer_and_never_in_it() {
    let cluster = Setup::real().home();
    let think: &[&str] = &["<think>", "A bee", " thinks.", "</think>\n", "\nHon", "ey!"];
    let model = scripted::write(cluster.folder(), HISTORY, &[("true", think)]).display().to_string();
    let out = cluster.rbee(&["infer", "--model", &model, "What?"]).exits(0);
    assert_eq!(out.stdout, "Honey!");
    assert!(out.stderr.contains("A bee thinks.\n\n"), "{}", out.stderr);
    let out = cluster.rbee(&["-q", "infer", "--model", &model, "What?"]).exits(0);
    assert_eq!((out.stdout.as_str(), out.stderr.as_str()), ("Honey!", ""));
}
