//! GGUF files: a model from its file alone, by its path or from a hub, and files that no model comes of.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use rbee_testkit::gguf::{File, Value as Meta};
use rbee_testkit::hub::{Hub, HubRepo};
use rbee_testkit::{Cluster, Setup};
use rbee_wire::ErrorCode;
use serde_json::{Value, json};

use crate::with;

/// How the matrices of the file are written.
#[derive(Clone, Copy)]
pub(crate) enum Stored {
    Bf16,
    Q8_0,
}

/// The built-in model as a GGUF file, as llama.cpp's converter would make it.
pub(crate) fn tinybee(stored: Stored) -> File {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tinybee/model");
    let json = |name: &str| -> Value { serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap() };
    let (config, tokenizer) = (json("config.json"), json("tokenizer.json"));
    let number = |key: &str| u32::try_from(config[key].as_u64().unwrap()).unwrap();
    let (heads, kv_heads) = (number("num_attention_heads"), number("num_key_value_heads"));
    let mut file = File::new()
        .key("general.architecture", "llama")
        .key("general.name", "tinybee")
        .key("llama.block_count", number("num_hidden_layers"))
        .key("llama.context_length", number("max_position_embeddings"))
        .key("llama.embedding_length", number("hidden_size"))
        .key("llama.feed_forward_length", number("intermediate_size"))
        .key("llama.attention.head_count", heads)
        .key("llama.attention.head_count_kv", kv_heads)
        .key("llama.attention.key_length", number("head_dim"))
        .key("llama.attention.value_length", number("head_dim"))
        .key("llama.rope.dimension_count", number("head_dim"))
        .key("llama.rope.freq_base", config["rope_theta"].as_f64().unwrap() as f32)
        .key("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"].as_f64().unwrap() as f32);
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    for (token, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let mut kinds = vec![1; tokens.len()];
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        kinds[added["id"].as_u64().unwrap() as usize] = 3;
    }
    let pair = |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(pair).collect();
    file = file
        .key("tokenizer.ggml.model", "gpt2")
        .key("tokenizer.ggml.pre", "gpt-2")
        .key("tokenizer.ggml.tokens", Meta::Texts(tokens))
        .key("tokenizer.ggml.token_type", Meta::I32s(kinds))
        .key("tokenizer.ggml.merges", Meta::Texts(merges))
        .key("tokenizer.ggml.eos_token_id", 2)
        .key("tokenizer.ggml.add_bos_token", Meta::Bool(false))
        .key("tokenizer.chat_template", json("tokenizer_config.json")["chat_template"].as_str().unwrap());

    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    for (name, info) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let at = |end: usize| data + info["data_offsets"][end].as_u64().unwrap() as usize;
        let shape: Vec<u64> = info["shape"].as_array().unwrap().iter().map(|side| side.as_u64().unwrap()).collect();
        assert_eq!(info["dtype"], "BF16");
        let mut values: Vec<bf16> =
            bytes[at(0)..at(1)].as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes)).collect();
        for (matrix, heads) in [("q_proj", heads), ("k_proj", kv_heads)] {
            if name.contains(matrix) {
                values = interleaved(&values, heads as usize, shape[1] as usize);
            }
        }
        let dims: Vec<u64> = shape.iter().rev().copied().collect();
        let wide = || values.iter().map(|value| value.to_f32()).collect::<Vec<f32>>();
        file = match (stored, dims.len()) {
            (_, 1) => file.f32(&ggml(name), &dims, &wide()),
            (Stored::Bf16, _) => {
                file.tensor(&ggml(name), &dims, 30, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
            }
            (Stored::Q8_0, _) => file.tensor(&ggml(name), &dims, 8, &q8_0(&wide())),
        };
    }
    file
}

/// ggml's name of a tensor.
fn ggml(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name).strip_suffix(".weight").unwrap();
    let plain = match name {
        "embed_tokens" => "token_embd",
        "norm" => "output_norm",
        _ => {
            let (layer, part) = name.strip_prefix("layers.").unwrap().split_once('.').unwrap();
            let part = match part {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" => "ffn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                other => panic!("{other}"),
            };
            return format!("blk.{layer}.{part}.weight");
        }
    };
    format!("{plain}.weight")
}

/// The rows of each head in the order of llama's files: both of a rotated pair side by side.
fn interleaved(values: &[bf16], heads: usize, columns: usize) -> Vec<bf16> {
    let rows = values.len() / columns;
    let half = rows / heads / 2;
    let source = |row: usize| row / (2 * half) * 2 * half + row % (2 * half) / 2 + row % 2 * half;
    (0..rows).flat_map(|row| &values[source(row) * columns..][..columns]).copied().collect()
}

fn q8_0(values: &[f32]) -> Vec<u8> {
    let (blocks, _) = values.as_chunks::<32>();
    let block = |block: &[f32; 32]| {
        let scale = block.iter().fold(0f32, |most, value| most.max(value.abs())) / 127.0;
        let unit = if scale == 0.0 { 0.0 } else { scale.recip() };
        let weights = block.map(|value| (value * unit).round() as i8 as u8);
        [&f16::from_f32(scale).to_le_bytes()[..], &weights].concat()
    };
    blocks.iter().flat_map(block).collect()
}

/// Several files that together are one, of so many tensors each.
fn split(whole: &File, parts: usize) -> Vec<Vec<u8>> {
    let per = whole.tensors.len().div_ceil(parts);
    let number = |value: usize| Meta::U16(value as u16);
    let part = |no: usize| {
        let mut file = File::new();
        if no == 0 {
            file.keys.clone_from(&whole.keys);
        }
        file = file
            .key("split.no", number(no))
            .key("split.count", number(parts))
            .key("split.tensors.count", Meta::I32(whole.tensors.len() as i32));
        for (at, tensor) in whole.tensors.iter().enumerate().skip(no * per).take(per) {
            let end = whole.tensors.get(at + 1).map_or(whole.data.len(), |next| next.offset as usize);
            let name = str::from_utf8(&tensor.name).unwrap();
            file = file.tensor(name, &tensor.dims, tensor.kind, &whole.data[tensor.offset as usize..end]);
        }
        file.bytes()
    };
    (0..parts).map(part).collect()
}

/// A file in the cluster's folder.
pub(crate) fn put(cluster: &Cluster, name: &str, bytes: &[u8]) -> String {
    let path = cluster.folder().join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

const ASK: [&str; 8] = ["infer", "-p", "What do bees make?", "--temperature", "0", "--max-tokens", "20", "-q"];

#[test]
fn a_file_alone_is_a_model_that_says_what_the_folder_says() {
    let cluster = Setup::real().warm();
    let path = put(&cluster, "bee.gguf", &tinybee(Stored::Bf16).bytes());
    let answer = cluster.rbee(&[&ASK[..], &["-m", &path]].concat()).exits(0);
    assert_eq!(answer.stdout.trim(), "Bees make honey.");
    // The weights and the template are the same, so every draw is.
    let story = |model: &str| {
        let long =
            ["infer", "-m", model, "-p", "Tell me a story", "--seed", "5", "--top-p", "1", "--max-tokens", "200"];
        cluster.rbee(&[&long[..], &["--temperature", "1", "-q"]].concat()).exits(0).stdout
    };
    let told = story(&path);
    assert!(told.len() > 100, "{told}");
    assert_eq!(told, story("tinybee"));
    // In chats too: the template is the file's own.
    let body =
        json!({ "model": path, "temperature": 0, "messages": [{ "role": "user", "content": "What do bees make?" }] });
    let chat: Value = cluster.queen().post("/v1/chat/completions", &body).json();
    assert_eq!(chat["choices"][0]["message"]["content"].as_str().unwrap().trim(), "Bees make honey.");
    assert_eq!(chat["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_quantization_of_a_hub_is_fetched_and_answers_whole_or_in_parts() {
    let hub = Hub::start();
    let whole = tinybee(Stored::Q8_0);
    let parts = split(&whole, 3);
    let repo = HubRepo::new().lfs("bee-Q8_0.gguf", whole.bytes()).lfs("bee-BF16.gguf", tinybee(Stored::Bf16).bytes());
    hub.put("org/ggufs", "main", repo);
    let name = |no: usize| format!("bee-Q8_0-{no:05}-of-00003.gguf");
    let cut = parts.iter().enumerate().fold(HubRepo::new(), |repo, (no, part)| repo.lfs(&name(no + 1), part.clone()));
    hub.put("org/cut", "main", cut);
    let cluster = Setup::real().env("HF_ENDPOINT", &hub.url).env("RBEE_HUB_MIRRORS", &hub.cdn).home();
    for model in ["org/ggufs:Q8_0", "org/cut"] {
        let answer = cluster.rbee(&[&ASK[..], &["-m", model]].concat()).exits(0);
        assert_eq!(answer.stdout.trim(), "Bees make honey.", "{model}");
    }
    // Matrices stay as small as the file has them.
    let weights = |model: &str| {
        let plan = cluster.rbee(&["plan", model, "--json"]).exits(0).json();
        plan["rooms"][0]["needs"]["weights"].as_u64().unwrap_or_else(|| panic!("{plan}"))
    };
    let (eight, file) = (weights("org/ggufs:Q8_0"), whole.data.len() as u64);
    assert!((file * 95 / 100..file * 110 / 100).contains(&eight), "{eight} for {file}");
    assert_eq!(weights("org/cut"), eight);
    // Those of bf16 take 12.25 bits of 16.
    let half = tinybee(Stored::Bf16);
    let (twelve, file) = (weights(&put(&cluster, "bee.gguf", &half.bytes())), half.data.len() as u64);
    assert!((file * 74 / 100..file * 80 / 100).contains(&twelve), "{twelve} for {file}");
    assert!(twelve * 75 / 100 > eight, "{twelve} and {eight}");
}

#[test]
fn a_file_that_no_model_comes_of_fails_its_load_with_a_code_and_the_cause() {
    let cluster = Setup::real().warm();
    let sound = tinybee(Stored::Bf16);
    let changed = |change: &dyn Fn(&mut File)| {
        let mut file = sound.clone();
        change(&mut file);
        file.bytes()
    };
    let key = |file: &mut File, name: &str, value: Meta| {
        file.keys.iter_mut().find(|(key, _)| key == name.as_bytes()).unwrap().1 = value;
    };
    fn texts(file: &mut File) -> &mut Vec<String> {
        let tokens = file.keys.iter_mut().find(|(key, _)| key == b"tokenizer.ggml.tokens");
        match &mut tokens.unwrap().1 {
            Meta::Texts(texts) => texts,
            other => panic!("{other:?}"),
        }
    }
    let whole = sound.bytes();
    type Case<'c> = (&'c str, Vec<u8>, ErrorCode, &'c str);
    let cases: Vec<Case<'_>> = vec![
        (
            "noise.gguf",
            (0..9999u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect(),
            ErrorCode::ModelCorrupt,
            "GGUF",
        ),
        ("empty.gguf", Vec::new(), ErrorCode::ModelCorrupt, "its header ends"),
        ("cut.gguf", whole[..whole.len() / 2].to_vec(), ErrorCode::ModelCorrupt, "cut.gguf"),
        ("kind.gguf", changed(&|file| file.tensors[3].kind = 19), ErrorCode::ModelLoadFailed, "Q4_K_M"),
        (
            "arch.gguf",
            changed(&|file| key(file, "general.architecture", "mamba".into())),
            ErrorCode::ModelLoadFailed,
            "mamba",
        ),
        ("missing.gguf", changed(&|file| drop(file.tensors.pop())), ErrorCode::ModelCorrupt, "is missing"),
        (
            "words.gguf",
            changed(&|file| key(file, "tokenizer.ggml.pre", "klingon".into())),
            ErrorCode::ModelLoadFailed,
            "klingon",
        ),
        (
            "layers.gguf",
            changed(&|file| key(file, "llama.block_count", Meta::U32(1 << 30))),
            ErrorCode::ModelCorrupt,
            "num_hidden_layers",
        ),
        (
            "bee-00001-of-00002.gguf",
            split(&sound, 2).swap_remove(0),
            ErrorCode::ModelCorrupt,
            "bee-00002-of-00002.gguf",
        ),
    ];
    let aligned = |name, value: Meta, says| {
        (
            name,
            changed(&|file| file.keys.push(("general.alignment".into(), value.clone()))),
            ErrorCode::ModelCorrupt,
            says,
        )
    };
    let cases = cases.into_iter().chain([
        aligned("aligned-0.gguf", Meta::U32(0), "no power of two"),
        aligned("aligned-3.gguf", Meta::U32(3), "no power of two"),
        aligned("aligned-2-31.gguf", Meta::U32(1 << 31), "no power of two"),
        aligned("aligned-text.gguf", "32".into(), "must be a u32"),
        (
            "end.gguf",
            changed(&|file| key(file, "tokenizer.ggml.eos_token_id", Meta::U32(70_000))),
            ErrorCode::ModelCorrupt,
            "70000",
        ),
        (
            "begin.gguf",
            changed(&|file| file.keys.push(("tokenizer.ggml.bos_token_id".into(), Meta::U32(70_000)))),
            ErrorCode::ModelCorrupt,
            "70000",
        ),
        ("fewer.gguf", changed(&|file| drop(texts(file).pop())), ErrorCode::ModelCorrupt, "2047 tokens"),
        (
            "not-numbers.gguf",
            changed(&|file| {
                let end = file.data.len();
                file.data[end - 64..].fill(0xff);
            }),
            ErrorCode::ModelCorrupt,
            "not numbers",
        ),
    ]);
    for (name, bytes, code, says) in cases {
        let path = put(&cluster, name, &bytes);
        let job = with(crate::infer("x", 4), json!({ "model": path }));
        let error = cluster.job(&job).error();
        assert_eq!(error.code, code, "{name}: {error:?}");
        assert!(error.message.contains(says), "{name}: {error:?}");
    }
    let missing = cluster.rbee(&[&ASK[..], &["-m", "/nowhere/bee.gguf"]].concat()).exits(3).stderr;
    assert!(missing.contains("/nowhere/bee.gguf"), "{missing}");
    assert_eq!(cluster.rbee(&ASK).exits(0).stdout.trim(), "Bees make honey.");
}
