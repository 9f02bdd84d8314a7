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

/// The sum in the same order.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (rows, rest) = x.as_chunks::<LANES>();
    for row in rows {
        for (lane, x) in lanes.iter_mut().zip(row) {
            *lane += x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x;
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
pub(crate) fn on(isa: Isa, body: impl Body) {
    assert!(isa.is_here(), "this machine has no {isa:?}");
    // SAFETY: the instruction set is there, and a body is safe code.
    unsafe { dispatch(isa, Loops(body)) }
}

/// Safe loops to compile for an instruction set; `run` must be `#[inline(always)]`.
pub(crate) trait Body {
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

/// Layer norm (Ba, Kiros and Hinton 2016) of each row of `weight.len()` values of `x + y`: `(s - mean(s)) / sqrt(var(s) + eps) * weight
/// + bias`, written over `x`.
pub fn add_layer_norm(isa: Isa, x: &mut [f32], y: &[f32], norm: LayerNorm<'_>) {
    on(isa, AddLayerNorm { x, y, norm });
}

/// The constants of a layer norm.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// One value per column.
    pub weight: &'a [f32],
    /// One value per column.
    pub bias: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

struct AddLayerNorm<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
    norm: LayerNorm<'a>,
}

impl Body for AddLayerNorm<'_> {
    #[inline(always)]
    fn run(self) {
        let LayerNorm { weight, bias, eps } = self.norm;
        let n = weight.len();
        for (x, y) in self.x.chunks_exact_mut(n).zip(self.y.chunks_exact(n)) {
            for (x, y) in x.iter_mut().zip(y) {
                *x += y;
            }
            let mean = sum(x) / n as f32;
            for x in x.iter_mut() {
                *x -= mean;
            }
            let scale = 1.0 / (squares(x) / n as f32 + eps).sqrt();
            for ((x, weight), bias) in x.iter_mut().zip(weight).zip(bias) {
                *x = *x * scale * weight + bias;
            }
        }
    }
}

/// What the values of a plain MLP go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bend {
    /// GELU by the normal distribution itself (Hendrycks and Gimpel 2016): `x / 2 * (1 + erf(x / sqrt(2)))`.
    GeluErf,
    /// GELU by its approximation with tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Bends every value.
pub fn bend(isa: Isa, bend: Bend, x: &mut [f32]) {
    match bend {
        Bend::GeluErf => on(isa, Each { x, act: |x: f32| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) }),
        Bend::GeluTanh => on(isa, Each { x, act: gelu }),
        Bend::Relu => on(isa, Each { x, act: |x: f32| if x > 0.0 { x } else { 0.0 } }),
    }
}

struct Each<'a, F> {
    x: &'a mut [f32],
    act: F,
}

impl<F: Fn(f32) -> f32> Body for Each<'_, F> {
    #[inline(always)]
    fn run(self) {
        for x in self.x {
            *x = (self.act)(*x);
        }
    }
}

/// The error function by a ratio of polynomials on -4..4 (Eigen, `generic_fast_erf`), absolute error below 3e-7; ±1 beyond, where it
/// differs from that by less than 2e-8.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let mut p = -2.726_142_4e-10;
    for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_3e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2] {
        p = p * s + c;
    }
    let mut q = -1.456_607_2e-5;
    for c in [-2.133_740_5e-4, -1.682_827e-3, -7.373_329_2e-3, -1.426_473_9e-2] {
        q = q * s + c;
    }
    x * p / q
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

/// Rotates the pairs `(i, i + half)` of heads of `dim` values by the angles of their position (Su et al. 2021, in the half-split
/// layout that transformers uses). `cos` and `sin` have `half` values; what a head has beyond twice as many stays.
pub fn rope(isa: Isa, heads: &mut [f32], dim: usize, cos: &[f32], sin: &[f32]) {
    on(isa, Rope { heads, dim, cos, sin });
}

struct Rope<'a> {
    heads: &'a mut [f32],
    dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Body for Rope<'_> {
    #[inline(always)]
    fn run(self) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(self.dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// `y += x * scale`, each rounded.
pub fn add(isa: Isa, y: &mut [f32], x: &[f32], scale: f32) {
    on(isa, Add { y, x, scale });
}

struct Add<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
    scale: f32,
}

impl Body for Add<'_> {
    #[inline(always)]
    fn run(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y += x * self.scale;
        }
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

    /// `erf` by its series without alternating signs (Abramowitz and Stegun 7.1.6).
    fn reference_erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        (2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum).clamp(-1.0, 1.0)
    }

    #[test]
    fn bent_values_are_alike_on_any_isa_and_agree_with_double_precision() {
        let x: Vec<f32> = (-1_200..=1_200).map(|i| i as f32 / 150.0).collect();
        let all = [Bend::GeluErf, Bend::GeluTanh, Bend::Relu];
        let run = |isa| {
            all.map(|kind| {
                let mut out = x.clone();
                bend(isa, kind, &mut out);
                out
            })
        };
        let want = run(Isa::Scalar);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            assert_eq!(run(isa), want, "{isa:?}");
        }
        for (i, x) in x.iter().map(|x| f64::from(*x)).enumerate() {
            let exact = 0.5 * x * (1.0 + reference_erf(x / 2f64.sqrt()));
            let close = 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
            for (got, want) in want.iter().map(|out| f64::from(out[i])).zip([exact, close, x.max(0.0)]) {
                assert!((got - want).abs() < 1e-6, "{x}: {got} {want}");
            }
        }
    }

    #[test]
    fn layer_norms_are_alike_on_any_isa_and_agree_with_double_precision() {
        let (rows, n) = (3, 77);
        // Far from zero, where the mean matters.
        let x: Vec<f32> = values(1, rows * n).into_iter().map(|x| x + 20.0).collect();
        let (y, weight, bias) = (values(2, rows * n), values(3, n), values(4, n));
        let run = |isa| {
            let mut out = x.clone();
            add_layer_norm(isa, &mut out, &y, LayerNorm { weight: &weight, bias: &bias, eps: 1e-3 });
            out
        };
        let got = run(Isa::Scalar);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            assert_eq!(run(isa), got, "{isa:?}");
        }
        for row in 0..rows {
            let sums: Vec<f64> = (row * n..(row + 1) * n).map(|i| f64::from(x[i]) + f64::from(y[i])).collect();
            let mean = sums.iter().sum::<f64>() / n as f64;
            let variance = sums.iter().map(|sum| (sum - mean).powi(2)).sum::<f64>() / n as f64;
            for (i, sum) in sums.iter().enumerate() {
                let want = (sum - mean) / (variance + 1e-3).sqrt() * f64::from(weight[i]) + f64::from(bias[i]);
                assert!((f64::from(got[row * n + i]) - want).abs() < 1e-5, "{} {want}", got[row * n + i]);
            }
        }
    }

    #[test]
    fn rope_turns_pairs_and_keeps_their_length() {
        let mut head = values(5, 8);
        let before = head.clone();
        let angles = [0.0f32, 0.3, 1.5, 3.0];
        rope(Isa::detect(), &mut head, 8, &angles.map(f32::cos), &angles.map(f32::sin));
        for i in 0..4 {
            let (a, b) = (f64::from(before[i]), f64::from(before[i + 4]));
            let (sin, cos) = f64::from(angles[i]).sin_cos();
            assert!((f64::from(head[i]) - (a * cos - b * sin)).abs() < 1e-6);
            assert!((f64::from(head[i + 4]) - (b * cos + a * sin)).abs() < 1e-6);
        }
    }
}
