//! The MLP of a layer: one gated MLP, or experts of which a router picks some for each row.

use rbee_kernels::compute::{GateMul, Linear};
use rbee_kernels::ops;

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

/// Rows between the parts of an MLP; kept between steps.
#[derive(Default)]
pub(crate) struct MlpScratch {
    gates: Vec<f32>,
    gated: Vec<f32>,
    /// Rows that go to one expert, and what it makes of them.
    visitors: Vec<f32>,
    mixed: Vec<f32>,
    scores: Vec<f32>,
}

impl MlpLayer {
    /// `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn rows(&self, x: &[f32], out: &mut [f32], scratch: &mut MlpScratch) {
        match self {
            Self::Gated(gated) => gated.rows(x, out, &mut scratch.gates, &mut scratch.gated),
            Self::Experts(experts) => experts.rows(x, out, scratch),
        }
    }

    /// Bytes of its weights.
    pub(crate) fn held(&self) -> u64 {
        match self {
            Self::Gated(gated) => gated.held(),
            Self::Experts(experts) => experts.router.held() + experts.experts.iter().map(Gated::held).sum::<u64>(),
        }
    }
}

impl Gated {
    fn held(&self) -> u64 {
        self.gate_up.held() + self.down.held()
    }

    fn rows(&self, x: &[f32], out: &mut [f32], gates: &mut Vec<f32>, gated: &mut Vec<f32>) {
        let (hidden, width) = (self.gate_up.weights.k(), self.gate_up.weights.n());
        let rows = x.len() / hidden;
        // What is in there from earlier steps is written before it is read.
        gates.resize(rows * width, 0.0);
        self.gate_up.rows(x, gates);
        gated.resize(rows * width / 2, 0.0);
        self.act.rows(gates, width / 2, gated);
        self.down.rows(gated, out);
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

    fn rows(&self, x: &[f32], out: &mut [f32], scratch: &mut MlpScratch) {
        let hidden = self.router.weights.k();
        let MlpScratch { gates, gated, visitors, mixed, scores } = scratch;
        scores.resize(x.len() / hidden * self.experts.len(), 0.0);
        self.router.rows(x, scores);
        let mut visits: Vec<Vec<(usize, f32)>> = vec![Vec::new(); self.experts.len()];
        for (row, scores) in scores.chunks_exact(self.experts.len()).enumerate() {
            for (expert, weight) in self.pick(scores) {
                visits[expert].push((row, weight));
            }
        }
        out.fill(0.0);
        // Expert by expert, so that a row's sum is in their order whichever rows are beside it.
        for (expert, visits) in self.experts.iter().zip(&visits).filter(|(_, visits)| !visits.is_empty()) {
            visitors.clear();
            for (row, _) in visits {
                visitors.extend_from_slice(&x[row * hidden..][..hidden]);
            }
            mixed.resize(visitors.len(), 0.0);
            expert.rows(visitors, mixed, gates, gated);
            for ((row, weight), mixed) in visits.iter().zip(mixed.chunks_exact(hidden)) {
                ops::add(self.router.compute.isa(), &mut out[row * hidden..][..hidden], mixed, *weight);
            }
        }
    }
}
