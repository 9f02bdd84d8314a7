//! Where the tensors that a plan names lie.

use rbee_weights::config::ModelConfig;
use rbee_weights::gguf::{Architecture, Source};

fn source(arch: Architecture, name: &str) -> Option<String> {
    arch.source(name).map(|Source { name, expert }| match expert {
        None => name,
        Some(expert) => format!("{name}[{expert}]"),
    })
}

fn check(archs: &[Architecture], names: &str) {
    for arch in archs {
        for line in names.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (name, want) = line.split_once(" -> ").unwrap();
            assert_eq!(source(*arch, name).unwrap_or("none".into()), want, "{name} of {arch:?}");
        }
    }
}

#[test]
fn every_name_of_a_plan_has_its_tensor() {
    use Architecture::{Gemma2, Gemma3, Granite, Llama, Olmo2, Phi3, Qwen2, Qwen3, Qwen3Moe, SmolLm3};
    check(
        &Architecture::ALL,
        "
        model.embed_tokens.weight -> token_embd.weight
        model.norm.weight -> output_norm.weight
        lm_head.weight -> output.weight
        model.layers.0.self_attn.o_proj.weight -> blk.0.attn_output.weight
        model.layers.12.mlp.down_proj.weight -> blk.12.ffn_down.weight
        model.layers.3.self_attn.q_proj.weight_scale -> none
        model.layers.3.self_attn.rotary_emb.inv_freq -> none
        model.layers.03.self_attn.q_proj.weight -> none
        model.layers.-1.self_attn.q_proj.weight -> none
        model.layers.self_attn.q_proj.weight -> none
        model.layers.3.mlp.experts.x.up_proj.weight -> none
        model.layers.3.mlp.experts.1.weight -> none
        model.vision.weight -> none
        ",
    );
    let unfused = [Llama, Qwen2, Qwen3, Qwen3Moe, Gemma2, Gemma3, SmolLm3, Olmo2, Granite];
    check(
        &unfused,
        "
        model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight
        model.layers.3.self_attn.k_proj.weight -> blk.3.attn_k.weight
        model.layers.3.self_attn.v_proj.weight -> blk.3.attn_v.weight
        model.layers.3.self_attn.v_proj.bias -> blk.3.attn_v.bias
        model.layers.3.self_attn.o_proj.bias -> blk.3.attn_output.bias
        model.layers.3.mlp.gate_proj.weight -> blk.3.ffn_gate.weight
        model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight
        model.layers.3.mlp.up_proj.bias -> blk.3.ffn_up.bias
        ",
    );
    check(
        &[Llama, Qwen2, Qwen3, Qwen3Moe, Phi3, SmolLm3, Granite],
        "
        model.layers.3.input_layernorm.weight -> blk.3.attn_norm.weight
        model.layers.3.post_attention_layernorm.weight -> blk.3.ffn_norm.weight
        ",
    );
    check(
        &[Gemma2, Gemma3, Olmo2],
        "
        model.layers.3.post_attention_layernorm.weight -> blk.3.post_attention_norm.weight
        model.layers.3.post_feedforward_layernorm.weight -> blk.3.post_ffw_norm.weight
        ",
    );
    check(
        &[Gemma2, Gemma3],
        "
        model.layers.3.input_layernorm.weight -> blk.3.attn_norm.weight
        model.layers.3.pre_feedforward_layernorm.weight -> blk.3.ffn_norm.weight
        ",
    );
    check(
        &[Qwen3, Qwen3Moe, Gemma3, Olmo2],
        "
        model.layers.3.self_attn.q_norm.weight -> blk.3.attn_q_norm.weight
        model.layers.3.self_attn.k_norm.weight -> blk.3.attn_k_norm.weight
        ",
    );
    check(
        &[Phi3],
        "
        model.layers.3.self_attn.qkv_proj.weight -> blk.3.attn_qkv.weight
        model.layers.3.mlp.gate_up_proj.weight -> blk.3.ffn_up.weight
        ",
    );
    check(
        &[Qwen3Moe],
        "
        model.layers.3.mlp.gate.weight -> blk.3.ffn_gate_inp.weight
        model.layers.3.mlp.experts.0.gate_proj.weight -> blk.3.ffn_gate_exps.weight[0]
        model.layers.3.mlp.experts.17.up_proj.weight -> blk.3.ffn_up_exps.weight[17]
        model.layers.3.mlp.experts.127.down_proj.weight -> blk.3.ffn_down_exps.weight[127]
        ",
    );
    check(
        &[Llama],
        "
        model.layers.3.block_sparse_moe.gate.weight -> blk.3.ffn_gate_inp.weight
        model.layers.3.block_sparse_moe.experts.7.w1.weight -> blk.3.ffn_gate_exps.weight[7]
        model.layers.3.block_sparse_moe.experts.7.w3.weight -> blk.3.ffn_up_exps.weight[7]
        model.layers.3.block_sparse_moe.experts.7.w2.weight -> blk.3.ffn_down_exps.weight[7]
        ",
    );
}

#[test]
fn rows_are_in_another_order_where_the_converter_put_them_so() {
    let config = ModelConfig::parse(
        br#"{"model_type":"llama","vocab_size":100,"hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2}"#,
    )
    .unwrap();
    for arch in Architecture::ALL {
        let heads = |part: &str| arch.permuted_heads(&config, &format!("model.layers.1.self_attn.{part}"));
        let permuted = matches!(arch, Architecture::Llama | Architecture::SmolLm3 | Architecture::Granite);
        assert_eq!(heads("q_proj.weight"), permuted.then_some(4));
        assert_eq!(heads("q_proj.bias"), permuted.then_some(4));
        assert_eq!(heads("k_proj.weight"), permuted.then_some(2));
        assert_eq!(heads("v_proj.weight").or(heads("o_proj.weight")).or(heads("q_norm.weight")), None);
        assert_eq!(arch.norms_hold_one(), matches!(arch, Architecture::Gemma2 | Architecture::Gemma3));
    }
    assert!(Architecture::is_spare("rope_freqs.weight") && !Architecture::is_spare("output.weight"));
}
