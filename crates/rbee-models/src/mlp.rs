//! The MLP of a layer: one gated MLP, or experts of which a router picks some for each row.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rbee_kernels::candle::{GateMul, Linear, values};
use rbee_kernels::ops;

use crate::decoder::held;

/// A layer's MLP.
pub(crate) enum MlpLayer {
    Gated(Gated),
    Experts(Experts),
}

/// `down(act(gate(x)) * up(x))` (Shazeer 2020).
pub(crate) struct Gated {
    /// gate and up below each other.
    pub(crate) gate_up: Linear,
    pub(crate) act: GateMul,
    pub(crate) down: Linear,
}

/// Experts behind a router (Shazeer et al. 2017).
pub(crate) struct Experts {
    pub(crate) router: Linear,
    pub(crate) experts: Vec<Gated>,
    /// How many are picked for a row.
    pub(crate) picked: usize,
    /// Whether their weights are scaled to a sum of one.
    pub(crate) normalised: bool,
}

impl MlpLayer {
    /// `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gated(gated) => gated.down.forward(&gated.act.forward(&gated.gate_up.forward(x)?)?),
            Self::Experts(experts) => x.apply_op1_no_bwd(experts),
        }
    }

    /// Bytes of its weights.
    pub(crate) fn held(&self) -> u64 {
        match self {
            Self::Gated(gated) => gated.held(),
            Self::Experts(experts) => held(&experts.router) + experts.experts.iter().map(Gated::held).sum::<u64>(),
        }
    }
}

impl Gated {
    fn held(&self) -> u64 {
        held(&self.gate_up) + held(&self.down)
    }

    /// The same on plain rows.
    fn rows(&self, x: &[f32], out: &mut [f32]) {
        let (hidden, width) = (self.gate_up.weights.k(), self.gate_up.weights.n());
        let rows = x.len() / hidden;
        let mut gates = vec![0.0; rows * width];
        self.gate_up.rows(x, &mut gates);
        let mut gated = vec![0.0; rows * width / 2];
        ops::gate_mul(self.act.isa, self.act.gate, &gates, width / 2, &mut gated);
        self.down.rows(&gated, out);
    }
}

impl Experts {
    /// The experts of one row and their weights, in order of the experts. Of equal scores the lower expert's wins.
    fn pick(&self, scores: &[f32]) -> Vec<(usize, f32)> {
        let high = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|score| (score - high).exp()).collect();
        let total: f32 = weights.iter().sum();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        order.truncate(self.picked);
        order.sort_unstable();
        let total = if self.normalised { order.iter().map(|expert| weights[*expert]).sum() } else { total };
        order.into_iter().map(|expert| (expert, weights[expert] / total)).collect()
    }
}

impl CustomOp1 for Experts {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let (rows, hidden) = layout.shape().dims2()?;
        let mut scores = vec![0.0; rows * self.experts.len()];
        self.router.rows(x, &mut scores);
        let mut visits: Vec<Vec<(usize, f32)>> = vec![Vec::new(); self.experts.len()];
        for (row, scores) in scores.chunks_exact(self.experts.len()).enumerate() {
            for (expert, weight) in self.pick(scores) {
                visits[expert].push((row, weight));
            }
        }
        let mut out = vec![0.0; rows * hidden];
        // Expert by expert, so that a row's sum is in their order whichever rows are beside it.
        for (expert, visits) in self.experts.iter().zip(&visits).filter(|(_, visits)| !visits.is_empty()) {
            let mut gathered = Vec::with_capacity(visits.len() * hidden);
            for (row, _) in visits {
                gathered.extend_from_slice(&x[row * hidden..][..hidden]);
            }
            let mut mixed = vec![0.0; gathered.len()];
            expert.rows(&gathered, &mut mixed);
            for ((row, weight), mixed) in visits.iter().zip(mixed.chunks_exact(hidden)) {
                for (out, mixed) in out[row * hidden..][..hidden].iter_mut().zip(mixed) {
                    *out += mixed * weight;
                }
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((rows, hidden))))
    }
}
