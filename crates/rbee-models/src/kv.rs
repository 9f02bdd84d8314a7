//! KV storage: per layer, per block of positions, per head, rows of `head_dim` values in the cache's type.

use std::str::FromStr;

use half::{bf16, f16};
use rbee_engine::runner::BlockId;
use rbee_kernels::ops::KvRows;

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

/// An element type of the cache.
pub(crate) trait KvElement: Copy + Default + Send + Sync {
    fn narrow(value: f32) -> Self;
    fn widen(self) -> f32;
    /// The row as f32: itself, or widened into the scratch.
    fn row<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
}

impl KvElement for f32 {
    fn narrow(value: f32) -> f32 {
        value
    }
    fn widen(self) -> f32 {
        self
    }
    fn row<'a>(row: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        row
    }
}

macro_rules! half_elements {
    ($($type:ty),*) => {$(
        impl KvElement for $type {
            fn narrow(value: f32) -> Self {
                Self::from_f32(value)
            }
            fn widen(self) -> f32 {
                self.to_f32()
            }
            fn row<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
                for (wide, value) in scratch.iter_mut().zip(row) {
                    *wide = value.widen();
                }
                scratch
            }
        }
    )*};
}

half_elements!(f16, bf16);

/// The storage of one element type.
pub(crate) struct KvStore<T> {
    keys: Vec<T>,
    values: Vec<T>,
    blocks: usize,
    block_size: usize,
    heads: usize,
    dim: usize,
}

impl<T: KvElement> KvStore<T> {
    /// Zeroed storage for all layers.
    pub(crate) fn new(layers: usize, blocks: usize, block_size: usize, heads: usize, dim: usize) -> Self {
        let len = layers * blocks * block_size * heads * dim;
        Self { keys: vec![T::default(); len], values: vec![T::default(); len], blocks, block_size, heads, dim }
    }

    fn at(&self, layer: usize, block: BlockId, head: usize, offset: usize) -> usize {
        (((layer * self.blocks + block.0 as usize) * self.heads + head) * self.block_size + offset) * self.dim
    }

    /// Writes K and V of one position, `heads * dim` values each, rounded to the cache's type.
    pub(crate) fn write(&mut self, layer: usize, blocks: &[BlockId], position: usize, k: &[f32], v: &[f32]) {
        let (block, offset) = (blocks[position / self.block_size], position % self.block_size);
        for head in 0..self.heads {
            let at = self.at(layer, block, head, offset);
            let part = head * self.dim..(head + 1) * self.dim;
            for (to, from) in self.keys[at..][..self.dim].iter_mut().zip(&k[part.clone()]) {
                *to = T::narrow(*from);
            }
            for (to, from) in self.values[at..][..self.dim].iter_mut().zip(&v[part]) {
                *to = T::narrow(*from);
            }
        }
    }

    /// The rows of one head of one sequence.
    pub(crate) fn rows<'a>(&'a self, layer: usize, head: usize, blocks: &'a [BlockId]) -> Rows<'a, T> {
        Rows { store: self, layer, head, blocks }
    }
}

/// The rows of one head of one sequence, by position.
pub(crate) struct Rows<'a, T> {
    store: &'a KvStore<T>,
    layer: usize,
    head: usize,
    blocks: &'a [BlockId],
}

impl<T: KvElement> Rows<'_, T> {
    fn at(&self, position: usize) -> usize {
        let size = self.store.block_size;
        self.store.at(self.layer, self.blocks[position / size], self.head, position % size)
    }
}

impl<T: KvElement> KvRows for Rows<'_, T> {
    fn key<'a>(&'a self, position: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        T::row(&self.store.keys[self.at(position)..][..self.store.dim], scratch)
    }
    fn value<'a>(&'a self, position: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        T::row(&self.store.values[self.at(position)..][..self.store.dim], scratch)
    }
}
