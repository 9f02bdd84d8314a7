//! Paged attention: where rows stand, the KV they write and read, and the typed calls.

#![expect(unsafe_code, reason = "kernels take pointers")]

use half::bf16;

use crate::gpu::{Buffer, Error, Gpu, Pinned};
use crate::kernels::{THREADS, arg, count, fits, int};

/// Positions of a block of KV.
pub const BLOCK: usize = 16;

/// Positions whose sum is made apart.
const PARTIAL: usize = 256;

/// Most query heads that share a KV head: the rows of the matrix units' tiles.
const GROUP: usize = 16;

/// Widths of a head that there are kernels for.
pub const WIDTHS: [usize; 5] = [32, 64, 96, 128, 256];

/// The kernels, in the order of their widths.
const KERNELS: [&str; 5] = ["attention_32", "attention_64", "attention_96", "attention_128", "attention_256"];

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
        let kernel = WIDTHS
            .iter()
            .position(|width| *width == dim)
            .map(|i| KERNELS[i])
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

    /// Bytes of it.
    pub fn held(&self) -> usize {
        (self.keys.len() + self.values.len()) * size_of::<bf16>()
    }
}

/// Consecutive positions of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Stretch<'a> {
    /// The tokens there.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub start: usize,
    /// The sequence's blocks, up to the last position at least.
    pub blocks: &'a [u32],
    /// Added to positions to find their angles in the table.
    pub shift: usize,
    /// Of which rows something is wanted at the end.
    pub picked: Picked,
}

/// Rows of a stretch of which something is wanted at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Picked {
    /// None.
    None,
    /// The last.
    Last,
    /// All.
    All,
}

/// Sizes that are the same in all steps of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Padded {
    /// Rows; those that nobody has are computed and written nowhere.
    pub rows: usize,
    /// Partials of attention.
    pub parts: usize,
}

impl Padded {
    /// Partials of a context of so many positions.
    pub fn parts(context: usize) -> usize {
        context.div_ceil(PARTIAL).max(1)
    }
}

/// The rows of a step on the GPU: each one's token, position and sequence, and the sequences' blocks. The memory is reserved once
/// and set anew for each step, at the same addresses.
pub struct Rows {
    /// Of each row its position, angle, sequence, token and pick, then two numbers for each tile.
    numbers: Buffer<i32>,
    host: Pinned<i32>,
    tables: Buffer<i32>,
    host_tables: Pinned<i32>,
    /// Rows there is room for.
    room: usize,
    /// Blocks of a sequence's table.
    width: usize,
    count: usize,
    picks: usize,
    /// First row and rows of each tile of attention.
    tiles: Vec<(usize, usize)>,
    /// Query heads that share a KV head, which the tiles were made for.
    group: usize,
    parts: usize,
    /// Beyond the last block, angle and token.
    blocks: usize,
    angles: usize,
    tokens: usize,
}

/// Places of the numbers of a row, in [`Rows::room`]s.
const ANGLES: usize = 1;
const SEQUENCES: usize = 2;
const TOKENS: usize = 3;
const PICKS: usize = 4;
const TILES: usize = 5;

impl Rows {
    /// Room for steps of so many rows of so many sequences of at most `width` blocks.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(gpu: &Gpu, rows: usize, sequences: usize, width: usize) -> Result<Self, Error> {
        let (numbers, tables) = (rows.saturating_mul(TILES + 2), sequences.saturating_mul(width));
        Ok(Self {
            numbers: gpu.zeroed(numbers)?,
            host: gpu.pinned(numbers)?,
            tables: gpu.zeroed(tables)?,
            host_tables: gpu.pinned(tables)?,
            room: rows,
            width,
            count: 0,
            picks: 0,
            tiles: Vec::new(),
            group: 1,
            parts: 0,
            blocks: 0,
            angles: 0,
            tokens: 0,
        })
    }

    /// Takes the rows of a step over, once the work of the step before is done. `padded` says how many there are to be, and
    /// picks as many rows; otherwise those that the stretches name. Where it fails there are no rows.
    ///
    /// # Errors
    /// When there is no room for them, blocks do not reach a row, or there is no row.
    pub fn set(
        &mut self,
        gpu: &Gpu,
        heads: Heads,
        stretches: &[Stretch<'_>],
        padded: Option<Padded>,
    ) -> Result<(), Error> {
        let done = self.place(gpu, heads, stretches, padded);
        if done.is_err() {
            (self.count, self.picks) = (0, 0);
            self.tiles.clear();
        }
        done
    }

    fn place(
        &mut self,
        gpu: &Gpu,
        heads: Heads,
        stretches: &[Stretch<'_>],
        padded: Option<Padded>,
    ) -> Result<(), Error> {
        gpu.wait()?;
        let real: usize = stretches.iter().map(|stretch| stretch.tokens.len()).sum();
        let count = padded.map_or(real, |padded| padded.rows);
        let tables = stretches.len().saturating_mul(self.width);
        if real == 0 || count < real || count > self.room || tables > self.tables.len() {
            let problem = format!("{count} rows for {real} of {} sequences, {} at most", stretches.len(), self.room);
            return Err(Error::Shape(problem));
        }
        let (room, width) = (self.room, self.width);
        self.group = heads.queries / heads.kv.max(1);
        let most = (GROUP / self.group.max(1)).max(1);
        self.tiles.clear();
        (self.count, self.picks, self.blocks, self.angles, self.tokens) = (0, 0, 0, 0, 0);
        let mut last = 0;
        for (sequence, stretch) in stretches.iter().enumerate() {
            let end = stretch.start.saturating_add(stretch.tokens.len());
            if stretch.tokens.is_empty() || stretch.blocks.len() > width || stretch.blocks.len() < end.div_ceil(BLOCK) {
                let problem = format!("{} blocks, {width} at most, for {end} positions", stretch.blocks.len());
                return Err(Error::Shape(problem));
            }
            last = last.max(end - 1);
            self.angles = self.angles.max(end.saturating_add(stretch.shift));
            for (to, block) in self.host_tables[sequence * width..].iter_mut().zip(stretch.blocks) {
                *to = int(*block as usize)?;
                self.blocks = self.blocks.max(*block as usize + 1);
            }
            let first = self.count;
            for (i, token) in stretch.tokens.iter().enumerate() {
                let (row, position) = (first + i, stretch.start + i);
                self.tokens = self.tokens.max(*token as usize + 1);
                self.host[row] = int(position)?;
                self.host[ANGLES * room + row] = int(position + stretch.shift)?;
                self.host[SEQUENCES * room + row] = int(sequence)?;
                self.host[TOKENS * room + row] = int(*token as usize)?;
                let wanted = match stretch.picked {
                    Picked::None => false,
                    Picked::Last => i + 1 == stretch.tokens.len(),
                    Picked::All => true,
                };
                if wanted {
                    self.host[PICKS * room + self.picks] = int(row)?;
                    self.picks += 1;
                }
            }
            self.count += stretch.tokens.len();
            let starts = (first..self.count).step_by(most);
            self.tiles.extend(starts.map(|start| (start, most.min(self.count - start))));
        }
        self.parts = Padded::parts(last + 1);
        if let Some(padded) = padded {
            if padded.parts < self.parts {
                return Err(Error::Shape(format!("{} partials do not reach position {last}", padded.parts)));
            }
            for row in real..count {
                self.host[row] = -1;
                for part in [ANGLES, SEQUENCES, TOKENS] {
                    self.host[part * room + row] = 0;
                }
                self.tiles.push((row, 1));
            }
            for row in 0..count {
                self.host[PICKS * room + row] = int(row)?;
            }
            (self.count, self.picks, self.parts) = (count, count, padded.parts);
        }
        for (i, (first, rows)) in self.tiles.iter().enumerate() {
            self.host[TILES * room + 2 * i] = int(*first)?;
            self.host[TILES * room + 2 * i + 1] = int(*rows)?;
        }
        // SAFETY: both are only written here, after all work before was waited for.
        unsafe {
            gpu.send(&self.host, &mut self.numbers, self.host.len())?;
            gpu.send(&self.host_tables, &mut self.tables, tables)
        }
    }

    /// How many rows there are, those of the padding among them.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Of how many something is wanted.
    pub fn picks(&self) -> usize {
        self.picks
    }

    /// Beyond the highest token.
    pub(crate) fn tokens_end(&self) -> usize {
        self.tokens
    }

    pub(crate) fn tokens_at(&self) -> u64 {
        self.number(TOKENS)
    }

    pub(crate) fn picks_at(&self) -> u64 {
        self.number(PICKS)
    }

    fn number(&self, part: usize) -> u64 {
        self.numbers.at + (part * self.room * size_of::<i32>()) as u64
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
    /// Room for so many rows whose positions are below `context`; with less room than a step has rows, these are computed some
    /// after the others.
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
        fits("the rope", rope.cos.len(), rows.angles.checked_mul(rope.half))?;
        if 2 * rope.half > dim {
            return Err(Error::Shape(format!("{} angles turn heads {dim} wide", rope.half)));
        }
        let (mut width, mut queries, mut kv) = (int(rows.width)?, int(queries)?, int(kv)?);
        let (mut d, mut half) = (int(dim)?, int(rope.half)?);
        let (mut qkv, mut cos, mut sin, mut q) = (qkv.at, rope.cos.at, rope.sin.at, q.at);
        let (mut positions, mut angles, mut sequences) = (rows.numbers.at, rows.number(ANGLES), rows.number(SEQUENCES));
        let (mut tables, mut keys, mut values) = (rows.tables.at, self.keys.at, self.values.at);
        let mut args = [
            arg(&mut qkv),
            arg(&mut cos),
            arg(&mut sin),
            arg(&mut positions),
            arg(&mut angles),
            arg(&mut sequences),
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
        // SAFETY: the arguments are those of `rope_write`; lengths, blocks, positions and angles were checked.
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
        let Heads { queries, kv, dim } = self.heads;
        if rows.group != queries / kv {
            return Err(Error::Shape(format!("rows for {} query heads a KV head meet {:?}", rows.group, self.heads)));
        }
        let row = queries * dim * rows.parts;
        fits("the queries", q.len(), rows.count.checked_mul(queries * dim))?;
        fits("the output", out.len(), rows.count.checked_mul(queries * dim))?;
        fits("the partial sums", partials.sums.len(), Some(row))?;
        // As many tiles at once as there is room for the partial sums of.
        let most = partials.sums.len() / row;
        let mut tiles = rows.tiles.as_slice();
        while let Some((first, _)) = tiles.first() {
            let fit = tiles.partition_point(|(start, count)| start + count - first <= most);
            if fit == 0 {
                return Err(Error::Shape(format!("room for the partial sums of {most} rows is less than a tile")));
            }
            let (now, rest) = tiles.split_at(fit);
            let end = rest.first().map_or(rows.count, |(start, _)| *start);
            self.attend_tiles(
                gpu,
                rows,
                (rows.tiles.len() - tiles.len(), now.len()),
                *first..end,
                scores,
                q,
                partials,
                out,
            )?;
            tiles = rest;
        }
        Ok(())
    }

    /// The attention of some tiles, which have these rows.
    #[expect(clippy::too_many_arguments, reason = "one half of `attend`, cut off for its length")]
    fn attend_tiles(
        &self,
        gpu: &Gpu,
        rows: &Rows,
        (tile, tile_count): (usize, usize),
        range: std::ops::Range<usize>,
        scores: Scores,
        q: &Buffer<bf16>,
        partials: &mut Partials,
        out: &mut Buffer<bf16>,
    ) -> Result<(), Error> {
        let kernel = self.heads.kernel()?;
        let Heads { queries, kv, dim } = self.heads;
        let grid = (count(rows.parts.saturating_mul(kv))?, count(tile_count)?);
        let whole = (count(range.len())?, count(queries)?);
        let (mut width, mut row0) = (int(rows.width)?, int(range.start)?);
        let (mut queries, mut kv, mut parts) = (int(queries)?, int(kv)?, int(rows.parts)?);
        let (mut d, mut window) = (int(dim)?, int(scores.window.unwrap_or(0))?);
        let (mut scale, mut cap) = (scores.scale, scores.cap.unwrap_or(0.0));
        let (mut q, mut keys, mut values, mut out) = (q.at, self.keys.at, self.values.at, out.at);
        let (mut positions, mut sequences, mut tables) = (rows.numbers.at, rows.number(SEQUENCES), rows.tables.at);
        let mut tiles = rows.number(TILES) + (2 * tile * size_of::<i32>()) as u64;
        let (mut sums, mut scales) = (partials.sums.at, partials.scales.at);
        let mut args = [
            arg(&mut q),
            arg(&mut keys),
            arg(&mut values),
            arg(&mut positions),
            arg(&mut sequences),
            arg(&mut tables),
            arg(&mut width),
            arg(&mut tiles),
            arg(&mut row0),
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
            arg(&mut row0),
            arg(&mut queries),
            arg(&mut parts),
            arg(&mut d),
            arg(&mut window),
        ];
        // SAFETY: the arguments are those of `attention_merge`, and what it reads was written by the launch before.
        unsafe { gpu.launch("attention_merge", whole, count(dim)?, &mut args) }
    }
}
