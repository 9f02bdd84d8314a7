//! Everything that a job's body can have wrong. The cases are made from the table of operations itself.

use rbee_testkit::http::{Http, Request};
use rbee_testkit::{CANARY, Setup};
use rbee_wire::fields::{Field, Kind, Need};
use rbee_wire::op::{OPERATIONS, OperationRow, Target};
use rbee_wire::{ErrorBody, ErrorCode};
use serde_json::{Map, Value, json};

/// Values that a field must not have.
fn wrong(field: &Field) -> Vec<String> {
    let long = format!("\"{}\"", "é".repeat(129));
    let texts = |values: &[&str]| values.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    match field.kind {
        Kind::Bool => texts(&["1", "0", "\"true\"", "[]", "{}"]),
        Kind::Int(min, max) => {
            let mut values =
                texts(&["-1", "1.5", "1e3", "\"1\"", "{}", "true", "18446744073709551616", "-9223372036854775808"]);
            values.extend(min.checked_sub(1).map(|under| under.to_string()));
            values.extend(max.checked_add(1).map(|over| over.to_string()));
            values
        }
        Kind::Float(min, max) => {
            let mut values = texts(&["\"1\"", "[]", "true", "1e300", "-1e300"]);
            values.extend([(min - 0.01).to_string(), (max + 0.01).to_string()]);
            values
        }
        Kind::Id => [texts(&["1", "\"\"", "\"a\\nb\"", "\"\\u0000\"", "[]", "{}"]), vec![long]].concat(),
        Kind::Text(_) => texts(&["1", "[\"a\"]", "{}", "true"]),
        Kind::Model => {
            let long = format!("\"{}\"", "a".repeat(2000));
            let names = texts(&[
                "1",
                "\"\"",
                "\"../x\"",
                "\"/a/../b\"",
                "\"a b\"",
                "\"-x\"",
                "\"a/b/c\"",
                "[]",
                "\"a\\u0000\"",
            ]);
            [names, vec![long]].concat()
        }
        Kind::Device => texts(&["1", "\"gpu\"", "\"cuda:\"", "\"cuda:-1\"", "\"\"", "[]"]),
        Kind::Texts(max) => {
            let many = format!("[{}]", vec!["\"a\""; max + 1].join(","));
            let long = format!("\"{}\"", "a".repeat(1025));
            [texts(&["1", "[1]", "[\"\"]", "\"\"", "{}"]), vec![many, long]].concat()
        }
        Kind::Bias => {
            let many: Map<String, Value> = (0..1025).map(|id: u32| (id.to_string(), json!(1))).collect();
            let ids = texts(&[
                "[]",
                "{\"x\":1}",
                "{\"1\":101}",
                "{\"1\":-101}",
                "{\"4294967296\":1}",
                "{\"-1\":1}",
                "{\"1\":\"1\"}",
            ]);
            [ids, vec![Value::Object(many).to_string()]].concat()
        }
        Kind::Messages => texts(&[
            "[]",
            "\"hi\"",
            "{}",
            "[1]",
            "[{\"role\":\"king\",\"content\":\"\"}]",
            "[{\"role\":\"user\"}]",
            "[{\"content\":\"x\"}]",
            "[{\"role\":\"user\",\"content\":1}]",
            "[{\"role\":\"user\",\"content\":\"\",\"x\":1}]",
        ]),
        Kind::Prompt => texts(&["1", "[]", "[\"a\"]", "[-1]", "[1.5]", "[4294967296]", "[[1]]", "{}", "true"]),
        Kind::Inputs => texts(&["[]", "\"a\"", "[1]", "[\"\"]", "[[]]", "[[-1]]", "[{}]"]),
        Kind::Hex(digits) => {
            let of = |digit: &str, count| format!("\"{}\"", digit.repeat(count));
            let wrong = vec![of("a", digits - 1), of("a", digits + 1), of("A", digits), of("g", digits)];
            [texts(&["1", "\"\"", "[]"]), wrong].concat()
        }
        Kind::Words(_) => texts(&["\"admin\"", "[]", "[\"king\"]", "[1]", "[\"admin\",\"admin\",\"admin\"]", "{}"]),
        Kind::Tokens => texts(&["[-1]", "1", "[4294967296]"]),
        Kind::Object => texts(&["1", "[]", "\"{}\""]),
        Kind::Tools => texts(&[
            "1",
            "{}",
            "[1]",
            "[{\"type\":\"retrieval\",\"function\":{\"name\":\"a\"}}]",
            "[{\"type\":\"function\",\"function\":{\"name\":\"a b\"}}]",
            "[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"parameters\":\"x\"}}]",
            "[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"x\":1}}]",
        ]),
        Kind::ToolChoice => texts(&["1", "\"required\"", "{\"type\":\"function\"}"]),
        Kind::ResponseFormat => texts(&[
            "1",
            "[]",
            "{}",
            "\"json_object\"",
            "{\"type\":\"xml\"}",
            "{\"type\":\"json_schema\"}",
            "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a\"}}",
            "{\"type\":\"regex\",\"regex\":1}",
        ]),
        Kind::KeepAlive => texts(&["\"\"", "[]", "true", "\"5x\"", "\"m5\"", "1e10"]),
        // Only what uses it can tell.
        Kind::Any => texts(if field.name == "device" { &["[]", "{}", "\"gpu\"", "1.5", "-1"] } else { &[] }),
    }
}

/// A body with what an operation asks for, one more field as raw JSON, and without one.
fn body(row: &OperationRow, name: &str, value: Option<&str>) -> String {
    let mut fields = vec![format!("\"operation\":\"{}\"", row.name)];
    for field in row.fields {
        let needed = field.need == Need::Required || (field.name == "prompt" && name != "messages");
        if needed && field.name != name {
            let value = match field.kind {
                Kind::Int(..) => "1".to_owned(),
                Kind::Model => "\"tinybee\"".to_owned(),
                Kind::Hex(digits) => format!("\"{}\"", "a".repeat(digits)),
                _ => format!("\"{CANARY}\""),
            };
            fields.push(format!("\"{}\":{value}", field.name));
        }
    }
    fields.extend(value.map(|value| format!("\"{name}\":{value}")));
    format!("{{{}}}", fields.join(","))
}

fn refused(server: &Http, body: &str) -> ErrorBody {
    let answer = server.send(Request::new("POST", "/v1/jobs").header("Content-Type", "application/json").body(body));
    let shown: String = body.chars().take(300).collect();
    assert_eq!(answer.status(), 400, "{shown}: {}", answer.text());
    assert!(!answer.text().contains(CANARY), "a refusal quotes the request: {}", answer.text());
    answer.error()
}

#[track_caller]
fn names(error: &ErrorBody, field: &str, body: &str) {
    assert_eq!(error.code, ErrorCode::InvalidRequest, "{body}: {error}");
    let violations = error.details.as_ref().and_then(|details| details["violations"].as_array().cloned());
    let violations = violations.unwrap_or_else(|| panic!("{body}: no list of violations: {error:?}"));
    assert!(violations.iter().any(|violation| violation["field"] == field), "{body}: {violations:?}");
}

#[test]
fn every_field_of_every_operation_is_refused_when_wrong_and_nothing_is_queued() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["up"]).exits(0);
    let (queen, hive) = (cluster.queen(), cluster.hive());
    let mut cases = 0;
    for row in OPERATIONS {
        let mut servers = vec![&queen];
        if row.target == Target::Hive {
            servers.push(&hive);
        }
        for server in servers {
            for field in row.fields {
                for value in wrong(field) {
                    let body = body(row, field.name, Some(&value));
                    names(&refused(server, &body), field.name, &body);
                    cases += 1;
                }
                let null = if field.need == Need::Required { Some("null") } else { None };
                if let Some(null) = null {
                    for body in [body(row, field.name, Some(null)), body(row, field.name, None)] {
                        names(&refused(server, &body), field.name, &body);
                        cases += 1;
                    }
                }
            }
            let unknown = body(row, "frobnicate", Some("1"));
            names(&refused(server, &unknown), "frobnicate", &unknown);
            let twice = body(row, "operation", Some(&format!("\"{}\"", row.name)));
            let error = refused(server, &twice);
            assert_eq!(error.code, ErrorCode::InvalidRequest);
            assert!(error.message.contains("twice"), "{error}");
            cases += 2;
        }
    }
    assert!(cases > 300, "{cases}");
    assert!(cluster.answers().is_empty(), "{:?}", cluster.jobs());
    assert_eq!(cluster.running("llm-worker-rbee"), []);
}

#[test]
fn all_violations_come_at_once_and_rules_that_span_fields_hold() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let queen = cluster.queen();
    let body = r#"{"operation":"infer","temperature":-1,"zzz":1,"max_tokens":0,"stop":[""],"n":2147483648}"#;
    let error = refused(&queen, body);
    for field in ["temperature", "zzz", "max_tokens", "stop", "n", "prompt"] {
        names(&error, field, body);
    }
    for (fields, field) in [
        (r#""prompt":"a","messages":[{"role":"user","content":"b"}]"#, "messages"),
        (r#""prompt":"a","min_tokens":5"#, "min_tokens"),
        (r#""prompt":"a","min_tokens":5,"max_tokens":4"#, "min_tokens"),
        (r#""prompt":"a","top_logprobs":5"#, "top_logprobs"),
        (r#""prompt":"a","top_p":0"#, "top_p"),
        (r#""messages":[{"role":"user","content":"b"}],"raw":true"#, "raw"),
        (r#""prompt":"a","tools":[]"#, "tools"),
        (r#""prompt":"a","tool_choice":"required""#, "tool_choice"),
        (r#""prompt":"a","response_format":{}"#, "response_format"),
    ] {
        let body = format!(r#"{{"operation":"infer",{fields}}}"#);
        names(&refused(&queen, &body), field, &body);
    }
    assert!(cluster.answers().is_empty());
}

#[test]
fn broken_bodies_are_refused() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let queen = cluster.queen();
    let deep = format!(r#"{{"operation":"infer","prompt":"x","chat_template_kwargs":{{"a":{}"#, "[".repeat(100_000));
    let canary = format!(r#"{{"operation":"infer","prompt":"{CANARY}","prompt":"{CANARY}"}}"#);
    for body in [
        "{",
        "[]",
        "null",
        "\"x\"",
        "\u{feff}{}",
        r#"{"operation":"infer","prompt":"\ud800"}"#,
        r#"{"operation":"infer","prompt":"x","temperature":1e400}"#,
        r#"{"operation":"infer","prompt":"x","temperature":NaN}"#,
        r#"{"operation":"infer","prompt":"x"} {}"#,
        r#"{"operation":"infer","prompt":"x",}"#,
        r#"{"operation":["infer"],"prompt":"x"}"#,
        r#"{"prompt":"x"}"#,
        "{\"operation\":\"infer\",\"prompt\":\"a\u{1}b\"}",
        r#"{"operation":"infer","prompt":"x","chat_template_kwargs":{"a":1,"a":2}}"#,
        &deep,
        &canary,
    ] {
        assert_eq!(refused(&queen, body).code, ErrorCode::InvalidRequest);
    }
    let bytes = Request::new("POST", "/v1/jobs").body(b"{\"operation\":\"infer\",\"prompt\":\"\xff\"}".to_vec());
    assert_eq!(queen.send(bytes).error().code, ErrorCode::InvalidRequest);
    assert_eq!(refused(&queen, r#"{"operation":"fly"}"#).code, ErrorCode::UnknownOperation);
    // Without any body at all.
    assert_eq!(queen.send(Request::new("POST", "/v1/jobs")).error().code, ErrorCode::InvalidRequest);
    let huge = format!(r#"{{"operation":"infer","prompt":"{}"}}"#, "a".repeat(25 << 20));
    let answer = queen.send(Request::new("POST", "/v1/jobs").body(huge));
    assert_eq!(answer.error().code, ErrorCode::PayloadTooLarge);
    assert!(cluster.answers().is_empty());
}

#[test]
fn what_only_the_worker_can_tell_ends_the_job_with_a_typed_error() {
    let cluster = Setup::sim("--sim-context 128").warm();
    for (fields, code, about) in [
        (json!({ "prompt": "a".repeat(200) }), ErrorCode::ContextLengthExceeded, "context"),
        (json!({ "prompt": "a", "max_tokens": 128 }), ErrorCode::ContextLengthExceeded, "context"),
        (json!({ "prompt": "a", "logit_bias": { "4000000": 1 } }), ErrorCode::InvalidRequest, "logit_bias"),
        (json!({ "prompt": "" }), ErrorCode::InvalidRequest, "prompt"),
    ] {
        let job = crate::with(json!({ "operation": "infer" }), fields);
        let told = cluster.job(&job);
        let error = told.refusal.clone().unwrap_or_else(|| told.error());
        assert_eq!(error.code, code, "{job}: {error}");
        assert!(error.message.to_lowercase().contains(about), "{job}: {error}");
    }
    assert_eq!(cluster.job(&crate::infer("a", 20)).whole().tokens().len(), 20, "the worker is well");
}
