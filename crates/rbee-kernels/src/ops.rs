//! Row-wise operations. Every sum has one order that depends on nothing but the row's own length.

/// Lanes of a striped sum: element `i` goes to lane `i % 16`, lanes are added as a fixed tree.
const LANES: usize = 16;

fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Inner product in striped order, each lane a chain of multiply then add.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tails = a_chunks.remainder().iter().zip(b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(tails) {
        *lane += a * b;
    }
    tree(lanes)
}

/// Root-mean-square norm (Zhang and Sennrich 2019) of each row of `weight.len()` values: `x / sqrt(mean(x²) + eps) * weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = weight.len();
    for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
        let scale = 1.0 / (dot(x, x) / n as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
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

/// `silu(gate) * up`, written over `gate`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// `y += x`.
pub fn add(y: &mut [f32], x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `e^x`, the same bits on every machine: Cephes' polynomial (S. Moshier, expf), relative error below 2e-7;
/// 0 below -87.3, and above 88.3 the largest power it can scale.
pub fn exp(x: f32) -> f32 {
    let x = if x < -87.3 {
        return 0.0;
    } else {
        x.min(88.3)
    };
    let n = (x * std::f32::consts::LOG2_E + 0.5).floor();
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    y * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// Positions whose scores are summed before they are merged into what came before.
pub const PARTIAL: usize = 1024;

/// Where keys and values of a sequence are: rows of `head_dim` f32 by absolute position.
pub trait KvRows {
    /// The key row at `position`.
    fn key<'a>(&'a self, position: usize, scratch: &'a mut [f32]) -> &'a [f32];
    /// The value row at `position`.
    fn value<'a>(&'a self, position: usize, scratch: &'a mut [f32]) -> &'a [f32];
}

/// Scratch of one attention row.
#[derive(Default)]
pub struct AttentionScratch {
    scores: Vec<f32>,
    row: Vec<f32>,
    sum: Vec<f32>,
}

/// Attention of one query row over positions `0..count` (online softmax, Milakov and Gimelshein 2018): partials of
/// [`PARTIAL`] positions at absolute offsets, each with its own maximum, merged in ascending order. The result depends
/// on the query and those positions alone.
pub fn attend(q: &[f32], kv: &impl KvRows, count: usize, scale: f32, out: &mut [f32], scratch: &mut AttentionScratch) {
    let dim = q.len();
    scratch.scores.resize(PARTIAL, 0.0);
    scratch.row.resize(dim, 0.0);
    scratch.sum.resize(dim, 0.0);
    let AttentionScratch { scores, row, sum } = scratch;
    out.fill(0.0);
    let (mut top, mut total) = (f32::NEG_INFINITY, 0f32);
    let mut start = 0;
    while start < count {
        let end = (start + PARTIAL).min(count);
        let mut high = f32::NEG_INFINITY;
        for (score, position) in scores.iter_mut().zip(start..end) {
            *score = dot(q, kv.key(position, row)) * scale;
            high = high.max(*score);
        }
        let mut part = 0f32;
        sum.fill(0.0);
        for (score, position) in scores.iter().zip(start..end) {
            let weight = exp(score - high);
            part += weight;
            for (sum, value) in sum.iter_mut().zip(kv.value(position, row)) {
                *sum += weight * value;
            }
        }
        let new_top = top.max(high);
        let (old, new) = (if start == 0 { 0.0 } else { exp(top - new_top) }, exp(high - new_top));
        total = total * old + part * new;
        for (out, sum) in out.iter_mut().zip(sum.iter()) {
            *out = *out * old + sum * new;
        }
        top = new_top;
        start = end;
    }
    let scale = 1.0 / total;
    for out in out.iter_mut() {
        *out *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8800..8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!((got - want).abs() <= 3e-7 * want + 1.3e-38, "{x}: {got} {want}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    struct Rows(Vec<Vec<f32>>, Vec<Vec<f32>>);
    impl KvRows for Rows {
        fn key<'a>(&'a self, position: usize, _: &'a mut [f32]) -> &'a [f32] {
            &self.0[position]
        }
        fn value<'a>(&'a self, position: usize, _: &'a mut [f32]) -> &'a [f32] {
            &self.1[position]
        }
    }

    #[test]
    fn attention_over_several_partials_agrees_with_double_precision() {
        let value = |i: usize, j: usize| ((i * 37 + j * 11) % 23) as f32 / 11.5 - 1.0;
        let count = 2500;
        let rows = |salt: usize| (0..count).map(|i| (0..8).map(|j| value(i + salt, j) * 3.0).collect()).collect();
        let kv = Rows(rows(1), rows(5));
        let q: Vec<f32> = (0..8).map(|j| value(3, j)).collect();
        let mut out = vec![0.0; 8];
        attend(&q, &kv, count, 0.5, &mut out, &mut AttentionScratch::default());
        let scores: Vec<f64> =
            kv.0.iter().map(|k| k.iter().zip(&q).map(|(a, b)| f64::from(a * b)).sum::<f64>() * 0.5).collect();
        let high = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|s| (s - high).exp()).sum();
        for (j, got) in out.iter().enumerate() {
            let want: f64 =
                scores.iter().zip(&kv.1).map(|(s, v)| (s - high).exp() * f64::from(v[j])).sum::<f64>() / total;
            assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
        }
    }
}
