//! Weights of few bits: the values of ggml's blocks, laid out in tiles.
//!
//! A block is a stretch of one output's inputs with scales of its own. What a weight stands for is an f32, exactly as ggml widens
//! it, `d`, `dmin` being f16:
//! - Q8_0, 32 inputs: `d * q`, q of eight bits with a sign.
//! - Q4_0, 32 inputs: `d * (q - 8)`, q of four bits.
//! - Q4_K and Q5_K, 256 inputs in eight runs of 32: `d * scale * q - dmin * min`, scale and min of six bits, q of four or five.
//! - Q6_K, 256 inputs in sixteen halves of runs: `d * scale * (q - 32)`, scale of eight bits with a sign, q of six.
//!
//! A tile is sixteen outputs. Lines of 64 bytes hold a group of four inputs of all of them, side by side for each output; a line of
//! halves of bytes holds two groups, the first in the low halves; lines of upper bits stand beside those of their run. Q8_0 and Q4_0
//! have the scales of the whole tile first, the others those of a block at its beginning.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;

use crate::ggml;
use crate::ints::{GROUP, LINE};
use crate::packed::{NotFinite, WeightType, widen};
use crate::rounded::RUN;
use crate::simd::LANES;

/// Inputs of a large block, and its runs.
const BLOCK: usize = 256;
pub(crate) const RUNS: usize = BLOCK / RUN;

/// Bytes of the scales of a run: an f16, or two of eight bits, for each output.
pub(crate) const SCALES: usize = 2 * LANES;

/// Bytes at the beginning of a large block: `d` and then `-dmin` of all outputs, where there is one.
pub(crate) const HEAD: usize = 2 * SCALES;

/// Where scale and minimum of a run of Q4_K or Q5_K are in its block: six bits each, twelve of them for each output. Two runs share
/// three bytes: one of each with the scale and the minimum's lower two bits, and one with the minima's upper four, the first
/// run's in its low half.
#[derive(Clone, Copy)]
pub(crate) struct Sixes {
    /// Sixteen bytes of the run alone.
    pub(crate) own: usize,
    /// Sixteen that it shares.
    pub(crate) shared: usize,
    /// Its bits' place in these.
    pub(crate) shift: u32,
}

impl Sixes {
    /// Bytes of a block's.
    const ALL: usize = RUNS / 2 * 3 * LANES;

    #[inline(always)]
    pub(crate) const fn of(run: usize) -> Self {
        let pair = HEAD + run / 2 * 3 * LANES;
        Self { own: pair + run % 2 * LANES, shared: pair + 2 * LANES, shift: run as u32 % 2 * 4 }
    }
}

/// Lines of a run that has a line for each group, and that has one for two.
const WHOLE: usize = RUN / GROUP * LINE;
const HALVES: usize = WHOLE / 2;

/// The pairs of groups of a run.
const PAIRS: Range<usize> = 0..RUN / GROUP / 2;

pub(crate) struct Q8_0;
pub(crate) struct Q4_0;
pub(crate) struct Q4K;
pub(crate) struct Q5K;
pub(crate) struct Q6K;

/// Where the weights of a run are in a tile of small blocks.
const fn after_scales(k: usize, run: usize, bytes: usize) -> usize {
    (k / RUN * SCALES).next_multiple_of(LINE) + run * bytes
}

impl Q8_0 {
    pub(crate) const RUN: usize = WHOLE;
    #[inline(always)]
    pub(crate) const fn weights(k: usize, run: usize) -> usize {
        after_scales(k, run, Self::RUN)
    }
}

impl Q4_0 {
    pub(crate) const RUN: usize = HALVES;
    #[inline(always)]
    pub(crate) const fn weights(k: usize, run: usize) -> usize {
        after_scales(k, run, Self::RUN)
    }
}

impl Q4K {
    pub(crate) const RUN: usize = HALVES;
    pub(crate) const BLOCK: usize = Self::weights(RUNS);
    #[inline(always)]
    pub(crate) const fn weights(run: usize) -> usize {
        HEAD + Sixes::ALL + run * Self::RUN
    }
}

impl Q5K {
    /// The last line has the fifth bits: bit `g` of a byte is of group `g`.
    pub(crate) const RUN: usize = HALVES + LINE;
    pub(crate) const BLOCK: usize = Self::weights(RUNS);
    #[inline(always)]
    pub(crate) const fn weights(run: usize) -> usize {
        HEAD + Sixes::ALL + run * Self::RUN
    }
}

impl Q6K {
    /// Three lines for each half: the upper two bits of its four groups, from the lowest bits on, and the lower four.
    pub(crate) const RUN: usize = HALVES + 2 * LINE;
    pub(crate) const BLOCK: usize = Self::weights(RUNS);
    #[inline(always)]
    pub(crate) const fn weights(run: usize) -> usize {
        HEAD + RUNS * SCALES + run * Self::RUN
    }

    /// Where a half is in its run.
    #[inline(always)]
    pub(crate) const fn half(half: usize) -> usize {
        half * (Self::RUN / 2)
    }
}

/// A form of few bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// 8.5 bits per weight.
    Q8_0,
    /// 4.5 bits per weight.
    Q4_0,
    /// 4.5 bits per weight.
    Q4K,
    /// 5.5 bits per weight.
    Q5K,
    /// 6.6 bits per weight.
    Q6K,
}

impl Quantization {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Q8_0, Self::Q4_0, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Inputs of a block: rows are whole blocks.
    pub fn block(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => RUN,
            Self::Q4K | Self::Q5K | Self::Q6K => BLOCK,
        }
    }

    /// Bytes of a tile of `k` inputs.
    pub(crate) fn tile(self, k: usize) -> usize {
        match self {
            Self::Q8_0 => Q8_0::weights(k, k / RUN),
            Self::Q4_0 => Q4_0::weights(k, k / RUN),
            Self::Q4K => k / BLOCK * Q4K::BLOCK,
            Self::Q5K => k / BLOCK * Q5K::BLOCK,
            Self::Q6K => k / BLOCK * Q6K::BLOCK,
        }
        .next_multiple_of(LINE)
    }

    fn candle(self) -> GgmlDType {
        match self {
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }
}

/// Quantizes the rows of one tile into `out`, which is zeroed.
///
/// # Errors
/// When a weight is infinite or not a number, or a block's scale does not fit an f16.
pub(crate) fn pack(
    form: Quantization,
    rows: &[(WeightType, &[u8])],
    k: usize,
    out: &mut [u8],
) -> Result<(), NotFinite> {
    for (column, (kind, bytes)) in rows.iter().enumerate() {
        let same = match kind {
            WeightType::Blocks(blocks) => ggml::same(*blocks, form, bytes),
            _ => None,
        };
        let blocks = match same {
            Some(blocks) => blocks,
            None => Cow::Owned(made(form, widen(*kind, bytes)?)?),
        };
        put(form, &blocks, Column { column, k, tile: &mut *out })?;
    }
    Ok(())
}

/// Weights that no form holds: of larger ones the squares, which candle's search for a scale adds up, are infinite.
const LARGEST: f32 = 1e12;

/// ggml's blocks of one row.
fn made(form: Quantization, values: Vec<f32>) -> Result<Vec<u8>, NotFinite> {
    if values.iter().any(|value| value.abs() > LARGEST) {
        return Err(NotFinite);
    }
    let len = values.len();
    // A row that candle cannot quantize is none of ours: whole blocks of finite numbers always can be.
    let row = Tensor::from_vec(values, len, &Device::Cpu).and_then(|row| QTensor::quantize(&row, form.candle()));
    row.and_then(|row| Ok(row.data()?.into_owned())).map_err(|_| NotFinite)
}

/// One output's place in a tile.
struct Column<'a> {
    column: usize,
    k: usize,
    tile: &'a mut [u8],
}

impl Column<'_> {
    /// Writes four bytes of a line.
    fn word(&mut self, line: usize, word: u32) {
        self.tile[line + self.column * GROUP..][..GROUP].copy_from_slice(&word.to_le_bytes());
    }

    fn byte(&mut self, at: usize, byte: u8) {
        self.tile[at + self.column] = byte;
    }

    /// Writes bits of a byte beside those that it has.
    fn bits(&mut self, at: usize, bits: u8) {
        self.tile[at + self.column] |= bits;
    }

    /// Writes an f16 of a file, if it is a number.
    fn half(&mut self, at: usize, bytes: [u8; 2], sign: f32) -> Result<(), NotFinite> {
        let value = f16::from_le_bytes(bytes);
        if !value.is_finite() {
            return Err(NotFinite);
        }
        let value = if sign < 0.0 { -value } else { value };
        self.tile[at + 2 * self.column..][..2].copy_from_slice(&value.to_ne_bytes());
        Ok(())
    }

    /// Writes the low halves of a run's eight words, two to a line.
    fn halves(&mut self, at: usize, pairs: Range<usize>, groups: impl Fn(usize) -> u32) {
        for (i, pair) in pairs.enumerate() {
            self.word(at + i * LINE, groups(2 * pair) & LOW | (groups(2 * pair + 1) & LOW) << 4);
        }
    }
}

/// The low halves of four bytes.
const LOW: u32 = 0x0f0f_0f0f;

/// Four bytes of a block, from `at` on.
fn four(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| block[at + i]))
}

/// Scale and minimum of a run of Q4_K or Q5_K, six bits each: the first four are whole, the others have their upper two in the
/// first four's spare ones.
fn scale_and_min(packed: &[u8], run: usize) -> (u8, u8) {
    if run < 4 {
        (packed[run] & 63, packed[run + 4] & 63)
    } else {
        let (both, scale, min) = (packed[run + 4], packed[run - 4], packed[run]);
        (both & 15 | scale >> 6 << 4, both >> 4 | min >> 6 << 4)
    }
}

/// Puts a row of ggml's blocks into a column.
fn put(form: Quantization, row: &[u8], mut column: Column<'_>) -> Result<(), NotFinite> {
    let k = column.k;
    let blocks = row.chunks_exact(form.candle().type_size()).enumerate();
    match form {
        // f16 scale, 32 weights.
        Quantization::Q8_0 => {
            for (run, block) in blocks {
                column.half(run * SCALES, [block[0], block[1]], 1.0)?;
                for group in 0..RUN / GROUP {
                    let word = four(block, 2 + group * GROUP) ^ 0x8080_8080;
                    column.word(Q8_0::weights(k, run) + group * LINE, word);
                }
            }
        }
        // f16 scale, 16 bytes: the first half of the run in the low halves.
        Quantization::Q4_0 => {
            for (run, block) in blocks {
                column.half(run * SCALES, [block[0], block[1]], 1.0)?;
                column.halves(Q4_0::weights(k, run), PAIRS, |group| {
                    four(block, 2 + group % 4 * GROUP) >> (group / 4 * 4)
                });
            }
        }
        // f16 `d` and `dmin`, 12 bytes of scales and minima, 128 of weights: two runs share 32 bytes, the first in the low halves. Q5_K
        // has 32 bytes before the weights with the fifth bits: bit `r` of a byte is of run `r`.
        Quantization::Q4K | Quantization::Q5K => {
            let five = form == Quantization::Q5K;
            let (bytes, first) = if five { (Q5K::BLOCK, 16 + RUN) } else { (Q4K::BLOCK, 16) };
            for (i, block) in blocks {
                let at = i * bytes;
                column.half(at, [block[0], block[1]], 1.0)?;
                column.half(at + SCALES, [block[2], block[3]], -1.0)?;
                for run in 0..RUNS {
                    let (scale, min) = scale_and_min(&block[4..16], run);
                    let sixes = Sixes::of(run);
                    column.byte(at + sixes.own, scale | min << 6);
                    column.bits(at + sixes.shared, min >> 2 << sixes.shift);
                    let weights = at + if five { Q5K::weights(run) } else { Q4K::weights(run) };
                    column.halves(weights, PAIRS, |group| {
                        four(block, first + run / 2 * RUN + group * GROUP) >> (run % 2 * 4)
                    });
                    if five {
                        let fifth = |group| (four(block, 16 + group * GROUP) >> run & 0x0101_0101) << group;
                        column.word(weights + HALVES, (0..RUN / GROUP).fold(0, |all, group| all | fifth(group)));
                    }
                }
            }
        }
        // 128 bytes of low halves, 64 of upper bits, 16 scales, f16 `d`. Of each half of the block, the runs 0 and 1 are the low
        // halves, 2 and 3 the high ones, and run `r` has bits `2r` and `2r + 1` of the upper ones.
        Quantization::Q6K => {
            for (i, block) in blocks {
                let at = i * Q6K::BLOCK;
                column.half(at, [block[208], block[209]], 1.0)?;
                for run in 0..RUNS {
                    column.byte(at + HEAD + run * SCALES, block[192 + 2 * run]);
                    column.byte(at + HEAD + run * SCALES + LANES, block[193 + 2 * run]);
                    let (half, part) = (run / 4, run % 4);
                    let weights = at + Q6K::weights(run);
                    for of_run in 0..2 {
                        let at = weights + Q6K::half(of_run);
                        let upper = |g: usize| four(block, 128 + half * RUN + (4 * of_run + g) * GROUP) >> (2 * part);
                        column.word(at, (0..4).fold(0, |all, g| all | (upper(g) & 0x0303_0303) << (2 * g)));
                        column.halves(at + LINE, 2 * of_run..2 * of_run + 2, |group| {
                            four(block, half * 64 + part % 2 * RUN + group * GROUP) >> (part / 2 * 4)
                        });
                    }
                }
            }
        }
    }
    Ok(())
}

/// The weights of one output of a tile as f32.
pub(crate) fn read(form: Quantization, tile: &[u8], column: usize, out: &mut [f32]) {
    let k = out.len();
    let half = |at: usize| f16::from_ne_bytes([tile[at + 2 * column], tile[at + 2 * column + 1]]).to_f32();
    let byte = |at: usize| tile[at + column];
    let weight = |line: usize, i: usize| tile[line + column * GROUP + i % GROUP];
    let of_four = |weights: usize, i: usize| weight(weights + i / GROUP / 2 * LINE, i) >> (i / GROUP % 2 * 4) & 15;
    for (run, out) in out.chunks_exact_mut(RUN).enumerate() {
        let (block, run_of_block) = (run / RUNS, run % RUNS);
        for (i, out) in out.iter_mut().enumerate() {
            *out = match form {
                Quantization::Q8_0 => {
                    let q = weight(Q8_0::weights(k, run) + i / GROUP * LINE, i) ^ 0x80;
                    half(run * SCALES) * f32::from(q.cast_signed())
                }
                Quantization::Q4_0 => half(run * SCALES) * (f32::from(of_four(Q4_0::weights(k, run), i)) - 8.0),
                Quantization::Q4K | Quantization::Q5K => {
                    let (at, weights, fifth) = if form == Quantization::Q4K {
                        let at = block * Q4K::BLOCK;
                        (at, at + Q4K::weights(run_of_block), 0)
                    } else {
                        let at = block * Q5K::BLOCK;
                        let weights = at + Q5K::weights(run_of_block);
                        (at, weights, (weight(weights + HALVES, i) >> (i / GROUP) & 1) << 4)
                    };
                    let sixes = Sixes::of(run_of_block);
                    let own = byte(at + sixes.own);
                    let min = own >> 6 | (byte(at + sixes.shared) >> sixes.shift & 15) << 2;
                    let (scale, min) = (half(at) * f32::from(own & 63), half(at + SCALES) * f32::from(min));
                    f32::from(of_four(weights, i) | fifth).mul_add(scale, min)
                }
                Quantization::Q6K => {
                    let at = block * Q6K::BLOCK;
                    let weights = at + Q6K::weights(run_of_block) + Q6K::half(i / 16);
                    let upper = weight(weights, i) >> (i / GROUP % 4 * 2) & 3;
                    let scale = byte(at + HEAD + run_of_block * SCALES + i / 16 * LANES).cast_signed();
                    half(at) * f32::from(scale) * (f32::from(of_four(weights + LINE, i % 16) | upper << 4) - 32.0)
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::{Kept, Part};
    use crate::testing::{self, bytes, check_products, values};

    /// What candle widens its blocks to.
    fn widened(form: Quantization, values: &[f32]) -> Vec<f32> {
        let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, form.candle()).unwrap().dequantize(&Device::Cpu).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn products_are_those_of_the_rounded_row_with_the_weights_that_blocks_stand_for() {
        for form in Quantization::ALL {
            for (m, n, k) in [(1, 1, 256), (2, 64, 512), (3, 70, 256), (7, 129, 768), (13, 200, 256), (64, 40, 2048)] {
                let weights: Vec<f32> = values(n as u32, n * k).iter().map(|v| v * v * v + 0.1).collect();
                let wide: Vec<f32> = weights.chunks(k).flat_map(|row| widened(form, row)).collect();
                let off = weights.iter().zip(&wide).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(off > 0.0 && off < 0.2, "{form:?} is off by {off}");
                let x = values(m as u32, m * k);
                // In two parts of two types, as a model's matrices may come.
                let split = n / 2 * k;
                let parts = [bytes(WeightType::F32, &weights[..split]), bytes(WeightType::F32, &weights[split..])];
                let kept = Kept::Quantized(form);
                let parts = parts.each_ref().map(|bytes| Part { kept, kind: WeightType::F32, bytes });
                let packed = testing::packed(&parts, k).unwrap();
                assert_eq!(packed.held(), Kept::bytes(&[(kept, n as u64)], k as u64));
                let mut row = vec![0.0; k];
                for i in [0, n / 2, n - 1] {
                    packed.row(i, &mut row);
                    assert_eq!(row, wide[i * k..][..k], "{form:?} row {i}");
                }
                check_products::<i8>(&x, &packed, &wide);
            }
        }
    }

    #[test]
    fn the_largest_products_do_not_overflow() {
        // All weights of a block but one at the upper end of their steps, and all inputs at theirs.
        let k = 2 * BLOCK;
        let weights: Vec<f32> = (0..20 * k).map(|i| if i % RUN == 0 { -1.0 } else { 31.0 / 32.0 }).collect();
        for form in Quantization::ALL {
            let wide: Vec<f32> = weights.chunks(k).flat_map(|row| widened(form, row)).collect();
            let bytes = bytes(WeightType::F32, &weights);
            let part = Part { kept: Kept::Quantized(form), kind: WeightType::F32, bytes: &bytes };
            let packed = testing::packed(&[part], k).unwrap();
            for x in [1.0, -1.0] {
                check_products::<i8>(&vec![x; 3 * k], &packed, &wide);
            }
        }
    }

    #[test]
    fn weights_that_are_no_numbers_or_too_large_are_refused() {
        for form in Quantization::ALL {
            for bad in [f32::NAN, f32::INFINITY, 1e30] {
                let mut values = values(3, 256 * 5);
                values[700] = bad;
                let bytes = bytes(WeightType::F32, &values);
                let part = Part { kept: Kept::Quantized(form), kind: WeightType::F32, bytes: &bytes };
                let packed = testing::packed(&[part], 256);
                assert_eq!(packed.err(), Some(NotFinite), "{form:?} {bad}");
            }
        }
    }
}
