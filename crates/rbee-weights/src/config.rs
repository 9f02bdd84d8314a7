//! `config.json` and `generation_config.json`: which architecture, which sizes, which defaults.
//!
//! Unknown values of known keys are errors. Keys that nothing here knows are left alone, as transformers leaves them.
//! Both spellings of the rope settings are read: `rope_theta` with `rope_scaling`, and
//! `rope_parameters`.

use serde_json::{Map, Value};

use crate::Error;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";

/// Architectures of this build, by `model_type`.
pub const SUPPORTED: &[&str] = &["llama"];

/// A decoder's sizes and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Vocabulary: rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether the MLP has biases.
    pub mlp_bias: bool,
    /// Rope.
    pub rope: Rope,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// How rope frequencies are changed for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by this (Chen et al. 2023).
    Linear(f64),
    /// Low ones divided, high ones kept, those between blended (Llama 3.1's `llama3`).
    Llama3 {
        /// Divides the low ones.
        factor: f64,
        /// Below original length over this, a wavelength is high.
        low: f64,
        /// Above original length over this, a wavelength is low.
        high: f64,
        /// The length the model was first made for.
        original: f64,
    },
}

fn object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    if bytes.len() > 4 << 20 {
        return Err(Error::corrupt(file, "it is larger than any config"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::corrupt(file, "it is not a JSON object")),
        Err(error) => Err(Error::corrupt(file, format!("it is not valid JSON: {error}"))),
    }
}

struct Reader<'a> {
    map: &'a Map<String, Value>,
    file: &'static str,
}

impl Reader<'_> {
    fn wrong(&self, key: &str, what: &str) -> Error {
        Error::corrupt(self.file, format!("`{key}` must be {what}"))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str, max: usize) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| (1..=max).contains(size));
        size.map(Some).ok_or_else(|| self.wrong(key, &format!("a whole number from 1 to {max}")))
    }

    fn need(&self, key: &str, max: usize) -> Result<usize, Error> {
        self.size(key, max)?.ok_or_else(|| Error::corrupt(self.file, format!("`{key}` is missing")))
    }

    fn number(&self, key: &str, min: f64, max: f64) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| (min..=max).contains(number));
        number.map(Some).ok_or_else(|| self.wrong(key, &format!("a number from {min} to {max}")))
    }

    fn flag(&self, key: &str) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text"))
    }

    /// A key whose other values would change the result.
    fn only(&self, key: &str, value: f64) -> Result<(), Error> {
        match self.number(key, f64::MIN, f64::MAX)? {
            Some(other) if other != value => Err(Error::unsupported(self.file, format!("`{key}` other than {value}"))),
            _ => Ok(()),
        }
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>, Error> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(items)) if items.len() <= 64 => items.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, "a token id or at most 64 of them"))
    }
}

impl ModelConfig {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for what contradicts itself, [`Error::Unsupported`] for what this build does not do.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let map = object(CONFIG, bytes)?;
        let read = Reader { map: &map, file: CONFIG };
        let kind = read.text("model_type")?.unwrap_or_default();
        if !SUPPORTED.contains(&kind) {
            let shown: String = kind.chars().take(64).collect();
            return Err(Error::unsupported(
                CONFIG,
                format!("model_type `{}` is not one of {}", shown.escape_debug(), SUPPORTED.join(", ")),
            ));
        }
        if read.get("quantization_config").is_some() {
            return Err(Error::unsupported(
                CONFIG,
                "`quantization_config`: only plain f32, f16 and bf16 weights are read",
            ));
        }
        match read.text("hidden_act")? {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(Error::unsupported(CONFIG, format!("hidden_act `{}`", other.escape_debug()))),
        }
        let hidden = read.need("hidden_size", 1 << 17)?;
        let heads = read.need("num_attention_heads", 1 << 12)?;
        let kv_heads = read.size("num_key_value_heads", 1 << 12)?.unwrap_or(heads);
        let head_dim = match read.size("head_dim", 1 << 12)? {
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
        read.only("partial_rotary_factor", 1.0)?;
        let vocab = read.need("vocab_size", 1 << 22)?;
        let eos = read.ids("eos_token_id")?;
        if let Some(id) = eos.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::corrupt(CONFIG, format!("`eos_token_id` {id} is outside a vocabulary of {vocab}")));
        }
        Ok(Self {
            vocab,
            hidden,
            intermediate: read.need("intermediate_size", 1 << 20)?,
            layers: read.need("num_hidden_layers", 1 << 10)?,
            heads,
            kv_heads,
            head_dim,
            max_positions: read.size("max_position_embeddings", 1 << 24)?.unwrap_or(2048),
            norm_eps: read.number("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6) as f32,
            tied: read.flag("tie_word_embeddings")?,
            attention_bias: read.flag("attention_bias")?,
            mlp_bias: read.flag("mlp_bias")?,
            rope: rope(&read)?,
            eos,
        })
    }
}

fn rope(read: &Reader<'_>) -> Result<Rope, Error> {
    let nested = |key: &str| match read.get(key) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(_) => Err(read.wrong(key, "an object")),
    };
    let (parameters, scaling) = (nested("rope_parameters")?, nested("rope_scaling")?);
    let outer = read.number("rope_theta", 1.0, 1e12)?;
    let Some(map) = parameters.or(scaling) else {
        return Ok(Rope { theta: outer.unwrap_or(10_000.0), scaling: RopeScaling::None });
    };
    let inner = Reader { map, file: CONFIG };
    let theta = inner.number("rope_theta", 1.0, 1e12)?.or(outer).unwrap_or(10_000.0);
    let kind = match inner.text("rope_type")? {
        Some(kind) => kind,
        None => inner.text("type")?.unwrap_or("default"),
    };
    inner.only("partial_rotary_factor", 1.0)?;
    inner.only("attention_factor", 1.0)?;
    let need = |key: &str, min: f64, max: f64| {
        inner.number(key, min, max)?.ok_or_else(|| Error::corrupt(CONFIG, format!("rope `{key}` is missing")))
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear(need("factor", 1.0, 1e6)?),
        "llama3" => {
            let (low, high) = (need("low_freq_factor", 1e-3, 1e6)?, need("high_freq_factor", 1e-3, 1e6)?);
            if low >= high {
                return Err(Error::corrupt(CONFIG, "rope `low_freq_factor` is not below `high_freq_factor`"));
            }
            let original = need("original_max_position_embeddings", 1.0, 1e8)?;
            RopeScaling::Llama3 { factor: need("factor", 1.0, 1e6)?, low, high, original }
        }
        other => {
            let shown: String = other.chars().take(64).collect();
            return Err(Error::unsupported(CONFIG, format!("rope type `{}`", shown.escape_debug())));
        }
    };
    Ok(Rope { theta, scaling })
}

impl Rope {
    /// Inverse frequencies of the `head_dim / 2` pairs, as transformers computes them.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let base = (0..head_dim / 2).map(|i| self.theta.powf(-(2.0 * i as f64) / head_dim as f64));
        base.map(|frequency| match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear(factor) => frequency / factor,
            RopeScaling::Llama3 { factor, low, high, original } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        })
        .collect()
    }
}

/// Defaults from `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Top-p.
    pub top_p: Option<f32>,
    /// Top-k.
    pub top_k: Option<u32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

impl GenerationDefaults {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a value is outside its range.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let map = object(GENERATION, bytes)?;
        let read = Reader { map: &map, file: GENERATION };
        let greedy = read.get("do_sample") == Some(&Value::Bool(false));
        Ok(Self {
            temperature: if greedy { Some(0.0) } else { read.number("temperature", 0.0, 100.0)?.map(|t| t as f32) },
            top_p: read.number("top_p", 0.0, 1.0)?.filter(|p| *p > 0.0).map(|p| p as f32),
            // Zero switches it off.
            top_k: read.number("top_k", 0.0, f64::from(1 << 24))?.map(|k| k as u32).filter(|k| *k > 0),
            repetition_penalty: read.number("repetition_penalty", 0.01, 10.0)?.map(|p| p as f32),
            eos: read.ids("eos_token_id")?,
        })
    }
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
        assert_eq!(old.rope.theta, 500_000.0);
        assert_eq!(parse("").unwrap().rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
        assert_eq!(parse("").unwrap().eos, [0, 2]);
    }

    #[test]
    fn sampling_defaults_are_read_or_refused() {
        let read = |text: &str| GenerationDefaults::parse(text.as_bytes());
        let all = read(r#"{"temperature":0.6,"top_p":0.9,"top_k":50,"repetition_penalty":1.1,"eos_token_id":[7,8]}"#);
        let want = GenerationDefaults {
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: Some(50),
            repetition_penalty: Some(1.1),
            eos: vec![7, 8],
        };
        assert_eq!(all.unwrap(), want);
        assert_eq!(read(r#"{"do_sample":false,"temperature":0.6}"#).unwrap().temperature, Some(0.0));
        assert_eq!(read(r#"{"top_k":0}"#).unwrap(), GenerationDefaults::default());
        for wrong in
            [r#"{"top_k":"x"}"#, r#"{"top_p":2}"#, r#"{"temperature":-1}"#, r#"{"eos_token_id":-1}"#, "[]", "{"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (rest, want) in [
            (r#","rope_scaling":{"type":"dynamic","factor":2.0}"#, "rope type `dynamic`"),
            (r#","rope_scaling":{"type":3,"factor":2.0}"#, "`type` must be a text"),
            (r#","rope_scaling":{"type":"linear"}"#, "`factor` is missing"),
            (r#","rope_scaling":{"type":"linear","factor":2.0,"partial_rotary_factor":0.5}"#, "partial_rotary_factor"),
            (r#","rope_parameters":[]"#, "an object"),
            (r#","partial_rotary_factor":0.25"#, "partial_rotary_factor"),
            (r#","rope_theta":0"#, "rope_theta"),
            (r#","hidden_act":3"#, "hidden_act"),
            (r#","vocab_size":2"#, "`eos_token_id` 2 is outside"),
            (r#","hidden_act":"gelu""#, "hidden_act"),
            (r#","quantization_config":{}"#, "quantization_config"),
            (r#","num_key_value_heads":3"#, "multiple"),
            (r#","head_dim":7"#, "odd"),
            (r#","rms_norm_eps":"x""#, "rms_norm_eps"),
            (r#","max_position_embeddings":99999999999"#, "max_position_embeddings"),
        ] {
            let error = parse(rest).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(matches!(ModelConfig::parse(br#"{"model_type":"gpt"}"#), Err(Error::Unsupported { .. })));
    }
}
