//! The one parametric decoder: attention and MLP with norms around them, on candle tensors of shape `[rows, width]`.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use rbee_engine::StepCounter;
use rbee_engine::runner::{BlockId, Chunk, Regime};
use rbee_kernels::attention::{Query, Scratch, attend};
use rbee_kernels::candle::{Compute, Linear, RmsNorm, values};
use rbee_kernels::kv_form::KvForm;
use rbee_kernels::pool::SharedOut;
use rbee_kernels::{Packed, ops};
use rbee_weights::config::{LayerConfig, ModelConfig, Rope};

use crate::kv::KvStore;
use crate::mlp::MlpLayer;

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

    fn rotate(&self, head: &mut [f32], position: usize) {
        let at = position * self.half;
        ops::rope(&mut head[..2 * self.half], &self.cos[at..at + self.half], &self.sin[at..at + self.half]);
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

impl Decoder {
    /// The hidden state after the last layer of every row: `[rows, hidden]`. K and V of every row are in the KV then.
    pub(crate) fn forward<F: KvForm>(&self, pass: &Pass<'_, F>) -> Result<Tensor> {
        let ModelConfig { hidden, scales, .. } = *pass.config;
        let mut embedded = vec![0.0; pass.rows.len() * hidden];
        for (row, out) in pass.rows.iter().zip(embedded.chunks_exact_mut(hidden)) {
            self.embedding.row(row.token as usize, out);
            if scales.embedding != 1.0 {
                out.iter_mut().for_each(|value| *value *= scales.embedding);
            }
        }
        let mut x = Tensor::from_vec(embedded, (pass.rows.len(), hidden), &Device::Cpu)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let qkv = layer.qkv.forward(&normed(&layer.before_attention, &x)?)?;
            let attended = qkv.apply_op1_no_bwd(&Attention { index: i, layer, pass })?;
            let attended = normed(&layer.after_attention, &layer.output.forward(&attended)?)?;
            x = added(&x, &attended, scales.residual)?;
            let mixed = layer.mlp.forward(&normed(&layer.before_mlp, &x)?)?;
            x = added(&x, &normed(&layer.after_mlp, &mixed)?, scales.residual)?;
            pass.steps.advance();
        }
        Ok(x)
    }

    /// Bytes of all weights in memory.
    pub(crate) fn held(&self) -> u64 {
        let norm = |norm: &RmsNorm| size_of_val(&norm.weight[..]) as u64;
        let tied = Arc::ptr_eq(&self.embedding, &self.head.weights);
        let layers = self.layers.iter().map(|layer| {
            let around = [&layer.before_attention, &layer.after_attention, &layer.before_mlp, &layer.after_mlp];
            let norms = around.into_iter().flatten().chain(layer.qk_norms.iter().flatten()).map(norm);
            norms.sum::<u64>() + held(&layer.qkv) + held(&layer.output) + layer.mlp.held()
        });
        let head = if tied { 0 } else { held(&self.head) };
        layers.sum::<u64>() + self.embedding.held() + head + norm(&self.norm)
    }

    /// Some rows of a hidden state after the last norm.
    pub(crate) fn states(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        self.norm.forward(hidden)?.flatten_all()?.to_vec1::<f32>()
    }

    /// Logits of some rows of a hidden state: `[rows, hidden]` to `rows * vocab` values.
    pub(crate) fn logits(&self, config: &ModelConfig, hidden: &Tensor) -> Result<Vec<f32>> {
        let mut logits = self.head.forward(&self.norm.forward(hidden)?)?.flatten_all()?.to_vec1::<f32>()?;
        if config.scales.logits != 1.0 {
            logits.iter_mut().for_each(|logit| *logit *= config.scales.logits);
        }
        if let Some(cap) = config.logit_cap {
            ops::soft_cap(&mut logits, cap);
        }
        Ok(logits)
    }
}

/// Bytes of a matrix and its bias.
pub(crate) fn held(linear: &Linear) -> u64 {
    linear.weights.held() + linear.bias.as_ref().map_or(0, |bias| size_of_val(&bias[..]) as u64)
}

fn normed(norm: &Option<RmsNorm>, x: &Tensor) -> Result<Tensor> {
    norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))
}

fn added(x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
    if scale == 1.0 { x + y } else { x + (y * f64::from(scale))? }
}

/// Multiply-adds of attention below which the other threads are left asleep.
const SMALL: usize = 1 << 21;

/// Rope, the write into the KV, and causal attention over it: `[rows, (heads + 2 kv_heads) * dim]` to `[rows, heads * dim]`.
struct Attention<'a, F: KvForm> {
    index: usize,
    layer: &'a Layer,
    pass: &'a Pass<'a, F>,
}

thread_local! {
    /// Each compute thread's own.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl<F: KvForm> CustomOp1 for Attention<'_, F> {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    #[expect(unsafe_code, reason = "threads write disjoint heads of one output")]
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Self { index, layer, pass: Pass { config, compute, ropes, kv, rows, .. } } = self;
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        let LayerConfig { window, rope, .. } = config.layers[*index];
        let width = (heads + 2 * kv_heads) * dim;
        let mut qkv = values(storage, layout)?.to_vec();
        let mut before = vec![0.0; (heads + kv_heads) * dim];
        let mut store = kv.lock().unwrap_or_else(PoisonError::into_inner);
        for (row, qkv) in rows.iter().zip(qkv.chunks_exact_mut(width)) {
            let (rotated, v) = qkv.split_at_mut((heads + kv_heads) * dim);
            if let Some([q, k]) = &layer.qk_norms {
                before.copy_from_slice(rotated);
                q.rows(&before[..heads * dim], &mut rotated[..heads * dim]);
                k.rows(&before[heads * dim..], &mut rotated[heads * dim..]);
            }
            if let Some(rope) = rope {
                let table = ropes.table(rope, row.regime);
                for head in rotated.chunks_exact_mut(dim) {
                    table.rotate(head, row.position);
                }
            }
            store.write(*index, row.blocks, row.position, &rotated[heads * dim..], v);
        }
        let store = &*store;
        let mut result = vec![0.0; rows.len() * heads * dim];
        let out = SharedOut::new(&mut result);
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
        if work < SMALL {
            (0..tasks).for_each(one)
        } else {
            compute.run(tasks, &one)
        }
        Ok((CpuStorage::F32(result), Shape::from((rows.len(), heads * dim))))
    }
}
