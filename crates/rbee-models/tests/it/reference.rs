//! Logits and greedy tokens are those of transformers in f32 (`tests/fixtures/make_reference.py`).

use std::path::{Path, PathBuf};

use rbee_models::{KvType, RunnerOptions};
use serde::Deserialize;

use crate::support::{blocks, exact, greedy, logits, runner, tinybee, with_kv};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    logits: Vec<f32>,
}

pub fn fixtures() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    // Elsewhere where the test program has been carried to another machine.
    std::env::var_os("RBEE_FIXTURES").map_or_else(beside, PathBuf::from)
}

fn golden(path: &Path) -> Golden {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The largest error of a logit that is left over from other orders of summation.
pub const TOLERANCE: f32 = 1e-4;

/// The largest error where weights of bf16 are multiplied with rounded activations. llama.cpp, which rounds them to bf16, has some
/// 0.05 on the same models.
pub const ROUNDED: f32 = 2e-3;

/// The largest error of any logit, and whether all greedy tokens are the reference's.
fn compare(folder: &Path, golden: &Golden, options: RunnerOptions) -> (f32, bool) {
    let mut runner = runner(folder, &RunnerOptions { threads: 2, ..options });
    let (mut worst, mut same) = (0f32, true);
    for case in &golden.cases {
        let got = logits(&mut runner, &case.prompt, &[5, 1, 40], &blocks(0, 1, case.prompt.len()));
        assert_eq!(got.len(), case.logits.len());
        worst = got.iter().zip(&case.logits).map(|(got, want)| (got - want).abs()).fold(worst, f32::max);
        same &= greedy(&mut runner, &case.prompt, case.greedy.len()).iter().eq(&case.greedy);
    }
    (worst, same)
}

fn check(folder: &Path, golden: &Golden) {
    for (options, tolerance) in [(exact(), TOLERANCE), (with_kv(KvType::F32), ROUNDED)] {
        let (worst, same) = compare(folder, golden, options);
        assert!(worst <= tolerance && same, "{}: error {worst}, tokens equal: {same}", folder.display());
    }
}

/// A fixture's folder with another config beside the same weights.
fn with_config(name: &str, config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixtures().join(name).join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

#[test]
fn tinybee_agrees_with_the_reference() {
    check(&tinybee(), &golden(&fixtures().join("tinybee.golden.json")));
}

#[test]
fn awkward_llamas_agree_with_the_reference_in_both_spellings_of_their_config() {
    for name in ["llama3-gqa", "linear-bias"] {
        let golden = golden(&fixtures().join(name).join("golden.json"));
        check(&fixtures().join(name), &golden);
        let legacy = std::fs::read_to_string(fixtures().join(name).join("config.legacy.json")).unwrap();
        check(with_config(name, &legacy).path(), &golden);
    }
}

#[test]
fn a_wrong_constant_is_seen_by_the_comparison() {
    for (name, right, wrong) in [
        ("llama3-gqa", r#""rope_theta":500000.0"#, r#""rope_theta":10000.0"#),
        ("llama3-gqa", r#""factor":8.0"#, r#""factor":4.0"#),
        ("llama3-gqa", r#""rms_norm_eps":1e-05"#, r#""rms_norm_eps":0.01"#),
        ("linear-bias", r#""factor":4.0"#, r#""factor":1.0"#),
    ] {
        let golden = golden(&fixtures().join(name).join("golden.json"));
        let config = std::fs::read_to_string(fixtures().join(name).join("config.json")).unwrap();
        assert!(config.contains(right));
        let (worst, _) = compare(with_config(name, &config.replace(right, wrong)).path(), &golden, exact());
        assert!(worst > 10.0 * TOLERANCE, "{name}: {wrong} moves the logits by {worst} only");
    }
}
