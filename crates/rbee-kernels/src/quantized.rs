//! Weights of few bits: the values of ggml's Q8_0 and Q4_K blocks, laid out in panels.
//!
//! A block is a stretch of one output's inputs with scales of its own. What a block stands for is an f32 for each weight,
//! exactly as ggml widens it; [`Stored::load`] gives those in registers.
//! - Q8_0, 32 inputs: `d * q`, f16 times i8.
//! - Q4_K, 256 inputs in eight runs of 32: `d * scale * q - dmin * min`, f16 times 6 bits times 4 bits, less f16 times 6
//!   bits.
//!
//! Both products are exact in f32 and the difference rounds once, so there is one answer. Blocks are made by candle, or are a file's own.

#![expect(unsafe_code, reason = "SIMD loads from raw pointers")]

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;

use crate::ggml;
use crate::packed::{NotFinite, PANEL, Stored, WeightType, widen};
use crate::simd::{LANES, Lanes};

/// Inputs that share a scale, in both forms.
const RUN: usize = 32;

/// Inputs of a Q4_K block, and its runs.
const BLOCK: usize = 256;
const RUNS: usize = BLOCK / RUN;

/// Bytes of a panel's scales, one f16 per column.
const SCALES: usize = PANEL * size_of::<f16>();

/// Bytes of a run of Q8_0 in a panel: scales, then 64 weights per input.
const Q8_RUN: usize = SCALES + RUN * PANEL;

/// Bytes of a run of Q4_K in a panel: 64 scales, 64 minima, then 64 weights of half a byte per input. Of 32 columns, the
/// first 16 are the low halves.
const Q4_RUN: usize = 2 * PANEL + RUN * PANEL / 2;

/// Bytes of a block of Q4_K in a panel: `d` and then `-dmin` of all columns, then its runs.
const Q4_BLOCK: usize = 2 * SCALES + RUNS * Q4_RUN;

/// Bytes of ggml's blocks of one row.
const GGML_Q8: usize = 2 + RUN;
const GGML_Q4: usize = 4 + 12 + BLOCK / 2;

/// A form of few bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// 8.5 bits per weight.
    Q8_0,
    /// 4.6 bits per weight.
    Q4K,
}

impl Quantization {
    /// Inputs of a block: rows are whole blocks.
    pub fn block(self) -> usize {
        match self {
            Self::Q8_0 => RUN,
            Self::Q4K => BLOCK,
        }
    }

    /// Bytes of a panel of `k` inputs.
    pub(crate) fn panel(self, k: usize) -> usize {
        match self {
            Self::Q8_0 => k / RUN * Q8_RUN,
            Self::Q4K => k / BLOCK * Q4_BLOCK,
        }
    }
}

/// Quantizes the rows of one panel into `out`, which is zeroed.
///
/// # Errors
/// When a weight is infinite or not a number, or a block's scale does not fit an f16.
pub(crate) fn pack(form: Quantization, rows: &[(WeightType, &[u8])], out: &mut [u8]) -> Result<(), NotFinite> {
    for (column, (kind, bytes)) in rows.iter().enumerate() {
        let same = match kind {
            WeightType::Blocks(blocks) => ggml::same(*blocks, form, bytes),
            _ => None,
        };
        let blocks = match same {
            Some(blocks) => blocks,
            // A row that candle cannot quantize is none of ours: whole blocks of finite numbers always can be.
            None => Cow::Owned(made(form, widen(*kind, bytes)?).map_err(|_| NotFinite)?),
        };
        match form {
            Quantization::Q8_0 => put_q8(&blocks, column, out)?,
            Quantization::Q4K => put_q4(&blocks, column, out)?,
        }
    }
    Ok(())
}

/// ggml's blocks of one row.
fn made(form: Quantization, values: Vec<f32>) -> candle_core::Result<Vec<u8>> {
    let kind = match form {
        Quantization::Q8_0 => GgmlDType::Q8_0,
        Quantization::Q4K => GgmlDType::Q4K,
    };
    let len = values.len();
    let row = Tensor::from_vec(values, len, &Device::Cpu)?;
    Ok(QTensor::quantize(&row, kind)?.data()?.into_owned())
}

/// An f16 of a file, if it is a number.
fn half(bytes: [u8; 2]) -> Result<f16, NotFinite> {
    let value = f16::from_le_bytes(bytes);
    if value.is_finite() { Ok(value) } else { Err(NotFinite) }
}

/// Puts a row of ggml's Q8_0 blocks (f16 scale, 32 weights) into a column of a panel.
fn put_q8(blocks: &[u8], column: usize, panel: &mut [u8]) -> Result<(), NotFinite> {
    let (blocks, _) = blocks.as_chunks::<GGML_Q8>();
    for (block, run) in blocks.iter().zip(panel.chunks_exact_mut(Q8_RUN)) {
        let (scales, weights) = run.split_at_mut(SCALES);
        scales[2 * column..][..2].copy_from_slice(&half([block[0], block[1]])?.to_ne_bytes());
        for (to, weight) in weights[column..].iter_mut().step_by(PANEL).zip(&block[2..]) {
            *to = *weight;
        }
    }
    Ok(())
}

/// Puts a row of ggml's Q4_K blocks (f16 `d` and `dmin`, 12 bytes of scales and minima, 128 of weights) into a column.
fn put_q4(blocks: &[u8], column: usize, panel: &mut [u8]) -> Result<(), NotFinite> {
    let (blocks, _) = blocks.as_chunks::<GGML_Q4>();
    for (block, out) in blocks.iter().zip(panel.chunks_exact_mut(Q4_BLOCK)) {
        let (head, runs) = out.split_at_mut(2 * SCALES);
        let (d, dmin) = (half([block[0], block[1]])?, half([block[2], block[3]])?);
        head[2 * column..][..2].copy_from_slice(&d.to_ne_bytes());
        head[SCALES + 2 * column..][..2].copy_from_slice(&(-dmin).to_ne_bytes());
        let (packed, weights) = block[4..].split_at(12);
        for (i, run) in runs.chunks_exact_mut(Q4_RUN).enumerate() {
            // Six bits each: the first four whole, the others with their upper two in the first four's spare ones.
            let (scale, min) = if i < 4 {
                (packed[i] & 63, packed[i + 4] & 63)
            } else {
                (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
            };
            run[column] = scale;
            run[PANEL + column] = min;
            // Two runs share 32 bytes, the first in the low halves.
            let (pair, shift) = (&weights[i / 2 * RUN..][..RUN], i % 2 * 4);
            let (byte, high) = (column / 32 * 16 + column % 16, column % 32 / 16 * 4);
            for (to, weights) in run[2 * PANEL + byte..].iter_mut().step_by(PANEL / 2).zip(pair) {
                *to |= (weights >> shift & 15) << high;
            }
        }
    }
    Ok(())
}

/// A matrix of Q8_0 panels.
#[derive(Clone, Copy)]
pub(crate) struct Q8<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) k: usize,
}

impl Stored for Q8<'_> {
    type At = *const u8;
    type Scale<L: Lanes> = L;

    #[inline(always)]
    fn run(self) -> usize {
        RUN
    }
    #[inline(always)]
    unsafe fn at(self, panel: usize, run: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { self.data.as_ptr().add((panel * (self.k / RUN) + run) * Q8_RUN) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(at: *const u8, vector: usize) -> L {
        // SAFETY: a run begins with 64 scales.
        unsafe { L::load(at.cast::<f16>().add(vector * LANES)) }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const u8, i: usize, vector: usize, scale: L) -> L {
        // SAFETY: the scales are followed by 64 weights per input.
        unsafe { L::load_i8(at.add(SCALES + i * PANEL + vector * LANES).cast()).fma(scale, L::splat(0.0)) }
    }
}

/// A matrix of Q4_K panels.
#[derive(Clone, Copy)]
pub(crate) struct Q4K<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) k: usize,
}

/// A run of Q4_K and the head of its block.
#[derive(Clone, Copy)]
pub(crate) struct Q4Run {
    head: *const u8,
    run: *const u8,
}

/// What the weights of a run are multiplied with, and what is added then.
#[derive(Clone, Copy)]
pub(crate) struct Q4Scale<L> {
    scale: L,
    min: L,
}

impl Stored for Q4K<'_> {
    type At = Q4Run;
    type Scale<L: Lanes> = Q4Scale<L>;

    #[inline(always)]
    fn run(self) -> usize {
        RUN
    }
    #[inline(always)]
    unsafe fn at(self, panel: usize, run: usize) -> Q4Run {
        // SAFETY: the caller's: a panel has `k / 256` blocks of eight runs.
        unsafe {
            let head = self.data.as_ptr().add((panel * (self.k / BLOCK) + run / RUNS) * Q4_BLOCK);
            Q4Run { head, run: head.add(2 * SCALES + run % RUNS * Q4_RUN) }
        }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(at: Q4Run, vector: usize) -> Q4Scale<L> {
        // SAFETY: a head has 64 values of each kind, and so has the start of a run.
        unsafe {
            let product = |factor: usize, part: usize| {
                let bits = L::load_u8(at.run.add(part * PANEL + vector * LANES));
                bits.fma(L::load(at.head.add(factor * SCALES).cast::<f16>().add(vector * LANES)), L::splat(0.0))
            };
            Q4Scale { scale: product(0, 0), min: product(1, 1) }
        }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: Q4Run, i: usize, vector: usize, Q4Scale { scale, min }: Q4Scale<L>) -> L {
        // SAFETY: scales and minima are followed by 32 bytes per input, 16 for each pair of vectors.
        unsafe {
            let bytes = at.run.add(2 * PANEL + i * PANEL / 2 + vector / 2 * LANES);
            let bits = if vector.is_multiple_of(2) { L::load_low(bytes) } else { L::load_high(bytes) };
            bits.fma(scale, min)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul;
    use crate::packed::{Kept, Packed};
    use crate::pool::Pool;
    use crate::simd::Isa;
    use crate::testing::{bytes, values};

    const FORMS: [Quantization; 2] = [Quantization::Q8_0, Quantization::Q4K];

    /// What candle widens its blocks to.
    fn widened(form: Quantization, values: &[f32]) -> Vec<f32> {
        let kind = match form {
            Quantization::Q8_0 => GgmlDType::Q8_0,
            Quantization::Q4K => GgmlDType::Q4K,
        };
        let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, kind).unwrap().dequantize(&Device::Cpu).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn products_are_those_with_the_weights_that_blocks_stand_for() {
        for form in FORMS {
            for (m, n, k) in [(1, 1, 256), (2, 64, 512), (3, 70, 256), (7, 129, 768), (13, 200, 256)] {
                let weights: Vec<f32> = values(n as u32, n * k).iter().map(|v| v * v * v + 0.1).collect();
                let wide: Vec<f32> = weights.chunks(k).flat_map(|row| widened(form, row)).collect();
                let off = weights.iter().zip(&wide).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(off > 0.0 && off < 0.15, "{form:?} is off by {off}");
                let x = values(m as u32, m * k);
                let plain = Packed::new(&[(WeightType::F32, &bytes(WeightType::F32, &wide))], k).unwrap();
                let mut want = vec![0.0; m * n];
                matmul(&mut Pool::new(1), Isa::Scalar, &x, &plain, &mut want);
                // In two parts of two types, as a model's matrices may come.
                let split = n / 2 * k;
                let parts = [bytes(WeightType::F32, &weights[..split]), bytes(WeightType::F32, &weights[split..])];
                let parts = [(WeightType::F32, &parts[0][..]), (WeightType::F32, &parts[1][..])];
                let packed = Packed::quantized(&mut Pool::new(3), form, &parts, k).unwrap();
                assert_eq!(packed.held(), Kept::Quantized(form).bytes(n as u64, k as u64));
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
                    for rows in [1, m] {
                        let mut got = vec![0.0; rows * n];
                        matmul(&mut Pool::new(2), isa, &x[..rows * k], &packed, &mut got);
                        assert_eq!(got, want[..rows * n], "{form:?} {isa:?} {rows}x{n}x{k}");
                    }
                }
                let mut row = vec![0.0; k];
                for i in [0, n / 2, n - 1] {
                    packed.row(i, &mut row);
                    assert_eq!(row, wide[i * k..][..k], "{form:?} row {i}");
                }
            }
        }
    }

    #[test]
    fn weights_that_are_no_numbers_or_too_large_are_refused() {
        for form in FORMS {
            for bad in [f32::NAN, f32::INFINITY, 1e30] {
                let mut values = values(3, 256 * 5);
                values[700] = bad;
                let bytes = bytes(WeightType::F32, &values);
                let packed = Packed::quantized(&mut Pool::new(1), form, &[(WeightType::F32, &bytes)], 256);
                assert_eq!(packed.err(), Some(NotFinite), "{form:?} {bad}");
            }
        }
    }
}
