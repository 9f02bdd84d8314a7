//! Runners and greedy decoding for the tests.

use std::path::{Path, PathBuf};

use rbee_engine::StepCounter;
use rbee_engine::runner::{BlockId, Chunk, Logits, ModelRunner, StepBatch, Wanted};
use rbee_models::{CpuRunner, KvType, ModelFiles, RunnerOptions, load};

/// The repository's own model.
pub fn tinybee() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tinybee/model");
    // Elsewhere where the test program has been carried to another machine.
    std::env::var_os("RBEE_FIXTURES").map_or_else(beside, |folder| Path::new(&folder).join("tinybee"))
}

pub fn options() -> RunnerOptions {
    RunnerOptions {
        threads: 1,
        slots: 4,
        context: None,
        kv_bytes: None,
        kv_type: None,
        quantize: None,
        exact: false,
        isa: None,
    }
}

pub fn runner(folder: &Path, options: &RunnerOptions) -> CpuRunner {
    load(&ModelFiles::folder(folder).unwrap(), options, &StepCounter::default(), &|_, _| ()).unwrap()
}

/// All in f32: what a reference in f32 is compared with.
pub fn exact() -> RunnerOptions {
    RunnerOptions { exact: true, ..with_kv(KvType::F32) }
}

pub fn with_kv(kv_type: KvType) -> RunnerOptions {
    RunnerOptions { kv_type: Some(kv_type), ..options() }
}

/// Blocks `first`, `first + stride`, …: enough for `positions`.
pub fn blocks(first: u32, stride: u32, positions: usize) -> Vec<BlockId> {
    (0..positions.div_ceil(16) as u32).map(|i| BlockId(first + i * stride)).collect()
}

/// The last row's logits after computing `tokens` in chunks of these lengths (the rest in one).
pub fn logits(runner: &mut impl ModelRunner, tokens: &[u32], cuts: &[usize], blocks: &[BlockId]) -> Vec<f32> {
    let mut out = Logits::default();
    let mut start = 0;
    let mut cuts = cuts.iter().copied();
    while start < tokens.len() {
        let len = cuts.next().unwrap_or(usize::MAX).clamp(1, tokens.len() - start);
        let regime = runner.regime(tokens.len());
        let chunk = Chunk { tokens: &tokens[start..start + len], start, blocks, regime, wanted: Wanted::Logits };
        runner.step(&StepBatch { chunks: vec![chunk] }, &mut out).unwrap();
        start += len;
    }
    out.row(0).to_vec()
}

/// The likeliest token, ties to the lowest id.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (id, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = id;
        }
    }
    best as u32
}

/// The logits after a prompt's last token and after each of the tokens that follow it but the last, one step each.
pub fn followed(runner: &mut impl ModelRunner, prompt: &[u32], following: &[u32]) -> Vec<Vec<f32>> {
    let blocks = blocks(0, 1, prompt.len() + following.len());
    let regime = runner.regime(prompt.len());
    let tokens: Vec<u32> = prompt.iter().chain(following).copied().collect();
    let mut out = Logits::default();
    let ends = prompt.len()..tokens.len();
    let rows = ends.map(|end| {
        let start = if end == prompt.len() { 0 } else { end - 1 };
        let chunk = Chunk { tokens: &tokens[start..end], start, blocks: &blocks, regime, wanted: Wanted::Logits };
        runner.step(&StepBatch { chunks: vec![chunk] }, &mut out).unwrap();
        out.row(0).to_vec()
    });
    rows.collect()
}

/// Greedy continuation of a prompt, up to `n` tokens or an end token.
pub fn greedy(runner: &mut CpuRunner, prompt: &[u32], n: usize) -> Vec<u32> {
    let blocks = blocks(0, 1, prompt.len() + n);
    let regime = runner.regime(prompt.len());
    let mut out = Logits::default();
    let mut tokens = prompt.to_vec();
    let mut start = 0;
    while tokens.len() < prompt.len() + n {
        let chunk = Chunk { tokens: &tokens[start..], start, blocks: &blocks, regime, wanted: Wanted::Logits };
        runner.step(&StepBatch { chunks: vec![chunk] }, &mut out).unwrap();
        start = tokens.len();
        let next = argmax(out.row(0));
        tokens.push(next);
        if runner.about().eos.contains(&next) {
            break;
        }
    }
    tokens.split_off(prompt.len())
}
