//! A llama of one layer computed in f64, with activations rounded before each product with weights of few bits: as llama.cpp
//! rounds them (ggml-cpu's `quantize_row_q8_0`, `_q8_1` and `_q8_K`), or as we do.

use std::collections::HashMap;

use half::{bf16, f16};
use rbee_kernels::{Blocks, Kept, WeightType};

/// How activations are rounded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// With an f32 as the scale of every 32, beside weights that are kept with few bits.
    Ours,
    /// As llama.cpp does.
    Theirs,
}

/// A matrix `[rows, inputs]` or a vector, and how it is stored.
pub struct Weights {
    pub kind: WeightType,
    pub inputs: usize,
    pub values: Vec<f64>,
    /// What is added to all of a block, where blocks have such a thing besides a scale of eight bits.
    pub minima: Vec<f64>,
}

/// The model. Rotary pairs are neighbours.
pub struct Llama {
    pub weights: HashMap<String, Weights>,
    pub heads: usize,
    pub kv_heads: usize,
    pub eps: f64,
    pub theta: f64,
    pub activations: Activations,
}

/// Activations in runs of eight bits with one scale, and how far the stored sum of each run is from that of its values.
fn runs(x: &[f64], len: usize, stored: fn(f32) -> f32) -> (Vec<f64>, Vec<f64>) {
    let (mut values, mut sums) = (Vec::with_capacity(x.len()), Vec::with_capacity(x.len() / len));
    for run in x.chunks(len) {
        let most = run.iter().fold(0f32, |most, value| most.max((*value as f32).abs()));
        let whole: Vec<f32> = run.iter().map(|value| (*value as f32 * (127.0 / most)).round_ties_even()).collect();
        let (scale, sum) = (most / 127.0, whole.iter().sum::<f32>());
        values.extend(whole.iter().map(|whole| f64::from(whole * stored(scale))));
        sums.push(f64::from(stored(scale * sum)) - f64::from(stored(scale)) * f64::from(sum));
    }
    (values, sums)
}

/// What activations become beside weights of a kind.
fn rounded(activations: Activations, kind: WeightType, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
    if activations == Activations::Ours {
        return match kind.kept() {
            Kept::Quantized(_) => runs(x, 32, |value| value),
            Kept::F32 | Kept::F16 | Kept::Bf16 | Kept::BlockFloat => (x.to_vec(), Vec::new()),
        };
    }
    let narrow = x.iter().map(|value| *value as f32);
    match kind {
        WeightType::F32 => (x.to_vec(), Vec::new()),
        WeightType::F16 => (narrow.map(|value| f16::from_f32(value).to_f64()).collect(), Vec::new()),
        WeightType::Bf16 => (narrow.map(|value| bf16::from_f32(value).to_f64()).collect(), Vec::new()),
        WeightType::Blocks(Blocks::Q4_0 | Blocks::Q4_1 | Blocks::Q5_0 | Blocks::Q5_1 | Blocks::Q8_0) => {
            runs(x, 32, |value| f16::from_f32(value).to_f32())
        }
        WeightType::Blocks(_) => runs(x, 256, |value| value),
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Llama {
    fn product(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let Weights { kind, inputs, values, minima } = &self.weights[name];
        let rows = values.chunks(*inputs);
        let (x, sums) = rounded(self.activations, *kind, x);
        let minima = (0..).map(|row| minima.get(row * sums.len()..).map_or(0.0, |minima| dot(minima, &sums)));
        rows.zip(minima).map(|(row, of_sums)| dot(row, &x) + of_sums).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + self.eps).sqrt();
        x.iter().zip(&self.weights[name].values).map(|(x, weight)| x * scale * weight).collect()
    }

    fn rotate(&self, heads: &mut [f64], dim: usize, position: usize) {
        for head in heads.chunks_mut(dim) {
            for (i, pair) in head.chunks_mut(2).enumerate() {
                let angle = position as f64 * self.theta.powf(-2.0 * i as f64 / dim as f64);
                let (sin, cos) = angle.sin_cos();
                (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
            }
        }
    }

    /// The logits after each token.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let embedding = &self.weights["token_embd.weight"];
        let hidden = embedding.inputs;
        let dim = self.weights["blk.0.attn_q.weight"].values.len() / hidden / self.heads;
        let (mut keys, mut values): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
        let rows = tokens.iter().enumerate().map(|(position, token)| {
            let mut x = embedding.values[*token as usize * hidden..][..hidden].to_vec();
            let normed = self.norm("blk.0.attn_norm.weight", &x);
            let [mut q, mut k, v] =
                ["q", "k", "v"].map(|part| self.product(&format!("blk.0.attn_{part}.weight"), &normed));
            self.rotate(&mut q, dim, position);
            self.rotate(&mut k, dim, position);
            keys.push(k);
            values.push(v);
            let attended: Vec<f64> = (0..self.heads)
                .flat_map(|head| {
                    let at = head / (self.heads / self.kv_heads) * dim;
                    let q = &q[head * dim..][..dim];
                    let dot = |k: &Vec<f64>| k[at..][..dim].iter().zip(q).map(|(k, q)| k * q).sum::<f64>();
                    let scores = softmax(&keys.iter().map(|k| dot(k) / (dim as f64).sqrt()).collect::<Vec<_>>());
                    let mix = |i: usize| scores.iter().zip(&values).map(|(score, v)| score * v[at + i]).sum::<f64>();
                    (0..dim).map(mix).collect::<Vec<_>>()
                })
                .collect();
            add(&mut x, &self.product("blk.0.attn_output.weight", &attended));
            let normed = self.norm("blk.0.ffn_norm.weight", &x);
            let [gate, up] = ["gate", "up"].map(|part| self.product(&format!("blk.0.ffn_{part}.weight"), &normed));
            let gated: Vec<f64> = gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            add(&mut x, &self.product("blk.0.ffn_down.weight", &gated));
            self.product("token_embd.weight", &self.norm("output_norm.weight", &x))
        });
        rows.collect()
    }
}

fn add(x: &mut [f64], more: &[f64]) {
    x.iter_mut().zip(more).for_each(|(x, more)| *x += more);
}

pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let high = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - high).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}
