//! The `config.json` that a GGUF's metadata means, as [`ModelConfig::parse`] reads it.
//!
//! Facts that the metadata leave out are llama.cpp's constants: Gemma's attention scale by size, Gemma 3's window
//! pattern and the rope base of its windows, SmolLM3's layers without rope (our default too), Qwen3's normalised
//! experts. Keys of the architecture that nothing here knows are passed on without a value, so that
//! [`ModelConfig::unknown`] names them.

mod rope;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};

use serde_json::{Map, Value, json};

use self::rope::rope;
use super::names::Architecture;
use super::values::PerLayer;
use super::{GgmlType, Gguf, TensorInfo, check_split};
use crate::Error;
use crate::config::ModelConfig;

/// Keys of an architecture that change no result here, or are read from elsewhere.
const HARMLESS: &[&str] = &["vocab_size", "rope.scaling.finetuned"];

/// Keys of an architecture that say something else is to be computed, unless they are nought.
const OFF: &[&str] = &[
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_scale",
    "deepstack_mapping",
    "expert_group_count",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "interleave_moe_layer_step",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "pooling_type",
    "rope.dimension_sections",
    "rope.scaling.yarn_log_multiplier",
];

const TOKENS: &str = "tokenizer.ggml.tokens";

/// What llama.cpp takes for the end of a text or turn when a special token is called so, of those that vocabularies of
/// our architectures have.
const ENDS: &[&str] = &[
    "</s>",
    "<eos>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
];

/// Types of special tokens.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Most unknown keys that are passed on.
const MAX_UNKNOWN: usize = 32;

/// The config of a model whose files these are, in order.
///
/// # Errors
/// As [`config_json`] and [`ModelConfig::parse`].
pub fn model_config(files: &[Gguf<'_>]) -> Result<ModelConfig, Error> {
    let text = Value::Object(config_json(files)?).to_string();
    // There is no file that the user could look at but these.
    ModelConfig::parse(text.as_bytes()).map_err(|error| match error {
        Error::Corrupt { problem, .. } => Error::corrupt(files[0].file(), format!("its metadata say that {problem}")),
        Error::Unsupported { problem, .. } => Error::unsupported(files[0].file(), problem),
        missing @ Error::Missing(_) => missing,
    })
}

/// The `config.json` of a model whose files these are, in order; the metadata are those of the first.
///
/// # Errors
/// As [`check_split`]; [`Error::Corrupt`] for a key that must be there and is not, or is of another type;
/// [`Error::Unsupported`] for an architecture or a feature that this build does not compute.
pub fn config_json(files: &[Gguf<'_>]) -> Result<Map<String, Value>, Error> {
    check_split(files)?;
    let gguf = &files[0];
    if let Some(kind) = gguf.str("general.type")?.filter(|kind| *kind != "model") {
        let shown: String = kind.chars().take(64).collect();
        return Err(Error::unsupported(gguf.file(), format!("it is of type `{}`, no model", shown.escape_debug())));
    }
    let arch = Architecture::of(gguf)?;
    let keys = Keys { files, gguf, arch, seen: RefCell::default() };
    for key in OFF {
        if keys.is_set(key) {
            return Err(keys.unsupported(key));
        }
    }
    if gguf.bool(&keys.name("attention.causal"))? == Some(false) {
        return Err(keys.unsupported("attention.causal"));
    }
    let mut config = Map::new();
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    let shape = Shape::read(&keys)?;
    put("vocab_size", json!(keys.vocab()?));
    put("hidden_size", json!(shape.hidden));
    put("num_hidden_layers", json!(shape.layers));
    put("num_attention_heads", json!(shape.heads));
    put("num_key_value_heads", json!(shape.kv_heads));
    put("head_dim", json!(shape.head_dim));
    put("max_position_embeddings", json!(shape.context));
    put("rms_norm_eps", json!(keys.need_number("attention.layer_norm_rms_epsilon")?));
    put("tie_word_embeddings", json!(keys.tensor("output.weight").is_none()));
    if let Some(eos) = keys.eos()? {
        put("eos_token_id", eos);
    }
    config.extend(mlp(&keys)?);
    config.extend(attention(&keys, &shape)?);
    config.extend(windows(&keys, &shape)?);
    config.extend(rope(&keys, &shape)?);
    config.extend(biases(&keys)?);
    let window = config.get("sliding_window").is_some_and(|window| !window.is_null());
    config.insert("model_type".into(), json!(model_type(arch, config.contains_key("num_local_experts"), window)));
    for key in keys.unknown() {
        config.insert(key.to_owned(), Value::Null);
    }
    Ok(config)
}

/// The name that transformers has. Mistral is a llama with a window.
fn model_type(arch: Architecture, experts: bool, window: bool) -> &'static str {
    match arch {
        Architecture::Llama if experts => "mixtral",
        Architecture::Llama if window => "mistral",
        Architecture::Llama => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::Qwen3Moe => "qwen3_moe",
        Architecture::Phi3 => "phi3",
        Architecture::Gemma2 => "gemma2",
        Architecture::Gemma3 => "gemma3_text",
        Architecture::SmolLm3 => "smollm3",
        Architecture::Olmo2 => "olmo2",
        Architecture::Granite => "granite",
    }
}

/// Values by an architecture's keys, which remember that they were looked at.
struct Keys<'a> {
    files: &'a [Gguf<'a>],
    gguf: &'a Gguf<'a>,
    arch: Architecture,
    seen: RefCell<HashSet<String>>,
}

impl<'a> Keys<'a> {
    /// The whole key.
    fn name(&self, key: &str) -> String {
        let name = format!("{}.{key}", self.arch.name());
        self.seen.borrow_mut().insert(name.clone());
        name
    }

    fn corrupt(&self, problem: impl Into<String>) -> Error {
        Error::corrupt(self.gguf.file(), problem)
    }

    fn unsupported(&self, key: &str) -> Error {
        Error::unsupported(self.gguf.file(), format!("`{}` as it is there", self.name(key)))
    }

    /// Whether there is a value other than nought.
    fn is_set(&self, key: &str) -> bool {
        let key = self.name(key);
        let nought = matches!(self.gguf.u64(&key), Ok(Some(0)))
            || matches!(self.gguf.f64(&key), Ok(Some(0.0)))
            || matches!(self.gguf.bool(&key), Ok(Some(false)));
        self.gguf.has(&key) && !nought
    }

    /// A whole number that is the same for every layer.
    fn size(&self, key: &str) -> Result<Option<u64>, Error> {
        let name = self.name(key);
        match self.gguf.per_layer(&name)? {
            None => Ok(None),
            Some(PerLayer::Same(value)) => Ok(Some(value)),
            Some(PerLayer::Each(values)) => match values.first() {
                None => Err(self.corrupt(format!("`{name}` has no values"))),
                Some(first) if values.iter().all(|value| value == first) => Ok(Some(*first)),
                Some(_) => Err(Error::unsupported(self.gguf.file(), format!("`{name}` that differs between layers"))),
            },
        }
    }

    fn need(&self, key: &str) -> Result<u64, Error> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> Error {
        self.corrupt(format!("`{}` is missing", self.name(key)))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        let name = self.name(key);
        // A double is read as what it is.
        let number = match self.gguf.f32(&name) {
            Ok(number) => number.map(decimal),
            Err(_) => self.gguf.f64(&name)?,
        };
        match number {
            Some(number) if !number.is_finite() => Err(self.gguf.wrong(&name, "a number")),
            other => Ok(other),
        }
    }

    fn need_number(&self, key: &str) -> Result<f64, Error> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    /// A tensor of any of the files, and its file.
    fn tensor(&self, name: &str) -> Option<(&'a Gguf<'a>, &'a TensorInfo)> {
        self.files.iter().find_map(|gguf| Some((gguf, gguf.tensors.get(name)?)))
    }

    /// The values of a tensor of f32.
    fn values(&self, name: &str, count: usize) -> Result<Option<Vec<f64>>, Error> {
        let Some((gguf, tensor)) = self.tensor(name) else { return Ok(None) };
        if tensor.kind != GgmlType::F32 || tensor.shape.iter().product::<usize>() != count {
            let problem =
                format!("`{name}` is of kind {:?} and shape {:?}, not {count} f32", tensor.kind, tensor.shape);
            return Err(Error::corrupt(gguf.file(), problem));
        }
        let data = gguf.data(tensor).ok_or_else(|| Error::Missing(format!("`{name}` of {}", gguf.file())))?;
        let values = data.as_chunks().0.iter().map(|bytes| decimal(f32::from_le_bytes(*bytes))).collect::<Vec<_>>();
        if values.iter().any(|value| !value.is_finite() || *value <= 0.0) {
            return Err(Error::corrupt(gguf.file(), format!("`{name}` has values that divide no frequency")));
        }
        Ok(Some(values))
    }

    /// Rows of the embedding, which are the vocabulary.
    fn vocab(&self) -> Result<u64, Error> {
        let tokens = self.gguf.count(TOKENS)?.map(|count| count as u64);
        let rows = match self.tensor("token_embd.weight").map(|(_, tensor)| &tensor.shape[..]) {
            None => None,
            Some([rows, _]) => Some(*rows as u64),
            Some(shape) => return Err(self.corrupt(format!("`token_embd.weight` has a shape of {shape:?}"))),
        };
        match (tokens, rows) {
            (Some(tokens), Some(rows)) if tokens != rows => {
                Err(self.corrupt(format!("it has {tokens} tokens and embeddings of {rows}")))
            }
            (tokens, rows) => rows.or(tokens).ok_or_else(|| self.corrupt("it has neither tokens nor embeddings")),
        }
    }

    /// Tokens that end a text, a turn or a message: those that the keys name, and those that are called so, since many
    /// writers name only one.
    fn eos(&self) -> Result<Option<Value>, Error> {
        let mut ids = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            let id = self.gguf.u64(&format!("tokenizer.ggml.{key}"))?;
            // Some writers say by all ones that there is none.
            ids.extend(id.filter(|id| *id != u64::from(u32::MAX) && !ids.contains(id)));
        }
        const TYPES: &str = "tokenizer.ggml.token_type";
        if let (Some(tokens), Some(types)) = (self.gguf.strings(TOKENS)?, self.gguf.i32s(TYPES)?) {
            for (id, (text, kind)) in (0..).zip(tokens.zip(types)) {
                let ends = matches!(kind, CONTROL | USER_DEFINED) && ENDS.contains(&text?);
                ids.extend(Some(id).filter(|id| ends && !ids.contains(id)));
            }
        }
        Ok((!ids.is_empty()).then(|| json!(ids)))
    }

    /// The architecture's keys that nobody asked for.
    fn unknown(&self) -> impl Iterator<Item = &'a str> {
        let seen = self.seen.borrow();
        let own = |key: &&str| match key.strip_prefix(self.arch.name()).and_then(|key| key.strip_prefix('.')) {
            Some(rest) => !HARMLESS.contains(&rest) && !seen.contains(*key),
            None => false,
        };
        let unknown: BTreeSet<&str> = self.gguf.keys().filter(own).collect();
        unknown.into_iter().take(MAX_UNKNOWN)
    }
}

/// The double of the shortest decimal that rounds to this: what the author wrote before it was stored in 4 bytes.
fn decimal(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// The sizes that the rest depends on.
struct Shape {
    hidden: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    context: u64,
}

impl Shape {
    fn read(keys: &Keys<'_>) -> Result<Self, Error> {
        let (hidden, heads) = (keys.need("embedding_length")?, keys.need("attention.head_count")?);
        let divided = hidden.checked_div(heads).filter(|dim| dim * heads == hidden);
        let head_dim = match (keys.size("attention.key_length")?, keys.size("attention.value_length")?) {
            (Some(key), value) if value.is_none_or(|value| value == key) => key,
            (None, None) => divided.ok_or_else(|| keys.corrupt("its embedding length is no multiple of its heads"))?,
            (None, Some(value)) if divided == Some(value) => value,
            (key, value) => {
                let problem = format!("keys of length {key:?} beside values of length {value:?}");
                return Err(Error::unsupported(keys.gguf.file(), problem));
            }
        };
        Ok(Self {
            hidden,
            layers: keys.need("block_count")?,
            heads,
            kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            context: keys.need("context_length")?,
        })
    }
}

/// Widths of MLPs, and experts.
fn mlp(keys: &Keys<'_>) -> Result<Map<String, Value>, Error> {
    let mut out = Map::new();
    let (width, own) = (keys.size("feed_forward_length")?, keys.size("expert_feed_forward_length")?);
    let experts = keys.size("expert_count")?.unwrap_or(0);
    let picked = keys.size("expert_used_count")?.unwrap_or(0);
    // 1 is softmax, and experts are weighted by it.
    if keys.size("expert_gating_func")?.is_some_and(|function| function > 1) {
        return Err(keys.unsupported("expert_gating_func"));
    }
    if keys.number("expert_weights_scale")?.is_some_and(|scale| scale != 0.0 && scale != 1.0) {
        return Err(keys.unsupported("expert_weights_scale"));
    }
    let normalised = keys.gguf.bool(&keys.name("expert_weights_norm"))?;
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    match keys.arch {
        Architecture::Llama | Architecture::Qwen3Moe if experts > 0 => {
            put("num_local_experts", json!(experts));
            put("num_experts_per_tok", json!(picked));
            if keys.arch == Architecture::Qwen3Moe {
                let own = own.ok_or_else(|| keys.missing("expert_feed_forward_length"))?;
                put("intermediate_size", json!(width.unwrap_or(own)));
                put("moe_intermediate_size", json!(own));
                put("norm_topk_prob", json!(normalised.unwrap_or(true)));
                return Ok(out);
            }
            if normalised == Some(false) {
                return Err(keys.unsupported("expert_weights_norm"));
            }
            put("intermediate_size", json!(own.or(width).ok_or_else(|| keys.missing("feed_forward_length"))?));
        }
        Architecture::Qwen3Moe => return Err(keys.missing("expert_count")),
        _ if experts > 0 => return Err(keys.unsupported("expert_count")),
        _ => {
            put("intermediate_size", json!(width.ok_or_else(|| keys.missing("feed_forward_length"))?));
        }
    }
    Ok(out)
}

/// Scales and caps.
fn attention(keys: &Keys<'_>, shape: &Shape) -> Result<Map<String, Value>, Error> {
    let mut out = Map::new();
    let mut put = |key: &str, value: f64| out.insert(key.to_owned(), json!(value));
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = keys.number(key)?.filter(|cap| *cap != 0.0) {
            put(key, cap);
        }
    }
    // Nought says that there is none.
    let scale = |key: &str| keys.number(key).map(|scale| scale.filter(|scale| *scale != 0.0));
    let attention = scale("attention.scale")?;
    let usual = 1.0 / (shape.head_dim as f64).sqrt();
    match keys.arch {
        Architecture::Granite => {
            for (key, own) in [
                ("embedding_multiplier", "embedding_scale"),
                ("residual_multiplier", "residual_scale"),
                ("logits_scaling", "logit_scale"),
            ] {
                if let Some(scale) = scale(own)? {
                    put(key, scale);
                }
            }
            if let Some(attention) = attention {
                put("attention_multiplier", attention);
            }
            return Ok(out);
        }
        Architecture::Gemma2 | Architecture::Gemma3 => {
            // The two of 27 billion parameters, known by their layers, scale by the width that a head would have.
            let largest = if keys.arch == Architecture::Gemma2 { 46 } else { 62 };
            let by_width = shape.layers == largest && shape.heads > 0;
            let scalar = if by_width { shape.hidden / shape.heads } else { shape.head_dim };
            put("query_pre_attn_scalar", attention.map_or(scalar as f64, |scale| 1.0 / (scale * scale)));
        }
        _ if attention.is_some_and(|scale| (scale / usual - 1.0).abs() > 1e-5) => {
            return Err(keys.unsupported("attention.scale"));
        }
        _ => {}
    }
    for key in ["embedding_scale", "residual_scale", "logit_scale"] {
        if scale(key)?.is_some_and(|scale| scale != 1.0) {
            return Err(keys.unsupported(key));
        }
    }
    Ok(out)
}

/// Windows, and which layers have them.
fn windows(keys: &Keys<'_>, shape: &Shape) -> Result<Map<String, Value>, Error> {
    let mut out = Map::new();
    let window = keys.size("attention.sliding_window")?;
    let pattern = keys.gguf.per_layer(&keys.name("attention.sliding_window_pattern"))?;
    // Nought says that there is none.
    let size = window.filter(|window| *window > 0);
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    match keys.arch {
        Architecture::Gemma2 => {
            if pattern.is_some_and(|pattern| !matches!(pattern, PerLayer::Same(2))) {
                return Err(keys.unsupported("attention.sliding_window_pattern"));
            }
            if window.is_some() {
                put("sliding_window", json!(size));
            }
        }
        Architecture::Gemma3 => {
            put("sliding_window", json!(size));
            match pattern {
                _ if size.is_none() => {
                    // Every layer is the last of its pattern, and those see everything.
                    put("sliding_window_pattern", json!(1));
                }
                None | Some(PerLayer::Same(0)) => {
                    put("sliding_window_pattern", json!(6));
                }
                Some(PerLayer::Same(layers)) => {
                    put("sliding_window_pattern", json!(layers));
                }
                Some(PerLayer::Each(layers)) => {
                    let kinds = layers.iter().take(1 << 10).map(|one| match one {
                        0 => "full_attention",
                        _ => "sliding_attention",
                    });
                    put("layer_types", json!(kinds.collect::<Vec<_>>()));
                }
            }
        }
        Architecture::Llama | Architecture::Phi3 => {
            if pattern.is_some() {
                return Err(keys.unsupported("attention.sliding_window_pattern"));
            }
            if size.is_some() || keys.arch == Architecture::Phi3 {
                put("sliding_window", json!(size));
            }
        }
        // A window of the whole context is none.
        _ if size.is_some_and(|size| size < shape.context) => return Err(keys.unsupported("attention.sliding_window")),
        _ => {}
    }
    Ok(out)
}

/// Where biases stand, which the tensors say.
fn biases(keys: &Keys<'_>) -> Result<Map<String, Value>, Error> {
    let mut out = Map::new();
    if matches!(keys.arch, Architecture::Qwen2 | Architecture::Phi3) {
        return Ok(out);
    }
    let [q, output, mlp] =
        ["attn_q", "attn_output", "ffn_down"].map(|part| keys.tensor(&format!("blk.0.{part}.bias")).is_some());
    if q != output {
        let problem = "attention with biases of either q, k and v or the output";
        return Err(Error::unsupported(keys.gguf.file(), problem));
    }
    for (key, there) in [("attention_bias", q), ("mlp_bias", mlp)] {
        if there {
            out.insert(key.into(), json!(true));
        }
    }
    Ok(out)
}
