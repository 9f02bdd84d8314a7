//! Objects that several schemas describe: each alone leaves open what another may close, so that a part is added that closes them.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{Place, Stands, Walk};

/// Most schemas that are looked into.
const MAX_LOOKS: usize = 500;
/// How far they are followed into each other.
const MAX_FOLLOWED: usize = 6;

/// What schemas say together of one object.
#[derive(Default)]
struct Said {
    /// That it is one.
    object: bool,
    names: BTreeSet<String>,
    /// That names have patterns, or that there was too much to look at.
    beyond: bool,
    /// That it may have other names.
    open: bool,
    looks: usize,
}

impl<'r> Walk<'_, 'r> {
    /// A schema of the names of an object and nothing else, or of what is open elsewhere too.
    pub(super) fn closing(&mut self, used: &[(&'r str, &'r Value)]) -> Option<Value> {
        let mut said = Said::default();
        self.keywords_said(used, MAX_FOLLOWED, &mut said);
        if !said.object || said.beyond {
            return None;
        }
        let rest = if said.open || said.names.is_empty() { self.anything(Stands::Alone) } else { Value::Bool(false) };
        let names: Map<String, Value> = said.names.into_iter().map(|name| (name, Value::Bool(true))).collect();
        Some(json!({"type": "object", "properties": names, "additionalProperties": rest}))
    }

    fn said(&self, schema: &'r Value, left: usize, said: &mut Said) {
        said.looks += 1;
        if left == 0 || said.looks > MAX_LOOKS {
            said.beyond = true;
            return;
        }
        let keywords: Vec<(&'r str, &'r Value)> =
            schema.as_object().into_iter().flatten().map(|(keyword, value)| (keyword.as_str(), value)).collect();
        self.keywords_said(&keywords, left, said);
    }

    fn keywords_said(&self, keywords: &[(&'r str, &'r Value)], left: usize, said: &mut Said) {
        for &(keyword, value) in keywords {
            let list = value.as_array().into_iter().flatten();
            match keyword {
                "type" => said.object |= value == "object",
                "properties" => said.names.extend(value.as_object().into_iter().flat_map(Map::keys).cloned()),
                "required" => said.names.extend(list.filter_map(Value::as_str).map(str::to_owned)),
                "patternProperties" => said.beyond = true,
                "additionalProperties" => said.open |= value != &Value::Bool(false),
                "allOf" => list.for_each(|one| self.said(one, left - 1, said)),
                "anyOf" | "oneOf" => {
                    // One of them is an object, and others may be none.
                    let object = said.object;
                    list.for_each(|one| self.said(one, left - 1, said));
                    said.object = object;
                }
                "$ref" => {
                    let place = Place::root(self.base);
                    match value.as_str().and_then(|reference| self.target(reference, &place).ok()) {
                        Some(target) => self.said(target, left - 1, said),
                        None => said.beyond = true,
                    }
                }
                "const" | "enum" => said.beyond = true,
                _ => {}
            }
        }
    }
}
