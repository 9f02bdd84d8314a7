//! Every keyword is enforced, or refused by its name and place.

use rbee_tokenizer::{Error, Form};
use serde_json::{Value, json};

use super::checker::problem;
use super::{Drawer, letters};
use crate::fixtures::*;

const SEEDS: u64 = 200;

/// Schemas that together have every keyword, alone and beside others.
fn schemas() -> Vec<Value> {
    let tree = json!({"type": "object", "required": ["value"], "additionalProperties": false, "properties": {
        "value": {"type": "integer"}, "left": {"$ref": "#"}, "right": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}});
    let mut all = vec![
        json!({}),
        json!(true),
        json!({"title": "anything", "description": "of any kind", "examples": [1], "x-order": 3}),
        json!({"type": "null"}),
        json!({"type": "boolean"}),
        json!({"type": "string"}),
        json!({"type": "number"}),
        json!({"type": "integer"}),
        json!({"type": "array"}),
        json!({"type": "object"}),
        json!({"type": ["integer", "null", "string"], "maximum": -5, "maxLength": 2}),
        json!({"minimum": 3, "maxLength": 4, "maxItems": 2, "required": ["a"], "properties": {"a": {"type": "null"}}}),
        json!({"const": {"a": [1, null, "x\n\"\\é"], "b": -2.5}}),
        json!({"enum": ["red", "green", 3, 3.5, -0.125, null, true, ["a"], {"k": "v"}]}),
        json!({"type": "string", "enum": ["red", "green", 3]}),
        json!({"type": "string", "minLength": 2, "maxLength": 5}),
        json!({"type": "string", "minLength": 300}),
        json!({"type": "string", "pattern": "^[a-c]+-\\d{2,3}$"}),
        json!({"type": "string", "pattern": "b\\w", "maxLength": 12}),
        json!({"type": "string", "pattern": "^a|b$", "maxLength": 6}),
        json!({"type": "string", "pattern": "^\\S+ [^a-z]", "minLength": 4, "maxLength": 9}),
        json!({"type": "string", "format": "date", "pattern": "^20.4-02"}),
        json!({"type": "integer", "minimum": -12, "maximum": 345}),
        json!({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}),
        json!({"type": "integer", "multipleOf": 7, "minimum": 100}),
        json!({"type": "number", "minimum": -1.5, "maximum": 2.25}),
        json!({"type": "number", "exclusiveMinimum": 0.5, "maximum": 1}),
        json!({"type": "number", "exclusiveMinimum": -3, "exclusiveMaximum": 0}),
        json!({"type": "number", "multipleOf": 0.25, "maximum": 10}),
        json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 4}),
        json!({"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": false, "minItems": 1}),
        json!({"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "maxItems": 5}),
        json!({"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}, "c": {"const": 1}}, "required": ["c", "b"]}),
        json!({"type": "object", "properties": {}, "additionalProperties": false}),
        json!({"type": "object", "properties": {}}),
        json!({"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"type": "boolean"}}),
        json!({"type": "object", "required": ["free"], "properties": {"a": {"const": 1}}}),
        json!({"type": "object", "additionalProperties": {"const": 1}, "minProperties": 1, "maxProperties": 3}),
        json!({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "additionalProperties": false, "minProperties": 1}),
        json!({"type": "object", "patternProperties": {"^x[0-9]$": {"type": "integer"}}, "properties": {"x": {"const": "y"}}, "additionalProperties": false}),
        json!({"type": "object", "patternProperties": {"^n": {"type": "null"}}, "additionalProperties": {"type": "boolean"}}),
        json!({"anyOf": [{"type": "integer", "maximum": 3}, {"type": "string", "maxLength": 1}, {"type": "array", "maxItems": 0}]}),
        json!({"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]}),
        json!({"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}, "$defs": {
            "cat": {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind", "lives"]},
            "dog": {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}, "name": {"type": "string"}}, "required": ["kind"]}}}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                         {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"], "additionalProperties": true}]}),
        json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}, {"multipleOf": 2}]}),
        json!({"allOf": [{"$ref": "#/$defs/small"}], "$defs": {"small": {"type": "integer", "maximum": 10}}}),
        json!({"type": "string", "anyOf": [{"maxLength": 2}, {"pattern": "^long"}]}),
        json!({"$ref": "#/$defs/a~1b%20c", "maximum": 4, "$defs": {"a/b c": {"type": "integer", "minimum": 2}}}),
        json!({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"n": {"type": "null"}},
               "type": "object", "properties": {"x": {"$ref": "#/definitions/n"}, "y": {"$ref": "#/properties/x"}}, "required": ["y"]}),
        json!({"type": "object", "properties": {"quote\"d\\": {"type": "integer"}, "é\n": {"const": "ü"}, "": {"const": null}}, "required": ["quote\"d\\", "é\n", ""]}),
        tree,
    ];
    for format in ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"] {
        all.push(json!({"type": "string", "format": format}));
    }
    all
}

/// What goes wrong first with the answers of a schema.
fn wrong(drawer: &Drawer, schema: &Value, seeds: u64) -> Option<String> {
    let grammar = match drawer.grammars.compile(&Form::JsonSchema(schema.clone())) {
        Ok(grammar) => grammar,
        Err(error) => return Some(format!("{schema}: {error}")),
    };
    (0..seeds).find_map(|seed| {
        let text = drawer.text(&drawer.ids(&grammar, seed));
        let problem = match serde_json::from_str(&text) {
            Ok(value) => problem(schema, schema, &value)?,
            Err(error) => error.to_string(),
        };
        Some(format!("{schema}, seed {seed}: {problem} in {text:?}"))
    })
}

#[test]
fn every_keyword_is_enforced_whatever_the_model_draws() {
    let drawer = letters();
    let wrong: Vec<String> = schemas().iter().filter_map(|schema| wrong(&drawer, schema, SEEDS)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn tokens_of_many_letters_change_nothing() {
    let words = Drawer::new(tinybee(), "<|im_end|>");
    let pieces = Drawer::new(sentencepiece(), "</s>");
    let drawers = [words, pieces];
    let schemas = schemas();
    let pairs = schemas.iter().step_by(3).flat_map(|schema| drawers.iter().map(move |drawer| (drawer, schema)));
    let wrong: Vec<String> = pairs.filter_map(|(drawer, schema)| wrong(drawer, schema, 15)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The checker is no rubber stamp: what a grammar refuses it refuses too, and some things both take.
#[test]
fn values_are_taken_and_refused_as_the_schema_says() {
    let drawer = letters();
    let person = json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"], "additionalProperties": false});
    for (schema, text, taken) in [
        (&person, r#"{"name":"A","age":3}"#, true),
        (&person, "{\n  \"name\": \"A\",\n  \"age\": 3\n}", true),
        (&person, r#"{ "name": "A", "age": 3 }"#, true),
        (&person, r#"{"age":3,"name":"A"}"#, false),
        (&person, r#"{"name":"A","age":-3}"#, false),
        (&person, r#"{"name":"A"}"#, false),
        (&person, r#"{"name":"A","age":3,"x":1}"#, false),
        (&person, "{  \"name\"", false),
        (&person, "{\n\n\"name\"", false),
        (&json!({"type": "array"}), "[1, \"a\", {\"b\": [null, true]}]", true),
        (&json!({"type": "string"}), "\"tab\\t and é\"", true),
        (&json!({"type": "string"}), "\"\\u0041\"", false),
        (&json!({"type": "number"}), "1e999", false),
        (&json!({"type": "string", "format": "date"}), "\"2023-02-29\"", false),
        (&json!({"type": "string", "format": "date"}), "\"2024-02-29\"", true),
        (&json!({"type": "string", "format": "email"}), "\"a.b+c@d-e.org\"", true),
        (&json!({"type": "string", "format": "uri"}), "\"https://a.b/c?d=e#f\"", true),
        (&json!({"type": "string", "format": "ipv6"}), "\"fe80::1\"", true),
        (&json!({"type": "string", "format": "duration"}), "\"P1Y2M3DT4H5M6S\"", true),
    ] {
        let took = drawer.takes(&drawer.schema(schema), text);
        assert_eq!(took == Ok(true), taken, "{text} of {schema}: {took:?}");
    }
}

/// Properties come in the schema's order, as strict schemas want it.
#[test]
fn properties_keep_the_order_of_the_schema() {
    let drawer = letters();
    let schema = json!({"type": "object", "properties": {"z": {"const": 1}, "a": {"const": 2}, "m": {"const": 3}},
        "required": ["m", "a", "z"], "additionalProperties": false});
    for seed in 0..20 {
        let text: String = drawer.text(&drawer.ids(&drawer.schema(&schema), seed)).split_whitespace().collect();
        assert_eq!(text, r#"{"z":1,"a":2,"m":3}"#);
    }
}

#[test]
fn a_schema_that_cannot_be_enforced_is_refused_by_name_and_place() {
    let drawer = letters();
    let below = |keyword: &str, value: Value| json!({"type": "object", "properties": {"a/b": {keyword: value}}});
    for keyword in [
        "not",
        "if",
        "then",
        "else",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "propertyNames",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedProperties",
        "unevaluatedItems",
        "$dynamicRef",
        "$recursiveRef",
        "contentSchema",
        "nullable",
        "foo",
        "x",
    ] {
        refused(
            &drawer,
            &below(keyword, json!(true)),
            &format!("`{keyword}` cannot be enforced, at /properties/a~1b of the schema"),
        );
    }
    for (keyword, value, why) in [
        ("format", json!("regex"), "`format` \"regex\" cannot be enforced; these can: date-time"),
        ("$ref", json!("#/$defs/none"), "leads nowhere, at /properties/a~1b/$ref"),
        ("$ref", json!("other.json"), "only pointers"),
        ("$ref", json!("#anchor"), "only pointers"),
        ("type", json!("text"), "there is no type \"text\""),
        ("enum", json!([]), "not empty"),
        ("pattern", json!("a(?=b)"), "the pattern \"a(?=b)\" is not supported (look-around"),
        ("pattern", json!("(a"), "unclosed group"),
        ("pattern", json!("a\\bc"), "is not supported"),
        ("minimum", json!(9_007_199_254_740_993u64), "too many digits"),
        ("const", json!(1e-20), "too many digits"),
        ("multipleOf", json!(0), "above zero"),
        ("minLength", json!(-1), "it must be a count"),
        ("const", json!("\u{1}"), "is not supported"),
        ("properties", json!([]), "`properties` must be an object"),
        ("required", json!("a"), "a list of strings"),
        ("oneOf", json!([{"type": "integer"}, {"type": "number"}]), "oneOf"),
        ("allOf", json!([{"type": "integer"}, {"type": "string"}]), ""),
    ] {
        let mut schema = below(keyword, value);
        schema["required"] = json!(["a/b"]);
        refused(&drawer, &schema, why);
    }
    for (schema, why) in [
        (json!("text"), "an object or a boolean"),
        (json!(false), ""),
        (json!({"type": "string", "pattern": "^\u{1}$"}), ""),
        (json!({"type": "array", "minItems": 3, "maxItems": 2}), "minItems"),
        (json!({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
        (json!({"type": "object", "additionalProperties": {"const": 1}, "minProperties": 2}), "`minProperties`"),
        (json!({"$ref": "#"}), "no value can end"),
        (
            json!({"type": "object", "properties": {"x": {"$ref": "#/$defs/endless"}}, "$defs": {
                "endless": {"type": "object", "properties": {"next": {"$ref": "#/$defs/endless"}}, "required": ["next"]}}}),
            "no value can end",
        ),
        (
            json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
            "no value can end",
        ),
        (json!({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}), "no value can end"),
        (json!({"type": "array", "items": {"$ref": "#"}, "minItems": 1}), "no value can end"),
        (json!({"properties": {"a": {"$id": "x", "properties": {"b": {"$ref": "#/c"}}}}}), "below an `$id` of its own"),
    ] {
        refused(&drawer, &schema, why);
    }
}

fn refused(drawer: &Drawer, schema: &Value, why: &str) {
    match drawer.grammars.compile(&Form::JsonSchema(schema.clone())) {
        Ok(_) => panic!("{schema} was taken"),
        Err(Error::Grammar(problem)) => {
            assert!(problem.contains(why), "{schema}: {problem}");
            assert!(!problem.contains('\n') && problem.len() < 600, "{problem:?}");
        }
        Err(error) => panic!("{schema}: {error}"),
    }
}
