//! `config.json`: a decoder's architecture as data.
//!
//! [`ModelConfig::parse`] turns the keys of each family into the same few parts (norms, ropes, windows, MLPs), with the
//! family's own defaults where a key is missing, as transformers has them. Unknown values of known keys are errors; keys that
//! are known to change nothing are passed over; all others are named in [`ModelConfig::unknown`].

pub mod encoder;
mod family;
mod generation;
mod reader;
mod rope;
pub mod sentence;

use serde_json::Value;

pub use self::family::Family;
pub use self::generation::GenerationDefaults;
use self::reader::{Reader, object};
use self::rope::Around;
pub use self::rope::{Rope, RopeScaling};
use crate::Error;

const CONFIG: &str = "config.json";

/// Keys that change no result here: of training, of other programs, of files that are read on their own.
const HARMLESS: &[&str] = &[
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "dtype",
    "embd_pdrop",
    "hidden_act",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "max_window_layers",
    "mlp_only_layers",
    "model_type",
    "original_max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "rope_interleaved",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// A decoder's sizes and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Whose names the tensors have.
    pub family: Family,
    /// Vocabulary: rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// The norms.
    pub norms: Norms,
    /// Gate of the MLP.
    pub activation: Activation,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Where biases stand.
    pub biases: Biases,
    /// Constants that values are multiplied with.
    pub scales: Scales,
    /// Bound that attention scores are bent towards.
    pub attention_cap: Option<f32>,
    /// Bound that logits are bent towards.
    pub logit_cap: Option<f32>,
    /// The ropes that layers choose from; at least one.
    pub ropes: Vec<Rope>,
    /// Each layer.
    pub layers: Vec<LayerConfig>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Keys that nothing here knows.
    pub unknown: Vec<String>,
}

/// What differs between layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// Positions that a row attends to, its own included; all unless given.
    pub window: Option<usize>,
    /// Which rope rotates queries and keys; none unless given.
    pub rope: Option<usize>,
    /// The MLP.
    pub mlp: Mlp,
}

/// A layer's MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// One gated MLP of this width.
    Gated(usize),
    /// Several, of which a router picks some for each row.
    Experts {
        /// How many there are.
        count: usize,
        /// How many are picked.
        picked: usize,
        /// Width of each.
        width: usize,
        /// Whether the picked ones' weights are scaled to a sum of one.
        normalised: bool,
    },
}

/// RMS norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norms {
    /// Added to the mean square.
    pub eps: f32,
    /// Whether one is to be added to the stored weights.
    pub plus_one: bool,
    /// Where they stand around attention and MLP.
    pub place: NormPlace,
    /// Of queries and keys.
    pub qk: QkNorm,
}

/// Where norms stand around attention and MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlace {
    /// Before each.
    Before,
    /// After each, before it is added.
    After,
    /// Both.
    Around,
}

/// Norms of queries and keys, before rope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Of each head.
    Head,
    /// Of all heads together.
    Whole,
}

/// The gate of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

/// Where biases stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// The attention's output.
    pub output: bool,
    /// The MLP.
    pub mlp: bool,
}

/// Constants that values are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// Attention scores.
    pub attention: f32,
    /// Embeddings.
    pub embedding: f32,
    /// What attention and MLP add.
    pub residual: f32,
    /// Logits.
    pub logits: f32,
}

impl ModelConfig {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for what contradicts itself, [`Error::Unsupported`] for what this build does not do.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let map = object(CONFIG, bytes)?;
        let read = Reader::new(&map, CONFIG);
        let family = Family::read(&read)?;
        if read.get("quantization_config").is_some() {
            return Err(Error::unsupported(
                CONFIG,
                "`quantization_config`: only plain f32, f16 and bf16 weights are read",
            ));
        }
        for key in ["clip_qkv", "num_nextn_predict_layers"] {
            if read.get(key).is_some_and(|value| value.as_f64() != Some(0.0)) {
                return Err(Error::unsupported(CONFIG, format!("`{key}`")));
            }
        }
        read.off("use_bidirectional_attention")?;
        let hidden = read.need("hidden_size", 1 << 17)?;
        let heads = read.need("num_attention_heads", 1 << 12)?;
        let kv_heads = match read.size("num_key_value_heads", 1 << 12)? {
            Some(heads) => heads,
            None if family.defaults().kv_heads_may_be_missing => heads,
            None => return Err(Error::corrupt(CONFIG, "`num_key_value_heads` is missing")),
        };
        let head_dim = match read.size("head_dim", 1 << 12)?.or(family.defaults().head_dim) {
            Some(dim) => dim,
            None if hidden % heads == 0 => hidden / heads,
            None => return Err(Error::corrupt(CONFIG, "hidden_size is no multiple of num_attention_heads")),
        };
        if heads % kv_heads != 0 {
            return Err(Error::corrupt(CONFIG, "num_attention_heads is no multiple of num_key_value_heads"));
        }
        if head_dim % 2 != 0 {
            return Err(Error::corrupt(CONFIG, "head_dim is odd"));
        }
        let vocab = read.need("vocab_size", 1 << 22)?;
        let eos = read.ids("eos_token_id")?;
        if let Some(id) = eos.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::corrupt(CONFIG, format!("`eos_token_id` {id} is outside a vocabulary of {vocab}")));
        }
        let max_positions = match read.size("max_position_embeddings", 1 << 24)? {
            Some(positions) => positions,
            None if family == Family::Llama => 2048,
            None => return Err(Error::corrupt(CONFIG, "`max_position_embeddings` is missing")),
        };
        let count = read.need("num_hidden_layers", 1 << 10)?;
        let ropes = family.ropes(&read, head_dim, max_positions)?;
        let config = Self {
            family,
            vocab,
            hidden,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            norms: Norms {
                eps: read.number("rms_norm_eps", 0.0, 1.0)?.unwrap_or(family.defaults().norm_eps) as f32,
                ..family.norms()
            },
            activation: family.activation(&read)?,
            tied: read.flag("tie_word_embeddings", family.defaults().tied)?,
            biases: family.biases(&read)?,
            scales: family.scales(&read, hidden, head_dim)?,
            attention_cap: family.cap(&read, "attn_logit_softcapping", 50.0)?,
            logit_cap: family.cap(&read, "final_logit_softcapping", 30.0)?,
            ropes,
            layers: family.layers(&read, count)?,
            eos,
            unknown: Vec::new(),
        };
        let unknown = read.unread().filter(|key| !HARMLESS.contains(&key.as_str()));
        Ok(Self { unknown: unknown.take(32).map(|key| shown(key)).collect(), ..config })
    }

    /// The widest that a layer's MLP gets, gate and up together, for the experts of one row.
    pub fn widest_mlp(&self) -> usize {
        let widths = self.layers.iter().map(|layer| match layer.mlp {
            Mlp::Gated(width) => 2 * width,
            Mlp::Experts { picked, width, count, .. } => 2 * width * picked + count,
        });
        widths.max().unwrap_or(0)
    }

    /// The length of a prompt beyond which some layers' rope changes.
    pub fn regime_length(&self) -> Option<usize> {
        self.ropes.iter().find_map(Rope::original)
    }
}

/// A text of a file as a person may read it.
fn shown(text: &str) -> String {
    text.chars().take(64).collect::<String>().escape_debug().to_string()
}

/// The reference takes parts of both then, and which depends on its release.
fn two_spellings() -> Error {
    Error::unsupported(CONFIG, "`rope_scaling` beside `rope_parameters`: one of them must go")
}

/// The ropes of a config that has one for all layers.
fn single_rope(read: &Reader<'_>, around: &Around) -> Result<Vec<Rope>, Error> {
    let inner = match (read.inner("rope_parameters")?, read.inner("rope_scaling")?) {
        (Some(_), Some(_)) => return Err(two_spellings()),
        (new, old) => new.or(old),
    };
    Ok(vec![rope::rope(read, inner.as_ref(), around)?])
}

/// Names of layer kinds in `layer_types`.
fn layer_kinds(read: &Reader<'_>, count: usize) -> Result<Option<Vec<bool>>, Error> {
    let Some(value) = read.get("layer_types") else { return Ok(None) };
    let wrong = || read.wrong("layer_types", &format!("a list of {count} names of layer kinds"));
    let items = value.as_array().filter(|items| items.len() == count).ok_or_else(wrong)?;
    let kind = |item: &Value| match item.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        Some(other) => {
            let shown: String = other.chars().take(64).collect();
            Err(Error::unsupported(CONFIG, format!("layer kind `{}`", shown.escape_debug())))
        }
        None => Err(wrong()),
    };
    items.iter().map(kind).collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#"{"model_type":"llama","vocab_size":100,"hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"eos_token_id":[0,2]"#;

    fn parse(rest: &str) -> Result<ModelConfig, Error> {
        ModelConfig::parse(format!("{BASE}{rest}}}").as_bytes())
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() {
        let llama3 = r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192,"rope_type":"llama3""#;
        let old = parse(&format!(r#","rope_theta":500000.0,"rope_scaling":{{{llama3}}}"#)).unwrap();
        let new = parse(&format!(r#","rope_parameters":{{"rope_theta":500000.0,{llama3}}}"#)).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.ropes[0].theta, 500_000.0);
        assert_eq!(parse("").unwrap().ropes, [Rope { theta: 10_000.0, dims: 16, scaling: RopeScaling::None }]);
        assert_eq!(parse("").unwrap().eos, [0, 2]);
    }

    #[test]
    fn keys_that_nothing_knows_are_named_and_harmless_ones_are_not() {
        let config =
            parse(r#","torch_dtype":"bfloat16","use_cache":true,"mystery\n":1,"attention_bias":true"#).unwrap();
        assert_eq!(config.unknown, ["mystery\\n"]);
        assert!(config.biases.qkv && config.biases.output && !config.biases.mlp);
    }

    #[test]
    fn missing_keys_mean_what_they_mean_to_the_reference() {
        let qwen = |rest: &str| {
            let base = BASE.replace("\"llama\"", "\"qwen3\"");
            ModelConfig::parse(format!("{base},\"max_position_embeddings\":64{rest}}}").as_bytes()).unwrap()
        };
        assert_eq!(qwen("").head_dim, 128);
        let windows = |rest: &str| qwen(rest).layers.iter().map(|layer| layer.window).collect::<Vec<_>>();
        assert_eq!(windows(r#","use_sliding_window":true,"max_window_layers":1"#), [None, Some(4096)]);
        assert_eq!(windows(r#","use_sliding_window":true,"sliding_window":null,"max_window_layers":1"#), [None, None]);
        let yarn = r#","original_max_position_embeddings":32,"rope_scaling":{"type":"yarn","factor":2.0"#;
        let both = qwen(&format!(r#"{yarn},"original_max_position_embeddings":16}}"#));
        assert_eq!(both.ropes, qwen(&format!("{yarn}}}")).ropes);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (rest, want) in [
            (r#","rope_scaling":{"type":"dynamic","factor":2.0}"#, "rope type `dynamic`"),
            (r#","rope_scaling":{"type":3,"factor":2.0}"#, "`type` must be a text"),
            (r#","rope_scaling":{"type":"linear"}"#, "`factor` is missing"),
            (r#","rope_scaling":{"type":"linear","factor":2.0,"attention_factor":0.5}"#, "attention_factor"),
            (r#","rope_scaling":{"type":"longrope","short_factor":[1],"long_factor":[1]}"#, "must be 8 numbers"),
            (
                r#","rope_theta":1,"rope_scaling":{"type":"yarn","factor":4.0,"original_max_position_embeddings":4096}"#,
                "no wavelengths",
            ),
            (
                r#","head_dim":4,"rope_scaling":{"type":"longrope","short_factor":[1.0,1.5],"long_factor":[2.0,4.0],"factor":4.0,"original_max_position_embeddings":1}"#,
                "no attention factor",
            ),
            (r#","rope_parameters":[]"#, "an object"),
            (r#","rope_parameters":{"rope_theta":5.0},"rope_scaling":{"type":"linear","factor":2.0}"#, "one of them"),
            (r#","partial_rotary_factor":1.25"#, "partial_rotary_factor"),
            (r#","partial_rotary_factor":0.0625"#, "rotated in pairs"),
            (r#","rope_theta":0"#, "rope_theta"),
            (r#","hidden_act":3"#, "hidden_act"),
            (r#","vocab_size":2"#, "`eos_token_id` 2 is outside"),
            (r#","hidden_act":"gelu""#, "hidden_act"),
            (r#","quantization_config":{}"#, "quantization_config"),
            (r#","num_key_value_heads":3"#, "multiple"),
            (r#","head_dim":7"#, "odd"),
            (r#","rms_norm_eps":"x""#, "rms_norm_eps"),
            (r#","max_position_embeddings":99999999999"#, "max_position_embeddings"),
            (r#","layer_types":["full_attention"]"#, "layer_types"),
            (r#","layer_types":["full_attention","linear_attention"]"#, "linear_attention"),
            (r#","layer_types":["full_attention","sliding_attention"]"#, "layer_types"),
            (r#","clip_qkv":8"#, "clip_qkv"),
        ] {
            let error = parse(rest).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(matches!(ModelConfig::parse(br#"{"model_type":"gpt"}"#), Err(Error::Unsupported { .. })));
    }
}
