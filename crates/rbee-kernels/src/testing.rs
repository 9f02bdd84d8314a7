//! Numbers for the tests.

use half::{bf16, f16};

use crate::matmul;
use crate::packed::{NotFinite, Packed, Part, WeightType};
use crate::pool::Pool;
use crate::rounded::{RUN, Rounded, Step};
use crate::simd::Isa;

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

/// Packed on three threads, for the widest instruction set.
pub fn packed(parts: &[Part<'_>], k: usize) -> Result<Packed, NotFinite> {
    Packed::new(&mut Pool::new(3), Isa::detect(), parts, k)
}

/// Checks products of rows with a matrix of whole numbers: those of the rows in steps with the weights `wide` that the matrix stands for,
/// in double precision; and the same bits on every instruction set, alone and among others, with any number of threads.
pub fn check_products<S: Step + Into<f64>>(x: &[f32], packed: &Packed, wide: &[f32]) {
    let (n, k) = (packed.n(), packed.k());
    let m = x.len() / k;
    let mut want = vec![0.0; m * n];
    matmul(&mut Pool::new(1), Isa::Scalar, x, packed, &mut want);
    let mut rounded = Rounded::<S>::default();
    rounded.fill(&mut Pool::new(1), Isa::Scalar, x);
    let step = |(i, step): (usize, &S)| (*step).into() * f64::from(rounded.runs[i / RUN].scale);
    let stepped: Vec<f64> = rounded.steps.iter().enumerate().map(step).collect();
    for (i, got) in want.iter().enumerate() {
        let pairs = stepped[i / n * k..][..k].iter().zip(&wide[i % n * k..][..k]);
        let (exact, size) = pairs.fold((0.0, 0.0), |(sum, size), (x, w)| {
            let product = x * f64::from(*w);
            (sum + product, size + product.abs())
        });
        assert!((f64::from(*got) - exact).abs() <= 2e-6 * size, "{i} of {m}x{n}x{k}: {got} {exact}");
    }
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
        for rows in 1..=m.min(8) {
            let mut got = vec![0.0; rows * n];
            matmul(&mut Pool::new(2), isa, &x[..rows * k], packed, &mut got);
            assert_eq!(got, want[..rows * n], "{isa:?} {rows}x{n}x{k}");
        }
        let mut got = vec![0.0; m * n];
        matmul(&mut Pool::new(3), isa, x, packed, &mut got);
        assert_eq!(got, want, "{isa:?} {m}x{n}x{k}");
    }
}
