//! What is known of a loaded model besides what it computes.

use rbee_engine::runner::{ModelLimits, Regime, RunnerError, StepBatch, Wanted};
use rbee_weights::config::{GenerationDefaults, ModelConfig};
use rbee_weights::needs::Needs;
use sha2::{Digest, Sha256};

/// Facts of a loaded model.
#[derive(Clone, Debug)]
pub struct About {
    /// Sampling defaults of the model's own files.
    pub generation: GenerationDefaults,
    /// Keys of the config that nothing here knows.
    pub unknown_keys: Vec<String>,
    /// Tokens that end a text: those of `generation_config.json`, else of `config.json`.
    pub eos: Vec<u32>,
    /// Bytes by the estimate.
    pub needs: Needs,
    /// Digest of the weights.
    pub digest: String,
    /// Two runners of the same id give the same logits bit for bit.
    pub numerics_id: String,
}

impl About {
    /// Of a config and what was found out beside it. `numerics` names everything that the bits of a logit hang on, besides
    /// the weights and the config: the same weights under another rope are another model.
    pub(crate) fn new(
        config: &ModelConfig,
        generation: GenerationDefaults,
        needs: Needs,
        digest: String,
        numerics: &str,
    ) -> Self {
        let numerics_id = numerics_id(&format!("{numerics} {digest} {config:?}"));
        let eos = if generation.eos.is_empty() { &config.eos } else { &generation.eos }.clone();
        Self { generation, unknown_keys: config.unknown.clone(), eos, needs, digest, numerics_id }
    }
}

/// The id of all that the bits of a result hang on.
pub(crate) fn numerics_id(facts: &str) -> String {
    let facts = format!("{} {facts}", env!("CARGO_PKG_VERSION"));
    Sha256::digest(facts).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The regime of a text whose prompt has so many tokens.
pub(crate) fn regime(config: &ModelConfig, prompt: usize) -> Regime {
    match config.regime_length() {
        Some(length) if prompt > length => Regime::Long,
        _ => Regime::Usual,
    }
}

/// Refuses a batch that would read or write outside what there is: the engine never makes one.
pub(crate) fn check(limits: &ModelLimits, batch: &StepBatch<'_>) -> Result<(), RunnerError> {
    let ModelLimits { vocab, context, block_size, kv_blocks, .. } = *limits;
    for chunk in &batch.chunks {
        let end = chunk.start.saturating_add(chunk.tokens.len());
        let sound = !chunk.tokens.is_empty()
            && chunk.wanted != Wanted::Embedding
            && end <= context
            && chunk.blocks.len() * block_size >= end
            && chunk.blocks.iter().all(|block| (block.0 as usize) < kv_blocks)
            && chunk.tokens.iter().all(|&token| (token as usize) < vocab);
        if !sound {
            return Err(RunnerError::Forward(format!("a chunk at {}..{end} is not sound", chunk.start)));
        }
    }
    Ok(())
}
