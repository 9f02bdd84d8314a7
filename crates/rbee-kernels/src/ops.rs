//! Row-wise operations. Every sum has one order that depends on nothing but the row's own length.
//!
//! They are plain loops, compiled for each instruction set: a multiply and an add that are written apart are rounded
//! apart everywhere, so the bits are the same.

#![expect(unsafe_code, reason = "the same code is compiled for each instruction set")]

use crate::simd::{Isa, Kernel, LANES, Lanes, dispatch};

/// The sum of a striped sum's lanes, as a fixed tree.
#[inline(always)]
pub(crate) fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of squares in striped order: element `i` goes to lane `i % 16`.
#[inline(always)]
fn squares(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (rows, rest) = x.as_chunks::<LANES>();
    for row in rows {
        for (lane, x) in lanes.iter_mut().zip(row) {
            *lane += x * x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    tree(lanes)
}

/// `e^x`, the same bits on every machine: Cephes' polynomial (S. Moshier, expf) on the nearest power of two, relative
/// error below 2e-7; 0 below -87.3, and above 88.3 the largest power it can scale.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding it rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let small = x < -87.3;
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    let scaled = y * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if small { 0.0 } else { scaled }
}

/// Hyperbolic tangent from [`exp`]; absolute error below 2e-7.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x)
}

/// Bends values towards a bound: `cap * tanh(x / cap)`.
pub fn soft_cap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * tanh(*x / cap);
    }
}

/// Runs a function's body on an instruction set.
fn on(isa: Isa, body: impl Body) {
    assert!(isa.is_here(), "this machine has no {isa:?}");
    // SAFETY: the instruction set is there, and a body is safe code.
    unsafe { dispatch(isa, Loops(body)) }
}

/// Safe loops to compile for an instruction set; `run` must be `#[inline(always)]`.
trait Body {
    fn run(self);
}

struct Loops<B>(B);

impl<B: Body> Kernel for Loops<B> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        self.0.run();
    }
}

/// Root-mean-square norm (Zhang and Sennrich 2019) of each row of `weight.len()` values: `x / sqrt(mean(x²) + eps) * weight`.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    on(isa, RmsNorm { x, weight, eps, out });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Body for RmsNorm<'_> {
    #[inline(always)]
    fn run(self) {
        let n = self.weight.len();
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            let scale = 1.0 / (squares(x) / n as f32 + self.eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * scale * weight;
            }
        }
    }
}

/// What the gate of an MLP goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its approximation with tanh (Hendrycks and Gimpel 2016).
    GeluTanh,
}

/// `act(gate) * up` of rows that hold `n` gates and then `n` ups: `[rows, 2n]` to `[rows, n]`.
pub fn gate_mul(isa: Isa, gate: Gate, x: &[f32], n: usize, out: &mut [f32]) {
    match gate {
        Gate::Silu => on(isa, GateMul { x, n, out, act: |x: f32| x / (1.0 + exp(-x)) }),
        Gate::GeluTanh => on(isa, GateMul { x, n, out, act: gelu }),
    }
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    // sqrt(2 / pi)
    const SCALE: f32 = 0.797_884_6;
    0.5 * x * (1.0 + tanh(SCALE * (x + 0.044_715 * x * x * x)))
}

struct GateMul<'a, F> {
    x: &'a [f32],
    n: usize,
    out: &'a mut [f32],
    act: F,
}

impl<F: Fn(f32) -> f32> Body for GateMul<'_, F> {
    #[inline(always)]
    fn run(self) {
        for (row, out) in self.x.chunks_exact(2 * self.n).zip(self.out.chunks_exact_mut(self.n)) {
            let (gate, up) = row.split_at(self.n);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = (self.act)(*gate) * up;
            }
        }
    }
}

/// Rotates the pairs `(i, i + half)` of one head by the angles of its position (Su et al. 2021, in the half-split
/// layout that transformers uses). `cos` and `sin` have `head.len() / 2` values.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// `y += x`.
pub fn add(y: &mut [f32], x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8_800..8_830 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!((got - want).abs() <= 3e-7 * want + 1.3e-38, "{x}: {got} {want}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::INFINITY).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn norms_and_gates_are_alike_on_any_isa_and_agree_with_double_precision() {
        let (rows, n) = (3, 77);
        let (x, weight) = (values(1, rows * 2 * n), values(2, 2 * n));
        let run = |isa| {
            let (mut norm, mut gated) = (vec![0.0; x.len()], vec![0.0; rows * n]);
            rms_norm(isa, &x, &weight, 1e-5, &mut norm);
            let mut bent = vec![0.0; rows * n];
            gate_mul(isa, Gate::Silu, &x, n, &mut gated);
            gate_mul(isa, Gate::GeluTanh, &x, n, &mut bent);
            (norm, gated, bent)
        };
        let (norm, gated, bent) = run(Isa::Scalar);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            assert_eq!(run(isa), (norm.clone(), gated.clone(), bent.clone()), "{isa:?}");
        }
        for (row, x) in x.chunks(2 * n).enumerate() {
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / (2 * n) as f64;
            for i in 0..2 * n {
                let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(norm[row * 2 * n + i]) - want).abs() < 1e-6);
            }
            for i in 0..n {
                let (gate, up) = (f64::from(x[i]), f64::from(x[n + i]));
                let want = gate / (1.0 + (-gate).exp()) * up;
                assert!((f64::from(gated[row * n + i]) - want).abs() < 1e-6);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3));
                let want = 0.5 * gate * (1.0 + inner.tanh()) * up;
                assert!((f64::from(bent[row * n + i]) - want).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn rope_turns_pairs_and_keeps_their_length() {
        let mut head = values(5, 8);
        let before = head.clone();
        let angles = [0.0f32, 0.3, 1.5, 3.0];
        rope(&mut head, &angles.map(f32::cos), &angles.map(f32::sin));
        for i in 0..4 {
            let (a, b) = (f64::from(before[i]), f64::from(before[i + 4]));
            let (sin, cos) = f64::from(angles[i]).sin_cos();
            assert!((f64::from(head[i]) - (a * cos - b * sin)).abs() < 1e-6);
            assert!((f64::from(head[i + 4]) - (b * cos + a * sin)).abs() < 1e-6);
        }
    }
}
