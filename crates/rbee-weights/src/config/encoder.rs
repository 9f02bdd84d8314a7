//! `config.json` of BERT-like encoders (Devlin et al. 2018; Liu et al. 2019; Conneau et al. 2019), with transformers' defaults where a
//! key is missing. One architecture: the families differ in the names before their tensors and in where positions begin.

use super::reader::{Reader, object};
use super::{CONFIG, HARMLESS, shown};
use crate::Error;

/// Keys that change no result here, beside those of [`HARMLESS`].
const OF_TRAINING: &[&str] = &[
    "attention_probs_dropout_prob",
    "bos_token_id",
    "classifier_dropout",
    "directionality",
    "eos_token_id",
    "export_model_type",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
];

/// An encoder family, by `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EncoderFamily {
    /// BERT: MiniLM, BGE, E5, GTE and their like.
    Bert,
    /// RoBERTa.
    Roberta,
    /// XLM-RoBERTa: multilingual E5, BGE-M3 and their like.
    XlmRoberta,
}

impl EncoderFamily {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bert, Self::Roberta, Self::XlmRoberta];

    /// Its `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::XlmRoberta => "xlm-roberta",
        }
    }

    /// The family of a `config.json`; `None` when it is of another architecture, or of none.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let map = object(CONFIG, bytes).ok()?;
        let kind = map.get("model_type")?.as_str()?;
        Self::ALL.into_iter().find(|family| family.model_type() == kind)
    }

    /// What stands before its tensors' names in checkpoints that have a head.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Bert => "bert.",
            Self::Roberta | Self::XlmRoberta => "roberta.",
        }
    }
}

/// What the values of an encoder's MLP go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncoderActivation {
    /// GELU by the normal distribution.
    GeluErf,
    /// GELU by its approximation with tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// An encoder's sizes and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// Whose names the tensors have.
    pub family: EncoderFamily,
    /// Vocabulary: rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the MLP.
    pub width: usize,
    /// What the MLP's values go through.
    pub activation: EncoderActivation,
    /// Rows of the position embedding.
    pub positions: usize,
    /// The row of a text's first token.
    pub first_position: usize,
    /// Rows of the embedding of token types.
    pub token_types: usize,
    /// Added to the variance in norms.
    pub eps: f32,
    /// Keys that nothing here knows.
    pub unknown: Vec<String>,
}

impl EncoderConfig {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for what contradicts itself, [`Error::Unsupported`] for what this build does not do.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let map = object(CONFIG, bytes)?;
        let read = Reader::new(&map, CONFIG);
        let kind = read.text("model_type")?.unwrap_or_default();
        let family = EncoderFamily::ALL.into_iter().find(|family| family.model_type() == kind);
        let family = family.ok_or_else(|| {
            Error::unsupported(CONFIG, format!("model_type `{}` is not an encoder's of this build", shown(kind)))
        })?;
        if read.get("quantization_config").is_some() {
            return Err(Error::unsupported(
                CONFIG,
                "`quantization_config`: only plain f32, f16 and bf16 weights are read",
            ));
        }
        read.off("is_decoder")?;
        read.off("add_cross_attention")?;
        if let Some(kind) = read.text("position_embedding_type")?.filter(|kind| *kind != "absolute") {
            let problem = format!("`position_embedding_type` `{}`: only absolute positions are read", shown(kind));
            return Err(Error::unsupported(CONFIG, problem));
        }
        let activation = match read.text("hidden_act")?.unwrap_or("gelu") {
            "gelu" => EncoderActivation::GeluErf,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => EncoderActivation::GeluTanh,
            "relu" => EncoderActivation::Relu,
            other => return Err(Error::unsupported(CONFIG, format!("`hidden_act` `{}`", shown(other)))),
        };
        let hidden = read.need("hidden_size", 1 << 17)?;
        let heads = read.need("num_attention_heads", 1 << 12)?;
        if hidden % heads != 0 {
            return Err(Error::corrupt(CONFIG, "hidden_size is no multiple of num_attention_heads"));
        }
        let positions = read.need("max_position_embeddings", 1 << 24)?;
        let padding = read.number("pad_token_id", 0.0, 1e9)?;
        // RoBERTa counts positions from behind the padding token's id.
        let first_position = match family {
            EncoderFamily::Bert => 0,
            EncoderFamily::Roberta | EncoderFamily::XlmRoberta => padding.unwrap_or(1.0) as usize + 1,
        };
        if first_position >= positions {
            return Err(Error::corrupt(CONFIG, format!("{positions} positions leave none behind `pad_token_id`")));
        }
        let config = Self {
            family,
            vocab: read.need("vocab_size", 1 << 22)?,
            hidden,
            layers: read.need("num_hidden_layers", 1 << 10)?,
            heads,
            width: read.need("intermediate_size", 1 << 20)?,
            activation,
            positions,
            first_position,
            token_types: read.size("type_vocab_size", 1 << 10)?.unwrap_or(2),
            eps: read.number("layer_norm_eps", 0.0, 1.0)?.unwrap_or(1e-12) as f32,
            unknown: Vec::new(),
        };
        let known = |key: &String| HARMLESS.contains(&key.as_str()) || OF_TRAINING.contains(&key.as_str());
        let unknown = read.unread().filter(|key| !known(key)).take(32).map(|key| shown(key)).collect();
        Ok(Self { unknown, ..config })
    }

    /// Most tokens of a text.
    pub fn longest(&self) -> usize {
        self.positions - self.first_position
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}
