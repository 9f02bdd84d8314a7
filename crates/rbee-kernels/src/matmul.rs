//! Matrix product with weights that are packed once: `out[m, n] = x[m, k] · w[n, k]ᵀ`, all sums in f32.
//!
//! Every output element is one chain of fused multiply-adds over k in ascending order, whatever the number of
//! rows, threads or lanes. So a row's bits are the same alone and among others, and the same on AVX-512,
//! AVX2+FMA and the scalar path: a fused multiply-add rounds once, everywhere. Lanes are output columns.
//!
//! Packed form: panels of 16 columns; within a panel, for each k the 16 weights of the columns stand side by side.

#![expect(unsafe_code, reason = "SIMD intrinsics")]

use half::{bf16, f16};

use crate::pool::Pool;

/// Columns of a panel.
pub const PANEL: usize = 16;

/// Multiply-adds below which a product is left to the calling thread: about 100 microseconds of one core.
const SMALL: usize = 1 << 21;

/// Instruction sets a kernel may use; all give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 16 lanes.
    Avx512,
    /// 8 lanes.
    Avx2,
    /// One element at a time: the reference.
    Scalar,
}

impl Isa {
    /// The widest that this machine has, or the one asked for if it is there: `avx512`, `avx2`, `scalar`.
    pub fn detect(wanted: Option<&str>) -> Self {
        let has = |isa: Self| match isa {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Scalar => true,
        };
        let order: &[Self] = match wanted {
            Some("scalar") => &[Self::Scalar],
            Some("avx2") => &[Self::Avx2, Self::Scalar],
            _ => &[Self::Avx512, Self::Avx2, Self::Scalar],
        };
        order.iter().copied().find(|isa| has(*isa)).unwrap_or(Self::Scalar)
    }
}

/// Weights in their own type.
#[derive(Clone, Debug)]
pub enum Weights {
    /// 4 bytes each.
    F32(Vec<f32>),
    /// 2 bytes each.
    F16(Vec<f16>),
    /// 2 bytes each.
    Bf16(Vec<bf16>),
}

/// A packed weight matrix of `n` outputs by `k` inputs.
#[derive(Clone, Debug)]
pub struct Packed {
    n: usize,
    k: usize,
    data: Weights,
}

fn pack<T: Copy + Default>(rows: &[T], n: usize, k: usize) -> Vec<T> {
    let panels = n.div_ceil(PANEL);
    let mut data = vec![T::default(); panels * k * PANEL];
    for (row, values) in rows.chunks_exact(k).enumerate() {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let base = panel * k * PANEL + lane;
        for (i, &value) in values.iter().enumerate() {
            data[base + i * PANEL] = value;
        }
    }
    data
}

impl Packed {
    /// Packs row-major weights of shape `[n, k]`.
    ///
    /// # Panics
    /// When the length is not `n * k`, or either is zero.
    pub fn new(rows: &Weights, n: usize, k: usize) -> Self {
        let len = match rows {
            Weights::F32(rows) => rows.len(),
            Weights::F16(rows) => rows.len(),
            Weights::Bf16(rows) => rows.len(),
        };
        assert!(n > 0 && k > 0 && len == n * k, "weights of {len} values are not {n} x {k}");
        let data = match rows {
            Weights::F32(rows) => Weights::F32(pack(rows, n, k)),
            Weights::F16(rows) => Weights::F16(pack(rows, n, k)),
            Weights::Bf16(rows) => Weights::Bf16(pack(rows, n, k)),
        };
        Self { n, k, data }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Row `i` (the weights of output `i`) as f32.
    ///
    /// # Panics
    /// When there is no such row, or `out` does not have `k` values.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n && out.len() == self.k, "row {i} of {} x {}", self.n, self.k);
        let base = (i / PANEL) * self.k * PANEL + i % PANEL;
        fn gather<T: Element>(data: &[T], base: usize, out: &mut [f32]) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = data[base + i * PANEL].widen();
            }
        }
        match &self.data {
            Weights::F32(data) => gather(data, base, out),
            Weights::F16(data) => gather(data, base, out),
            Weights::Bf16(data) => gather(data, base, out),
        }
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Weights::F32(data) => data.len() * 4,
            Weights::F16(data) => data.len() * 2,
            Weights::Bf16(data) => data.len() * 2,
        }
    }
}

/// A pointer that threads write disjoint parts of.
#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: `matmul` gives each task columns of its own.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// A method, so that closures capture the whole, which may be shared, and not the bare pointer.
    fn at(self) -> *mut f32 {
        self.0
    }
}

/// `out[m, n] = x[m, k] · wᵀ`, columns shared out over the pool's threads.
///
/// # Panics
/// When the lengths do not fit the shapes.
pub fn matmul(pool: &mut Pool, isa: Isa, x: &[f32], w: &Packed, out: &mut [f32]) {
    let (n, k) = (w.n, w.k);
    let m = x.len() / k;
    assert!(x.len() == m * k && out.len() == m * n, "matmul of {} by {n} x {k} into {}", x.len(), out.len());
    let panels = n.div_ceil(PANEL);
    // Enough work per task to be worth a thread, enough tasks to even out.
    let per_task = (65_536 / (k * PANEL * m.max(1))).clamp(1, panels).max(panels.div_ceil(pool.threads() * 8));
    // Waking a thread costs more than a small product.
    let per_task = if m * n * k < SMALL { panels } else { per_task };
    let out = Out(out.as_mut_ptr());
    pool.run(panels.div_ceil(per_task), &|task| {
        let first = task * per_task;
        let last = (first + per_task).min(panels);
        // SAFETY: tasks have disjoint panels, hence disjoint columns of `out`, which outlives the call; the ISA was
        // detected on this machine.
        unsafe {
            match &w.data {
                Weights::F32(data) => columns(isa, x, m, k, n, data, first..last, out.at()),
                Weights::F16(data) => columns(isa, x, m, k, n, data, first..last, out.at()),
                Weights::Bf16(data) => columns(isa, x, m, k, n, data, first..last, out.at()),
            }
        }
    });
}

/// A weight type and how 16 of them become f32 lanes.
trait Element: Copy {
    fn widen(self) -> f32;
    #[cfg(target_arch = "x86_64")]
    unsafe fn load512(at: *const Self) -> std::arch::x86_64::__m512;
    #[cfg(target_arch = "x86_64")]
    unsafe fn load256(at: *const Self) -> std::arch::x86_64::__m256;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::*;

    impl Element for f32 {
        fn widen(self) -> f32 {
            self
        }
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn load512(at: *const f32) -> __m512 {
            // SAFETY: the caller gives a pointer to 16 values.
            unsafe { _mm512_loadu_ps(at) }
        }
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn load256(at: *const f32) -> __m256 {
            // SAFETY: the caller gives a pointer to 8 values.
            unsafe { _mm256_loadu_ps(at) }
        }
    }

    impl Element for bf16 {
        fn widen(self) -> f32 {
            self.to_f32()
        }
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn load512(at: *const bf16) -> __m512 {
            // SAFETY: the caller gives a pointer to 16 values; a bf16 is the upper half of an f32.
            let halves = unsafe { _mm256_loadu_si256(at.cast()) };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn load256(at: *const bf16) -> __m256 {
            // SAFETY: the caller gives a pointer to 8 values.
            let halves = unsafe { _mm_loadu_si128(at.cast()) };
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        }
    }

    impl Element for f16 {
        fn widen(self) -> f32 {
            self.to_f32()
        }
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn load512(at: *const f16) -> __m512 {
            // SAFETY: the caller gives a pointer to 16 values.
            _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
        }
        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn load256(at: *const f16) -> __m256 {
            // SAFETY: the caller gives a pointer to 8 values.
            _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
        }
    }

    /// `R` rows by `P` panels with one 16-lane accumulator each.
    #[target_feature(enable = "avx512f")]
    unsafe fn block512<T: Element, const R: usize, const P: usize>(
        x: *const f32,
        k: usize,
        w: *const T,
        sums: &mut [[[f32; PANEL]; P]; R],
    ) {
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        for i in 0..k {
            let mut lanes = [_mm512_setzero_ps(); P];
            for (p, lane) in lanes.iter_mut().enumerate() {
                // SAFETY: panel p has k groups of 16 values.
                *lane = unsafe { T::load512(w.add((p * k + i) * PANEL)) };
            }
            for (r, row) in acc.iter_mut().enumerate() {
                // SAFETY: x has R rows of k values.
                let value = _mm512_set1_ps(unsafe { *x.add(r * k + i) });
                for (sum, lane) in row.iter_mut().zip(&lanes) {
                    *sum = _mm512_fmadd_ps(value, *lane, *sum);
                }
            }
        }
        for (row, out) in acc.iter().zip(sums) {
            for (sum, out) in row.iter().zip(out) {
                // SAFETY: out has 16 values.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *sum) };
            }
        }
    }

    /// `R` rows by `P` panels with two 8-lane accumulators each.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn block256<T: Element, const R: usize, const P: usize>(
        x: *const f32,
        k: usize,
        w: *const T,
        sums: &mut [[[f32; PANEL]; P]; R],
    ) {
        let mut acc = [[[_mm256_setzero_ps(); 2]; P]; R];
        for i in 0..k {
            let mut lanes = [[_mm256_setzero_ps(); 2]; P];
            for (p, lane) in lanes.iter_mut().enumerate() {
                for (half, lane) in lane.iter_mut().enumerate() {
                    // SAFETY: panel p has k groups of 16 values.
                    *lane = unsafe { T::load256(w.add((p * k + i) * PANEL + half * 8)) };
                }
            }
            for (r, row) in acc.iter_mut().enumerate() {
                // SAFETY: x has R rows of k values.
                let value = _mm256_set1_ps(unsafe { *x.add(r * k + i) });
                for (sum, lane) in row.iter_mut().zip(&lanes) {
                    sum[0] = _mm256_fmadd_ps(value, lane[0], sum[0]);
                    sum[1] = _mm256_fmadd_ps(value, lane[1], sum[1]);
                }
            }
        }
        for (row, out) in acc.iter().zip(sums) {
            for (sum, out) in row.iter().zip(out) {
                // SAFETY: out has 16 values, written as two halves.
                unsafe {
                    _mm256_storeu_ps(out.as_mut_ptr(), sum[0]);
                    _mm256_storeu_ps(out.as_mut_ptr().add(8), sum[1]);
                }
            }
        }
    }

    pub(super) unsafe fn block<T: Element, const R: usize, const P: usize>(
        isa: Isa,
        x: *const f32,
        k: usize,
        w: *const T,
        sums: &mut [[[f32; PANEL]; P]; R],
    ) {
        // SAFETY: as the caller's; the ISA was detected.
        unsafe {
            match isa {
                Isa::Avx512 => block512::<T, R, P>(x, k, w, sums),
                Isa::Avx2 => block256::<T, R, P>(x, k, w, sums),
                Isa::Scalar => block_scalar::<T, R, P>(x, k, w, sums),
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod x86 {
    use super::*;

    macro_rules! element {
        ($($type:ty: $widen:expr),*) => {$(
            impl Element for $type {
                fn widen(self) -> f32 {
                    $widen(self)
                }
            }
        )*};
    }
    element!(f32: |x| x, bf16: bf16::to_f32, f16: f16::to_f32);

    pub(super) unsafe fn block<T: Element, const R: usize, const P: usize>(
        _: Isa,
        x: *const f32,
        k: usize,
        w: *const T,
        sums: &mut [[[f32; PANEL]; P]; R],
    ) {
        // SAFETY: as the caller's.
        unsafe { block_scalar::<T, R, P>(x, k, w, sums) }
    }
}

/// The reference: one element at a time, the same chain of fused multiply-adds.
unsafe fn block_scalar<T: Element, const R: usize, const P: usize>(
    x: *const f32,
    k: usize,
    w: *const T,
    sums: &mut [[[f32; PANEL]; P]; R],
) {
    for (r, row) in sums.iter_mut().enumerate() {
        for (p, panel) in row.iter_mut().enumerate() {
            for (lane, sum) in panel.iter_mut().enumerate() {
                *sum = 0.0;
                for i in 0..k {
                    // SAFETY: x has R rows of k values, panel p has k groups of 16.
                    let (value, weight) = unsafe { (*x.add(r * k + i), (*w.add((p * k + i) * PANEL + lane)).widen()) };
                    *sum = value.mul_add(weight, *sum);
                }
            }
        }
    }
}

/// All rows of some panels.
///
/// # Safety
/// `x` is `[m, k]`, `w` the packed matrix, `out` points to `[m, n]` of which nobody else touches these columns.
#[expect(clippy::too_many_arguments, reason = "the shape of one product")]
unsafe fn columns<T: Element>(
    isa: Isa,
    x: &[f32],
    m: usize,
    k: usize,
    n: usize,
    w: &[T],
    panels: std::ops::Range<usize>,
    out: *mut f32,
) {
    let mut panel = panels.start;
    while panel < panels.end {
        // SAFETY: the panels are within `w`, the rows within `x`.
        unsafe {
            let at = w.as_ptr().add(panel * k * PANEL);
            let wide = panels.end - panel;
            let mut row = 0;
            // Many rows share a pair of panels; a lone row streams four panels to hide the adds' latency.
            if m >= 6 || wide < 4 {
                let pair = wide.min(2);
                while row < m {
                    let rows = x.as_ptr().add(row * k);
                    row += match (m - row, pair) {
                        (6.., 2) => store::<T, 6, 2>(isa, rows, k, at, out, row, n, panel),
                        (3.., 2) => store::<T, 3, 2>(isa, rows, k, at, out, row, n, panel),
                        (_, 2) => store::<T, 1, 2>(isa, rows, k, at, out, row, n, panel),
                        (6.., _) => store::<T, 6, 1>(isa, rows, k, at, out, row, n, panel),
                        _ => store::<T, 1, 1>(isa, rows, k, at, out, row, n, panel),
                    };
                }
                panel += pair;
            } else {
                while row < m {
                    let rows = x.as_ptr().add(row * k);
                    row += match m - row {
                        2.. => store::<T, 2, 4>(isa, rows, k, at, out, row, n, panel),
                        _ => store::<T, 1, 4>(isa, rows, k, at, out, row, n, panel),
                    };
                }
                panel += 4;
            }
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the shape of one block")]
unsafe fn store<T: Element, const R: usize, const P: usize>(
    isa: Isa,
    x: *const f32,
    k: usize,
    w: *const T,
    out: *mut f32,
    row: usize,
    n: usize,
    panel: usize,
) -> usize {
    let mut sums = [[[0f32; PANEL]; P]; R];
    // SAFETY: as the caller's.
    unsafe { x86::block::<T, R, P>(isa, x, k, w, &mut sums) };
    for (r, sums) in sums.iter().enumerate() {
        for (p, sums) in sums.iter().enumerate() {
            let column = (panel + p) * PANEL;
            let width = PANEL.min(n.saturating_sub(column));
            // SAFETY: the columns are within row `row + r` of `out`.
            unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), out.add((row + r) * n + column), width) };
        }
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values between -1 and 1 that look random.
    fn values(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn kinds(rows: &[f32]) -> [Weights; 3] {
        [
            Weights::F32(rows.to_vec()),
            Weights::F16(rows.iter().map(|&v| f16::from_f32(v)).collect()),
            Weights::Bf16(rows.iter().map(|&v| bf16::from_f32(v)).collect()),
        ]
    }

    #[test]
    fn a_row_has_the_same_bits_alone_among_others_on_any_isa_and_any_threads() {
        for (m, n, k) in [(1, 1, 1), (1, 64, 32), (2, 70, 33), (5, 100, 17), (6, 48, 64), (13, 129, 96), (40, 256, 192)]
        {
            let x = values(m as u32, m * k);
            for weights in kinds(&values(n as u32, n * k)) {
                let packed = Packed::new(&weights, n, k);
                let mut want = vec![0.0; m * n];
                matmul(&mut Pool::new(1), Isa::Scalar, &x, &packed, &mut want);
                for isa in [Isa::detect(None), Isa::detect(Some("avx2"))] {
                    for threads in [1, 3] {
                        let mut pool = Pool::new(threads);
                        let mut got = vec![0.0; m * n];
                        matmul(&mut pool, isa, &x, &packed, &mut got);
                        assert_eq!(got, want, "{isa:?} {m}x{n}x{k}");
                        for row in 0..m {
                            let mut alone = vec![0.0; n];
                            matmul(&mut pool, isa, &x[row * k..][..k], &packed, &mut alone);
                            assert_eq!(alone, want[row * n..][..n]);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn sums_agree_with_double_precision() {
        let (m, n, k) = (3, 40, 500);
        let (x, w) = (values(1, m * k), values(2, n * k));
        let mut got = vec![0.0; m * n];
        matmul(&mut Pool::new(2), Isa::detect(None), &x, &Packed::new(&Weights::F32(w.clone()), n, k), &mut got);
        for row in 0..m {
            for column in 0..n {
                let want: f64 = (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(w[column * k + i])).sum();
                assert!((f64::from(got[row * n + column]) - want).abs() < 1e-4);
            }
        }
    }
}
