//! Numbers for the tests.

use half::{bf16, f16};

use crate::packed::WeightType;

/// Values between -1 and 1 that look random.
pub fn values(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// They as a file has them.
pub fn bytes(kind: WeightType, values: &[f32]) -> Vec<u8> {
    match kind {
        WeightType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        WeightType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        WeightType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        WeightType::Blocks(_) => panic!("blocks are made by candle, see `ggml`"),
    }
}
