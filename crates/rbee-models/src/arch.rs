//! Architectures as data: which tensors of the files make up which part of the decoder.
//!
//! A plan names every tensor that a model uses, so files are checked against it before any weight is read: a tensor that
//! is missing, of another shape, or there without a use means that the config and the weights are not of one model.
//!
//! Names are those of transformers. Shapes are `[outputs, inputs]`: q `[heads * head_dim, hidden]`, k and v `[kv_heads *
//! head_dim, hidden]`, o `[hidden, heads * head_dim]`, gate and up `[width, hidden]`, down `[hidden, width]`.

use rbee_weights::config::{Family, LayerConfig, Mlp, ModelConfig, NormPlace, QkNorm};

/// A matrix, stored as one tensor or as several below each other.
pub(crate) struct Matrix {
    /// Name and outputs of each tensor.
    pub(crate) parts: Vec<(String, usize)>,
    /// Inputs.
    pub(crate) inputs: usize,
    /// Whether each has a bias beside it.
    pub(crate) biased: bool,
    pub(crate) role: Role,
}

/// What a matrix is for, where that decides how many bits it is kept with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Has a row for each token, and is not multiplied.
    Embedding,
    /// Makes the logits; the embedding's rows too, if that is the same.
    Head,
    /// Picks experts.
    Router,
    /// All others.
    Inner,
}

impl Matrix {
    /// Outputs of all parts.
    #[cfg(feature = "cuda")]
    pub(crate) fn outputs(&self) -> usize {
        self.parts.iter().map(|(_, outputs)| outputs).sum()
    }

    /// Name and length of each part's bias.
    pub(crate) fn biases(&self) -> impl Iterator<Item = (String, usize)> {
        let parts = self.parts.iter().filter(|_| self.biased);
        parts.map(|(name, outputs)| (format!("{}.bias", name.trim_end_matches(".weight")), *outputs))
    }
}

/// A norm's weights: name and length.
pub(crate) struct NormPlan {
    pub(crate) name: String,
    pub(crate) len: usize,
}

/// A decoder's tensors.
pub(crate) struct Plan {
    pub(crate) embedding: Matrix,
    pub(crate) layers: Vec<LayerPlan>,
    pub(crate) norm: NormPlan,
    /// `None` when it is the embedding.
    pub(crate) head: Option<Matrix>,
}

/// One layer's tensors.
pub(crate) struct LayerPlan {
    pub(crate) before_attention: Option<NormPlan>,
    pub(crate) after_attention: Option<NormPlan>,
    pub(crate) before_mlp: Option<NormPlan>,
    pub(crate) after_mlp: Option<NormPlan>,
    pub(crate) qkv: Matrix,
    /// Of queries, and of keys.
    pub(crate) qk_norms: Option<[NormPlan; 2]>,
    pub(crate) output: Matrix,
    pub(crate) mlp: MlpPlan,
}

/// A layer's MLP.
pub(crate) enum MlpPlan {
    Gated(GatedPlan),
    Experts { router: Matrix, experts: Vec<GatedPlan> },
}

/// A gated MLP's tensors.
pub(crate) struct GatedPlan {
    pub(crate) gate_up: Matrix,
    pub(crate) down: Matrix,
}

impl Plan {
    /// The plan of a config's architecture.
    pub(crate) fn of(config: &ModelConfig) -> Self {
        let vocabulary = |name: &str, role| Matrix {
            parts: vec![(name.to_owned(), config.vocab)],
            inputs: config.hidden,
            biased: false,
            role,
        };
        Self {
            embedding: vocabulary("model.embed_tokens.weight", if config.tied { Role::Head } else { Role::Embedding }),
            layers: config.layers.iter().enumerate().map(|(i, layer)| LayerPlan::of(config, i, layer)).collect(),
            norm: NormPlan { name: "model.norm.weight".into(), len: config.hidden },
            head: (!config.tied).then(|| vocabulary("lm_head.weight", Role::Head)),
        }
    }

    /// All matrices.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.layers.iter().flat_map(LayerPlan::matrices).chain([&self.embedding]).chain(&self.head)
    }

    /// Values of all norms and biases, which are kept in f32.
    pub(crate) fn vectors(&self) -> usize {
        let norms = self.layers.iter().flat_map(LayerPlan::norms).chain([&self.norm]).map(|norm| norm.len);
        let biases = self.matrices().flat_map(|matrix| matrix.biases().map(|(_, len)| len));
        norms.chain(biases).sum()
    }

    /// Name and shape of every tensor.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let norms = self.layers.iter().flat_map(LayerPlan::norms).chain([&self.norm]);
        let mut all: Vec<_> = norms.map(|norm| (norm.name.clone(), vec![norm.len])).collect();
        for matrix in self.matrices() {
            all.extend(matrix.parts.iter().map(|(name, outputs)| (name.clone(), vec![*outputs, matrix.inputs])));
            all.extend(matrix.biases().map(|(name, len)| (name, vec![len])));
        }
        all
    }
}

impl LayerPlan {
    fn of(config: &ModelConfig, i: usize, layer: &LayerConfig) -> Self {
        let ModelConfig { hidden, heads, kv_heads, head_dim, biases, .. } = *config;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        let matrix = |parts: &[(&str, usize)], inputs: usize, biased: bool| Matrix {
            parts: parts.iter().map(|(part, outputs)| (name(part), *outputs)).collect(),
            inputs,
            biased,
            role: Role::Inner,
        };
        let norm = |part: &str, len: usize| NormPlan { name: name(part), len };
        let own = |part: &str| Some(norm(part, hidden));
        let (before_attention, after_attention, before_mlp, after_mlp) = match config.norms.place {
            NormPlace::Before => (own("input_layernorm"), None, own("post_attention_layernorm"), None),
            NormPlace::After => (None, own("post_attention_layernorm"), None, own("post_feedforward_layernorm")),
            NormPlace::Around => (
                own("input_layernorm"),
                own("post_attention_layernorm"),
                own("pre_feedforward_layernorm"),
                own("post_feedforward_layernorm"),
            ),
        };
        let fused = config.family == Family::Phi3;
        let qkv: &[(&str, usize)] = if fused {
            &[("self_attn.qkv_proj", q + 2 * kv)]
        } else {
            &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]
        };
        let qk_norms = match config.norms.qk {
            QkNorm::None => None,
            QkNorm::Head => Some([norm("self_attn.q_norm", head_dim), norm("self_attn.k_norm", head_dim)]),
            QkNorm::Whole => Some([norm("self_attn.q_norm", q), norm("self_attn.k_norm", kv)]),
        };
        let mlp = match layer.mlp {
            Mlp::Gated(width) => {
                let gate_up: &[(&str, usize)] = if fused {
                    &[("mlp.gate_up_proj", 2 * width)]
                } else {
                    &[("mlp.gate_proj", width), ("mlp.up_proj", width)]
                };
                MlpPlan::Gated(GatedPlan {
                    gate_up: matrix(gate_up, hidden, biases.mlp),
                    down: matrix(&[("mlp.down_proj", hidden)], width, biases.mlp),
                })
            }
            Mlp::Experts { count, width, .. } => {
                let (block, names) = match config.family {
                    Family::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
                    _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
                };
                let expert = |e: usize| {
                    let [gate, up, down] = names.map(|part| format!("{block}.experts.{e}.{part}"));
                    GatedPlan {
                        gate_up: matrix(&[(&gate, width), (&up, width)], hidden, false),
                        down: matrix(&[(&down, hidden)], width, false),
                    }
                };
                MlpPlan::Experts {
                    router: Matrix {
                        role: Role::Router,
                        ..matrix(&[(&format!("{block}.gate"), count)], hidden, false)
                    },
                    experts: (0..count).map(expert).collect(),
                }
            }
        };
        Self {
            before_attention,
            after_attention,
            before_mlp,
            after_mlp,
            qkv: matrix(qkv, hidden, biases.qkv),
            qk_norms,
            output: matrix(&[("self_attn.o_proj", hidden)], q, biases.output),
            mlp,
        }
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let (router, gated) = match &self.mlp {
            MlpPlan::Gated(gated) => (None, std::slice::from_ref(gated)),
            MlpPlan::Experts { router, experts } => (Some(router), &experts[..]),
        };
        let gated = gated.iter().flat_map(|gated| [&gated.gate_up, &gated.down]);
        [&self.qkv, &self.output].into_iter().chain(router).chain(gated)
    }

    fn norms(&self) -> impl Iterator<Item = &NormPlan> {
        let around = [&self.before_attention, &self.after_attention, &self.before_mlp, &self.after_mlp];
        around.into_iter().flatten().chain(self.qk_norms.iter().flatten())
    }
}

/// Whether a tensor that no plan names may be left unread: a tied head that is stored all the same, and the rope
/// frequencies that old exports have.
pub(crate) fn is_spare(config: &ModelConfig, name: &str) -> bool {
    (config.tied && name == "lm_head.weight") || name.ends_with(".rotary_emb.inv_freq")
}
