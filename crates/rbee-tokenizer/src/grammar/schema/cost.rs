//! What it takes to meet several schemas at once: llguidance pairs every alternative of one with every one of the others.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::APPLICATORS;
use crate::Error;
use crate::grammar::refused;

/// Most schemas that are made of pairing.
const MAX_PAIRED: usize = 20_000;
/// How far references are followed to count alternatives.
const MAX_FOLLOWED: usize = 16;

/// Checks that pairing alternatives stays within bounds.
pub(super) fn check(root: &Value, definitions: &Map<String, Value>) -> Result<(), Error> {
    let mut counter = Counter { definitions, sizes: HashMap::new(), widths: HashMap::new(), paired: 0 };
    for definition in definitions.values() {
        counter.walk(definition);
    }
    counter.walk(root);
    match counter.paired > MAX_PAIRED {
        true => Err(refused(
            "too many alternatives have to be met at once: write them out, without `allOf` or keywords beside them",
        )),
        false => Ok(()),
    }
}

struct Counter<'d> {
    definitions: &'d Map<String, Value>,
    sizes: HashMap<&'d str, usize>,
    widths: HashMap<&'d str, usize>,
    paired: usize,
}

impl<'d> Counter<'d> {
    fn walk(&mut self, schema: &'d Value) {
        match schema {
            Value::Object(members) => {
                self.pair(members);
                members
                    .iter()
                    .filter(|(keyword, _)| *keyword != "enum" && *keyword != "const")
                    .for_each(|(_, member)| self.walk(member));
            }
            Value::Array(values) => values.iter().for_each(|value| self.walk(value)),
            _ => {}
        }
    }

    /// Counts what a schema of several parts is made into.
    fn pair(&mut self, schema: &'d Map<String, Value>) {
        let mut parts: Vec<&'d Value> = Vec::new();
        let mut plain = false;
        for (keyword, value) in schema {
            match keyword.as_str() {
                "allOf" => parts.extend(value.as_array().into_iter().flatten()),
                keyword if APPLICATORS.contains(&keyword) => parts.push(value),
                _ => plain = true,
            }
        }
        if parts.len() + usize::from(plain) < 2 {
            return;
        }
        let width = self.width_of(schema, MAX_FOLLOWED);
        let size: usize = schema.values().map(|part| self.size(part, MAX_FOLLOWED)).fold(0, usize::saturating_add);
        self.paired = self.paired.saturating_add(width.saturating_mul(size));
    }

    /// How many alternatives a schema has.
    fn width(&mut self, schema: &'d Value, left: usize) -> usize {
        match schema {
            Value::Object(schema) => self.width_of(schema, left),
            _ => 1,
        }
    }

    fn width_of(&mut self, schema: &'d Map<String, Value>, left: usize) -> usize {
        let mut width = 1usize;
        let mut plain = false;
        for (keyword, value) in schema {
            let list = value.as_array().map_or(&[][..], Vec::as_slice);
            let factor = match keyword.as_str() {
                "anyOf" | "oneOf" => list.iter().map(|one| self.width(one, left)).fold(0, usize::saturating_add),
                "allOf" => list.iter().map(|one| self.width(one, left)).fold(1, usize::saturating_mul),
                "enum" => list.len(),
                "$ref" => self.width_of_target(value, left),
                "type" => list.len().max(1),
                "const" => 1,
                _ => {
                    plain = true;
                    1
                }
            };
            width = width.saturating_mul(factor.max(1));
        }
        if plain && !schema.contains_key("type") { width.saturating_mul(6) } else { width }
    }

    fn width_of_target(&mut self, reference: &'d Value, left: usize) -> usize {
        let Some((name, definition)) = self.target(reference) else { return 1 };
        if let Some(&known) = self.widths.get(name) {
            return known;
        }
        if left == 0 {
            return 1;
        }
        // A circle counts once.
        self.widths.insert(name, 1);
        let width = self.width(definition, left - 1);
        self.widths.insert(name, width);
        width
    }

    fn target(&self, reference: &'d Value) -> Option<(&'d str, &'d Value)> {
        let name = reference.as_str()?.strip_prefix("#/$defs/")?;
        Some((name, self.definitions.get(name)?))
    }

    /// How many values a schema is written with, those that it refers to at once included.
    fn size(&mut self, value: &'d Value, left: usize) -> usize {
        match value {
            Value::Object(members) => {
                let below = members.values().map(|member| self.size(member, left)).fold(1, usize::saturating_add);
                let Some((name, definition)) = members.get("$ref").and_then(|value| self.target(value)) else {
                    return below;
                };
                if let Some(&known) = self.sizes.get(name) {
                    return below.saturating_add(known);
                }
                if left == 0 {
                    return below;
                }
                self.sizes.insert(name, 1);
                let size = self.size(definition, left - 1);
                self.sizes.insert(name, size);
                below.saturating_add(size)
            }
            Value::Array(values) => values.iter().map(|value| self.size(value, left)).fold(1, usize::saturating_add),
            _ => 1,
        }
    }
}
