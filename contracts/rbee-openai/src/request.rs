//! A request of the dialect as jobs.

use rbee_wire::body::parse_object;
use rbee_wire::fields::Violation;
use rbee_wire::job::{Infer, JobRequest, invalid};
use rbee_wire::{ErrorBody, ErrorCode};
use serde_json::{Map, Value, json};

use crate::fields::{Endpoint, Fate, Field};

/// Most prompts of one completion.
const MAX_PROMPTS: usize = 16;

/// Tokens of a completion that names no number: the dialect's own default.
const COMPLETION_TOKENS: u64 = 16;

/// The texts to embed, as the job calls them and as they are called here.
pub(crate) const TEXTS: (&str, &str) = ("embed", "input");

/// What is done with fields that change nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// They are told in a header.
    Reported,
    /// The request is refused.
    Refused,
}

/// How the answer is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streaming {
    /// Whole, when it is there.
    No,
    /// As it comes.
    Yes {
        /// With the token counts at the end.
        usage: bool,
    },
}

/// A request that has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// One job, or one for each prompt of a completion.
    pub jobs: Vec<Infer>,
    /// How the answer is sent.
    pub streaming: Streaming,
    /// How vectors are written, where vectors are asked for.
    pub encoding: Encoding,
    /// Fields that change nothing.
    pub ignored: Vec<String>,
}

/// How the values of a vector are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// As a list of numbers.
    #[default]
    Floats,
    /// As little-endian f32 in base64, which is what the SDKs ask for.
    Base64,
}

/// Reads and validates a posted body.
///
/// # Errors
/// `INVALID_REQUEST` with every violation, under the dialect's names.
pub fn read(endpoint: Endpoint, bytes: &[u8], unknown: Unknown) -> Result<Asked, ErrorBody> {
    let body = parse_object(bytes).map_err(|problem| ErrorBody::new(ErrorCode::InvalidRequest, problem))?;
    let mut reader = Reader::default();
    for (name, value) in body.iter().filter(|(_, value)| !value.is_null()) {
        match endpoint.field(name) {
            Some(field) => reader.take(field, value, &body),
            None => reader.ignored.push(shown(name)),
        }
    }
    let prompts = match endpoint {
        Endpoint::Chat => {
            if body.get("messages").is_none_or(Value::is_null) {
                reader.wrong("messages", "is required");
            }
            Vec::new()
        }
        Endpoint::Completions => {
            reader.job.entry("max_tokens").or_insert(COMPLETION_TOKENS.into());
            reader.prompts(body.get("prompt").unwrap_or(&Value::Null))
        }
        Endpoint::Embeddings => {
            if body.get("input").is_none_or(Value::is_null) {
                reader.wrong("input", "is required");
            }
            Vec::new()
        }
    };
    if unknown == Unknown::Refused {
        for name in std::mem::take(&mut reader.ignored) {
            reader.wrong(&name, "changes nothing here, and the request asks for strictness");
        }
    }
    reader.finish(prompts)
}

/// What a refusal of a job lists, under the names that the fields have here, from pairs of the job's and our own.
pub(crate) fn renamed(error: &ErrorBody, names: &[(&str, &str)]) -> Option<Vec<Violation>> {
    let list = error.details.as_ref()?["violations"].clone();
    let mut violations: Vec<Violation> = serde_json::from_value(list).ok()?;
    for wrong in &mut violations {
        if let Some((_, here)) = names.iter().find(|(there, _)| *there == wrong.field) {
            wrong.field = (*here).into();
        }
    }
    Some(violations)
}

/// A name from outside as it may be shown.
fn shown(name: &str) -> String {
    name.chars().take(64).collect::<String>().escape_debug().to_string()
}

#[derive(Default)]
struct Reader {
    /// The body of the job.
    job: Map<String, Value>,
    /// Fields of the job that have another name here.
    renamed: Vec<(&'static str, &'static str)>,
    found: Vec<Violation>,
    ignored: Vec<String>,
    streams: bool,
    usage: bool,
    encoding: Encoding,
}

impl Reader {
    fn wrong(&mut self, field: &str, problem: impl Into<String>) {
        self.found.push(Violation { field: field.into(), problem: problem.into() });
    }

    fn take(&mut self, field: &Field, value: &Value, body: &Map<String, Value>) {
        let name = field.name;
        match field.fate {
            Fate::Ignored => self.ignored.push(name.into()),
            Fate::Refused(unless) => {
                if !asks_for_nothing(name, value, body) {
                    self.wrong(name, format!("is not supported by this build ({unless})"));
                }
            }
            Fate::Job(to) => {
                if self.job.get(to).is_some_and(|other| other != value) {
                    self.wrong(name, "contradicts its other name");
                }
                self.job.insert(to.into(), value.clone());
                if to != name {
                    self.renamed.push((to, name));
                }
            }
            Fate::Own(_) => self.own(name, value, body),
        }
    }

    fn own(&mut self, name: &'static str, value: &Value, body: &Map<String, Value>) {
        match name {
            "messages" => self.messages(value),
            "tools" => {
                let choice = body.get("tool_choice");
                let forced = choice.is_some_and(|choice| choice == "required" || choice.is_object());
                self.tools(value, forced);
            }
            "input" => {
                let one = value.is_string() || value.as_array().is_some_and(|items| items.iter().all(Value::is_number));
                let inputs = if one && *value != json!([]) { json!([value]) } else { value.clone() };
                self.job.insert("embed".into(), inputs);
                self.renamed.push(TEXTS);
            }
            "encoding_format" => match value.as_str() {
                Some("float") => self.encoding = Encoding::Floats,
                Some("base64") => self.encoding = Encoding::Base64,
                _ => self.wrong(name, "must be `float` or `base64`"),
            },
            "seed" => {
                // The dialect's seeds are signed; as bits they are as good as any.
                let seed = value.as_i64().map(i64::cast_unsigned).or(value.as_u64());
                self.job.insert("seed".into(), seed.map_or_else(|| value.clone(), Value::from));
            }
            "max_tokens" => drop(self.job.insert("max_tokens".into(), value.clone())),
            "logprobs" => {
                self.job.insert("logprobs".into(), true.into());
                self.job.insert("top_logprobs".into(), value.clone());
                self.renamed.push(("top_logprobs", "logprobs"));
            }
            "stream" => match value.as_bool() {
                Some(streams) => self.streams = streams,
                None => self.wrong(name, "must be true or false"),
            },
            "stream_options" => self.stream_options(value),
            // Looked at when all else is there.
            _ => {}
        }
    }

    fn stream_options(&mut self, value: &Value) {
        let Some(options) = value.as_object() else {
            return self.wrong("stream_options", "must be an object");
        };
        for (name, value) in options.iter().filter(|(_, value)| !value.is_null()) {
            match (name.as_str(), value.as_bool()) {
                ("include_usage", Some(usage)) => self.usage = usage,
                ("include_usage", None) => self.wrong("stream_options.include_usage", "must be true or false"),
                _ => self.ignored.push(format!("stream_options.{}", shown(name))),
            }
        }
    }

    /// Messages in the job's form: a role and a text each.
    fn messages(&mut self, value: &Value) {
        let Some(list) = value.as_array() else {
            return self.wrong("messages", "must be a list of messages");
        };
        let mut messages = Vec::with_capacity(list.len());
        for (i, message) in list.iter().enumerate() {
            let Some(message) = message.as_object() else {
                return self.wrong("messages", format!("must be a list of messages: number {i} is not an object"));
            };
            let list = |name: &str| message.get(name).and_then(Value::as_array).filter(|list| !list.is_empty());
            let reasoning = message.get("reasoning_content").filter(|value| !value.is_null());
            let text = match message.get("content") {
                // An answer of calls alone, as the SDKs send it back.
                None | Some(Value::Null) if list("tool_calls").is_some() || reasoning.is_some() => String::new(),
                value => match content(value.unwrap_or(&Value::Null)) {
                    Ok(text) => text,
                    Err(problem) => return self.wrong("messages", format!("message {i}: {problem}")),
                },
            };
            let role = message.get("role").unwrap_or(&Value::Null);
            let mut said = json!({ "role": role, "content": text });
            for (name, value) in message {
                let empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
                match name.as_str() {
                    "role" | "content" => {}
                    // What the SDKs' own answers carry when they are sent back.
                    _ if empty => {}
                    "tool_calls" => said["tool_calls"] = self.calls(value),
                    "tool_call_id" | "reasoning_content" => said[name.as_str()] = value.clone(),
                    "name" if role == "tool" => said["name"] = value.clone(),
                    "function_call" => {
                        return self.wrong("messages", format!("message {i}: `{name}` is not supported by this build"));
                    }
                    _ => self.ignore(format!("messages.{}", shown(name))),
                }
            }
            messages.push(said);
        }
        self.job.insert("messages".into(), messages.into());
    }

    /// The calls of an assistant's message, with the fields that count.
    fn calls(&mut self, value: &Value) -> Value {
        let Some(calls) = value.as_array() else { return value.clone() };
        let call = |call: &Value| {
            let only = |value: &Value, names: &[&str]| match value.as_object() {
                Some(all) => all.iter().filter(|(name, _)| names.contains(&name.as_str())).map(pair).collect(),
                None => value.clone(),
            };
            let mut kept = only(call, &["id", "type", "function"]);
            if let Some(function) = call.get("function") {
                kept["function"] = only(function, &["name", "arguments"]);
            }
            kept
        };
        calls.iter().map(call).collect()
    }

    /// Definitions of functions, with the fields that count.
    fn tools(&mut self, value: &Value, forced: bool) {
        let Some(tools) = value.as_array() else {
            return drop(self.job.insert("tools".into(), value.clone()));
        };
        if tools.is_empty() {
            return;
        }
        let mut kept = Vec::with_capacity(tools.len());
        for tool in tools {
            let (Some(fields), Some(function)) = (tool.as_object(), tool["function"].as_object()) else {
                kept.push(tool.clone());
                continue;
            };
            let mut own = Map::new();
            for (name, value) in function.iter().filter(|(_, value)| !value.is_null()) {
                match name.as_str() {
                    "name" | "description" | "parameters" => drop(own.insert(name.clone(), value.clone())),
                    // What is done anyway: a call that must come has its schema, one that may come need not.
                    "strict" if value == forced || value == false => {}
                    _ => self.ignore(format!("tools.function.{}", shown(name))),
                }
            }
            for name in fields.keys().filter(|name| !matches!(name.as_str(), "type" | "function")) {
                self.ignore(format!("tools.{}", shown(name)));
            }
            kept.push(json!({ "type": fields.get("type"), "function": own }));
        }
        self.job.insert("tools".into(), kept.into());
    }

    fn ignore(&mut self, name: String) {
        if !self.ignored.contains(&name) {
            self.ignored.push(name);
        }
    }

    fn prompts(&mut self, value: &Value) -> Vec<Value> {
        match value {
            Value::String(_) => vec![value.clone()],
            // The ids of one prompt. Whether they are ids is the job's to say.
            Value::Array(list) if !list.is_empty() && list.iter().all(Value::is_number) => vec![value.clone()],
            Value::Array(list) if list.is_empty() || list.len() > MAX_PROMPTS => {
                self.wrong("prompt", format!("must be a text, or 1 to {MAX_PROMPTS} of them"));
                Vec::new()
            }
            Value::Array(list) if list.iter().all(|one| one.is_string() || one.is_array()) => list.clone(),
            Value::Null => {
                self.wrong("prompt", "is required");
                Vec::new()
            }
            _ => {
                self.wrong("prompt", "must be a text, a list of texts, or token ids in place of texts");
                Vec::new()
            }
        }
    }

    fn finish(mut self, prompts: Vec<Value>) -> Result<Asked, ErrorBody> {
        self.job.insert("operation".into(), "infer".into());
        // Where the prompt or the messages are at fault there is one job without them, so that all else is checked; what it
        // lacks is known already.
        let faulty = self.found.iter().any(|wrong| matches!(wrong.field.as_str(), "prompt" | "messages" | "input"));
        let mut asked = vec![self.job.clone()];
        if !prompts.is_empty() {
            let with = |prompt| self.job.clone().into_iter().chain([("prompt".to_owned(), prompt)]).collect();
            asked = prompts.into_iter().map(with).collect();
        }
        let mut jobs = Vec::new();
        for job in asked {
            match JobRequest::from_object(job) {
                Ok(JobRequest::Infer(infer)) => jobs.push(*infer),
                Ok(_) => {}
                Err(error) => {
                    let Some(violations) = renamed(&error, &self.renamed) else { return Err(error) };
                    let news = violations.into_iter().filter(|wrong| !(faulty && wrong.field == "prompt"));
                    self.found.extend(news);
                    break;
                }
            }
        }
        if !self.found.is_empty() {
            return Err(invalid(self.found));
        }
        let streaming = if self.streams { Streaming::Yes { usage: self.usage } } else { Streaming::No };
        Ok(Asked { jobs, streaming, encoding: self.encoding, ignored: self.ignored })
    }
}

fn pair((name, value): (&String, &Value)) -> (String, Value) {
    (name.clone(), value.clone())
}

/// The text of a message's content: a text, or parts of type `text`, a line each.
fn content(value: &Value) -> Result<String, String> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        Value::Null => return Err("content is required".into()),
        _ => return Err("content must be a text or a list of parts".into()),
    };
    let texts = parts.iter().map(|part| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text"), None) => Err("a part of type `text` has no text".to_owned()),
        (Some(kind), _) => Err(format!("parts of type `{}` are not supported by this build", shown(kind))),
        (None, _) => Err("a part has no type".to_owned()),
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// Whether a field that is not supported asks for what is done anyway.
fn asks_for_nothing(name: &str, value: &Value, body: &Map<String, Value>) -> bool {
    let empty = match value {
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(flag) => !flag,
        _ => false,
    };
    match name {
        "function_call" => value == "none" || value == "auto",
        "modalities" => *value == json!(["text"]),
        "best_of" => value.as_u64() == Some(body.get("n").and_then(Value::as_u64).unwrap_or(1)),
        "functions" | "echo" | "suffix" => empty,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use rbee_wire::job::Input;

    use super::*;

    fn asked(endpoint: Endpoint, body: &Value) -> Result<Asked, Vec<String>> {
        read(endpoint, body.to_string().as_bytes(), Unknown::Reported).map_err(|error| {
            assert_eq!(error.code, ErrorCode::InvalidRequest);
            let found = error.details.unwrap()["violations"].clone();
            serde_json::from_value::<Vec<Violation>>(found).unwrap().into_iter().map(|wrong| wrong.field).collect()
        })
    }

    fn chat(more: Value) -> Result<Asked, Vec<String>> {
        let mut body = json!({ "model": "tinybee", "messages": [{ "role": "user", "content": "hi" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        asked(Endpoint::Chat, &body)
    }

    fn completion(more: Value) -> Result<Asked, Vec<String>> {
        let mut body = json!({ "model": "tinybee", "prompt": "Once" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        asked(Endpoint::Completions, &body)
    }

    #[test]
    fn fields_of_the_job_keep_their_meaning_and_their_own_names_in_refusals() {
        let asked = chat(json!({ "max_completion_tokens": 7, "seed": -1, "stop": "x", "stream": true,
            "stream_options": { "include_usage": true, "include_obfuscation": false }, "user": "u", "zzz": 1 }))
        .unwrap();
        let generation = &asked.jobs[0].generation;
        assert_eq!((generation.max_tokens, generation.seed), (Some(7), Some(u64::MAX)));
        assert_eq!(generation.stop, ["x"]);
        assert_eq!(asked.streaming, Streaming::Yes { usage: true });
        assert_eq!(asked.ignored, ["stream_options.include_obfuscation", "user", "zzz"]);
        assert_eq!(chat(json!({ "max_completion_tokens": 0 })), Err(vec!["max_completion_tokens".into()]));
        assert_eq!(chat(json!({ "max_completion_tokens": 3, "max_tokens": 4 })), Err(vec!["max_tokens".into()]));
        assert!(chat(json!({ "max_completion_tokens": 3, "max_tokens": 3 })).is_ok());
        assert_eq!(
            chat(json!({ "temperature": 3, "n": 99, "stream": 1 })),
            Err(vec!["stream".into(), "temperature".into(), "n".into()])
        );
        assert_eq!(completion(json!({ "logprobs": 21 })), Err(vec!["logprobs".into()]));
    }

    #[test]
    fn what_changes_nothing_is_refused_where_strictness_is_asked_for() {
        let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "user": "u", "zzz": 1 }).to_string();
        assert!(read(Endpoint::Chat, body.as_bytes(), Unknown::Reported).is_ok());
        let error = read(Endpoint::Chat, body.as_bytes(), Unknown::Refused).unwrap_err();
        assert!(error.message.contains("`user`") && error.message.contains("`zzz`"), "{error}");
    }

    #[test]
    fn contents_are_texts_or_parts_and_nothing_else_passes_in_silence() {
        let texts = |messages: Value| {
            asked(Endpoint::Chat, &json!({ "messages": messages })).map(|asked| {
                asked.jobs[0].generation.messages.clone().unwrap().into_iter().map(|m| m.content).collect()
            })
        };
        let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
        assert_eq!(texts(json!([{ "role": "user", "content": parts }])), Ok(vec!["a\nb".to_owned()]));
        let back = json!([
            { "role": "user", "content": "a" },
            { "role": "assistant", "content": "b", "refusal": null, "annotations": [], "tool_calls": null },
            { "role": "user", "content": "c" },
        ]);
        assert_eq!(texts(back), Ok(vec!["a".to_owned(), "b".into(), "c".into()]));
        for wrong in [
            json!([]),
            json!("hi"),
            json!([1]),
            json!([{ "role": "user" }]),
            json!([{ "role": "king", "content": "x" }]),
            json!([{ "content": "x" }]),
            json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] }]),
            json!([{ "role": "assistant", "content": "", "tool_calls": [{ "id": "1" }] }]),
            json!([{ "role": "assistant", "content": null, "tool_calls": [] }]),
            json!([{ "role": "assistant", "content": "", "function_call": { "name": "f", "arguments": "{}" } }]),
            json!([{ "role": "user", "content": "", "tool_call_id": "1" }]),
        ] {
            assert_eq!(texts(wrong.clone()), Err(vec!["messages".into()]), "{wrong}");
        }
        let asked = asked(Endpoint::Chat, &json!({ "messages": [{ "role": "user", "content": "x", "name": "Ada" }] }));
        assert_eq!(asked.unwrap().ignored, ["messages.name"]);
    }

    #[test]
    fn tools_and_what_was_called_reach_the_job_and_nothing_of_them_passes_in_silence() {
        let call =
            json!({ "id": "c1", "type": "function", "index": 0, "function": { "name": "f", "arguments": "{}" } });
        let asked = chat(json!({
            "messages": [
                { "role": "user", "content": "hi" },
                { "role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "hm", "refusal": null },
                { "role": "tool", "content": [{ "type": "text", "text": "7" }], "tool_call_id": "c1", "name": "f" },
            ],
            "tools": [{ "type": "function", "function":
                { "name": "f", "description": null, "parameters": { "type": "object" }, "strict": true } }],
            "tool_choice": "auto",
            "parallel_tool_calls": false,
        }))
        .unwrap();
        let generation = &asked.jobs[0].generation;
        let messages = serde_json::to_value(generation.messages.as_ref().unwrap()).unwrap();
        assert_eq!(
            messages,
            json!([
                { "role": "user", "content": "hi" },
                { "role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls":
                    [{ "id": "c1", "type": "function", "function": { "name": "f", "arguments": "{}" } }] },
                { "role": "tool", "content": "7", "tool_call_id": "c1", "name": "f" },
            ])
        );
        let tool = json!({ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } });
        assert_eq!(generation.tools, Some(vec![tool]));
        assert_eq!(generation.parallel_tool_calls, Some(false));
        assert!(generation.may_call());
        assert_eq!(asked.ignored, ["tools.function.strict"]);
    }

    #[test]
    fn forms_and_calls_that_must_come_are_the_jobs_own() {
        let schema = json!({ "name": "x", "schema": { "type": "object" }, "strict": true });
        let format = json!({ "type": "json_schema", "json_schema": schema });
        let generation = |more: Value| {
            let asked = chat(more).unwrap();
            assert_eq!(asked.ignored, Vec::<String>::new(), "strict is what is done");
            asked.jobs.into_iter().next().unwrap().generation
        };
        assert_eq!(json!(generation(json!({ "response_format": format })).response_format), format);
        let tools = json!([{ "type": "function", "function": { "name": "f", "strict": true } }]);
        assert!(generation(json!({ "tools": tools, "tool_choice": "required" })).must_call());
        let f = json!({ "type": "function", "function": { "name": "f" } });
        assert!(generation(json!({ "tools": tools, "tool_choice": f })).must_call());
        let other = json!({ "type": "function", "function": { "name": "g" } });
        assert_eq!(chat(json!({ "tools": tools, "tool_choice": other })), Err(vec!["tool_choice".into()]));
    }

    #[test]
    fn an_input_is_one_text_or_many_or_tokens() {
        let embed = |more: Value| {
            let mut body = json!({ "model": "tinybee" });
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            asked(Endpoint::Embeddings, &body)
        };
        let inputs = |input: Value| {
            embed(json!({ "input": input })).map(|asked| serde_json::to_value(&asked.jobs[0].generation.embed).unwrap())
        };
        assert_eq!(inputs(json!("a")), Ok(json!(["a"])));
        assert_eq!(inputs(json!(["a", "b"])), Ok(json!(["a", "b"])));
        assert_eq!(inputs(json!([1, 2])), Ok(json!([[1, 2]])));
        assert_eq!(inputs(json!([[1, 2], [3]])), Ok(json!([[1, 2], [3]])));
        for wrong in [json!(null), json!([]), json!(""), json!([""]), json!([[]]), json!(5), json!(vec!["x"; 2049])] {
            assert_eq!(inputs(wrong.clone()), Err(vec!["input".into()]), "{wrong}");
        }
        let base64 = embed(json!({ "input": "a", "encoding_format": "base64", "user": "u" })).unwrap();
        assert_eq!((base64.encoding, base64.ignored), (Encoding::Base64, vec!["user".to_owned()]));
        assert_eq!(
            embed(json!({ "input": "a", "encoding_format": "int8", "dimensions": 5 })),
            Err(vec!["encoding_format".into(), "dimensions".into()])
        );
    }

    #[test]
    fn a_completion_of_several_prompts_is_as_many_jobs() {
        let asked = completion(json!({ "prompt": ["a", "b"], "n": 2, "best_of": 2, "logprobs": 3 })).unwrap();
        let prompts: Vec<_> = asked.jobs.iter().map(|job| job.generation.prompt_text().unwrap()).collect();
        assert_eq!(prompts, ["a", "b"]);
        let generation = &asked.jobs[1].generation;
        assert_eq!((generation.n, generation.max_tokens, generation.top_logprobs), (Some(2), Some(16), Some(3)));
        for wrong in [
            json!([]),
            json!([1, "a"]),
            json!([-1]),
            json!([1.5]),
            json!([[]]),
            json!([[1], ["a"]]),
            json!(5),
            json!(null),
            json!(vec!["x"; 17]),
            json!(vec![[1]; 17]),
        ] {
            assert_eq!(completion(json!({ "prompt": wrong.clone() })), Err(vec!["prompt".into()]), "{wrong}");
        }
        assert_eq!(completion(json!({ "best_of": 2, "echo": true })), Err(vec!["best_of".into(), "echo".into()]));
    }

    #[test]
    fn token_ids_are_one_prompt_and_lists_of_them_are_several() {
        for (prompt, want) in [
            (json!([1, 2, 3]), vec![Input::Tokens(vec![1, 2, 3])]),
            (json!(vec![7; 40]), vec![Input::Tokens(vec![7; 40])]),
            (json!([[1, 2], [3]]), vec![Input::Tokens(vec![1, 2]), Input::Tokens(vec![3])]),
            (json!(["a", [3]]), vec![Input::Text("a".into()), Input::Tokens(vec![3])]),
        ] {
            let asked = completion(json!({ "prompt": prompt.clone() })).unwrap();
            let prompts: Vec<Input> = asked.jobs.into_iter().map(|job| job.generation.prompt.unwrap()).collect();
            assert_eq!(prompts, want, "{prompt}");
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing() {
        let harmless = json!({ "response_format": { "type": "text" }, "tools": [], "tool_choice": "auto" });
        assert!(chat(harmless).is_ok());
        for (name, value) in [
            ("response_format", json!({ "type": "xml" })),
            ("response_format", json!({ "type": "json_schema", "json_schema": { "name": "x" } })),
            ("tools", json!([{ "type": "function", "function": { "name": "a b" } }])),
            ("tools", json!([{ "type": "custom", "custom": { "name": "f" } }])),
            ("tool_choice", json!("required")),
            ("tool_choice", json!("any")),
            ("tool_choice", json!({ "type": "function", "function": { "name": "f" } })),
            ("audio", json!({})),
        ] {
            assert_eq!(chat(json!({ name: value })), Err(vec![name.to_owned()]));
        }
    }
}
