//! Request bodies: JSON that is refused when a key stands twice in one object.
//!
//! serde_json keeps the last of two equal keys, so two programs may read the same bytes differently;
//! here a duplicate is an error that names the key.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Parses a whole body into an object.
///
/// # Errors
/// A sentence that says what is wrong, never quoting the body's values.
pub fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let value = Strict.deserialize(&mut de).and_then(|value| de.end().map(|()| value));
    match value {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err("the body must be a JSON object".into()),
        Err(error) => Err(match error.classify() {
            serde_json::error::Category::Eof => "the body ends before its JSON does".into(),
            _ => format!("the body is not valid JSON: {error}"),
        }),
    }
}

struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: serde::Deserializer<'de>>(self, de: D) -> Result<Value, D::Error> {
        de.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("a number is out of range"))
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(Strict)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let shown: String = key.chars().take(64).collect();
            let value = access.next_value_seed(Strict)?;
            if map.insert(key, value).is_some() {
                return Err(A::Error::custom(format!("key `{}` stands twice", shown.escape_debug())));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_bodies_are_refused_by_what_is_wrong() {
        let deep = "[".repeat(100_000);
        for (body, want) in [
            ("", "ends before"),
            ("[1]", "must be a JSON object"),
            (r#"{"a":1,"a":2}"#, "key `a` stands twice"),
            (r#"{"x":{"b":1,"b":1}}"#, "key `b` stands twice"),
            (r#"{"a":1e400}"#, "out of range"),
            (r#"{"a":"\ud800"}"#, "not valid JSON"),
            (r#"{"a":1} x"#, "not valid JSON"),
            (&format!(r#"{{"a":{deep}"#), "recursion"),
            ("{\"a\":\"\u{1}\"}", "not valid JSON"),
        ] {
            let error = parse_object(body.as_bytes()).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        assert_eq!(parse_object(br#"{"b":1,"a":[null]}"#).unwrap().keys().collect::<Vec<_>>(), ["b", "a"]);
    }
}
