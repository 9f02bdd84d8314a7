//! Typed calls of the kernels.

#![expect(unsafe_code, reason = "kernels take pointers")]

use std::ffi::c_void;

use half::bf16;

use crate::attention::{Heads, Rows};
use crate::gpu::{Block, Buffer, Error, Gpu, ROOMY};

/// Inputs that a matrix product takes at once: rows are whole steps.
pub const STEP: usize = 32;

/// Threads of most blocks.
pub(crate) const THREADS: u32 = 256;

/// Most threads of a norm's: few elements each, since one block has the whole row.
const NORM_THREADS: usize = 1024;

/// Threads of a norm over so many values.
fn norm_threads(values: usize) -> u32 {
    values.next_multiple_of(32).min(NORM_THREADS) as u32
}

/// What the gate of an MLP goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its approximation with tanh (Hendrycks and Gimpel 2016).
    GeluTanh,
}

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Onto {
    /// It replaces what is there.
    Over,
    /// So many times of it are added to what is there.
    Added(f32),
}

impl Onto {
    fn args(self) -> (i32, f32) {
        match self {
            Self::Over => (0, 1.0),
            Self::Added(factor) => (1, factor),
        }
    }
}

/// A weight matrix on the GPU: `[outputs, inputs]` in bf16, and one f32 per output where it has biases.
pub struct Linear {
    weights: Buffer<bf16>,
    bias: Option<Buffer<f32>>,
    outputs: usize,
    inputs: usize,
}

/// A kernel of the matrix product: its name, rows and outputs of a block.
struct Tile(&'static str, usize, usize);

/// For few rows, ascending; all kernels give a row the same bits.
const TILES: [Tile; 4] =
    [Tile("linear_8", 8, 16), Tile("linear_16", 16, 16), Tile("linear_32", 32, 32), Tile("linear_64", 64, 16)];

/// Rows and outputs of a block of the kernels for more rows.
const MANY: usize = 128;

pub(crate) fn int(value: usize) -> Result<i32, Error> {
    i32::try_from(value).map_err(|_| Error::Shape(format!("{value} is more than a kernel counts to")))
}

/// A size of a grid or a block.
pub(crate) fn count(value: usize) -> Result<u32, Error> {
    int(value).map(i32::cast_unsigned)
}

pub(crate) fn fits(what: &str, have: usize, need: Option<usize>) -> Result<(), Error> {
    match need {
        Some(need) if need <= have => Ok(()),
        _ => Err(Error::Shape(format!("{what} has {have} values, too few for what is asked"))),
    }
}

pub(crate) fn arg<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

impl Linear {
    /// Takes weights, row-major, and biases over, once they are written: kernels read them before the work before is done.
    ///
    /// # Errors
    /// When rows are not whole steps, or the lengths do not fit each other, or work before fails.
    pub fn new(gpu: &Gpu, weights: Buffer<bf16>, bias: Option<Buffer<f32>>, inputs: usize) -> Result<Self, Error> {
        if inputs == 0 || !inputs.is_multiple_of(STEP) || weights.is_empty() || !weights.len().is_multiple_of(inputs) {
            let problem = format!("{} weights are not rows of {inputs} in steps of {STEP}", weights.len());
            return Err(Error::Shape(problem));
        }
        let outputs = weights.len() / inputs;
        if let Some(bias) = &bias
            && bias.len() != outputs
        {
            return Err(Error::Shape(format!("{} biases meet {outputs} outputs", bias.len())));
        }
        gpu.wait()?;
        Ok(Self { weights, bias, outputs, inputs })
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes of it.
    pub fn held(&self) -> usize {
        self.weights.len() * size_of::<bf16>() + self.bias.as_ref().map_or(0, |bias| bias.len() * size_of::<f32>())
    }

    /// `x · wᵀ (+ bias)`: `[rows, inputs]` to `[rows, outputs]`.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn apply(
        &self,
        gpu: &Gpu,
        x: &Buffer<bf16>,
        out: &mut Buffer<f32>,
        rows: usize,
        onto: Onto,
    ) -> Result<(), Error> {
        fits("the input", x.len(), rows.checked_mul(self.inputs))?;
        fits("the output", out.len(), rows.checked_mul(self.outputs))?;
        if rows == 0 {
            return Ok(());
        }
        let (mut n, mut k, mut m) = (int(self.outputs)?, int(self.inputs)?, int(rows)?);
        let (mut adds, mut factor) = onto.args();
        let (mut x, mut w, mut out) = (x.at, self.weights.at, out.at);
        let mut bias = self.bias.as_ref().map_or(0, |bias| bias.at);
        let mut args = [
            arg(&mut x),
            arg(&mut w),
            arg(&mut bias),
            arg(&mut out),
            arg(&mut m),
            arg(&mut n),
            arg(&mut k),
            arg(&mut adds),
            arg(&mut factor),
        ];
        let (name, grid, block) = match TILES.iter().find(|Tile(_, tile, _)| *tile >= rows) {
            Some(Tile(name, _, wide)) => (*name, (count(self.outputs.div_ceil(*wide))?, 1), THREADS.into()),
            None => {
                let grid = (count(rows.div_ceil(MANY))?, count(self.outputs.div_ceil(MANY))?);
                if gpu.is_roomy() {
                    (ROOMY.0, grid, Block { threads: 128, shared: ROOMY.1 })
                } else {
                    ("linear_128_near", grid, Block { threads: THREADS, shared: 48 << 10 })
                }
            }
        };
        // SAFETY: the arguments are those of `linear_*`, and the lengths were checked.
        unsafe { gpu.launch(name, grid, block, &mut args) }
    }
}

impl Linear {
    /// Rows of the matrix, as an embedding's, times a factor: `[rows, inputs]`.
    ///
    /// # Errors
    /// When there is no such row, the buffer is too short, or the driver refuses.
    pub fn embed(&self, gpu: &Gpu, rows: &Rows, factor: f32, out: &mut Buffer<f32>) -> Result<(), Error> {
        fits("the table", self.outputs, Some(rows.tokens_end()))?;
        fits("the output", out.len(), rows.count().checked_mul(self.inputs))?;
        let (mut n, mut factor) = (int(self.inputs)?, factor);
        let (mut table, mut tokens, mut out) = (self.weights.at, rows.tokens_at(), out.at);
        let mut args = [arg(&mut table), arg(&mut tokens), arg(&mut out), arg(&mut n), arg(&mut factor)];
        // SAFETY: the arguments are those of `embed`; lengths and tokens were checked.
        unsafe { gpu.launch("embed", (count(rows.count())?, 1), THREADS, &mut args) }
    }
}

/// Matrices of the same sizes on the GPU, below each other: `[experts, outputs, inputs]`.
pub struct Experts {
    weights: Buffer<bf16>,
    experts: usize,
    outputs: usize,
    inputs: usize,
}

impl Experts {
    /// Takes the weights of so many matrices over.
    ///
    /// # Errors
    /// As [`Linear::new`].
    pub fn new(gpu: &Gpu, weights: Buffer<bf16>, experts: usize, inputs: usize) -> Result<Self, Error> {
        let row = experts.saturating_mul(inputs);
        if row == 0 || !inputs.is_multiple_of(STEP) || weights.is_empty() || !weights.len().is_multiple_of(row) {
            let problem = format!("{} weights are not {experts} matrices of rows of {inputs}", weights.len());
            return Err(Error::Shape(problem));
        }
        gpu.wait()?;
        Ok(Self { outputs: weights.len() / row, weights, experts, inputs })
    }

    /// Bytes of them.
    pub fn held(&self) -> usize {
        self.weights.len() * size_of::<bf16>()
    }

    /// The product of each pick: `[rows, inputs]` to `[rows, picked, outputs]`, where a row of `x` serves all picks of a row
    /// (`shared`), or each its own.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn apply(
        &self,
        gpu: &Gpu,
        x: &Buffer<bf16>,
        shared: Shared,
        picks: &Picks,
        out: &mut Buffer<f32>,
        rows: usize,
    ) -> Result<(), Error> {
        if picks.of != self.experts {
            return Err(Error::Shape(format!("picks of {} experts meet {}", picks.of, self.experts)));
        }
        let pairs = rows.saturating_mul(picks.picked);
        let (inputs, share) = match shared {
            Shared::ByPicks => (rows, picks.picked),
            Shared::Not => (pairs, 1),
        };
        fits("the picks", picks.experts.len(), Some(pairs))?;
        fits("the input", x.len(), inputs.checked_mul(self.inputs))?;
        fits("the output", out.len(), pairs.checked_mul(self.outputs))?;
        let (mut n, mut k, mut share) = (int(self.outputs)?, int(self.inputs)?, int(share)?);
        let (mut x, mut w, mut experts, mut out) = (x.at, self.weights.at, picks.experts.at, out.at);
        let mut args =
            [arg(&mut x), arg(&mut w), arg(&mut experts), arg(&mut out), arg(&mut share), arg(&mut n), arg(&mut k)];
        let grid = (count(self.outputs.div_ceil(16))?, count(pairs)?);
        // SAFETY: the arguments are those of `linear_experts`; lengths were checked, and picks are below the number of experts.
        unsafe { gpu.launch("linear_experts", grid, THREADS, &mut args) }
    }
}

/// Whose a row of the input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// All picks of a row.
    ByPicks,
    /// One pick.
    Not,
}

/// The experts that were picked for each row, and their shares.
pub struct Picks {
    experts: Buffer<i32>,
    shares: Buffer<f32>,
    of: usize,
    picked: usize,
}

impl Picks {
    /// Room for the picks of so many rows: `picked` of `of` experts each.
    ///
    /// # Errors
    /// When more are picked than there are, or there is no memory.
    pub fn new(gpu: &Gpu, rows: usize, of: usize, picked: usize) -> Result<Self, Error> {
        if picked == 0 || picked > of {
            return Err(Error::Shape(format!("{picked} of {of} experts cannot be picked")));
        }
        let all = rows.saturating_mul(picked);
        Ok(Self { experts: gpu.zeroed(all)?, shares: gpu.zeroed(all)?, of, picked })
    }

    /// How many are picked for a row.
    pub fn picked(&self) -> usize {
        self.picked
    }

    /// Picks by scores of `[rows, of]`; `normalised` shares have the sum one.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn set(&mut self, gpu: &Gpu, scores: &Buffer<f32>, normalised: bool, rows: usize) -> Result<(), Error> {
        fits("the scores", scores.len(), rows.checked_mul(self.of))?;
        fits("the picks", self.experts.len(), rows.checked_mul(self.picked))?;
        let (mut n, mut picked, mut normalised) = (int(self.of)?, int(self.picked)?, i32::from(normalised));
        let (mut scores, mut experts, mut shares) = (scores.at, self.experts.at, self.shares.at);
        let mut args = [
            arg(&mut scores),
            arg(&mut experts),
            arg(&mut shares),
            arg(&mut n),
            arg(&mut picked),
            arg(&mut normalised),
        ];
        // SAFETY: the arguments are those of `pick_experts`, and the lengths were checked.
        unsafe { gpu.launch("pick_experts", (count(rows)?, 1), 32, &mut args) }
    }

    /// The picks' rows of `n` values times their shares, summed: `[rows, picked, n]` to `[rows, n]`.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn sum(
        &self,
        gpu: &Gpu,
        x: &Buffer<f32>,
        out: &mut Buffer<f32>,
        rows: usize,
        n: usize,
        onto: Onto,
    ) -> Result<(), Error> {
        let pairs = rows.checked_mul(self.picked);
        fits("the input", x.len(), pairs.and_then(|pairs| pairs.checked_mul(n)))?;
        fits("the output", out.len(), rows.checked_mul(n))?;
        fits("the picks", self.shares.len(), pairs)?;
        let (mut adds, mut factor) = onto.args();
        let (mut n, mut picked) = (int(n)?, int(self.picked)?);
        let (mut x, mut shares, mut out) = (x.at, self.shares.at, out.at);
        let mut args = [
            arg(&mut x),
            arg(&mut shares),
            arg(&mut out),
            arg(&mut n),
            arg(&mut picked),
            arg(&mut adds),
            arg(&mut factor),
        ];
        // SAFETY: the arguments are those of `sum_experts`, and the lengths were checked.
        unsafe { gpu.launch("sum_experts", (count(rows)?, 1), THREADS, &mut args) }
    }
}

/// A root-mean-square norm: `x / sqrt(mean(x²) + eps) * weight` (Zhang and Sennrich 2019) of rows as long as its weights.
pub struct Norm {
    weight: Buffer<f32>,
    real: usize,
    eps: f32,
}

impl Norm {
    /// Takes the weights over. The mean is that of `real` values: what pads a row beyond them is zero.
    ///
    /// # Errors
    /// When there are not so many.
    pub fn new(weight: Buffer<f32>, real: usize, eps: f32) -> Result<Self, Error> {
        if real == 0 || real > weight.len() {
            return Err(Error::Shape(format!("{} weights of a norm of {real} values", weight.len())));
        }
        Ok(Self { weight, real, eps })
    }

    /// Values that are not padding.
    pub fn real(&self) -> usize {
        self.real
    }

    /// Bytes of it.
    pub fn held(&self) -> usize {
        self.weight.len() * size_of::<f32>()
    }

    /// Of each row, rounded to bf16.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn apply(&self, gpu: &Gpu, x: &Buffer<f32>, out: &mut Buffer<bf16>, rows: usize) -> Result<(), Error> {
        fits("the input", x.len(), rows.checked_mul(self.weight.len()))?;
        fits("the output", out.len(), rows.checked_mul(self.weight.len()))?;
        self.launch(gpu, "rms_norm", x.at, out.at, 0, rows)
    }

    /// Of the picked rows, rounded to bf16.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn picked(&self, gpu: &Gpu, x: &Buffer<f32>, rows: &Rows, out: &mut Buffer<bf16>) -> Result<(), Error> {
        fits("the input", x.len(), rows.count().checked_mul(self.weight.len()))?;
        fits("the output", out.len(), rows.picks().checked_mul(self.weight.len()))?;
        self.launch(gpu, "rms_norm", x.at, out.at, rows.picks_at(), rows.picks())
    }

    /// Of the picked rows, without what pads them.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn states(&self, gpu: &Gpu, x: &Buffer<f32>, rows: &Rows, out: &mut Buffer<f32>) -> Result<(), Error> {
        fits("the input", x.len(), rows.count().checked_mul(self.weight.len()))?;
        fits("the output", out.len(), rows.picks().checked_mul(self.real))?;
        self.launch(gpu, "rms_norm_f32", x.at, out.at, rows.picks_at(), rows.picks())
    }

    fn launch(&self, gpu: &Gpu, kernel: &str, x: u64, out: u64, picks: u64, rows: usize) -> Result<(), Error> {
        if rows == 0 {
            return Ok(());
        }
        let (mut n, mut real, mut eps) = (int(self.weight.len())?, int(self.real)?, self.eps);
        let (mut x, mut weight, mut out, mut picks) = (x, self.weight.at, out, picks);
        let mut args =
            [arg(&mut x), arg(&mut weight), arg(&mut out), arg(&mut picks), arg(&mut n), arg(&mut real), arg(&mut eps)];
        // SAFETY: the arguments are those of `rms_norm` and `rms_norm_f32`; the callers checked the lengths, and picks are rows.
        unsafe { gpu.launch(kernel, (count(rows)?, 1), norm_threads(self.weight.len()), &mut args) }
    }

    /// Of each row, times a factor and added to `out`.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn add(
        &self,
        gpu: &Gpu,
        x: &Buffer<f32>,
        out: &mut Buffer<f32>,
        rows: usize,
        factor: f32,
    ) -> Result<(), Error> {
        fits("the input", x.len(), rows.checked_mul(self.weight.len()))?;
        fits("the output", out.len(), rows.checked_mul(self.weight.len()))?;
        let (mut n, mut real, mut eps, mut factor) = (int(self.weight.len())?, int(self.real)?, self.eps, factor);
        let (mut x, mut weight, mut out) = (x.at, self.weight.at, out.at);
        let mut args = [
            arg(&mut x),
            arg(&mut weight),
            arg(&mut out),
            arg(&mut n),
            arg(&mut real),
            arg(&mut eps),
            arg(&mut factor),
        ];
        // SAFETY: the arguments are those of `rms_norm_add`, and the lengths were checked.
        unsafe { gpu.launch("rms_norm_add", (count(rows)?, 1), norm_threads(self.weight.len()), &mut args) }
    }
}

/// The norms of queries and keys: of each head, or of all heads together, by the length of their weights.
pub struct QkNorm {
    /// Of queries.
    pub q: Norm,
    /// Of keys.
    pub k: Norm,
}

impl QkNorm {
    /// In place, of rows of queries, keys and values.
    ///
    /// # Errors
    /// When the sizes do not fit each other, or the driver refuses.
    pub fn apply(&self, gpu: &Gpu, heads: Heads, qkv: &mut Buffer<f32>, rows: usize) -> Result<(), Error> {
        let Heads { queries, kv, dim } = heads;
        let (q_len, k_len) = (self.q.weight.len(), self.k.weight.len());
        if !(queries * dim).is_multiple_of(q_len) || !(kv * dim).is_multiple_of(k_len) {
            return Err(Error::Shape(format!("norms of {q_len} and {k_len} values meet {heads:?}")));
        }
        let width = (queries + 2 * kv) * dim;
        fits("q, k and v", qkv.len(), rows.checked_mul(width))?;
        let (q_count, k_count) = (queries * dim / q_len, kv * dim / k_len);
        let threads = norm_threads(q_len.max(k_len));
        let (mut width, mut count_q, mut q_len, mut k_len) = (int(width)?, int(q_count)?, int(q_len)?, int(k_len)?);
        let (mut q_real, mut k_real, mut eps) = (int(self.q.real)?, int(self.k.real)?, self.q.eps);
        let (mut x, mut wq, mut wk) = (qkv.at, self.q.weight.at, self.k.weight.at);
        let mut args = [
            arg(&mut x),
            arg(&mut wq),
            arg(&mut wk),
            arg(&mut width),
            arg(&mut count_q),
            arg(&mut q_len),
            arg(&mut q_real),
            arg(&mut k_len),
            arg(&mut k_real),
            arg(&mut eps),
        ];
        // SAFETY: the arguments are those of `qk_norm`, and the lengths were checked.
        unsafe { gpu.launch("qk_norm", (count(rows)?, count(q_count + k_count)?), threads, &mut args) }
    }
}

/// Blocks of a kernel that takes its values one by one.
fn blocks(values: usize) -> u32 {
    values.div_ceil(THREADS as usize).min(1 << 16) as u32
}

impl Gpu {
    /// Rounds the first `n` values to bf16.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn round(&self, x: &Buffer<f32>, out: &mut Buffer<bf16>, n: usize) -> Result<(), Error> {
        fits("the input", x.len(), Some(n))?;
        fits("the output", out.len(), Some(n))?;
        let (mut x, mut out, grid, mut n) = (x.at, out.at, blocks(n), int(n)?);
        let mut args = [arg(&mut x), arg(&mut out), arg(&mut n)];
        // SAFETY: the arguments are those of `round_bf16`, and the lengths were checked.
        unsafe { self.launch("round_bf16", (grid, 1), THREADS, &mut args) }
    }

    /// Scales the first `n` values, and bends them towards a bound if there is one.
    ///
    /// # Errors
    /// When the buffer is too short, or the driver refuses.
    pub fn bend(&self, x: &mut Buffer<f32>, n: usize, factor: f32, cap: Option<f32>) -> Result<(), Error> {
        fits("the values", x.len(), Some(n))?;
        let (mut x, grid, mut n, mut factor, mut cap) = (x.at, blocks(n), int(n)?, factor, cap.unwrap_or(0.0));
        let mut args = [arg(&mut x), arg(&mut n), arg(&mut factor), arg(&mut cap)];
        // SAFETY: the arguments are those of `bend`, and the length was checked.
        unsafe { self.launch("bend", (grid, 1), THREADS, &mut args) }
    }

    /// Whether all values are numbers, and finite.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn is_finite(&self, values: &Buffer<bf16>) -> Result<bool, Error> {
        let flag = self.zeroed::<i32>(1)?;
        let (mut x, grid, mut n, mut at) = (values.at, blocks(values.len()).max(1), values.len(), flag.at);
        let mut args = [arg(&mut x), arg(&mut n), arg(&mut at)];
        // SAFETY: the arguments are those of `find_not_finite`.
        unsafe { self.launch("find_not_finite", (grid, 1), THREADS, &mut args)? };
        Ok(self.download(&flag)? == [0])
    }

    /// `act(gate) * up` of rows that hold `n` gates and then `n` ups, rounded to bf16: `[rows, 2n]` to `[rows, n]`.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn gate_mul(
        &self,
        gate: Gate,
        x: &Buffer<f32>,
        out: &mut Buffer<bf16>,
        rows: usize,
        n: usize,
    ) -> Result<(), Error> {
        let need = rows.checked_mul(n);
        fits("the input", x.len(), need.and_then(|need| need.checked_mul(2)))?;
        fits("the output", out.len(), need)?;
        let grid = blocks(rows * n);
        if grid == 0 {
            return Ok(());
        }
        let (mut m, mut n, mut gelu) = (int(rows)?, int(n)?, i32::from(gate == Gate::GeluTanh));
        let (mut x, mut out) = (x.at, out.at);
        let mut args = [arg(&mut x), arg(&mut out), arg(&mut m), arg(&mut n), arg(&mut gelu)];
        // SAFETY: the arguments are those of `gate_mul`, and the lengths were checked.
        unsafe { self.launch("gate_mul", (grid, 1), THREADS, &mut args) }
    }
}
