//! Speed of the runner on a GPU over models of real shapes with random weights: `cargo xtask cuda gpu-check`.
//!
//! A step is what the engine asks for: its rows go to the GPU, and logits come back to this machine's memory. Settings are
//! measured in turn, round by round; each figure is the median of the rounds, beside a copy in the GPU's memory in the same
//! rounds. With a folder as argument the models stay there, for other programs to measure.

#![expect(clippy::unwrap_used, reason = "a bench that cannot measure ends")]

#[path = "support/random_model.rs"]
mod random_model;

use std::path::{Path, PathBuf};
use std::time::Instant;

use random_model::{Shape, median, write_model};
use rbee_cuda::{Buffer, Gpu};
use rbee_engine::StepCounter;
use rbee_engine::runner::{BlockId, Chunk, Logits, ModelRunner, Regime, StepBatch, Wanted};
use rbee_models::{CudaRunner, Error, ModelFiles, RunnerOptions, Which, load_cuda};

const SHAPES: [Shape; 2] = [
    Shape { name: "1.1b", sizes: [2048, 22, 32, 4, 64, 5632, 32_000], tied: false },
    Shape { name: "8b", sizes: [4096, 32, 32, 8, 128, 14_336, 128_256], tied: false },
];

/// Positions that a sequence has when it decodes.
const CONTEXT: usize = 1024;
const BATCHES: [usize; 6] = [1, 2, 8, 16, 32, 64];
const PROMPTS: [usize; 2] = [512, 4096];
const ROUNDS: usize = 9;

/// Tokens of one prompt in one step, as the worker has it.
const PREFILL_CHUNK: usize = 1024;

/// Values of the stretch that is copied.
const COPIED: usize = 1 << 30;

fn decode(runner: &mut CudaRunner, logits: &mut Logits, rows: usize) -> f64 {
    let tables: Vec<Vec<BlockId>> =
        (0..rows as u32).map(|i| (0..(CONTEXT / 16) as u32).map(|b| BlockId(i * 64 + b)).collect()).collect();
    let chunk =
        |blocks| Chunk { tokens: &[7], start: CONTEXT - 1, blocks, regime: Regime::Usual, wanted: Wanted::Logits };
    let batch = StepBatch { chunks: tables.iter().map(|table| chunk(&table[..])).collect() };
    let before = Instant::now();
    runner.step(&batch, logits).unwrap();
    before.elapsed().as_secs_f64() * 1e3
}

fn prefill(runner: &mut CudaRunner, logits: &mut Logits, len: usize) -> f64 {
    let tokens: Vec<u32> = (0..len as u32).map(|i| i * 37 % 30_000).collect();
    let blocks: Vec<BlockId> = (0..len.div_ceil(16) as u32).map(BlockId).collect();
    let before = Instant::now();
    for (i, tokens) in tokens.chunks(PREFILL_CHUNK).enumerate() {
        let start = i * PREFILL_CHUNK;
        let wanted = if start + tokens.len() == len { Wanted::Logits } else { Wanted::Nothing };
        let chunk = Chunk { tokens, start, blocks: &blocks, regime: Regime::Usual, wanted };
        runner.step(&StepBatch { chunks: vec![chunk] }, logits).unwrap();
    }
    before.elapsed().as_secs_f64() * 1e3
}

fn measure(folder: &Path, shape: &Shape) -> Result<(), Error> {
    let [hidden, layers, heads, kv_heads, dim, mlp, vocab] = shape.sizes;
    let options = RunnerOptions {
        threads: 1,
        slots: 64,
        context: Some(4224),
        kv_bytes: None,
        kv_type: None,
        quantize: None,
        exact: false,
        isa: None,
    };
    let (files, before) = (ModelFiles::folder(folder)?, Instant::now());
    let mut runner = load_cuda(&files, &Which::Number(0), &options, &StepCounter::default(), &|_, _| ())?;
    let loaded = before.elapsed().as_secs_f64();
    let gpu = Gpu::open(&Which::Number(0))?;
    let source: Buffer<u16> = gpu.zeroed(COPIED)?;
    let mut target = gpu.zeroed(COPIED)?;
    let mut logits = runner.logits();
    let (mut steps, mut prompts, mut copies) =
        (vec![Vec::new(); BATCHES.len()], vec![Vec::new(); PROMPTS.len()], Vec::new());
    // The first round records steps, and is not counted.
    for round in 0..=ROUNDS {
        let copy = f64::from(gpu.time(|| gpu.copy(&source, &mut target))?);
        let decoded = BATCHES.map(|rows| decode(&mut runner, &mut logits, rows));
        let prefilled = PROMPTS.map(|len| prefill(&mut runner, &mut logits, len));
        if round > 0 {
            copies.push(copy);
            steps.iter_mut().zip(decoded).for_each(|(all, ms)| all.push(ms));
            prompts.iter_mut().zip(prefilled).for_each(|(all, ms)| all.push(ms));
        }
    }
    // A copy reads and writes.
    let rate = 4.0 * COPIED as f64 / median(copies);
    let (weights, _) = runner.held();
    let name = shape.name;
    println!("{name}: {} MiB of weights, loaded in {loaded:.1} s, copies at {:.2} TB/s\n", weights >> 20, rate / 1e9);
    println!(
        "| shape | batch | ms a step | of copy bandwidth | tokens a second | over batch 1 |\n|---|---|---|---|---|---|"
    );
    let steps: Vec<f64> = steps.into_iter().map(median).collect();
    // The embedding is not read as a whole.
    let read = weights as usize - 2 * vocab * hidden;
    let kv = 4 * layers * CONTEXT * kv_heads * dim;
    for (rows, ms) in BATCHES.into_iter().zip(&steps) {
        println!(
            "| {name} | {rows} | {ms:.2} | {:.2} | {:.0} | {:.1} |",
            (read + rows * kv) as f64 / ms / rate,
            rows as f64 / ms * 1e3,
            rows as f64 * steps[0] / ms
        );
    }
    println!("\n| shape | prompt | ms | tokens a second | TFLOP/s |\n|---|---|---|---|---|");
    let matrices = layers * (hidden * (heads + 2 * kv_heads) * dim + hidden * heads * dim + 3 * hidden * mlp);
    for (len, all) in PROMPTS.into_iter().zip(prompts) {
        let ms = median(all);
        // Each position attends to half the prompt on average, twice: scores and values.
        let work = 2.0 * len as f64 * matrices as f64 + 2.0 * (len * len * layers * heads * dim) as f64;
        println!("| {name} | {len} | {ms:.1} | {:.0} | {:.0} |", len as f64 / ms * 1e3, work / ms / 1e9);
    }
    println!();
    Ok(())
}

fn main() {
    let gpu = match Gpu::open(&Which::Number(0)) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("nothing is measured: {error}");
            std::process::exit(1);
        }
    };
    println!("{}; decode at position {CONTEXT}; each figure the median of {ROUNDS} rounds\n", gpu.name());
    drop(gpu);
    let kept = std::env::args().skip(1).find(|arg| arg != "--bench").map(PathBuf::from);
    for shape in SHAPES {
        let own = tempfile::tempdir().unwrap();
        let folder = kept.as_ref().map_or_else(|| own.path().to_owned(), |kept| kept.join(shape.name));
        std::fs::create_dir_all(&folder).unwrap();
        write_model(&folder, &shape);
        if let Err(error) = measure(&folder, &shape) {
            println!("{} is not measured: {error}", shape.name);
            std::process::exit(1);
        }
    }
}
