//! Checked bytes into matrices on the GPU, and what a model needs there.
//!
//! The kernels take inputs in steps of 32 and heads of certain widths. What a model has less of is padded with zeros, which
//! change no sum: a row of the residual stream, each head, each half of an MLP.

use half::bf16;
use rbee_cuda::{Buffer, Experts, Gpu, Heads, Kv, Linear, Norm, QkNorm, STEP, WIDTHS};
use rbee_kernels::WeightType;
use rbee_kernels::packed::widen;
use rbee_weights::config::{LayerConfig, Mlp, ModelConfig};

use super::decoder::{GatedLayer, GpuDecoder, GpuLayer, MlpLayer, MoeLayer};
use crate::arch::{GatedPlan, LayerPlan, Matrix, MlpPlan, NormPlan};
use crate::error::Error;
use crate::loader::Opened;

/// Most query heads that share a KV head in the kernels.
const GROUP: usize = 16;

/// Units of so many values, each padded to `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pad {
    pub(crate) unit: usize,
    pub(crate) to: usize,
}

impl Pad {
    /// Whole steps of inputs.
    fn steps(unit: usize) -> Self {
        Self { unit, to: unit.next_multiple_of(STEP) }
    }

    /// Where value `i` stands.
    fn at(self, i: usize) -> usize {
        i / self.unit * self.to + i % self.unit
    }

    /// How many values `n` become.
    fn len(self, n: usize) -> usize {
        n / self.unit * self.to
    }

    /// Nothing is padded.
    fn is_none(self) -> bool {
        self.unit == self.to
    }
}

/// The sizes of a model on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    pub(crate) hidden: Pad,
    pub(crate) head: Pad,
    pub(crate) heads: Heads,
}

impl Dims {
    /// # Errors
    /// When there are no kernels for such heads.
    pub(crate) fn of(config: &ModelConfig) -> Result<Self, Error> {
        let ModelConfig { hidden, heads, kv_heads, head_dim, .. } = *config;
        let width = WIDTHS.into_iter().find(|width| *width >= head_dim);
        match width {
            Some(to) if heads / kv_heads <= GROUP => Ok(Self {
                hidden: Pad::steps(hidden),
                head: Pad { unit: head_dim, to },
                heads: Heads { queries: heads, kv: kv_heads, dim: to },
            }),
            _ => Err(Error::Option(format!(
                "{heads} heads {head_dim} wide that share {kv_heads} KV heads are beyond the GPU's kernels: heads up to {} wide, up to {GROUP} of which share one",
                WIDTHS[WIDTHS.len() - 1]
            ))),
        }
    }

    /// Values of q, k and v of a row.
    pub(crate) fn qkv(&self) -> usize {
        (self.heads.queries + 2 * self.heads.kv) * self.heads.dim
    }

    /// Values of the queries of a row.
    pub(crate) fn queries(&self) -> usize {
        self.heads.queries * self.heads.dim
    }

    /// Bytes of the KV of one token.
    pub(crate) fn kv_per_token(&self, layers: usize) -> u64 {
        (layers * 2 * self.heads.kv * self.heads.dim * size_of::<bf16>()) as u64
    }
}

/// How the gates of an MLP are padded.
fn width(mlp: Mlp) -> Pad {
    let (Mlp::Gated(width) | Mlp::Experts { width, .. }) = mlp;
    Pad::steps(width)
}

/// A matrix and how it is padded.
struct Padded<'a> {
    matrix: &'a Matrix,
    rows: Pad,
    columns: Pad,
}

impl Padded<'_> {
    fn len(&self) -> usize {
        self.rows.len(self.matrix.outputs()) * self.columns.len(self.matrix.inputs)
    }

    /// Bytes of it and its biases.
    fn bytes(&self) -> u64 {
        let biases = if self.matrix.biased { self.rows.len(self.matrix.outputs()) * size_of::<f32>() } else { 0 };
        (self.len() * size_of::<bf16>() + biases) as u64
    }
}

const NOT: Pad = Pad { unit: 1, to: 1 };

impl LayerPlan {
    /// q, k and v, and the output.
    fn attention(&self, dims: &Dims) -> [Padded<'_>; 2] {
        [
            Padded { matrix: &self.qkv, rows: dims.head, columns: dims.hidden },
            Padded { matrix: &self.output, rows: dims.hidden, columns: dims.head },
        ]
    }
}

impl GatedPlan {
    /// Gates and ups, and down.
    fn padded(&self, dims: &Dims, width: Pad) -> [Padded<'_>; 2] {
        [
            Padded { matrix: &self.gate_up, rows: width, columns: dims.hidden },
            Padded { matrix: &self.down, rows: dims.hidden, columns: width },
        ]
    }
}

impl Opened {
    /// Bytes of all weights on the GPU.
    pub(crate) fn gpu_weights(&self, dims: &Dims) -> u64 {
        let mut bytes = 0;
        for (plan, LayerConfig { mlp, .. }) in self.plan.layers.iter().zip(&self.config.layers) {
            let width = width(*mlp);
            let (router, gated) = match &plan.mlp {
                MlpPlan::Gated(gated) => (None, std::slice::from_ref(gated)),
                MlpPlan::Experts { router, experts } => (Some(router), &experts[..]),
            };
            let router = router.map(|matrix| Padded { matrix, rows: NOT, columns: dims.hidden });
            let gated = gated.iter().flat_map(|gated| gated.padded(dims, width));
            bytes +=
                plan.attention(dims).into_iter().chain(router).chain(gated).map(|padded| padded.bytes()).sum::<u64>();
            let around = [&plan.before_attention, &plan.after_attention, &plan.before_mlp, &plan.after_mlp];
            bytes += (around.into_iter().flatten().count() * dims.hidden.to * size_of::<f32>()) as u64;
            let qk = plan.qk_norms.iter().flatten().map(|norm| dims.head.len(norm.len) * size_of::<f32>());
            bytes += qk.sum::<usize>() as u64;
        }
        let vocabulary = [Some(&self.plan.embedding), self.plan.head.as_ref()].into_iter().flatten();
        bytes += vocabulary.map(|matrix| Padded { matrix, rows: NOT, columns: dims.hidden }.bytes()).sum::<u64>();
        bytes + (dims.hidden.to * size_of::<f32>()) as u64
    }

    /// Whether all matrices are stored in bf16.
    pub(crate) fn is_bf16(&self) -> bool {
        let mut parts = self.plan.matrices().flat_map(|matrix| &matrix.parts);
        parts.all(|(name, _)| self.tensor(name).0 == WeightType::Bf16)
    }

    /// Writes a matrix to a place of a buffer.
    fn copy_matrix(&self, gpu: &Gpu, padded: &Padded<'_>, buffer: &mut Buffer<bf16>, at: usize) -> Result<(), Error> {
        let Padded { matrix, rows, columns } = padded;
        let (inputs, width) = (matrix.inputs, columns.len(matrix.inputs));
        let mut first = 0;
        for (name, outputs) in &matrix.parts {
            let (kind, bytes) = self.tensor(name);
            if rows.is_none() && columns.is_none() && kind == WeightType::Bf16 {
                gpu.write_bytes(buffer, at + first * width, &bytes)?;
            } else {
                let mut part = vec![bf16::ZERO; rows.len(*outputs) * width];
                for (row, bytes) in bytes.chunks_exact(kind.row(inputs)).enumerate() {
                    let to = &mut part[rows.at(row) * width..][..width];
                    for (i, value) in widen(kind, bytes).map_err(|_| self.not_finite(name))?.into_iter().enumerate() {
                        to[columns.at(i)] = bf16::from_f32(value);
                    }
                }
                gpu.write(buffer, at + first * width, &part)?;
            }
            first += rows.len(*outputs);
        }
        Ok(())
    }

    fn gpu_linear(&self, gpu: &Gpu, padded: &Padded<'_>) -> Result<Linear, Error> {
        let mut weights = gpu.zeroed(padded.len())?;
        self.copy_matrix(gpu, padded, &mut weights, 0)?;
        let bias = match self.bias(padded.matrix)? {
            None => None,
            Some(bias) => {
                let mut all = vec![0.0; padded.rows.len(bias.len())];
                for (i, bias) in bias.into_iter().enumerate() {
                    all[padded.rows.at(i)] = bias;
                }
                Some(gpu.upload(&all)?)
            }
        };
        if !gpu.is_finite(&weights)? {
            return Err(self.not_finite(&padded.matrix.parts[0].0));
        }
        Ok(Linear::new(gpu, weights, bias, padded.columns.len(padded.matrix.inputs))?)
    }

    fn gpu_experts(&self, gpu: &Gpu, all: &[Padded<'_>]) -> Result<Experts, Error> {
        let mut weights = gpu.zeroed(all.iter().map(Padded::len).sum())?;
        let mut at = 0;
        for padded in all {
            self.copy_matrix(gpu, padded, &mut weights, at)?;
            at += padded.len();
        }
        if !gpu.is_finite(&weights)? {
            return Err(self.not_finite(&all[0].matrix.parts[0].0));
        }
        Ok(Experts::new(gpu, weights, all.len(), all[0].columns.len(all[0].matrix.inputs))?)
    }

    fn gpu_norm(&self, gpu: &Gpu, plan: &NormPlan, pad: Pad) -> Result<Norm, Error> {
        let weights = self.norm_weights(plan)?;
        let mut all = vec![0.0; pad.len(weights.len())];
        let real = weights.len();
        for (i, weight) in weights.into_iter().enumerate() {
            all[pad.at(i)] = weight;
        }
        Ok(Norm::new(gpu.upload(&all)?, real, self.config.norms.eps)?)
    }

    fn gpu_layer(
        &self,
        gpu: &Gpu,
        dims: &Dims,
        plan: &LayerPlan,
        config: &LayerConfig,
        blocks: usize,
    ) -> Result<GpuLayer, Error> {
        let norm =
            |plan: &Option<NormPlan>| plan.as_ref().map(|plan| self.gpu_norm(gpu, plan, dims.hidden)).transpose();
        let [qkv, output] = plan.attention(dims);
        let width = width(config.mlp);
        let mlp = match (&plan.mlp, config.mlp) {
            (MlpPlan::Gated(gated), _) => {
                let [gate_up, down] = gated.padded(dims, width);
                MlpLayer::Gated(GatedLayer {
                    gate_up: self.gpu_linear(gpu, &gate_up)?,
                    down: self.gpu_linear(gpu, &down)?,
                    width: width.to,
                })
            }
            (MlpPlan::Experts { router, experts }, Mlp::Experts { normalised, .. }) => {
                let padded = experts.iter().map(|expert| <(_, _)>::from(expert.padded(dims, width)));
                let (gate_up, down): (Vec<_>, Vec<_>) = padded.unzip();
                MlpLayer::Experts(MoeLayer {
                    router: self.gpu_linear(gpu, &Padded { matrix: router, rows: NOT, columns: dims.hidden })?,
                    gate_up: self.gpu_experts(gpu, &gate_up)?,
                    down: self.gpu_experts(gpu, &down)?,
                    width: width.to,
                    normalised,
                })
            }
            (MlpPlan::Experts { .. }, Mlp::Gated(_)) => unreachable!("the plan was made from this config"),
        };
        Ok(GpuLayer {
            before_attention: norm(&plan.before_attention)?,
            after_attention: norm(&plan.after_attention)?,
            before_mlp: norm(&plan.before_mlp)?,
            after_mlp: norm(&plan.after_mlp)?,
            qkv: self.gpu_linear(gpu, &qkv)?,
            qk_norm: match &plan.qk_norms {
                Some([q, k]) => {
                    Some(QkNorm { q: self.gpu_norm(gpu, q, dims.head)?, k: self.gpu_norm(gpu, k, dims.head)? })
                }
                None => None,
            },
            kv: Kv::new(gpu, dims.heads, blocks)?,
            output: self.gpu_linear(gpu, &output)?,
            mlp,
        })
    }

    /// All weights on the GPU, and room for so many blocks of KV. `each` is told the bytes done after each layer.
    pub(crate) fn gpu_decoder(
        &self,
        gpu: &Gpu,
        dims: &Dims,
        blocks: usize,
        each: &dyn Fn(u64, u64),
    ) -> Result<GpuDecoder, Error> {
        let (total, count) = (self.bytes(), self.plan.layers.len());
        let mut layers = Vec::with_capacity(count);
        for (i, (plan, config)) in self.plan.layers.iter().zip(&self.config.layers).enumerate() {
            layers.push(self.gpu_layer(gpu, dims, plan, config, blocks)?);
            each(total * (i as u64 + 1) / (count as u64 + 1), total);
        }
        let vocabulary = |matrix| self.gpu_linear(gpu, &Padded { matrix, rows: NOT, columns: dims.hidden });
        let decoder = GpuDecoder {
            embedding: vocabulary(&self.plan.embedding)?,
            layers,
            norm: self.gpu_norm(gpu, &self.plan.norm, dims.hidden)?,
            head: self.plan.head.as_ref().map(vocabulary).transpose()?,
        };
        each(total, total);
        Ok(decoder)
    }
}
