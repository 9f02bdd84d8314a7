//! BERT-like encoders: attention without a mask and a plain MLP, each followed by a layer norm, on plain rows of f32.
//!
//! Source: Devlin et al. 2018 and transformers 5.23 (`modeling_bert.py`, `modeling_xlm_roberta.py`), whose sums stand in this order.
//! [`plan`] has the tensors with their shapes, [`runner`] drives this behind the engine's seam; the keys of `config.json` are read in
//! [`rbee_weights::config::encoder`], and what a folder declares about embeddings in [`rbee_weights::config::sentence`].
//!
//! A text's embedding depends on its own tokens alone: every row goes through the same kernels as a decoder's, and attention sees
//! the rows of one text.

pub(crate) mod plan;
pub(crate) mod runner;

use std::cell::RefCell;

use rbee_engine::StepCounter;
use rbee_kernels::attention::{BLOCK, KvBlocks, Query, Scratch, attend};
use rbee_kernels::compute::{Compute, Linear};
use rbee_kernels::kv_form::KvForm;
use rbee_kernels::ops::{self, Bend, LayerNorm};
use rbee_kernels::pool::SharedOut;
use rbee_kernels::{Isa, Packed};
use rbee_weights::config::sentence::{Embedding, Length, Pooling};

/// An encoder's weights.
pub(crate) struct Encoder {
    pub(crate) words: Packed,
    /// By position, `[context, hidden]`: that of the position and that of the first token type, added.
    pub(crate) places: Vec<f32>,
    pub(crate) norm: Norm,
    pub(crate) layers: Vec<Layer>,
    pub(crate) heads: usize,
    pub(crate) bend: Bend,
    pub(crate) compute: Compute,
}

/// One layer's weights.
pub(crate) struct Layer {
    /// q, k and v below each other.
    pub(crate) qkv: Linear,
    pub(crate) output: Linear,
    pub(crate) after_attention: Norm,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    pub(crate) after_mlp: Norm,
}

/// A layer norm's weights.
pub(crate) struct Norm {
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    pub(crate) eps: f32,
}

/// Values below which the other threads are left asleep.
const SMALL: usize = 1 << 14;

impl Encoder {
    /// The states of all tokens of some texts after the last layer, `[tokens, hidden]`.
    pub(crate) fn states(&self, texts: &[&[u32]], steps: &StepCounter) -> Vec<f32> {
        let hidden = self.words.k();
        let rows: usize = texts.iter().map(|text| text.len()).sum();
        let (mut x, mut y) = (vec![0.0; rows * hidden], vec![0.0; rows * hidden]);
        let tokens = texts.iter().flat_map(|text| text.iter().enumerate());
        let out = x.chunks_exact_mut(hidden).zip(y.chunks_exact_mut(hidden));
        for ((position, token), (x, y)) in tokens.zip(out) {
            self.words.row(*token as usize, x);
            y.copy_from_slice(&self.places[position * hidden..][..hidden]);
        }
        self.add_norm(&mut x, &y, &self.norm);
        let mut qkv = vec![0.0; rows * 3 * hidden];
        let mut attended = vec![0.0; rows * hidden];
        let mut wide = vec![0.0; rows * self.layers.first().map_or(0, |layer| layer.up.weights.n())];
        for layer in &self.layers {
            layer.qkv.rows(&x, &mut qkv);
            self.attention(texts, &qkv, &mut attended);
            layer.output.rows(&attended, &mut y);
            self.add_norm(&mut x, &y, &layer.after_attention);
            layer.up.rows(&x, &mut wide);
            let width = layer.up.weights.n();
            self.compute.stripes(&mut wide, width, &|_, rows| ops::bend(self.compute.isa(), self.bend, rows));
            layer.down.rows(&wide, &mut y);
            self.add_norm(&mut x, &y, &layer.after_mlp);
            steps.advance();
        }
        x
    }

    /// `x = norm(x + y)`.
    fn add_norm(&self, x: &mut [f32], y: &[f32], norm: &Norm) {
        let Norm { weight, bias, eps } = norm;
        self.compute.stripes(x, weight.len(), &|first, x| {
            let norm = LayerNorm { weight, bias, eps: *eps };
            ops::add_layer_norm(self.compute.isa(), x, &y[first * weight.len()..][..x.len()], norm);
        });
    }

    /// Attention of every token to all of its text: `[tokens, 3 hidden]` to `[tokens, hidden]`. One task is one head of one text.
    #[expect(unsafe_code, reason = "threads write disjoint heads of one output")]
    fn attention(&self, texts: &[&[u32]], qkv: &[f32], out: &mut [f32]) {
        let (hidden, heads) = (self.words.k(), self.heads);
        let dim = hidden / heads;
        let mut firsts = Vec::with_capacity(texts.len());
        let mut rows = 0;
        for text in texts {
            firsts.push(rows);
            rows += text.len();
        }
        let out = SharedOut::new(out);
        let one = |task: usize| {
            let (text, head) = (task / heads, task % heads);
            let (first, len) = (firsts[text], texts[text].len());
            let qkv = &qkv[first * 3 * hidden..][..len * 3 * hidden];
            HEAD.with_borrow_mut(|scratch| {
                scratch.attend(self.compute.isa(), qkv, Part { hidden, dim, head }, |row, values| {
                    let at = (first + row) * hidden + head * dim;
                    // SAFETY: this head of this row belongs to this task alone.
                    unsafe { out.part(at..at + dim) }.copy_from_slice(values);
                });
            });
        };
        let tasks = texts.len() * heads;
        if rows * hidden < SMALL { (0..tasks).for_each(one) } else { self.compute.run(tasks, &one) }
    }

    /// Bytes of all weights in memory.
    pub(crate) fn held(&self) -> u64 {
        let norm = |norm: &Norm| (size_of_val(&norm.weight[..]) + size_of_val(&norm.bias[..])) as u64;
        let layers = self.layers.iter().map(|layer| {
            let matrices = [&layer.qkv, &layer.output, &layer.up, &layer.down];
            matrices.into_iter().map(Linear::held).sum::<u64>() + norm(&layer.after_attention) + norm(&layer.after_mlp)
        });
        layers.sum::<u64>() + self.words.held() + size_of_val(&self.places[..]) as u64 + norm(&self.norm)
    }
}

thread_local! {
    /// Each compute thread's own.
    static HEAD: RefCell<Head> = RefCell::default();
}

/// Queries that are computed together: they share the keys.
const QUERIES: usize = 16;

/// Which head of rows of q, k and v.
#[derive(Clone, Copy)]
struct Part {
    hidden: usize,
    dim: usize,
    head: usize,
}

/// Keys, values and queries of one head of one text.
#[derive(Default)]
struct Head {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    out: Vec<f32>,
    scratch: Scratch,
}

impl Head {
    /// Attention of a whole text; `write` is given each row's values.
    fn attend(&mut self, isa: Isa, qkv: &[f32], part: Part, mut write: impl FnMut(usize, &[f32])) {
        let Part { hidden, dim, head } = part;
        let row = |row: usize, which: usize| &qkv[row * 3 * hidden + which * hidden + head * dim..][..dim];
        let len = qkv.len() / (3 * hidden);
        let (key_len, value_len) = (f32::key_len(dim), f32::value_len(dim));
        // What no token stands at is read, and must be zero.
        self.keys.clear();
        self.keys.resize(len.div_ceil(BLOCK) * key_len, 0.0);
        self.values.clear();
        self.values.resize(len.div_ceil(BLOCK) * value_len, 0.0);
        for position in 0..len {
            let (block, offset) = (position / BLOCK, position % BLOCK);
            f32::write_key(&mut self.keys[block * key_len..][..key_len], offset, row(position, 1));
            f32::write_value(&mut self.values[block * value_len..][..value_len], offset, row(position, 2));
        }
        let kv = View { keys: &self.keys, values: &self.values, key_len, value_len };
        let scale = 1.0 / (dim as f32).sqrt();
        for first in (0..len).step_by(QUERIES) {
            let count = QUERIES.min(len - first);
            self.queries.clear();
            (first..first + count).for_each(|at| self.queries.extend_from_slice(row(at, 0)));
            self.out.resize(count * dim, 0.0);
            let query = Query { heads: &self.queries, dim, first: 0, count: len, scale, cap: None };
            attend(isa, query, &kv, &mut self.out, &mut self.scratch);
            self.out.chunks_exact(dim).enumerate().for_each(|(i, values)| write(first + i, values));
        }
    }
}

/// Keys and values of one head as the kernel reads them.
struct View<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    key_len: usize,
    value_len: usize,
}

impl KvBlocks for View<'_> {
    type Form = f32;

    fn keys(&self, i: usize) -> &[f32] {
        &self.keys[i * self.key_len..][..self.key_len]
    }

    fn values(&self, i: usize) -> &[f32] {
        &self.values[i * self.value_len..][..self.value_len]
    }
}

/// The embedding of a text from its tokens' states, `[tokens, hidden]`; sums are in f64, one token after the other.
pub(crate) fn embedding(declared: &Embedding, states: &[f32], hidden: usize) -> Vec<f32> {
    let tokens = states.len() / hidden;
    let mut values: Vec<f64> = Vec::with_capacity(hidden * declared.poolings.len());
    for pooling in &declared.poolings {
        let sum = |weight: &dyn Fn(usize) -> f64, over: f64| {
            let mut sums = vec![0.0; hidden];
            for (i, state) in states.chunks_exact(hidden).enumerate() {
                sums.iter_mut().zip(state).for_each(|(sum, value)| *sum += weight(i) * f64::from(*value));
            }
            sums.iter_mut().for_each(|sum| *sum /= over);
            sums
        };
        let count = tokens as f64;
        values.extend(match pooling {
            Pooling::Cls => states[..hidden].iter().copied().map(f64::from).collect(),
            Pooling::LastToken => states[states.len() - hidden..].iter().copied().map(f64::from).collect(),
            Pooling::Max => {
                let mut most = vec![f64::NEG_INFINITY; hidden];
                for state in states.chunks_exact(hidden) {
                    most.iter_mut().zip(state).for_each(|(most, value)| *most = most.max(f64::from(*value)));
                }
                most
            }
            Pooling::Mean => sum(&|_| 1.0, count),
            Pooling::MeanSqrtLen => sum(&|_| 1.0, count.sqrt()),
            Pooling::WeightedMean => sum(&|i| (i + 1) as f64, count * (count + 1.0) / 2.0),
        });
    }
    let over = match declared.length {
        Length::Own => 1.0,
        // The reference's bound for a vector without a direction.
        Length::One => values.iter().map(|value| value * value).sum::<f64>().sqrt().max(1e-12),
    };
    values.into_iter().map(|value| (value / over) as f32).collect()
}
