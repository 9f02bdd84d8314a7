//! Matrix product with weights that are packed once: `out[m, n] = x[m, k] · w[n, k]ᵀ`, all sums in f32.
//!
//! Every output element is one chain of fused multiply-adds over k in ascending order, whatever the number of
//! rows, threads or lanes. So a row's bits are the same alone and among others, and the same on AVX-512,
//! AVX2+FMA and the scalar path: a fused multiply-add rounds once, everywhere. Lanes are output columns.
//!
//! Packed form: panels of 64 columns; within a panel, for each k the 64 weights of the columns stand side by side. So a
//! lone row reads one sequential stream, and still has four independent chains of sums.

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use half::{bf16, f16};

use crate::pool::{Pool, SharedOut};
use crate::simd::{Element, Isa, Kernel, LANES, Lanes, dispatch};

/// Columns of a panel.
const PANEL: usize = 64;

/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// Multiply-adds below which a product is left to the calling thread: about 100 microseconds of one core.
const SMALL: usize = 1 << 21;

/// Multiply-adds of one task: enough to be worth handing out.
const TASK: usize = 1 << 20;

/// The type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// 4 bytes each.
    F32,
    /// 2 bytes each, IEEE half.
    F16,
    /// 2 bytes each, upper half of an f32.
    Bf16,
}

impl WeightType {
    /// Bytes of one weight.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

#[derive(Clone, Debug)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A packed weight matrix of `n` outputs by `k` inputs.
#[derive(Clone, Debug)]
pub struct Packed {
    n: usize,
    k: usize,
    data: Data,
}

/// Weights that are not numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite;

/// The values of little-endian bytes as f32, whatever their type.
///
/// # Errors
/// When one is infinite or not a number.
pub fn widen(kind: WeightType, bytes: &[u8]) -> Result<Vec<f32>, NotFinite> {
    fn all<const SIZE: usize>(bytes: &[u8], value: impl Fn([u8; SIZE]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| value(*bytes)).collect()
    }
    let values = match kind {
        WeightType::F32 => all(bytes, f32::from_le_bytes),
        WeightType::F16 => all(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
        WeightType::Bf16 => all(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
    };
    if values.iter().all(|value| value.is_finite()) { Ok(values) } else { Err(NotFinite) }
}

/// Packs matrices of `k` inputs, one below the other; `value` reads one weight, `finite` says whether it is a number.
fn pack<T: Element, const SIZE: usize>(
    parts: &[(WeightType, &[u8])],
    n: usize,
    k: usize,
    value: impl Fn([u8; SIZE]) -> T,
    finite: impl Fn(T) -> bool,
) -> Result<Vec<T>, NotFinite> {
    let mut data = vec![T::default(); n.div_ceil(PANEL) * k * PANEL];
    let rows = parts.iter().flat_map(|(_, bytes)| bytes.chunks_exact(k * SIZE));
    let mut sound = true;
    for (row, bytes) in rows.enumerate() {
        let base = (row / PANEL) * k * PANEL + row % PANEL;
        for (to, bytes) in data[base..].iter_mut().step_by(PANEL).zip(bytes.as_chunks().0) {
            *to = value(*bytes);
            sound &= finite(*to);
        }
    }
    if sound { Ok(data) } else { Err(NotFinite) }
}

impl Packed {
    /// Packs row-major matrices `[*, k]` of little-endian bytes, one below the other. They keep their type if they share
    /// one; else all become f32.
    ///
    /// # Errors
    /// When a weight is infinite or not a number.
    ///
    /// # Panics
    /// When a matrix does not have whole rows, or there are none.
    pub fn new(parts: &[(WeightType, &[u8])], k: usize) -> Result<Self, NotFinite> {
        let mut n = 0;
        for (kind, bytes) in parts {
            let row = k * kind.size();
            assert!(row > 0 && bytes.len().is_multiple_of(row), "{} bytes are not rows of {k} {kind:?}", bytes.len());
            n += bytes.len() / row;
        }
        assert!(n > 0, "a matrix without rows");
        let kind = parts[0].0;
        let data = match kind {
            _ if parts.iter().any(|(other, _)| *other != kind) => {
                let mut wide = Vec::new();
                for (kind, bytes) in parts {
                    wide.extend(widen(*kind, bytes)?.into_iter().flat_map(f32::to_le_bytes));
                }
                return Self::new(&[(WeightType::F32, &wide)], k);
            }
            WeightType::F32 => Data::F32(pack(parts, n, k, f32::from_le_bytes, f32::is_finite)?),
            WeightType::F16 => Data::F16(pack(parts, n, k, f16::from_le_bytes, f16::is_finite)?),
            WeightType::Bf16 => Data::Bf16(pack(parts, n, k, bf16::from_le_bytes, bf16::is_finite)?),
        };
        Ok(Self { n, k, data })
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes of a packed matrix of `n` by `k`.
    pub fn bytes(kind: WeightType, n: u64, k: u64) -> u64 {
        n.next_multiple_of(PANEL as u64) * k * kind.size() as u64
    }

    /// Bytes that these weights have in memory.
    pub fn held(&self) -> u64 {
        let bytes = match &self.data {
            Data::F32(data) => size_of_val(&data[..]),
            Data::F16(data) => size_of_val(&data[..]),
            Data::Bf16(data) => size_of_val(&data[..]),
        };
        bytes as u64
    }

    /// Row `i` (the weights of output `i`) as f32.
    ///
    /// # Panics
    /// When there is no such row, or `out` does not have `k` values.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n && out.len() == self.k, "row {i} of {} x {}", self.n, self.k);
        fn gather<T: Element>(data: &[T], out: &mut [f32]) {
            for (out, value) in out.iter_mut().zip(data.iter().step_by(PANEL)) {
                *out = value.widen();
            }
        }
        let base = (i / PANEL) * self.k * PANEL + i % PANEL;
        match &self.data {
            Data::F32(data) => gather(&data[base..], out),
            Data::F16(data) => gather(&data[base..], out),
            Data::Bf16(data) => gather(&data[base..], out),
        }
    }
}

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
            match &w.data {
                Data::F32(w) => dispatch(isa, Columns { x, w, m, n, k, panels, out: out.start() }),
                Data::F16(w) => dispatch(isa, Columns { x, w, m, n, k, panels, out: out.start() }),
                Data::Bf16(w) => dispatch(isa, Columns { x, w, m, n, k, panels, out: out.start() }),
            }
        }
    });
}

/// All rows of some panels. `x` is `[m, k]`, `w` the packed matrix, `out` points to `[m, n]`, of which nobody else
/// touches these columns.
struct Columns<'a, T> {
    x: &'a [f32],
    w: &'a [T],
    m: usize,
    n: usize,
    k: usize,
    panels: std::ops::Range<usize>,
    out: *mut f32,
}

impl<T: Element> Kernel for Columns<'_, T> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for panel in self.panels.clone() {
            let mut row = 0;
            while row < self.m {
                // SAFETY: the rows are within `x`, the panel within `w`.
                row += unsafe {
                    match self.m - row {
                        6.. if L::WIDE => self.block::<L, 6, VECTORS>(row, panel),
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

impl<T: Element> Columns<'_, T> {
    /// `R` rows of one panel, `V` vectors at a time. Returns `R`.
    ///
    /// # Safety
    /// `R` rows from `row` and the panel exist, and `V` divides the panel's vectors.
    #[inline(always)]
    unsafe fn block<L: Lanes, const R: usize, const V: usize>(&self, row: usize, panel: usize) -> usize {
        let k = self.k;
        // SAFETY: the caller's. Each panel has k groups of 64 weights; what is stored lies within row and panel.
        unsafe {
            let x = self.x.as_ptr().add(row * k);
            let w = self.w.as_ptr().add(panel * k * PANEL);
            for first in (0..VECTORS).step_by(V) {
                let mut sums = [[L::splat(0.0); V]; R];
                for i in 0..k {
                    let mut weights = [L::splat(0.0); V];
                    for (v, weight) in weights.iter_mut().enumerate() {
                        *weight = L::load(w.add(i * PANEL + (first + v) * LANES));
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let value = L::splat(*x.add(r * k + i));
                        for (sum, weight) in sums.iter_mut().zip(weights) {
                            *sum = value.fma(weight, *sum);
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        let column = panel * PANEL + (first + v) * LANES;
                        let out = self.out.wrapping_add((row + r) * self.n + column);
                        if column + LANES <= self.n {
                            sum.store(out);
                        } else if column < self.n {
                            let mut last = [0f32; LANES];
                            sum.store(last.as_mut_ptr());
                            std::ptr::copy_nonoverlapping(last.as_ptr(), out, self.n - column);
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

    #[test]
    fn rows_come_back_and_matrices_of_two_types_lose_nothing() {
        let (k, one, two) = (33, values(1, 33 * 60), values(2, 33 * 10));
        let narrow = bytes(WeightType::Bf16, &two);
        let packed = Packed::new(&[(WeightType::F32, &bytes(WeightType::F32, &one)), (WeightType::Bf16, &narrow)], k);
        let (packed, two) = (packed.unwrap(), widen(WeightType::Bf16, &narrow).unwrap());
        let mut row = vec![0.0; k];
        for i in 0..70 {
            packed.row(i, &mut row);
            assert_eq!(row, if i < 60 { &one[i * k..][..k] } else { &two[(i - 60) * k..][..k] });
        }
    }

    #[test]
    fn weights_that_are_no_numbers_are_refused() {
        for kind in KINDS {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = values(3, 8 * 5);
                values[17] = bad;
                assert_eq!(Packed::new(&[(kind, &bytes(kind, &values))], 8).err(), Some(NotFinite));
                assert_eq!(widen(kind, &bytes(kind, &values)).err(), Some(NotFinite));
            }
        }
    }
}
