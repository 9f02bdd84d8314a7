//! The kernels as candle custom ops on f32 tensors of shape `[rows, width]`.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::matmul::matmul;
use crate::ops::{self, Gate};
use crate::packed::{NotFinite, Packed, Part};
use crate::pool::Pool;
use crate::simd::Isa;

/// The threads and the instruction set that a model's ops use.
#[derive(Clone)]
pub struct Compute {
    pool: Arc<Mutex<Pool>>,
    isa: Isa,
}

impl Compute {
    /// Ops on so many threads, the caller's included.
    pub fn new(threads: usize, isa: Isa) -> Self {
        Self { pool: Arc::new(Mutex::new(Pool::new(threads))), isa }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Packs matrices, on all threads.
    ///
    /// # Errors
    /// As [`Packed::new`].
    pub fn packed(&self, parts: &[Part<'_>], k: usize) -> std::result::Result<Packed, NotFinite> {
        Packed::new(&mut self.pool.lock().unwrap_or_else(PoisonError::into_inner), parts, k)
    }

    /// Runs `task(i)` for every `i` in `0..tasks` on all threads.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).run(tasks, task);
    }
}

/// The values of a contiguous f32 tensor.
///
/// # Errors
/// When it is of another type or not contiguous.
pub fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("this op takes a contiguous f32 tensor"),
    }
}

/// `x · wᵀ (+ bias)`: `[rows, k]` to `[rows, n]`.
pub struct Linear {
    /// The weights.
    pub weights: Arc<Packed>,
    /// One value per output.
    pub bias: Option<Vec<f32>>,
    /// Where it runs.
    pub compute: Compute,
}

impl Linear {
    /// Applies it.
    ///
    /// # Errors
    /// When the width of `x` is not `k`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }

    /// Applies it to plain rows.
    pub fn rows(&self, x: &[f32], out: &mut [f32]) {
        let mut pool = self.compute.pool.lock().unwrap_or_else(PoisonError::into_inner);
        matmul(&mut pool, self.compute.isa, x, &self.weights, out);
        drop(pool);
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len()) {
                ops::add(row, bias);
            }
        }
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (rows, k) = layout.shape().dims2()?;
        if k != self.weights.k() {
            bail!("a row of {k} values meets weights of {}", self.weights.k());
        }
        let mut out = vec![0.0; rows * self.weights.n()];
        self.rows(x, &mut out);
        Ok((CpuStorage::F32(out), Shape::from((rows, self.weights.n()))))
    }
}

/// RMS norm of each row.
pub struct RmsNorm {
    /// One value per column.
    pub weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// Where it runs.
    pub isa: Isa,
}

impl RmsNorm {
    /// Applies it.
    ///
    /// # Errors
    /// When the width of `x` is not the weight's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }

    /// Applies it to plain rows.
    pub fn rows(&self, x: &[f32], out: &mut [f32]) {
        ops::rms_norm(self.isa, x, &self.weight, self.eps, out);
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (_, width) = layout.shape().dims2()?;
        if width != self.weight.len() {
            bail!("a row of {width} values meets a norm of {}", self.weight.len());
        }
        let mut out = vec![0.0; x.len()];
        self.rows(x, &mut out);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// `act(gate) * up` of rows that hold gate and up side by side: `[rows, 2n]` to `[rows, n]`.
#[derive(Clone, Copy)]
pub struct GateMul {
    /// What the gate goes through.
    pub gate: Gate,
    /// Where it runs.
    pub isa: Isa,
}

impl GateMul {
    /// Applies it.
    ///
    /// # Errors
    /// When the width is odd.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for GateMul {
    fn name(&self) -> &'static str {
        "gate-mul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (rows, width) = layout.shape().dims2()?;
        if width % 2 != 0 {
            bail!("{width} values are not gate and up");
        }
        let half = width / 2;
        let mut out = vec![0.0; rows * half];
        ops::gate_mul(self.isa, self.gate, x, half, &mut out);
        Ok((CpuStorage::F32(out), Shape::from((rows, half))))
    }
}
