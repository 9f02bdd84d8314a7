//! Typed calls of the kernels.

#![expect(unsafe_code, reason = "kernels take pointers")]

use std::ffi::c_void;

use half::bf16;

use crate::gpu::{Buffer, Error, Gpu};

/// Inputs that a matrix product takes at once: rows are whole steps.
pub const STEP: usize = 32;

/// Threads of most blocks.
pub(crate) const THREADS: u32 = 256;

/// Threads of a norm's: few elements each, since one block has the whole row.
const NORM_THREADS: u32 = 1024;

/// What the gate of an MLP goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its approximation with tanh (Hendrycks and Gimpel 2016).
    GeluTanh,
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

/// From few rows to many; all give a row the same bits.
const TILES: [Tile; 4] =
    [Tile("linear_8", 8, 16), Tile("linear_16", 16, 16), Tile("linear_32", 32, 32), Tile("linear_64", 64, 16)];

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

    /// `out = x · wᵀ (+ bias)`, or added to what `out` has: `[rows, inputs]` to `[rows, outputs]`.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn apply(
        &self,
        gpu: &Gpu,
        x: &Buffer<bf16>,
        out: &mut Buffer<f32>,
        rows: usize,
        add: bool,
    ) -> Result<(), Error> {
        fits("the input", x.len(), rows.checked_mul(self.inputs))?;
        fits("the output", out.len(), rows.checked_mul(self.outputs))?;
        if rows == 0 {
            return Ok(());
        }
        let last = TILES.len() - 1;
        let Tile(name, tile, wide) = &TILES[TILES.iter().position(|Tile(_, tile, _)| *tile >= rows).unwrap_or(last)];
        let (mut n, mut k, mut m, mut adds) = (int(self.outputs)?, int(self.inputs)?, int(rows)?, i32::from(add));
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
        ];
        let grid = (count(self.outputs.div_ceil(*wide))?, count(rows.div_ceil(*tile))?);
        // SAFETY: the arguments are those of `linear_*`, and the lengths were checked.
        unsafe { gpu.launch(name, grid, THREADS, &mut args) }
    }
}

impl Gpu {
    /// Root-mean-square norm of each row of `weight.len()` values, rounded to bf16.
    ///
    /// # Errors
    /// When a buffer is too short, or the driver refuses.
    pub fn rms_norm(
        &self,
        x: &Buffer<f32>,
        weight: &Buffer<f32>,
        eps: f32,
        out: &mut Buffer<bf16>,
        rows: usize,
    ) -> Result<(), Error> {
        let need = rows.checked_mul(weight.len());
        fits("the input", x.len(), need)?;
        fits("the output", out.len(), need)?;
        if rows == 0 {
            return Ok(());
        }
        let (mut n, mut eps) = (int(weight.len())?, eps);
        let (mut x, mut weight, mut out) = (x.at, weight.at, out.at);
        let mut args = [arg(&mut x), arg(&mut weight), arg(&mut out), arg(&mut n), arg(&mut eps)];
        // SAFETY: the arguments are those of `rms_norm`, and the lengths were checked.
        unsafe { self.launch("rms_norm", (count(rows)?, 1), NORM_THREADS, &mut args) }
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
        let blocks = (rows * n).div_ceil(THREADS as usize).min(1 << 16);
        if blocks == 0 {
            return Ok(());
        }
        let (mut m, mut n, mut gelu) = (int(rows)?, int(n)?, i32::from(gate == Gate::GeluTanh));
        let (mut x, mut out) = (x.at, out.at);
        let mut args = [arg(&mut x), arg(&mut out), arg(&mut m), arg(&mut n), arg(&mut gelu)];
        // SAFETY: the arguments are those of `gate_mul`, and the lengths were checked.
        unsafe { self.launch("gate_mul", (count(blocks)?, 1), THREADS, &mut args) }
    }
}
