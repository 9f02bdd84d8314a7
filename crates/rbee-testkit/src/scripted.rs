//! A model that says what it is told to: real files for the real worker, in which every token has one successor.
//!
//! The embedding of a token is a unit vector of its own, the layer adds nothing to it, and the head has the vector as the logits of
//! the token that shall follow. A prompt's last token is thus all that counts: the template ends it with the cue of an answer.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// Rows of the model, more than there are tokens.
const ROWS: usize = 512;
const HEAD: usize = 32;
/// Gives the successor all of the probability at any temperature.
const SURE: f32 = 4.0;

/// Writes a model's folder.
///
/// Each answer stands behind a condition of the chat template's language, of which the first that holds decides; its pieces are the
/// tokens it comes in. `history` is template text that writes an assistant's earlier calls: the tags in it are how rbee learns what
/// the model's calls and reasoning look like.
///
/// # Panics
/// When a piece stands twice, is not ASCII, or there are too many.
pub fn write(folder: &Path, history: &str, answers: &[(&str, &[&str])]) -> PathBuf {
    let model = folder.join("scripted");
    fs::create_dir_all(&model).expect("the folder can be made");
    let mut names: Vec<String> = letters().iter().map(char::to_string).collect();
    let bytes = names.len();
    names.extend(["<|im_start|>", "<|im_end|>"].map(str::to_owned));
    let end = names.len() - 1;
    let mut next = vec![end; ROWS];
    let mut cue = String::new();
    for (number, (condition, pieces)) in answers.iter().enumerate() {
        let name = format!("<|cue {number}|>");
        let keyword = if number == 0 { "if" } else { "elif" };
        let _ = write!(cue, "{{%- {keyword} {condition} %}}{{{{ '{name}' }}}}");
        names.push(name);
        for piece in *pieces {
            assert!(piece.is_ascii() && !names.iter().any(|name| name == piece), "a piece of its own: {piece:?}");
            next[names.len() - 1] = names.len();
            names.push((*piece).to_owned());
        }
    }
    cue.push_str("{%- endif %}");
    assert!(names.len() <= ROWS, "{} tokens", names.len());
    let template = format!(
        "{{%- for tool in tools or [] %}}{{{{ tool | tojson }}}}{{%- endfor %}}\
         {{%- for message in messages %}}{{{{ '<|im_start|>' + message.role + '\n' + message.content }}}}{history}\
         {{{{ '<|im_end|>\n' }}}}{{%- endfor %}}{{{{ '<|im_start|>assistant\n' }}}}{cue}"
    );
    let put = |name: &str, value: &Value| {
        fs::write(model.join(name), value.to_string()).expect("the folder can be written");
    };
    put("config.json", &config(end));
    put("tokenizer.json", &tokenizer(&names, bytes));
    put("tokenizer_config.json", &json!({ "chat_template": template, "eos_token": "<|im_end|>" }));
    fs::write(model.join("model.safetensors"), weights(&next)).expect("the folder can be written");
    model
}

fn config(end: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS, "hidden_size": ROWS,
        "intermediate_size": HEAD, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "eos_token_id": end, "torch_dtype": "float32",
    })
}

/// The 256 letters that byte-level BPE writes bytes in.
fn letters() -> Vec<char> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0x100..0x144).map(|code| char::from_u32(code).expect("these are letters"));
    (0..=255u8).filter(printable).map(char::from).chain(others).collect()
}

fn tokenizer(names: &[String], bytes: usize) -> Value {
    let vocab: Map<String, Value> =
        names[..bytes].iter().zip(0..).map(|(name, id)| (name.clone(), json!(id))).collect();
    let added = |(id, name): (usize, &String)| {
        json!({ "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": name.starts_with("<|") })
    };
    let added: Vec<Value> = names.iter().enumerate().skip(bytes).map(added).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    })
}

fn weights(next: &[usize]) -> Vec<u8> {
    let identity = |row: usize, column: usize| if row == column { 1.0 } else { 0.0 };
    let head = |row: usize, column: usize| if next[column] == row { SURE } else { 0.0 };
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let zero = |_: usize, _: usize| 0.0;
    let one = |_: usize, _: usize| 1.0;
    type Fill<'f> = &'f dyn Fn(usize, usize) -> f32;
    let all: Vec<(String, Vec<usize>, Fill<'_>)> = vec![
        ("model.embed_tokens.weight".into(), vec![ROWS, ROWS], &identity),
        ("lm_head.weight".into(), vec![ROWS, ROWS], &head),
        ("model.norm.weight".into(), vec![ROWS], &one),
        (layer("input_layernorm"), vec![ROWS], &one),
        (layer("post_attention_layernorm"), vec![ROWS], &one),
        (layer("self_attn.q_proj"), vec![HEAD, ROWS], &zero),
        (layer("self_attn.k_proj"), vec![HEAD, ROWS], &zero),
        (layer("self_attn.v_proj"), vec![HEAD, ROWS], &zero),
        (layer("self_attn.o_proj"), vec![ROWS, HEAD], &zero),
        (layer("mlp.gate_proj"), vec![HEAD, ROWS], &zero),
        (layer("mlp.up_proj"), vec![HEAD, ROWS], &zero),
        (layer("mlp.down_proj"), vec![ROWS, HEAD], &zero),
    ];
    let mut header = Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape, fill) in all {
        let begin = data.len();
        let columns = shape[shape.len() - 1];
        let rows = shape.iter().product::<usize>() / columns;
        let values = (0..rows).flat_map(|row| (0..columns).map(move |column| fill(row, column)));
        data.extend(values.flat_map(f32::to_le_bytes));
        header.insert(name, json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()] }));
    }
    let header = Value::Object(header).to_string();
    let length = u64::try_from(header.len()).expect("a header is small");
    [length.to_le_bytes().as_slice(), header.as_bytes(), &data].concat()
}
