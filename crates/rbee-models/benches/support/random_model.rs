//! Folders of models of real shapes with random weights: times do not hang on the weights' values.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

/// A llama: hidden, layers, heads, KV heads, width of a head, MLP, vocabulary.
pub struct Shape {
    pub name: &'static str,
    pub sizes: [usize; 7],
    /// Whether the head is the embedding.
    pub tied: bool,
}

/// A llama of this shape in bf16.
pub fn write_model(folder: &Path, shape: &Shape) {
    let [hidden, layers, heads, kv_heads, dim, mlp, vocab] = shape.sizes;
    let config = json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "vocab_size": vocab,
        "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "max_position_embeddings": 8448, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = vec![("model.embed_tokens".to_owned(), vec![vocab, hidden])];
    for i in 0..layers {
        let mut add = |part: &str, shape: &[usize]| tensors.push((format!("model.layers.{i}.{part}"), shape.to_vec()));
        add("input_layernorm", &[hidden]);
        add("post_attention_layernorm", &[hidden]);
        add("self_attn.q_proj", &[heads * dim, hidden]);
        add("self_attn.k_proj", &[kv_heads * dim, hidden]);
        add("self_attn.v_proj", &[kv_heads * dim, hidden]);
        add("self_attn.o_proj", &[hidden, heads * dim]);
        add("mlp.gate_proj", &[mlp, hidden]);
        add("mlp.up_proj", &[mlp, hidden]);
        add("mlp.down_proj", &[hidden, mlp]);
    }
    tensors.push(("model.norm".to_owned(), vec![hidden]));
    if !shape.tied {
        tensors.push(("lm_head".to_owned(), vec![vocab, hidden]));
    }
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header
            .insert(format!("{name}.weight"), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = Value::Object(header).to_string();
    let mut file = BufWriter::new(fs::File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // Values around 0.02, as trained weights have them.
    let mut state = 1u64;
    let noise: Vec<u8> = (0..1 << 20)
        .flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (0x3c00u16 | (state >> 48) as u16 & 0x80ff).to_le_bytes()
        })
        .collect();
    let mut left = end;
    while left > 0 {
        let part = &noise[..left.min(noise.len())];
        file.write_all(part).unwrap();
        left -= part.len();
    }
    file.flush().unwrap();
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
