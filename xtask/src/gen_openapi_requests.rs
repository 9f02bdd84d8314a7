//! Schemas of what requests may hold, for the OpenAPI document: from the tables that check them.

use anyhow::{Result, bail};
use rbee_openai::fields::{Endpoint, Fate};
use rbee_wire::fields::{Field, Kind, MAX_INPUTS, MAX_MESSAGES, MAX_TEXT, MAX_TOOLS, Need};
use rbee_wire::form::MAX_FORM;
use rbee_wire::hive::Process;
use rbee_wire::job::{Message, ToolCall};
use rbee_wire::key::KeyView;
use rbee_wire::op::{Built, INFER_FIELDS, OPERATIONS, Operation, OperationRow};
use rbee_wire::view::{
    BinaryView, Embedding, HiveView, InfoReply, LoadedView, PlanView, SpawnView, StatusView, StoredView, WorkerView,
};
use schemars::JsonSchema;
use schemars::generate::SchemaGenerator;
use serde_json::{Map, Value, json};

/// Makes a schema.
pub type Make = fn(&mut SchemaGenerator) -> Value;

/// The schema of a type.
pub fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

/// The component of this name.
pub fn named(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// The components that requests are made of.
///
/// # Errors
/// When a field has no schema.
pub fn components(generator: &mut SchemaGenerator) -> Result<Map<String, Value>> {
    // Whatever the tables name is a component, also where nothing but them refers to it.
    for make in [of::<Message> as Make, of::<ToolCall>] {
        make(generator);
    }
    let mut all = Map::new();
    let (mut rows, mut mapping) = (Vec::new(), Map::new());
    for row in OPERATIONS {
        let name = format!("{}Request", camel(row.name));
        rows.push(named(&name));
        mapping.insert(row.name.into(), format!("#/components/schemas/{name}").into());
        all.insert(name, operation(row, generator));
    }
    let discriminator = json!({ "propertyName": "operation", "mapping": mapping });
    all.insert("JobRequest".into(), json!({ "oneOf": rows, "discriminator": discriminator }));
    all.insert("ShutdownRequest".into(), shutdown());
    all.insert("Tool".into(), tool());
    all.insert("ChatRequestMessage".into(), message());
    for endpoint in Endpoint::ALL {
        let name = match endpoint {
            Endpoint::Chat => "ChatCompletionRequest",
            Endpoint::Completions => "CompletionRequest",
            Endpoint::Embeddings => "EmbeddingRequest",
        };
        all.insert(name.into(), dialect(endpoint)?);
    }
    Ok(all)
}

fn camel(name: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').map(capital).collect()
}

fn operation(row: &OperationRow, generator: &mut SchemaGenerator) -> Value {
    let mut properties = Map::new();
    properties.insert("operation".into(), json!({ "const": row.name }));
    let mut required = vec!["operation"];
    for field in row.fields {
        if field.need == Need::Required {
            required.push(field.name);
        }
        properties.insert(field.name.into(), schema_of(field));
    }
    let mut schema = json!({
        "type": "object",
        "description": row.about,
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    });
    if row.built == Built::No {
        schema["description"] = format!("{} Not built yet: ends in `NOT_IMPLEMENTED`.", row.about).into();
    }
    if let Some(result) = result(row.op) {
        schema["x-data"] = result(generator);
    }
    schema
}

/// What `data` events of an operation hold.
fn result(operation: Operation) -> Option<Make> {
    let make: Make = match operation {
        Operation::Status => of::<StatusView>,
        Operation::Infer => of::<Embedding>,
        Operation::ActiveWorkerList | Operation::ActiveWorkerGet => of::<WorkerView>,
        Operation::ActiveWorkerRetire => {
            |generator| json!({ "anyOf": [of::<Process>(generator), of::<WorkerView>(generator)] })
        }
        Operation::HiveList | Operation::HiveGet | Operation::HiveStart | Operation::HiveRefreshCapabilities => {
            of::<HiveView>
        }
        Operation::HiveStatus | Operation::HiveStop => of::<InfoReply>,
        Operation::WorkerSpawn => of::<SpawnView>,
        Operation::WorkerProcessList | Operation::WorkerProcessGet | Operation::WorkerProcessDelete => of::<Process>,
        Operation::WorkerBinaryList | Operation::WorkerBinaryGet => of::<BinaryView>,
        Operation::ModelDownload
        | Operation::ModelList
        | Operation::ModelGet
        | Operation::ModelDelete
        | Operation::ModelImport => of::<StoredView>,
        Operation::ModelPlan => of::<PlanView>,
        Operation::ModelLoad | Operation::ModelUnload => of::<LoadedView>,
        Operation::KeyCreate | Operation::KeyList | Operation::KeyRevoke => of::<KeyView>,
        Operation::HiveInstall
        | Operation::HiveUninstall
        | Operation::HiveImportSsh
        | Operation::SshTest
        | Operation::WorkerBinaryDelete
        | Operation::WorkerDownload
        | Operation::WorkerBuild => return None,
    };
    Some(make)
}

fn schema_of(field: &Field) -> Value {
    let mut schema = kind(field.kind);
    if field.need == Need::Optional {
        schema = nullable(schema);
    }
    schema["description"] = field.about.into();
    schema
}

/// A field that may be left out may be null too.
fn nullable(mut schema: Value) -> Value {
    if let Some(kind) = schema.get("type").cloned() {
        schema["type"] = json!([kind, "null"]);
    }
    for name in ["enum", "anyOf"] {
        if let Some(Value::Array(all)) = schema.get_mut(name) {
            all.push(if name == "enum" { Value::Null } else { json!({ "type": "null" }) });
        }
    }
    schema
}

fn list(items: &Value, most: usize) -> Value {
    json!({ "type": "array", "items": items, "maxItems": most })
}

fn tokens() -> Value {
    list(&json!({ "type": "integer", "minimum": 0, "maximum": u32::MAX }), 1 << 20)
}

fn some_tokens() -> Value {
    let mut schema = tokens();
    schema["minItems"] = 1.into();
    schema
}

fn kind(kind: Kind) -> Value {
    let text = json!({ "type": "string" });
    match kind {
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Int(min, max) => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Float(min, max) => json!({ "type": "number", "minimum": min, "maximum": max }),
        Kind::Id => json!({ "type": "string", "minLength": 1, "maxLength": 128 }),
        // The table counts bytes, of which a character has one at least.
        Kind::Text(max) => json!({ "type": "string", "maxLength": max }),
        Kind::Model | Kind::Device => text,
        Kind::Texts(max) => json!({ "anyOf": [text, list(&text, max)] }),
        Kind::Bias => json!({
            "type": "object",
            "propertyNames": { "pattern": "^[0-9]+$" },
            "additionalProperties": { "type": "number", "minimum": -100, "maximum": 100 },
            "maxProperties": 1024,
        }),
        Kind::Messages => {
            json!({ "type": "array", "items": named("Message"), "minItems": 1, "maxItems": MAX_MESSAGES })
        }
        Kind::Hex(digits) => json!({ "type": "string", "pattern": format!("^[0-9a-f]{{{digits}}}$") }),
        Kind::Words(words) => json!({ "type": "array", "items": { "enum": words }, "minItems": 1 }),
        Kind::Tokens => tokens(),
        Kind::Prompt => json!({ "anyOf": [{ "type": "string", "maxLength": MAX_TEXT }, some_tokens()] }),
        Kind::Inputs => {
            json!({ "type": "array", "items": { "anyOf": [text, tokens()] }, "maxItems": MAX_INPUTS })
        }
        Kind::Object => json!({ "type": "object" }),
        Kind::Tools => list(&named("Tool"), MAX_TOOLS),
        Kind::ToolChoice => {
            let function = json!({ "type": "object", "properties": { "name": text }, "required": ["name"] });
            json!({ "anyOf": [{ "enum": ["auto", "none", "required"] }, {
                "type": "object",
                "properties": { "type": { "const": "function" }, "function": function },
                "required": ["type", "function"],
            }] })
        }
        Kind::ResponseFormat => response_format(),
        Kind::Any => json!({}),
        Kind::KeepAlive => json!({ "anyOf": [{ "type": "number" }, text] }),
    }
}

fn shutdown() -> Value {
    let hives = json!({ "type": "boolean", "description": "stop the local hive too" });
    json!({ "type": "object", "properties": { "hives": hives }, "additionalProperties": false })
}

fn response_format() -> Value {
    let form = |kind: &str, more: Value| {
        let mut properties = json!({ "type": { "const": kind } });
        let mut required = vec!["type"];
        if !more.is_null() {
            properties[kind] = more;
            required.push(kind);
        }
        json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
    };
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": ["string", "null"], "description": "changes nothing" },
            "description": { "type": ["string", "null"], "description": "changes nothing" },
            "schema": { "type": "object", "description": "a JSON schema" },
            "strict": { "type": ["boolean", "null"], "description": "changes nothing: the schema is always adhered to" },
        },
        "required": ["schema"],
        "additionalProperties": false,
    });
    let regex = json!({ "type": "string", "minLength": 1, "maxLength": MAX_FORM });
    let lark = json!({ "type": "string", "minLength": 1, "maxLength": MAX_FORM, "description": "in Lark's notation" });
    json!({ "anyOf": [
        form("text", Value::Null),
        form("json_object", Value::Null),
        form("json_schema", schema),
        form("regex", regex),
        form("grammar", lark),
    ] })
}

fn tool() -> Value {
    json!({
        "type": "object",
        "description": "A function that the model may call.",
        "properties": {
            "type": { "const": "function" },
            "function": {
                "type": "object",
                "properties": {
                    "name": { "type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$" },
                    "description": { "type": ["string", "null"] },
                    "parameters": { "type": ["object", "null"], "description": "a JSON schema" },
                },
                "required": ["name"],
            },
        },
        "required": ["type", "function"],
    })
}

fn message() -> Value {
    let text = json!({ "type": ["string", "null"] });
    let part = json!({
        "type": "object",
        "properties": { "type": { "const": "text" }, "text": { "type": "string" } },
        "required": ["type", "text"],
    });
    json!({
        "type": "object",
        "description": "A message of a chat that is to be answered.",
        "properties": {
            "role": { "enum": ["system", "developer", "user", "assistant", "tool"] },
            "content": {
                "description": "a text, or parts of it; null for an assistant that calls or reasons and says nothing",
                "anyOf": [text, { "type": "array", "items": part }],
            },
            "reasoning_content": text,
            "tool_calls": { "type": ["array", "null"], "items": named("ToolCall") },
            "tool_call_id": text,
            "name": text,
        },
        "required": ["role"],
    })
}

fn dialect(endpoint: Endpoint) -> Result<Value> {
    let mut properties = Map::new();
    for field in endpoint.fields() {
        let (mut schema, about) = match field.fate {
            Fate::Job(name) => match INFER_FIELDS.iter().find(|row| row.name == name) {
                Some(row) => (nullable(kind(row.kind)), row.about.to_owned()),
                None => bail!("`{name}` is no field of a job"),
            },
            Fate::Own(how) => (nullable(own(endpoint, field.name)?), how.to_owned()),
            Fate::Refused(unless) => (json!({}), format!("refused, {unless}")),
            Fate::Ignored => (json!({}), "changes nothing, and is named in `x-rbee-ignored`".to_owned()),
        };
        schema["description"] = about.into();
        properties.insert(field.name.into(), schema);
    }
    let required = match endpoint {
        Endpoint::Chat => "messages",
        Endpoint::Completions => "prompt",
        Endpoint::Embeddings => "input",
    };
    Ok(json!({ "type": "object", "properties": properties, "required": [required] }))
}

/// A field that means what the dialect says.
fn own(endpoint: Endpoint, name: &str) -> Result<Value> {
    let text = json!({ "type": "string" });
    let job = |name: &str| INFER_FIELDS.iter().find(|row| row.name == name).map_or(json!({}), |row| kind(row.kind));
    Ok(match (endpoint, name) {
        (_, "messages") => {
            json!({ "type": "array", "items": named("ChatRequestMessage"), "minItems": 1, "maxItems": MAX_MESSAGES })
        }
        (_, "tools") => list(&named("Tool"), MAX_TOOLS),
        (_, "prompt") => {
            let prompts = list(&json!({ "anyOf": [text, some_tokens()] }), 16);
            json!({ "anyOf": [text, some_tokens(), prompts] })
        }
        (_, "input") => {
            let inputs = list(&json!({ "anyOf": [text, tokens()] }), MAX_INPUTS);
            json!({ "anyOf": [text, tokens(), inputs] })
        }
        (_, "encoding_format") => json!({ "enum": ["float", "base64"] }),
        (_, "max_tokens") => job("max_tokens"),
        (Endpoint::Completions, "logprobs") => job("top_logprobs"),
        (_, "seed") => json!({ "type": "integer", "minimum": i64::MIN, "maximum": u64::MAX }),
        (_, "stream") => json!({ "type": "boolean" }),
        (_, "stream_options") => {
            json!({ "type": "object", "properties": { "include_usage": { "type": ["boolean", "null"] } } })
        }
        _ => bail!("`{name}` of {} has no schema", endpoint.path()),
    })
}
