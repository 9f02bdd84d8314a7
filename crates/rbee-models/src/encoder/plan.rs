//! The tensors of an encoder and what its folder declares, read and checked.
//!
//! Names are those of transformers, behind `bert.` or `roberta.` where the checkpoint has a head. Shapes are `[outputs, inputs]`:
//! `embeddings.word_embeddings` `[vocab, hidden]`, `embeddings.position_embeddings` `[positions, hidden]`,
//! `embeddings.token_type_embeddings` `[types, hidden]`; of each layer query, key, value and `attention.output.dense`
//! `[hidden, hidden]`, `intermediate.dense` `[width, hidden]`, `output.dense` `[hidden, width]`, all with biases; and norms of
//! `hidden` weights and biases behind the embeddings, attention and MLP. All texts have the first token type.

use rbee_kernels::compute::Compute;
use rbee_kernels::ops::Bend;
use rbee_weights::config::encoder::{EncoderActivation, EncoderConfig};
use rbee_weights::config::sentence::{self, Embedding, Modules};
use rbee_weights::needs::{Needs, encoder_needs};
use rbee_weights::safetensors::Index;

use super::{Encoder, Layer, Norm};
use crate::arch::{Matrix, Role};
use crate::error::Error;
use crate::files::ModelFiles;
use crate::loader::{headers, places};
use crate::runner::RunnerOptions;
use crate::weights::Weights;

/// Tokens of a step that memory is counted for.
const STEP_TOKENS: u64 = 512;

/// An encoder's tensors.
pub(crate) struct Plan {
    words: Matrix,
    positions: (String, usize),
    types: (String, usize),
    norm: NormPlan,
    layers: Vec<LayerPlan>,
}

struct LayerPlan {
    qkv: Matrix,
    output: Matrix,
    after_attention: NormPlan,
    up: Matrix,
    down: Matrix,
    after_mlp: NormPlan,
}

/// The names of a norm's weight and bias.
struct NormPlan([String; 2]);

impl Plan {
    /// The plan of a config, with the names that these tensors have.
    fn of(config: &EncoderConfig, has: impl Fn(&str) -> bool) -> Self {
        let EncoderConfig { hidden, width, .. } = *config;
        let prefix = prefix(config, &has);
        // Checkpoints that came from TensorFlow have its names.
        let old = has(&format!("{prefix}embeddings.LayerNorm.gamma"));
        let norm = |part: String| {
            NormPlan(
                if old { ["gamma", "beta"] } else { ["weight", "bias"] }.map(|end| format!("{part}.LayerNorm.{end}")),
            )
        };
        let matrix = |parts: &[(String, usize)], inputs: usize| Matrix {
            parts: parts.iter().map(|(part, outputs)| (format!("{part}.weight"), *outputs)).collect(),
            inputs,
            biased: true,
            role: Role::Inner,
        };
        let layer = |i: usize| {
            let name = |part: &str| format!("{prefix}encoder.layer.{i}.{part}");
            let own = ["query", "key", "value"].map(|part| (name(&format!("attention.self.{part}")), hidden));
            LayerPlan {
                qkv: matrix(&own, hidden),
                output: matrix(&[(name("attention.output.dense"), hidden)], hidden),
                after_attention: norm(name("attention.output")),
                up: matrix(&[(name("intermediate.dense"), width)], hidden),
                down: matrix(&[(name("output.dense"), hidden)], width),
                after_mlp: norm(name("output")),
            }
        };
        Self {
            words: Matrix {
                biased: false,
                role: Role::Embedding,
                ..matrix(&[(format!("{prefix}embeddings.word_embeddings"), config.vocab)], hidden)
            },
            positions: (format!("{prefix}embeddings.position_embeddings.weight"), config.positions),
            types: (format!("{prefix}embeddings.token_type_embeddings.weight"), config.token_types),
            norm: norm(format!("{prefix}embeddings")),
            layers: (0..config.layers).map(layer).collect(),
        }
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.up, &layer.down]);
        layers.chain([&self.words])
    }

    fn norms(&self) -> impl Iterator<Item = &NormPlan> {
        self.layers.iter().flat_map(|layer| [&layer.after_attention, &layer.after_mlp]).chain([&self.norm])
    }

    /// Name and shape of every tensor.
    fn tensors(&self, hidden: usize) -> Vec<(String, Vec<usize>)> {
        let tables = [&self.positions, &self.types].map(|(name, rows)| (name.clone(), vec![*rows, hidden]));
        let norms = self.norms().flat_map(|norm| norm.0.iter().map(|name| (name.clone(), vec![hidden])));
        let mut all: Vec<_> = norms.chain(tables).collect();
        for matrix in self.matrices() {
            all.extend(matrix.parts.iter().map(|(name, outputs)| (name.clone(), vec![*outputs, matrix.inputs])));
            all.extend(matrix.biases().map(|(name, len)| (name, vec![len])));
        }
        all
    }
}

/// What stands before all names.
fn prefix(config: &EncoderConfig, has: &impl Fn(&str) -> bool) -> &'static str {
    let prefix = config.family.prefix();
    if has(&format!("{prefix}embeddings.word_embeddings.weight")) { prefix } else { "" }
}

/// Whether a tensor may be left unread: the pooler, which makes no embedding here, buffers of old exports, and the head that
/// pretraining had.
fn is_spare(prefix: &str, name: &str) -> bool {
    let own = name.strip_prefix(prefix).unwrap_or(name);
    let head = !prefix.is_empty() && (name.starts_with("cls.") || name.starts_with("lm_head."));
    head || own.starts_with("pooler.dense.") || ["embeddings.position_ids", "embeddings.token_type_ids"].contains(&own)
}

/// The checked files of an encoder.
pub(crate) struct Opened {
    pub(crate) config: EncoderConfig,
    pub(crate) embedding: Embedding,
    /// Most tokens of a text, unless more is asked for.
    longest: usize,
    plan: Plan,
    pub(crate) weights: Weights,
}

/// Reads and checks everything but the weights themselves.
pub(crate) fn open(files: &ModelFiles, options: &RunnerOptions) -> Result<Opened, Error> {
    let config = EncoderConfig::parse(&files.required("config.json")?)?;
    let embedding = match files.small(sentence::MODULES)? {
        None => Embedding::default(),
        Some(bytes) => {
            let Modules { pooling, length } = Modules::parse(&bytes)?;
            Embedding { poolings: sentence::poolings(&pooling, &files.required(&pooling)?, config.hidden)?, length }
        }
    };
    if let Some(bytes) = files.small(sentence::PROMPTS)? {
        sentence::check_prompts(&bytes)?;
    }
    let declared = match files.small(sentence::SENTENCE)? {
        Some(bytes) => sentence::longest(&bytes)?,
        None => None,
    };
    let declared = match (declared, files.small("tokenizer_config.json")?) {
        (None, Some(bytes)) => sentence::tokenizer_longest(&bytes)?,
        (declared, _) => declared,
    };
    let longest = declared.map_or(config.longest(), |declared| declared.min(config.longest()));
    let (files_read, indexes) = headers(files)?;
    let has = |name: &str| indexes.iter().any(|index: &Index| index.tensors.contains_key(name));
    let (plan, prefix) = (Plan::of(&config, has), prefix(&config, &has));
    let tensors = places(plan.tensors(config.hidden), |name| is_spare(prefix, name), &files_read, indexes)?;
    Ok(Opened { config, embedding, longest, plan, weights: Weights::new(files_read, tensors, options) })
}

impl Opened {
    /// Most tokens of a text: what is asked for, else what the folder declares.
    pub(crate) fn context(&self, asked: Option<usize>) -> Result<usize, Error> {
        let most = self.config.longest();
        match asked {
            Some(0) => Err(Error::Option("a context of 0 tokens holds nothing".into())),
            Some(asked) if asked > most => {
                Err(Error::Option(format!("a context of {asked} tokens is longer than the model's own {most}")))
            }
            Some(asked) => Ok(asked),
            // The engine's least.
            None => Ok(self.longest.max(2).min(most)),
        }
    }

    /// Refuses what is asked for and means nothing here.
    pub(crate) fn check(options: &RunnerOptions) -> Result<(), Error> {
        match options.kv_type {
            None => Ok(()),
            Some(_) => Err(Error::Option("an embedding model has no KV cache: leave --kv-type away".into())),
        }
    }

    pub(crate) fn needs(&self, context: usize) -> Needs {
        let matrices = self.plan.matrices().map(|matrix| self.weights.held(matrix));
        let biases = self.plan.matrices().flat_map(Matrix::biases).map(|(_, len)| len).sum::<usize>();
        let vectors = biases + (2 * self.plan.norms().count() + context) * self.config.hidden;
        encoder_needs(&self.config, matrices.sum::<u64>() + 4 * vectors as u64, context as u64, STEP_TOKENS)
    }

    /// All weights, packed. `each` is told the bytes done after each layer.
    pub(crate) fn encoder(&self, context: usize, compute: &Compute, each: &dyn Fn(u64, u64)) -> Result<Encoder, Error> {
        let (weights, plan, hidden) = (&self.weights, &self.plan, self.config.hidden);
        let total = weights.bytes();
        let norm = |plan: &NormPlan| -> Result<Norm, Error> {
            let [weight, bias] = &plan.0;
            Ok(Norm { weight: weights.vector(weight)?, bias: weights.vector(bias)?, eps: self.config.eps })
        };
        let mut layers = Vec::with_capacity(plan.layers.len());
        for (i, layer) in plan.layers.iter().enumerate() {
            layers.push(Layer {
                qkv: weights.linear(&layer.qkv, compute)?,
                output: weights.linear(&layer.output, compute)?,
                after_attention: norm(&layer.after_attention)?,
                up: weights.linear(&layer.up, compute)?,
                down: weights.linear(&layer.down, compute)?,
                after_mlp: norm(&layer.after_mlp)?,
            });
            each(total * (i as u64 + 1) / (plan.layers.len() as u64 + 1), total);
        }
        let words = weights.packed(&plan.words, compute)?;
        let (positions, types) = (weights.vector(&plan.positions.0)?, weights.vector(&plan.types.0)?);
        let first = self.config.first_position * hidden;
        let mut places = positions[first..first + context * hidden].to_vec();
        for place in places.chunks_exact_mut(hidden) {
            place.iter_mut().zip(&types).for_each(|(place, kind)| *place += kind);
        }
        each(total, total);
        Ok(Encoder {
            words,
            places,
            norm: norm(&plan.norm)?,
            layers,
            heads: self.config.heads,
            bend: match self.config.activation {
                EncoderActivation::GeluErf => Bend::GeluErf,
                EncoderActivation::GeluTanh => Bend::GeluTanh,
                EncoderActivation::Relu => Bend::Relu,
            },
            compute: compute.clone(),
        })
    }
}
