//! `/set`: the parameters of the answers, by the names and within the ranges of the wire.

use rbee_wire::JobRequest;
use rbee_wire::fields::{Field, Kind};
use rbee_wire::job::Infer;
use rbee_wire::op::INFER_FIELDS;
use serde_json::{Map, Value, json};

use super::input::nearest;
use crate::exit::Failure;
use crate::render::Table;

/// The fields of `infer` that shape an answer which a person reads.
const NAMES: &[&str] = &[
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "min_tokens",
    "seed",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "stop",
    "ignore_eos",
    "logit_bias",
    "response_format",
    "chat_template_kwargs",
];

/// Leaves a parameter to the model again.
const DEFAULT: &str = "default";

/// The parameters as a table; one of them where one is named.
///
/// # Errors
/// When there is none of this name.
pub(super) fn show(settings: &Infer, name: Option<&str>) -> Result<String, Failure> {
    let map = map(settings)?;
    let one = name.map(field).transpose()?;
    let mut table = Table::new(&["NAME", "VALUE", "MEANING"]);
    for field in NAMES.iter().filter_map(|name| row(name)) {
        if one.is_none_or(|one| one.name == field.name) {
            let value = map.get(field.name).map(Value::to_string).unwrap_or_default();
            table.row([field.name.to_owned(), value, field.about.to_owned()]);
        }
    }
    Ok(table.text())
}

/// The settings with another value of one parameter.
///
/// # Errors
/// When there is no such parameter, or the value does not fit it.
pub(super) fn set(settings: &Infer, name: &str, value: &str) -> Result<Infer, Failure> {
    let field = field(name)?;
    let mut map = map(settings)?;
    match value {
        DEFAULT => drop(map.remove(field.name)),
        value => drop(map.insert(field.name.to_owned(), read(field.kind, value))),
    }
    // Something to answer, without which it is no request.
    map.insert("messages".into(), json!([{ "role": "user", "content": "" }]));
    match JobRequest::from_object(map).map_err(Failure::refused)? {
        JobRequest::Infer(mut infer) => {
            infer.generation.messages = None;
            Ok(*infer)
        }
        other => Err(Failure::usage(format!("{} has no parameters", other.operation().name()))),
    }
}

fn row(name: &str) -> Option<&'static Field> {
    INFER_FIELDS.iter().find(|field| field.name == name)
}

fn field(name: &str) -> Result<&'static Field, Failure> {
    // As the flag is called.
    let wire = if name == "repeat_penalty" { "repetition_penalty" } else { name };
    if let Some(field) = NAMES.iter().find(|known| **known == wire).and_then(|name| row(name)) {
        return Ok(field);
    }
    let failure = Failure::usage(format!("there is no parameter {}", name.escape_debug()));
    Err(match nearest(name, NAMES.iter().copied()) {
        Some(near) => failure.hint(format!("did you mean {near}?")),
        None => failure.hint("/set shows the parameters"),
    })
}

/// The request's fields. By way of its text, which has numbers as they were typed.
fn map(settings: &Infer) -> Result<Map<String, Value>, Failure> {
    let text = serde_json::to_vec(&JobRequest::Infer(Box::new(settings.clone()))).map_err(std::io::Error::from)?;
    serde_json::from_slice(&text).map_err(|error| std::io::Error::from(error).into())
}

/// A value as it was typed: JSON, or a text without quotes.
fn read(kind: Kind, text: &str) -> Value {
    match (kind, serde_json::from_str(text)) {
        // Stop texts may look like numbers.
        (Kind::Texts(_), Ok(value @ (Value::String(_) | Value::Array(_)))) => value,
        (Kind::Texts(_), _) | (_, Err(_)) => Value::String(text.to_owned()),
        (_, Ok(value)) => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(settings: &Infer, name: &str) -> Value {
        map(settings).unwrap().get(name).cloned().unwrap_or_default()
    }

    #[test]
    fn every_parameter_is_a_field_of_the_wire() {
        for name in NAMES {
            assert!(row(name).is_some(), "{name}");
        }
        assert_eq!(show(&Infer::default(), None).unwrap().lines().count(), NAMES.len() + 1);
    }

    #[test]
    fn a_value_is_set_shown_and_left_to_the_model_again() {
        let mut settings = Infer::default();
        for (name, typed, want) in [
            ("temperature", "0.7", json!(0.7)),
            ("top_k", "40", json!(40)),
            ("seed", "18446744073709551615", json!(u64::MAX)),
            ("repetition_penalty", "1.1", json!(1.1)),
            ("stop", "the end", json!(["the end"])),
            ("stop", "7", json!(["7"])),
            ("stop", r#"["a","b"]"#, json!(["a", "b"])),
            ("stop", r#""default""#, json!(["default"])),
            ("response_format", r#"{"type":"json_object"}"#, json!({"type": "json_object"})),
            ("chat_template_kwargs", r#"{"enable_thinking":false}"#, json!({"enable_thinking": false})),
        ] {
            settings = set(&settings, name, typed).unwrap();
            assert_eq!(value(&settings, name), want, "{name} {typed}");
        }
        assert_eq!(value(&settings, "temperature"), json!(0.7), "others stay");
        let shown = show(&settings, Some("temperature")).unwrap();
        assert!(shown.contains("temperature  0.7") && shown.lines().count() == 2, "{shown}");
        settings = set(&settings, "temperature", DEFAULT).unwrap();
        assert_eq!(value(&settings, "temperature"), Value::Null);
        let settings = set(&settings, "repeat_penalty", "1.5").unwrap();
        assert_eq!(value(&settings, "repetition_penalty"), json!(1.5));
        assert_eq!(settings.generation.messages, None);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_the_wires_own_rules() {
        for (name, typed, why) in [
            ("temperature", "9", "`temperature` must be"),
            ("temperature", "warm", "`temperature` must be"),
            ("top_p", "0", "`top_p` must be above 0"),
            ("max_tokens", "0", "`max_tokens` must be"),
            ("min_tokens", "5", "needs `max_tokens`"),
            ("stop", r#"["",""]"#, "`stop` must be"),
            ("temprature", "1", "there is no parameter temprature"),
            ("model", "x", "there is no parameter model"),
            ("messages", "[]", "there is no parameter messages"),
        ] {
            let failure = set(&Infer::default(), name, typed).unwrap_err();
            assert!(failure.message.contains(why), "{name} {typed}: {}", failure.message);
        }
        assert_eq!(set(&Infer::default(), "temprature", "1").unwrap_err().hints, ["did you mean temperature?"]);
    }
}
