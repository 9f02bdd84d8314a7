//! How models are loaded: with fewer bits, and the refusal of what does not fit.

use std::fs;

use rbee_testkit::{Cluster, Setup};
use serde_json::{Value, json};

const ASK: [&str; 8] = ["infer", "-p", "What do bees make?", "--temperature", "0", "--max-tokens", "20", "-q"];

#[test]
fn fewer_bits_are_asked_for_at_load_and_give_the_same_short_answers() {
    let cluster = Setup::real().warm();
    let whole = cluster.serving(1)[0].memory.weights;
    // A worker with the weights' own type serves already; it is not what is asked for.
    cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--quantize", "q8_0", "--kv-type", "q8_0"]).exits(0);
    let workers = cluster.serving(2);
    let small =
        workers.iter().find(|worker| worker.memory.weights < whole).unwrap_or_else(|| panic!("{workers:?} {whole}"));
    // 8.5 bits, and 12.25 of bf16.
    assert!(small.memory.weights * 14 < whole * 10, "{} of {whole}", small.memory.weights);
    let id = small.worker_id.to_string();
    assert_eq!(cluster.rbee(&[&ASK[..], &["--worker-id", &id]].concat()).exits(0).stdout.trim(), "Bees make honey.");
    // Asked for again it is there; a form that nobody knows is refused by its name.
    cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--quantize", "q8_0"]).exits(0);
    assert_eq!(cluster.status().workers.len(), 2);
    let refused = cluster.rbee(&["worker", "spawn", "--model", "tinybee", "--quantize", "q3"]).exits(1);
    assert!(refused.stderr.contains("`q3` is not q8_0 or q4_k"), "{}", refused.stderr);
}

/// A folder whose weights file has the length of a model of `bytes` bytes in bf16 and nothing in it.
fn hollow(cluster: &Cluster, bytes: u64, context: u64) -> String {
    let folder = cluster.folder().join("hollow");
    fs::create_dir(&folder).unwrap();
    let (hidden, mlp, vocab) = (2048u64, 8192u64, 2048u64);
    let layer = 2 * (4 * hidden * hidden + 3 * hidden * mlp);
    let layers = bytes / layer;
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocab,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/../tinybee/model/tokenizer.json"), folder.join("tokenizer.json"))
        .unwrap();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    let mut tensor = |name: String, shape: Vec<u64>| {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    };
    tensor("model.embed_tokens.weight".into(), vec![vocab, hidden]);
    tensor("model.norm.weight".into(), vec![hidden]);
    for i in 0..layers {
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            tensor(name(&format!("self_attn.{part}")), vec![hidden, hidden]);
        }
        for (part, shape) in [("gate_proj", [mlp, hidden]), ("up_proj", [mlp, hidden]), ("down_proj", [hidden, mlp])] {
            tensor(name(&format!("mlp.{part}")), shape.to_vec());
        }
        for part in ["input_layernorm", "post_attention_layernorm"] {
            tensor(name(part), vec![hidden]);
        }
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    let path = folder.join("model.safetensors");
    fs::write(&path, &file).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(file.len() as u64 + end).unwrap();
    folder.display().to_string()
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_numbers_and_with_what_would_fit() {
    let cluster = Setup::real().warm();
    let hives = cluster.rbee(&["hive", "list", "--json"]).exits(0).json();
    let free = hives[0]["devices"][0]["memory_free"].as_u64().unwrap();
    // In bf16 1.6 times as large as what is free: with 8.5 bits a weight it would fit, with 12.25 it does not.
    let model = hollow(&cluster, free / 5 * 8, 256);
    let refused = cluster.rbee(&["worker", "spawn", "--model", &model, "--json"]).exits(1);
    let error = refused.json()["error"].clone();
    assert_eq!(error["code"], "INSUFFICIENT_MEMORY", "{error}");
    let number = |value: &Value| value.as_u64().unwrap();
    let (needed, free) = (number(&error["details"]["needed"]), number(&error["details"]["free"]));
    assert!(needed > free / 100 * 120 && needed < free / 10 * 15, "{needed} {free}");
    let fits = error["details"]["would_fit"].as_array().unwrap();
    assert_eq!(fits[0]["load"]["quantize"], "q8_0", "{error}");
    assert!(number(&fits[0]["needed"]) <= free && number(&fits[0]["needed"]) > needed / 2, "{error}");
    assert!(error["hint"].as_str().unwrap().starts_with("with --quantize q8_0 it needs "), "{error}");
    // Nothing was started for it.
    assert_eq!(cluster.status().workers.len(), 1);
    cluster.rbee(&ASK).exits(0);
}

#[test]
fn kv_for_every_slot_that_does_not_fit_is_made_smaller_and_the_spawn_says_so() {
    let cluster = Setup::real().warm();
    let hives = cluster.rbee(&["hive", "list", "--json"]).exits(0).json();
    let free = hives[0]["devices"][0]["memory_free"].as_u64().unwrap();
    // One layer, 8 KiB of KV a token: the most slots, and a context that makes them four times what is free.
    let model = hollow(&cluster, 150 << 20, free / (1024 * 8192 / 4));
    let spawn = ["worker", "spawn", "--model", &model, "--slots", "1024"];
    let context = (free / (1024 * 8192 / 4)).to_string();
    let spawned = cluster.rbee(&[&spawn[..], &["--ctx", &context]].concat()).exits(0);
    assert!(spawned.stderr.contains("KV has "), "{}", spawned.stderr);
    let workers = cluster.serving(2);
    let worker = workers.iter().find(|worker| worker.model.to_string() == model).unwrap();
    let kv = worker.memory.kv;
    assert!(kv > free / 2 && kv < free, "{kv} of {free}");
    // What is reserved is not there for others, though hardly a page of it is in use yet.
    cluster.rbee(&[&spawn[..], &["--replicas", "2", "--ctx", &context]].concat()).exits(0);
    let all: u64 = cluster.serving(3).iter().map(|worker| worker.memory.kv + worker.memory.weights).sum();
    assert!(all < free, "{all} of {free}");
    cluster.rbee(&["infer", "-m", &model, "-p", "x", "--max-tokens", "3", "-q"]).exits(0);
}
