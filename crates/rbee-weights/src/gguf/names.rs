//! Where the tensors that a decoder's plan names lie in a GGUF, and what its writers did to them.
//!
//! Facts of the format, as llama.cpp's converter writes it and llama.cpp reads it:
//! - Names are `blk.N.PART`, and which norm a part is depends on the architecture.
//! - A layer's experts are one tensor `[experts, outputs, inputs]`; in old files of Mixtral each has a tensor of its own.
//! - Rotary pairs of llama, Mistral, Mixtral, SmolLM3 and Granite are neighbours (2i, 2i + 1), where transformers has
//!   halves (i, i + dims / 2): rows of q and k, and their biases, stand in another order within each head. All other
//!   architectures keep the order of transformers.
//! - Gemma's norms hold one plus what transformers stores.
//! - Phi-3's `ffn_up` is gate and up below each other, as in transformers, and its `attn_qkv` is q, k and v.

use super::Gguf;
use crate::Error;
use crate::config::ModelConfig;

/// A model's architecture, by `general.architecture`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama, Mistral and Mixtral.
    Llama,
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
    /// Gemma 3.
    Gemma3,
    /// SmolLM3.
    SmolLm3,
    /// OLMo 2.
    Olmo2,
    /// Granite.
    Granite,
}

/// Where a tensor of a plan lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The tensor's name in the file.
    pub name: String,
    /// Which expert's part of it, along its outermost dimension; the whole when `None`.
    pub expert: Option<usize>,
}

impl Source {
    /// Where an expert's part lies in old files, which have a tensor for each expert; `None` for what is no expert's.
    pub fn alone(&self) -> Option<Self> {
        let (part, kind) = self.name.split_once("_exps.")?;
        Some(Self { name: format!("{part}.{}.{kind}", self.expert?), expert: None })
    }
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Llama,
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

    /// Its name, which its metadata keys begin with.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Phi3 => "phi3",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::SmolLm3 => "smollm3",
            Self::Olmo2 => "olmo2",
            Self::Granite => "granite",
        }
    }

    /// The architecture that a file names.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it names none, [`Error::Unsupported`] for one that is not listed here.
    pub fn of(gguf: &Gguf<'_>) -> Result<Self, Error> {
        const KEY: &str = "general.architecture";
        let named = gguf.str(KEY)?.ok_or_else(|| Error::corrupt(gguf.file(), format!("`{KEY}` is missing")))?;
        Self::ALL.into_iter().find(|one| one.name() == named).ok_or_else(|| {
            let shown: String = named.chars().take(64).collect();
            let all: Vec<&str> = Self::ALL.into_iter().map(Self::name).collect();
            let problem = format!("architecture `{}` is not one of {}", shown.escape_debug(), all.join(", "));
            Error::unsupported(gguf.file(), problem)
        })
    }

    /// Where the tensor of this name of a plan lies; `None` for a name that no plan of this architecture has.
    pub fn source(self, name: &str) -> Option<Source> {
        let whole = |name: String| Some(Source { name, expert: None });
        match name {
            "model.embed_tokens.weight" => return whole("token_embd.weight".into()),
            "model.norm.weight" => return whole("output_norm.weight".into()),
            "lm_head.weight" => return whole("output.weight".into()),
            _ => {}
        }
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: usize = number(layer)?;
        let (part, kind) = part.rsplit_once('.')?;
        if !matches!(kind, "weight" | "bias") {
            return None;
        }
        let (block, part) = part.split_once('.').unwrap_or(("", part));
        if matches!(block, "mlp" | "block_sparse_moe")
            && let Some(expert) = part.strip_prefix("experts.")
        {
            let (expert, part) = expert.split_once('.')?;
            let part = match part {
                "gate_proj" | "w1" => "ffn_gate_exps",
                "up_proj" | "w3" => "ffn_up_exps",
                "down_proj" | "w2" => "ffn_down_exps",
                _ => return None,
            };
            return Some(Source { name: format!("blk.{layer}.{part}.{kind}"), expert: Some(number(expert)?) });
        }
        let part = match (block, part) {
            ("", norm) => self.norm(norm)?,
            ("self_attn", "q_proj") => "attn_q",
            ("self_attn", "k_proj") => "attn_k",
            ("self_attn", "v_proj") => "attn_v",
            ("self_attn", "qkv_proj") => "attn_qkv",
            ("self_attn", "o_proj") => "attn_output",
            ("self_attn", "q_norm") => "attn_q_norm",
            ("self_attn", "k_norm") => "attn_k_norm",
            ("mlp", "gate_proj") => "ffn_gate",
            ("mlp", "up_proj" | "gate_up_proj") => "ffn_up",
            ("mlp", "down_proj") => "ffn_down",
            ("mlp" | "block_sparse_moe", "gate") => "ffn_gate_inp",
            _ => return None,
        };
        whole(format!("blk.{layer}.{part}.{kind}"))
    }

    /// The name of a layer's norm around attention and MLP.
    fn norm(self, norm: &str) -> Option<&'static str> {
        let after = matches!(self, Self::Gemma2 | Self::Gemma3 | Self::Olmo2);
        Some(match norm {
            "input_layernorm" => "attn_norm",
            // Llama and its like call the norm before the MLP so.
            "post_attention_layernorm" if !after => "ffn_norm",
            "post_attention_layernorm" => "post_attention_norm",
            "pre_feedforward_layernorm" => "ffn_norm",
            "post_feedforward_layernorm" => "post_ffw_norm",
            _ => return None,
        })
    }

    /// The heads of a tensor whose rows are in the order of neighbouring rotary pairs; `None` for one that is in the
    /// order of transformers.
    ///
    /// Within each head of `n` rows, row `2i` of the file is row `i` of transformers, and row `2i + 1` is row
    /// `i + n / 2`.
    /// Rows are whole, so that blocks stay as they are when rows are put back.
    pub fn permuted_heads(self, config: &ModelConfig, name: &str) -> Option<usize> {
        if !matches!(self, Self::Llama | Self::SmolLm3 | Self::Granite) {
            return None;
        }
        let (_, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        match part {
            "self_attn.q_proj.weight" | "self_attn.q_proj.bias" => Some(config.heads),
            "self_attn.k_proj.weight" | "self_attn.k_proj.bias" => Some(config.kv_heads),
            _ => None,
        }
    }

    /// Whether norms hold the one that [`crate::config::Norms::plus_one`] asks for: it is not to be added again.
    pub fn norms_hold_one(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    /// Whether a tensor that no plan names may be left unread: what [`super::config::config_json`] has read, and rope
    /// frequencies that old exports have.
    pub fn is_spare(name: &str) -> bool {
        matches!(name, "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight")
            || name.ends_with(".attn_rot_embd")
            // Some writers keep a copy in each layer.
            || (name.starts_with("blk.") && name.ends_with(".rope_freqs.weight"))
    }
}

/// A number as names have it.
fn number(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number: &usize| number.to_string() == text)
}
