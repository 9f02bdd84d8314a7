//! Causal attention of one position over a paged KV cache, all of it or the last positions (a window).
//!
//! [`crate::kv_form`] says how blocks stand in memory. A score is one chain of fused multiply-adds over the dimensions, a
//! weighted value one over the positions, so neither depends on the instruction set. Positions are taken in partials of [`PARTIAL`] at absolute offsets, each with its own maximum, merged in ascending
//! order: a result depends on the query and the positions before it alone, however they were computed.

#![expect(unsafe_code, reason = "SIMD kernels over raw pointers")]

use crate::kv_form::KvForm;
use crate::ops::{exp, soft_cap, tree};
use crate::simd::{Isa, Kernel, LANES, Lanes, dispatch};

/// Positions of a block.
pub const BLOCK: usize = LANES;

/// Positions that share one maximum before they are merged into what came before.
pub const PARTIAL: usize = 1024;

/// Where the blocks of one KV head of one sequence are.
pub trait KvBlocks {
    /// Form of the cache.
    type Form: KvForm;
    /// Keys of the sequence's block `i`: [`KvForm::key_len`] units.
    fn keys(&self, i: usize) -> &[<Self::Form as KvForm>::Unit];
    /// Values of the sequence's block `i`: [`KvForm::value_len`] units.
    fn values(&self, i: usize) -> &[<Self::Form as KvForm>::Unit];
}

/// Values of a position, padded to whole vectors.
#[inline(always)]
pub fn width(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

/// Scratch of one task; kept between calls.
#[derive(Default)]
pub struct Scratch {
    /// Scores and then weights, `[heads, PARTIAL]`.
    scores: Vec<f32>,
    /// Weighted values of a partial, `[heads, width]`.
    sums: Vec<f32>,
    merges: Vec<Merge>,
}

/// How a head's partials are merged.
#[derive(Clone, Copy)]
struct Merge {
    /// The highest score so far.
    top: f32,
    /// The sum of all weights so far, on the scale of `top`.
    total: f32,
    /// What brings the earlier partials to that scale.
    before: f32,
    /// What brings this partial to that scale.
    now: f32,
}

/// Query heads that share one KV head, at one position.
#[derive(Clone, Copy)]
pub struct Query<'a> {
    /// `[heads, dim]`.
    pub heads: &'a [f32],
    /// Width of a head.
    pub dim: usize,
    /// The first position that is attended to: above zero behind a window.
    pub first: usize,
    /// Positions that are attended to end before this one.
    pub count: usize,
    /// Applied to the scores.
    pub scale: f32,
    /// Where scores are bent towards, as `cap * tanh(score / cap)` (Gemma 2).
    pub cap: Option<f32>,
}

/// Attention of a query, written to `out`, `[heads, dim]` (online softmax, Milakov and Gimelshein 2018).
///
/// # Panics
/// When the lengths do not fit, a block is too short, or this machine does not have `isa`.
pub fn attend<K: KvBlocks>(isa: Isa, query: Query<'_>, kv: &K, out: &mut [f32], scratch: &mut Scratch) {
    let Query { heads: q, dim, first, count, .. } = query;
    assert!(dim > 0 && q.len().is_multiple_of(dim) && q.len() == out.len(), "attention of {}", q.len());
    assert!(first < count, "attention from {first} to {count}");
    assert!(isa.is_here(), "this machine has no {isa:?}");
    let heads = q.len() / dim;
    // What is in there from earlier calls is written before it is read.
    scratch.scores.resize(heads * PARTIAL, 0.0);
    scratch.sums.resize(heads * width(dim), 0.0);
    scratch.merges.clear();
    scratch.merges.resize(heads, Merge { top: f32::NEG_INFINITY, total: 0.0, before: 0.0, now: 0.0 });
    out.fill(0.0);
    // SAFETY: the instruction set is there, and the scratch is as long as the heads need.
    unsafe { dispatch(isa, Attend { query, kv, out, scratch }) }
}

struct Attend<'a, K> {
    query: Query<'a>,
    kv: &'a K,
    out: &'a mut [f32],
    scratch: &'a mut Scratch,
}

impl<K: KvBlocks> Kernel for Attend<'_, K> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let Query { heads: q, dim, first, count, .. } = self.query;
        let heads = q.len() / dim;
        let mut start = first / PARTIAL * PARTIAL;
        while start < count {
            let part = Part { start, from: first.saturating_sub(start), len: PARTIAL.min(count - start) };
            let mut head = 0;
            while head < heads {
                // SAFETY: there are so many heads.
                head += unsafe {
                    match heads - head {
                        4.. if L::WIDE => self.partial::<L, 4>(part, head),
                        3.. if L::WIDE => self.partial::<L, 3>(part, head),
                        2.. => self.partial::<L, 2>(part, head),
                        _ => self.partial::<L, 1>(part, head),
                    }
                };
            }
            start += part.len;
        }
        for (out, merge) in self.out.chunks_exact_mut(dim).zip(&self.scratch.merges) {
            let scale = 1.0 / merge.total;
            out.iter_mut().for_each(|out| *out *= scale);
        }
    }
}

/// Positions of one partial.
#[derive(Clone, Copy)]
struct Part {
    /// A multiple of [`PARTIAL`].
    start: usize,
    /// Those before this one are hidden; less than `len`.
    from: usize,
    len: usize,
}

impl<K: KvBlocks> Attend<'_, K> {
    /// One partial of `R` heads, merged into what came before. Returns `R`.
    ///
    /// # Safety
    /// There are `R` heads from `head`, and the scratch has room for all.
    #[inline(always)]
    unsafe fn partial<L: Lanes, const R: usize>(&mut self, part: Part, head: usize) -> usize {
        // SAFETY: the caller's.
        unsafe { self.scores::<L, R>(part, head) };
        let cap = self.query.cap;
        let merges = &mut self.scratch.merges[head..head + R];
        for (scores, merge) in self.scratch.scores[head * PARTIAL..].chunks_exact_mut(PARTIAL).zip(merges) {
            if let Some(cap) = cap {
                soft_cap(&mut scores[part.from..part.len], cap);
            }
            let (high, sum) = softmax(scores, part.from, part.len);
            let top = merge.top.max(high);
            merge.before = if merge.top == f32::NEG_INFINITY { 0.0 } else { exp(merge.top - top) };
            merge.now = exp(high - top);
            merge.total = merge.total * merge.before + sum * merge.now;
            merge.top = top;
        }
        // SAFETY: the caller's.
        unsafe { self.weigh::<L, R>(part, head) };
        let dim = self.query.dim;
        let sums = self.scratch.sums.chunks_exact(width(dim));
        let outs = self.out.chunks_exact_mut(dim).zip(sums).zip(&self.scratch.merges);
        for ((out, sums), merge) in outs.skip(head).take(R) {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = *out * merge.before + sum * merge.now;
            }
        }
        R
    }

    /// Scaled scores of `R` heads, whole blocks at a time: those past the partial's end mean nothing.
    #[inline(always)]
    unsafe fn scores<L: Lanes, const R: usize>(&mut self, part: Part, head: usize) {
        let blocks = part.len.div_ceil(BLOCK);
        let mut block = part.from / BLOCK;
        while block < blocks {
            // SAFETY: the caller's.
            block += unsafe {
                match blocks - block {
                    4.. => self.block_scores::<L, R, 4>(part, head, block),
                    2.. => self.block_scores::<L, R, 2>(part, head, block),
                    _ => self.block_scores::<L, R, 1>(part, head, block),
                }
            };
        }
    }

    /// `R` heads on `B` blocks. Returns `B`.
    #[inline(always)]
    unsafe fn block_scores<L: Lanes, const R: usize, const B: usize>(
        &mut self,
        part: Part,
        head: usize,
        block: usize,
    ) -> usize {
        let Query { heads: q, dim, scale, .. } = self.query;
        let first = part.start / BLOCK + block;
        let len = K::Form::key_len(dim);
        let keys: [_; B] = std::array::from_fn(|b| self.kv.keys(first + b)[..len].as_ptr());
        // SAFETY: `R` heads of `dim` values, keys of `dim` vectors, room for `R` rows of scores.
        unsafe {
            let q = q.as_ptr().add(head * dim);
            let rows: [*const f32; R] = std::array::from_fn(|r| q.add(r * dim));
            let mut sums = [[L::splat(0.0); B]; R];
            for group in (0..dim).step_by(K::Form::GROUP) {
                let scales = keys.map(|keys| K::Form::scale::<L>(keys, group));
                for i in group..dim.min(group.saturating_add(K::Form::GROUP)) {
                    let mut lanes = [L::splat(0.0); B];
                    for (b, lane) in lanes.iter_mut().enumerate() {
                        *lane = K::Form::key(keys[b], i, scales[b]);
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let value = L::splat(*rows[r].add(i));
                        for (sum, lane) in sums.iter_mut().zip(lanes) {
                            *sum = value.fma(lane, *sum);
                        }
                    }
                }
            }
            let scores = self.scratch.scores.as_mut_ptr().add(head * PARTIAL + block * BLOCK);
            for (r, sums) in sums.iter().enumerate() {
                for (b, sum) in sums.iter().enumerate() {
                    // Plus zero: a product that is rounded once.
                    sum.fma(L::splat(scale), L::splat(0.0)).store(scores.add(r * PARTIAL + b * BLOCK));
                }
            }
        }
        B
    }

    /// Sums of the values of `R` heads by their weights.
    #[inline(always)]
    unsafe fn weigh<L: Lanes, const R: usize>(&mut self, part: Part, head: usize) {
        let vectors = width(self.query.dim) / LANES;
        let mut vector = 0;
        while vector < vectors {
            // SAFETY: the caller's.
            vector += unsafe {
                match vectors - vector {
                    4.. if L::WIDE => self.vector_sums::<L, R, 4>(part, head, vector),
                    2.. => self.vector_sums::<L, R, 2>(part, head, vector),
                    _ => self.vector_sums::<L, R, 1>(part, head, vector),
                }
            };
        }
    }

    /// `V` vectors of the values. Only positions of the partial are read: what a block holds beyond them, left by an
    /// earlier owner perhaps, is not even multiplied by zero. Returns `V`.
    #[inline(always)]
    unsafe fn vector_sums<L: Lanes, const R: usize, const V: usize>(
        &mut self,
        part: Part,
        head: usize,
        vector: usize,
    ) -> usize {
        let dim = self.query.dim;
        let wide = width(dim);
        // SAFETY: `R` rows of weights, values of `wide` lanes per position, room for `R` rows of sums.
        unsafe {
            let weights = self.scratch.scores.as_ptr().add(head * PARTIAL);
            let stride = K::Form::stride(dim);
            let mut sums = [[L::splat(0.0); V]; R];
            for block in part.from / BLOCK..part.len.div_ceil(BLOCK) {
                let hidden = part.from.saturating_sub(block * BLOCK);
                let positions = BLOCK.min(part.len - block * BLOCK);
                let values = self.kv.values(part.start / BLOCK + block)[..K::Form::value_len(dim)].as_ptr();
                let rows: [*const f32; R] = std::array::from_fn(|r| weights.add(r * PARTIAL + block * BLOCK));
                let mut at = values.add(hidden * stride);
                for position in hidden..positions {
                    let mut lanes = [L::splat(0.0); V];
                    for (v, lane) in lanes.iter_mut().enumerate() {
                        *lane = K::Form::value(at, dim, vector + v);
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let weight = L::splat(*rows[r].add(position));
                        for (sum, lane) in sums.iter_mut().zip(lanes) {
                            *sum = weight.fma(lane, *sum);
                        }
                    }
                    at = at.wrapping_add(stride);
                }
            }
            let out = self.scratch.sums.as_mut_ptr().add(head * wide + vector * LANES);
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    sum.store(out.add(r * wide + v * LANES));
                }
            }
        }
        V
    }
}

/// Turns the scores `from..len` into weights relative to the highest of them, which is returned with the weights' sum.
/// The sum is striped over lanes by position.
#[inline(always)]
fn softmax(scores: &mut [f32], from: usize, len: usize) -> (f32, f32) {
    let (rows, _) = scores.as_chunks_mut::<LANES>();
    let rows = &mut rows[from / LANES..len.div_ceil(LANES)];
    // A weight of exactly zero for what is beside the range.
    if let Some(first) = rows.first_mut() {
        first[..from % LANES].fill(f32::NEG_INFINITY);
    }
    if let Some(last) = rows.last_mut() {
        let used = (len - 1) % LANES + 1;
        last[used..].fill(f32::NEG_INFINITY);
    }
    let mut highs = [f32::NEG_INFINITY; LANES];
    for row in &*rows {
        for (high, score) in highs.iter_mut().zip(row) {
            *high = if *score > *high { *score } else { *high };
        }
    }
    let high = highs.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    for row in rows {
        for (sum, score) in sums.iter_mut().zip(row) {
            *score = exp(*score - high);
            *sum += *score;
        }
    }
    (high, tree(sums))
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use bytemuck::Zeroable as _;

    use super::*;
    use crate::kv_form::Q8Kv;
    use crate::simd::Element;
    use crate::testing::values;

    /// Blocks with what an earlier owner left in the rest of the last one.
    struct Blocks<F: KvForm> {
        keys: Vec<Vec<F::Unit>>,
        values: Vec<Vec<F::Unit>>,
    }

    impl<F: KvForm> Blocks<F> {
        fn new(keys: &[f32], values: &[f32], dim: usize) -> Self {
            let blocks = (keys.len() / dim).div_ceil(BLOCK);
            let zero = F::Unit::zeroed();
            let mut kv = Self {
                keys: vec![vec![zero; F::key_len(dim)]; blocks],
                values: vec![vec![zero; F::value_len(dim)]; blocks],
            };
            let rest = vec![f32::NAN; dim];
            for i in 0..blocks * BLOCK {
                let of = |all: &'_ [f32]| all.get(i * dim..(i + 1) * dim).unwrap_or(&rest).to_vec();
                F::write_key(&mut kv.keys[i / BLOCK], i % BLOCK, &of(keys));
                F::write_value(&mut kv.values[i / BLOCK], i % BLOCK, &of(values));
            }
            kv
        }
    }

    impl<F: KvForm> KvBlocks for Blocks<F> {
        type Form = F;
        fn keys(&self, i: usize) -> &[F::Unit] {
            &self.keys[i]
        }
        fn values(&self, i: usize) -> &[F::Unit] {
            &self.values[i]
        }
    }

    /// `stored` says what the form makes of the values of a position.
    fn check<F: KvForm>(
        dim: usize,
        heads: usize,
        first: usize,
        count: usize,
        cap: Option<f32>,
        stored: fn(&[f32]) -> Vec<f32>,
    ) {
        let scaled = |seed, factor: f32| -> Vec<f32> {
            let values: Vec<f32> = values(seed, count * dim).into_iter().map(|v| v * factor).collect();
            values.chunks(dim).flat_map(stored).collect()
        };
        let (keys, vals) = (scaled(1, 4.0), scaled(2, 1.0));
        let kv = Blocks::<F>::new(&keys, &vals, dim);
        let q = values(3, heads * dim);
        let query = |heads| Query { heads, dim, first, count, scale: 0.4, cap };
        let mut scratch = Scratch::default();
        let mut want = vec![0.0; q.len()];
        attend(Isa::Scalar, query(&q), &kv, &mut want, &mut scratch);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_here()) {
            let mut got = vec![0.0; q.len()];
            attend(isa, query(&q), &kv, &mut got, &mut scratch);
            assert_eq!(got, want, "{isa:?} {dim} {heads} {count}");
            for (head, want) in want.chunks(dim).enumerate() {
                let mut alone = vec![0.0; dim];
                attend(isa, query(&q[head * dim..][..dim]), &kv, &mut alone, &mut scratch);
                assert_eq!(alone, want, "{isa:?} {dim} {count}: head {head} alone");
            }
        }
        for (q, got) in q.chunks(dim).zip(want.chunks(dim)) {
            let product =
                |key: &[f32]| key.iter().zip(q).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>() * 0.4;
            let bent = |score: f64| cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
            let scores: Vec<f64> = keys.chunks(dim).skip(first).map(product).map(bent).collect();
            let high = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|score| (score - high).exp()).sum();
            for (d, got) in got.iter().enumerate() {
                let weighted =
                    scores.iter().zip(vals.chunks(dim).skip(first)).map(|(s, v)| (s - high).exp() * f64::from(v[d]));
                let want = weighted.sum::<f64>() / total;
                assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
            }
        }
    }

    fn narrowed<T: Element>(values: &[f32]) -> Vec<f32> {
        values.iter().map(|value| T::narrow(*value).widen()).collect()
    }

    /// Multiples of a step, the highest 127 of it, for every 32: what eight bits hold.
    fn in_steps(values: &[f32]) -> Vec<f32> {
        let group = |values: &[f32]| {
            let step = values.iter().fold(0f32, |high, value| high.max(value.abs())) / 127.0;
            values.iter().map(|value| (value / step).round_ties_even() * step).collect::<Vec<_>>()
        };
        values.chunks(32).flat_map(group).collect()
    }

    #[test]
    fn attention_is_alike_on_any_isa_with_any_heads_and_agrees_with_double_precision() {
        for (dim, heads, first, count, cap) in [
            (32, 3, 0, 1, None),
            (20, 1, 0, 16, Some(3.0)),
            (64, 4, 5, 17, None),
            (8, 7, 99, 100, None),
            (8, 2, 33, 64, Some(0.5)),
            (128, 2, 0, 1024, None),
            (48, 5, 0, 2500, Some(20.0)),
            (16, 2, 1500, 2500, None),
        ] {
            check::<f32>(dim, heads, first, count, cap, <[f32]>::to_vec);
            check::<f16>(dim, heads, first, count, cap, narrowed::<f16>);
            check::<bf16>(dim, heads, first, count, cap, narrowed::<bf16>);
            check::<Q8Kv>(dim, heads, first, count, cap, in_steps);
        }
    }
}
