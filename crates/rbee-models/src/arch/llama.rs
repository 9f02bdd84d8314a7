//! Llama 2, 3 and 3.x (`LlamaForCausalLM` of transformers): pre-norm, grouped queries, gated MLP, optional biases, head
//! tied to the embedding or its own.
//!
//! Shapes, `[outputs, inputs]`: q `[heads * head_dim, hidden]`, k and v `[kv_heads * head_dim, hidden]`, o `[hidden,
//! heads * head_dim]`, gate and up `[intermediate, hidden]`, down `[hidden, intermediate]`.

use rbee_weights::config::ModelConfig;

use super::{LayerPlan, Matrix, Plan};

/// Where the parts of the decoder stand in the files.
pub(super) fn plan(config: &ModelConfig) -> Plan {
    let ModelConfig { hidden, heads, kv_heads, head_dim, intermediate, .. } = *config;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let layer = |i: usize| {
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        let matrix = |parts: &[(&str, usize)], inputs: usize, biased: bool| Matrix {
            parts: parts.iter().map(|(part, outputs)| (name(part), *outputs)).collect(),
            inputs,
            biased,
        };
        let (attention, mlp) = (config.attention_bias, config.mlp_bias);
        LayerPlan {
            attention_norm: name("input_layernorm"),
            qkv: matrix(
                &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                hidden,
                attention,
            ),
            output: matrix(&[("self_attn.o_proj", hidden)], q, attention),
            mlp_norm: name("post_attention_layernorm"),
            gate_up: matrix(&[("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)], hidden, mlp),
            down: matrix(&[("mlp.down_proj", hidden)], intermediate, mlp),
        }
    };
    let vocabulary =
        |name: &str| Matrix { parts: vec![(name.to_owned(), config.vocab)], inputs: hidden, biased: false };
    Plan {
        embedding: vocabulary("model.embed_tokens.weight"),
        layers: (0..config.layers).map(layer).collect(),
        norm: "model.norm.weight".into(),
        head: (!config.tied).then(|| vocabulary("lm_head.weight")),
    }
}

/// Whether a tensor that the plan does not name may be left unread: a tied head that is stored all the same, and the
/// rope frequencies that old exports have.
pub(super) fn is_spare(config: &ModelConfig, name: &str) -> bool {
    (config.tied && name == "lm_head.weight") || name.ends_with(".rotary_emb.inv_freq")
}
