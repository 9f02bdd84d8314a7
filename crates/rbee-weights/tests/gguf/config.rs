//! A model's metadata mean what its `config.json` means.

use proptest::prelude::*;
use rbee_weights::Error;
use rbee_weights::config::{ModelConfig, RopeScaling};
use rbee_weights::gguf::Gguf;
use rbee_weights::gguf::config::{config_json, model_config};

use rbee_testkit::gguf::{File, Tensor, Value};

/// Where files end whose tensors nobody reads.
const FILE_LEN: u64 = 1 << 50;

/// A value as it stands in a script: `1` is a u32, `1.0` an f32, `true` a switch, `[1 2]` an array of i32, all else a
/// text.
fn value(text: &str) -> Value {
    if let Some(items) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        let items: Vec<&str> = items.split_whitespace().collect();
        return match items.iter().map(|item| item.parse().ok()).collect() {
            Some(switches) => Value::Bools(switches),
            None => Value::I32s(items.iter().map(|item| item.parse().unwrap()).collect()),
        };
    }
    match (text.parse::<u32>(), text.parse::<f32>(), text.parse::<bool>()) {
        (Ok(number), ..) => Value::U32(number),
        (_, Ok(number), _) => Value::F32(number),
        (.., Ok(switch)) => Value::Bool(switch),
        _ => Value::from(text),
    }
}

/// A file of `key = value` lines, of tensors of f16 as `name: 1x2` in the file's order, and of tensors with values.
fn file(script: &str, tensors: &[(&str, Vec<f32>)]) -> File {
    let mut file = File::new();
    for (name, values) in tensors {
        file = file.f32(name, &[values.len() as u64], values);
    }
    let mut offset = (file.data.len() as u64).next_multiple_of(32);
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some((key, text)) = line.split_once(" = ") {
            // The last of two lines with one key holds.
            file.keys.retain(|(other, _)| other != key.as_bytes());
            file = file.key(key, value(text));
        } else {
            let (name, dims) = line.split_once(": ").unwrap();
            let dims: Vec<u64> = dims.split('x').map(|dim| dim.parse().unwrap()).collect();
            let len = 2 * dims.iter().product::<u64>();
            file.tensors.push(Tensor { name: name.into(), dims, kind: 1, offset });
            offset = (offset + len).next_multiple_of(32);
        }
    }
    file
}

fn config_of(file: &File) -> Result<ModelConfig, Error> {
    let bytes = file.bytes();
    model_config(&[Gguf::parse("f.gguf", &bytes, FILE_LEN).unwrap()])
}

fn check(script: &str, tensors: &[(&str, Vec<f32>)], config: &str) {
    let want = ModelConfig::parse(config.as_bytes()).unwrap();
    assert_eq!(want.unknown, [""; 0]);
    assert_eq!(config_of(&file(script, tensors)).unwrap(), want);
}

const LLAMA: &str = "
    general.architecture = llama
    general.type = model
    llama.block_count = 32
    llama.context_length = 131072
    llama.embedding_length = 4096
    llama.feed_forward_length = 14336
    llama.attention.head_count = 32
    llama.attention.head_count_kv = 8
    llama.rope.freq_base = 500000.0
    llama.attention.layer_norm_rms_epsilon = 0.00001
    llama.vocab_size = 128256
    llama.rope.dimension_count = 128
    tokenizer.ggml.eos_token_id = 128009
    token_embd.weight: 4096x128256
    output.weight: 4096x128256
";

const LLAMA_CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":128256,
    "hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,
    "num_key_value_heads":8,"hidden_act":"silu","max_position_embeddings":131072,"rms_norm_eps":1e-05,
    "eos_token_id":128009,"attention_bias":false,"mlp_bias":false,"tie_word_embeddings":false,"rope_theta":500000.0"#;

/// Divisors as the converter computes them, in single precision.
fn llama3_factors(theta: f32, dims: usize, factor: f32) -> Vec<f32> {
    let pairs = (0..dims / 2).map(|i| 1.0 / theta.powf(2.0 * i as f32 / dims as f32));
    pairs
        .map(|frequency| {
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 {
                factor
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        })
        .collect()
}

#[test]
fn llama() {
    check(LLAMA, &[], &format!("{LLAMA_CONFIG}}}"));
    for factor in [8.0, 32.0] {
        let scaling = format!(
            r#""rope_scaling":{{"factor":{factor:?},"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":8192,"rope_type":"llama3"}}"#
        );
        let factors = llama3_factors(500_000.0, 128, factor);
        check(LLAMA, &[("rope_freqs.weight", factors)], &format!("{LLAMA_CONFIG},{scaling}}}"));
    }
    let tied = LLAMA.replace("output.weight: 4096x128256", "");
    check(
        &tied,
        &[],
        &format!("{}}}", LLAMA_CONFIG.replace(r#""tie_word_embeddings":false"#, r#""tie_word_embeddings":true"#)),
    );
    let biased =
        format!("{LLAMA}\n blk.0.attn_q.bias: 4096\n blk.0.attn_output.bias: 4096\n blk.0.ffn_down.bias: 4096");
    let config = LLAMA_CONFIG.replace(r#"_bias":false"#, r#"_bias":true"#);
    check(&biased, &[], &format!("{config}}}"));
}

#[test]
fn divisors_of_no_known_scaling_stand_for_themselves() {
    let factors: Vec<f32> = (0..64).map(|i| 1.0 + i as f32 / 16.0).collect();
    let config = config_of(&file(LLAMA, &[("rope_freqs.weight", factors.clone())])).unwrap();
    let rope = &config.ropes[0];
    assert_eq!(rope.attention(), 1.0);
    assert_eq!(rope.original(), Some(131_072));
    for (i, (got, factor)) in rope.inverse_frequencies(false).iter().zip(&factors).enumerate() {
        let want = 500_000f64.powf(-(i as f64) / 64.0) / f64::from(*factor);
        assert!((got / want - 1.0).abs() < 1e-9, "{i}: {got} is not {want}");
    }
    assert_eq!(rope.inverse_frequencies(true), rope.inverse_frequencies(false));
    let plain = config_of(&file(LLAMA, &[("rope_freqs.weight", vec![1.0; 64])])).unwrap();
    assert_eq!(plain.ropes[0].scaling, RopeScaling::None);
}

#[test]
fn mistral_and_mixtral() {
    let mistral = "
        general.architecture = llama
        llama.block_count = 40
        llama.context_length = 1024000
        llama.embedding_length = 5120
        llama.feed_forward_length = 14336
        llama.attention.head_count = 32
        llama.attention.head_count_kv = 8
        llama.attention.key_length = 128
        llama.attention.value_length = 128
        llama.rope.freq_base = 1000000.0
        llama.attention.layer_norm_rms_epsilon = 0.00001
        llama.rope.dimension_count = 128
        tokenizer.ggml.eos_token_id = 2
        token_embd.weight: 5120x131072
        output.weight: 5120x131072";
    let config = r#"{"model_type":"KIND","vocab_size":131072,"hidden_size":5120,"intermediate_size":14336,
        "num_hidden_layers":40,"num_attention_heads":32,"num_key_value_heads":8,"head_dim":128,"hidden_act":"silu",
        "max_position_embeddings":1024000,"rms_norm_eps":1e-05,"eos_token_id":2,"rope_theta":1000000.0,
        "tie_word_embeddings":false"#;
    let of = |kind: &str, rest: &str| format!("{}{rest}}}", config.replace("KIND", kind));
    // Without a window there is no difference.
    check(mistral, &[], &of("llama", ""));
    let window = format!("{mistral}\n llama.attention.sliding_window = 4096");
    check(&window, &[], &of("mistral", r#","sliding_window":4096"#));
    let experts = format!("{mistral}\n llama.expert_count = 8\n llama.expert_used_count = 2");
    let rest = r#","num_local_experts":8,"num_experts_per_tok":2,"sliding_window":null"#;
    check(&experts, &[], &of("mixtral", rest));
    let none = format!("{mistral}\n llama.expert_count = 0");
    check(&none, &[], &of("llama", ""));
}

fn qwen(arch: &str, rest: &str) -> String {
    let keys = "
        general.architecture = ARCH
        ARCH.block_count = 28
        ARCH.context_length = 32768
        ARCH.embedding_length = 3584
        ARCH.feed_forward_length = 18944
        ARCH.attention.head_count = 28
        ARCH.attention.head_count_kv = 4
        ARCH.rope.freq_base = 1000000.0
        ARCH.attention.layer_norm_rms_epsilon = 0.000001
        tokenizer.ggml.eos_token_id = 151645
        tokenizer.ggml.eot_token_id = 151645
        token_embd.weight: 3584x152064
        output.weight: 3584x152064";
    format!("{keys}\n{rest}").replace("ARCH", arch)
}

fn qwen_config(kind: &str, rest: &str) -> String {
    format!(
        r#"{{"model_type":"{kind}","vocab_size":152064,"hidden_size":3584,"intermediate_size":18944,
        "num_hidden_layers":28,"num_attention_heads":28,"num_key_value_heads":4,"hidden_act":"silu",
        "max_position_embeddings":32768,"rms_norm_eps":1e-06,"eos_token_id":151645,"rope_theta":1000000.0,
        "tie_word_embeddings":false,"use_sliding_window":false,"sliding_window":131072,"max_window_layers":28{rest}}}"#
    )
}

#[test]
fn qwen2_and_qwen3() {
    check(&qwen("qwen2", "ARCH.attention.sliding_window = 131072"), &[], &qwen_config("qwen2", ""));
    let yarn = "
        ARCH.rope.scaling.type = yarn
        ARCH.rope.scaling.factor = 4.0
        ARCH.rope.scaling.original_context_length = 32768
        ARCH.context_length = 131072";
    let scaling = r#","rope_scaling":{"type":"yarn","factor":4.0,"original_max_position_embeddings":32768REST}"#;
    let config = |rest: &str| {
        qwen_config("qwen2", &scaling.replace("REST", rest))
            .replace(r#"embeddings":32768,"rms"#, r#"embeddings":131072,"rms"#)
    };
    check(&qwen("qwen2", yarn), &[], &config(""));
    let tuned = format!(
        "{yarn}\n ARCH.rope.scaling.yarn_attn_factor = 1.3\n ARCH.rope.scaling.yarn_beta_fast = 16.0
         ARCH.rope.scaling.yarn_beta_slow = 2.0"
    );
    check(&qwen("qwen2", &tuned), &[], &config(r#","attention_factor":1.3,"beta_fast":16,"beta_slow":2"#));
    let head = "ARCH.attention.key_length = 256\n ARCH.attention.value_length = 256";
    check(&qwen("qwen3", head), &[], &qwen_config("qwen3", r#","head_dim":256,"attention_bias":false"#));
    let experts = format!(
        "{head}\n ARCH.expert_count = 128\n ARCH.expert_used_count = 8\n ARCH.expert_feed_forward_length = 768"
    );
    let rest = r#","head_dim":256,"num_experts":128,"num_experts_per_tok":8,"moe_intermediate_size":768,
        "norm_topk_prob":true,"decoder_sparse_step":1,"mlp_only_layers":[],"output_router_logits":false"#;
    check(&qwen("qwen3moe", &experts), &[], &qwen_config("qwen3_moe", rest));
}

#[test]
fn phi3() {
    let script = "
        general.architecture = phi3
        phi3.block_count = 32
        phi3.context_length = 131072
        phi3.rope.scaling.original_context_length = 4096
        phi3.embedding_length = 3072
        phi3.feed_forward_length = 8192
        phi3.attention.head_count = 24
        phi3.attention.head_count_kv = 8
        phi3.attention.layer_norm_rms_epsilon = 0.00001
        phi3.rope.dimension_count = 96
        phi3.rope.freq_base = 10000.0
        phi3.attention.sliding_window = 262144
        tokenizer.ggml.eos_token_id = 199999
        tokenizer.ggml.eot_token_id = 200020
        token_embd.weight: 3072x200064";
    let (short, long): (Vec<f32>, Vec<f32>) = (0..48).map(|i| (1.0 + i as f32 / 8.0, 1.5 + i as f32)).unzip();
    let config = |rest: &str| {
        format!(
            r#"{{"model_type":"phi3","vocab_size":200064,"hidden_size":3072,"intermediate_size":8192,
            "num_hidden_layers":32,"num_attention_heads":24,"num_key_value_heads":8,"hidden_act":"silu",
            "max_position_embeddings":131072,"original_max_position_embeddings":4096,"rms_norm_eps":1e-05,
            "eos_token_id":[199999,200020],"rope_theta":10000.0,"partial_rotary_factor":0.75,
            "tie_word_embeddings":true{rest}}}"#
        )
    };
    let window = r#","sliding_window":262144"#;
    let scaling = format!(r#","rope_scaling":{{"type":"longrope","short_factor":{short:?},"long_factor":{long:?}}}"#);
    let factors = [("rope_factors_long.weight", long), ("rope_factors_short.weight", short)];
    check(script, &[], &config(window));
    let usual = (1.0 + 32f64.ln() / 4096f64.ln()).sqrt() as f32;
    let scaled = format!("{script}\n phi3.rope.scaling.attn_factor = {usual}");
    check(&scaled, &factors, &config(&format!("{scaling}{window}")));
    let other = format!("{script}\n phi3.rope.scaling.attn_factor = 1.5");
    let rest = format!("{scaling}{window}").replace(r#""type""#, r#""attention_factor":1.5,"type""#);
    check(&other, &factors, &config(&rest));
    let open = script.replace("= 262144", "= 0");
    check(&open, &factors, &config(&format!(r#"{scaling},"sliding_window":null"#)));
    let one = config_of(&file(script, &factors[..1])).unwrap_err().to_string();
    assert!(one.contains("must both be there"), "{one}");
}

#[test]
fn gemma2() {
    for (layers, hidden, heads, head_dim, scalar) in [(46, 4608, 32, 128, 144), (42, 3584, 16, 256, 256)] {
        let script = format!(
            "general.architecture = gemma2
            gemma2.block_count = {layers}
            gemma2.context_length = 8192
            gemma2.embedding_length = {hidden}
            gemma2.feed_forward_length = 36864
            gemma2.attention.head_count = {heads}
            gemma2.attention.head_count_kv = 16
            gemma2.attention.key_length = {head_dim}
            gemma2.attention.value_length = {head_dim}
            gemma2.attention.layer_norm_rms_epsilon = 0.000001
            gemma2.attention.sliding_window = 4096
            gemma2.attn_logit_softcapping = 50.0
            gemma2.final_logit_softcapping = 30.0
            tokenizer.ggml.eos_token_id = 1
            token_embd.weight: {hidden}x256000"
        );
        let config = format!(
            r#"{{"model_type":"gemma2","vocab_size":256000,"hidden_size":{hidden},"intermediate_size":36864,
            "num_hidden_layers":{layers},"num_attention_heads":{heads},"num_key_value_heads":16,
            "head_dim":{head_dim},"query_pre_attn_scalar":{scalar},"hidden_activation":"gelu_pytorch_tanh",
            "max_position_embeddings":8192,"rms_norm_eps":1e-06,"eos_token_id":1,"sliding_window":4096,
            "attn_logit_softcapping":50.0,"final_logit_softcapping":30.0,"rope_theta":10000.0}}"#
        );
        check(&script, &[], &config);
    }
}

#[test]
fn gemma3() {
    let script = "
        general.architecture = gemma3
        gemma3.block_count = 62
        gemma3.context_length = 131072
        gemma3.embedding_length = 5376
        gemma3.feed_forward_length = 21504
        gemma3.attention.head_count = 32
        gemma3.attention.head_count_kv = 16
        gemma3.attention.key_length = 128
        gemma3.attention.value_length = 128
        gemma3.attention.layer_norm_rms_epsilon = 0.000001
        gemma3.attention.sliding_window = 1024
        gemma3.rope.freq_base = 1000000.0
        gemma3.rope.scaling.type = linear
        gemma3.rope.scaling.factor = 8.0
        tokenizer.ggml.eos_token_id = 1
        tokenizer.ggml.eot_token_id = 106
        token_embd.weight: 5376x262208";
    let config = |rest: &str| {
        format!(
            r#"{{"model_type":"gemma3_text","vocab_size":262208,"hidden_size":5376,"intermediate_size":21504,
            "num_hidden_layers":62,"num_attention_heads":32,"num_key_value_heads":16,"head_dim":128,
            "query_pre_attn_scalar":168,"hidden_activation":"gelu_pytorch_tanh","max_position_embeddings":131072,
            "rms_norm_eps":1e-06,"eos_token_id":[1,106],"rope_theta":1000000,"rope_local_base_freq":10000.0,
            "rope_scaling":{{"factor":8.0,"rope_type":"linear"}}{rest}}}"#
        )
    };
    check(script, &[], &config(r#","sliding_window":1024,"sliding_window_pattern":6"#));
    let pattern = format!("{script}\n gemma3.attention.sliding_window_pattern = 4");
    check(&pattern, &[], &config(r#","sliding_window":1024,"sliding_window_pattern":4"#));
    let kinds: Vec<bool> = (0..62).map(|i| i % 3 == 0).collect();
    let each = kinds.iter().map(bool::to_string).collect::<Vec<_>>().join(" ");
    let named: Vec<&str> =
        kinds.iter().map(|kind| if *kind { "sliding_attention" } else { "full_attention" }).collect();
    let listed = format!("{script}\n gemma3.attention.sliding_window_pattern = [{each}]");
    check(&listed, &[], &config(&format!(r#","sliding_window":1024,"layer_types":{named:?}"#)));
    let open = script.replace("gemma3.attention.sliding_window = 1024", "");
    assert!(config_of(&file(&open, &[])).unwrap().layers.iter().all(|layer| layer.window.is_none()));
}

#[test]
fn smollm3_olmo2_and_granite() {
    let script = |arch: &str, rest: &str| {
        let keys = "
            general.architecture = ARCH
            ARCH.block_count = 36
            ARCH.context_length = 65536
            ARCH.embedding_length = 2048
            ARCH.feed_forward_length = 11008
            ARCH.attention.head_count = 16
            ARCH.attention.head_count_kv = 4
            ARCH.rope.freq_base = 5000000.0
            ARCH.attention.layer_norm_rms_epsilon = 0.000001
            ARCH.rope.dimension_count = 128
            tokenizer.ggml.eos_token_id = 100257
            token_embd.weight: 2048x128256";
        format!("{keys}\n{rest}").replace("ARCH", arch)
    };
    let config = |kind: &str, rest: &str| {
        format!(
            r#"{{"model_type":"{kind}","vocab_size":128256,"hidden_size":2048,"intermediate_size":11008,
            "num_hidden_layers":36,"num_attention_heads":16,"num_key_value_heads":4,"hidden_act":"silu",
            "max_position_embeddings":65536,"rms_norm_eps":1e-06,"eos_token_id":100257,"rope_theta":5000000.0,
            "tie_word_embeddings":true{rest}}}"#
        )
    };
    check(&script("smollm3", ""), &[], &config("smollm3", r#","no_rope_layer_interval":4"#));
    check(&script("olmo2", ""), &[], &config("olmo2", r#","attention_bias":false"#));
    let scales = "
        ARCH.attention.scale = 0.0078125
        ARCH.embedding_scale = 12.0
        ARCH.residual_scale = 0.22
        ARCH.logit_scale = 16.0";
    let rest = r#","attention_multiplier":0.0078125,"embedding_multiplier":12.0,"residual_multiplier":0.22,
        "logits_scaling":16.0,"attention_bias":false,"mlp_bias":false"#;
    check(&script("granite", scales), &[], &config("granite", rest));
}

#[test]
fn the_vocabulary_is_that_of_the_tokens_too() {
    let script = LLAMA.replace("token_embd.weight: 4096x128256", "").replace("128009", "2");
    let with = |script: &str| {
        let tokens = Value::Texts(["a", "b", "c"].map(str::to_owned).into());
        file(script, &[]).key("tokenizer.ggml.tokens", tokens)
    };
    assert_eq!(config_of(&with(&script)).unwrap().vocab, 3);
    let error = config_of(&with(LLAMA)).unwrap_err().to_string();
    assert!(error.contains("3 tokens and embeddings of 128256"), "{error}");
    let error = config_of(&file(&script, &[])).unwrap_err().to_string();
    assert!(error.contains("neither tokens nor embeddings"), "{error}");
}

/// Phi-3's files, and older ones of Llama 3, name one of the tokens that end a turn.
#[test]
fn special_tokens_that_are_called_an_end_are_one() {
    let script: String = LLAMA.lines().filter(|line| !line.contains("token_embd")).collect::<Vec<_>>().join("\n");
    let named = format!("{script}\n tokenizer.ggml.eos_token_id = 2");
    let eos = |script: &str, types: &[i32]| {
        let tokens = ["a", "<|end|>", "<eos>", "<|im_end|>", "<end_of_turn>", "<|end", "</s>"];
        let file = file(script, &[]).key("tokenizer.ggml.tokens", Value::Texts(tokens.map(str::to_owned).into()));
        config_of(&file.key("tokenizer.ggml.token_type", Value::I32s(types.into()))).unwrap().eos
    };
    assert_eq!(eos(&named, &[3, 3, 3, 4, 1, 3, 6]), [2, 1, 3]);
    assert_eq!(eos(&named, &[1; 7]), [2]);
    let unnamed = named.replace("tokenizer.ggml.eos_token_id = 2", "tokenizer.ggml.eot_token_id = 4294967295");
    assert_eq!(eos(&unnamed.replace("tokenizer.ggml.eos_token_id = 128009", ""), &[1, 1, 1, 1, 1, 1, 3]), [6]);
}

#[test]
fn a_head_in_another_file_is_a_head() {
    let head = LLAMA.lines().find(|line| line.contains("output.weight")).unwrap();
    let split = |file: File, no: u16| {
        let file = file.key("split.no", Value::U16(no)).key("split.count", Value::U16(2));
        file.key("split.tensors.count", Value::I32(2)).bytes()
    };
    let (one, two) = (split(file(&LLAMA.replace(head.trim(), ""), &[]), 0), split(file(head, &[]), 1));
    let parse = |bytes| Gguf::parse("f.gguf", bytes, FILE_LEN).unwrap();
    assert!(!model_config(&[parse(&one), parse(&two)]).unwrap().tied);
    assert!(model_config(&[parse(&one)]).is_err());
    assert!(model_config(&[]).is_err());
}

#[test]
fn keys_that_nothing_knows_are_named() {
    let script = format!("{LLAMA}\n llama.mystery = 3\n llama.attention.puzzle = [1 2]\n other.key = 1");
    assert_eq!(config_of(&file(&script, &[])).unwrap().unknown, ["llama.attention.puzzle", "llama.mystery"]);
}

#[test]
fn what_is_not_computed_is_refused() {
    for (line, want) in [
        ("general.architecture = mamba", "architecture `mamba` is not one of llama, qwen2"),
        ("general.type = adapter", "of type `adapter`"),
        ("llama.attention.head_count_kv = [8 8 4]", "differs between layers"),
        ("llama.feed_forward_length = [1 2]", "differs between layers"),
        ("llama.attention.key_length = 64\n llama.attention.value_length = 128", "beside values of length"),
        ("llama.attention.value_length = 64", "beside values of length"),
        ("llama.attention.clamp_kqv = 8.0", "clamp_kqv"),
        ("llama.attention.causal = false", "attention.causal"),
        ("llama.expert_count = 8\n llama.expert_used_count = 2\n llama.expert_shared_count = 1", "expert_shared_count"),
        ("llama.expert_count = 8\n llama.expert_gating_func = 2", "expert_gating_func"),
        ("llama.expert_count = 8\n llama.expert_weights_scale = 2.5", "expert_weights_scale"),
        ("llama.attention.scale = 0.5", "attention.scale"),
        ("llama.logit_scale = 0.5", "logit_scale"),
        ("llama.attn_logit_softcapping = 50.0", "attn_logit_softcapping"),
        ("llama.attention.sliding_window_pattern = 2", "sliding_window_pattern"),
        ("llama.rope.scaling.type = dynamic", "rope type `dynamic`"),
        ("blk.0.attn_q.bias: 4096", "biases of either"),
    ] {
        let error = config_of(&file(&format!("{LLAMA}\n{line}"), &[])).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{line}: {error:?}");
        assert!(error.to_string().starts_with("f.gguf") && error.to_string().contains(want), "{line}: {error}");
    }
    let factors = [("rope_freqs.weight", vec![2.0; 64])];
    let both = format!("{LLAMA}\n llama.rope.scaling.type = linear\n llama.rope.scaling.factor = 2.0");
    assert!(matches!(config_of(&file(&both, &factors)), Err(Error::Unsupported { .. })));
    let windows = qwen("qwen2", "ARCH.attention.sliding_window = 4096");
    assert!(matches!(config_of(&file(&windows, &[])), Err(Error::Unsupported { .. })));
    let still = qwen("granite", "ARCH.rope.scaling.finetuned = false");
    assert!(matches!(config_of(&file(&still, &[])), Err(Error::Unsupported { .. })));
}

#[test]
fn what_contradicts_itself_is_refused() {
    for (line, want) in [
        ("general.architecture = 7", "`general.architecture` must be a text"),
        ("llama.block_count = many", "`llama.block_count` must be a whole number"),
        ("llama.attention.head_count_kv = []", "has no values"),
        ("llama.attention.layer_norm_rms_epsilon = NaN", "must be a number"),
        ("llama.attention.layer_norm_rms_epsilon = 1", "must be"),
        ("llama.attention.head_count = 0", "no multiple of its heads"),
        ("llama.attention.head_count = 24", "no multiple of its heads"),
        ("llama.attention.head_count_kv = 5", "no multiple of num_key_value_heads"),
        ("llama.rope.dimension_count = 130", "cannot be rotated in pairs"),
        ("llama.rope.dimension_count = 0", "cannot be rotated in pairs"),
        ("llama.rope.freq_base = 0.0", "rope_theta"),
        ("llama.rope.scaling.type = yarn\n llama.rope.scaling.factor = 2.0", "original_context_length` is missing"),
        ("llama.rope.scaling.type = longrope", "must both be there"),
        ("tokenizer.ggml.eos_token_id = 128256", "outside a vocabulary"),
        ("llama.block_count = 100000", "num_hidden_layers"),
        ("llama.expert_count = 8\n llama.expert_used_count = 9", "9 of 8 experts"),
    ] {
        let error = config_of(&file(&format!("{LLAMA}\n{line}"), &[])).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{line}: {error:?}");
        assert!(error.to_string().starts_with("f.gguf") && error.to_string().contains(want), "{line}: {error}");
    }
    for key in [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ] {
        let key = format!("llama.{key}");
        let script: String =
            LLAMA.lines().filter(|line| !line.contains(&format!("{key} "))).collect::<Vec<_>>().join("\n");
        let error = config_of(&file(&script, &[])).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}` is missing")), "{error}");
    }
    for factors in [vec![1.0; 63], vec![0.0; 64], vec![f32::NAN; 64]] {
        let error = config_of(&file(LLAMA, &[("rope_freqs.weight", factors)])).unwrap_err();
        assert!(error.to_string().contains("rope_freqs.weight"), "{error}");
    }
}

#[test]
fn every_width_of_rope_is_kept() {
    for head_dim in (8..=512u32).step_by(8) {
        for dims in (2..=head_dim).step_by(2) {
            let line = format!("llama.attention.key_length = {head_dim}\n llama.rope.dimension_count = {dims}");
            let bytes = file(&format!("{LLAMA}\n{line}"), &[]).bytes();
            let json = config_json(&[Gguf::parse("f", &bytes, FILE_LEN).unwrap()]).unwrap();
            let config = ModelConfig::parse(serde_json::Value::Object(json).to_string().as_bytes()).unwrap();
            assert_eq!(config.ropes[0].dims, dims as usize, "of {head_dim}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn tampered_metadata_are_an_error_or_a_model(
        arch in prop::sample::select(
            vec!["llama", "qwen2", "qwen3moe", "phi3", "gemma2", "gemma3", "olmo2", "granite"],
        ),
        changes in prop::collection::vec((
            prop::sample::select(vec!["block_count", "context_length", "embedding_length", "feed_forward_length",
                "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
                "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
                "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
                "attention.sliding_window", "attention.sliding_window_pattern", "attention.scale", "logit_scale",
                "expert_count", "expert_used_count", "expert_feed_forward_length", "attn_logit_softcapping"]),
            prop_oneof![
                4 => prop::sample::select(vec![0, 1, 2, 3, 8, 64, 127, 4096, 1 << 24, u32::MAX]).prop_map(Value::U32),
                2 => any::<f32>().prop_map(Value::F32),
                2 => (0.5f32..64.0).prop_map(Value::F32),
                1 => any::<[u8; 8]>().prop_map(|bytes| Value::Raw(10, bytes.into())),
                1 => prop::collection::vec(-2i32..3, 0..40).prop_map(Value::I32s),
                1 => prop::collection::vec(any::<bool>(), 0..40).prop_map(Value::Bools),
                2 => prop::sample::select(vec!["none", "linear", "yarn", "longrope", ""]).prop_map(Value::from),
            ],
        ), 1..4),
        factors in prop::option::of(prop::collection::vec(0.5f32..9.0, 64..65)),
    ) {
        let mut with = Vec::new();
        if let Some(factors) = factors {
            let names = match arch {
                "phi3" => &["rope_factors_long.weight", "rope_factors_short.weight"][..],
                _ => &["rope_freqs.weight"],
            };
            with.extend(names.iter().map(|name| (*name, factors.clone())));
        }
        let mut file = file(&qwen(arch, ""), &with);
        for (key, value) in changes {
            let key = format!("{arch}.{key}");
            file.keys.retain(|(other, _)| other != key.as_bytes());
            file.keys.push((key.into(), value));
        }
        if let Ok(config) = config_of(&file) {
            prop_assert!(config.head_dim > 0 && config.heads.is_multiple_of(config.kv_heads));
            prop_assert!(config.layers.iter().all(|layer| layer.window != Some(0)));
            for rope in &config.ropes {
                prop_assert!(rope.dims <= config.head_dim);
                prop_assert!(rope.inverse_frequencies(true).iter().all(|frequency| frequency.is_finite()));
            }
        }
    }
}
