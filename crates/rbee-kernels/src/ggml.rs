//! The blocks of ggml's files: their sizes, what they stand for, and which of our own forms have the same values.
//!
//! A row of weights is whole blocks of 32 or 256. What a block stands for is what ggml widens it to, in f32.

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};

use crate::packed::NotFinite;
use crate::quantized::Quantization;

/// A kind of block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blocks {
    /// 32 weights of 4 bits, one scale.
    Q4_0,
    /// 32 weights of 4 bits, one scale and one minimum.
    Q4_1,
    /// 32 weights of 5 bits, one scale.
    Q5_0,
    /// 32 weights of 5 bits, one scale and one minimum.
    Q5_1,
    /// 32 weights of 8 bits, one scale.
    Q8_0,
    /// 256 weights of 2 bits, 16 scales and minima.
    Q2K,
    /// 256 weights of 3 bits, 16 scales.
    Q3K,
    /// 256 weights of 4 bits, 8 scales and minima.
    Q4K,
    /// 256 weights of 5 bits, 8 scales and minima.
    Q5K,
    /// 256 weights of 6 bits, 16 scales.
    Q6K,
}

impl Blocks {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    fn candle(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q2K => GgmlDType::Q2K,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// Weights of a block.
    pub fn weights(self) -> usize {
        self.candle().block_size()
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        self.candle().type_size()
    }

    /// The form of ours that has these blocks' very values, if there is one.
    pub fn form(self) -> Option<Quantization> {
        match self {
            Self::Q5_0 | Self::Q8_0 => Some(Quantization::Q8_0),
            Self::Q4_0 => Some(Quantization::Q4_0),
            Self::Q4K => Some(Quantization::Q4K),
            Self::Q5K => Some(Quantization::Q5K),
            Self::Q3K | Self::Q6K => Some(Quantization::Q6K),
            _ => None,
        }
    }
}

/// What blocks stand for.
///
/// # Errors
/// When it is infinite or not a number.
pub(crate) fn widen(blocks: Blocks, bytes: &[u8]) -> Result<Vec<f32>, NotFinite> {
    let weights = bytes.len() / blocks.bytes() * blocks.weights();
    // Candle takes only bytes that lie as its own blocks do.
    let mut aligned: Vec<u64> = Vec::with_capacity(bytes.len().div_ceil(8));
    aligned.extend(bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    }));
    let bytes = &bytemuck::cast_slice::<u64, u8>(&aligned)[..bytes.len()];
    let values = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, blocks.candle())
        .and_then(|storage| QTensor::new(storage, weights)?.dequantize(&Device::Cpu)?.to_vec1::<f32>())
        .map_err(|_| NotFinite)?;
    if values.iter().all(|value| value.is_finite()) { Ok(values) } else { Err(NotFinite) }
}

/// The same values as ggml's blocks of a form, if it has them. [`Blocks::form`] is the form with the fewest bits that does.
pub(crate) fn same(blocks: Blocks, form: Quantization, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    let out = || vec![0; bytes.len() / blocks.bytes() * Blocks::Q8_0.bytes()];
    let widened = |high: fn(&[u8], usize) -> u8, halves: usize, less: i8| {
        let mut out = out();
        for (block, out) in bytes.chunks_exact(blocks.bytes()).zip(out.chunks_exact_mut(Blocks::Q8_0.bytes())) {
            out[..2].copy_from_slice(&block[..2]);
            for (i, byte) in block[halves..].iter().enumerate() {
                out[2 + i] = ((byte & 15 | high(block, i)) as i8 - less) as u8;
                out[18 + i] = ((byte >> 4 | high(block, i + 16)) as i8 - less) as u8;
            }
        }
        out
    };
    match (blocks, form) {
        (Blocks::Q4_0, Quantization::Q8_0) => Some(Cow::Owned(widened(|_, _| 0, 2, 8))),
        // The fifth bits of all 32 come first.
        (Blocks::Q5_0, Quantization::Q8_0) => {
            Some(Cow::Owned(widened(|block, i| (block[2 + i / 8] >> (i % 8) & 1) << 4, 6, 16)))
        }
        (Blocks::Q3K, Quantization::Q6K) => {
            Some(Cow::Owned(bytes.chunks_exact(blocks.bytes()).flat_map(six_bits_of_three).collect()))
        }
        _ if blocks.form() == Some(form) => Some(Cow::Borrowed(bytes)),
        _ => None,
    }
}

/// A block of Q6_K with the values of one of Q3_K, which is 32 bytes of third bits, 64 of lower bits, 12 of scales, f16 `d`.
fn six_bits_of_three(block: &[u8]) -> [u8; 210] {
    let (thirds, rest) = block.split_at(32);
    let (lower, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(12);
    let mut out = [0; 210];
    for run in 0..8 {
        let (half, part) = (run / 4, run % 4);
        for i in 0..32 {
            let third = thirds[i] >> run & 1;
            // Less 4 without a third bit, and more 32 as Q6_K has it.
            let q = (lower[half * 32 + i] >> (2 * part) & 3) + 28 + 4 * third;
            out[half * 64 + part % 2 * 32 + i] |= (q & 15) << (part / 2 * 4);
            out[128 + half * 32 + i] |= q >> 4 << (2 * part);
        }
    }
    for i in 0..16 {
        let four = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
        let six = four | (scales[8 + i % 4] >> (i / 4 * 2) & 3) << 4;
        out[192 + i] = six.wrapping_sub(32);
    }
    out[208..].copy_from_slice(d);
    out
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::matmul;
    use crate::packed::{Kept, Packed, Part, WeightType};
    use crate::pool::Pool;
    use crate::simd::Isa;
    use crate::testing::{self, bytes, values};

    /// A matrix's blocks, made by candle, and what they stand for.
    fn made(blocks: Blocks, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
        let weights: Vec<f32> = values(n as u32, n * k).iter().map(|v| v * v * v + 0.05).collect();
        let tensor = Tensor::from_vec(weights, n * k, &Device::Cpu).unwrap();
        let made = QTensor::quantize(&tensor, blocks.candle()).unwrap();
        (made.data().unwrap().into_owned(), made.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap())
    }

    fn rows(packed: &Packed) -> Vec<f32> {
        let mut out = vec![0.0; packed.n() * packed.k()];
        out.chunks_exact_mut(packed.k()).enumerate().for_each(|(i, row)| packed.row(i, row));
        out
    }

    #[test]
    fn every_kind_is_kept_with_its_values_or_as_the_nearest_halves() {
        let (n, k) = (70, 512);
        for blocks in Blocks::ALL {
            let (file, wide) = made(blocks, n, k);
            let kind = WeightType::Blocks(blocks);
            assert_eq!(file.len(), n * kind.row(k), "{blocks:?}");
            assert_eq!(widen(blocks, &file).unwrap(), wide, "{blocks:?}");
            let packed = testing::packed(&[Part::own(kind, &file)], k).unwrap();
            assert_eq!(packed.held(), Kept::bytes(&[(kind.kept(), n as u64)], k as u64), "{blocks:?}");
            let want: Vec<f32> = match kind.kept() {
                Kept::Quantized(_) => wide,
                _ => wide.iter().map(|value| half::f16::from_f32(*value).to_f32()).collect(),
            };
            assert_eq!(rows(&packed), want, "{blocks:?}");
        }
    }

    #[test]
    fn matrices_of_several_kinds_stand_one_below_the_other_each_as_it_is() {
        let (k, x) = (256, values(1, 256 * 3));
        let kinds = [Blocks::Q4K, Blocks::Q6K, Blocks::Q6K, Blocks::Q4_0, Blocks::Q8_0];
        let made: Vec<_> = kinds.iter().zip([30, 40, 9, 3, 17]).map(|(kind, n)| made(*kind, n, k)).collect();
        let plain = bytes(WeightType::F32, &made[0].1);
        let mut parts: Vec<_> =
            kinds.iter().zip(&made).map(|(kind, (file, _))| Part::own(WeightType::Blocks(*kind), file)).collect();
        parts.push(Part::own(WeightType::F32, &plain));
        // Fewer bits than it has hold what a Q4_0 is.
        parts.push(Part { kept: Kept::Quantized(Quantization::Q8_0), ..parts[3] });
        let packed = testing::packed(&parts, k).unwrap();
        let wide: Vec<&Vec<f32>> = made.iter().map(|(_, wide)| wide).collect();
        assert_eq!(
            rows(&packed),
            [wide[0], wide[1], wide[2], wide[3], wide[4], wide[0], wide[3]].map(|w| &w[..]).concat()
        );
        let sizes: Vec<_> =
            parts.iter().map(|part| (part.kept, (part.bytes.len() / part.kind.row(k)) as u64)).collect();
        assert_eq!(packed.held(), Kept::bytes(&sizes, k as u64));
        let n = packed.n();
        let mut all = vec![0.0; 3 * n];
        matmul(&mut Pool::new(2), Isa::detect(), &x, &packed, &mut all);
        let mut first = 0;
        for part in &parts {
            let alone = testing::packed(&[*part], k).unwrap();
            let mut out = vec![0.0; 3 * alone.n()];
            matmul(&mut Pool::new(1), Isa::detect(), &x, &alone, &mut out);
            for (row, out) in out.chunks(alone.n()).enumerate() {
                assert_eq!(all[row * n + first..][..alone.n()], *out, "{part:?}");
            }
            first += alone.n();
        }
    }

    #[test]
    fn blocks_may_be_quantized_to_fewer_bits_and_must_be_numbers() {
        let (mut file, wide) = made(Blocks::Q8_0, 4, 256);
        const FOUR: Kept = Kept::Quantized(Quantization::Q4K);
        let kind = WeightType::Blocks(Blocks::Q8_0);
        let fewer = testing::packed(&[Part { kept: FOUR, kind, bytes: &file }], 256).unwrap();
        let plain = bytes(WeightType::F32, &wide);
        let want = testing::packed(&[Part { kept: FOUR, kind: WeightType::F32, bytes: &plain }], 256).unwrap();
        assert_eq!(rows(&fewer), rows(&want));
        file[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        assert_eq!(testing::packed(&[Part::own(kind, &file)], 256).err(), Some(NotFinite));
        let (mut six, _) = made(Blocks::Q6K, 1, 256);
        six[208..].copy_from_slice(&half::f16::NAN.to_le_bytes());
        assert_eq!(testing::packed(&[Part::own(WeightType::Blocks(Blocks::Q6K), &six)], 256).err(), Some(NotFinite));
    }
}
