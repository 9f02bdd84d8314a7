//! Calls as grammars: what an [`AnswerReader`](crate::AnswerReader) of the same form reads back as calls of these functions.

use std::collections::HashMap;

use llguidance::api::GrammarWithLexer;
use llguidance::regex_to_lark;
use serde_json::{Value, json};

use super::schema::Book;
use super::{formats, json as json_grammar, refused};
use crate::answer::Style;
use crate::{AnswerForm, Error, Most, TokenId};

/// Most functions of a request.
const MAX_TOOLS: usize = 512;
/// Longest name of a function or parameter.
const MAX_NAME: usize = 128;

/// The grammars of calls; the first is where an answer begins.
pub(super) fn grammars(
    control: &HashMap<String, TokenId>,
    form: &AnswerForm,
    tools: &[(String, Value)],
    most: Most,
) -> Result<Vec<GrammarWithLexer>, Error> {
    let Some(written) = form.written() else {
        return Err(refused("this model has no way of writing calls that is known"));
    };
    if tools.is_empty() || tools.len() > MAX_TOOLS {
        return Err(refused(&format!("calls need from one to {MAX_TOOLS} functions, not {}", tools.len())));
    }
    for (name, _) in tools {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(refused(&format!("a function's name must have from one to {MAX_NAME} bytes")));
        }
    }
    let tag = |text: &str| match control.get(text) {
        Some(id) => format!("<[{id}]>"),
        None => quoted(text),
    };
    let open = written.open.map_or(String::new(), &tag);
    let close = written.close.map_or(String::new(), &tag);
    let mut all = vec![GrammarWithLexer::default()];
    let start = match written.style {
        Style::Object { arguments } if written.open.is_none() => {
            all.push(named("calls", objects(tools, arguments)?));
            "start: @calls\n".to_owned()
        }
        Style::Object { arguments } => {
            all.push(named("calls", objects(tools, arguments)?));
            // A line's end behind the object is its blank, unless the tag takes it along.
            let close = match written.close {
                Some(text) if !control.contains_key(text) => format!("({} | {close})", quoted(&format!("\n{text}"))),
                _ => close,
            };
            repeated(most, &format!("call: {open} \"\\n\"? @calls {close}\n"))
        }
        Style::List => {
            all.push(named("calls", listed(tools, most)?));
            format!("start: {open} \" \"? @calls {close}\n")
        }
        Style::Named { arguments } => {
            let mut options = Vec::new();
            for (at, (name, parameters)) in tools.iter().enumerate() {
                let mut letters = name.chars();
                let first = letters.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
                if !first || letters.any(|c| !c.is_ascii_alphanumeric() && !matches!(c, '_' | '-' | '.')) {
                    return Err(refused(&format!("this model cannot write a call of a function named {name:?}")));
                }
                let mut book = Book::default();
                let schema = self::arguments(&mut book, at, parameters)?;
                all.push(named(&format!("arguments{at}"), book.finish(schema)?));
                options.push(format!("{} {} @arguments{at}", quoted(name), tag(arguments)));
            }
            repeated(most, &format!("call: {open} ({})\n", options.join(" | ")))
        }
        Style::Tags => {
            let mut tags = Tags { all: &mut all, text: String::new(), known: HashMap::new() };
            let mut options = Vec::new();
            for (at, (name, parameters)) in tools.iter().enumerate() {
                options.push(tags.function(at, name, parameters)?);
            }
            let text = tags.text;
            repeated(
                most,
                &format!("call: {open} \"\\n\" ({}) \"</function>\\n\" {close}\n{text}", options.join(" | ")),
            )
        }
    };
    all[0].lark_grammar = Some(start);
    Ok(all)
}

fn repeated(most: Most, call: &str) -> String {
    match most {
        Most::One => format!("start: call\n{call}"),
        Most::Any => format!("start: call (\"\\n\"? call)*\n{call}"),
    }
}

fn named(name: &str, schema: Value) -> GrammarWithLexer {
    GrammarWithLexer { name: Some(name.to_owned()), ..json_grammar(schema) }
}

/// A text in the syntax of Lark, which is that of JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The schema of a function's arguments, which are an object.
fn arguments(book: &mut Book, at: usize, parameters: &Value) -> Result<Value, Error> {
    let place = format!("/tools/{at}/function/parameters");
    let none = || json!({"type": "object", "additionalProperties": false});
    let mut schema = match parameters {
        Value::Null => return Ok(none()),
        Value::Object(keywords) if keywords.is_empty() => return Ok(none()),
        Value::Object(keywords) => keywords.clone(),
        _ => return Err(refused(&format!("a schema must be an object, at {place}"))),
    };
    schema.entry("type").or_insert_with(|| "object".into());
    if schema["type"] != "object" {
        return Err(refused(&format!("arguments are of type \"object\", at {place}/type")));
    }
    book.add(&Value::Object(schema), &place)
}

/// Any of the calls, as an object.
fn call(book: &mut Book, tools: &[(String, Value)], key: &str) -> Result<Value, Error> {
    let mut options = Vec::new();
    for (at, (name, parameters)) in tools.iter().enumerate() {
        let arguments = arguments(book, at, parameters)?;
        options.push(json!({
            "type": "object",
            "properties": {"name": {"const": name}, key: arguments},
            "required": ["name", key],
            "additionalProperties": false,
        }));
    }
    Ok(json!({"anyOf": options}))
}

fn objects(tools: &[(String, Value)], key: &str) -> Result<Value, Error> {
    let mut book = Book::default();
    let call = call(&mut book, tools, key)?;
    book.finish(call)
}

fn listed(tools: &[(String, Value)], most: Most) -> Result<Value, Error> {
    let mut book = Book::default();
    let call = call(&mut book, tools, "arguments")?;
    let mut list = json!({"type": "array", "items": call, "minItems": 1});
    if most == Most::One {
        list["maxItems"] = 1.into();
    }
    book.finish(list)
}

/// What ends a value between tags.
const ENDS: &str = "</parameter>";

/// Calls whose arguments are texts between tags.
struct Tags<'a> {
    all: &'a mut Vec<GrammarWithLexer>,
    /// Terminals of the values.
    text: String,
    /// Names of the grammars of values, by their schemas.
    known: HashMap<String, String>,
}

impl Tags<'_> {
    /// One function's part of the rule, up to its closing tag.
    fn function(&mut self, at: usize, name: &str, parameters: &Value) -> Result<String, Error> {
        let place = format!("/tools/{at}/function/parameters");
        check_tag(name)?;
        let mut rule = quoted(&format!("<function={name}>\n"));
        let Some(schema) = parameters.as_object() else {
            return match parameters {
                Value::Null => Ok(rule),
                _ => Err(refused(&format!("a schema must be an object, at {place}"))),
            };
        };
        const KNOWN: [&str; 10] = [
            "type",
            "properties",
            "required",
            "additionalProperties",
            "$defs",
            "definitions",
            "$schema",
            "title",
            "description",
            "strict",
        ];
        if let Some(keyword) = schema.keys().find(|keyword| !KNOWN.contains(&keyword.as_str())) {
            return Err(refused(&format!(
                "`{keyword}` cannot be enforced where arguments are written in tags, at {place}/{keyword}"
            )));
        }
        let empty = serde_json::Map::new();
        let properties = match schema.get("properties") {
            None => &empty,
            Some(properties) => properties
                .as_object()
                .ok_or_else(|| refused(&format!("`properties` must be an object, at {place}/properties")))?,
        };
        let required: Vec<&str> = match schema.get("required") {
            None => Vec::new(),
            Some(names) => names
                .as_array()
                .and_then(|names| names.iter().map(Value::as_str).collect())
                .ok_or_else(|| refused(&format!("it must be a list of strings, at {place}/required")))?,
        };
        if let Some(name) = required.iter().find(|name| !properties.contains_key(**name)) {
            return Err(refused(&format!("{name:?} is required and not described, at {place}/required")));
        }
        for (number, (key, property)) in properties.iter().enumerate() {
            check_tag(key)?;
            let here = format!("{place}/properties/{}", key.replace('~', "~0").replace('/', "~1"));
            let value = self.value(&format!("{at}_{number}"), schema, property, &here)?;
            let parameter = format!("{} {value}", quoted(&format!("<parameter={key}>\n")));
            rule.push_str(&match required.contains(&key.as_str()) {
                true => format!(" {parameter}"),
                false => format!(" ({parameter})?"),
            });
        }
        Ok(rule)
    }

    /// A value with its closing tag.
    fn value(
        &mut self,
        id: &str,
        root: &serde_json::Map<String, Value>,
        schema: &Value,
        place: &str,
    ) -> Result<String, Error> {
        let ends = quoted(&format!("\n{ENDS}\n"));
        if !is_text(schema) {
            // References lead to the root of the parameters, which is given along.
            let mut whole = serde_json::Map::new();
            for definitions in ["$defs", "definitions"] {
                if let Some(value) = root.get(definitions) {
                    whole.insert(definitions.to_owned(), value.clone());
                }
            }
            match schema {
                Value::Object(keywords) => whole.extend(keywords.clone()),
                other => {
                    whole.insert("allOf".to_owned(), json!([other]));
                }
            }
            let mut book = Book::default();
            let schema = book.add(&Value::Object(whole), place)?;
            let document = book.finish(schema)?;
            let key = document.to_string();
            if let Some(known) = self.known.get(&key) {
                return Ok(format!("@{known} {ends}"));
            }
            let name = format!("value{id}");
            self.all.push(named(&name, document));
            self.known.insert(key, name.clone());
            return Ok(format!("@{name} {ends}"));
        }
        // The schema is checked as any other, though its text is made here.
        Book::default().add(schema, place)?;
        let options = match (schema.get("const"), schema.get("enum")) {
            (Some(one), _) => Some(std::slice::from_ref(one)),
            (None, Some(many)) => many.as_array().map(Vec::as_slice),
            (None, None) => None,
        };
        if let Some(options) = options {
            let texts: Vec<&str> = options.iter().filter_map(Value::as_str).collect();
            if texts.len() < options.len() || texts.iter().any(|text| text.contains(ENDS)) {
                return Err(refused(&format!("a value of it cannot be written in tags, at {place}")));
            }
            let texts: Vec<String> = texts.into_iter().map(quoted).collect();
            return Ok(format!("({}) {ends}", texts.join(" | ")));
        }
        // What is not the one must be text still.
        let mut parts = vec!["/(?s:.*)/".to_owned(), format!("~/(?s:.*){}(?s:.*)/", regex_to_lark(ENDS, ""))];
        for (keyword, value) in schema.as_object().into_iter().flatten() {
            let pattern = match (keyword.as_str(), value) {
                ("pattern", Value::String(pattern)) => pattern.as_str(),
                ("format", Value::String(name)) => formats::pattern(name).unwrap_or_default(),
                ("anyOf" | "oneOf" | "allOf" | "$ref", _) => {
                    return Err(refused(&format!("`{keyword}` cannot be enforced between tags, at {place}/{keyword}")));
                }
                _ => continue,
            };
            let Some(whole) = whole(pattern) else {
                return Err(refused(&format!("the pattern {pattern:?} cannot be enforced between tags, at {place}")));
            };
            parts.push(format!("/{}/", regex_to_lark(&whole, "dw")));
        }
        let length = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
        if let Some(most) = length("maxLength") {
            parts.push(format!("/(?s:.{{{},{most}}})/", length("minLength").unwrap_or(0)));
        } else if let Some(least) = length("minLength") {
            parts.push(format!("/(?s:.{{{least},}})/"));
        }
        self.text.push_str(&format!("VALUE{id}: ({}) {ends}\n", parts.join(" & ")));
        Ok(format!("VALUE{id}"))
    }
}

/// Whether the reader takes a value as a text, whatever is in it.
fn is_text(schema: &Value) -> bool {
    match &schema["type"] {
        Value::String(kind) => kind == "string",
        _ => schema["enum"].as_array().is_some_and(|values| values.iter().all(Value::is_string)),
    }
}

/// A name within a tag.
fn check_tag(name: &str) -> Result<(), Error> {
    let odd = |c: char| c.is_control() || matches!(c, '<' | '>');
    match name.is_empty() || name.len() > MAX_NAME || name.trim() != name || name.contains(odd) {
        true => Err(refused(&format!("the name {name:?} cannot be written in a tag"))),
        false => Ok(()),
    }
}

/// An expression that matches whole texts, of one that is searched for, if its anchors stand at its ends.
fn whole(pattern: &str) -> Option<String> {
    let (mut depth, mut class, mut escaped, mut options, mut anchors) = (0usize, false, false, false, 0);
    for c in pattern.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '[' => class = true,
            ']' => class = false,
            _ if class => {}
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '|' if depth == 0 => options = true,
            '^' | '$' => anchors += 1,
            _ => {}
        }
    }
    let (begins, ends) = (pattern.starts_with('^'), pattern.ends_with('$') && !pattern.ends_with("\\$"));
    let expected = usize::from(begins) + usize::from(ends);
    if anchors != expected || options && expected > 0 {
        return None;
    }
    let inner = pattern.strip_prefix('^').unwrap_or(pattern);
    let inner = if ends { inner.strip_suffix('$').unwrap_or(inner) } else { inner };
    let before = if begins { "" } else { "(?s:.*)" };
    let after = if ends { "" } else { "(?s:.*)" };
    Some(format!("{before}(?:{inner}){after}"))
}
