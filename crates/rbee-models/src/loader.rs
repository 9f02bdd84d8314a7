//! Checked bytes into packed weights, and what a model needs before any of it is read.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rbee_kernels::candle::{Compute, Linear, RmsNorm};
use rbee_kernels::{Packed, Weights};
use rbee_weights::Error as FileError;
use rbee_weights::config::{GenerationDefaults, ModelConfig};
use rbee_weights::needs::{Needs, needs};
use rbee_weights::safetensors::{Dtype, Index, TensorInfo, header_len, shards};
use sha2::{Digest, Sha256};

use crate::decoder::{Decoder, Layer};
use crate::error::Error;
use crate::files::{ModelFiles, WeightBytes};
use crate::kv::KvType;

const SINGLE: &str = "model.safetensors";

/// Bytes at each end of a weight file that go into its digest besides its header; small files go in whole.
const SAMPLE: usize = 32 << 20;

/// The config and the checked headers of a model's files.
pub(crate) struct Opened {
    pub(crate) config: ModelConfig,
    pub(crate) generation: GenerationDefaults,
    files: Vec<(String, WeightBytes, Index)>,
}

/// Reads and checks everything but the weights themselves.
pub(crate) fn open(files: &ModelFiles) -> Result<Opened, Error> {
    let config = ModelConfig::parse(&files.required("config.json")?)?;
    let generation = match files.small("generation_config.json")? {
        Some(bytes) => GenerationDefaults::parse(&bytes)?,
        None => GenerationDefaults::default(),
    };
    let names = match files.small("model.safetensors.index.json")? {
        Some(bytes) => shards(&bytes)?,
        None => vec![SINGLE.to_owned()],
    };
    let mut opened = Vec::new();
    for name in names {
        let bytes = files.weights(&name)?.ok_or_else(|| FileError::Missing(name.clone()))?;
        let file_len = bytes.len() as u64;
        let len = header_len(&name, &bytes, file_len)?;
        let len = usize::try_from(len).map_err(|_| FileError::corrupt(&name, "its header is too long"))?;
        let index = Index::parse(&name, &bytes[8..8 + len], file_len)?;
        opened.push((name, bytes, index));
    }
    Ok(Opened { config, generation, files: opened })
}

/// What a model needs in memory, from its headers alone.
///
/// # Errors
/// When the files cannot be read or are damaged.
pub fn inspect(
    files: &ModelFiles,
    context: Option<usize>,
    slots: usize,
    kv_type: Option<KvType>,
) -> Result<Needs, Error> {
    let opened = open(files)?;
    let context = opened.context(context)?;
    Ok(opened.needs(context, slots, kv_type))
}

/// Context of a model that was made for a longer one, unless more is asked for: its KV is reserved for every slot.
const DEFAULT_CONTEXT: usize = 4096;

/// Tokens of a step that scratch memory is counted for.
const STEP_TOKENS: u64 = 512;

impl Opened {
    /// The context that is asked for, or the default.
    pub(crate) fn context(&self, asked: Option<usize>) -> Result<usize, Error> {
        let most = self.config.max_positions;
        match asked {
            Some(asked) if asked > most => {
                Err(Error::Option(format!("a context of {asked} tokens is longer than the model's own {most}")))
            }
            Some(asked) => Ok(asked),
            None => Ok(most.min(DEFAULT_CONTEXT)),
        }
    }

    /// The cache's type: as asked for, else the weights' own.
    pub(crate) fn kv_type(&self, asked: Option<KvType>) -> KvType {
        asked.unwrap_or_else(|| match self.find("model.embed_tokens.weight").map(|(_, info)| info.dtype) {
            Some(Some(Dtype::F16)) => KvType::F16,
            Some(Some(Dtype::Bf16)) => KvType::Bf16,
            _ => KvType::F32,
        })
    }

    pub(crate) fn needs(&self, context: usize, slots: usize, kv_type: Option<KvType>) -> Needs {
        let kv = self.kv_type(kv_type).size() as u64;
        let tensors = self.files.iter().flat_map(|(_, _, index)| index.tensors.iter());
        let weights = tensors.filter(|(name, _)| !(self.config.tied && name.as_str() == "lm_head.weight"));
        let weights = weights.map(|(_, info)| info.len).sum();
        needs(&self.config, weights, kv, context as u64, (context * slots) as u64, STEP_TOKENS)
    }

    fn find(&self, name: &str) -> Option<(&[u8], &TensorInfo)> {
        self.files.iter().find_map(|(_, bytes, index)| {
            let info = index.tensors.get(name)?;
            let start = usize::try_from(info.start).ok()?;
            let len = usize::try_from(info.len).ok()?;
            Some((bytes.get(start..start.checked_add(len)?)?, info))
        })
    }

    /// A tensor of this name and shape, in its own type.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        let file = self.files.first().map_or(SINGLE, |(file, _, _)| file);
        let (bytes, info) =
            self.find(name).ok_or_else(|| FileError::corrupt(file, format!("tensor `{name}` is missing")))?;
        if info.shape != shape {
            return Err(FileError::corrupt(
                file,
                format!("tensor `{name}` has shape {:?}, the config asks for {shape:?}", info.shape),
            )
            .into());
        }
        let dtype = match info.dtype {
            Some(Dtype::F32) => DType::F32,
            Some(Dtype::F16) => DType::F16,
            Some(Dtype::Bf16) => DType::BF16,
            None => return Err(FileError::unsupported(file, format!("tensor `{name}` is not f32, f16 or bf16")).into()),
        };
        Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu)
            .map_err(|source| Error::Tensor { what: name.to_owned(), source })
    }

    /// Several matrices of the same inputs, one below the other, packed in their own type.
    fn packed(&self, parts: &[(String, usize)], k: usize) -> Result<Packed, Error> {
        let mut tensors = Vec::new();
        for (name, n) in parts {
            tensors.push(self.tensor(name, &[*n, k])?);
        }
        let n = parts.iter().map(|(_, n)| n).sum();
        let what = || parts[0].0.clone();
        let failed = |source| Error::Tensor { what: what(), source };
        let dtype = tensors[0].dtype();
        let same: candle_core::Result<Vec<Tensor>> = tensors.iter().map(|tensor| tensor.to_dtype(dtype)).collect();
        let joined = Tensor::cat(&same.map_err(failed)?, 0).and_then(|joined| joined.flatten_all()).map_err(failed)?;
        let weights = match dtype {
            DType::F16 => Weights::F16(joined.to_vec1::<f16>().map_err(failed)?),
            DType::BF16 => Weights::Bf16(joined.to_vec1::<bf16>().map_err(failed)?),
            _ => Weights::F32(joined.to_vec1::<f32>().map_err(failed)?),
        };
        Ok(Packed::new(&weights, n, k))
    }

    /// A vector as f32.
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>, Error> {
        self.tensor(name, &[n])?
            .to_dtype(DType::F32)
            .and_then(|tensor| tensor.to_vec1())
            .map_err(|source| Error::Tensor { what: name.to_owned(), source })
    }

    /// All weights, packed. `each` is told the bytes done after each layer.
    pub(crate) fn decoder(&self, compute: &Compute, each: &dyn Fn(u64, u64)) -> Result<Decoder, Error> {
        let config = &self.config;
        let (hidden, dim, ff) = (config.hidden, config.head_dim, config.intermediate);
        let (q, kv) = (config.heads * dim, config.kv_heads * dim);
        let bias = |wanted: bool, parts: &[(String, usize)]| -> Result<Option<Vec<f32>>, Error> {
            if !wanted {
                return Ok(None);
            }
            let mut values = Vec::new();
            for (name, n) in parts {
                values.extend(self.vector(&name.replace(".weight", ".bias"), *n)?);
            }
            Ok(Some(values))
        };
        let linear = |parts: &[(String, usize)], k: usize, biased: bool| -> Result<Linear, Error> {
            let weights = Arc::new(self.packed(parts, k)?);
            Ok(Linear { weights, bias: bias(biased, parts)?, compute: compute.clone() })
        };
        let norm = |name: &str| -> Result<RmsNorm, Error> {
            Ok(RmsNorm { weight: self.vector(name, hidden)?, eps: config.norm_eps })
        };
        let total: u64 = self.files.iter().map(|(_, bytes, _)| bytes.len() as u64).sum();
        let mut layers = Vec::with_capacity(config.layers);
        for i in 0..config.layers {
            let part = |name: &str, n: usize| (format!("model.layers.{i}.{name}.weight"), n);
            let qkv = [part("self_attn.q_proj", q), part("self_attn.k_proj", kv), part("self_attn.v_proj", kv)];
            layers.push(Layer {
                attention_norm: norm(&part("input_layernorm", 0).0)?,
                qkv: linear(&qkv, hidden, config.attention_bias)?,
                output: linear(&[part("self_attn.o_proj", hidden)], q, config.attention_bias)?,
                mlp_norm: norm(&part("post_attention_layernorm", 0).0)?,
                gate_up: linear(&[part("mlp.gate_proj", ff), part("mlp.up_proj", ff)], hidden, config.mlp_bias)?,
                down: linear(&[part("mlp.down_proj", hidden)], ff, config.mlp_bias)?,
            });
            each(total * (i as u64 + 1) / (config.layers as u64 + 1), total);
        }
        let embedding = Arc::new(self.packed(&[("model.embed_tokens.weight".into(), config.vocab)], hidden)?);
        let head = if config.tied {
            Arc::clone(&embedding)
        } else {
            Arc::new(self.packed(&[("lm_head.weight".into(), config.vocab)], hidden)?)
        };
        each(total, total);
        Ok(Decoder {
            embedding,
            layers,
            norm: norm("model.norm.weight")?,
            head: Linear { weights: head, bias: None, compute: compute.clone() },
        })
    }

    /// Digest of the weights: header, length and content of each file, of large ones the content of both ends.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (name, bytes, index) in &self.files {
            hash.update(name.as_bytes());
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update((index.tensors.len() as u64).to_le_bytes());
            if bytes.len() <= 2 * SAMPLE {
                hash.update(&**bytes);
            } else {
                hash.update(&bytes[..SAMPLE]);
                hash.update(&bytes[bytes.len() - SAMPLE..]);
            }
        }
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}
