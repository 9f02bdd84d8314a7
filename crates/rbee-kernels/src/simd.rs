//! Sixteen f32 lanes on AVX-512, on AVX2 and one at a time, and the weight types that widen into them.
//!
//! Kernels are written once over [`Lanes`] and compiled for each instruction set. Every lane operation rounds once and
//! in the same way everywhere, so the instruction set never shows in a result. Start with [`dispatch`].

#![expect(unsafe_code, reason = "SIMD intrinsics")]

use bytemuck::Pod;
use half::{bf16, f16};

use crate::ints::Ints;

/// Lanes of one vector.
pub const LANES: usize = 16;

/// Instruction sets a kernel may use; all give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 16 lanes in one register, with the products of bytes that came with VNNI.
    Avx512,
    /// 16 lanes in two registers.
    Avx2,
    /// One lane at a time: the reference.
    Scalar,
}

impl Isa {
    /// All, the widest first.
    pub const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Scalar];

    /// Its name, as [`Isa::named`] takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Scalar => "scalar",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// Whether this machine has it.
    pub fn is_here(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
                    && Self::Avx2.is_here()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Scalar => true,
        }
    }

    /// The widest that this machine has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().find(|isa| isa.is_here()).unwrap_or(Self::Scalar)
    }
}

/// A type of stored weights, keys or values.
pub trait Element: Pod + Default + Send + Sync {
    /// As f32, exactly.
    fn widen(self) -> f32;
    /// Rounded to the nearest, ties to even.
    fn narrow(value: f32) -> Self;
    /// Sixteen of them as f32.
    ///
    /// # Safety
    /// `at` points to 16 values; the machine has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load512(at: *const Self) -> std::arch::x86_64::__m512;
    /// Eight of them as f32.
    ///
    /// # Safety
    /// `at` points to 8 values; the machine has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load256(at: *const Self) -> std::arch::x86_64::__m256;
}

/// Sixteen f32.
pub trait Lanes: Copy {
    /// Rows of a block of sums times vectors of its columns that fit the registers: 6 x 4, or else 3 x 1.
    const WIDE: bool;
    /// Sixteen sums of integers.
    type Ints: Ints<Floats = Self>;
    /// One value in all lanes.
    ///
    /// # Safety
    /// As dispatch has made sure of: the instruction set is there. So for all of these.
    unsafe fn splat(value: f32) -> Self;
    /// Sixteen values, widened.
    ///
    /// # Safety
    /// `at` points to 16 values.
    unsafe fn load<T: Element>(at: *const T) -> Self;
    /// Sixteen signed bytes.
    ///
    /// # Safety
    /// `at` points to 16 values.
    unsafe fn load_i8(at: *const i8) -> Self;
    /// Twice sixteen whole numbers of six bits: the lower six of a byte, and its upper two below the four that stand in another, from
    /// bit `shift` on, which is 0 or 4.
    ///
    /// # Safety
    /// `own` and `shared` point to 16 bytes each.
    unsafe fn load_sixes(own: *const u8, shared: *const u8, shift: u32) -> (Self, Self);
    /// Two to the power of each of sixteen bytes less 127, which are below 255; zero for a byte of zero.
    ///
    /// # Safety
    /// `at` points to 16 values.
    unsafe fn load_powers(at: *const u8) -> Self;
    /// The same powers, none of them zero, for [`Lanes::scaled`].
    ///
    /// # Safety
    /// As above.
    unsafe fn load_exponents(at: *const u8) -> Self::Ints;
    /// A value times powers of two, made by additions: it and the products must be numbers that have all bits of their fraction.
    ///
    /// # Safety
    /// As above.
    unsafe fn scaled(value: f32, by: Self::Ints) -> Self;
    /// Asks for the line of memory at `at`, which need not exist, as far as the second cache: in the first it would take the place of what
    /// is read before it.
    fn fetch(at: *const u8);
    /// The same of a line that is read once, as far as the first: it takes no other's place in the larger caches.
    fn fetch_once(at: *const u8);
    /// Writes all lanes.
    ///
    /// # Safety
    /// `at` points to room for 16 values.
    unsafe fn store(self, at: *mut f32);
    /// `self * b + c`, rounded once.
    ///
    /// # Safety
    /// As above.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
}

/// Work that is compiled for every instruction set. `run` and all it calls must be `#[inline(always)]`, or the inner
/// loops call functions for every vector.
pub(crate) trait Kernel {
    /// # Safety
    /// The instruction set of `L` is there, and whatever the kernel itself asks for.
    unsafe fn run<L: Lanes>(self);
}

/// Runs a kernel on an instruction set.
///
/// # Safety
/// `isa` is there ([`Isa::is_here`]), and whatever the kernel itself asks for.
pub(crate) unsafe fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    // SAFETY: the caller's.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::on_avx512(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::on_avx2(kernel),
            _ => kernel.run::<[f32; LANES]>(),
        }
    }
}

impl Lanes for [f32; LANES] {
    const WIDE: bool = false;
    type Ints = [i32; LANES];
    #[inline(always)]
    fn fetch(_: *const u8) {}
    #[inline(always)]
    fn fetch_once(_: *const u8) {}
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load<T: Element>(at: *const T) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| unsafe { at.add(i).read_unaligned().widen() })
    }
    #[inline(always)]
    unsafe fn load_i8(at: *const i8) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| unsafe { f32::from(*at.add(i)) })
    }
    #[inline(always)]
    unsafe fn load_sixes(own: *const u8, shared: *const u8, shift: u32) -> (Self, Self) {
        // SAFETY: the caller's.
        let (own, upper) = unsafe { (own.cast::<[u8; LANES]>().read(), shared.cast::<[u8; LANES]>().read()) };
        let second = |i| f32::from(own[i] >> 6 | (upper[i] >> shift & 15) << 2);
        (own.map(|byte| f32::from(byte & 63)), std::array::from_fn(second))
    }
    #[inline(always)]
    unsafe fn load_powers(at: *const u8) -> Self {
        // SAFETY: the caller's.
        std::array::from_fn(|i| unsafe { f32::from_bits(u32::from(*at.add(i)) << 23) })
    }
    #[inline(always)]
    unsafe fn load_exponents(at: *const u8) -> [i32; LANES] {
        // SAFETY: the caller's.
        std::array::from_fn(|i| unsafe { (i32::from(*at.add(i)) - 127) << 23 })
    }
    #[inline(always)]
    unsafe fn scaled(value: f32, by: [i32; LANES]) -> Self {
        by.map(|by| f32::from_bits(value.to_bits().wrapping_add_signed(by)))
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the caller's.
        unsafe { at.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(b[i], c[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Element, Kernel, Lanes, bf16, f16};

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn on_avx512<K: Kernel>(kernel: K) {
        // SAFETY: the caller's.
        unsafe { kernel.run::<__m512>() }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn on_avx2<K: Kernel>(kernel: K) {
        // SAFETY: the caller's.
        unsafe { kernel.run::<[__m256; 2]>() }
    }

    /// Unsigned bytes as f32.
    ///
    /// # Safety
    /// AVX-512F is there.
    #[inline(always)]
    unsafe fn wide512(bytes: __m128i) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)) }
    }

    /// Unsigned bytes as f32.
    ///
    /// # Safety
    /// AVX2 is there.
    #[inline(always)]
    unsafe fn wide256(bytes: __m128i) -> [__m256; 2] {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes)));
            [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)]
        }
    }

    /// Bytes of six bits: see [`Lanes::load_sixes`].
    ///
    /// # Safety
    /// As there; SSE2 is part of x86-64.
    #[inline(always)]
    unsafe fn sixes(own: *const u8, shared: *const u8, shift: u32) -> (__m128i, __m128i) {
        // SAFETY: the caller's. What shifts bring in from the neighbouring byte is masked.
        unsafe {
            let own = _mm_loadu_si128(own.cast());
            let upper = _mm_srl_epi16(_mm_loadu_si128(shared.cast()), _mm_cvtsi32_si128(shift as i32));
            let lower = _mm_and_si128(_mm_srli_epi16::<6>(own), _mm_set1_epi8(3));
            let upper = _mm_and_si128(_mm_slli_epi16::<2>(upper), _mm_set1_epi8(0x3c));
            (_mm_and_si128(own, _mm_set1_epi8(63)), _mm_or_si128(lower, upper))
        }
    }

    impl Lanes for __m512 {
        const WIDE: bool = true;
        type Ints = __m512i;
        #[inline(always)]
        fn fetch(at: *const u8) {
            // SAFETY: SSE is part of x86-64, and no address is wrong to ask for.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
        #[inline(always)]
        fn fetch_once(at: *const u8) {
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_NTA>(at.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: AVX-512F is there.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load<T: Element>(at: *const T) -> Self {
            // SAFETY: the caller's.
            unsafe { T::load512(at) }
        }
        #[inline(always)]
        unsafe fn load_i8(at: *const i8) -> Self {
            // SAFETY: the caller's.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_sixes(own: *const u8, shared: *const u8, shift: u32) -> (Self, Self) {
            // SAFETY: the caller's.
            unsafe {
                let (first, second) = sixes(own, shared, shift);
                (wide512(first), wide512(second))
            }
        }
        #[inline(always)]
        unsafe fn load_powers(at: *const u8) -> Self {
            // SAFETY: the caller's.
            unsafe {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(bytes))
            }
        }
        #[inline(always)]
        unsafe fn load_exponents(at: *const u8) -> __m512i {
            // SAFETY: the caller's.
            unsafe {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()));
                _mm512_slli_epi32::<23>(_mm512_sub_epi32(bytes, _mm512_set1_epi32(127)))
            }
        }
        #[inline(always)]
        unsafe fn scaled(value: f32, by: __m512i) -> Self {
            // SAFETY: AVX-512F is there.
            unsafe { _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(_mm512_set1_ps(value)), by)) }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: the caller's.
            unsafe { _mm512_storeu_ps(at, self) }
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: AVX-512F is there.
            unsafe { _mm512_fmadd_ps(self, b, c) }
        }
    }

    impl Lanes for [__m256; 2] {
        const WIDE: bool = false;
        type Ints = [__m256i; 2];
        #[inline(always)]
        fn fetch(at: *const u8) {
            // SAFETY: SSE is part of x86-64, and no address is wrong to ask for.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
        #[inline(always)]
        fn fetch_once(at: *const u8) {
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_NTA>(at.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: AVX2 is there.
            unsafe { [_mm256_set1_ps(value); 2] }
        }
        #[inline(always)]
        unsafe fn load<T: Element>(at: *const T) -> Self {
            // SAFETY: the caller's.
            unsafe { [T::load256(at), T::load256(at.add(8))] }
        }
        #[inline(always)]
        unsafe fn load_i8(at: *const i8) -> Self {
            // SAFETY: the caller's.
            unsafe {
                let bytes = _mm_loadu_si128(at.cast());
                let (a, b) = (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes)));
                [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)]
            }
        }
        #[inline(always)]
        unsafe fn load_sixes(own: *const u8, shared: *const u8, shift: u32) -> (Self, Self) {
            // SAFETY: the caller's.
            unsafe {
                let (first, second) = sixes(own, shared, shift);
                (wide256(first), wide256(second))
            }
        }
        #[inline(always)]
        unsafe fn load_powers(at: *const u8) -> Self {
            // SAFETY: the caller's.
            unsafe {
                let bytes = _mm_loadu_si128(at.cast());
                let (a, b) = (_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes)));
                [_mm256_castsi256_ps(_mm256_slli_epi32::<23>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(b))]
            }
        }
        #[inline(always)]
        unsafe fn load_exponents(at: *const u8) -> [__m256i; 2] {
            // SAFETY: the caller's.
            unsafe {
                let bytes = _mm_loadu_si128(at.cast());
                [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))]
                    .map(|bytes| _mm256_slli_epi32::<23>(_mm256_sub_epi32(bytes, _mm256_set1_epi32(127))))
            }
        }
        #[inline(always)]
        unsafe fn scaled(value: f32, by: [__m256i; 2]) -> Self {
            // SAFETY: AVX2 is there.
            unsafe {
                by.map(|by| _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(_mm256_set1_ps(value)), by)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: the caller's.
            unsafe {
                _mm256_storeu_ps(at, self[0]);
                _mm256_storeu_ps(at.add(8), self[1]);
            }
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: FMA is there.
            unsafe { [_mm256_fmadd_ps(self[0], b[0], c[0]), _mm256_fmadd_ps(self[1], b[1], c[1])] }
        }
    }

    impl Element for f32 {
        #[inline(always)]
        fn widen(self) -> f32 {
            self
        }
        #[inline(always)]
        fn narrow(value: f32) -> f32 {
            value
        }
        #[inline(always)]
        unsafe fn load512(at: *const f32) -> __m512 {
            // SAFETY: the caller's.
            unsafe { _mm512_loadu_ps(at) }
        }
        #[inline(always)]
        unsafe fn load256(at: *const f32) -> __m256 {
            // SAFETY: the caller's.
            unsafe { _mm256_loadu_ps(at) }
        }
    }

    impl Element for bf16 {
        #[inline(always)]
        fn widen(self) -> f32 {
            // A bf16 is the upper half of an f32.
            f32::from_bits(u32::from(self.to_bits()) << 16)
        }
        #[inline(always)]
        fn narrow(value: f32) -> bf16 {
            bf16::from_f32(value)
        }
        #[inline(always)]
        unsafe fn load512(at: *const bf16) -> __m512 {
            // SAFETY: the caller's.
            unsafe {
                let halves = _mm256_loadu_si256(at.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            }
        }
        #[inline(always)]
        unsafe fn load256(at: *const bf16) -> __m256 {
            // SAFETY: the caller's.
            unsafe {
                let halves = _mm_loadu_si128(at.cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
            }
        }
    }

    impl Element for f16 {
        #[inline(always)]
        fn widen(self) -> f32 {
            self.to_f32()
        }
        #[inline(always)]
        fn narrow(value: f32) -> f16 {
            f16::from_f32(value)
        }
        #[inline(always)]
        unsafe fn load512(at: *const f16) -> __m512 {
            // SAFETY: the caller's.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
        }
        #[inline(always)]
        unsafe fn load256(at: *const f16) -> __m256 {
            // SAFETY: the caller's.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod portable {
    use super::{Element, bf16, f16};

    macro_rules! element {
        ($($type:ty: $widen:expr, $narrow:expr);*) => {$(
            impl Element for $type {
                #[inline(always)]
                fn widen(self) -> f32 {
                    $widen(self)
                }
                #[inline(always)]
                fn narrow(value: f32) -> Self {
                    $narrow(value)
                }
            }
        )*};
    }
    element!(f32: |x| x, |x| x; bf16: bf16::to_f32, bf16::from_f32; f16: f16::to_f32, f16::from_f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Widen<'a, T>(&'a [T], &'a mut [f32]);

    impl<T: Element> Kernel for Widen<'_, T> {
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) {
            assert_eq!(self.0.len(), self.1.len());
            for i in (0..self.0.len()).step_by(LANES) {
                // SAFETY: both have a multiple of 16 values.
                unsafe { L::load(self.0.as_ptr().add(i)).store(self.1.as_mut_ptr().add(i)) };
            }
        }
    }

    /// Every finite and infinite half widens to the same bits on every instruction set.
    fn check<T: Element>(all: &[T]) {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            let mut wide = vec![0.0; all.len()];
            // SAFETY: the instruction set is there.
            unsafe { dispatch(isa, Widen(all, &mut wide)) };
            let same = all.iter().zip(&wide).all(|(half, wide)| half.widen().to_bits() == wide.to_bits());
            assert!(same, "{isa:?}");
        }
    }

    #[test]
    fn every_half_widens_alike() {
        let bits = || (0..=u16::MAX).filter(|bits| !f16::from_bits(*bits).is_nan());
        let mut halves: Vec<f16> = bits().map(f16::from_bits).collect();
        halves.resize(halves.len().next_multiple_of(LANES), f16::ZERO);
        check(&halves);
        check(&(0..=u16::MAX).map(bf16::from_bits).collect::<Vec<_>>());
    }

    #[test]
    fn names_are_read_back() {
        assert!(Isa::ALL.into_iter().all(|isa| Isa::named(isa.name()) == Some(isa)));
        assert_eq!(Isa::named("AVX"), None);
        assert!(Isa::detect().is_here());
    }
}
