//! The decoder on a GPU against the one on the CPU, which is held against transformers elsewhere. Without a GPU each test says so.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rbee_engine::StepCounter;
use rbee_engine::runner::{Chunk, Logits, ModelRunner, StepBatch, Wanted};
use rbee_models::{
    CudaRunner, Error, KvType, ModelFiles, Quantize, RunnerOptions, Which, inspect_cuda, load, load_cuda,
};
use serde_json::json;

use crate::families::{all, changed, golden};
use crate::support::{argmax, blocks, exact, followed, logits, options, runner, tinybee, with_kv};

/// Root of the mean square of the errors of a row of logits, as a part of that of the row: bf16 keeps 8 bits of every
/// activation. The random weights of the fixtures make more of it than those of trained models.
const TOLERANCE: f32 = 0.03;

/// One test at a time: some measure the GPU's memory.
static ALONE: Mutex<()> = Mutex::new(());

struct Held {
    runner: CudaRunner,
    _alone: MutexGuard<'static, ()>,
}

fn on_gpu(folder: &Path, options: &RunnerOptions) -> Result<CudaRunner, Error> {
    let files = ModelFiles::folder(folder).unwrap();
    load_cuda(&files, &Which::Number(0), options, &StepCounter::default(), &|_, _| ())
}

/// A model on the GPU, or the reason why there is none.
fn gpu(test: &str, folder: &Path, options: &RunnerOptions) -> Option<Held> {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match on_gpu(folder, options) {
        Err(Error::Device(reason)) => {
            assert!(reason.contains("no NVIDIA driver") || reason.contains("no GPU"), "{reason}");
            eprintln!("{test} is skipped: {reason}");
            None
        }
        other => Some(Held { runner: other.unwrap(), _alone: alone }),
    }
}

fn one() -> RunnerOptions {
    RunnerOptions { slots: 1, ..options() }
}

fn size(values: impl Iterator<Item = f32>) -> f32 {
    values.map(|value| value * value).sum::<f32>().sqrt()
}

/// The errors of all rows, as parts of their lengths, ascending, and how many tokens differ where the two likeliest are well
/// apart.
fn compare(fixture: &Path, runner: &mut CudaRunner) -> (Vec<f32>, usize) {
    let mut reference = crate::support::runner(fixture, &RunnerOptions { slots: 1, ..exact() });
    let (mut errors, mut wrong) = (Vec::new(), 0);
    for case in golden(fixture).cases {
        let want = followed(&mut reference, &case.prompt, &case.greedy);
        let got = followed(runner, &case.prompt, &case.greedy);
        for (got, want) in got.iter().zip(&want) {
            let off = size(got.iter().zip(want).map(|(got, want)| got - want));
            errors.push(off / size(want.iter().copied()));
            let mut order: Vec<f32> = want.clone();
            order.sort_by(|a, b| b.total_cmp(a));
            let apart = order[0] - order[1] > 8.0 * off / (want.len() as f32).sqrt();
            wrong += usize::from(apart && argmax(got) != argmax(want));
        }
    }
    errors.sort_by(f32::total_cmp);
    (errors, wrong)
}

#[test]
fn every_architecture_agrees_with_the_cpu() {
    let test = "every_architecture_agrees_with_the_cpu";
    for fixture in all() {
        let Some(mut held) = gpu(test, &fixture, &one()) else { return };
        let (errors, wrong) = compare(&fixture, &mut held.runner);
        // Where two experts are nearly as good, the router may take the other: such rows, few of them, are other sums.
        let sound = errors.iter().filter(|error| **error <= TOLERANCE).count();
        let least = if fixture.display().to_string().contains("moe") { errors.len() * 9 / 10 } else { errors.len() };
        let (median, worst) = (errors[errors.len() / 2], errors[errors.len() - 1]);
        eprintln!("{}: error {median:.4}, at most {worst:.4}", fixture.file_name().unwrap().display());
        assert!(sound >= least && wrong == 0, "{}: {errors:?}, {wrong} tokens differ", fixture.display());
    }
}

/// A deliberate bug of each kind is seen.
#[test]
fn deliberate_bugs_are_seen_on_the_gpu() {
    let none = json!({});
    for (name, change, blank) in [
        ("llama2-mha", json!({ "rope_theta": 20000.0 }), None),
        ("mistral-window", json!({ "sliding_window": 15 }), None),
        ("qwen3", none.clone(), Some("q_norm")),
        ("qwen3", none.clone(), Some("k_norm")),
        ("olmo2", none.clone(), Some("k_norm")),
        ("olmo2", none.clone(), Some("post_feedforward_layernorm")),
        ("gemma2-low-caps", none.clone(), Some("post_attention_layernorm")),
        ("gemma2-low-caps", json!({ "attn_logit_softcapping": null }), None),
        ("gemma2-low-caps", json!({ "final_logit_softcapping": null }), None),
        ("phi4-long", json!({ "original_max_position_embeddings": 200 }), None),
        ("smollm3-interval", json!({ "no_rope_layer_interval": 4 }), None),
        ("granite", json!({ "residual_multiplier": 1.0 }), None),
        ("granite", json!({ "embedding_multiplier": 1.0 }), None),
        ("granite", json!({ "attention_multiplier": 0.3 }), None),
        ("granite", json!({ "logits_scaling": 1.0 }), None),
        ("mixtral", json!({ "num_experts_per_tok": 1 }), None),
        ("qwen3-moe-sparse", json!({ "norm_topk_prob": true }), None),
    ] {
        let fixture = crate::reference::fixtures().join("models").join(name);
        let folder = changed(&fixture, &change, blank);
        let Some(mut held) = gpu("deliberate_bugs_are_seen_on_the_gpu", folder.path(), &one()) else { return };
        let (errors, _) = compare(&fixture, &mut held.runner);
        drop(held);
        let Some(mut sound) = gpu("deliberate_bugs_are_seen_on_the_gpu", &fixture, &one()) else { return };
        let (usual, _) = compare(&fixture, &mut sound.runner);
        let (worst, usual) = (errors[errors.len() - 1], usual[usual.len() - 1]);
        assert!(worst > 2.0 * usual, "{name}: {change} {blank:?} moves the logits by {worst}, no change by {usual}");
    }
}

/// Alone, in chunks, token by token, among others: a row's logits are the same bits.
#[test]
fn rows_depend_on_their_own_text_alone_on_the_gpu() {
    for fixture in all().into_iter().chain([tinybee()]) {
        let options = RunnerOptions { slots: 8, ..options() };
        let Some(mut held) = gpu("rows_depend_on_their_own_text_alone_on_the_gpu", &fixture, &options) else { return };
        let runner = &mut held.runner;
        let vocab = runner.limits().vocab as u32;
        let text = |seed: u32| -> Vec<u32> { (0..110).map(|i| (i * 37 + seed * 101 + i * i * seed) % vocab).collect() };
        let texts: Vec<Vec<u32>> = (0..8).map(text).collect();
        let tables: Vec<_> = (0..8).map(|i| blocks(i, 8, 110)).collect();
        let want: Vec<Vec<f32>> =
            texts.iter().zip(&tables).map(|(text, table)| logits(runner, text, &[], table)).collect();
        let again = logits(runner, &texts[0], &[1; 110], &tables[3]);
        assert!(again == want[0], "{}: token by token", fixture.display());
        let again = logits(runner, &texts[1], &[17, 1, 40], &tables[3]);
        assert!(again == want[1], "{}: in chunks", fixture.display());
        // The last nine as guesses are checked, wrong ones before them: more rows than there are slots.
        let guesses = |runner: &mut _, tokens: &[u32]| {
            let mut out = Logits::default();
            let regime = ModelRunner::regime(runner, 110);
            let chunk = Chunk { tokens, start: 101, blocks: &tables[3], regime, wanted: Wanted::LogitsOfAll };
            ModelRunner::step(runner, &StepBatch { chunks: vec![chunk] }, &mut out).unwrap();
            out
        };
        logits(runner, &texts[2][..101], &[], &tables[3]);
        guesses(runner, &[1; 9]);
        let out = guesses(runner, &texts[2][101..]);
        assert!(out.rows() == 9 && out.row(8) == want[2], "{}: after guesses", fixture.display());
        for (row, end) in (102..110).enumerate() {
            let want = logits(runner, &texts[2][..end], &[], &tables[3]);
            assert!(out.row(row) == want, "{}: guess {row}", fixture.display());
        }
        // All of them decode side by side, and each ends at another time, so that batches of every size are recorded.
        for ends in [[110, 110, 110, 110, 110, 110, 110, 110], [110, 109, 108, 107, 106, 105, 104, 103]] {
            let mut out = Logits::default();
            for (text, table) in texts.iter().zip(&tables) {
                let chunk = Chunk {
                    tokens: &text[..90],
                    start: 0,
                    blocks: table,
                    regime: runner.regime(110),
                    wanted: Wanted::Nothing,
                };
                runner.step(&StepBatch { chunks: vec![chunk] }, &mut out).unwrap();
            }
            for at in 90..110 {
                let regime = runner.regime(110);
                let still: Vec<usize> = (0..8).filter(|i| at < ends[*i]).collect();
                let chunk = |i: &usize| Chunk {
                    tokens: &texts[*i][at..=at],
                    start: at,
                    blocks: &tables[*i],
                    regime,
                    wanted: Wanted::Logits,
                };
                runner.step(&StepBatch { chunks: still.iter().map(chunk).collect() }, &mut out).unwrap();
                for (row, i) in still.iter().enumerate().filter(|(_, i)| at == 109 && ends[**i] == 110) {
                    assert!(out.row(row) == want[*i], "{}: {i} among {}", fixture.display(), still.len());
                }
            }
        }
    }
}

/// Hidden states are those of the CPU, whatever shares the step, and more rows than fit a step are computed all the same.
#[test]
fn hidden_states_and_long_prompts_agree_with_the_cpu() {
    let folder = tinybee();
    let Some(mut held) = gpu("hidden_states_and_long_prompts_agree_with_the_cpu", &folder, &options()) else { return };
    let mut reference = runner(&folder, &with_kv(KvType::F32));
    let context = reference.limits().context;
    let text: Vec<u32> = (0..context as u32).map(|i| (i * 37 + i * i) % 2048).collect();
    let tables = [blocks(0, 2, context), blocks(1, 2, 40)];
    let run = |runner: &mut dyn ModelRunner| {
        let mut out = runner.logits();
        let regime = runner.regime(1);
        let chunk = |tokens, blocks, wanted| Chunk { tokens, start: 0, blocks, regime, wanted };
        let chunks =
            vec![chunk(&text[..], &tables[0], Wanted::Logits), chunk(&text[3..43], &tables[1], Wanted::Hidden)];
        runner.step(&StepBatch { chunks }, &mut out).unwrap();
        (out.row(0).to_vec(), out.hidden().map(<[f32]>::to_vec).collect::<Vec<_>>())
    };
    let ((got, states), (want, wanted)) = (run(&mut held.runner), run(&mut reference));
    let off = |got: &[f32], want: &[f32]| {
        size(got.iter().zip(want).map(|(got, want)| got - want)) / size(want.iter().copied())
    };
    assert!(off(&got, &want) < TOLERANCE, "{}", off(&got, &want));
    assert_eq!(states.len(), 40);
    for (got, want) in states.iter().zip(&wanted) {
        assert!(off(got, want) < TOLERANCE, "{}", off(got, want));
    }
}

#[test]
fn the_bytes_needed_on_the_gpu_are_those_taken() {
    for fixture in all().into_iter().chain([tinybee()]) {
        let options = RunnerOptions { slots: 3, context: Some(200), ..options() };
        let needs = inspect_cuda(&ModelFiles::folder(&fixture).unwrap(), &options).unwrap();
        let Some(held) = gpu("the_bytes_needed_on_the_gpu_are_those_taken", &fixture, &options) else { continue };
        assert_eq!((needs.weights, needs.kv), held.runner.held(), "{}", fixture.display());
        assert_eq!(held.runner.about().needs, needs);
    }
}

#[test]
fn what_does_not_fit_the_gpu_is_refused_with_the_numbers() {
    let test = "what_does_not_fit_the_gpu_is_refused_with_the_numbers";
    let Some(Held { runner, _alone }) = gpu(test, &tinybee(), &options()) else { return };
    let taken = runner.taken();
    drop(runner);
    let huge = RunnerOptions { slots: 50_000_000, ..options() };
    match on_gpu(&tinybee(), &huge) {
        Err(Error::OutOfMemory { need, free }) => assert!(need > free),
        other => panic!("{:?}", other.map(|_| ())),
    }
    let again = on_gpu(&tinybee(), &options()).unwrap();
    assert!(again.taken().abs_diff(taken) <= 64 << 20, "{taken} bytes, then {}", again.taken());
    // The driver gives memory in pages of 2 MiB.
    let needs = again.about().needs;
    assert!(taken >= needs.weights + needs.kv && taken <= needs.total + (64 << 20), "{taken} taken, {needs:?}");
    let fixture = crate::reference::fixtures().join("models/llama-yarn");
    let damaged = changed(&fixture, &json!({}), None);
    damage(&damaged.path().join("model.safetensors"));
    let error = on_gpu(damaged.path(), &one()).err().unwrap();
    assert!(error.to_string().contains("not numbers"), "{error}");
}

/// Makes the last weight infinite.
fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let end = bytes.len() - 2;
    bytes[end..].copy_from_slice(&0x7f80u16.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn options_that_the_gpu_has_no_kernels_for_are_refused_by_name() {
    let files = ModelFiles::folder(&tinybee()).unwrap();
    for (options, name) in [
        (with_kv(KvType::Q8_0), "KV"),
        (with_kv(KvType::F32), "KV"),
        (RunnerOptions { quantize: Some(Quantize::Q8_0), ..options() }, "fewer bits"),
    ] {
        let error = inspect_cuda(&files, &options).unwrap_err();
        assert!(matches!(&error, Error::Option(text) if text.contains(name)), "{error}");
    }
    assert!(inspect_cuda(&files, &with_kv(KvType::Bf16)).is_ok());
    assert!(
        load(&files, &with_kv(KvType::Bf16), &StepCounter::default(), &|_, _| ()).is_ok(),
        "nor does the CPU's change"
    );
}
