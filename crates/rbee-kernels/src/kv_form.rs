//! How the blocks of a KV cache stand in memory.
//!
//! A block holds 16 positions of one KV head: its keys with the positions as lanes, so that a score is a chain over the
//! dimensions for 16 positions at once, and its values with the dimensions as lanes. The plain types keep them so as they
//! are: keys `[dim][16]`, values `[16][width]`, `width` being `dim` rounded up to whole vectors. [`Q8Kv`] has a scale for
//! every 32 dimensions of a position.

#![expect(unsafe_code, reason = "SIMD loads from raw pointers")]

use bytemuck::Zeroable;

use crate::attention::{BLOCK, width};
use crate::simd::{Element, LANES, Lanes};

/// A form of keys and values.
pub trait KvForm: 'static {
    /// What blocks are counted in.
    type Unit: Zeroable + Copy + Send + Sync;
    /// What some dimensions of 16 keys share.
    type Scale<L: Lanes>: Copy;
    /// Dimensions that share it.
    const GROUP: usize;
    /// Units of a block's keys.
    fn key_len(dim: usize) -> usize;
    /// Units of a block's values.
    fn value_len(dim: usize) -> usize;
    /// Writes the key of one position of a block, rounded to this form.
    fn write_key(block: &mut [Self::Unit], offset: usize, key: &[f32]);
    /// Writes the value of one position of a block, rounded to this form.
    fn write_value(block: &mut [Self::Unit], offset: usize, value: &[f32]);
    /// What the keys share in the group that begins at dimension `first`.
    ///
    /// # Safety
    /// `keys` points to a block's keys with such a group; the instruction set of `L` is there. So for all of these.
    unsafe fn scale<L: Lanes>(keys: *const Self::Unit, first: usize) -> Self::Scale<L>;
    /// Dimension `i` of 16 keys.
    ///
    /// # Safety
    /// As above.
    unsafe fn key<L: Lanes>(keys: *const Self::Unit, i: usize, scale: Self::Scale<L>) -> L;
    /// Units of the value of one position.
    fn stride(dim: usize) -> usize;
    /// Dimensions `16 * vector..` of the value of a position, of `dim` in all.
    ///
    /// # Safety
    /// As above, for the position's value.
    unsafe fn value<L: Lanes>(at: *const Self::Unit, dim: usize, vector: usize) -> L;
}

impl<T: Element> KvForm for T {
    type Unit = T;
    type Scale<L: Lanes> = ();
    const GROUP: usize = usize::MAX;

    fn key_len(dim: usize) -> usize {
        dim * BLOCK
    }
    fn value_len(dim: usize) -> usize {
        width(dim) * BLOCK
    }
    fn write_key(block: &mut [T], offset: usize, key: &[f32]) {
        for (to, value) in block[offset..].iter_mut().step_by(BLOCK).zip(key) {
            *to = T::narrow(*value);
        }
    }
    fn write_value(block: &mut [T], offset: usize, value: &[f32]) {
        for (to, value) in block[offset * width(value.len())..].iter_mut().zip(value) {
            *to = T::narrow(*value);
        }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const T, _: usize) {}
    #[inline(always)]
    unsafe fn key<L: Lanes>(keys: *const T, i: usize, (): ()) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(keys.add(i * BLOCK)) }
    }
    #[inline(always)]
    fn stride(dim: usize) -> usize {
        width(dim)
    }
    #[inline(always)]
    unsafe fn value<L: Lanes>(at: *const T, _: usize, vector: usize) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(at.add(vector * LANES)) }
    }
}

/// Eight bits for each value and an f32 for every 32 dimensions: 9 bits. What is read is `scale * q`, rounded once.
///
/// Keys of a group: 16 scales, then `[dimensions of the group][16]`. A position's value: `width` bytes, then its scales.
pub struct Q8Kv;

/// Dimensions of a group.
const GROUP: usize = 32;

/// Bytes of a scale.
const SCALE: usize = size_of::<f32>();

/// Bytes of the keys of a whole group in a block.
const KEYS: usize = BLOCK * (SCALE + GROUP);

/// The scale of some values: what is not a number stays none.
fn scale_of(values: &[f32]) -> f32 {
    if values.iter().any(|value| !value.is_finite()) {
        return f32::NAN;
    }
    values.iter().fold(0f32, |high, value| high.max(value.abs())) / 127.0
}

fn quantize(value: f32, scale: f32) -> u8 {
    let steps = if scale > 0.0 { (value / scale).round_ties_even() } else { 0.0 };
    (steps as i8).cast_unsigned()
}

impl KvForm for Q8Kv {
    type Unit = u8;
    type Scale<L: Lanes> = L;
    const GROUP: usize = GROUP;

    fn key_len(dim: usize) -> usize {
        BLOCK * (dim.div_ceil(GROUP) * SCALE + dim)
    }
    fn value_len(dim: usize) -> usize {
        BLOCK * Self::stride(dim)
    }
    fn write_key(block: &mut [u8], offset: usize, key: &[f32]) {
        for (key, block) in key.chunks(GROUP).zip(block.chunks_mut(KEYS)) {
            let scale = scale_of(key);
            block[offset * SCALE..][..SCALE].copy_from_slice(&scale.to_ne_bytes());
            for (to, value) in block[BLOCK * SCALE + offset..].iter_mut().step_by(BLOCK).zip(key) {
                *to = quantize(*value, scale);
            }
        }
    }
    fn write_value(block: &mut [u8], offset: usize, value: &[f32]) {
        let (bytes, scales) = block[offset * Self::stride(value.len())..].split_at_mut(width(value.len()));
        let groups = value.chunks(GROUP).zip(bytes.chunks_mut(GROUP)).zip(scales.as_chunks_mut::<SCALE>().0);
        for ((value, bytes), to) in groups {
            let scale = scale_of(value);
            *to = scale.to_ne_bytes();
            for (to, value) in bytes.iter_mut().zip(value) {
                *to = quantize(*value, scale);
            }
        }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(keys: *const u8, first: usize) -> L {
        // SAFETY: the caller's: a group begins with 16 scales.
        unsafe { L::load(keys.add(first / GROUP * KEYS).cast::<f32>()) }
    }
    #[inline(always)]
    unsafe fn key<L: Lanes>(keys: *const u8, i: usize, scale: L) -> L {
        // SAFETY: the caller's: the scales are followed by 16 bytes for each dimension.
        unsafe {
            let at = keys.add(i / GROUP * KEYS + BLOCK * SCALE + i % GROUP * BLOCK);
            L::load_i8(at.cast()).fma(scale, L::splat(0.0))
        }
    }
    #[inline(always)]
    fn stride(dim: usize) -> usize {
        width(dim) + dim.div_ceil(GROUP) * SCALE
    }
    #[inline(always)]
    unsafe fn value<L: Lanes>(at: *const u8, dim: usize, vector: usize) -> L {
        // SAFETY: the caller's: a position has `width` bytes and then its scales.
        unsafe {
            let scale = at.add(width(dim) + vector * LANES / GROUP * SCALE).cast::<f32>().read_unaligned();
            L::load_i8(at.add(vector * LANES).cast()).fma(L::splat(scale), L::splat(0.0))
        }
    }
}
