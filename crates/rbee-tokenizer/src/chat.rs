//! Messages to token ids, with the users' texts kept apart from the template's.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::guard::Whole;
use crate::template::{ContentShape, ToolsPlace};
use crate::{Begins, ChatTemplate, Error, GenerationPrompt, Render, TokenId, Tokenizer};

/// Roles that templates compare with constants. Others are refused: a template may write a role into a
/// control token, as in `<|user|>`.
const ROLES: [&str; 10] =
    ["system", "developer", "user", "assistant", "tool", "function", "model", "ipython", "tool_response", "documents"];
/// Names of kinds in messages and schemas, which templates compare with constants.
const KINDS: [&str; 16] = [
    "text",
    "input_text",
    "output_text",
    "refusal",
    "function",
    "custom",
    "object",
    "string",
    "number",
    "integer",
    "boolean",
    "array",
    "null",
    "enum",
    "any",
    "reasoning",
];
/// Nesting of tool schemas and arguments.
const MAX_DEPTH: usize = 64;

/// What is to be said, and how.
#[derive(Clone, Copy)]
pub struct Chat<'c> {
    /// Objects in the OpenAI form: `role`, `content` (a string, a list of text parts or null),
    /// `tool_calls`, `tool_call_id`, `name`.
    pub messages: &'c [Value],
    /// Tool definitions.
    pub tools: &'c [Value],
    /// More template variables, such as `enable_thinking`.
    pub settings: &'c Map<String, Value>,
    /// Whether to open the assistant's turn.
    pub generation_prompt: GenerationPrompt,
    /// Local time for templates that write a date, in seconds since 1970.
    pub now: i64,
}

/// A chat as a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatPrompt {
    /// Its tokens.
    pub ids: Vec<TokenId>,
    /// Where the answer to it begins.
    pub begins: Begins,
}

/// A message of one role and text.
pub fn message(role: &str, content: &str) -> Value {
    serde_json::json!({"role": role, "content": content})
}

impl Tokenizer {
    /// Renders the messages and tokenizes the prompt. Control tokens come from the template alone:
    /// written in a message, a tool or a setting they are letters.
    ///
    /// # Errors
    /// [`Error::InvalidChat`] for messages that no template takes, [`Error::Template`] and
    /// [`Error::TemplateRefused`] from the template, [`Error::Encode`].
    pub fn encode_chat(&self, template: &ChatTemplate, chat: &Chat<'_>) -> Result<ChatPrompt, Error> {
        let mut messages =
            chat.messages.iter().map(|message| prepare(message, template)).collect::<Result<Vec<Value>, Error>>()?;
        if !chat.tools.is_empty() {
            match template.tools() {
                ToolsPlace::Nowhere => return Err(invalid("the model's chat template has no place for tools")),
                ToolsPlace::Variable(_) => {}
                ToolsPlace::SystemMessage => tell_system(&mut messages, chat.tools, template.content()),
            }
        }

        let mut texts: Vec<&str> = template.sources().collect();
        for value in messages.iter().chain(chat.tools) {
            collect_texts(value, &mut texts, 0)?;
        }
        for (key, value) in chat.settings {
            texts.push(key);
            collect_texts(value, &mut texts, 0)?;
        }
        let sentinel = self.sentinel(texts)?;

        let marker = Marker { tokenizer: self, sentinel };
        let messages: Vec<Value> = messages.iter().map(|m| marker.value(m, Whole::Guard)).collect();
        let tools: Vec<Value> = chat.tools.iter().map(|t| marker.value(t, Whole::Guard)).collect();
        let settings: Map<String, Value> =
            chat.settings.iter().map(|(key, value)| (key.clone(), marker.value(value, Whole::Leave))).collect();
        let prompt = template.render(&Render {
            messages: &messages,
            tools: &tools,
            settings: &settings,
            generation_prompt: chat.generation_prompt,
            now: chat.now,
        })?;
        let ids = self.encode_guarded(&prompt, Some(sentinel))?;
        Ok(ChatPrompt { ids, begins: Begins::behind(template, &prompt) })
    }
}

/// Checks a message and gives it the form that templates expect: content in the template's shape,
/// tool-call arguments as objects.
fn prepare(message: &Value, template: &ChatTemplate) -> Result<Value, Error> {
    let Value::Object(fields) = message else {
        return Err(invalid("a message is not an object"));
    };
    let mut fields = fields.clone();
    match fields.get("role").and_then(Value::as_str) {
        Some(role) if ROLES.contains(&role) => {}
        Some(_) => return Err(invalid("a message has an unknown role")),
        None => return Err(invalid("a message has no role")),
    }
    match fields.get("content") {
        None => {}
        Some(Value::Null) => {}
        Some(content) => {
            let text = content_text(content)?.into_owned();
            fields.insert("content".to_owned(), template.content().of(text));
        }
    }
    if let Some(Value::Array(calls)) = fields.get_mut("tool_calls") {
        if !template.writes_calls() {
            return Err(invalid("the model's chat template has no place for tool calls"));
        }
        for call in calls {
            if let Some(arguments) = call.pointer_mut("/function/arguments")
                && let Some(text) = arguments.as_str()
                && let Ok(parsed @ Value::Object(_)) = serde_json::from_str(text)
            {
                *arguments = parsed;
            }
        }
    }
    Ok(Value::Object(fields))
}

/// Writes the functions into the system message, which becomes the first if there is none.
fn tell_system(messages: &mut Vec<Value>, tools: &[Value], shape: ContentShape) {
    let functions: Vec<&Value> = tools.iter().map(|tool| tool.get("function").unwrap_or(tool)).collect();
    let text = serde_json::json!(functions).to_string();
    if messages.first().is_none_or(|first| first["role"] != "system") {
        messages.insert(0, serde_json::json!({"role": "system", "content": shape.of(String::new())}));
    }
    messages[0]["tools"] = text.into();
}

/// The text of a content: parts are joined by line ends.
fn content_text(content: &Value) -> Result<Cow<'_, str>, Error> {
    match content {
        Value::String(text) => Ok(Cow::Borrowed(text)),
        Value::Array(parts) => {
            let texts = parts
                .iter()
                .map(|part| match part {
                    Value::String(text) => Ok(text.as_str()),
                    Value::Object(part) => {
                        part.get("text").and_then(Value::as_str).ok_or_else(|| invalid("a content part is not text"))
                    }
                    _ => Err(invalid("a content part is not text")),
                })
                .collect::<Result<Vec<&str>, Error>>()?;
            Ok(Cow::Owned(texts.join("\n")))
        }
        _ => Err(invalid("a message's content is neither text nor parts")),
    }
}

/// Every text in a value, keys included.
fn collect_texts<'v>(value: &'v Value, out: &mut Vec<&'v str>, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("a message or tool is nested too deeply"));
    }
    match value {
        Value::String(text) => out.push(text),
        Value::Array(items) => {
            for item in items {
                collect_texts(item, out, depth + 1)?;
            }
        }
        Value::Object(fields) => {
            for (key, item) in fields {
                out.push(key);
                collect_texts(item, out, depth + 1)?;
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    Ok(())
}

/// Puts the sentinel into every text that could become a control token.
struct Marker<'m> {
    tokenizer: &'m Tokenizer,
    sentinel: char,
}

impl Marker<'_> {
    fn value(&self, value: &Value, whole: Whole) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(text, whole)),
            Value::Array(items) => Value::Array(items.iter().map(|item| self.value(item, whole)).collect()),
            Value::Object(fields) => Value::Object(
                fields.iter().map(|(key, item)| (self.text(key, Whole::Leave), self.field(key, item, whole))).collect(),
            ),
            Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
        }
    }

    /// Roles were checked and known kinds are constants: templates compare them.
    fn field(&self, key: &str, item: &Value, whole: Whole) -> Value {
        match item.as_str() {
            Some(role) if key == "role" && ROLES.contains(&role) => item.clone(),
            Some(kind) if key == "type" && KINDS.contains(&kind) => item.clone(),
            _ => self.value(item, whole),
        }
    }

    fn text(&self, text: &str, whole: Whole) -> String {
        self.tokenizer.guard().mark(text, self.sentinel, whole).into_owned()
    }
}

fn invalid(reason: &str) -> Error {
    Error::InvalidChat(reason.to_owned())
}
