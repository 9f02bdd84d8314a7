//! One tool call written in tags: `<function=NAME>`, then `<parameter=KEY>` VALUE `</parameter>` for each argument, then
//! `</function>`. The values are texts as they stand; what of them is a number or an object, the tool's schema says.

use serde_json::Value;

use super::call::{Progress, Shown};

/// Longest name of a function or a parameter.
const MAX_NAME: usize = 256;
const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";
const PARAMETER_ENDS: &str = "</parameter>";
const FUNCTION_ENDS: &str = "</function>";

/// A call on its way.
#[derive(Clone, Debug, Default)]
pub(super) struct CallTags {
    /// What was not made anything of yet.
    held: String,
    name: Option<String>,
    parameters: usize,
    /// The parameter whose value comes.
    key: Option<String>,
}

impl CallTags {
    /// Takes one more character.
    pub(super) fn push(&mut self, c: char, tools: &[Value], shown: &mut Shown) -> Progress {
        self.held.push(c);
        if let Some(key) = &self.key {
            let Some(value) = self.held.strip_suffix(PARAMETER_ENDS) else { return Progress::More };
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            let name = self.name.as_deref().unwrap_or_default();
            let before = if self.parameters == 0 { "{" } else { ", " };
            let json = typed(value, schema(tools, name, key));
            shown.arguments.push_str(&format!("{before}{}: {json}", Value::from(key.as_str())));
            self.parameters += 1;
            self.key = None;
            self.held.clear();
            return Progress::More;
        }
        let text = self.held.trim_start();
        if text.len() > MAX_NAME + PARAMETER.len() {
            return Progress::Bad;
        }
        let (opens, ends) = match self.name {
            None => (FUNCTION, None),
            Some(_) => (PARAMETER, Some(FUNCTION_ENDS)),
        };
        if Some(text) == ends {
            shown.arguments.push_str(if self.parameters == 0 { "{}" } else { "}" });
            return Progress::Whole;
        }
        if let Some(name) = text.strip_prefix(opens).and_then(|rest| rest.strip_suffix('>')) {
            let name = name.trim().to_owned();
            if name.is_empty() {
                return Progress::Bad;
            }
            match self.name {
                None => {
                    shown.name = Some(name.clone());
                    self.name = Some(name);
                }
                Some(_) => self.key = Some(name),
            }
            self.held.clear();
            return Progress::More;
        }
        let may_become = |tag: &str| tag.starts_with(text) || text.starts_with(tag);
        if may_become(opens) || ends.is_some_and(may_become) { Progress::More } else { Progress::Bad }
    }
}

/// The schema of a parameter.
fn schema<'t>(tools: &'t [Value], name: &str, key: &str) -> Option<&'t Value> {
    let tool = tools.iter().find(|tool| tool["function"]["name"] == name)?;
    tool["function"]["parameters"]["properties"].get(key)
}

/// A value as JSON.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    let is_text = schema.is_some_and(|schema| match &schema["type"] {
        Value::String(kind) => kind == "string",
        _ => schema["enum"].as_array().is_some_and(|values| values.iter().all(Value::is_string)),
    });
    match serde_json::from_str(text) {
        Ok(value) if !is_text => value,
        _ => text.into(),
    }
}
