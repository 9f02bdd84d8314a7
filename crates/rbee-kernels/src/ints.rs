//! Sixteen sums of products of small integers, one for each column of a tile. They are exact, so every instruction set has the
//! same.

#![expect(unsafe_code, reason = "SIMD intrinsics")]

use crate::simd::LANES;

/// Inputs of a group: a column's weights of four inputs stand side by side.
pub(crate) const GROUP: usize = 4;

/// Bytes of a line: the weights of a group of all columns.
pub(crate) const LINE: usize = GROUP * LANES;

/// Sixteen sums.
pub trait Ints: Copy {
    /// They as floating-point numbers.
    type Floats: Copy;
    /// A line of bytes.
    type Line: Copy;
    /// Sixteen sums that few products are added to, of fewer bits where that is faster.
    type Few: Copy;
    /// One sum in all columns.
    ///
    /// # Safety
    /// The instruction set is there. So for all of these.
    unsafe fn splat(value: i32) -> Self;
    /// Sums that [`Ints::dot_wide`] begins with: `less` is -128 times the sum of the inputs.
    ///
    /// # Safety
    /// As above.
    unsafe fn begin_wide(less: i32) -> Self;
    /// Adds the products of `w - 128` and four inputs of a row, if the sums began as they must.
    ///
    /// # Safety
    /// As above; `x` points to four inputs.
    unsafe fn dot_wide(self, w: Self::Line, x: *const i8) -> Self;
    /// Sums for the products of up to eight groups with weights below 16, four with weights below 32, or two with weights below 64.
    /// What they come to is [`Ints::with`].
    ///
    /// # Safety
    /// As above.
    unsafe fn few(self) -> Self::Few;
    /// Adds the products of weights and four inputs of a row, none of which is -128.
    ///
    /// # Safety
    /// As above; `x` points to four inputs.
    unsafe fn dot(few: Self::Few, w: Self::Line, x: *const i8) -> Self::Few;
    /// These sums and those that were begun from them.
    ///
    /// # Safety
    /// As above.
    unsafe fn with(self, few: Self::Few) -> Self;
    /// Adds the products of weights of sixteen bits and two inputs of a row. The sums must fit.
    ///
    /// # Safety
    /// As above; `x` points to two inputs.
    unsafe fn dot_pair(self, w: Self::Line, x: *const i16) -> Self;
    /// Rounded once.
    ///
    /// # Safety
    /// As above.
    unsafe fn floats(self) -> Self::Floats;
    /// A line from memory.
    ///
    /// # Safety
    /// As above; `at` points to a line.
    unsafe fn line(at: *const u8) -> Self::Line;
    /// A line to memory.
    ///
    /// # Safety
    /// As above; at `at` there is room for a line.
    unsafe fn put(line: Self::Line, at: *mut u8);
    /// The low halves of bytes.
    ///
    /// # Safety
    /// As above.
    unsafe fn low(line: Self::Line) -> Self::Line;
    /// The high halves of bytes.
    ///
    /// # Safety
    /// As above.
    unsafe fn high(line: Self::Line) -> Self::Line;
    /// Adds 16 to the bytes whose counterpart in `bits` has bit `bit`; they are below 16.
    ///
    /// # Safety
    /// As above.
    unsafe fn fifth(line: Self::Line, bits: Self::Line, bit: usize) -> Self::Line;
    /// Adds the pair of bits number `pair` of the counterpart in `bits`, as the fifth and sixth, to bytes below 16.
    ///
    /// # Safety
    /// As above.
    unsafe fn sixth(line: Self::Line, bits: Self::Line, pair: usize) -> Self::Line;
    /// Whole numbers of sixteen bits from twelve: number `of_four` of those whose magnitudes of eight bits stand in two lines, of which
    /// this is the one that has it, and whose shifts by 0 to 7 bits to the left and signs stand in the halves of bytes of one.
    ///
    /// # Safety
    /// As above.
    unsafe fn shifted(magnitudes: Self::Line, shifts: Self::Line, of_four: usize) -> Self::Line;
}

/// What a magnitude is multiplied by, by the four bits of its shift and its sign; and again, for what reads five bits.
pub(crate) const SHIFTS: [i16; 32] = {
    let mut shifts = [0; 32];
    let mut i = 0;
    while i < shifts.len() {
        shifts[i] = if i & 8 == 0 { 1 << (i & 7) } else { -1 << (i & 7) };
        i += 1;
    }
    shifts
};

impl Ints for [i32; LANES] {
    type Floats = [f32; LANES];
    type Line = [u8; LINE];
    type Few = Self;
    #[inline(always)]
    unsafe fn splat(value: i32) -> Self {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn begin_wide(_: i32) -> Self {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot_wide(self, w: [u8; LINE], x: *const i8) -> Self {
        // SAFETY: the caller's.
        unsafe { products(self, w, x, 128) }
    }
    #[inline(always)]
    unsafe fn few(self) -> Self {
        self
    }
    #[inline(always)]
    unsafe fn dot(few: Self, w: [u8; LINE], x: *const i8) -> Self {
        // SAFETY: the caller's.
        unsafe { products(few, w, x, 0) }
    }
    #[inline(always)]
    unsafe fn with(self, few: Self) -> Self {
        few
    }
    #[inline(always)]
    unsafe fn dot_pair(self, w: [u8; LINE], x: *const i16) -> Self {
        // SAFETY: the caller's.
        let x = unsafe { x.cast::<[i16; 2]>().read_unaligned() };
        std::array::from_fn(|column| {
            let weight = |i: usize| i32::from(i16::from_ne_bytes([w[4 * column + 2 * i], w[4 * column + 2 * i + 1]]));
            self[column] + weight(0) * i32::from(x[0]) + weight(1) * i32::from(x[1])
        })
    }
    #[inline(always)]
    unsafe fn floats(self) -> [f32; LANES] {
        self.map(|sum| sum as f32)
    }
    #[inline(always)]
    unsafe fn line(at: *const u8) -> [u8; LINE] {
        // SAFETY: the caller's.
        unsafe { at.cast::<[u8; LINE]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn put(line: [u8; LINE], at: *mut u8) {
        // SAFETY: the caller's.
        unsafe { at.cast::<[u8; LINE]>().write_unaligned(line) }
    }
    #[inline(always)]
    unsafe fn low(line: [u8; LINE]) -> [u8; LINE] {
        line.map(|byte| byte & 15)
    }
    #[inline(always)]
    unsafe fn high(line: [u8; LINE]) -> [u8; LINE] {
        line.map(|byte| byte >> 4)
    }
    #[inline(always)]
    unsafe fn fifth(line: [u8; LINE], bits: [u8; LINE], bit: usize) -> [u8; LINE] {
        std::array::from_fn(|i| line[i] | (bits[i] >> bit & 1) << 4)
    }
    #[inline(always)]
    unsafe fn sixth(line: [u8; LINE], bits: [u8; LINE], pair: usize) -> [u8; LINE] {
        std::array::from_fn(|i| line[i] | (bits[i] >> (2 * pair) & 3) << 4)
    }
    #[inline(always)]
    unsafe fn shifted(magnitudes: [u8; LINE], shifts: [u8; LINE], of_four: usize) -> [u8; LINE] {
        bytemuck::cast::<[[u8; 2]; 2 * LANES], _>(std::array::from_fn(|i| {
            let magnitude = i16::from(magnitudes[2 * i + of_four % 2]);
            let shift = u16::from_le_bytes([shifts[2 * i], shifts[2 * i + 1]]) >> (4 * of_four) & 15;
            (magnitude * SHIFTS[usize::from(shift)]).to_ne_bytes()
        }))
    }
}

/// # Safety
/// `x` points to four inputs.
#[inline(always)]
unsafe fn products(sums: [i32; LANES], w: [u8; LINE], x: *const i8, less: i32) -> [i32; LANES] {
    // SAFETY: the caller's.
    let x = unsafe { x.cast::<[i8; GROUP]>().read_unaligned() };
    std::array::from_fn(|column| {
        let weights = &w[column * GROUP..][..GROUP];
        weights.iter().zip(x).fold(sums[column], |sum, (w, x)| sum + (i32::from(*w) - less) * i32::from(x))
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    use super::{Ints, SHIFTS};

    /// The four bytes of inputs that all columns meet.
    ///
    /// # Safety
    /// `x` points to them.
    #[inline(always)]
    unsafe fn four(x: *const i8) -> i32 {
        // SAFETY: the caller's.
        unsafe { x.cast::<i32>().read_unaligned() }
    }

    /// Adds products of pairs. What the intrinsic becomes may be a multiplication and an addition apart, which take half as long again.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn add_pairs(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: it changes nothing but the register, and the instruction is there.
        unsafe {
            asm!("vpdpwssd {sums}, {a}, {b}", sums = inout(zmm_reg) sums, a = in(zmm_reg) a, b = in(zmm_reg) b,
                options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }

    impl Ints for __m512i {
        type Floats = __m512;
        type Line = __m512i;
        type Few = Self;
        #[inline(always)]
        unsafe fn splat(value: i32) -> Self {
            // SAFETY: AVX-512 is there. So below.
            unsafe { _mm512_set1_epi32(value) }
        }
        #[inline(always)]
        unsafe fn begin_wide(less: i32) -> Self {
            // SAFETY: as above.
            unsafe { _mm512_set1_epi32(less) }
        }
        #[inline(always)]
        unsafe fn dot_wide(self, w: __m512i, x: *const i8) -> Self {
            // SAFETY: as above, and the caller's.
            unsafe { _mm512_dpbusd_epi32(self, w, _mm512_set1_epi32(four(x))) }
        }
        #[inline(always)]
        unsafe fn few(self) -> Self {
            self
        }
        #[inline(always)]
        unsafe fn dot(few: Self, w: __m512i, x: *const i8) -> Self {
            // SAFETY: as above, and the caller's.
            unsafe { _mm512_dpbusd_epi32(few, w, _mm512_set1_epi32(four(x))) }
        }
        #[inline(always)]
        unsafe fn with(self, few: Self) -> Self {
            few
        }
        #[inline(always)]
        unsafe fn dot_pair(self, w: __m512i, x: *const i16) -> Self {
            // SAFETY: as above, and the caller's.
            unsafe { add_pairs(self, w, _mm512_set1_epi32(four(x.cast()))) }
        }
        #[inline(always)]
        unsafe fn floats(self) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_cvtepi32_ps(self) }
        }
        #[inline(always)]
        unsafe fn line(at: *const u8) -> __m512i {
            // SAFETY: as above, and the caller's.
            unsafe { _mm512_loadu_si512(at.cast()) }
        }
        #[inline(always)]
        unsafe fn put(line: __m512i, at: *mut u8) {
            // SAFETY: as above, and the caller's.
            unsafe { _mm512_storeu_si512(at.cast(), line) }
        }
        #[inline(always)]
        unsafe fn low(line: __m512i) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_and_si512(line, _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        unsafe fn high(line: __m512i) -> __m512i {
            // SAFETY: as above; what is shifted in from the byte beside is masked off.
            unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(line), _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        unsafe fn fifth(line: __m512i, bits: __m512i, bit: usize) -> __m512i {
            // SAFETY: as above.
            unsafe {
                let there = _mm512_test_epi8_mask(bits, _mm512_set1_epi8((1u8 << bit).cast_signed()));
                _mm512_mask_add_epi8(line, there, line, _mm512_set1_epi8(16))
            }
        }
        #[inline(always)]
        unsafe fn sixth(line: __m512i, bits: __m512i, pair: usize) -> __m512i {
            // SAFETY: as above.
            unsafe {
                let moved = match pair {
                    0 => _mm512_slli_epi16::<4>(bits),
                    1 => _mm512_slli_epi16::<2>(bits),
                    2 => bits,
                    _ => _mm512_srli_epi16::<2>(bits),
                };
                // line | (moved & 48)
                _mm512_ternarylogic_epi32::<0xf8>(line, moved, _mm512_set1_epi8(48))
            }
        }
        #[inline(always)]
        unsafe fn shifted(magnitudes: __m512i, shifts: __m512i, of_four: usize) -> __m512i {
            // SAFETY: as above. The permutation looks at the lower five bits of its index.
            unsafe {
                let magnitudes = match of_four % 2 {
                    0 => _mm512_and_si512(magnitudes, _mm512_set1_epi16(0xff)),
                    _ => _mm512_srli_epi16::<8>(magnitudes),
                };
                let shifts = match of_four {
                    0 => shifts,
                    1 => _mm512_srli_epi16::<4>(shifts),
                    2 => _mm512_srli_epi16::<8>(shifts),
                    _ => _mm512_srli_epi16::<12>(shifts),
                };
                let by = _mm512_permutexvar_epi16(shifts, _mm512_loadu_si512(SHIFTS.as_ptr().cast()));
                _mm512_mullo_epi16(magnitudes, by)
            }
        }
    }

    impl Ints for [__m256i; 2] {
        type Floats = [__m256; 2];
        type Line = [__m256i; 2];
        /// Of sixteen bits, two for each column.
        type Few = Self;
        #[inline(always)]
        unsafe fn splat(value: i32) -> Self {
            // SAFETY: AVX2 is there. So below.
            unsafe { [_mm256_set1_epi32(value); 2] }
        }
        #[inline(always)]
        unsafe fn begin_wide(_: i32) -> Self {
            // SAFETY: as above.
            unsafe { [_mm256_setzero_si256(); 2] }
        }
        #[inline(always)]
        unsafe fn dot_wide(self, w: [__m256i; 2], x: *const i8) -> Self {
            // SAFETY: as above, and the caller's. Pairs of products are at most 2 * 128 * 127, which an i16 holds: inputs are
            // never -128.
            unsafe {
                let x = _mm256_set1_epi32(four(x));
                std::array::from_fn(|i| {
                    let w = _mm256_xor_si256(w[i], _mm256_set1_epi8(-128));
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                    _mm256_add_epi32(self[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                })
            }
        }
        #[inline(always)]
        unsafe fn few(self) -> Self {
            // SAFETY: as above.
            unsafe { [_mm256_setzero_si256(); 2] }
        }
        #[inline(always)]
        unsafe fn dot(few: Self, w: [__m256i; 2], x: *const i8) -> Self {
            // SAFETY: as above, and the caller's. A pair's products are at most 2 * 15 * 127 of eight groups, or 2 * 31 * 127 of four, or
            // 2 * 63 * 127 of two: all that are added fit an i16.
            unsafe {
                let x = _mm256_set1_epi32(four(x));
                std::array::from_fn(|i| _mm256_add_epi16(few[i], _mm256_maddubs_epi16(w[i], x)))
            }
        }
        #[inline(always)]
        unsafe fn with(self, few: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                let ones = _mm256_set1_epi16(1);
                std::array::from_fn(|i| _mm256_add_epi32(self[i], _mm256_madd_epi16(few[i], ones)))
            }
        }
        #[inline(always)]
        unsafe fn dot_pair(self, w: [__m256i; 2], x: *const i16) -> Self {
            // SAFETY: as above, and the caller's.
            unsafe {
                let x = _mm256_set1_epi32(four(x.cast()));
                std::array::from_fn(|i| _mm256_add_epi32(self[i], _mm256_madd_epi16(w[i], x)))
            }
        }
        #[inline(always)]
        unsafe fn floats(self) -> [__m256; 2] {
            // SAFETY: as above.
            unsafe { self.map(|sums| _mm256_cvtepi32_ps(sums)) }
        }
        #[inline(always)]
        unsafe fn line(at: *const u8) -> [__m256i; 2] {
            // SAFETY: as above, and the caller's.
            unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())] }
        }
        #[inline(always)]
        unsafe fn put(line: [__m256i; 2], at: *mut u8) {
            // SAFETY: as above, and the caller's.
            unsafe {
                _mm256_storeu_si256(at.cast(), line[0]);
                _mm256_storeu_si256(at.add(32).cast(), line[1]);
            }
        }
        #[inline(always)]
        unsafe fn low(line: [__m256i; 2]) -> [__m256i; 2] {
            // SAFETY: as above.
            unsafe { line.map(|half| _mm256_and_si256(half, _mm256_set1_epi8(15))) }
        }
        #[inline(always)]
        unsafe fn high(line: [__m256i; 2]) -> [__m256i; 2] {
            // SAFETY: as above; what is shifted in from the byte beside is masked off.
            unsafe { line.map(|half| _mm256_and_si256(_mm256_srli_epi16::<4>(half), _mm256_set1_epi8(15))) }
        }
        #[inline(always)]
        unsafe fn fifth(line: [__m256i; 2], bits: [__m256i; 2], bit: usize) -> [__m256i; 2] {
            // SAFETY: as above.
            unsafe {
                let bit = _mm256_set1_epi8((1u8 << bit).cast_signed());
                std::array::from_fn(|i| {
                    let there = _mm256_cmpeq_epi8(_mm256_and_si256(bits[i], bit), bit);
                    _mm256_or_si256(line[i], _mm256_and_si256(there, _mm256_set1_epi8(16)))
                })
            }
        }
        #[inline(always)]
        unsafe fn sixth(line: [__m256i; 2], bits: [__m256i; 2], pair: usize) -> [__m256i; 2] {
            // SAFETY: as above.
            unsafe {
                std::array::from_fn(|i| {
                    let moved = match pair {
                        0 => _mm256_slli_epi16::<4>(bits[i]),
                        1 => _mm256_slli_epi16::<2>(bits[i]),
                        2 => bits[i],
                        _ => _mm256_srli_epi16::<2>(bits[i]),
                    };
                    _mm256_or_si256(line[i], _mm256_and_si256(moved, _mm256_set1_epi8(48)))
                })
            }
        }
        #[inline(always)]
        unsafe fn shifted(magnitudes: [__m256i; 2], shifts: [__m256i; 2], of_four: usize) -> [__m256i; 2] {
            // SAFETY: as above. Bytes of the index with their highest bit set become zero.
            unsafe {
                let powers = _mm256_broadcastsi128_si256(_mm_set1_epi64x(0x8040_2010_0804_0201u64.cast_signed()));
                // Filled in a loop: a closure as long as this is not compiled into the kernel.
                let mut all = magnitudes;
                for (word, shifts) in all.iter_mut().zip(shifts) {
                    let magnitude = match of_four % 2 {
                        0 => _mm256_and_si256(*word, _mm256_set1_epi16(0xff)),
                        _ => _mm256_srli_epi16::<8>(*word),
                    };
                    // The four bits at the bottom of each word, and at its top.
                    let (low, high) = match of_four {
                        0 => (shifts, _mm256_slli_epi16::<12>(shifts)),
                        1 => (_mm256_srli_epi16::<4>(shifts), _mm256_slli_epi16::<8>(shifts)),
                        2 => (_mm256_srli_epi16::<8>(shifts), _mm256_slli_epi16::<4>(shifts)),
                        _ => (_mm256_srli_epi16::<12>(shifts), shifts),
                    };
                    let index = _mm256_and_si256(low, _mm256_set1_epi16(15));
                    let index = _mm256_or_si256(index, _mm256_set1_epi16(0x8000u16.cast_signed()));
                    let by = _mm256_shuffle_epi8(powers, index);
                    // The sign of what is not zero.
                    let sign = _mm256_or_si256(high, _mm256_set1_epi16(1));
                    *word = _mm256_sign_epi16(_mm256_mullo_epi16(magnitude, by), sign);
                }
                all
            }
        }
    }
}
