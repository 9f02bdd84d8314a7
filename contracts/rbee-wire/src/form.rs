//! The form that an answer must have, and whether it must call a function.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::fields::{self, Violation};
use crate::job::Generation;

/// Largest schema, expression or grammar, in bytes.
pub const MAX_FORM: usize = 1 << 20;

/// Longest name of a schema, in bytes.
const MAX_NAME: usize = 128;

/// The form that an answer must have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any text.
    Text {},
    /// Some JSON object.
    JsonObject {},
    /// JSON of a schema.
    JsonSchema {
        /// The schema.
        json_schema: NamedSchema,
    },
    /// A text that an expression matches as a whole.
    Regex {
        /// A regular expression.
        regex: String,
    },
    /// A text of a language.
    Grammar {
        /// A grammar in the notation of Lark.
        grammar: String,
    },
}

/// A schema as OpenAI's dialect sends it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NamedSchema {
    /// What it is called; changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it is for; changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The JSON schema.
    pub schema: Map<String, Value>,
    /// Changes nothing: the schema is always adhered to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// Whether an answer calls functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calling<'a> {
    /// There are none, or they are not to be called.
    Never,
    /// As the model likes.
    May,
    /// It must call one of them.
    Must,
    /// It must call this one.
    MustCall(&'a str),
}

impl Generation {
    /// Whether the answer calls functions.
    pub fn calling(&self) -> Calling<'_> {
        if self.tools.as_ref().is_none_or(Vec::is_empty) {
            return Calling::Never;
        }
        match &self.tool_choice {
            Some(Value::String(word)) if word == "none" => Calling::Never,
            Some(Value::String(word)) if word == "required" => Calling::Must,
            Some(choice) => chosen(choice).map_or(Calling::May, Calling::MustCall),
            None => Calling::May,
        }
    }

    /// Whether the model is told of functions and may call them.
    pub fn may_call(&self) -> bool {
        self.calling() != Calling::Never
    }

    /// Whether it must.
    pub fn must_call(&self) -> bool {
        matches!(self.calling(), Calling::Must | Calling::MustCall(_))
    }
}

/// The function that a `tool_choice` names.
fn chosen(choice: &Value) -> Option<&str> {
    let keys = |value: &Value, count| value.as_object().is_some_and(|map| map.len() == count);
    let shaped = keys(choice, 2) && choice["type"] == "function" && keys(&choice["function"], 1);
    choice["function"]["name"].as_str().filter(|_| shaped)
}

/// What is wrong with a `tool_choice` for itself.
pub(crate) fn choice_problem(value: &Value) -> Option<String> {
    let good = matches!(value.as_str(), Some("auto" | "none" | "required")) || chosen(value).is_some();
    let must = "must be `auto`, `none`, `required` or `{\"type\": \"function\", \"function\": {\"name\": …}}`";
    (!good).then(|| must.into())
}

/// What is wrong with a `response_format` for itself; whether the form can be had is the worker's to say.
pub(crate) fn format_problem(value: &Value) -> Option<String> {
    const TYPES: &str = "its type must be `text`, `json_object`, `json_schema`, `regex` or `grammar`";
    let Some(format) = value.as_object() else { return Some("must be an object".into()) };
    let of = match format.get("type").and_then(Value::as_str) {
        Some("text" | "json_object") => None,
        Some("json_schema") => Some("json_schema"),
        Some("regex") => Some("regex"),
        Some("grammar") => Some("grammar"),
        _ => return Some(TYPES.into()),
    };
    if let Some(other) = format.keys().find(|key| *key != "type" && Some(key.as_str()) != of) {
        return Some(format!("`{}` is not a field of this type", fields::shown(other)));
    }
    match of {
        Some("json_schema") => schema_problem(format.get("json_schema")),
        Some(text) => match format.get(text).and_then(Value::as_str) {
            Some(text) if (1..=MAX_FORM).contains(&text.len()) => None,
            _ => Some(format!("its {text} must be a text of 1 to {MAX_FORM} bytes")),
        },
        None => None,
    }
}

fn schema_problem(value: Option<&Value>) -> Option<String> {
    let Some(named) = value.and_then(Value::as_object) else {
        return Some("its json_schema must be an object with a `schema`".into());
    };
    for (key, value) in named.iter().filter(|(_, value)| !value.is_null()) {
        let good = match key.as_str() {
            "name" => value.as_str().is_some_and(|name| name.len() <= MAX_NAME),
            "description" => value.is_string(),
            "strict" => value.is_boolean(),
            "schema" => value.is_object(),
            _ => return Some(format!("`{}` is not a field of its json_schema", fields::shown(key))),
        };
        if !good {
            let must = match key.as_str() {
                "name" => format!("a text of at most {MAX_NAME} bytes"),
                "description" => "a text".into(),
                "strict" => "true or false".into(),
                _ => "a JSON schema, an object".into(),
            };
            return Some(format!("`{key}` of its json_schema must be {must}"));
        }
    }
    match named.get("schema") {
        None | Some(Value::Null) => Some("its json_schema must have a `schema`".into()),
        Some(schema) if schema.to_string().len() > MAX_FORM => {
            Some(format!("its schema is larger than {MAX_FORM} bytes"))
        }
        Some(_) => None,
    }
}

/// Rules that span a form, calls and other fields. Each value that is wrong for itself has been told.
pub(crate) fn check(map: &Map<String, Value>, found: &mut Vec<Violation>) {
    let mut wrong = |field: &str, problem: &str| found.push(Violation { field: field.into(), problem: problem.into() });
    let choice = map.get("tool_choice").filter(|choice| choice_problem(choice).is_none());
    let named = choice.and_then(chosen);
    let must = named.is_some() || choice.is_some_and(|choice| choice == "required");
    let tools = map.get("tools").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if must && tools.is_empty() {
        wrong("tool_choice", "asks for a call and needs `tools`");
    } else if let Some(name) = named
        && !tools.iter().any(|tool| tool["function"]["name"] == name)
    {
        wrong("tool_choice", "names a function that is not among `tools`");
    }
    let formed = map.get("response_format").is_some_and(|format| format.is_object() && format["type"] != "text");
    if (formed || must) && map.get("ignore_eos") == Some(&Value::Bool(true)) {
        let because = if must { "tool_choice" } else { "response_format" };
        wrong("ignore_eos", &format!("cannot be true beside `{because}`: such an answer has an end"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::JobRequest;

    /// A chat with these fields, or the fields that are refused.
    fn asked(more: &Value) -> Result<Generation, Vec<(String, String)>> {
        let mut body = json!({ "operation": "infer", "messages": [{ "role": "user", "content": "" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        match JobRequest::parse(body.to_string().as_bytes()) {
            Ok(JobRequest::Infer(infer)) => {
                let again = serde_json::to_vec(&JobRequest::Infer(infer.clone())).unwrap();
                assert_eq!(JobRequest::parse(&again).unwrap(), JobRequest::Infer(infer.clone()), "survives the wire");
                Ok(infer.generation)
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                let found = error.details.unwrap()["violations"].clone();
                let found: Vec<Violation> = serde_json::from_value(found).unwrap();
                Err(found.into_iter().map(|wrong| (wrong.field, wrong.problem)).collect())
            }
        }
    }

    fn format(value: &Value) -> Result<ResponseFormat, String> {
        match asked(&json!({ "response_format": value })) {
            Ok(generation) => Ok(generation.response_format.unwrap()),
            Err(found) => {
                assert_eq!(found.len(), 1, "{found:?}");
                assert_eq!(found[0].0, "response_format");
                Err(found[0].1.clone())
            }
        }
    }

    #[test]
    fn forms_are_read_as_the_dialects_write_them() {
        assert_eq!(format(&json!({ "type": "text" })), Ok(ResponseFormat::Text {}));
        assert_eq!(format(&json!({ "type": "json_object" })), Ok(ResponseFormat::JsonObject {}));
        let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
        let named = json!({ "name": "x", "description": null, "schema": schema, "strict": true });
        match format(&json!({ "type": "json_schema", "json_schema": named })) {
            Ok(ResponseFormat::JsonSchema { json_schema }) => {
                assert_eq!((json_schema.name.as_deref(), json_schema.strict), (Some("x"), Some(true)));
                assert_eq!(json!(json_schema.schema).to_string(), schema.to_string(), "properties keep their order");
            }
            other => panic!("{other:?}"),
        }
        assert!(format(&json!({ "type": "json_schema", "json_schema": { "schema": {} } })).is_ok());
        assert_eq!(
            format(&json!({ "type": "regex", "regex": "a+" })),
            Ok(ResponseFormat::Regex { regex: "a+".into() })
        );
        assert!(format(&json!({ "type": "grammar", "grammar": "start: \"a\"" })).is_ok());
    }

    #[test]
    fn what_is_no_form_is_one_violation_that_says_why() {
        let large = "x".repeat(MAX_FORM + 1);
        for (value, why) in [
            (json!("json_object"), "must be an object"),
            (json!({}), "its type must be"),
            (json!({ "type": "xml" }), "its type must be"),
            (json!({ "type": "json_object", "schema": {} }), "`schema` is not a field of this type"),
            (json!({ "type": "json_schema" }), "its json_schema must be an object"),
            (json!({ "type": "json_schema", "json_schema": { "name": "x" } }), "must have a `schema`"),
            (json!({ "type": "json_schema", "json_schema": { "schema": true } }), "must be a JSON schema, an object"),
            (json!({ "type": "json_schema", "json_schema": { "schema": {}, "name": 5 } }), "`name`"),
            (json!({ "type": "json_schema", "json_schema": { "schema": {}, "strict": "yes" } }), "`strict`"),
            (json!({ "type": "json_schema", "json_schema": { "schema": {}, "x": 1 } }), "`x` is not a field"),
            (json!({ "type": "json_schema", "json_schema": { "schema": { "const": large } } }), "larger than"),
            (json!({ "type": "regex" }), "its regex must be a text"),
            (json!({ "type": "regex", "regex": "" }), "its regex must be a text"),
            (json!({ "type": "grammar", "grammar": large }), "its grammar must be a text"),
        ] {
            let problem = format(&value).unwrap_err();
            assert!(problem.contains(why), "{why}: {problem}");
        }
    }

    #[test]
    fn calls_are_asked_for_by_word_or_by_name() {
        let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
        let calling = |choice: Value| {
            let generation = asked(&json!({ "tools": tools, "tool_choice": choice }));
            generation.map(|generation| format!("{:?}", generation.calling()))
        };
        let f = |name: &str| json!({ "type": "function", "function": { "name": name } });
        assert_eq!(calling(json!("auto")), Ok("May".into()));
        assert_eq!(calling(json!(null)), Ok("May".into()));
        assert_eq!(calling(json!("none")), Ok("Never".into()));
        assert_eq!(calling(json!("required")), Ok("Must".into()));
        assert_eq!(calling(f("f")), Ok("MustCall(\"f\")".into()));
        let refused = |more: Value| asked(&more).unwrap_err().into_iter().map(|found| found.0).collect::<Vec<_>>();
        assert_eq!(refused(json!({ "tools": tools, "tool_choice": f("g") })), ["tool_choice"]);
        for choice in [json!("required"), f("f")] {
            assert_eq!(refused(json!({ "tool_choice": choice })), ["tool_choice"], "there are none");
            assert_eq!(refused(json!({ "tools": [], "tool_choice": choice })), ["tool_choice"], "there are none");
        }
        for choice in [
            json!("any"),
            json!({ "type": "function" }),
            json!({ "type": "function", "function": { "name": 1 } }),
            json!({ "type": "function", "function": { "name": "f", "x": 1 } }),
            json!({ "type": "custom", "function": { "name": "f" } }),
        ] {
            assert_eq!(refused(json!({ "tools": tools, "tool_choice": choice })), ["tool_choice"], "{choice}");
        }
    }

    #[test]
    fn what_has_a_form_has_an_end() {
        let refused = |more: Value| asked(&more).unwrap_err().into_iter().map(|found| found.0).collect::<Vec<_>>();
        let form = json!({ "type": "json_object" });
        assert_eq!(refused(json!({ "response_format": form, "ignore_eos": true })), ["ignore_eos"]);
        let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
        assert_eq!(refused(json!({ "tools": tools, "tool_choice": "required", "ignore_eos": true })), ["ignore_eos"]);
        assert!(asked(&json!({ "response_format": { "type": "text" }, "ignore_eos": true })).is_ok());
    }
}
