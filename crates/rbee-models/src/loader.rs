//! Checked bytes into packed weights, and what a model needs before any of it is read.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;

use rbee_kernels::WeightType;
use rbee_kernels::attention::BLOCK;
use rbee_kernels::compute::{Compute, GateMul, Linear, RmsNorm};
use rbee_kernels::ops::Gate;
use rbee_weights::Error as FileError;
use rbee_weights::config::encoder::EncoderFamily;
use rbee_weights::config::{Activation, GenerationDefaults, Mlp, ModelConfig};
use rbee_weights::needs::{Needs, Positions, needs};
use rbee_weights::safetensors::{Dtype, Index, Shards, header_len};

use crate::arch::{GatedPlan, MlpPlan, NormPlan, Plan, is_spare};
use crate::decoder::{Decoder, Layer};
use crate::encoder;
use crate::error::Error;
use crate::files::ModelFiles;
use crate::gguf;
use crate::kv::{KvType, bytes_per_token};
use crate::mlp::{Experts, Gated, MlpLayer};
use crate::runner::RunnerOptions;
use crate::weights::{Place, WeightFile, Weights};

const SINGLE: &str = "model.safetensors";

/// Context of a model that was made for a longer one, unless more is asked for: its KV is reserved for every slot.
const DEFAULT_CONTEXT: usize = 4096;

/// Tokens of a step that scratch memory is counted for.
const STEP_TOKENS: u64 = 512;

/// The config and the checked headers of a model's files: every tensor of the plan is there in its shape, and no other.
pub(crate) struct Opened {
    pub(crate) config: ModelConfig,
    pub(crate) generation: GenerationDefaults,
    pub(crate) plan: Plan,
    pub(crate) weights: Weights,
}

impl Deref for Opened {
    type Target = Weights;
    fn deref(&self) -> &Weights {
        &self.weights
    }
}

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It goes on from a text: [`load`](crate::load).
    Decoder,
    /// It makes embeddings of texts: [`load_encoder`](crate::load_encoder).
    Encoder,
}

impl Kind {
    /// The kind of a model by its `config.json`.
    ///
    /// # Errors
    /// When that cannot be read; one that is damaged counts as a decoder's, and is refused when it is loaded.
    pub fn of(files: &ModelFiles) -> Result<Self, Error> {
        let config = files.small("config.json")?;
        Ok(match config.and_then(|bytes| EncoderFamily::of(&bytes)) {
            Some(_) => Self::Encoder,
            None => Self::Decoder,
        })
    }
}

/// Reads and checks everything but the weights themselves.
pub(crate) fn open(files: &ModelFiles, options: &RunnerOptions) -> Result<Opened, Error> {
    let opened = match files {
        ModelFiles::Gguf { names, .. } => gguf::open(files, names, options)?,
        ModelFiles::Folder(_) | ModelFiles::Builtin(_) => open_folder(files, options)?,
    };
    for (file, ids) in [("generation_config.json", &opened.generation.eos), ("its config", &opened.config.eos)] {
        if let Some(id) = ids.iter().find(|id| **id as usize >= opened.config.vocab) {
            let problem = format!("`eos_token_id` {id} is outside a vocabulary of {}", opened.config.vocab);
            return Err(FileError::corrupt(file, problem).into());
        }
    }
    Ok(opened)
}

fn open_folder(files: &ModelFiles, options: &RunnerOptions) -> Result<Opened, Error> {
    let config = ModelConfig::parse(&files.required("config.json")?)?;
    let generation = match files.small("generation_config.json")? {
        Some(bytes) => GenerationDefaults::parse(&bytes)?,
        None => GenerationDefaults::default(),
    };
    let (files_read, indexes) = headers(files)?;
    let plan = Plan::of(&config);
    let tensors = places(plan.tensors(), |name| is_spare(&config, name), &files_read, indexes)?;
    Ok(Opened { config, generation, plan, weights: Weights::new(files_read, tensors, options) })
}

/// The weight files of a folder and their checked headers.
pub(crate) fn headers(files: &ModelFiles) -> Result<(Vec<WeightFile>, Vec<Index>), Error> {
    let shards = files.small(Shards::FILE)?.map(|bytes| Shards::parse(&bytes)).transpose()?;
    let names = shards.as_ref().map_or_else(|| vec![SINGLE.to_owned()], |shards| shards.files.clone());
    let (mut files_read, mut indexes) = (Vec::new(), Vec::new());
    for name in names {
        let bytes = files.weights(&name)?.ok_or_else(|| FileError::Missing(name.clone()))?;
        let file_len = bytes.len() as u64;
        let len = header_len(&name, &bytes, file_len)?;
        let len = usize::try_from(len).map_err(|_| FileError::corrupt(&name, "its header is too long"))?;
        indexes.push(Index::parse(&name, &bytes[8..8 + len], file_len)?);
        files_read.push(WeightFile { name, header: 8 + len, bytes });
    }
    if let Some(shards) = &shards {
        shards.check(&indexes.iter().collect::<Vec<_>>())?;
    }
    Ok((files_read, indexes))
}

/// Where the plan's tensors are, each in its shape and in a type we compute with.
pub(crate) fn places(
    tensors: Vec<(String, Vec<usize>)>,
    spare: impl Fn(&str) -> bool,
    files: &[WeightFile],
    indexes: Vec<Index>,
) -> Result<HashMap<String, Place>, FileError> {
    let mut there = HashMap::new();
    for (file, index) in indexes.into_iter().enumerate() {
        there.extend(index.tensors.into_iter().map(|(name, info)| (name, (file, info))));
    }
    let mut places = HashMap::new();
    for (name, shape) in tensors {
        let Some((file, info)) = there.remove(&name) else {
            return Err(FileError::corrupt(&files[0].name, format!("tensor `{name}` is missing")));
        };
        let file_name = &files[file].name;
        if info.shape != shape {
            let problem = format!("tensor `{name}` has shape {:?}, the config asks for {shape:?}", info.shape);
            return Err(FileError::corrupt(file_name, problem));
        }
        let kind = match info.dtype {
            Some(Dtype::F32) => WeightType::F32,
            Some(Dtype::F16) => WeightType::F16,
            Some(Dtype::Bf16) => WeightType::Bf16,
            None => {
                let problem = format!("tensor `{name}` is not f32, f16 or bf16");
                return Err(FileError::unsupported(file_name, problem));
            }
        };
        let address = |at: u64| usize::try_from(at).map_err(|_| FileError::corrupt(file_name, "it is too large"));
        places.insert(name, Place { file, start: address(info.start)?, len: address(info.len)?, kind, pairs: None });
    }
    // A tensor without a use would have changed the result for whoever made it: a bias that the config denies, the norms of
    // another architecture.
    let extra = there.iter().filter(|(name, _)| !spare(name)).min_by_key(|(name, _)| name.as_str());
    match extra {
        None => Ok(places),
        Some((name, (file, _))) => {
            let problem = format!("tensor `{}` has no use in the architecture of config.json", name.escape_debug());
            Err(FileError::unsupported(&files[*file].name, problem))
        }
    }
}

/// What a model needs in memory, from its headers alone. Threads and instruction set do not matter.
///
/// # Errors
/// When the files cannot be read or are damaged.
pub fn inspect(files: &ModelFiles, options: &RunnerOptions) -> Result<Needs, Error> {
    if Kind::of(files)? == Kind::Encoder {
        return encoder::runner::inspect(files, options);
    }
    let opened = open(files, options)?;
    let context = opened.context(options.context)?;
    let kv_type = opened.kv_type(options.kv_type);
    Ok(opened.needs(context, opened.kv_blocks(context, options, bytes_per_token(&opened.config, kv_type))?, kv_type))
}

impl Opened {
    /// The context that is asked for, or the default.
    pub(crate) fn context(&self, asked: Option<usize>) -> Result<usize, Error> {
        let most = self.config.max_positions;
        match asked {
            Some(0) => Err(Error::Option("a context of 0 tokens holds nothing".into())),
            Some(asked) if asked > most => {
                Err(Error::Option(format!("a context of {asked} tokens is longer than the model's own {most}")))
            }
            Some(asked) => Ok(asked),
            None => Ok(most.min(DEFAULT_CONTEXT)),
        }
    }

    /// The cache's type: as asked for, else f16 beside quantized weights, else that of the embedding.
    pub(crate) fn kv_type(&self, asked: Option<KvType>) -> KvType {
        let blocks = self.tensors.values().any(|place| matches!(place.kind, WeightType::Blocks(_)));
        let own = (blocks || self.quantize.is_some()).then_some(KvType::F16);
        asked.or(own).unwrap_or_else(|| match self.place(&self.plan.embedding.parts[0].0).kind {
            WeightType::F32 => KvType::F32,
            WeightType::F16 | WeightType::Blocks(_) => KvType::F16,
            WeightType::Bf16 => KvType::Bf16,
        })
    }

    /// Blocks of KV: a whole context for each slot, or what the bytes given for it hold.
    pub(crate) fn kv_blocks(&self, context: usize, options: &RunnerOptions, per_token: u64) -> Result<usize, Error> {
        let one = context.div_ceil(BLOCK);
        let wanted = one.saturating_mul(options.slots);
        let Some(bytes) = options.kv_bytes else { return Ok(wanted) };
        let block = per_token * BLOCK as u64;
        let given = usize::try_from(bytes / block.max(1)).unwrap_or(usize::MAX);
        if given < one {
            let problem = format!("{bytes} bytes of KV do not hold a context of {context} tokens");
            return Err(Error::Option(problem));
        }
        Ok(wanted.min(given))
    }

    pub(crate) fn needs(&self, context: usize, blocks: usize, kv_type: KvType) -> Needs {
        let packed = self.plan.matrices().map(|matrix| self.held(matrix));
        let positions = Positions { one: context.next_multiple_of(BLOCK) as u64, all: BLOCK as u64 * blocks as u64 };
        let kv = bytes_per_token(&self.config, kv_type);
        let weights = packed.sum::<u64>() + 4 * self.plan.vectors() as u64;
        needs(&self.config, weights, kv, context as u64, positions, STEP_TOKENS)
    }

    /// A norm's weights as they are multiplied with.
    pub(crate) fn norm_weights(&self, plan: &NormPlan) -> Result<Vec<f32>, Error> {
        let mut weight = self.vector(&plan.name)?;
        if self.config.norms.plus_one {
            weight.iter_mut().for_each(|weight| *weight += 1.0);
        }
        Ok(weight)
    }

    fn norm(&self, plan: &NormPlan, compute: &Compute) -> Result<RmsNorm, Error> {
        Ok(RmsNorm { weight: self.norm_weights(plan)?, eps: self.config.norms.eps, compute: compute.clone() })
    }

    fn mlp(&self, plan: &MlpPlan, config: Mlp, compute: &Compute) -> Result<MlpLayer, Error> {
        let gate = match self.config.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        let gated = |plan: &GatedPlan| -> Result<Gated, Error> {
            Ok(Gated {
                gate_up: self.linear(&plan.gate_up, compute)?,
                act: GateMul { gate, compute: compute.clone() },
                down: self.linear(&plan.down, compute)?,
            })
        };
        match (plan, config) {
            (MlpPlan::Experts { router, experts }, Mlp::Experts { picked, normalised, .. }) => {
                Ok(MlpLayer::Experts(Experts {
                    router: self.linear(router, compute)?,
                    experts: experts.iter().map(gated).collect::<Result<_, _>>()?,
                    picked,
                    normalised,
                }))
            }
            (MlpPlan::Gated(plan), _) => gated(plan).map(MlpLayer::Gated),
            (MlpPlan::Experts { .. }, Mlp::Gated(_)) => unreachable!("the plan was made from this config"),
        }
    }

    /// All weights, packed. `each` is told the bytes done after each layer.
    pub(crate) fn decoder(&self, compute: &Compute, each: &dyn Fn(u64, u64)) -> Result<Decoder, Error> {
        let total = self.bytes();
        let mut layers = Vec::with_capacity(self.plan.layers.len());
        for (i, (plan, layer)) in self.plan.layers.iter().zip(&self.config.layers).enumerate() {
            let norm = |plan: &Option<NormPlan>| plan.as_ref().map(|plan| self.norm(plan, compute)).transpose();
            let qk_norms = match &plan.qk_norms {
                Some([q, k]) => Some([self.norm(q, compute)?, self.norm(k, compute)?]),
                None => None,
            };
            layers.push(Layer {
                before_attention: norm(&plan.before_attention)?,
                after_attention: norm(&plan.after_attention)?,
                before_mlp: norm(&plan.before_mlp)?,
                after_mlp: norm(&plan.after_mlp)?,
                qkv: self.linear(&plan.qkv, compute)?,
                qk_norms,
                output: self.linear(&plan.output, compute)?,
                mlp: self.mlp(&plan.mlp, layer.mlp, compute)?,
            });
            each(total * (i as u64 + 1) / (self.plan.layers.len() as u64 + 1), total);
        }
        let embedding = Arc::new(self.packed(&self.plan.embedding, compute)?);
        let head = match &self.plan.head {
            None => Arc::clone(&embedding),
            Some(head) => Arc::new(self.packed(head, compute)?),
        };
        each(total, total);
        let head = Linear { weights: head, bias: None, compute: compute.clone() };
        Ok(Decoder { embedding, layers, norm: self.norm(&self.plan.norm, compute)?, head })
    }
}
