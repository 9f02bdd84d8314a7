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
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 => Some(Quantization::Q8_0),
            Self::Q4K => Some(Quantization::Q4K),
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

/// The same values as blocks of a form, if that is the form that has them: see [`Blocks::form`].
pub(crate) fn same(blocks: Blocks, form: Quantization, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    if blocks.form() != Some(form) {
        return None;
    }
    let low = |out: &mut [u8], halves: &[u8], high: &dyn Fn(usize) -> u8, less: i8| {
        for (i, byte) in halves.iter().enumerate() {
            out[i] = ((byte & 15 | high(i)) as i8 - less) as u8;
            out[i + 16] = ((byte >> 4 | high(i + 16)) as i8 - less) as u8;
        }
    };
    let mut out = vec![0; bytes.len() / blocks.bytes() * Blocks::Q8_0.bytes()];
    let pairs = bytes.chunks_exact(blocks.bytes()).zip(out.chunks_exact_mut(Blocks::Q8_0.bytes()));
    match blocks {
        Blocks::Q4_0 => pairs.for_each(|(block, out)| {
            out[..2].copy_from_slice(&block[..2]);
            low(&mut out[2..], &block[2..], &|_| 0, 8);
        }),
        // The fifth bits of all 32 come first.
        Blocks::Q5_0 => pairs.for_each(|(block, out)| {
            out[..2].copy_from_slice(&block[..2]);
            let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
            low(&mut out[2..], &block[6..], &|i| ((high >> i & 1) << 4) as u8, 16);
        }),
        _ => return Some(Cow::Borrowed(bytes)),
    }
    Some(Cow::Owned(out))
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::packed::{Kept, Packed, WeightType};
    use crate::pool::Pool;
    use crate::testing::{bytes, values};

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
            let packed = Packed::new(&[(kind, &file)], k).unwrap();
            assert_eq!(packed.held(), kind.kept().bytes(n as u64, k as u64), "{blocks:?}");
            let want: Vec<f32> = match kind.kept() {
                Kept::Quantized(_) => wide,
                _ => wide.iter().map(|value| half::f16::from_f32(*value).to_f32()).collect(),
            };
            assert_eq!(rows(&packed), want, "{blocks:?}");
        }
    }

    #[test]
    fn blocks_of_two_kinds_and_blocks_beside_plain_weights_lose_nothing_that_halves_do_not() {
        let k = 256;
        let ((four, wide_four), (six, wide_six)) = (made(Blocks::Q4K, 30, k), made(Blocks::Q6K, 40, k));
        let (four, six) = ((WeightType::Blocks(Blocks::Q4K), &four[..]), (WeightType::Blocks(Blocks::Q6K), &six[..]));
        let both: Vec<f32> = [wide_four.clone(), wide_six].concat();
        let halves: Vec<f32> = both.iter().map(|value| half::f16::from_f32(*value).to_f32()).collect();
        assert_eq!(rows(&Packed::new(&[four, six], k).unwrap()), halves);
        let plain = bytes(WeightType::F32, &wide_four);
        let mixed = Packed::new(&[four, (WeightType::F32, &plain)], k).unwrap();
        assert_eq!(rows(&mixed), [wide_four.clone(), wide_four].concat());
        // Q4_0 and Q8_0 are one form.
        let ((low, wide_low), (eight, wide_eight)) = (made(Blocks::Q4_0, 3, k), made(Blocks::Q8_0, 5, k));
        let parts = [(WeightType::Blocks(Blocks::Q4_0), &low[..]), (WeightType::Blocks(Blocks::Q8_0), &eight[..])];
        assert_eq!(Kept::of(parts.iter().map(|(kind, _)| *kind)), Kept::Quantized(Quantization::Q8_0));
        assert_eq!(rows(&Packed::new(&parts, k).unwrap()), [wide_low, wide_eight].concat());
    }

    #[test]
    fn blocks_may_be_quantized_to_fewer_bits_and_must_be_numbers() {
        let (mut file, wide) = made(Blocks::Q8_0, 4, 256);
        let kind = WeightType::Blocks(Blocks::Q8_0);
        let fewer = Packed::quantized(&mut Pool::new(1), Quantization::Q4K, &[(kind, &file)], 256).unwrap();
        let plain = bytes(WeightType::F32, &wide);
        let want = Packed::quantized(&mut Pool::new(1), Quantization::Q4K, &[(WeightType::F32, &plain)], 256).unwrap();
        assert_eq!(rows(&fewer), rows(&want));
        file[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        assert_eq!(Packed::new(&[(kind, &file)], 256).err(), Some(NotFinite));
        let (mut six, _) = made(Blocks::Q6K, 1, 256);
        six[208..].copy_from_slice(&half::f16::NAN.to_le_bytes());
        assert_eq!(Packed::new(&[(WeightType::Blocks(Blocks::Q6K), &six)], 256).err(), Some(NotFinite));
    }
}
