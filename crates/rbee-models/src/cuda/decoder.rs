//! One forward pass on the GPU, without waiting for it.

use half::bf16;
use rbee_cuda::{
    Buffer, Error, Experts, Gate, Gpu, Kv, Linear, Norm, Onto, Padded, Partials, Picks, QkNorm, RopeTable, Rows,
    Scores, Shared,
};
use rbee_engine::runner::Wanted;
use rbee_weights::config::{Activation, LayerConfig, Mlp, ModelConfig};

use super::loader::Dims;

/// A decoder's weights.
pub(crate) struct GpuDecoder {
    pub(crate) embedding: Linear,
    pub(crate) layers: Vec<GpuLayer>,
    pub(crate) norm: Norm,
    /// The embedding where there is none.
    pub(crate) head: Option<Linear>,
}

/// One layer's weights and KV.
pub(crate) struct GpuLayer {
    pub(crate) before_attention: Option<Norm>,
    pub(crate) after_attention: Option<Norm>,
    pub(crate) before_mlp: Option<Norm>,
    pub(crate) after_mlp: Option<Norm>,
    /// q, k and v below each other.
    pub(crate) qkv: Linear,
    pub(crate) qk_norm: Option<QkNorm>,
    pub(crate) kv: Kv,
    pub(crate) output: Linear,
    pub(crate) mlp: MlpLayer,
}

/// A layer's MLP.
pub(crate) enum MlpLayer {
    Gated(GatedLayer),
    Experts(MoeLayer),
}

/// `down(act(gate(x)) * up(x))`.
pub(crate) struct GatedLayer {
    /// gate and up below each other.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
    /// Values of the gate.
    pub(crate) width: usize,
}

/// Experts behind a router.
pub(crate) struct MoeLayer {
    pub(crate) router: Linear,
    pub(crate) gate_up: Experts,
    pub(crate) down: Experts,
    pub(crate) width: usize,
    pub(crate) normalised: bool,
}

/// The experts of a model's layers, which are as many in each that has some.
fn experts(config: &ModelConfig) -> Option<(usize, usize)> {
    config.layers.iter().find_map(|layer| match layer.mlp {
        Mlp::Experts { count, picked, .. } => Some((count, picked)),
        Mlp::Gated(_) => None,
    })
}

/// How much there is room for in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// Rows.
    pub(crate) rows: usize,
    /// Sequences, and rows of logits.
    pub(crate) sequences: usize,
    /// Positions of a sequence.
    pub(crate) context: usize,
}

/// Most bytes of partial sums of attention; rows that need more are computed after each other.
const PARTIAL_BYTES: usize = 128 << 20;

/// Values of each kind that a step works on.
struct Sizes {
    residual: usize,
    qkv: usize,
    queries: usize,
    gates: usize,
    scores: usize,
    mixed: usize,
    logits: usize,
    partial_rows: usize,
}

impl Sizes {
    fn of(config: &ModelConfig, dims: &Dims, room: Room) -> Self {
        let Room { rows, sequences, context } = room;
        let (count, picked) = experts(config).unwrap_or((0, 1));
        let widths = config.layers.iter().map(|layer| match layer.mlp {
            Mlp::Gated(width) => width.next_multiple_of(rbee_cuda::STEP),
            Mlp::Experts { width, picked, .. } => width.next_multiple_of(rbee_cuda::STEP) * picked,
        });
        let all = |values: usize| rows.saturating_mul(values);
        let partials = dims.queries() * size_of::<f32>() * Padded::parts(context);
        Self {
            residual: all(dims.hidden.to),
            qkv: all(dims.qkv()),
            queries: all(dims.queries()),
            gates: all(2 * widths.max().unwrap_or(0)),
            scores: all(count),
            mixed: if count == 0 { 0 } else { all(picked * dims.hidden.to) },
            logits: sequences.saturating_mul(config.vocab),
            partial_rows: (PARTIAL_BYTES / partials.max(1)).clamp(16, rows.max(16)),
        }
    }
}

/// What a step works on.
pub(crate) struct Scratch {
    /// The residual stream.
    x: Buffer<f32>,
    /// What is to be normed before it is added to it; the hidden states of rows that are wanted.
    pub(crate) y: Buffer<f32>,
    normed: Buffer<bf16>,
    qkv: Buffer<f32>,
    q: Buffer<bf16>,
    attended: Buffer<bf16>,
    partials: Partials,
    gates: Buffer<f32>,
    gated: Buffer<bf16>,
    scores: Buffer<f32>,
    mixed: Buffer<f32>,
    picks: Option<Picks>,
    pub(crate) logits: Buffer<f32>,
}

impl Scratch {
    pub(crate) fn new(gpu: &Gpu, config: &ModelConfig, dims: &Dims, room: Room) -> Result<Self, Error> {
        let sizes = Sizes::of(config, dims, room);
        let picks = experts(config).map(|(count, picked)| Picks::new(gpu, room.rows, count, picked));
        Ok(Self {
            x: gpu.zeroed(sizes.residual)?,
            y: gpu.zeroed(sizes.residual)?,
            normed: gpu.zeroed(sizes.residual)?,
            qkv: gpu.zeroed(sizes.qkv)?,
            q: gpu.zeroed(sizes.queries)?,
            attended: gpu.zeroed(sizes.queries)?,
            partials: Partials::new(gpu, dims.heads, sizes.partial_rows, room.context)?,
            gates: gpu.zeroed(sizes.gates)?,
            gated: gpu.zeroed(sizes.gates / 2)?,
            scores: gpu.zeroed(sizes.scores)?,
            mixed: gpu.zeroed(sizes.mixed)?,
            picks: picks.transpose()?,
            logits: gpu.zeroed(sizes.logits)?,
        })
    }

    /// Bytes of it.
    pub(crate) fn bytes(config: &ModelConfig, dims: &Dims, room: Room) -> u64 {
        let sizes = Sizes::of(config, dims, room);
        let f32s = [2 * sizes.residual, sizes.qkv, sizes.gates, sizes.scores, sizes.mixed, sizes.logits];
        let bf16s = [sizes.residual, 2 * sizes.queries, sizes.gates / 2];
        let partials =
            (sizes.partial_rows * Padded::parts(room.context)).saturating_mul(dims.queries() + 2 * dims.heads.queries);
        let total = |values: &[usize], each: usize| {
            values.iter().fold(0, |sum: usize, values| sum.saturating_add(values.saturating_mul(each)))
        };
        (total(&f32s, 4).saturating_add(total(&bf16s, 2)).saturating_add(partials.saturating_mul(4))) as u64
    }
}

/// The ropes of a model on the GPU.
pub(crate) struct GpuRopes {
    /// Usual texts' angles by position, and then long ones' where they differ.
    pub(crate) tables: Vec<RopeTable>,
    /// For layers that turn nothing.
    pub(crate) none: RopeTable,
}

/// What a forward pass works with besides the weights.
pub(crate) struct GpuPass<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) config: &'a ModelConfig,
    pub(crate) dims: &'a Dims,
    pub(crate) ropes: &'a GpuRopes,
    pub(crate) rows: &'a Rows,
    pub(crate) wanted: Wanted,
}

impl GpuDecoder {
    /// Launches a pass: K and V of every row go to its block, and what is wanted of the picked rows to the scratch's logits, or
    /// to its `y`.
    pub(crate) fn forward(&mut self, pass: &GpuPass<'_>, s: &mut Scratch) -> Result<(), Error> {
        let GpuPass { gpu, config, rows, .. } = *pass;
        self.embedding.embed(gpu, rows, config.scales.embedding, &mut s.x)?;
        for (layer, of) in self.layers.iter_mut().zip(&config.layers) {
            layer.forward(pass, of, s)?;
        }
        match pass.wanted {
            Wanted::Nothing | Wanted::Embedding => Ok(()),
            Wanted::Hidden => self.norm.states(gpu, &s.x, rows, &mut s.y),
            Wanted::Logits | Wanted::LogitsOfAll => {
                let picks = rows.picks();
                self.norm.picked(gpu, &s.x, rows, &mut s.normed)?;
                let head = self.head.as_ref().unwrap_or(&self.embedding);
                head.apply(gpu, &s.normed, &mut s.logits, picks, Onto::Over)?;
                if config.scales.logits != 1.0 || config.logit_cap.is_some() {
                    gpu.bend(&mut s.logits, picks * config.vocab, config.scales.logits, config.logit_cap)?;
                }
                Ok(())
            }
        }
    }

    /// Bytes of the weights and of the KV.
    pub(crate) fn held(&self) -> (u64, u64) {
        let layers = self.layers.iter().map(|layer| {
            let around = [&layer.before_attention, &layer.after_attention, &layer.before_mlp, &layer.after_mlp];
            let norms: usize = around.into_iter().flatten().map(Norm::held).sum();
            let qk = layer.qk_norm.as_ref().map_or(0, |norm| norm.q.held() + norm.k.held());
            let mlp = match &layer.mlp {
                MlpLayer::Gated(gated) => gated.gate_up.held() + gated.down.held(),
                MlpLayer::Experts(moe) => moe.router.held() + moe.gate_up.held() + moe.down.held(),
            };
            norms + qk + layer.qkv.held() + layer.output.held() + mlp
        });
        let head = self.head.as_ref().map_or(0, Linear::held);
        let weights = layers.sum::<usize>() + self.embedding.held() + head + self.norm.held();
        (weights as u64, self.layers.iter().map(|layer| layer.kv.held() as u64).sum())
    }
}

impl GpuLayer {
    fn forward(&mut self, pass: &GpuPass<'_>, config: &LayerConfig, s: &mut Scratch) -> Result<(), Error> {
        let GpuPass { gpu, dims, ropes, rows, .. } = *pass;
        let scales = pass.config.scales;
        let count = rows.count();
        normed(gpu, &self.before_attention, dims, s, count)?;
        self.qkv.apply(gpu, &s.normed, &mut s.qkv, count, Onto::Over)?;
        if let Some(norm) = &self.qk_norm {
            norm.apply(gpu, dims.heads, &mut s.qkv, count)?;
        }
        let rope = config.rope.map_or(&ropes.none, |rope| &ropes.tables[rope]);
        self.kv.write(gpu, rows, rope, &s.qkv, &mut s.q)?;
        let scores = Scores { scale: scales.attention, cap: pass.config.attention_cap, window: config.window };
        self.kv.attend(gpu, rows, scores, &s.q, &mut s.partials, &mut s.attended)?;
        match &self.after_attention {
            None => self.output.apply(gpu, &s.attended, &mut s.x, count, Onto::Added(scales.residual))?,
            Some(norm) => {
                self.output.apply(gpu, &s.attended, &mut s.y, count, Onto::Over)?;
                norm.add(gpu, &s.y, &mut s.x, count, scales.residual)?;
            }
        }
        normed(gpu, &self.before_mlp, dims, s, count)?;
        let gate = match pass.config.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        let (to, onto) = match &self.after_mlp {
            None => (&mut s.x, Onto::Added(scales.residual)),
            Some(_) => (&mut s.y, Onto::Over),
        };
        match (&self.mlp, &mut s.picks) {
            (MlpLayer::Gated(mlp), _) => {
                mlp.gate_up.apply(gpu, &s.normed, &mut s.gates, count, Onto::Over)?;
                gpu.gate_mul(gate, &s.gates, &mut s.gated, count, mlp.width)?;
                mlp.down.apply(gpu, &s.gated, to, count, onto)?;
            }
            (MlpLayer::Experts(moe), Some(picks)) => {
                moe.router.apply(gpu, &s.normed, &mut s.scores, count, Onto::Over)?;
                picks.set(gpu, &s.scores, moe.normalised, count)?;
                moe.gate_up.apply(gpu, &s.normed, Shared::ByPicks, picks, &mut s.gates, count)?;
                gpu.gate_mul(gate, &s.gates, &mut s.gated, count * picks.picked(), moe.width)?;
                moe.down.apply(gpu, &s.gated, Shared::Not, picks, &mut s.mixed, count)?;
                picks.sum(gpu, &s.mixed, to, count, dims.hidden.to, onto)?;
            }
            (MlpLayer::Experts(_), None) => unreachable!("a model with experts has room for its picks"),
        }
        match &self.after_mlp {
            None => Ok(()),
            Some(norm) => norm.add(gpu, &s.y, &mut s.x, count, scales.residual),
        }
    }
}

/// The residual stream as a layer's part takes it: normed where the model does that, and rounded.
fn normed(gpu: &Gpu, norm: &Option<Norm>, dims: &Dims, s: &mut Scratch, rows: usize) -> Result<(), Error> {
    match norm {
        Some(norm) => norm.apply(gpu, &s.x, &mut s.normed, rows),
        None => gpu.round(&s.x, &mut s.normed, rows * dims.hidden.to),
    }
}
