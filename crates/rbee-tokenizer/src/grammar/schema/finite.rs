//! Whether values of a schema can end: one that must hold another of itself cannot.

use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::Error;
use crate::grammar::refused;

/// How deep a chain of references may lead, with the schemas between them: llguidance goes down the stack along it.
const MAX_CHAIN: usize = 200;

/// Checks that every definition has a value that ends, and that no chain of them is too long.
pub(super) fn check(root: &Value, definitions: &Map<String, Value>) -> Result<(), Error> {
    let mut finite = HashSet::new();
    loop {
        let before = finite.len();
        // Those that were met last are closest to the leaves.
        for (name, definition) in definitions.iter().rev() {
            if !finite.contains(name.as_str()) && ends(definition, &finite) {
                finite.insert(name.as_str());
            }
        }
        if finite.len() == before {
            break;
        }
    }
    if finite.len() < definitions.len() || !ends(root, &finite) {
        return Err(refused("a `$ref` leads in a circle that no value can end"));
    }
    let mut seen = HashSet::new();
    chain(root, definitions, &mut seen, 0)
}

fn target(schema: &Map<String, Value>) -> Option<&str> {
    schema.get("$ref")?.as_str()?.strip_prefix("#/$defs/")
}

fn ends(schema: &Value, finite: &HashSet<&str>) -> bool {
    let Value::Object(schema) = schema else { return true };
    if target(schema).is_some_and(|name| !finite.contains(name)) {
        return false;
    }
    let list = |keyword: &str| schema.get(keyword).and_then(Value::as_array);
    if list("allOf").is_some_and(|all| !all.iter().all(|one| ends(one, finite))) {
        return false;
    }
    for any in ["anyOf", "oneOf"] {
        if list(any).is_some_and(|any| !any.iter().any(|one| ends(one, finite))) {
            return false;
        }
    }
    let kinds: Vec<&str> = match schema.get("type") {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => return true,
    };
    kinds.iter().any(|kind| match *kind {
        "object" => object_ends(schema, finite),
        "array" => array_ends(schema, finite),
        _ => true,
    })
}

fn object_ends(schema: &Map<String, Value>, finite: &HashSet<&str>) -> bool {
    let Some(required) = schema.get("required").and_then(Value::as_array) else { return true };
    required.iter().filter_map(Value::as_str).all(|name| {
        let named = schema.get("properties").and_then(|properties| properties.get(name));
        let other = || schema.get("additionalProperties").filter(|_| !schema.contains_key("patternProperties"));
        named.or_else(other).is_none_or(|member| ends(member, finite))
    })
}

fn array_ends(schema: &Map<String, Value>, finite: &HashSet<&str>) -> bool {
    let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(0) as usize;
    let items = schema.get("items");
    let first = schema.get("prefixItems").or(items).and_then(Value::as_array);
    let rest = if items.is_some_and(Value::is_array) { schema.get("additionalItems") } else { items };
    let first = first.map_or(&[][..], Vec::as_slice);
    first.iter().take(least).all(|item| ends(item, finite))
        && (least <= first.len() || rest.is_none_or(|item| ends(item, finite)))
}

/// Follows llguidance's way through the definitions, each when it is first met.
fn chain<'d>(
    value: &'d Value,
    definitions: &'d Map<String, Value>,
    seen: &mut HashSet<&'d str>,
    depth: usize,
) -> Result<(), Error> {
    if depth > MAX_CHAIN {
        return Err(refused("its references form too long a chain"));
    }
    match value {
        Value::Object(members) => {
            if let Some(name) = target(members)
                && seen.insert(name)
                && let Some(definition) = definitions.get(name)
            {
                chain(definition, definitions, seen, depth + 1)?;
            }
            members.values().try_for_each(|member| chain(member, definitions, seen, depth + 1))
        }
        Value::Array(values) => values.iter().try_for_each(|value| chain(value, definitions, seen, depth + 1)),
        _ => Ok(()),
    }
}
