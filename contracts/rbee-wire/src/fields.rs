//! What a field of a request may be, as data: one table serves validation (all violations at once), the
//! reference documentation and the command line's help.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::form;
use crate::ids::{MAX_ID, check_id};
use crate::keep_alive::KeepAlive;
use crate::model::{DeviceSpec, ModelRef};

/// One field of a request.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in the body.
    pub name: &'static str,
    /// What it may hold.
    pub kind: Kind,
    /// Whether it must be there.
    pub need: Need,
    /// What it means, in one sentence.
    pub about: &'static str,
}

/// Whether a field must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It must.
    Required,
    /// It may be absent or null.
    Optional,
}

/// What a field may hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number in a range.
    Int(u64, u64),
    /// A number in a range.
    Float(f64, f64),
    /// An open identifier.
    Id,
    /// A text of at most so many bytes.
    Text(usize),
    /// A model reference.
    Model,
    /// A device.
    Device,
    /// One text or a list of at most so many, none empty, each at most 1,024 bytes.
    Texts(usize),
    /// An object of token id to bias, -100 to 100, at most 1,024 entries.
    Bias,
    /// Chat messages.
    Messages,
    /// So many lower-case hexadecimal digits.
    Hex(usize),
    /// A list of some of these words.
    Words(&'static [&'static str]),
    /// A list of numbers.
    Tokens,
    /// A text or a list of token ids, which has one at least.
    Prompt,
    /// A list of texts or lists of token ids, none empty.
    Inputs,
    /// A JSON object, checked where it is used.
    Object,
    /// Definitions of functions.
    Tools,
    /// `auto`, `none`, `required`, or a function by its name.
    ToolChoice,
    /// A form that an answer must have.
    ResponseFormat,
    /// Any JSON value, checked where it is used.
    Any,
    /// How long a model stays loaded: seconds, a text like `5m`, or -1.
    KeepAlive,
}

/// One thing wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Violation {
    /// The field.
    pub field: String,
    /// What is wrong with it; never its value.
    pub problem: String,
}

/// Largest text of a prompt or message, in bytes.
pub const MAX_TEXT: usize = 16 << 20;

/// Most texts of a request for embeddings: as many as OpenAI takes.
pub const MAX_INPUTS: usize = 2048;

/// Most functions of a request.
pub const MAX_TOOLS: usize = 256;

/// Most calls of a message.
const MAX_CALLS: usize = 256;

/// Most messages of a chat.
pub const MAX_MESSAGES: usize = 4096;

/// Checks an object against a table and returns everything that is wrong with it.
pub fn check(map: &Map<String, Value>, fields: &[Field]) -> Vec<Violation> {
    let mut found = Vec::new();
    for key in map.keys() {
        if !fields.iter().any(|field| field.name == key) {
            found.push(Violation { field: shown(key), problem: "is not a field of this operation".into() });
        }
    }
    for field in fields {
        let problem = match map.get(field.name) {
            None | Some(Value::Null) if field.need == Need::Required => Some("is required".to_owned()),
            None | Some(Value::Null) => None,
            Some(value) => problem(value, field.kind),
        };
        if let Some(problem) = problem {
            found.push(Violation { field: field.name.into(), problem });
        }
    }
    found
}

fn problem(value: &Value, kind: Kind) -> Option<String> {
    let wrong = |what: &str| Some(format!("must be {what}"));
    match kind {
        Kind::Bool => (!value.is_boolean()).then(|| "must be true or false".into()),
        Kind::Int(min, max) => match value.as_u64() {
            Some(number) if (min..=max).contains(&number) => None,
            _ => wrong(&format!("a whole number from {min} to {max}")),
        },
        Kind::Float(min, max) => match value.as_f64() {
            Some(number) if (min..=max).contains(&number) => None,
            _ => wrong(&format!("a number from {min} to {max}")),
        },
        Kind::Id => match value.as_str().map(check_id) {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(error.to_string()),
            None => wrong(&format!("a text of at most {MAX_ID} characters")),
        },
        Kind::Text(max) => match value.as_str() {
            Some(text) if text.len() <= max => None,
            _ => wrong(&format!("a text of at most {max} bytes")),
        },
        Kind::Model => match value.as_str().map(str::parse::<ModelRef>) {
            Some(Ok(_)) => None,
            Some(Err(error)) => Some(error.to_string()),
            None => wrong("a model reference"),
        },
        Kind::Device => match value.as_str().map(str::parse::<DeviceSpec>) {
            Some(Ok(_)) => None,
            _ => wrong("`auto`, `cpu` or `cuda:N`"),
        },
        Kind::Texts(max) => {
            let fits = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty() && text.len() <= 1024);
            let good = match value {
                Value::Array(items) => items.len() <= max && items.iter().all(fits),
                other => fits(other),
            };
            (!good).then(|| format!("must be one text or a list of at most {max}, none empty, each at most 1024 bytes"))
        }
        Kind::Bias => {
            let fits = |(key, value): (&String, &Value)| {
                key.len() <= 10
                    && key.parse::<u32>().is_ok()
                    && value.as_f64().is_some_and(|bias| (-100.0..=100.0).contains(&bias))
            };
            let good = value.as_object().is_some_and(|map| map.len() <= 1024 && map.iter().all(fits));
            (!good).then(|| "must map token ids to numbers from -100 to 100, at most 1024 of them".into())
        }
        Kind::Messages => messages_problem(value),
        Kind::Hex(digits) => {
            let fits =
                |text: &str| text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            (!value.as_str().is_some_and(fits)).then(|| format!("must be {digits} lower-case hexadecimal digits"))
        }
        Kind::Words(words) => {
            let known = |value: &Value| value.as_str().is_some_and(|word| words.contains(&word));
            let good = value
                .as_array()
                .is_some_and(|items| (1..=words.len()).contains(&items.len()) && items.iter().all(known));
            (!good).then(|| format!("must be a list of one or more of {}", words.join(", ")))
        }
        Kind::Tokens => (!are_tokens(value)).then(|| "must be a list of token ids".into()),
        Kind::Prompt => {
            let good = match value {
                Value::String(text) => text.len() <= MAX_TEXT,
                Value::Array(ids) => !ids.is_empty() && are_tokens(value),
                _ => false,
            };
            (!good).then(|| format!("must be a text of at most {MAX_TEXT} bytes, or a list of token ids, not empty"))
        }
        Kind::Inputs => {
            let fits = |item: &Value| match item {
                Value::String(text) => !text.is_empty() && text.len() <= MAX_TEXT,
                Value::Array(ids) => !ids.is_empty() && are_tokens(item),
                _ => false,
            };
            let good =
                value.as_array().is_some_and(|all| (1..=MAX_INPUTS).contains(&all.len()) && all.iter().all(fits));
            (!good).then(|| format!("must be a list of 1 to {MAX_INPUTS} texts or lists of token ids, none empty"))
        }
        Kind::Object => (!value.is_object()).then(|| "must be an object".into()),
        Kind::Tools => tools_problem(value),
        Kind::ToolChoice => form::choice_problem(value),
        Kind::ResponseFormat => form::format_problem(value),
        Kind::Any => None,
        Kind::KeepAlive => KeepAlive::try_from(value.clone()).err().map(|error| error.to_string()),
    }
}

fn messages_problem(value: &Value) -> Option<String> {
    let Some(items) = value.as_array() else {
        return Some("must be a list of messages".into());
    };
    if items.is_empty() || items.len() > MAX_MESSAGES {
        return Some(format!("must have 1 to {MAX_MESSAGES} messages"));
    }
    for (i, item) in items.iter().enumerate() {
        let Some(message) = item.as_object() else {
            return Some(format!("must be a list of messages: number {i} is not an object"));
        };
        let role = message.get("role").and_then(Value::as_str);
        if !matches!(role, Some("system" | "developer" | "user" | "assistant" | "tool")) {
            return Some(format!("message {i}: role must be system, developer, user, assistant or tool"));
        }
        let text = |name: &str| match message.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.len() <= MAX_TEXT => Ok(Some(text)),
            Some(_) => Err(format!("message {i}: {name} must be a text of at most {MAX_TEXT} bytes")),
        };
        for (name, of) in [
            ("content", None),
            ("reasoning_content", Some("assistant")),
            ("tool_call_id", Some("tool")),
            ("name", None),
        ] {
            match (text(name), of) {
                (Err(problem), _) => return Some(problem),
                (Ok(None), _) if name == "content" => return Some(format!("message {i}: content is required")),
                (Ok(Some(_)), Some(of)) if role != Some(of) => {
                    return Some(format!("message {i}: {name} is for messages of role {of}"));
                }
                _ => {}
            }
        }
        if let Some(calls) = message.get("tool_calls") {
            if role != Some("assistant") {
                return Some(format!("message {i}: tool_calls is for messages of role assistant"));
            }
            if let Some(problem) = calls_problem(calls) {
                return Some(format!("message {i}: {problem}"));
            }
        }
        let known = ["role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"];
        if let Some(other) = message.keys().find(|key| !known.contains(&key.as_str())) {
            return Some(format!("message {i}: `{}` is not a field of a message", shown(other)));
        }
    }
    None
}

fn are_tokens(value: &Value) -> bool {
    let fits = |value: &Value| value.as_u64().is_some_and(|id| id <= u64::from(u32::MAX));
    value.as_array().is_some_and(|items| items.len() <= 1 << 20 && items.iter().all(fits))
}

/// A name from outside as it may be shown.
pub(crate) fn shown(name: &str) -> String {
    name.chars().take(64).collect::<String>().escape_debug().to_string()
}

/// Whether a function may have this name.
fn names_function(value: Option<&Value>) -> bool {
    let letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    value.and_then(Value::as_str).is_some_and(|name| (1..=64).contains(&name.len()) && name.bytes().all(letter))
}

fn calls_problem(value: &Value) -> Option<String> {
    let Some(calls) = value.as_array().filter(|calls| calls.len() <= MAX_CALLS) else {
        return Some(format!("tool_calls must be a list of at most {MAX_CALLS} calls"));
    };
    for call in calls {
        let function = &call["function"];
        let good = call["id"].as_str().is_some_and(|id| id.len() <= MAX_ID)
            && call["type"] == "function"
            && names_function(function.get("name"))
            && function["arguments"].as_str().is_some_and(|text| text.len() <= MAX_TEXT);
        if !good {
            return Some(
                "each of tool_calls must have an id, the type `function`, and a function's name and arguments".into(),
            );
        }
    }
    None
}

fn tools_problem(value: &Value) -> Option<String> {
    let Some(tools) = value.as_array().filter(|tools| tools.len() <= MAX_TOOLS) else {
        return Some(format!("must be a list of at most {MAX_TOOLS} tools"));
    };
    for (i, tool) in tools.iter().enumerate() {
        let (Some(tool), "function") = (tool.as_object(), tool["type"].as_str().unwrap_or_default()) else {
            return Some(format!("tool {i}: must be an object of the type `function`"));
        };
        let Some(function) = tool.get("function").and_then(Value::as_object) else {
            return Some(format!("tool {i}: must have a function, an object"));
        };
        let name = function.get("name");
        if !names_function(name) {
            return Some(format!("tool {i}: its name must have 1 to 64 letters, digits, `_`, `-` or `.`"));
        }
        if tools[..i].iter().any(|other| other["function"].get("name") == name) {
            return Some(format!("tool {i}: its name stands twice"));
        }
        for (key, value) in function.iter().filter(|(_, value)| !value.is_null()) {
            match key.as_str() {
                "name" => {}
                "description" if value.is_string() => {}
                "parameters" if value.is_object() => {}
                "description" => return Some(format!("tool {i}: its description must be a text")),
                "parameters" => return Some(format!("tool {i}: its parameters must be a JSON schema, an object")),
                _ => return Some(format!("tool {i}: `{}` is not a field of a function", shown(key))),
            }
        }
        if let Some(other) = tool.keys().find(|key| !matches!(key.as_str(), "type" | "function")) {
            return Some(format!("tool {i}: `{}` is not a field of a tool", shown(other)));
        }
    }
    None
}
