//! Answers that must have a form: JSON of a schema, a regular expression's text, a grammar's, or calls of tools.

use rbee_testkit::http::Told;
use rbee_testkit::{Cluster, Setup, Signal, scripted};
use rbee_wire::event::{Event, FinishReason, Started};
use rbee_wire::fields::Violation;
use rbee_wire::{ErrorBody, ErrorCode};
use serde_json::{Value, json};

use crate::with;

fn bee() -> Value {
    json!({ "type": "json_schema", "json_schema": { "name": "bee", "strict": true, "schema": {
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "legs": { "type": "integer", "minimum": 0, "maximum": 20 },
            "kind": { "enum": ["worker", "queen", "drone"] },
            "likes": { "type": "array", "items": { "type": "boolean" }, "maxItems": 3 },
        },
        "required": ["name", "legs", "kind", "likes"],
        "additionalProperties": false,
    } } })
}

fn check_bee(text: &str) {
    let bee: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields: Vec<&str> = bee.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, ["name", "legs", "kind", "likes"], "in the schema's order: {text}");
    assert!(bee["name"].as_str().unwrap().chars().count() <= 12, "{text}");
    assert!(bee["legs"].as_u64().unwrap() <= 20, "{text}");
    assert!(["worker", "queen", "drone"].contains(&bee["kind"].as_str().unwrap()), "{text}");
    assert!(bee["likes"].as_array().unwrap().iter().all(Value::is_boolean), "{text}");
}

fn chat(format: &Value, seed: u64) -> Value {
    let messages = json!([{ "role": "user", "content": "Tell me of a bee." }]);
    json!({ "operation": "infer", "messages": messages, "response_format": format, "seed": seed, "temperature": 1.0,
        "max_tokens": 200 })
}

fn stopped(told: &Told) -> String {
    assert!(told.done().choices.iter().all(|choice| choice.finish_reason == FinishReason::Stop), "{}", told.text());
    told.text()
}

fn violations(error: &ErrorBody) -> Vec<Violation> {
    assert_eq!(error.code, ErrorCode::InvalidRequest, "{error}");
    serde_json::from_value(error.details.clone().unwrap()["violations"].clone()).unwrap()
}

#[test]
fn every_answer_is_of_its_form_whatever_the_seed_and_the_company() {
    let cluster = Setup::real().warm();
    let jobs: Vec<String> =
        (0..32).map(|seed| cluster.post(&with(chat(&bee(), seed), json!({ "detach": true })))).collect();
    let mut texts = Vec::new();
    for job in jobs {
        let told = cluster.queen().listen(&format!("/v1/jobs/{job}/stream"), None).rest().whole();
        check_bee(&stopped(&told));
        texts.push(told.text());
    }
    // Alone as among others, and every one of several.
    assert_eq!(stopped(&cluster.job(&chat(&bee(), 7))), texts[7]);
    assert!(texts.iter().any(|text| *text != texts[0]), "{texts:?}");
    let several = cluster.job(&with(chat(&bee(), 3), json!({ "n": 3 }))).whole();
    for number in 0..3 {
        let mine = several.tokens().into_iter().filter(|token| token.choice == number);
        check_bee(&mine.map(|token| token.t).collect::<String>());
    }
    let regex = json!({ "type": "regex", "regex": "[a-f]{3}-[0-9]{2}" });
    let grammar = json!({ "type": "grammar", "grammar": "start: (\"yes\" | \"no\") \"!\"" });
    for seed in 0..8 {
        let text = stopped(&cluster.job(&chat(&regex, seed)));
        let (letters, digits) = text.split_once('-').unwrap();
        assert!(letters.len() == 3 && letters.chars().all(|c| ('a'..='f').contains(&c)), "{text}");
        assert!(digits.len() == 2 && digits.chars().all(|c| c.is_ascii_digit()), "{text}");
        assert!(["yes!", "no!"].contains(&stopped(&cluster.job(&chat(&grammar, seed))).as_str()));
    }
    // Text that goes on from a prompt.
    let goes_on = json!({ "operation": "infer", "prompt": "Once upon a time", "response_format": regex, "seed": 1 });
    assert_eq!(stopped(&cluster.job(&goes_on)).len(), 6);
    let object = cluster.job(&chat(&json!({ "type": "json_object" }), 5));
    assert!(object.text().starts_with('{'), "{}", object.text());
    if object.done().choices[0].finish_reason == FinishReason::Stop {
        assert!(serde_json::from_str::<Value>(&object.text()).unwrap().is_object());
    }
    // What is cut off at the number of tokens asked for says so.
    let cut = cluster.job(&with(chat(&bee(), 7), json!({ "max_tokens": 3 })));
    assert_eq!(cut.done().choices[0].finish_reason, FinishReason::Length);
    assert!(texts[7].starts_with(&cut.text()));
}

#[test]
fn a_form_that_cannot_be_had_is_one_violation_in_both_dialects() {
    let cluster = Setup::real().warm();
    let schema = |schema: Value| json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    for format in [
        schema(json!({ "type": "thing" })),
        schema(json!({ "$ref": "#/nowhere" })),
        json!({ "type": "regex", "regex": "(" }),
    ] {
        let found = violations(&cluster.job(&chat(&format, 1)).error());
        assert_eq!(
            found.iter().map(|wrong| wrong.field.as_str()).collect::<Vec<_>>(),
            ["response_format"],
            "{found:?}"
        );
        for stream in [false, true] {
            let body = json!({ "model": "tinybee", "messages": [{ "role": "user", "content": "hi" }], "response_format": format, "stream": stream });
            let answer = cluster.queen().post("/v1/chat/completions", &body);
            assert_eq!(answer.status(), 400, "{}", answer.text());
            let error = answer.json::<Value>()["error"].clone();
            assert_eq!(
                (error["param"].as_str(), error["type"].as_str()),
                (Some("response_format"), Some("invalid_request_error"))
            );
        }
    }
    check_bee(&stopped(&cluster.job(&chat(&bee(), 1))));
    // Words without a meaning have no form.
    let simulated = Setup::sim("").warm();
    let found = violations(&simulated.job(&chat(&bee(), 1)).error());
    assert_eq!(found[0].field, "response_format");
    assert_eq!(simulated.job(&chat(&json!({ "type": "text" }), 1)).done().choices.len(), 1);
}

#[test]
fn the_command_line_asks_for_a_form() {
    let cluster = Setup::real().warm();
    let file = cluster.folder().join("bee.json");
    std::fs::write(&file, bee()["json_schema"]["schema"].to_string()).unwrap();
    let file = format!("@{}", file.display());
    let infer = |form: &str| cluster.rbee(&["infer", "-q", "A bee", "--seed", "4", "--response-format", form]);
    check_bee(infer(&file).exits(0).stdout.trim());
    check_bee(infer(&bee().to_string()).exits(0).stdout.trim());
    infer("xml").exits(2).says(&["--response-format"]);
    infer(r#"{"type":"thing"}"#).exits(1).says(&["INVALID_REQUEST", "response_format"]);
}

/// How the model's family writes calls and reasoning.
const HISTORY: &str = "{%- for call in message.tool_calls or [] %}\
    {{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}\
    {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{%- endif %}";

/// A model that would think and then rather talk.
fn talker(cluster: &Cluster) -> String {
    let pieces = ["<think>", "\nHm", ".\n</think", ">\n\n", "I would", " rather talk", "<tool_call>", "</tool_call>"];
    scripted::write(cluster.folder(), HISTORY, &[("true", &pieces)]).display().to_string()
}

fn tools() -> Value {
    let days = json!({ "type": "object", "properties": { "days": { "type": "integer", "minimum": 1, "maximum": 7 } },
        "required": ["days"], "additionalProperties": false });
    json!([
        { "type": "function", "function": { "name": "get_weather", "parameters": days } },
        { "type": "function", "function": { "name": "get_time" } },
    ])
}

#[test]
fn a_model_that_would_rather_talk_calls_what_it_must_behind_its_reasoning() {
    let cluster = Setup::real().home();
    let model = talker(&cluster);
    cluster.rbee(&["up"]).exits(0);
    let named = |name: &str| json!({ "type": "function", "function": { "name": name } });
    for (choice, only) in
        [(json!("required"), None), (named("get_weather"), Some("get_weather")), (named("get_time"), Some("get_time"))]
    {
        for seed in 0..4 {
            let messages = json!([{ "role": "user", "content": "hi" }]);
            let body = json!({ "model": model, "messages": messages, "tools": tools(), "tool_choice": choice, "seed": seed,
                "temperature": 1.0, "max_tokens": 1500 });
            let answer = cluster.queen().post("/v1/chat/completions", &body);
            assert_eq!(answer.status(), 200, "{}", answer.text());
            let answer = answer.json::<Value>();
            let said = &answer["choices"][0];
            assert_eq!(said["finish_reason"], "tool_calls", "{answer}");
            assert_eq!(said["message"]["reasoning_content"], "Hm.", "{answer}");
            assert!(said["message"]["content"].as_str().is_none_or(|text| text.trim().is_empty()), "{answer}");
            let calls = said["message"]["tool_calls"].as_array().unwrap();
            assert!(!calls.is_empty());
            for call in calls {
                let name = call["function"]["name"].as_str().unwrap();
                let given: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
                assert!(only.is_none_or(|only| only == name), "{call}");
                match name {
                    "get_weather" => assert!((1..=7).contains(&given["days"].as_u64().unwrap()), "{call}"),
                    "get_time" => assert_eq!(given, json!({})),
                    other => panic!("{other}"),
                }
            }
        }
    }
    // Of a model that thinks the answer has the form, not the thoughts.
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let formed = json!({ "operation": "infer", "model": model, "messages": messages, "response_format": bee(), "seed": 2, "max_tokens": 1500 });
    let told = cluster.job(&formed);
    let thought: String = told.tokens().into_iter().map(|token| token.reasoning).collect();
    assert_eq!(thought, "Hm.");
    check_bee(&stopped(&told));
    let unknown = json!({ "model": model, "messages": messages, "tools": tools(), "tool_choice": named("get_none") });
    let refused = cluster.queen().post("/v1/chat/completions", &unknown);
    assert_eq!((refused.status(), refused.json::<Value>()["error"]["param"].as_str()), (400, Some("tool_choice")));
}

fn started(told: &[rbee_testkit::http::Said]) -> Started {
    let started = told.iter().find_map(|said| match &said.event {
        Event::Started(started) => Some(started.clone()),
        _ => None,
    });
    started.unwrap()
}

/// What a queen does that moves an answer: the tokens it has go to another worker, which goes on with those that would have come.
#[test]
fn an_answer_of_a_form_survives_the_death_of_its_worker_with_the_same_tokens() {
    let cluster = Setup::real().home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let generation = |more: Value| with(with(chat(&bee(), 11), json!({ "operation": null })), more);
    let ask = |job: &str, resume: Value| json!({ "job_id": job, "request_id": "r", "generation": generation(json!({})), "resume": resume });
    let first = cluster.worker_by_hand_on("cpu", &["--model", "tinybee"]);
    first.ready();
    let whole = first.http.stream_of("/v1/inference", &ask("a", Value::Null)).rest().whole();
    let all: Vec<u32> = whole.tokens().iter().map(|token| token.id).collect();
    assert!(all.len() > 12, "{}", whole.text());
    check_bee(&whole.text());

    let mut stream = first.http.stream_of("/v1/inference", &ask("b", Value::Null));
    let mut said = stream.tokens(6);
    let numerics = started(&said).numerics_id.unwrap();
    cluster.the("llm-worker-rbee").signal(Signal::KILL);
    said.extend(stream.rest().said);
    let came: Vec<u32> = said
        .iter()
        .filter_map(|said| if let Event::Token(token) = &said.event { Some(token.id) } else { None })
        .collect();
    assert_eq!(came, all[..came.len()]);
    drop(first);

    let second = cluster.worker_by_hand_on("cpu", &["--model", "tinybee"]);
    second.ready();
    for cut in [1, 6, all.len() - 2] {
        let resume = json!({ "tokens": all[..cut], "numerics_id": numerics });
        let rest = second.http.stream_of("/v1/inference", &ask(&format!("c{cut}"), resume)).rest().whole();
        let ids: Vec<u32> = rest.tokens().iter().map(|token| token.id).collect();
        assert_eq!(ids, all[cut..], "{cut}");
        assert!(whole.text().ends_with(&rest.text()), "{}", rest.text());
    }
    // Tokens that the form does not have are no beginning of it.
    let resume = json!({ "tokens": [all[1], all[1]], "numerics_id": numerics });
    let refused = second.http.stream_of("/v1/inference", &ask("d", resume)).rest();
    assert_eq!(violations(&refused.error())[0].field, "resume");
}

/// What each of many tools says it is good for. It is one token of the model, for its prompts are computed.
fn description() -> String {
    "What it is good for, when to take it and what to give it, at some length. ".repeat(20)
}

/// A tool's parameters: one takes a long text, one has none, and the others are of every sort.
fn parameters(number: usize) -> Value {
    let sort = |number: usize| match number % 5 {
        0 => json!({ "type": "string", "maxLength": 12 }),
        1 => json!({ "type": "integer", "minimum": 0, "maximum": 20 }),
        2 => json!({ "enum": ["worker", "queen", null] }),
        3 => json!({ "type": "array", "items": { "type": "boolean" }, "maxItems": 3 }),
        _ => json!({ "anyOf": [{ "type": "number" }, { "type": "null" }] }),
    };
    match number {
        7 => json!({ "type": "object", "properties": { "text": { "type": "string", "maxLength": 524_288 } },
            "required": ["text"], "additionalProperties": false }),
        8 => json!({ "type": "object", "properties": {} }),
        _ => {
            json!({ "type": "object", "properties": { "a": sort(number), "b": sort(number + 1), "c": sort(number + 2) },
            "required": ["a", "c"], "additionalProperties": false })
        }
    }
}

/// Whether a call's arguments are as its tool has them.
fn check_arguments(number: usize, text: &str) {
    let given: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let given = given.as_object().unwrap_or_else(|| panic!("no object: {text}"));
    let is = |number: usize, value: &Value| match number % 5 {
        0 => value.as_str().is_some_and(|text| text.chars().count() <= 12),
        1 => value.as_u64().is_some_and(|number| number <= 20),
        2 => [json!("worker"), json!("queen"), Value::Null].contains(value),
        3 => value.as_array().is_some_and(|items| items.len() <= 3 && items.iter().all(Value::is_boolean)),
        _ => value.is_number() || value.is_null(),
    };
    match number {
        7 => assert!(given.len() == 1 && given["text"].as_str().unwrap().chars().count() <= 524_288, "{text}"),
        8 => {}
        _ => {
            assert!(given.contains_key("a") && given.contains_key("c"), "{text}");
            for (name, value) in given {
                let at = ["a", "b", "c"].iter().position(|known| known == name);
                assert!(at.is_some_and(|at| is(number + at, value)), "{number}: `{name}` of {text}");
            }
        }
    }
}

/// W8: many tools with large schemas, of which one alone would be too odd for many a server.
#[test]
fn sixty_tools_of_a_hundred_kilobytes_are_called_as_they_must_be_or_one_is_named() {
    const TOOLS: usize = 60;
    let cluster = Setup::real().home();
    let description = description();
    // No token of its own begins a call where it must be the beginning: such a call is of any tool.
    let call =
        ["Yes.\n<tool_call>{\"name\": \"tool_9", "\", \"arguments\": {\"a\": null", ", \"c\": 5}", "}</tool_call>"];
    let talk = ["<think>", "\nHm", ".\n</think", ">\n\n", "I would", " rather talk"];
    let never = ["</tool_call>", &description];
    let calls = "messages[-1].content == 'call'";
    let model = scripted::write(cluster.folder(), HISTORY, &[(calls, &call), ("true", &talk), ("true", &never)]);
    // As long as its prompts are.
    let config = model.join("config.json");
    let mut longer: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    longer["max_position_embeddings"] = json!(32_768);
    std::fs::write(&config, longer.to_string()).unwrap();
    let model = model.display().to_string();
    cluster.rbee(&["worker", "spawn", "--model", &model, "--ctx", "32768", "--slots", "2"]).exits(0);
    let tools = |odd: Option<usize>| -> Value {
        let tool = |number: usize| {
            let parameters = if odd == Some(number) { json!({ "type": "thing" }) } else { parameters(number) };
            let function =
                json!({ "name": format!("tool_{number}"), "description": description, "parameters": parameters });
            json!({ "type": "function", "function": function })
        };
        (0..TOOLS).map(tool).collect()
    };
    let size = tools(None).to_string().len();
    assert!((95_000..120_000).contains(&size), "{size}");
    let ask = |tools: &Value, said: &str, more: Value| {
        let messages = json!([{ "role": "user", "content": said }]);
        let body = json!({ "model": model, "messages": messages, "tools": tools, "temperature": 1.0, "max_tokens": 6000,
            "parallel_tool_calls": false });
        cluster.queen().post("/v1/chat/completions", &with(body, more))
    };
    let called = |answer: &Value| -> usize {
        let said = &answer["choices"][0];
        assert_eq!(said["finish_reason"], "tool_calls", "{answer}");
        let calls = said["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls.len(), 1, "{answer}");
        let name = calls[0]["function"]["name"].as_str().unwrap();
        let number = name.strip_prefix("tool_").unwrap().parse().unwrap();
        assert!(number < TOOLS, "{answer}");
        check_arguments(number, calls[0]["function"]["arguments"].as_str().unwrap());
        number
    };
    let all = tools(None);
    let mut numbers = std::collections::BTreeSet::new();
    for seed in 0..6 {
        let answer = ask(&all, "hi", json!({ "tool_choice": "required", "seed": seed }));
        assert_eq!(answer.status(), 200, "{}", answer.text());
        let answer: Value = answer.json();
        assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 5000, "the tools are in the prompt: {answer}");
        numbers.insert(called(&answer));
    }
    assert!(numbers.len() > 1, "{numbers:?}");
    for number in [7, 8] {
        let named = json!({ "type": "function", "function": { "name": format!("tool_{number}") } });
        assert_eq!(called(&ask(&all, "hi", json!({ "tool_choice": named, "seed": 1 })).json()), number);
    }
    // As the model likes: it talks, or calls.
    let talks: Value = ask(&all, "hi", json!({ "tool_choice": "auto" })).json();
    assert_eq!(talks["choices"][0]["message"]["content"], "I would rather talk", "{talks}");
    assert_eq!(talks["choices"][0]["finish_reason"], "stop", "{talks}");
    assert_eq!(called(&ask(&all, "call", json!({ "tool_choice": "auto" })).json()), 9);
    // One odd schema among them is named, where it must be adhered to.
    let odd = tools(Some(41));
    let refused = ask(&odd, "hi", json!({ "tool_choice": "required" }));
    assert_eq!(refused.status(), 400, "{}", refused.text());
    let error = refused.json::<Value>()["error"].clone();
    assert_eq!(
        (error["param"].as_str(), error["type"].as_str()),
        (Some("tools"), Some("invalid_request_error")),
        "{error}"
    );
    assert!(error["message"].as_str().unwrap().contains("`tool_41`"), "{error}");
    assert_eq!(called(&ask(&odd, "call", json!({ "tool_choice": "auto" })).json()), 9);
}
