//! The kernels as the parts of a model, on plain rows of f32: values of one row are neighbours.

#![expect(unsafe_code, reason = "threads write disjoint rows of one output")]

use std::sync::{Arc, Mutex, PoisonError};

use crate::matmul::matmul;
use crate::ops::{self, Gate};
use crate::packed::{NotFinite, Packed, Part};
use crate::pool::{Pool, SharedOut};
use crate::simd::Isa;

/// Values of a stripe, which one task takes of an operation that treats each row alone.
const STRIPE: usize = 1 << 14;

/// The threads and the instruction set that a model's operations use.
#[derive(Clone)]
pub struct Compute {
    pool: Arc<Mutex<Pool>>,
    isa: Isa,
}

impl Compute {
    /// Operations on so many threads, the caller's included.
    pub fn new(threads: usize, isa: Isa) -> Self {
        Self { pool: Arc::new(Mutex::new(Pool::new(threads))), isa }
    }

    /// Computes with so many threads from now on, here and in its clones. What is computed stays the same.
    pub fn set_threads(&self, threads: usize) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.threads() != threads.max(1) {
            *pool = Pool::new(threads);
        }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Packs matrices, on all threads.
    ///
    /// # Errors
    /// As [`Packed::new`].
    pub fn packed(&self, parts: &[Part<'_>], k: usize) -> Result<Packed, NotFinite> {
        Packed::new(&mut self.pool.lock().unwrap_or_else(PoisonError::into_inner), self.isa, parts, k)
    }

    /// Runs `task(i)` for every `i` in `0..tasks` on all threads.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).run(tasks, task);
    }

    /// Calls `each` with stripes of whole rows of `width` values and the number of their first row, on all threads.
    ///
    /// # Panics
    /// When there are no whole rows.
    pub fn stripes<T: Send>(&self, rows: &mut [T], width: usize, each: &(dyn Fn(usize, &mut [T]) + Sync)) {
        assert!(rows.len().is_multiple_of(width), "{} values are not rows of {width}", rows.len());
        let (count, stripe) = (rows.len() / width, (STRIPE / width).max(1));
        if count <= stripe {
            return each(0, rows);
        }
        let out = SharedOut::new(rows);
        self.run(count.div_ceil(stripe), &|task| {
            let (first, end) = (task * stripe, count.min((task + 1) * stripe));
            // SAFETY: these rows belong to this task alone.
            each(first, unsafe { out.part(first * width..end * width) });
        });
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
    /// # Panics
    /// When the lengths do not fit.
    pub fn rows(&self, x: &[f32], out: &mut [f32]) {
        let mut pool = self.compute.pool.lock().unwrap_or_else(PoisonError::into_inner);
        matmul(&mut pool, self.compute.isa, x, &self.weights, out);
        drop(pool);
        if let Some(bias) = &self.bias {
            self.compute.stripes(out, bias.len(), &|_, rows| {
                rows.chunks_exact_mut(bias.len()).for_each(|row| ops::add(self.compute.isa, row, bias, 1.0));
            });
        }
    }

    /// Bytes that it has in memory.
    pub fn held(&self) -> u64 {
        self.weights.held() + self.bias.as_ref().map_or(0, |bias| size_of_val(&bias[..]) as u64)
    }
}

/// RMS norm of each row.
pub struct RmsNorm {
    /// One value per column.
    pub weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// Where it runs.
    pub compute: Compute,
}

impl RmsNorm {
    /// Applies it.
    pub fn rows(&self, x: &[f32], out: &mut [f32]) {
        let width = self.weight.len();
        self.compute.stripes(out, width, &|first, out| self.few(&x[first * width..][..out.len()], out));
    }

    /// Applies it to a few rows, on this thread.
    pub fn few(&self, x: &[f32], out: &mut [f32]) {
        ops::rms_norm(self.compute.isa, x, &self.weight, self.eps, out);
    }
}

/// `act(gate) * up` of rows that hold gate and up side by side: `[rows, 2n]` to `[rows, n]`.
#[derive(Clone)]
pub struct GateMul {
    /// What the gate goes through.
    pub gate: Gate,
    /// Where it runs.
    pub compute: Compute,
}

impl GateMul {
    /// Applies it to rows of `n` values each.
    pub fn rows(&self, x: &[f32], n: usize, out: &mut [f32]) {
        self.compute.stripes(out, n, &|first, out| {
            ops::gate_mul(self.compute.isa, self.gate, &x[2 * first * n..][..2 * out.len()], n, out);
        });
    }
}
