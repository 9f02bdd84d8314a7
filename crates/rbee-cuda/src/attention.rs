//! Paged attention: where rows stand, the KV they write and read, and the typed calls.

#![expect(unsafe_code, reason = "kernels take pointers")]

use half::bf16;

use crate::gpu::{Buffer, Error, Gpu};
use crate::kernels::{THREADS, arg, count, fits, int};

/// Positions of a block of KV.
pub const BLOCK: usize = 16;

/// Positions whose sum is made apart.
const PARTIAL: usize = 256;

/// Most query heads that share a KV head: the rows of the matrix units' tiles.
const GROUP: usize = 16;

/// Widths of a head that there are kernels for.
const WIDTHS: [(usize, &str); 5] =
    [(32, "attention_32"), (64, "attention_64"), (96, "attention_96"), (128, "attention_128"), (256, "attention_256")];

/// Sizes of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key and value heads.
    pub kv: usize,
    /// Width of each: 32, 64, 96, 128 or 256.
    pub dim: usize,
}

impl Heads {
    fn kernel(self) -> Result<&'static str, Error> {
        let Self { queries, kv, dim } = self;
        let (_, kernel) = WIDTHS
            .iter()
            .find(|(width, _)| *width == dim)
            .ok_or_else(|| Error::Shape(format!("there is no attention of heads {dim} wide")))?;
        if kv == 0 || queries == 0 || !queries.is_multiple_of(kv) || queries / kv > GROUP {
            return Err(Error::Shape(format!("{queries} query heads cannot share {kv} KV heads by {GROUP} at most")));
        }
        Ok(kernel)
    }
}

/// KV of one layer: blocks of [`BLOCK`] positions in bf16.
pub struct Kv {
    keys: Buffer<bf16>,
    values: Buffer<bf16>,
    heads: Heads,
    blocks: usize,
}

impl Kv {
    /// Zeroed blocks.
    ///
    /// # Errors
    /// When there is no kernel for such heads, or no memory.
    pub fn new(gpu: &Gpu, heads: Heads, blocks: usize) -> Result<Self, Error> {
        heads.kernel()?;
        let len = [heads.kv, heads.dim, BLOCK].into_iter().try_fold(blocks, usize::checked_mul).unwrap_or(usize::MAX);
        Ok(Self { keys: gpu.zeroed(len)?, values: gpu.zeroed(len)?, heads, blocks })
    }
}

/// Where the rows of a step stand: the position of each in its sequence, and that sequence's blocks.
pub struct Rows {
    positions: Buffer<i32>,
    tables: Buffer<i32>,
    count: usize,
    /// Blocks of each row's table.
    width: usize,
    /// Blocks that the KV must have.
    blocks: usize,
    last: usize,
}

impl Rows {
    /// Takes each row's position and its sequence's blocks over to the GPU.
    ///
    /// # Errors
    /// When blocks do not reach a row's position, or there is no row.
    pub fn new(gpu: &Gpu, rows: &[(usize, &[u32])]) -> Result<Self, Error> {
        let width = rows.iter().map(|(_, blocks)| blocks.len()).max().unwrap_or(0);
        let mut tables = vec![0; rows.len() * width];
        let (mut positions, mut blocks, mut last) = (Vec::new(), 0, 0);
        for (i, (position, table)) in rows.iter().enumerate() {
            if table.len() <= position / BLOCK {
                return Err(Error::Shape(format!("{} blocks do not reach position {position}", table.len())));
            }
            positions.push(int(*position)?);
            for (to, block) in tables[i * width..].iter_mut().zip(*table) {
                *to = int(*block as usize)?;
                blocks = blocks.max(*block as usize + 1);
            }
            last = last.max(*position);
        }
        if rows.is_empty() {
            return Err(Error::Shape("a step without rows".into()));
        }
        let (positions, tables) = (gpu.upload(&positions)?, gpu.upload(&tables)?);
        Ok(Self { positions, tables, count: rows.len(), width, blocks, last })
    }
}

/// Cosines and sines by position: `[positions, half]` each.
pub struct RopeTable {
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    half: usize,
}

impl RopeTable {
    /// A table of `half` angles for each position; none where nothing is turned.
    ///
    /// # Errors
    /// When the lengths do not fit each other.
    pub fn new(gpu: &Gpu, cos: &[f32], sin: &[f32], half: usize) -> Result<Self, Error> {
        if cos.len() != sin.len() || (half > 0 && !cos.len().is_multiple_of(half)) {
            return Err(Error::Shape(format!("{} cosines, {} sines by {half}", cos.len(), sin.len())));
        }
        Ok(Self { cos: gpu.upload(cos)?, sin: gpu.upload(sin)?, half })
    }
}

/// How scores are made of products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// What they are multiplied with.
    pub scale: f32,
    /// Bound that they are bent towards.
    pub cap: Option<f32>,
    /// Positions that a row attends to, its own included; all unless given.
    pub window: Option<usize>,
}

/// Room for the partial sums of a step.
pub struct Partials {
    sums: Buffer<f32>,
    scales: Buffer<f32>,
}

impl Partials {
    /// Room for so many rows whose positions are below `context`.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(gpu: &Gpu, heads: Heads, rows: usize, context: usize) -> Result<Self, Error> {
        let all = rows.saturating_mul(heads.queries).saturating_mul(context.div_ceil(PARTIAL));
        Ok(Self { sums: gpu.zeroed(all.saturating_mul(heads.dim))?, scales: gpu.zeroed(all.saturating_mul(2))? })
    }
}

impl Kv {
    fn holds(&self, rows: &Rows) -> Result<(), Error> {
        if rows.blocks > self.blocks {
            return Err(Error::Shape(format!("block {} of {}", rows.blocks - 1, self.blocks)));
        }
        Ok(())
    }

    /// Turns q and k of `[rows, queries + 2 kv, dim]` values, rounds all to bf16, writes k and v to the rows' blocks and q to `q`.
    ///
    /// # Errors
    /// When something is too short, or the driver refuses.
    pub fn write(
        &mut self,
        gpu: &Gpu,
        rows: &Rows,
        rope: &RopeTable,
        qkv: &Buffer<f32>,
        q: &mut Buffer<bf16>,
    ) -> Result<(), Error> {
        self.holds(rows)?;
        let Heads { queries, kv, dim } = self.heads;
        let all = queries + 2 * kv;
        fits("q, k and v", qkv.len(), rows.count.checked_mul(all * dim))?;
        fits("the queries", q.len(), rows.count.checked_mul(queries * dim))?;
        fits("the rope", rope.cos.len(), (rows.last + 1).checked_mul(rope.half))?;
        if 2 * rope.half > dim {
            return Err(Error::Shape(format!("{} angles turn heads {dim} wide", rope.half)));
        }
        let (mut width, mut queries, mut kv) = (int(rows.width)?, int(queries)?, int(kv)?);
        let (mut d, mut half) = (int(dim)?, int(rope.half)?);
        let (mut qkv, mut cos, mut sin, mut q) = (qkv.at, rope.cos.at, rope.sin.at, q.at);
        let (mut positions, mut tables) = (rows.positions.at, rows.tables.at);
        let (mut keys, mut values) = (self.keys.at, self.values.at);
        let mut args = [
            arg(&mut qkv),
            arg(&mut cos),
            arg(&mut sin),
            arg(&mut positions),
            arg(&mut tables),
            arg(&mut width),
            arg(&mut q),
            arg(&mut keys),
            arg(&mut values),
            arg(&mut queries),
            arg(&mut kv),
            arg(&mut d),
            arg(&mut half),
        ];
        // SAFETY: the arguments are those of `rope_write`; lengths, blocks and positions were checked.
        unsafe { gpu.launch("rope_write", (count(rows.count)?, count(all)?), count(dim)?, &mut args) }
    }

    /// Causal attention of each row over its sequence's blocks: `[rows, queries * dim]` to the same.
    ///
    /// # Errors
    /// When something is too short, or the driver refuses.
    pub fn attend(
        &self,
        gpu: &Gpu,
        rows: &Rows,
        scores: Scores,
        q: &Buffer<bf16>,
        partials: &mut Partials,
        out: &mut Buffer<bf16>,
    ) -> Result<(), Error> {
        self.holds(rows)?;
        let kernel = self.heads.kernel()?;
        let Heads { queries, kv, dim } = self.heads;
        let parts = rows.last / PARTIAL + 1;
        let need = rows.count.checked_mul(queries * dim);
        fits("the queries", q.len(), need)?;
        fits("the output", out.len(), need)?;
        fits("the partial sums", partials.sums.len(), need.and_then(|need| need.checked_mul(parts)))?;
        fits("the partial scales", partials.scales.len(), rows.count.checked_mul(queries * 2 * parts))?;
        let grid = (count(parts.saturating_mul(kv))?, count(rows.count)?);
        let whole = (count(rows.count)?, count(queries)?);
        let (mut width, mut queries, mut kv, mut parts) = (int(rows.width)?, int(queries)?, int(kv)?, int(parts)?);
        let (mut d, mut window) = (int(dim)?, int(scores.window.unwrap_or(0))?);
        let (mut scale, mut cap) = (scores.scale, scores.cap.unwrap_or(0.0));
        let (mut q, mut keys, mut values, mut out) = (q.at, self.keys.at, self.values.at, out.at);
        let (mut positions, mut tables) = (rows.positions.at, rows.tables.at);
        let (mut sums, mut scales) = (partials.sums.at, partials.scales.at);
        let mut args = [
            arg(&mut q),
            arg(&mut keys),
            arg(&mut values),
            arg(&mut positions),
            arg(&mut tables),
            arg(&mut width),
            arg(&mut sums),
            arg(&mut scales),
            arg(&mut queries),
            arg(&mut kv),
            arg(&mut parts),
            arg(&mut window),
            arg(&mut scale),
            arg(&mut cap),
        ];
        // SAFETY: the arguments are those of `attention_*`; lengths, blocks and positions were checked.
        unsafe { gpu.launch(kernel, grid, THREADS, &mut args)? };
        let mut args = [
            arg(&mut sums),
            arg(&mut scales),
            arg(&mut positions),
            arg(&mut out),
            arg(&mut queries),
            arg(&mut parts),
            arg(&mut d),
            arg(&mut window),
        ];
        // SAFETY: the arguments are those of `attention_merge`, and what it reads was written by the launch before.
        unsafe { gpu.launch("attention_merge", whole, count(dim)?, &mut args) }
    }
}
