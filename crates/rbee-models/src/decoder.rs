//! The one parametric decoder: pre-norm attention and gated MLP on candle tensors of shape `[rows, width]`.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use rbee_engine::StepCounter;
use rbee_engine::runner::{BlockId, Chunk};
use rbee_kernels::attention::{Query, Scratch, attend};
use rbee_kernels::candle::{Compute, Linear, RmsNorm, SiluMul, values};
use rbee_kernels::pool::SharedOut;
use rbee_kernels::simd::Element;
use rbee_kernels::{Packed, ops};
use rbee_weights::config::ModelConfig;

use crate::kv::KvStore;

/// A decoder's weights.
pub(crate) struct Decoder {
    pub(crate) embedding: Arc<Packed>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: RmsNorm,
    pub(crate) head: Linear,
}

/// One layer's weights.
pub(crate) struct Layer {
    pub(crate) attention_norm: RmsNorm,
    /// q, k and v below each other.
    pub(crate) qkv: Linear,
    pub(crate) output: Linear,
    pub(crate) mlp_norm: RmsNorm,
    /// gate and up below each other.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

/// One row of a step: where it stands in its sequence, and that sequence's blocks.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) token: u32,
    pub(crate) position: usize,
    pub(crate) blocks: &'a [BlockId],
}

/// The rows of all chunks, in order.
pub(crate) fn rows<'a>(chunks: &[Chunk<'a>]) -> Vec<Row<'a>> {
    let rows = chunks.iter().flat_map(|chunk| {
        let tokens = chunk.tokens.iter().enumerate();
        tokens.map(move |(i, &token)| Row { token, position: chunk.start + i, blocks: chunk.blocks })
    });
    rows.collect()
}

/// Cosines and sines by position, always f32: `positions * head_dim / 2` each.
pub(crate) struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// The table of a model for so many positions.
    pub(crate) fn new(config: &ModelConfig, positions: usize) -> Self {
        let frequencies = config.rope.inverse_frequencies(config.head_dim);
        // The reference multiplies position and frequency in f32.
        let angles = |position: usize| frequencies.iter().map(move |f| position as f32 * *f as f32);
        let cos = (0..positions).flat_map(|p| angles(p).map(|angle| f64::from(angle).cos() as f32)).collect();
        let sin = (0..positions).flat_map(|p| angles(p).map(|angle| f64::from(angle).sin() as f32)).collect();
        Self { cos, sin, half: frequencies.len() }
    }

    fn rotate(&self, head: &mut [f32], position: usize) {
        let at = position * self.half;
        ops::rope(head, &self.cos[at..at + self.half], &self.sin[at..at + self.half]);
    }
}

/// What one forward pass works with besides the weights.
pub(crate) struct Pass<'a, T> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) compute: &'a Compute,
    pub(crate) rope: &'a RopeTable,
    pub(crate) kv: &'a Mutex<KvStore<T>>,
    pub(crate) rows: &'a [Row<'a>],
    pub(crate) steps: &'a StepCounter,
}

impl Decoder {
    /// The hidden state after the last layer of every row: `[rows, hidden]`. K and V of every row are in the KV then.
    pub(crate) fn forward<T: Element>(&self, pass: &Pass<'_, T>) -> Result<Tensor> {
        let hidden = pass.config.hidden;
        let mut embedded = vec![0.0; pass.rows.len() * hidden];
        for (row, out) in pass.rows.iter().zip(embedded.chunks_exact_mut(hidden)) {
            self.embedding.row(row.token as usize, out);
        }
        let mut x = Tensor::from_vec(embedded, (pass.rows.len(), hidden), &Device::Cpu)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let attended = layer.qkv.forward(&layer.attention_norm.forward(&x)?)?;
            let attended = attended.apply_op1_no_bwd(&Attention { layer: i, pass })?;
            x = (x + layer.output.forward(&attended)?)?;
            let gated =
                SiluMul { isa: pass.compute.isa() }.forward(&layer.gate_up.forward(&layer.mlp_norm.forward(&x)?)?)?;
            x = (x + layer.down.forward(&gated)?)?;
            pass.steps.advance();
        }
        Ok(x)
    }

    /// Logits of some rows of a hidden state: `[rows, hidden]` to `[rows, vocab]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.norm.forward(hidden)?)
    }
}

/// Multiply-adds of attention below which the other threads are left asleep.
const SMALL: usize = 1 << 21;

/// Rope, the write into the KV, and causal attention over it: `[rows, (heads + 2 kv_heads) * dim]` to `[rows, heads * dim]`.
struct Attention<'a, T> {
    layer: usize,
    pass: &'a Pass<'a, T>,
}

thread_local! {
    /// Each compute thread's own.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl<T: Element> CustomOp1 for Attention<'_, T> {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    #[expect(unsafe_code, reason = "threads write disjoint heads of one output")]
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Self { layer, pass: Pass { config, compute, rope, kv, rows, .. } } = self;
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        let width = (heads + 2 * kv_heads) * dim;
        let mut qkv = values(storage, layout)?.to_vec();
        let mut store = kv.lock().unwrap_or_else(PoisonError::into_inner);
        for (row, qkv) in rows.iter().zip(qkv.chunks_exact_mut(width)) {
            let (rotated, v) = qkv.split_at_mut((heads + kv_heads) * dim);
            for head in rotated.chunks_exact_mut(dim) {
                rope.rotate(head, row.position);
            }
            store.write(*layer, row.blocks, row.position, &rotated[heads * dim..], v);
        }
        let store = &*store;
        let mut result = vec![0.0; rows.len() * heads * dim];
        let out = SharedOut::new(&mut result);
        let scale = 1.0 / (dim as f32).sqrt();
        // One task is one KV head of one row: its query heads share the keys.
        let group = heads / kv_heads * dim;
        let tasks = rows.len() * kv_heads;
        let work: usize = rows.iter().map(|row| row.position + 1).sum::<usize>() * heads * dim * 2;
        let one = |task: usize| {
            let (r, kv_head) = (task / kv_heads, task % kv_heads);
            let row = &rows[r];
            let heads = &qkv[r * width + kv_head * group..][..group];
            let query = Query { heads, dim, first: 0, count: row.position + 1, scale, cap: None };
            // SAFETY: these heads of this row belong to this task alone.
            let out = unsafe { out.part(task * group..(task + 1) * group) };
            let sequence = store.sequence(*layer, kv_head, row.blocks);
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
