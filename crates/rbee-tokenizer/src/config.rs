//! `tokenizer_config.json`: the texts of the named special tokens and the chat templates in it.

use serde_json::{Map, Value};

use crate::Error;

const FILE: &str = "tokenizer_config.json";
/// Cap of the file; real ones with many added tokens have about 1 MiB.
const MAX_BYTES: usize = 16 << 20;
/// Named templates taken from one file.
const MAX_TEMPLATES: usize = 16;

/// What chat needs of `tokenizer_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerConfig {
    /// The `*_token` texts (`bos_token`, `eos_token`, …) that templates read as variables.
    pub special_texts: Vec<(String, String)>,
    /// Template sources by name; a single unnamed one is called `default`.
    pub chat_templates: Vec<(String, String)>,
}

impl TokenizerConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// [`Error::TooLarge`] and [`Error::Corrupt`]; keys that chat does not need are not looked at.
    pub fn from_json(bytes: &[u8]) -> Result<TokenizerConfig, Error> {
        if bytes.len() > MAX_BYTES {
            return Err(Error::TooLarge { what: FILE, size: bytes.len(), limit: MAX_BYTES });
        }
        let root: Map<String, Value> = serde_json::from_slice(bytes).map_err(|e| corrupt(&e.to_string()))?;
        let mut config = TokenizerConfig::default();
        for (key, value) in &root {
            if key.ends_with("_token")
                && let Some(text) = token_text(value)
            {
                config.special_texts.push((key.clone(), text.to_owned()));
            }
        }
        config.chat_templates = match root.get("chat_template") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(source)) => vec![("default".to_owned(), source.clone())],
            Some(Value::Array(list)) => named_templates(list)?,
            Some(_) => return Err(corrupt("`chat_template` is neither a string nor a list")),
        };
        Ok(config)
    }
}

/// A token is written as its text or as an added-token object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        Value::Object(object) => object.get("content")?.as_str(),
        _ => None,
    }
}

fn named_templates(list: &[Value]) -> Result<Vec<(String, String)>, Error> {
    if list.len() > MAX_TEMPLATES {
        return Err(corrupt("too many named chat templates"));
    }
    list.iter()
        .map(|entry| {
            let text = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
            text("name")
                .zip(text("template"))
                .ok_or_else(|| corrupt("a named chat template lacks `name` or `template`"))
        })
        .collect()
}

fn corrupt(reason: &str) -> Error {
    Error::Corrupt { what: FILE, reason: reason.to_owned() }
}
