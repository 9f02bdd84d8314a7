//! Every architecture against transformers in f32, on small random models with awkward settings
//! (`tests/fixtures/families.py`), and bugs that the comparison must see.

use std::fs;
use std::path::{Path, PathBuf};

use rbee_models::{KvType, ModelFiles, Quantize, RunnerOptions, inspect};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::reference::{ROUNDED, TOLERANCE, fixtures};
use crate::support::{argmax, blocks, exact, followed, logits, runner, tinybee, with_kv};

#[derive(Deserialize)]
pub struct Golden {
    pub cases: Vec<Case>,
}

#[derive(Deserialize)]
pub struct Case {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
    /// Leading greedy tokens before the reference's two best come closer than 1e-3.
    clear: usize,
    /// After the prompt.
    logits: Vec<f32>,
    /// After all but the last greedy token.
    last: Vec<f32>,
}

pub fn all() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(fixtures().join("models")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 25, "{} fixtures", folders.len());
    folders
}

/// What transformers says of a fixture.
pub fn golden(fixture: &Path) -> Golden {
    serde_json::from_slice(&fs::read(fixture.join("golden.json")).unwrap()).unwrap()
}

/// The largest error of any logit, and how many of the clear tokens are wrong.
fn compare(model: &Path, fixture: &Path, options: RunnerOptions) -> (f32, usize) {
    let golden = golden(fixture);
    let mut runner = runner(model, &RunnerOptions { threads: 2, slots: 1, ..options });
    let (mut worst, mut wrong) = (0f32, 0);
    for case in &golden.cases {
        assert!(case.clear >= 40 && case.greedy.len() == 64);
        let rows = followed(&mut runner, &case.prompt, &case.greedy);
        for (got, want) in [(&rows[0], &case.logits), (&rows[63], &case.last)] {
            assert_eq!(got.len(), want.len());
            worst = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(worst, f32::max);
        }
        wrong += rows.iter().zip(&case.greedy).take(case.clear).filter(|(row, want)| argmax(row) != **want).count();
    }
    (worst, wrong)
}

#[test]
fn every_architecture_agrees_with_the_reference() {
    for fixture in all() {
        for (options, tolerance) in [(exact(), TOLERANCE), (with_kv(KvType::F32), ROUNDED)] {
            let (worst, wrong) = compare(&fixture, &fixture, options);
            assert!(worst <= tolerance && wrong == 0, "{}: error {worst}, {wrong} tokens differ", fixture.display());
        }
    }
}

/// Alone, in chunks, on other threads, on another instruction set, in each type of KV: a row's logits are the same bits.
#[test]
fn rows_of_every_architecture_depend_on_their_own_text_alone() {
    for fixture in all() {
        let golden = golden(&fixture);
        let tokens: Vec<u32> = golden.cases[1].prompt.iter().chain(&golden.cases[1].greedy).copied().collect();
        for (kv, quantize) in [
            (KvType::F32, None),
            (KvType::F16, Some(Quantize::Q8_0)),
            (KvType::Bf16, None),
            (KvType::Q8_0, Some(Quantize::Q4K)),
        ] {
            let options = RunnerOptions { slots: 2, quantize, ..with_kv(kv) };
            let want = logits(&mut runner(&fixture, &options), &tokens, &[], &blocks(0, 1, tokens.len()));
            for (threads, isa, cuts) in
                [(1, None, &[1; 110][..]), (3, Some("avx2"), &[17, 1, 40]), (2, Some("scalar"), &[63])]
            {
                let options = RunnerOptions { threads, isa: isa.map(str::to_owned), ..options.clone() };
                let got = logits(&mut runner(&fixture, &options), &tokens, cuts, &blocks(3, 1, tokens.len()));
                assert!(got == want, "{}: {kv:?}, {threads} threads, {isa:?}", fixture.display());
            }
        }
    }
}

/// What `inspect` says of a folder is what its load takes.
#[test]
fn the_bytes_needed_are_those_taken() {
    for fixture in all().into_iter().chain([tinybee()]) {
        for (kv, quantize) in
            [(KvType::F32, None), (KvType::Bf16, Some(Quantize::Q4K)), (KvType::Q8_0, Some(Quantize::Q8_0))]
        {
            let files = ModelFiles::folder(&fixture).unwrap();
            let options = RunnerOptions { slots: 3, context: Some(200), quantize, ..with_kv(kv) };
            let needs = inspect(&files, &options).unwrap();
            let (weights, store) = runner(&fixture, &options).held();
            for (said, taken) in [(needs.weights, weights), (needs.kv, store)] {
                assert!(said.abs_diff(taken) * 20 <= taken, "{}: {said} said, {taken} taken", fixture.display());
            }
        }
    }
}

/// The fixture's folder with a changed config, and the tensors that `blank` names set to ones.
pub fn changed(fixture: &Path, change: &Value, blank: Option<&str>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(fixture).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    merge(&mut config, change);
    fs::write(&path, config.to_string()).unwrap();
    if let Some(part) = blank {
        blank_norms(&folder.path().join("model.safetensors"), part);
    }
    folder
}

fn merge(into: &mut Value, change: &Value) {
    for (key, value) in change.as_object().unwrap() {
        match (into.get_mut(key), value) {
            (Some(inner @ Value::Object(_)), Value::Object(_)) => merge(inner, value),
            _ => into[key] = value.clone(),
        }
    }
}

/// Sets the bf16 tensors whose name holds `part` to one (or to zero, where one is added).
fn blank_norms(path: &Path, part: &str) {
    let mut bytes = fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let mut found = 0;
    for (name, info) in header.as_object().unwrap() {
        if name.contains(part) {
            assert_eq!(info["dtype"], "BF16", "{name}");
            let at = |i: usize| 8 + len + info["data_offsets"][i].as_u64().unwrap() as usize;
            for value in bytes[at(0)..at(1)].chunks_exact_mut(2) {
                value.copy_from_slice(&[0x80, 0x3f]);
            }
            found += 1;
        }
    }
    assert!(found > 0, "no tensor is called {part}");
    fs::write(path, bytes).unwrap();
}

#[test]
fn deliberate_bugs_are_seen() {
    let none = json!({});
    for (name, change, blank) in [
        ("llama2-mha", json!({ "rope_theta": 11000.0 }), None),
        ("llama2-mha", json!({ "rms_norm_eps": 1e-4 }), None),
        ("llama-yarn", json!({ "rope_scaling": { "factor": 2.0 } }), None),
        ("llama-yarn", json!({ "rope_scaling": { "attention_factor": 1.0 } }), None),
        ("llama-yarn", json!({ "rope_scaling": { "beta_fast": 4 } }), None),
        ("llama-yarn", json!({ "rope_scaling": { "truncate": false } }), None),
        ("mistral-window", json!({ "sliding_window": 17 }), None),
        ("mistral-window", json!({ "sliding_window": 15 }), None),
        ("mistral-window", none.clone(), Some("post_attention_layernorm")),
        ("mistral-full", json!({ "rope_theta": 10000.0 }), None),
        ("qwen2-tied", json!({ "use_sliding_window": true }), None),
        ("qwen2-window", json!({ "sliding_window": 17 }), None),
        ("qwen2-window", json!({ "layer_types": null, "max_window_layers": 1 }), None),
        ("qwen3", json!({ "rope_theta": 10000.0 }), None),
        ("qwen3", none.clone(), Some("q_norm")),
        ("qwen3", none.clone(), Some("k_norm")),
        ("qwen3-yarn", json!({ "sliding_window": 17 }), None),
        ("qwen3-yarn", json!({ "layer_types": null, "max_window_layers": 2 }), None),
        ("qwen3-yarn", json!({ "rope_parameters": { "attention_factor": null } }), None),
        ("qwen3-yarn", none.clone(), Some("k_norm")),
        ("qwen3-moe", json!({ "norm_topk_prob": false }), None),
        ("qwen3-moe", json!({ "num_experts_per_tok": 3 }), None),
        ("qwen3-moe-sparse", json!({ "norm_topk_prob": true }), None),
        ("mixtral", json!({ "num_experts_per_tok": 1 }), None),
        ("mixtral", json!({ "sliding_window": 17 }), None),
        ("mixtral-tied", json!({ "num_experts_per_tok": 2 }), None),
        ("mixtral-tied", json!({ "num_experts_per_tok": 4 }), None),
        ("mixtral-tied", json!({ "sliding_window": 16 }), None),
        ("mixtral-tied", json!({ "rope_parameters": { "rope_theta": 1_000_000.0 } }), None),
        ("phi3-window", json!({ "sliding_window": 17 }), None),
        ("phi3-window", json!({ "rope_theta": 20000.0 }), None),
        ("phi4-short", json!({ "rope_scaling": { "attention_factor": 1.0 } }), None),
        ("phi4-short", json!({ "original_max_position_embeddings": 6 }), None),
        ("phi4-long", json!({ "original_max_position_embeddings": 200 }), None),
        ("gemma2-low-caps", json!({ "query_pre_attn_scalar": 20 }), None),
        (
            "gemma2-low-caps",
            json!({ "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"] }),
            None,
        ),
        ("gemma2-low-caps", none.clone(), Some("post_feedforward_layernorm")),
        ("gemma2-low-caps", none.clone(), Some("post_attention_layernorm")),
        ("gemma2-low-caps", json!({ "attn_logit_softcapping": null }), None),
        ("gemma2-low-caps", json!({ "final_logit_softcapping": null }), None),
        ("gemma2-high-caps", json!({ "attn_logit_softcapping": 50.0 }), None),
        ("gemma2-high-caps", json!({ "final_logit_softcapping": 30.0 }), None),
        ("gemma2-high-caps", json!({ "layer_types": ["full_attention", "sliding_attention", "full_attention"] }), None),
        ("gemma2-high-caps", none.clone(), Some("pre_feedforward_layernorm")),
        ("gemma3-pattern", json!({ "sliding_window_pattern": 2 }), None),
        ("gemma3-pattern", json!({ "rope_local_base_freq": 1_000_000 }), None),
        ("gemma3-pattern", json!({ "rope_scaling": { "factor": 1.0 } }), None),
        ("gemma3-layers", json!({ "rope_parameters": { "sliding_attention": { "rope_theta": 1_000_000.0 } } }), None),
        ("smollm3-interval", json!({ "no_rope_layer_interval": 4 }), None),
        ("smollm3-list", json!({ "sliding_window": 17 }), None),
        ("olmo2", json!({ "rope_theta": 10000 }), None),
        ("olmo2", none.clone(), Some("q_norm")),
        ("olmo2", none.clone(), Some("post_feedforward_layernorm")),
        ("olmo2-yarn", json!({ "rope_parameters": { "mscale": null } }), None),
        ("olmo2-yarn", json!({ "rope_parameters": { "truncate": true } }), None),
        ("olmo2-yarn", none.clone(), Some("k_norm")),
        ("olmo2-yarn", none.clone(), Some("post_attention_layernorm")),
        ("granite", json!({ "residual_multiplier": 1.0 }), None),
        ("granite", json!({ "embedding_multiplier": 1.0 }), None),
        ("granite", json!({ "attention_multiplier": 0.3 }), None),
        ("granite", json!({ "logits_scaling": 1.0 }), None),
        ("granite-bias", json!({ "attention_multiplier": 0.2 }), None),
        ("granite-bias", json!({ "logits_scaling": 0.625 }), None),
        ("granite-bias", json!({ "rope_scaling": { "low_freq_factor": 2.0 } }), None),
        ("granite-bias", none.clone(), Some("post_attention_layernorm")),
    ] {
        let fixture = fixtures().join("models").join(name);
        let (worst, _) = compare(changed(&fixture, &change, blank).path(), &fixture, exact());
        assert!(worst > 10.0 * TOLERANCE, "{name}: {change} {blank:?} moves the logits by {worst} only");
    }
}
