//! Bytes that a model needs, from its own header and config.

use crate::config::ModelConfig;
use crate::config::encoder::EncoderConfig;

/// What a load needs on its device, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Weights.
    pub weights: u64,
    /// KV of one token.
    pub kv_per_token: u64,
    /// KV in all.
    pub kv: u64,
    /// Working memory of a step, and the process itself.
    pub scratch: u64,
    /// All of it.
    pub total: u64,
    /// All of it with KV for one sequence of the whole context: with less the model cannot be used as asked.
    pub least: u64,
    /// Most tokens of one sequence.
    pub context: u64,
}

/// Positions that KV is reserved for: whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// For one sequence of the whole context.
    pub one: u64,
    /// In all.
    pub all: u64,
}

/// Bytes of the process without a model: code, server, threads.
const PROCESS: u64 = 24 << 20;

/// What a model of this config needs with weights of `weights` bytes, KV of `kv_per_token` bytes, room for `positions`
/// and steps of `step_tokens` tokens.
pub fn needs(
    config: &ModelConfig,
    weights: u64,
    kv_per_token: u64,
    context: u64,
    positions: Positions,
    step_tokens: u64,
) -> Needs {
    let widest = config.hidden * 3 + config.widest_mlp() + (config.heads * 2 + config.kv_heads * 2) * config.head_dim;
    let tables: usize = config.ropes.iter().map(|rope| rope.dims * if rope.original().is_some() { 2 } else { 1 }).sum();
    let rope = (tables as u64 * 4).saturating_mul(context);
    let rows = step_tokens.saturating_mul(4 * widest as u64);
    let logits = step_tokens.min(64) * 4 * config.vocab as u64;
    // A hostile config can ask for more than there are numbers for; it is refused for its size then.
    let scratch = [rope, rows, logits].into_iter().fold(PROCESS, u64::saturating_add);
    Needs::of(weights, kv_per_token, context, positions, scratch)
}

/// What an encoder needs with weights of `weights` bytes, texts of up to `context` tokens, and steps of `step_tokens` tokens or one such
/// text. It has no KV.
pub fn encoder_needs(config: &EncoderConfig, weights: u64, context: u64, step_tokens: u64) -> Needs {
    let EncoderConfig { hidden, width, .. } = *config;
    let rows = step_tokens.max(context).saturating_mul(4 * (8 * hidden + width) as u64);
    // Keys and values of a head of a text on each thread: of a whole text, with as many threads as heads.
    let heads = context.saturating_mul(8 * hidden as u64);
    let scratch = PROCESS.saturating_add(rows).saturating_add(heads);
    Needs::of(weights, 0, context, Positions { one: 0, all: 0 }, scratch)
}

impl Needs {
    /// The sum of weights, KV of `kv_per_token` bytes for so many positions, and scratch.
    pub fn of(weights: u64, kv_per_token: u64, context: u64, positions: Positions, scratch: u64) -> Self {
        let kv = kv_per_token.saturating_mul(positions.all);
        let with = |kv: u64| weights.saturating_add(kv).saturating_add(scratch);
        let least = with(kv_per_token.saturating_mul(positions.one).min(kv));
        Self { weights, kv_per_token, kv, scratch, total: with(kv), least, context }
    }
}
