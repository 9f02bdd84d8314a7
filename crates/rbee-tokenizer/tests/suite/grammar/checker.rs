//! A validator of JSON schemas: the meaning of every keyword that grammars enforce, written down once more.

use regex::Regex;
use serde_json::{Map, Value};

/// Why a value is not of a schema; nothing when it is.
pub fn problem(root: &Value, schema: &Value, value: &Value) -> Option<String> {
    let keywords = match schema {
        Value::Bool(true) => return None,
        Value::Bool(false) => return Some("nothing is allowed".to_owned()),
        other => other.as_object().expect("a schema"),
    };
    keywords.iter().find_map(|(keyword, said)| {
        let fine = one(root, keywords, keyword, said, value)?;
        (!fine).then(|| format!("{value} is against `{keyword}`: {said}"))
    })
}

fn fits(root: &Value, schema: &Value, value: &Value) -> bool {
    problem(root, schema, value).is_none()
}

/// Whether a value meets one keyword; nothing when it says nothing of it.
fn one(root: &Value, schema: &Map<String, Value>, keyword: &str, said: &Value, value: &Value) -> Option<bool> {
    let list = || said.as_array().expect("a list").iter();
    let number = || Some((value.as_f64()?, said.as_f64()?));
    let length = || Some((value.as_str()?.chars().count() as u64, said.as_u64()?));
    let items = || Some((value.as_array()?.len() as u64, said.as_u64()?));
    let members = || Some((value.as_object()?.len() as u64, said.as_u64()?));
    Some(match keyword {
        "type" => match said {
            Value::String(kind) => is(kind, value),
            kinds => kinds.as_array().expect("kinds").iter().any(|kind| is(kind.as_str().expect("a kind"), value)),
        },
        "const" => same(said, value),
        "enum" => list().any(|one| same(one, value)),
        "$ref" => {
            fits(root, root.pointer(&said.as_str()?[1..].replace("%20", " ")).expect("it leads somewhere"), value)
        }
        "allOf" => list().all(|one| fits(root, one, value)),
        "anyOf" => list().any(|one| fits(root, one, value)),
        "oneOf" => list().filter(|one| fits(root, one, value)).count() == 1,
        "minimum" => number().map(|(value, bound)| value >= bound)?,
        "maximum" => number().map(|(value, bound)| value <= bound)?,
        "exclusiveMinimum" => number().map(|(value, bound)| value > bound)?,
        "exclusiveMaximum" => number().map(|(value, bound)| value < bound)?,
        "multipleOf" if value.is_i64() && said.is_i64() => value.as_i64()? % said.as_i64()? == 0,
        "multipleOf" => number().map(|(value, step)| ((value / step) - (value / step).round()).abs() < 1e-6)?,
        "minLength" => length().map(|(value, bound)| value >= bound)?,
        "maxLength" => length().map(|(value, bound)| value <= bound)?,
        "pattern" => Regex::new(said.as_str()?).expect("an expression").is_match(value.as_str()?),
        "format" => format(said.as_str()?, value.as_str()?),
        "minItems" => items().map(|(value, bound)| value >= bound)?,
        "maxItems" => items().map(|(value, bound)| value <= bound)?,
        "prefixItems" => value.as_array()?.iter().zip(list()).all(|(item, one)| fits(root, one, item)),
        "items" => {
            let first = schema.get("prefixItems").and_then(Value::as_array).map_or(0, Vec::len);
            value.as_array()?.iter().skip(first).all(|item| fits(root, said, item))
        }
        "minProperties" => members().map(|(value, bound)| value >= bound)?,
        "maxProperties" => members().map(|(value, bound)| value <= bound)?,
        "required" => list().all(|name| value.get(name.as_str().expect("a name")).is_some() || !value.is_object()),
        "properties" => {
            let object = value.as_object()?;
            said.as_object()?.iter().all(|(name, one)| object.get(name).is_none_or(|member| fits(root, one, member)))
        }
        "patternProperties" => value.as_object()?.iter().all(|(name, member)| {
            let matching = said.as_object().expect("patterns").iter();
            matching
                .filter(|(pattern, _)| Regex::new(pattern).expect("an expression").is_match(name))
                .all(|(_, one)| fits(root, one, member))
        }),
        "additionalProperties" => value.as_object()?.iter().all(|(name, member)| {
            let named = schema.get("properties").is_some_and(|properties| properties.get(name).is_some());
            let patterns = schema.get("patternProperties").and_then(Value::as_object);
            let matched = patterns.is_some_and(|patterns| {
                patterns.keys().any(|pattern| Regex::new(pattern).expect("an expression").is_match(name))
            });
            named || matched || fits(root, said, member)
        }),
        _ => return None,
    })
}

fn is(kind: &str, value: &Value) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "string" => value.is_string(),
        "array" => value.is_array(),
        _ => value.is_object(),
    }
}

fn same(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

/// The formats, by their parts and not by an expression.
fn format(name: &str, text: &str) -> bool {
    match name {
        "date" => date(text),
        "time" => time(text),
        "date-time" => text.split_once('T').is_some_and(|(day, rest)| date(day) && time(rest)),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "uuid" => {
            let parts: Vec<&str> = text.split('-').collect();
            parts.iter().map(|part| part.len()).eq([8, 4, 4, 4, 12])
                && parts.concat().chars().all(|c| c.is_ascii_hexdigit())
        }
        "hostname" => host(text),
        "email" => text.rsplit_once('@').is_some_and(|(user, rest)| {
            !user.is_empty() && user.len() <= 64 && user.split('.').all(|part| !part.is_empty()) && host(rest)
        }),
        "uri" => text.split_once(':').is_some_and(|(scheme, rest)| {
            let plain = |c: char| c.is_ascii_graphic() && !"<>\"{}|\\^`[]".contains(c);
            scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && !rest.is_empty() && rest.chars().all(plain)
        }),
        "duration" => {
            let (date, time) = text.strip_prefix('P').map_or(("?", None), |rest| match rest.split_once('T') {
                Some((date, time)) => (date, Some(time)),
                None => (rest, None),
            });
            let units = |part: &str, order: &str| {
                let letters: String = part.chars().filter(|c| !c.is_ascii_digit()).collect();
                let ends = part.is_empty() || part.ends_with(|c: char| c.is_ascii_alphabetic());
                !letters.is_empty() && order.contains(&letters) && ends
            };
            match time {
                None => units(date, "YMD") || units(date, "W"),
                Some(time) => (date.is_empty() || units(date, "YMD")) && units(time, "HMS"),
            }
        }
        other => unreachable!("the format {other}"),
    }
}

fn host(text: &str) -> bool {
    let label = |part: &str| {
        let inside = part.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        (1..=63).contains(&part.len()) && inside && !part.starts_with('-') && !part.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn date(text: &str) -> bool {
    let parts: Vec<u32> = text.split('-').filter_map(|part| part.parse().ok()).collect();
    let [year, month, day] = parts[..] else { return false };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 => 28 + u32::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    text.len() == 10 && (1..=12).contains(&month) && (1..=days).contains(&day)
}

fn time(text: &str) -> bool {
    let (clock, zone) = match text.strip_suffix('Z') {
        Some(clock) => (clock, "00:00"),
        None => match text.rfind(['+', '-']) {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => return false,
        },
    };
    let below = |text: &str, bounds: &[f64]| {
        let parts: Vec<f64> = text.split(':').filter_map(|part| part.parse().ok()).collect();
        parts.len() == bounds.len() && parts.iter().zip(bounds).all(|(part, bound)| part < bound)
    };
    below(clock, &[24.0, 60.0, 60.0]) && below(zone, &[24.0, 60.0])
}
