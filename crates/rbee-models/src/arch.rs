//! Architectures as data: which tensors of the files make up which part of the decoder.
//!
//! A plan names every tensor that a model uses, so files are checked against it before any weight is read: a tensor that
//! is missing, of another shape, or there without a use means that the config and the weights are not of one model.

mod llama;

use rbee_weights::config::ModelConfig;

/// A matrix, stored as one tensor or as several below each other.
pub(crate) struct Matrix {
    /// Name and outputs of each tensor.
    pub(crate) parts: Vec<(String, usize)>,
    /// Inputs.
    pub(crate) inputs: usize,
    /// Whether each has a bias beside it.
    pub(crate) biased: bool,
}

impl Matrix {
    /// Outputs of all parts.
    pub(crate) fn outputs(&self) -> usize {
        self.parts.iter().map(|(_, outputs)| outputs).sum()
    }

    /// Name and length of each part's bias.
    pub(crate) fn biases(&self) -> impl Iterator<Item = (String, usize)> {
        let parts = self.parts.iter().filter(|_| self.biased);
        parts.map(|(name, outputs)| (format!("{}.bias", name.trim_end_matches(".weight")), *outputs))
    }
}

/// A decoder's tensors.
pub(crate) struct Plan {
    pub(crate) embedding: Matrix,
    pub(crate) layers: Vec<LayerPlan>,
    pub(crate) norm: String,
    /// `None` when it is the embedding.
    pub(crate) head: Option<Matrix>,
}

/// One layer's tensors.
pub(crate) struct LayerPlan {
    pub(crate) attention_norm: String,
    pub(crate) qkv: Matrix,
    pub(crate) output: Matrix,
    pub(crate) mlp_norm: String,
    pub(crate) gate_up: Matrix,
    pub(crate) down: Matrix,
}

impl Plan {
    /// The plan of a config's architecture.
    pub(crate) fn of(config: &ModelConfig) -> Self {
        // `ModelConfig` holds no other yet.
        llama::plan(config)
    }

    /// All matrices.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        layers.chain([&self.embedding]).chain(&self.head)
    }

    /// Names of all norms.
    fn norms(&self) -> impl Iterator<Item = &String> {
        self.layers.iter().flat_map(|layer| [&layer.attention_norm, &layer.mlp_norm]).chain([&self.norm])
    }

    /// Name and shape of every tensor.
    pub(crate) fn tensors(&self, config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        let mut all: Vec<_> = self.norms().map(|name| (name.clone(), vec![config.hidden])).collect();
        for matrix in self.matrices() {
            all.extend(matrix.parts.iter().map(|(name, outputs)| (name.clone(), vec![*outputs, matrix.inputs])));
            all.extend(matrix.biases().map(|(name, len)| (name, vec![len])));
        }
        all
    }
}

/// Whether a tensor that no plan names may be left unread.
pub(crate) fn is_spare(config: &ModelConfig, name: &str) -> bool {
    llama::is_spare(config, name)
}
