//! Matrix product with weights that are packed once: `out[m, n] = x[m, k] · w[n, k]ᵀ`, all sums in f32.
//!
//! Every output element is one chain of fused multiply-adds over k in ascending order, whatever the number of
//! rows, threads or lanes. So a row's bits are the same alone and among others, and the same on AVX-512,
//! AVX2+FMA and the scalar path: a fused multiply-add rounds once, everywhere. Lanes are output columns. Quantized weights
//! are widened in registers: the product is that with the f32 weights they stand for, bit for bit.

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use crate::packed::{Data, PANEL, Packed, Plain, Stored, VECTORS};
use crate::pool::{Pool, SharedOut};
use crate::quantized::{Q4K, Q8, Quantization};
use crate::simd::{Isa, Kernel, LANES, Lanes, dispatch};

/// Multiply-adds below which a product is left to the calling thread: about 100 microseconds of one core.
const SMALL: usize = 1 << 21;

/// Multiply-adds of one task: enough to be worth handing out.
const TASK: usize = 1 << 20;

/// `out[m, n] = x[m, k] · wᵀ`, columns shared out over the pool's threads.
///
/// # Panics
/// When the lengths do not fit the shapes, or this machine does not have `isa`.
pub fn matmul(pool: &mut Pool, isa: Isa, x: &[f32], w: &Packed, out: &mut [f32]) {
    let (n, k) = (w.n, w.k);
    let m = x.len() / k;
    assert!(x.len() == m * k && out.len() == m * n, "matmul of {} by {n} x {k} into {}", x.len(), out.len());
    assert!(isa.is_here(), "this machine has no {isa:?}");
    let panels = n.div_ceil(PANEL);
    let per_task = (TASK / (k * PANEL * m.max(1))).clamp(1, panels).max(panels.div_ceil(pool.threads() * 8));
    // Waking a thread costs more than a small product.
    let per_task = if m * n * k < SMALL { panels } else { per_task };
    let out = SharedOut::new(out);
    pool.run(panels.div_ceil(per_task), &|task| {
        let panels = task * per_task..((task + 1) * per_task).min(panels);
        // SAFETY: tasks have disjoint panels, hence disjoint columns of `out`, which outlives the call; the lengths and
        // the instruction set were checked above, and a packed matrix has whole panels.
        unsafe {
            let part = Part { x, m, n, k, panels, out: out.start() };
            match &w.data {
                Data::F32(data) => dispatch(isa, Columns { part, w: Plain { data, k } }),
                Data::F16(data) => dispatch(isa, Columns { part, w: Plain { data, k } }),
                Data::Bf16(data) => dispatch(isa, Columns { part, w: Plain { data, k } }),
                Data::Quantized(Quantization::Q8_0, data) => dispatch(isa, Columns { part, w: Q8 { data, k } }),
                Data::Quantized(Quantization::Q4K, data) => dispatch(isa, Columns { part, w: Q4K { data, k } }),
            }
        }
    });
}

/// All rows of some panels. `x` is `[m, k]`, `out` points to `[m, n]`, of which nobody else touches these columns.
struct Part<'a> {
    x: &'a [f32],
    m: usize,
    n: usize,
    k: usize,
    panels: std::ops::Range<usize>,
    out: *mut f32,
}

struct Columns<'a, S> {
    part: Part<'a>,
    w: S,
}

impl<S: Stored> Kernel for Columns<'_, S> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for panel in self.part.panels.clone() {
            let mut row = 0;
            while row < self.part.m {
                // SAFETY: the rows are within `x`, the panel within `w`.
                row += unsafe {
                    match self.part.m - row {
                        6.. if L::WIDE => self.block::<L, 6, VECTORS>(row, panel),
                        4.. if L::WIDE => self.block::<L, 4, VECTORS>(row, panel),
                        3.. if L::WIDE => self.block::<L, 3, VECTORS>(row, panel),
                        2.. if L::WIDE => self.block::<L, 2, VECTORS>(row, panel),
                        4.. => self.block::<L, 4, 1>(row, panel),
                        2.. => self.block::<L, 2, 2>(row, panel),
                        _ => self.block::<L, 1, VECTORS>(row, panel),
                    }
                };
            }
        }
    }
}

impl<S: Stored> Columns<'_, S> {
    /// `R` rows of one panel, `V` vectors at a time. Returns `R`.
    ///
    /// # Safety
    /// `R` rows from `row` and the panel exist, and `V` divides the panel's vectors.
    #[inline(always)]
    unsafe fn block<L: Lanes, const R: usize, const V: usize>(&self, row: usize, panel: usize) -> usize {
        let Part { x, n, k, out, .. } = &self.part;
        let (n, k) = (*n, *k);
        // SAFETY: the caller's. What is stored lies within row and panel.
        unsafe {
            let x = x.as_ptr().add(row * k);
            for first in (0..VECTORS).step_by(V) {
                let mut sums = [[L::splat(0.0); V]; R];
                for start in (0..k).step_by(self.w.run()) {
                    let at = self.w.at(panel, start / self.w.run());
                    let rows: [*const f32; R] = std::array::from_fn(|r| x.add(r * k + start));
                    let scales: [S::Scale<L>; V] = std::array::from_fn(|v| S::scale::<L>(at, first + v));
                    for i in 0..self.w.run() {
                        let mut weights = [L::splat(0.0); V];
                        for (v, weight) in weights.iter_mut().enumerate() {
                            *weight = S::load(at, i, first + v, scales[v]);
                        }
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let value = L::splat(*rows[r].add(i));
                            for (sum, weight) in sums.iter_mut().zip(weights) {
                                *sum = value.fma(weight, *sum);
                            }
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        let column = panel * PANEL + (first + v) * LANES;
                        let out = out.wrapping_add((row + r) * n + column);
                        if column + LANES <= n {
                            sum.store(out);
                        } else if column < n {
                            let mut last = [0f32; LANES];
                            sum.store(last.as_mut_ptr());
                            std::ptr::copy_nonoverlapping(last.as_ptr(), out, n - column);
                        }
                    }
                }
            }
        }
        R
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::WeightType;
    use crate::testing::{bytes, values};

    const KINDS: [WeightType; 3] = [WeightType::F32, WeightType::F16, WeightType::Bf16];

    #[test]
    fn a_row_has_the_same_bits_alone_among_others_on_any_isa_and_any_threads() {
        for (m, n, k) in [(1, 1, 1), (1, 64, 32), (2, 70, 33), (5, 100, 17), (6, 48, 64), (13, 129, 96), (40, 500, 192)]
        {
            let x = values(m as u32, m * k);
            for kind in KINDS {
                let packed = Packed::new(&[(kind, &bytes(kind, &values(n as u32, n * k)))], k).unwrap();
                let mut want = vec![0.0; m * n];
                matmul(&mut Pool::new(1), Isa::Scalar, &x, &packed, &mut want);
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
                    for threads in [1, 3] {
                        let mut pool = Pool::new(threads);
                        let mut got = vec![0.0; m * n];
                        matmul(&mut pool, isa, &x, &packed, &mut got);
                        assert_eq!(got, want, "{isa:?} {m}x{n}x{k}");
                        for row in 0..m {
                            let mut alone = vec![0.0; n];
                            matmul(&mut pool, isa, &x[row * k..][..k], &packed, &mut alone);
                            assert_eq!(alone, want[row * n..][..n], "{isa:?} {m}x{n}x{k} row {row}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn sums_are_a_chain_of_fused_multiply_adds_and_agree_with_double_precision() {
        let (m, n, k) = (3, 70, 500);
        let (x, w) = (values(1, m * k), values(2, n * k));
        let packed = Packed::new(&[(WeightType::F32, &bytes(WeightType::F32, &w))], k).unwrap();
        let mut got = vec![0.0; m * n];
        matmul(&mut Pool::new(2), Isa::detect(), &x, &packed, &mut got);
        for row in 0..m {
            for column in 0..n {
                let pairs = || (0..k).map(|i| (x[row * k + i], w[column * k + i]));
                let chain = pairs().fold(0f32, |sum, (x, w)| x.mul_add(w, sum));
                let exact: f64 = pairs().map(|(x, w)| f64::from(x) * f64::from(w)).sum();
                let got = got[row * n + column];
                assert_eq!(got.to_bits(), chain.to_bits());
                assert!((f64::from(got) - exact).abs() < 1e-4);
            }
        }
    }
}
