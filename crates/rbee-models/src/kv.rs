//! KV storage in the cache's type: per layer, per block of positions and per head, keys and values as
//! [`rbee_kernels::attention`] lays them out.

use std::str::FromStr;

use bytemuck::allocation::try_zeroed_vec;
use half::{bf16, f16};
use rbee_engine::runner::BlockId;
use rbee_kernels::attention::{BLOCK, KvBlocks};
use rbee_kernels::compute::Compute;
use rbee_kernels::kv_form::{KvForm, Q8Kv};
use rbee_weights::config::ModelConfig;

use crate::error::Error;

/// Type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 4 bytes.
    F32,
    /// 2 bytes, IEEE half.
    F16,
    /// 2 bytes, upper half of an f32.
    Bf16,
    /// 1 byte, and 4 for every 32 of them.
    Q8_0,
}

impl KvType {
    /// Bytes of a block of one head.
    fn block(self, dim: usize) -> usize {
        fn bytes<F: KvForm>(dim: usize) -> usize {
            (F::key_len(dim) + F::value_len(dim)) * size_of::<F::Unit>()
        }
        match self {
            Self::F32 => bytes::<f32>(dim),
            Self::F16 => bytes::<f16>(dim),
            Self::Bf16 => bytes::<bf16>(dim),
            Self::Q8_0 => bytes::<Q8Kv>(dim),
        }
    }
}

impl FromStr for KvType {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            "q8_0" => Ok(Self::Q8_0),
            _ => Err(Error::Option(format!("kv type `{}` is not f32, f16, bf16 or q8_0", text.escape_debug()))),
        }
    }
}

/// Bytes of the KV of one token: the values of a head are padded to whole vectors.
pub(crate) fn bytes_per_token(config: &ModelConfig, kv_type: KvType) -> u64 {
    let head = kv_type.block(config.head_dim) / BLOCK;
    (config.layers.len() * config.kv_heads * head) as u64
}

/// Positions of a step from which on threads share the writing.
const MANY: usize = 16;

/// What is written of one position.
pub(crate) struct Written<'a> {
    /// Its block, and where it stands there.
    at: (usize, usize),
    /// `[heads * dim]` each.
    k: &'a [f32],
    v: &'a [f32],
}

impl<'a> Written<'a> {
    pub(crate) fn new(blocks: &[BlockId], position: usize, k: &'a [f32], v: &'a [f32]) -> Self {
        Self { at: (blocks[position / BLOCK].0 as usize, position % BLOCK), k, v }
    }
}

/// Writes a key or a value at an offset of a block.
type Put<F> = fn(&mut [<F as KvForm>::Unit], usize, &[f32]);

/// The storage of one form.
pub(crate) struct KvStore<F: KvForm> {
    keys: Vec<F::Unit>,
    values: Vec<F::Unit>,
    blocks: usize,
    heads: usize,
    dim: usize,
}

impl<F: KvForm> KvStore<F> {
    /// Zeroed storage of so many blocks for all layers. Pages are taken as they are first written.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn new(config: &ModelConfig, blocks: usize) -> Result<Self, Error> {
        let (heads, dim) = (config.kv_heads, config.head_dim);
        let all = |len: usize| {
            let len = [blocks, heads, len].into_iter().try_fold(config.layers.len(), usize::checked_mul)?;
            try_zeroed_vec::<F::Unit>(len).ok()
        };
        match (all(F::key_len(dim)), all(F::value_len(dim))) {
            (Some(keys), Some(values)) => Ok(Self { keys, values, blocks, heads, dim }),
            _ => Err(Error::Option(format!(
                "there is no memory for the KV of {} tokens: ask for a shorter context or fewer slots",
                blocks.saturating_mul(BLOCK)
            ))),
        }
    }

    /// Bytes of it.
    pub(crate) fn held(&self) -> u64 {
        (size_of_val(&self.keys[..]) + size_of_val(&self.values[..])) as u64
    }

    /// Blocks of one head are neighbours, so that one text's keys are read as one stretch where its blocks are in order.
    fn block(&self, layer: usize, block: BlockId, head: usize) -> usize {
        (layer * self.heads + head) * self.blocks + block.0 as usize
    }

    /// Writes K and V of the positions of a step, rounded to the cache's form; where there are many, its heads are shared out over the
    /// threads.
    pub(crate) fn write<'a>(
        &mut self,
        layer: usize,
        compute: &Compute,
        positions: impl ExactSizeIterator<Item = Written<'a>> + Clone + Sync,
    ) {
        let Self { keys, values, blocks, heads, dim } = self;
        let (blocks, heads, dim) = (*blocks, *heads, *dim);
        // Of one half of the storage, in which a block of a head has so many units.
        let half = |all: &mut [F::Unit], len: usize, put: Put<F>, of: fn(&Written<'a>) -> &'a [f32]| {
            let of_head = blocks * len;
            let write = |first: usize, some: &mut [F::Unit]| {
                for (head, stretch) in (first..).zip(some.chunks_exact_mut(of_head)) {
                    for position in positions.clone() {
                        let (block, offset) = position.at;
                        put(&mut stretch[block * len..][..len], offset, &of(&position)[head * dim..][..dim]);
                    }
                }
            };
            let of_layer = &mut all[layer * heads * of_head..][..heads * of_head];
            if positions.len() < MANY { write(0, of_layer) } else { compute.stripes(of_layer, of_head, &write) }
        };
        half(keys, F::key_len(dim), F::write_key, |position| position.k);
        half(values, F::value_len(dim), F::write_value, |position| position.v);
    }

    /// The blocks of one head of one sequence.
    pub(crate) fn sequence<'a>(&'a self, layer: usize, head: usize, blocks: &'a [BlockId]) -> Sequence<'a, F> {
        Sequence { store: self, layer, head, blocks }
    }
}

/// The blocks of one head of one sequence, in order.
pub(crate) struct Sequence<'a, F: KvForm> {
    store: &'a KvStore<F>,
    layer: usize,
    head: usize,
    blocks: &'a [BlockId],
}

impl<F: KvForm> KvBlocks for Sequence<'_, F> {
    type Form = F;

    fn keys(&self, i: usize) -> &[F::Unit] {
        let len = F::key_len(self.store.dim);
        &self.store.keys[self.store.block(self.layer, self.blocks[i], self.head) * len..][..len]
    }

    fn values(&self, i: usize) -> &[F::Unit] {
        let len = F::value_len(self.store.dim);
        &self.store.values[self.store.block(self.layer, self.blocks[i], self.head) * len..][..len]
    }
}
