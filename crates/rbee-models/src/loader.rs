//! Checked bytes into packed weights, and what a model needs before any of it is read.

use std::borrow::Cow;
use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;

use rbee_kernels::attention::BLOCK;
use rbee_kernels::candle::{Compute, GateMul, Linear, RmsNorm};
use rbee_kernels::ops::Gate;
use rbee_kernels::packed::widen;
use rbee_kernels::{Kept, Packed, Quantization, WeightType};
use rbee_weights::Error as FileError;
use rbee_weights::config::{Activation, GenerationDefaults, Mlp, ModelConfig};
use rbee_weights::needs::{Needs, Positions, needs};
use rbee_weights::safetensors::{Dtype, Index, Shards, header_len};
use sha2::{Digest, Sha256};

use crate::arch::{GatedPlan, Matrix, MlpPlan, NormPlan, Plan, Role, is_spare};
use crate::decoder::{Decoder, Layer};
use crate::error::Error;
use crate::files::{ModelFiles, WeightBytes};
use crate::gguf;
use crate::kv::{KvType, bytes_per_token};
use crate::mlp::{Experts, Gated, MlpLayer};
use crate::runner::RunnerOptions;

const SINGLE: &str = "model.safetensors";

/// Context of a model that was made for a longer one, unless more is asked for: its KV is reserved for every slot.
const DEFAULT_CONTEXT: usize = 4096;

/// Tokens of a step that scratch memory is counted for.
const STEP_TOKENS: u64 = 512;

/// Weight files up to this long go into the digest whole.
const WHOLE: usize = 64 << 20;

/// Of longer ones, the first [`PAGE`] bytes of every so many.
const STRIDE: usize = 64 << 10;

const PAGE: usize = 4 << 10;

/// What matrices are kept in when the files' own type is too large.
///
/// Routers keep their type: they are small, and which expert a row goes to hangs on small differences. So does any matrix
/// whose rows are not whole blocks of 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantize {
    /// 8.5 bits per weight.
    Q8_0,
    /// 4.6 bits per weight; 8.5 for embedding and head, and where rows are not whole blocks of 256.
    Q4K,
}

impl FromStr for Quantize {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "q8_0" => Ok(Self::Q8_0),
            "q4_k" => Ok(Self::Q4K),
            _ => Err(Error::Option(format!("quantization `{}` is not q8_0 or q4_k", text.escape_debug()))),
        }
    }
}

/// The config and the checked headers of a model's files: every tensor of the plan is there in its shape, and no other.
pub(crate) struct Opened {
    pub(crate) config: ModelConfig,
    pub(crate) generation: GenerationDefaults,
    pub(crate) plan: Plan,
    pub(crate) files: Vec<WeightFile>,
    pub(crate) tensors: HashMap<String, Place>,
    pub(crate) quantize: Option<Quantize>,
}

/// A file of weights.
pub(crate) struct WeightFile {
    pub(crate) name: String,
    /// Bytes at its beginning that say what all the rest means.
    pub(crate) header: usize,
    pub(crate) bytes: WeightBytes,
}

/// Where a tensor is.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) file: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) kind: WeightType,
    pub(crate) pairs: Option<Pairs>,
}

/// Rows that stand as neighbouring rotary pairs within each head: row `2i` of a head of `n` rows is our row `i`, and row
/// `2i + 1` is our row `i + n / 2`.
#[derive(Clone, Copy)]
pub(crate) struct Pairs {
    pub(crate) heads: usize,
    /// Of all heads together.
    pub(crate) rows: usize,
}

impl Pairs {
    /// The bytes with the rows in our order.
    fn sorted(self, bytes: &[u8]) -> Vec<u8> {
        let (row, head) = (bytes.len() / self.rows, self.rows / self.heads);
        let mut out = Vec::with_capacity(bytes.len());
        for of_head in bytes.chunks_exact(head * row) {
            for first in 0..2 {
                of_head.chunks_exact(row).skip(first).step_by(2).for_each(|bytes| out.extend_from_slice(bytes));
            }
        }
        out
    }
}

/// Reads and checks everything but the weights themselves.
pub(crate) fn open(files: &ModelFiles, quantize: Option<Quantize>) -> Result<Opened, Error> {
    let opened = match files {
        ModelFiles::Gguf { names, .. } => gguf::open(files, names, quantize)?,
        ModelFiles::Folder(_) | ModelFiles::Builtin(_) => open_folder(files, quantize)?,
    };
    for (file, ids) in [("generation_config.json", &opened.generation.eos), ("its config", &opened.config.eos)] {
        if let Some(id) = ids.iter().find(|id| **id as usize >= opened.config.vocab) {
            let problem = format!("`eos_token_id` {id} is outside a vocabulary of {}", opened.config.vocab);
            return Err(FileError::corrupt(file, problem).into());
        }
    }
    Ok(opened)
}

fn open_folder(files: &ModelFiles, quantize: Option<Quantize>) -> Result<Opened, Error> {
    let config = ModelConfig::parse(&files.required("config.json")?)?;
    let generation = match files.small("generation_config.json")? {
        Some(bytes) => GenerationDefaults::parse(&bytes)?,
        None => GenerationDefaults::default(),
    };
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
    let plan = Plan::of(&config);
    let tensors = places(&config, &plan, &files_read, indexes)?;
    Ok(Opened { config, generation, plan, files: files_read, tensors, quantize })
}

/// Where the plan's tensors are, each in its shape and in a type we compute with.
fn places(
    config: &ModelConfig,
    plan: &Plan,
    files: &[WeightFile],
    indexes: Vec<Index>,
) -> Result<HashMap<String, Place>, FileError> {
    let mut there = HashMap::new();
    for (file, index) in indexes.into_iter().enumerate() {
        there.extend(index.tensors.into_iter().map(|(name, info)| (name, (file, info))));
    }
    let mut places = HashMap::new();
    for (name, shape) in plan.tensors() {
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
    let extra = there.iter().filter(|(name, _)| !is_spare(config, name)).min_by_key(|(name, _)| name.as_str());
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
    let opened = open(files, options.quantize)?;
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
        let packed =
            self.plan.matrices().map(|matrix| self.kept(matrix).bytes(matrix.outputs() as u64, matrix.inputs as u64));
        let positions = Positions { one: context.next_multiple_of(BLOCK) as u64, all: BLOCK as u64 * blocks as u64 };
        let kv = bytes_per_token(&self.config, kv_type);
        let weights = packed.sum::<u64>() + 4 * self.plan.vectors() as u64;
        needs(&self.config, weights, kv, context as u64, positions, STEP_TOKENS)
    }

    fn place(&self, name: &str) -> Place {
        *self.tensors.get(name).expect("all tensors of the plan were found when the files were opened")
    }

    /// The bytes of a tensor of the plan, its rows in our order, and their type.
    pub(crate) fn tensor(&self, name: &str) -> (WeightType, Cow<'_, [u8]>) {
        let place = self.place(name);
        let bytes = &self.files[place.file].bytes[place.start..place.start + place.len];
        (place.kind, place.pairs.map_or(Cow::Borrowed(bytes), |pairs| Cow::Owned(pairs.sorted(bytes))))
    }

    pub(crate) fn not_finite(&self, name: &str) -> Error {
        let file = &self.files[self.place(name).file].name;
        FileError::corrupt(file, format!("tensor `{name}` holds values that are not numbers, or too large")).into()
    }

    /// What a matrix is kept in, if not in its own type.
    fn quantization(&self, matrix: &Matrix) -> Option<Quantization> {
        let asked = self.quantize.filter(|_| matrix.role != Role::Router)?;
        let form = match asked {
            Quantize::Q4K if matrix.role == Role::Inner && matrix.inputs.is_multiple_of(Quantization::Q4K.block()) => {
                Quantization::Q4K
            }
            Quantize::Q4K | Quantize::Q8_0 => Quantization::Q8_0,
        };
        matrix.inputs.is_multiple_of(form.block()).then_some(form)
    }

    /// What a matrix is kept in: with the fewer bits of what the files have and what is asked for.
    fn kept(&self, matrix: &Matrix) -> Kept {
        let own = Kept::of(matrix.parts.iter().map(|(name, _)| self.place(name).kind));
        let bytes = |kept: &Kept| kept.bytes(matrix.outputs() as u64, matrix.inputs as u64);
        let asked = self.quantization(matrix).map(Kept::Quantized).filter(|asked| bytes(asked) < bytes(&own));
        asked.unwrap_or(own)
    }

    /// A matrix, packed.
    fn packed(&self, matrix: &Matrix, compute: &Compute) -> Result<Packed, Error> {
        let parts: Vec<_> = matrix.parts.iter().map(|(name, _)| self.tensor(name)).collect();
        let parts: Vec<_> = parts.iter().map(|(kind, bytes)| (*kind, &**bytes)).collect();
        let packed = match self.kept(matrix) {
            Kept::Quantized(form) => compute.quantized(form, &parts, matrix.inputs),
            Kept::F32 | Kept::F16 | Kept::Bf16 => Packed::new(&parts, matrix.inputs),
        };
        packed.map_err(|_| self.not_finite(&matrix.parts[0].0))
    }

    /// A vector as f32.
    pub(crate) fn vector(&self, name: &str) -> Result<Vec<f32>, Error> {
        let (kind, bytes) = self.tensor(name);
        widen(kind, &bytes).map_err(|_| self.not_finite(name))
    }

    /// The biases of a matrix, if it has some.
    pub(crate) fn bias(&self, matrix: &Matrix) -> Result<Option<Vec<f32>>, Error> {
        let mut bias = Vec::new();
        for (name, _) in matrix.biases() {
            bias.extend(self.vector(&name)?);
        }
        Ok(matrix.biased.then_some(bias))
    }

    fn linear(&self, matrix: &Matrix, compute: &Compute) -> Result<Linear, Error> {
        let (bias, weights) = (self.bias(matrix)?, Arc::new(self.packed(matrix, compute)?));
        Ok(Linear { weights, bias, compute: compute.clone() })
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
        Ok(RmsNorm { weight: self.norm_weights(plan)?, eps: self.config.norms.eps, isa: compute.isa() })
    }

    fn mlp(&self, plan: &MlpPlan, config: Mlp, compute: &Compute) -> Result<MlpLayer, Error> {
        let gate = match self.config.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        let gated = |plan: &GatedPlan| -> Result<Gated, Error> {
            Ok(Gated {
                gate_up: self.linear(&plan.gate_up, compute)?,
                act: GateMul { gate, isa: compute.isa() },
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

    /// Bytes of all files of weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.len() as u64).sum()
    }

    /// Digest of the weights: name, length and content of each file. Of a large file 4 KiB in every 64 KiB: whatever
    /// changes a tensor as a whole, as training and merging do, changes some of it, and reading it is no second load.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for WeightFile { name, header, bytes } in &self.files {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            hash.update((bytes.len() as u64).to_le_bytes());
            if bytes.len() <= WHOLE {
                hash.update(&**bytes);
                continue;
            }
            // The header is not sampled: it says what all the rest means.
            hash.update(&bytes[..*header]);
            for stretch in bytes.chunks(STRIDE) {
                hash.update(&stretch[..PAGE.min(stretch.len())]);
            }
        }
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}
