//! Model folders that are damaged: the load fails with a code and a hint, and everything else goes on.

use std::fs;
use std::path::{Path, PathBuf};

use rbee_testkit::{Cluster, Setup};
use rbee_wire::ErrorCode;
use serde_json::{Value, json};

use crate::with;

fn built_in() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tinybee/model")
}

/// A copy of the built-in model's folder, changed.
fn folder(cluster: &Cluster, name: &str, change: impl FnOnce(&Path)) -> String {
    let folder = cluster.folder().join(name);
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(built_in()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
    }
    change(&folder);
    folder.display().to_string()
}

fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    change(&mut value);
    fs::write(file, value.to_string()).unwrap();
}

/// A safetensors file with another header before the same data.
fn edit_header(file: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let header = header.to_string().into_bytes();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(&bytes[8 + length..]);
    fs::write(file, out).unwrap();
}

fn first_tensor(header: &mut Value) -> &mut Value {
    header.as_object_mut().unwrap().iter_mut().find(|(name, _)| *name != "__metadata__").unwrap().1
}

const ASK: [&str; 8] = ["infer", "-p", "What do bees make?", "--temperature", "0", "--max-tokens", "20", "-q"];

fn still_serves(cluster: &Cluster) {
    assert_eq!(cluster.rbee(&ASK).exits(0).stdout.trim(), "Bees make honey.");
}

type Change = fn(&Path);

#[test]
fn a_broken_model_folder_fails_its_load_and_nothing_else() {
    let cluster = Setup::real().warm();
    still_serves(&cluster);
    let whole = folder(&cluster, "whole", |_| ());
    assert_eq!(cluster.rbee(&[&ASK[..], &["-m", &whole]].concat()).exits(0).stdout.trim(), "Bees make honey.");
    let workers = cluster.serving(2);

    // A long answer of the built-in model runs while the loads fail.
    let chatter = json!({
        "operation": "infer", "model": "tinybee", "prompt": "Once upon a time", "seed": 1, "max_tokens": 1900,
        "ignore_eos": true,
    });
    let mut chatter = cluster.stream(&chatter);
    chatter.tokens(1);

    let cases: &[(&str, Change, &[ErrorCode])] = &[
        (
            "no-weights",
            |at| fs::remove_file(at.join("model.safetensors")).unwrap(),
            &[ErrorCode::ModelCorrupt, ErrorCode::ModelNotFound, ErrorCode::ModelLoadFailed],
        ),
        (
            "no-config",
            |at| fs::remove_file(at.join("config.json")).unwrap(),
            &[ErrorCode::ModelCorrupt, ErrorCode::ModelNotFound, ErrorCode::ModelLoadFailed],
        ),
        (
            "no-tokenizer",
            |at| fs::remove_file(at.join("tokenizer.json")).unwrap(),
            &[ErrorCode::ModelCorrupt, ErrorCode::ModelLoadFailed],
        ),
        (
            "truncated",
            |at| {
                let file = fs::OpenOptions::new().write(true).open(at.join("model.safetensors")).unwrap();
                file.set_len(3_000_000).unwrap();
            },
            &[ErrorCode::ModelCorrupt],
        ),
        ("empty", |at| fs::write(at.join("model.safetensors"), b"").unwrap(), &[ErrorCode::ModelCorrupt]),
        ("garbage", |at| fs::write(at.join("model.safetensors"), [0xff; 4096]).unwrap(), &[ErrorCode::ModelCorrupt]),
        (
            "wrong-shape",
            |at| {
                edit_header(&at.join("model.safetensors"), |header| first_tensor(header)["shape"] = json!([1, 1]));
            },
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "wrong-config",
            |at| edit(&at.join("config.json"), |config| config["hidden_size"] = json!(256)),
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "missing-layer",
            |at| edit(&at.join("config.json"), |config| config["num_hidden_layers"] = json!(7)),
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "broken-tokenizer",
            |at| fs::write(at.join("tokenizer.json"), b"{\"model\":").unwrap(),
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "unknown-kind",
            |at| {
                edit(&at.join("config.json"), |config| {
                    config["model_type"] = json!("walrus");
                    config["architectures"] = json!(["WalrusForCausalLM"]);
                });
            },
            &[ErrorCode::ModelLoadFailed, ErrorCode::ModelCorrupt],
        ),
        (
            "not-numbers",
            |at| {
                let path = at.join("model.safetensors");
                let mut bytes = fs::read(&path).unwrap();
                let end = bytes.len();
                bytes[end - 64..].fill(0xff);
                fs::write(path, bytes).unwrap();
            },
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "end-outside",
            |at| {
                fs::remove_file(at.join("generation_config.json")).unwrap();
                edit(&at.join("config.json"), |config| config["eos_token_id"] = json!(99_999));
            },
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "token-outside",
            |at| edit(&at.join("tokenizer.json"), |file| file["model"]["vocab"]["\u{2603}"] = json!(70_000)),
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "many-tensors",
            |at| {
                let entries = (0..1_500_000u32)
                    .map(|i| format!("\"{i}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"));
                let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
                let mut file = (header.len() as u64).to_le_bytes().to_vec();
                file.extend(header.as_bytes());
                fs::write(at.join("model.safetensors"), file).unwrap();
            },
            &[ErrorCode::ModelCorrupt],
        ),
        ("no-text", |at| fs::write(at.join("config.json"), b"\xff\xfe{}").unwrap(), &[ErrorCode::ModelCorrupt]),
        (
            "a-pipe",
            |at| {
                let path = at.join("model.safetensors");
                fs::remove_file(&path).unwrap();
                assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
            },
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "a-folder",
            |at| {
                fs::remove_file(at.join("tokenizer.json")).unwrap();
                fs::create_dir(at.join("tokenizer.json")).unwrap();
            },
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "a-device",
            |at| {
                fs::remove_file(at.join("config.json")).unwrap();
                std::os::unix::fs::symlink("/dev/zero", at.join("config.json")).unwrap();
            },
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "led-outside",
            |at| {
                fs::rename(at.join("model.safetensors"), at.with_extension("taken")).unwrap();
                std::os::unix::fs::symlink(at.with_extension("taken"), at.join("model.safetensors")).unwrap();
            },
            &[ErrorCode::ModelCorrupt],
        ),
        (
            "shard-outside",
            |at| {
                fs::rename(at.join("model.safetensors"), at.with_extension("safetensors")).unwrap();
                let index = json!({ "weight_map": { "model.norm.weight": "../shard-outside.safetensors" } });
                fs::write(at.join("model.safetensors.index.json"), index.to_string()).unwrap();
            },
            &[ErrorCode::ModelCorrupt],
        ),
    ];
    for &(name, change, codes) in cases {
        let model = folder(&cluster, name, change);
        // Damage is found before anything large is read: a second each, five on a busy machine.
        let began = std::time::Instant::now();
        let out = cluster.rbee(&["infer", "-m", &model, "-p", "x", "--json"]);
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "{name}: {:?}", began.elapsed());
        let error = out.json_lines().pop().unwrap_or_default();
        let error = error.get("error").cloned().unwrap_or(error);
        let code: ErrorCode = serde_json::from_value(error["code"].clone()).unwrap_or(ErrorCode::Unknown);
        assert!(codes.contains(&code), "{name}: {error} {}", out.stderr);
        assert_eq!(out.code, i32::from(code.exit_code()), "{name}: {}", out.stderr);
        assert!(error["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{name}: no hint: {error}");
        assert!(out.stderr.contains("hint:"), "{name}: {}", out.stderr);
        assert!(error["message"].as_str().is_some_and(|text| text.len() > 20), "{name}: says too little: {error}");
    }
    still_serves(&cluster);
    let told = chatter.rest();
    assert_eq!(told.tokens().len(), 1899, "the answer that ran all the while is whole");
    let now = cluster.serving(2);
    let ids = |workers: &[rbee_wire::view::WorkerView]| {
        let mut ids: Vec<String> = workers.iter().map(|worker| worker.worker_id.to_string()).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&now), ids(&workers), "the workers that served serve on");
}

#[test]
fn a_model_without_a_template_takes_the_prompt_as_it_is_and_refuses_messages() {
    let cluster = Setup::real().home();
    let model = folder(&cluster, "plain", |at| {
        edit(&at.join("tokenizer_config.json"), |config| {
            config.as_object_mut().unwrap().remove("chat_template");
        });
    });
    let args = ["infer", "-m", &model, "-p", "Once upon a time", "--temperature", "0", "--max-tokens", "4"];
    assert!(cluster.rbee(&args).exits(0).stdout.starts_with(", there was"));
    let chat = with(
        json!({ "operation": "infer", "model": model }),
        json!({
            "messages": [{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "yes" }, { "role": "user", "content": "so" }],
            "max_tokens": 4,
        }),
    );
    let told = cluster.job(&chat);
    // Said aloud, one way or the other: refused, or a note that there is no template.
    let noted = told.said.iter().any(|said| matches!(said.event, rbee_wire::Event::Note { .. }));
    assert!(noted || told.error().code == ErrorCode::TemplateError, "{told:#?}");
}
