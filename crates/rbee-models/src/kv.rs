//! KV storage in the cache's type: per layer, per block of positions and per head, keys and values as
//! [`rbee_kernels::attention`] lays them out.

use std::str::FromStr;

use rbee_engine::runner::BlockId;
use rbee_kernels::attention::{BLOCK, KvBlocks, width, write_key, write_value};
use rbee_kernels::simd::{Element, zeroed};
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
}

impl KvType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
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
            _ => Err(Error::Option(format!("kv type `{}` is not f32, f16 or bf16", text.escape_debug()))),
        }
    }
}

/// Bytes of the KV of one token: the values of a head are padded to whole vectors.
pub(crate) fn bytes_per_token(config: &ModelConfig, kv_type: KvType) -> u64 {
    let head = (config.head_dim + width(config.head_dim)) * kv_type.size();
    (config.layers.len() * config.kv_heads * head) as u64
}

/// The storage of one element type.
pub(crate) struct KvStore<T> {
    keys: Vec<T>,
    values: Vec<T>,
    blocks: usize,
    heads: usize,
    dim: usize,
}

impl<T: Element> KvStore<T> {
    /// Zeroed storage of so many blocks for all layers.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn new(config: &ModelConfig, blocks: usize) -> Result<Self, Error> {
        let (heads, dim) = (config.kv_heads, config.head_dim);
        let all = |width: usize| {
            let len = [blocks, heads, BLOCK, width].into_iter().try_fold(config.layers.len(), usize::checked_mul)?;
            zeroed::<T>(len)
        };
        match (all(dim), all(width(dim))) {
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

    fn block(&self, layer: usize, block: BlockId, head: usize) -> usize {
        (layer * self.blocks + block.0 as usize) * self.heads + head
    }

    /// Writes K and V of one position, `heads * dim` values each, rounded to the cache's type.
    pub(crate) fn write(&mut self, layer: usize, blocks: &[BlockId], position: usize, k: &[f32], v: &[f32]) {
        let (block, offset) = (blocks[position / BLOCK], position % BLOCK);
        let (keys, values) = (self.dim * BLOCK, width(self.dim) * BLOCK);
        for (head, (k, v)) in k.chunks_exact(self.dim).zip(v.chunks_exact(self.dim)).enumerate() {
            let at = self.block(layer, block, head);
            write_key(&mut self.keys[at * keys..][..keys], offset, k);
            write_value(&mut self.values[at * values..][..values], offset, v);
        }
    }

    /// The blocks of one head of one sequence.
    pub(crate) fn sequence<'a>(&'a self, layer: usize, head: usize, blocks: &'a [BlockId]) -> Sequence<'a, T> {
        Sequence { store: self, layer, head, blocks }
    }
}

/// The blocks of one head of one sequence, in order.
pub(crate) struct Sequence<'a, T> {
    store: &'a KvStore<T>,
    layer: usize,
    head: usize,
    blocks: &'a [BlockId],
}

impl<T: Element> KvBlocks for Sequence<'_, T> {
    type Element = T;

    fn keys(&self, i: usize) -> &[T] {
        let len = self.store.dim * BLOCK;
        &self.store.keys[self.store.block(self.layer, self.blocks[i], self.head) * len..][..len]
    }

    fn values(&self, i: usize) -> &[T] {
        let len = width(self.store.dim) * BLOCK;
        &self.store.values[self.store.block(self.layer, self.blocks[i], self.head) * len..][..len]
    }
}
