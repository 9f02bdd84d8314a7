//! The one parametric decoder: attention and MLP with norms around them, on plain rows.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use rbee_engine::StepCounter;
use rbee_engine::runner::{BlockId, Chunk, Regime};
use rbee_kernels::attention::{Query, Scratch, attend};
use rbee_kernels::compute::{Compute, Linear, RmsNorm};
use rbee_kernels::kv_form::KvForm;
use rbee_kernels::pool::SharedOut;
use rbee_kernels::{Isa, Packed, ops};
use rbee_weights::config::{ModelConfig, Rope};

use crate::kv::{KvStore, Written};
use crate::mlp::{MlpLayer, MlpScratch};

/// A decoder's weights.
pub(crate) struct Decoder {
    pub(crate) embedding: Arc<Packed>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: RmsNorm,
    pub(crate) head: Linear,
}

/// One layer's weights.
pub(crate) struct Layer {
    pub(crate) before_attention: Option<RmsNorm>,
    pub(crate) after_attention: Option<RmsNorm>,
    pub(crate) before_mlp: Option<RmsNorm>,
    pub(crate) after_mlp: Option<RmsNorm>,
    /// q, k and v below each other.
    pub(crate) qkv: Linear,
    /// Of queries, and of keys: of each head, or of all together, by their length.
    pub(crate) qk_norms: Option<[RmsNorm; 2]>,
    pub(crate) output: Linear,
    pub(crate) mlp: MlpLayer,
}

/// One row of a step: where it stands in its sequence, and that sequence's blocks.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) token: u32,
    pub(crate) regime: Regime,
    pub(crate) position: usize,
    pub(crate) blocks: &'a [BlockId],
}

/// The rows of all chunks, in order.
pub(crate) fn rows<'a>(chunks: &[Chunk<'a>]) -> Vec<Row<'a>> {
    let rows = chunks.iter().flat_map(|chunk| {
        let tokens = chunk.tokens.iter().enumerate();
        tokens.map(move |(i, &token)| Row {
            token,
            regime: chunk.regime,
            position: chunk.start + i,
            blocks: chunk.blocks,
        })
    });
    rows.collect()
}

/// Cosines and sines of one rope by position, always f32: `positions * dims / 2` each.
pub(crate) struct RopeTable {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    pub(crate) half: usize,
}

impl RopeTable {
    fn new(rope: &Rope, beyond: bool, positions: usize) -> Self {
        let frequencies = rope.inverse_frequencies(beyond);
        let factor = rope.attention() as f32;
        // The reference multiplies position and frequency in f32.
        let angles = |position: usize| frequencies.iter().map(move |f| position as f32 * *f as f32);
        let cos = (0..positions).flat_map(|p| angles(p).map(|angle| f64::from(angle).cos() as f32 * factor)).collect();
        let sin = (0..positions).flat_map(|p| angles(p).map(|angle| f64::from(angle).sin() as f32 * factor)).collect();
        Self { cos, sin, half: frequencies.len() }
    }

    /// Turns heads of `dim` values each.
    fn rotate(&self, isa: Isa, heads: &mut [f32], dim: usize, position: usize) {
        let at = position * self.half;
        ops::rope(isa, heads, dim, &self.cos[at..at + self.half], &self.sin[at..at + self.half]);
    }
}

/// A model's ropes: for each, the table of usual texts and that of long ones where it differs.
pub(crate) struct Ropes(pub(crate) Vec<(RopeTable, Option<RopeTable>)>);

impl Ropes {
    /// The tables of a model for so many positions.
    pub(crate) fn new(config: &ModelConfig, positions: usize) -> Self {
        let tables = config.ropes.iter().map(|rope| {
            let long = rope.original().map(|_| RopeTable::new(rope, true, positions));
            (RopeTable::new(rope, false, positions), long)
        });
        Self(tables.collect())
    }

    fn table(&self, rope: usize, regime: Regime) -> &RopeTable {
        match &self.0[rope] {
            (_, Some(long)) if regime == Regime::Long => long,
            (usual, _) => usual,
        }
    }
}

/// What one forward pass works with besides the weights.
pub(crate) struct Pass<'a, F: KvForm> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) compute: &'a Compute,
    pub(crate) ropes: &'a Ropes,
    pub(crate) kv: &'a Mutex<KvStore<F>>,
    pub(crate) rows: &'a [Row<'a>],
    pub(crate) steps: &'a StepCounter,
}

/// What stands between the parts of a decoder; kept between steps, so that a step takes no memory anew.
#[derive(Default)]
pub(crate) struct StepScratch {
    /// The hidden state of every row.
    pub(crate) x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    /// What is added to the hidden state, before and after its norm.
    mixed: Vec<f32>,
    mlp: MlpScratch,
    picked: Vec<f32>,
}

impl Decoder {
    /// Leaves the hidden state after the last layer of every row in `scratch.x`, `[rows, hidden]`. K and V of every row are in the
    /// KV then.
    pub(crate) fn forward<F: KvForm>(&self, pass: &Pass<'_, F>, scratch: &mut StepScratch) {
        let ModelConfig { hidden, scales, heads, kv_heads, head_dim, .. } = *pass.config;
        let rows = pass.rows.len();
        let StepScratch { x, normed, qkv, attended, mixed, mlp, .. } = scratch;
        // What is in there from earlier steps is written before it is read.
        x.resize(rows * hidden, 0.0);
        normed.resize(rows * hidden, 0.0);
        mixed.resize(rows * hidden, 0.0);
        qkv.resize(rows * (heads + 2 * kv_heads) * head_dim, 0.0);
        attended.resize(rows * heads * head_dim, 0.0);
        pass.compute.stripes(x, hidden, &|first, x| {
            for (row, x) in pass.rows[first..].iter().zip(x.chunks_exact_mut(hidden)) {
                self.embedding.row(row.token as usize, x);
                if scales.embedding != 1.0 {
                    x.iter_mut().for_each(|value| *value *= scales.embedding);
                }
            }
        });
        for (index, layer) in self.layers.iter().enumerate() {
            layer.qkv.rows(normed_by(&layer.before_attention, x, normed), qkv);
            let attention = Attention { index, layer, pass };
            attention.store(qkv);
            attention.attend(qkv, attended);
            layer.output.rows(attended, mixed);
            self.add(pass, x, normed_by(&layer.after_attention, mixed, normed));
            layer.mlp.rows(normed_by(&layer.before_mlp, x, normed), mixed, mlp);
            self.add(pass, x, normed_by(&layer.after_mlp, mixed, normed));
            pass.steps.advance();
        }
    }

    /// Adds to the hidden state.
    fn add<F: KvForm>(&self, pass: &Pass<'_, F>, x: &mut [f32], more: &[f32]) {
        let ModelConfig { hidden, scales, .. } = pass.config;
        pass.compute.stripes(x, *hidden, &|first, x| {
            ops::add(pass.compute.isa(), x, &more[first * hidden..][..x.len()], scales.residual);
        });
    }

    /// Bytes of all weights in memory.
    pub(crate) fn held(&self) -> u64 {
        let norm = |norm: &RmsNorm| size_of_val(&norm.weight[..]) as u64;
        let tied = Arc::ptr_eq(&self.embedding, &self.head.weights);
        let layers = self.layers.iter().map(|layer| {
            let around = [&layer.before_attention, &layer.after_attention, &layer.before_mlp, &layer.after_mlp];
            let norms = around.into_iter().flatten().chain(layer.qk_norms.iter().flatten()).map(norm);
            norms.sum::<u64>() + layer.qkv.held() + layer.output.held() + layer.mlp.held()
        });
        let head = if tied { 0 } else { self.head.held() };
        layers.sum::<u64>() + self.embedding.held() + head + norm(&self.norm)
    }

    /// Some rows of the hidden state after the last norm, to `[rows, hidden]`.
    pub(crate) fn states(&self, scratch: &mut StepScratch, rows: &[usize], out: &mut [f32]) {
        let hidden = self.norm.weight.len();
        let StepScratch { x, picked, .. } = scratch;
        picked.clear();
        rows.iter().for_each(|row| picked.extend_from_slice(&x[row * hidden..][..hidden]));
        self.norm.rows(picked, out);
    }

    /// Logits of some rows of the hidden state, to `[rows, vocab]`.
    pub(crate) fn logits(&self, config: &ModelConfig, scratch: &mut StepScratch, rows: &[usize], out: &mut [f32]) {
        let mut states = std::mem::take(&mut scratch.normed);
        states.resize(rows.len() * config.hidden, 0.0);
        self.states(scratch, rows, &mut states);
        self.head.rows(&states, out);
        scratch.normed = states;
        if config.scales.logits != 1.0 {
            out.iter_mut().for_each(|logit| *logit *= config.scales.logits);
        }
        if let Some(cap) = config.logit_cap {
            ops::soft_cap(out, cap);
        }
    }
}

/// `x` after its norm, if it has one.
fn normed_by<'a>(norm: &Option<RmsNorm>, x: &'a [f32], out: &'a mut [f32]) -> &'a [f32] {
    let Some(norm) = norm else { return x };
    norm.rows(x, out);
    out
}

/// Multiply-adds of attention below which the other threads are left asleep.
const SMALL: usize = 1 << 18;

/// One layer's attention of a step.
struct Attention<'a, F: KvForm> {
    index: usize,
    layer: &'a Layer,
    pass: &'a Pass<'a, F>,
}

thread_local! {
    /// Each compute thread's own.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static HEADS: RefCell<Vec<f32>> = RefCell::default();
}

impl<F: KvForm> Attention<'_, F> {
    /// Norms and rope of queries and keys, `[rows, (heads + 2 kv_heads) * dim]`, and the write of keys and values into the KV.
    fn store(&self, qkv: &mut [f32]) {
        let Self { index, layer, pass: Pass { config, compute, ropes, kv, rows, .. } } = self;
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        let rope = config.layers[*index].rope;
        let (width, rotated) = ((heads + 2 * kv_heads) * dim, (heads + kv_heads) * dim);
        compute.stripes(qkv, width, &|first, qkv| {
            for (row, qkv) in rows[first..].iter().zip(qkv.chunks_exact_mut(width)) {
                let rotated = &mut qkv[..rotated];
                if let Some([q, k]) = &layer.qk_norms {
                    HEADS.with_borrow_mut(|before| {
                        before.clear();
                        before.extend_from_slice(rotated);
                        q.few(&before[..heads * dim], &mut rotated[..heads * dim]);
                        k.few(&before[heads * dim..], &mut rotated[heads * dim..]);
                    });
                }
                if let Some(rope) = rope {
                    ropes.table(rope, row.regime).rotate(compute.isa(), rotated, dim, row.position);
                }
            }
        });
        let mut store = kv.lock().unwrap_or_else(PoisonError::into_inner);
        let positions = rows.iter().zip(qkv.chunks_exact(width)).map(|(row, qkv)| {
            let (k, v) = qkv[heads * dim..].split_at(kv_heads * dim);
            Written::new(row.blocks, row.position, k, v)
        });
        store.write(*index, compute, positions);
    }

    /// Causal attention over the KV: from `[rows, (heads + 2 kv_heads) * dim]` to `[rows, heads * dim]`.
    #[expect(unsafe_code, reason = "threads write disjoint heads of one output")]
    fn attend(&self, qkv: &[f32], out: &mut [f32]) {
        let Self { index, pass: Pass { config, compute, kv, rows, .. }, .. } = self;
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        let window = config.layers[*index].window;
        let width = (heads + 2 * kv_heads) * dim;
        let store = kv.lock().unwrap_or_else(PoisonError::into_inner);
        let store = &*store;
        let out = SharedOut::new(out);
        let scale = config.scales.attention;
        let first = |position: usize| window.map_or(0, |window| (position + 1).saturating_sub(window));
        // One task is one KV head of one row: its query heads share the keys.
        let group = heads / kv_heads * dim;
        let tasks = rows.len() * kv_heads;
        let work: usize =
            rows.iter().map(|row| row.position + 1 - first(row.position)).sum::<usize>() * heads * dim * 2;
        let one = |task: usize| {
            let (r, kv_head) = (task / kv_heads, task % kv_heads);
            let row = &rows[r];
            let heads = &qkv[r * width + kv_head * group..][..group];
            let (first, count) = (first(row.position), row.position + 1);
            let query = Query { heads, dim, first, count, scale, cap: config.attention_cap };
            // SAFETY: these heads of this row belong to this task alone.
            let out = unsafe { out.part(task * group..(task + 1) * group) };
            let sequence = store.sequence(*index, kv_head, row.blocks);
            SCRATCH.with_borrow_mut(|scratch| attend(compute.isa(), query, &sequence, out, scratch));
        };
        if work < SMALL { (0..tasks).for_each(one) } else { compute.run(tasks, &one) }
    }
}
