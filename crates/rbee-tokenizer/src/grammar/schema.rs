//! JSON schemas, made into what llguidance enforces in full.
//!
//! Every keyword is known: an annotation and left out, enforced and passed on, or refused by its name and place. What a schema
//! leaves open is narrowed where an answer might otherwise not parse or not end: numbers have at most 18 digits before the point
//! and no exponent, open values nest up to [`OPEN_DEPTH`] deep, strings have one way of being written, and an object of which
//! properties are named has no others unless they are asked for. References are resolved here, and a value that could never end
//! is refused.

mod check;
mod closing;
mod cost;
mod finite;

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{formats, refused};
use crate::Error;
use check::{Budget, check_constant, check_name, check_number, check_pattern, count};

/// How deep schemas may nest in each other, references not followed.
const MAX_DEPTH: usize = 64;
/// Most targets of references.
const MAX_DEFINITIONS: usize = 1000;
/// How deep a value of which the schema says nothing may be.
const OPEN_DEPTH: usize = 8;
/// The greatest number that is written where a schema sets no bound; exact in 64 bits, as an integer and as a float.
const GREATEST: f64 = 1e18;
/// One blank or a line's end with its indentation: enough for every way of laying JSON out, and no way never to end.
const BLANK: &str = r" |\n[ \t]{0,32}";

const ANNOTATIONS: [&str; 18] = [
    "$schema",
    "$id",
    "id",
    "$anchor",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentMediaType",
    "contentEncoding",
    "discriminator",
];

/// Keywords whose value constrains the same value as their neighbours do.
const APPLICATORS: [&str; 6] = ["$ref", "allOf", "anyOf", "oneOf", "enum", "const"];

const NUMERIC: [&str; 5] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const TEXTUAL: [&str; 3] = ["minLength", "maxLength", "pattern"];

/// A schema of any object.
pub(super) fn any_object() -> Value {
    let mut book = Book { open: true, ..Book::default() };
    book.bound_open();
    let object = json!({"type": "object", "additionalProperties": {"$ref": "#/$defs/open1"}});
    book.document(object)
}

/// A schema that llguidance enforces as it is, of one that a user wrote.
pub(super) fn prepare(schema: &Value) -> Result<Value, Error> {
    let mut book = Book::default();
    let root = book.add(schema, "")?;
    book.finish(root)
}

/// Definitions that one or more schemas refer to, on the way to one document.
#[derive(Default)]
pub(super) struct Book {
    definitions: Map<String, Value>,
    budget: Budget,
    /// Names of definitions that no user wrote, by what they say.
    shared: HashMap<String, String>,
    /// Whether a value may be anything somewhere.
    open: bool,
    roots: usize,
}

/// Whether a schema stands for itself or is one of several that the same value must meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stands {
    Alone,
    Among,
}

impl Book {
    /// Takes a user's schema, which stands at `at` in the request, with all that it refers to.
    pub(super) fn add(&mut self, root: &Value, at: &str) -> Result<Value, Error> {
        self.roots += 1;
        let mut walk = Walk { book: self, root, base: at, names: HashMap::new(), pending: Vec::new() };
        let schema = walk.schema(root, &Place::root(at), Stands::Alone)?;
        while let Some((name, target, place, stands)) = walk.pending.pop() {
            let definition = walk.schema(target, &place, stands)?;
            walk.book.definitions.insert(name, definition);
        }
        Ok(schema)
    }

    /// The document of a schema made of those that were added.
    pub(super) fn finish(mut self, root: Value) -> Result<Value, Error> {
        if self.open {
            self.bound_open();
        }
        finite::check(&root, &self.definitions)?;
        cost::check(&root, &self.definitions)?;
        Ok(self.document(root))
    }

    /// A reference to a schema that stands alone and refers to none.
    fn share(&mut self, schema: Map<String, Value>) -> Value {
        let schema = Value::Object(schema);
        let next = self.shared.len();
        let name = self.shared.entry(schema.to_string()).or_insert_with(|| format!("s{next}"));
        let reference = json!({"$ref": format!("#/$defs/{name}")});
        if self.shared.len() > next {
            self.definitions.insert(format!("s{next}"), schema);
        }
        reference
    }

    /// The schema itself, where it was shared.
    fn unshared(&self, mut schema: Value) -> Value {
        if let Some(options) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
            options.iter_mut().for_each(|option| *option = self.unshared(option.take()));
        }
        let name = schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix("#/$defs/s"));
        let definition = name.and_then(|name| self.definitions.get(&format!("s{name}")));
        definition.cloned().unwrap_or(schema)
    }

    fn document(self, root: Value) -> Value {
        let mut document = match root {
            Value::Object(document) => document,
            other => Map::from_iter([("allOf".to_owned(), Value::Array(vec![other]))]),
        };
        document.insert("$defs".to_owned(), Value::Object(self.definitions));
        let options = json!({"whitespace_pattern": BLANK, "json_allowed_escapes": "nrbtf\\\""});
        document.insert("x-guidance".to_owned(), options);
        Value::Object(document)
    }

    /// Defines any value: one schema per level, so that no value is too deep to be parsed.
    fn bound_open(&mut self) {
        // Once, as its expression is a long one.
        let number = json!({"type": "number", "minimum": -GREATEST, "maximum": GREATEST});
        self.definitions.insert("number".to_owned(), number);
        for level in 0..=OPEN_DEPTH {
            let mut options = vec![
                json!({"type": "null"}),
                json!({"type": "boolean"}),
                json!({"$ref": "#/$defs/number"}),
                json!({"type": "string"}),
            ];
            if level < OPEN_DEPTH {
                let deeper = json!({"$ref": format!("#/$defs/open{}", level + 1)});
                options.push(json!({"type": "array", "items": deeper}));
                options.push(json!({"type": "object", "additionalProperties": deeper}));
            }
            self.definitions.insert(format!("open{level}"), json!({"anyOf": options}));
        }
    }
}

/// Where a schema stands.
#[derive(Clone)]
struct Place {
    pointer: String,
    depth: usize,
    /// Below an `$id` that is not the root's: references there mean something else.
    rebased: bool,
}

impl Place {
    fn root(at: &str) -> Place {
        Place { pointer: at.to_owned(), depth: 0, rebased: false }
    }

    fn below(&self, step: &str) -> Place {
        let step = step.replace('~', "~0").replace('/', "~1");
        Place { pointer: format!("{}/{step}", self.pointer), depth: self.depth + 1, rebased: self.rebased }
    }

    fn refuse(&self, problem: &str) -> Error {
        let at = if self.pointer.is_empty() { "the root" } else { self.pointer.as_str() };
        refused(&format!("{problem}, at {at} of the schema"))
    }
}

type Pending<'r> = (String, &'r Value, Place, Stands);

struct Walk<'b, 'r> {
    book: &'b mut Book,
    root: &'r Value,
    /// Where the root stands.
    base: &'r str,
    names: HashMap<(String, Stands), String>,
    pending: Vec<Pending<'r>>,
}

impl<'r> Walk<'_, 'r> {
    fn schema(&mut self, node: &'r Value, place: &Place, stands: Stands) -> Result<Value, Error> {
        self.book.budget.spend(1, place)?;
        if place.depth > MAX_DEPTH {
            return Err(refused(&format!("the schema nests more than {MAX_DEPTH} deep")));
        }
        let keywords = match node {
            Value::Object(keywords) => keywords,
            Value::Bool(true) => return Ok(self.anything(stands)),
            Value::Bool(false) => return Ok(Value::Bool(false)),
            _ => return Err(place.refuse("a schema must be an object or a boolean")),
        };
        let mut place = place.clone();
        place.rebased |= place.pointer != self.base && keywords.contains_key("$id");
        let mut used: Vec<(&'r str, &'r Value)> = Vec::new();
        for (keyword, value) in keywords {
            if !ANNOTATIONS.contains(&keyword.as_str()) && !keyword.starts_with("x-") {
                used.push((keyword, value));
            }
        }
        if used.is_empty() {
            return Ok(self.anything(stands));
        }
        self.keywords(&used, &place, stands)
    }

    fn keywords(&mut self, used: &[(&'r str, &'r Value)], place: &Place, stands: Stands) -> Result<Value, Error> {
        let has = |keyword: &str| used.iter().any(|&(other, _)| other == keyword);
        let applied = used.iter().filter(|(keyword, _)| APPLICATORS.contains(keyword)).count();
        let asserts = used.len() > applied;
        let both = has("pattern") && has("format");
        let inner = match applied + usize::from(asserts) + usize::from(both) {
            ..=1 => stands,
            _ => Stands::Among,
        };
        let mut made = Map::new();
        let mut also = Vec::new();
        for &(keyword, value) in used {
            let here = place.below(keyword);
            let new = match keyword {
                "type" => types(value, &here)?,
                "$ref" => self.reference(value, &here, inner)?,
                "allOf" => {
                    let inner = if list(value, &here)?.len() > 1 { Stands::Among } else { inner };
                    self.all(value, &here, inner)?
                }
                "anyOf" => self.all(value, &here, inner)?,
                "oneOf" => self.exclusive(value, &here, inner)?,
                "enum" => {
                    let values = list(value, &here)?;
                    for value in values {
                        check_constant(value, &here, &mut self.book.budget)?;
                    }
                    value.clone()
                }
                "const" => {
                    check_constant(value, &here, &mut self.book.budget)?;
                    value.clone()
                }
                "properties" | "patternProperties" => {
                    self.members(keyword, value, &here, stands_of(applied, stands))?
                }
                "required" => {
                    for name in strings(value, &here)? {
                        check_name(name, &here, &mut self.book.budget)?;
                    }
                    value.clone()
                }
                "additionalProperties" | "additionalItems" => self.schema(value, &here, stands_of(applied, stands))?,
                "items" if value.is_array() => self.all(value, &here, stands_of(applied, stands))?,
                "items" => self.schema(value, &here, stands_of(applied, stands))?,
                "prefixItems" => self.all(value, &here, stands_of(applied, stands))?,
                "minItems" | "maxItems" | "minLength" | "maxLength" | "minProperties" | "maxProperties" => {
                    count(value, &here)?
                }
                "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" => {
                    check_number(keyword, value, &here)?;
                    value.clone()
                }
                "pattern" => {
                    check_pattern(value.as_str(), &here, &mut self.book.budget)?;
                    value.clone()
                }
                "format" => {
                    let pattern = format(value, &here)?;
                    check_pattern(Some(pattern), &here, &mut self.book.budget)?;
                    if has("pattern") {
                        also.push(json!({"pattern": pattern}));
                    } else {
                        made.insert("pattern".to_owned(), pattern.into());
                    }
                    continue;
                }
                _ => return Err(place.refuse(&format!("`{keyword}` cannot be enforced"))),
            };
            made.insert(keyword.to_owned(), new);
        }
        let all = |(keyword, value): &(&str, &Value)| {
            *keyword == "allOf" && value.as_array().is_some_and(|all| all.len() > 1)
        };
        if stands == Stands::Alone && (inner == Stands::Among || used.iter().any(all)) {
            also.extend(self.closing(used));
        }
        if !also.is_empty() {
            let all = made.entry("allOf").or_insert_with(|| Value::Array(Vec::new()));
            all.as_array_mut().expect("`allOf` was made as a list").extend(also);
        }
        if asserts {
            self.narrow(&mut made, place, if applied == 0 { stands } else { Stands::Among })?;
        }
        match applied == 0 && !both && stands == Stands::Alone {
            true => Ok(self.by_kind(made)),
            false => Ok(Value::Object(made)),
        }
    }

    /// Takes a schema apart by the kinds of values, so that what is said of numbers and texts is compiled once however often it is
    /// said.
    fn by_kind(&mut self, made: Map<String, Value>) -> Value {
        let kinds: Vec<&str> = match made.get("type") {
            Some(Value::String(kind)) => vec![kind],
            Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
            _ => vec!["null", "boolean", "number", "string", "array", "object"],
        };
        let mut options = Vec::new();
        for kind in kinds {
            let said = |keyword: &str| match kind {
                "integer" | "number" => NUMERIC.contains(&keyword),
                "string" => TEXTUAL.contains(&keyword),
                "array" | "object" => !NUMERIC.contains(&keyword) && !TEXTUAL.contains(&keyword),
                _ => false,
            };
            let mut one = Map::from_iter([("type".to_owned(), kind.into())]);
            one.extend(
                made.iter()
                    .filter(|(keyword, _)| *keyword != "type" && said(keyword))
                    .map(|(k, v)| (k.clone(), v.clone())),
            );
            let shared = one.len() > 1 && !matches!(kind, "array" | "object");
            options.push(if shared { self.book.share(one) } else { Value::Object(one) });
        }
        match options.len() {
            1 => options.remove(0),
            _ => json!({"anyOf": options}),
        }
    }

    /// Closes what would be open, and refuses what llguidance would not keep.
    fn narrow(&mut self, made: &mut Map<String, Value>, place: &Place, stands: Stands) -> Result<(), Error> {
        let may_be = |kind: &str| match made.get("type") {
            None => true,
            Some(Value::Array(kinds)) => kinds.iter().any(|other| other == kind),
            Some(other) => other == kind,
        };
        let number = may_be("number") || may_be("integer");
        let (object, array) = (may_be("object"), may_be("array"));
        if object {
            least_properties(made, place)?;
        }
        if number && !made.contains_key("enum") && !made.contains_key("const") {
            if !made.contains_key("minimum") && !made.get("exclusiveMinimum").is_some_and(Value::is_number) {
                made.insert("minimum".to_owned(), json!(-GREATEST));
            }
            if !made.contains_key("maximum") && !made.get("exclusiveMaximum").is_some_and(Value::is_number) {
                made.insert("maximum".to_owned(), json!(GREATEST));
            }
            self.book.budget.numbers(made, place)?;
        }
        // What is open in one of several schemas another may close, and llguidance takes their common part.
        if stands == Stands::Alone {
            if object && !made.contains_key("additionalProperties") {
                let rest = if closed(made) { Value::Bool(false) } else { self.anything(stands) };
                made.insert("additionalProperties".to_owned(), rest);
            }
            let rest = if made.get("items").is_some_and(Value::is_array) { "additionalItems" } else { "items" };
            if array && !made.contains_key(rest) {
                made.insert(rest.to_owned(), self.anything(stands));
            }
        }
        Ok(())
    }

    fn anything(&mut self, stands: Stands) -> Value {
        match stands {
            Stands::Among => Value::Bool(true),
            Stands::Alone => {
                self.book.open = true;
                json!({"$ref": "#/$defs/open0"})
            }
        }
    }

    fn all(&mut self, value: &'r Value, place: &Place, stands: Stands) -> Result<Value, Error> {
        let schemas = list(value, place)?.iter().enumerate();
        schemas.map(|(at, schema)| self.schema(schema, &place.below(&at.to_string()), stands)).collect()
    }

    fn members(&mut self, keyword: &str, value: &'r Value, place: &Place, stands: Stands) -> Result<Value, Error> {
        let members = value.as_object().ok_or_else(|| place.refuse(&format!("`{keyword}` must be an object")))?;
        self.book.budget.members(members.len(), place)?;
        let mut made = Map::new();
        for (name, schema) in members {
            let here = place.below(name);
            match keyword {
                "properties" => check_name(name, &here, &mut self.book.budget)?,
                _ => check_pattern(Some(name), &here, &mut self.book.budget)?,
            }
            made.insert(name.clone(), self.schema(schema, &here, stands)?);
        }
        Ok(Value::Object(made))
    }

    /// Alternatives of which exactly one may hold. llguidance sees that they exclude each other only where none is a reference.
    fn exclusive(&mut self, value: &'r Value, place: &Place, stands: Stands) -> Result<Value, Error> {
        let options = list(value, place)?;
        self.book.budget.pairs(options.len(), place)?;
        let mut made = Vec::new();
        for (at, option) in options.iter().enumerate() {
            let mut here = place.below(&at.to_string());
            let mut option = option;
            while let Some(target) = lone_reference(option) {
                here = here.below("$ref");
                if here.depth > MAX_DEPTH {
                    return Err(here.refuse("its references lead in a circle"));
                }
                option = self.target(target, &here)?;
            }
            let option = self.schema(option, &here, stands)?;
            made.push(self.book.unshared(option));
        }
        Ok(Value::Array(made))
    }

    fn reference(&mut self, value: &'r Value, place: &Place, stands: Stands) -> Result<Value, Error> {
        let reference = value.as_str().ok_or_else(|| place.refuse("`$ref` must be a string"))?;
        let target = self.target(reference, place)?;
        let key = (reference.to_owned(), stands);
        let name = match self.names.get(&key) {
            Some(name) => name.clone(),
            None => {
                let name = format!("r{}.{}", self.book.roots, self.names.len());
                if self.names.len() >= MAX_DEFINITIONS {
                    return Err(refused(&format!("the schema refers to more than {MAX_DEFINITIONS} others")));
                }
                let at = Place::root(&format!("{}{}", self.base, reference.trim_start_matches('#')));
                self.names.insert(key, name.clone());
                self.pending.push((name.clone(), target, at, stands));
                name
            }
        };
        Ok(format!("#/$defs/{name}").into())
    }

    fn target(&self, reference: &str, place: &Place) -> Result<&'r Value, Error> {
        let pointer = reference.strip_prefix('#').filter(|pointer| pointer.is_empty() || pointer.starts_with('/'));
        let Some(pointer) = pointer else {
            return Err(place.refuse(&format!(
                "`$ref` to {reference:?} is not supported: only pointers such as \"#/$defs/a\" are"
            )));
        };
        if place.rebased {
            return Err(place.refuse("`$ref` below an `$id` of its own is not supported"));
        }
        let pointer = percent_decoded(pointer);
        self.root.pointer(&pointer).ok_or_else(|| place.refuse(&format!("`$ref` to {reference:?} leads nowhere")))
    }
}

fn stands_of(applied: usize, stands: Stands) -> Stands {
    if applied == 0 { stands } else { Stands::Among }
}

/// The reference that a schema is, annotations aside.
fn lone_reference(schema: &Value) -> Option<&str> {
    let mut keywords = schema.as_object()?.iter().filter(|(keyword, _)| !ANNOTATIONS.contains(&keyword.as_str()));
    match (keywords.next(), keywords.next()) {
        (Some((keyword, value)), None) if keyword == "$ref" => value.as_str(),
        _ => None,
    }
}

/// Whether an object's properties are named, all that are required among them.
fn closed(made: &Map<String, Value>) -> bool {
    let named = made.get("properties").and_then(Value::as_object);
    let required = made.get("required").and_then(Value::as_array);
    let described =
        |name: &Value| name.as_str().is_some_and(|name| named.is_some_and(|named| named.contains_key(name)));
    named.is_some_and(|named| !named.is_empty()) && required.is_none_or(|required| required.iter().all(described))
}

/// Names that repeat are one property: at least two free ones cannot be kept apart.
fn least_properties(made: &Map<String, Value>, place: &Place) -> Result<(), Error> {
    let least = made.get("minProperties").and_then(Value::as_u64).unwrap_or(0);
    let required = made.get("required").and_then(Value::as_array).map_or(0, Vec::len) as u64;
    let free = made.get("additionalProperties") != Some(&Value::Bool(false)) || made.contains_key("patternProperties");
    match free && least > required + 1 {
        true => Err(place.refuse("`minProperties` of more than one above the required can be enforced only with `additionalProperties: false`")),
        false => Ok(()),
    }
}

fn types(value: &Value, place: &Place) -> Result<Value, Error> {
    const KINDS: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];
    let kinds = match value {
        Value::String(kind) => vec![kind.as_str()],
        _ => strings(value, place)?,
    };
    match kinds.iter().find(|kind| !KINDS.contains(kind)) {
        Some(kind) => Err(place.refuse(&format!("there is no type {kind:?}"))),
        None if kinds.is_empty() => Err(place.refuse("`type` is empty")),
        None => Ok(value.clone()),
    }
}

fn format(value: &Value, place: &Place) -> Result<&'static str, Error> {
    let name = value.as_str().ok_or_else(|| place.refuse("`format` must be a string"))?;
    formats::pattern(name).ok_or_else(|| {
        place.refuse(&format!("`format` {name:?} cannot be enforced; these can: {}", formats::NAMES.join(", ")))
    })
}

fn list<'v>(value: &'v Value, place: &Place) -> Result<&'v Vec<Value>, Error> {
    match value.as_array() {
        Some(list) if !list.is_empty() => Ok(list),
        _ => Err(place.refuse("it must be a list that is not empty")),
    }
}

fn strings<'v>(value: &'v Value, place: &Place) -> Result<Vec<&'v str>, Error> {
    let strings = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
    strings.ok_or_else(|| place.refuse("it must be a list of strings"))
}

/// A pointer as it stands in an address.
fn percent_decoded(pointer: &str) -> String {
    let mut out = Vec::new();
    let mut rest = pointer.as_bytes();
    while let [first, after @ ..] = rest {
        let byte = match rest {
            [b'%', high, low, ..] => {
                let digit = |letter: &u8| char::from(*letter).to_digit(16);
                digit(high).zip(digit(low)).map(|(high, low)| (high * 16 + low) as u8)
            }
            _ => None,
        };
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &rest[3..] } else { after };
    }
    String::from_utf8_lossy(&out).into_owned()
}
