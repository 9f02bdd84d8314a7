//! The model families: what each reads from its config, and its defaults where a key is missing (transformers 5.23).

use super::encoder::EncoderFamily;
use super::reader::Reader;
use super::rope::{Around, Rope, rope};
use super::{
    Activation, Biases, CONFIG, LayerConfig, Mlp, NormPlace, Norms, QkNorm, Scales, layer_kinds, single_rope,
    two_spellings,
};
use crate::Error;

/// Most experts of a layer.
const MAX_EXPERTS: usize = 1 << 10;

/// Most experts of all layers together: four times what the largest open models have.
const MAX_ALL_EXPERTS: usize = 1 << 16;

/// A model family, by `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 2, 3 and 3.x.
    Llama,
    /// Mistral.
    Mistral,
    /// Mixtral.
    Mixtral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
    /// Qwen3 with experts.
    Qwen3Moe,
    /// Phi-3, Phi-3.5 and Phi-4.
    Phi3,
    /// Gemma 2.
    Gemma2,
    /// Gemma 3, text only.
    Gemma3,
    /// SmolLM3.
    SmolLm3,
    /// OLMo 2.
    Olmo2,
    /// Granite.
    Granite,
}

/// What a family's missing keys mean.
pub(super) struct Defaults {
    pub(super) norm_eps: f64,
    pub(super) tied: bool,
    pub(super) head_dim: Option<usize>,
    /// Whether there may be no number of KV heads: then each query head has its own.
    pub(super) kv_heads_may_be_missing: bool,
    theta: f64,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Llama,
        Self::Mistral,
        Self::Mixtral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen3Moe,
        Self::Phi3,
        Self::Gemma2,
        Self::Gemma3,
        Self::SmolLm3,
        Self::Olmo2,
        Self::Granite,
    ];

    /// Its `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Mixtral => "mixtral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Phi3 => "phi3",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
            Self::SmolLm3 => "smollm3",
            Self::Olmo2 => "olmo2",
            Self::Granite => "granite",
        }
    }

    pub(super) fn read(read: &Reader<'_>) -> Result<Self, Error> {
        let kind = read.text("model_type")?.unwrap_or_default();
        Self::ALL.into_iter().find(|family| family.model_type() == kind).ok_or_else(|| {
            let shown: String = kind.chars().take(64).collect();
            let all: Vec<&str> = Self::ALL.into_iter().map(Self::model_type).collect();
            Error::unsupported(
                CONFIG,
                format!(
                    "model_type `{}` is not one of {}, or for embeddings {}",
                    shown.escape_debug(),
                    all.join(", "),
                    EncoderFamily::ALL.map(EncoderFamily::model_type).join(", ")
                ),
            )
        })
    }

    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    pub(super) fn defaults(self) -> Defaults {
        Defaults {
            norm_eps: match self {
                Self::Mixtral | Self::Phi3 | Self::Olmo2 => 1e-5,
                _ => 1e-6,
            },
            tied: self.is_gemma() || self == Self::SmolLm3,
            head_dim: match self {
                Self::Gemma2 | Self::Gemma3 => Some(256),
                Self::Qwen3 => Some(128),
                _ => None,
            },
            kv_heads_may_be_missing: matches!(self, Self::Llama | Self::Phi3 | Self::Olmo2 | Self::Granite),
            theta: match self {
                Self::Mixtral | Self::Gemma3 => 1e6,
                Self::SmolLm3 => 2e6,
                _ => 1e4,
            },
        }
    }

    /// The norms, but for their epsilon.
    pub(super) fn norms(self) -> Norms {
        Norms {
            eps: 0.0,
            plus_one: self.is_gemma(),
            place: match self {
                Self::Gemma2 | Self::Gemma3 => NormPlace::Around,
                Self::Olmo2 => NormPlace::After,
                _ => NormPlace::Before,
            },
            qk: match self {
                Self::Qwen3 | Self::Qwen3Moe | Self::Gemma3 => QkNorm::Head,
                Self::Olmo2 => QkNorm::Whole,
                _ => QkNorm::None,
            },
        }
    }

    pub(super) fn activation(self, read: &Reader<'_>) -> Result<Activation, Error> {
        // The Gemmas' `hidden_act` is an old mistake that nobody reads.
        let (key, default) = if self.is_gemma() {
            ("hidden_activation", Activation::GeluTanh)
        } else {
            ("hidden_act", Activation::Silu)
        };
        match read.text(key)? {
            None => Ok(default),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some(other) => {
                let shown: String = other.chars().take(64).collect();
                Err(Error::unsupported(CONFIG, format!("{key} `{}`", shown.escape_debug())))
            }
        }
    }

    pub(super) fn biases(self, read: &Reader<'_>) -> Result<Biases, Error> {
        let none = Biases { qkv: false, output: false, mlp: false };
        match self {
            Self::Mistral | Self::Mixtral => Ok(none),
            // The key is in their files and is not read by the reference.
            Self::Phi3 => read.off("attention_bias").map(|()| none),
            Self::Qwen2 => Ok(Biases { qkv: true, ..none }),
            _ => {
                let attention = read.flag("attention_bias", false)?;
                let mlp =
                    matches!(self, Self::Llama | Self::Granite | Self::SmolLm3) && read.flag("mlp_bias", false)?;
                Ok(Biases { qkv: attention, output: attention, mlp })
            }
        }
    }

    pub(super) fn scales(self, read: &Reader<'_>, hidden: usize, head_dim: usize) -> Result<Scales, Error> {
        let usual = Scales { attention: 1.0 / (head_dim as f32).sqrt(), embedding: 1.0, residual: 1.0, logits: 1.0 };
        match self {
            Self::Gemma2 | Self::Gemma3 => {
                let scalar = read.number("query_pre_attn_scalar", 1e-6, 1e6)?.unwrap_or(256.0);
                Ok(Scales { attention: scalar.powf(-0.5) as f32, embedding: (hidden as f64).sqrt() as f32, ..usual })
            }
            Self::Granite => {
                let number = |key| read.number(key, -1e6, 1e6).map(|number| number.unwrap_or(1.0) as f32);
                let logits = read.number("logits_scaling", 1e-6, 1e6)?.unwrap_or(1.0);
                Ok(Scales {
                    attention: number("attention_multiplier")?,
                    embedding: number("embedding_multiplier")?,
                    residual: number("residual_multiplier")?,
                    logits: (1.0 / logits) as f32,
                })
            }
            _ => Ok(usual),
        }
    }

    /// A soft cap; `default` is Gemma 2's where the key is missing.
    pub(super) fn cap(self, read: &Reader<'_>, key: &'static str, default: f32) -> Result<Option<f32>, Error> {
        let cap = read.number(key, 1e-3, 1e6)?.map(|cap| cap as f32);
        match self {
            Self::Gemma2 if !read.has(key) => Ok(Some(default)),
            Self::Gemma2 | Self::Gemma3 => Ok(cap),
            _ if cap.is_some() => Err(Error::unsupported(CONFIG, format!("`{key}` in this architecture"))),
            _ => Ok(None),
        }
    }

    /// The ropes; of Gemma 3, that of full attention and that of the windows.
    pub(super) fn ropes(self, read: &Reader<'_>, head_dim: usize, max_positions: usize) -> Result<Vec<Rope>, Error> {
        let around = Around { head_dim, max_positions, theta: self.defaults().theta, old_names: self == Self::Phi3 };
        if self != Self::Gemma3 {
            return single_rope(read, &around);
        }
        let (full, local) = match (read.inner("rope_parameters")?, read.inner("rope_scaling")?) {
            (Some(_), Some(_)) => return Err(two_spellings()),
            (Some(both), None) => (both.inner("full_attention")?, both.inner("sliding_attention")?),
            (None, old) => (old, None),
        };
        let local_theta = read.number("rope_local_base_freq", 1.0, 1e12)?.unwrap_or(1e4);
        let empty = serde_json::Map::new();
        let nothing = Reader::new(&empty, CONFIG);
        Ok(vec![
            rope(read, full.as_ref(), &around)?,
            rope(&nothing, local.as_ref(), &Around { theta: local_theta, ..around })?,
        ])
    }

    pub(super) fn layers(self, read: &Reader<'_>, count: usize) -> Result<Vec<LayerConfig>, Error> {
        let window = self.window(read)?;
        let without_rope = self.without_rope(read, count)?;
        let own_kinds = |i: usize| match self {
            Self::Gemma2 => i.is_multiple_of(2),
            Self::Gemma3 => true,
            Self::SmolLm3 => without_rope[i],
            _ => true,
        };
        let mut kinds: Vec<bool> = (0..count).map(|i| window.is_some() && own_kinds(i)).collect();
        if self == Self::Gemma3 {
            let own = read.size("sliding_window_pattern", 1 << 10)?;
            let pattern = own.map_or_else(|| read.size("_sliding_window_pattern", 1 << 10), |own| Ok(Some(own)))?;
            kinds = (1..=count).map(|i| i % pattern.unwrap_or(6) != 0).collect();
        }
        if matches!(self, Self::Qwen2 | Self::Qwen3) {
            let full = read.number("max_window_layers", 0.0, 1e6)?.unwrap_or(28.0) as usize;
            kinds = (0..count).map(|i| window.is_some() && i >= full).collect();
        }
        if let Some(named) = layer_kinds(read, count)? {
            let chooses = matches!(self, Self::Qwen2 | Self::Qwen3 | Self::Gemma2 | Self::Gemma3 | Self::SmolLm3);
            if !chooses && named != kinds {
                return Err(Error::unsupported(CONFIG, "`layer_types` that this architecture does not have"));
            }
            kinds = named;
        }
        if kinds.contains(&true) && window.is_none() {
            return Err(Error::corrupt(CONFIG, "layers have a window whose size is not given"));
        }
        let mlps = self.mlps(read, count)?;
        Ok((0..count)
            .map(|i| LayerConfig {
                window: window.filter(|_| kinds[i]),
                rope: (!without_rope[i]).then_some(usize::from(self == Self::Gemma3 && kinds[i])),
                mlp: mlps[i],
            })
            .collect())
    }

    /// The size of the window that some layers have.
    fn window(self, read: &Reader<'_>) -> Result<Option<usize>, Error> {
        let size = read.size("sliding_window", 1 << 24)?;
        match self {
            Self::Mistral | Self::Gemma2 | Self::Gemma3 if !read.has("sliding_window") => Ok(Some(4096)),
            Self::Mistral | Self::Mixtral | Self::Phi3 | Self::Gemma2 | Self::Gemma3 => Ok(size),
            Self::Qwen2 | Self::Qwen3 | Self::Qwen3Moe | Self::SmolLm3 => {
                let used = read.flag("use_sliding_window", false)?;
                if used && self != Self::SmolLm3 && !read.has("sliding_window") {
                    return Ok(Some(4096));
                }
                // SmolLM3's layers may be named windows without the switch.
                let kept = used || (self == Self::SmolLm3 && read.get("layer_types").is_some());
                Ok(size.filter(|_| kept))
            }
            Self::Llama | Self::Olmo2 | Self::Granite => Ok(None),
        }
    }

    /// Which layers do not rotate.
    fn without_rope(self, read: &Reader<'_>, count: usize) -> Result<Vec<bool>, Error> {
        if self != Self::SmolLm3 {
            return Ok(vec![false; count]);
        }
        let interval = read.size("no_rope_layer_interval", 1 << 10)?.unwrap_or(4);
        match read.numbers("no_rope_layers", 0.0, 1.0, 1 << 10)? {
            None => Ok((1..=count).map(|i| i % interval == 0).collect()),
            // One says that the layer rotates.
            Some(rotates) if rotates.len() >= count => Ok(rotates[..count].iter().map(|one| *one == 0.0).collect()),
            Some(_) => Err(Error::corrupt(CONFIG, "`no_rope_layers` names too few layers")),
        }
    }

    fn mlps(self, read: &Reader<'_>, count: usize) -> Result<Vec<Mlp>, Error> {
        let width = read.need("intermediate_size", 1 << 20)?;
        if !matches!(self, Self::Mixtral | Self::Qwen3Moe) {
            return Ok(vec![Mlp::Gated(width); count]);
        }
        let experts = match read.size("num_local_experts", MAX_EXPERTS)? {
            Some(experts) => experts,
            None => read.need("num_experts", MAX_EXPERTS)?,
        };
        let picked = read.need("num_experts_per_tok", MAX_EXPERTS)?;
        if experts * count > MAX_ALL_EXPERTS {
            return Err(Error::unsupported(CONFIG, format!("{experts} experts in each of {count} layers")));
        }
        if picked > experts {
            return Err(Error::corrupt(CONFIG, format!("{picked} of {experts} experts cannot be picked")));
        }
        if self == Self::Mixtral {
            return Ok(vec![Mlp::Experts { count: experts, picked, width, normalised: true }; count]);
        }
        let own = read.need("moe_intermediate_size", 1 << 20)?;
        let normalised = read.flag("norm_topk_prob", false)?;
        let step = read.size("decoder_sparse_step", 1 << 10)?.unwrap_or(1);
        let plain = read.numbers("mlp_only_layers", 0.0, 1e6, 1 << 10)?.unwrap_or_default();
        Ok((0..count)
            .map(|i| {
                if plain.contains(&(i as f64)) || !(i + 1).is_multiple_of(step) {
                    Mlp::Gated(width)
                } else {
                    Mlp::Experts { count: experts, picked, width: own, normalised }
                }
            })
            .collect())
    }
}
