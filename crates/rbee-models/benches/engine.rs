//! Speed of the engine over a model of a real shape with random weights: `cargo xtask bench engine`.
//!
//! Times depend on shapes and types, not on the weights' values. Settings are measured in turn, round by round, so that
//! what else the machine does meets all of them alike; each figure is the median of the rounds.

#![expect(clippy::unwrap_used, reason = "a bench that cannot measure ends")]

#[path = "support/forms.rs"]
mod forms;
#[path = "support/random_model.rs"]
mod random_model;
#[path = "support/speculation.rs"]
mod speculation;

use std::time::{Duration, Instant};

use rbee_engine::runner::{BlockId, Chunk, Logits, ModelRunner, Regime, StepBatch, Wanted};
use rbee_engine::{
    Choice, Engine, EngineConfig, Goal, Output, OutputText, Piece, Pushed, Request, RequestId, Sampling, Speculation,
    StepCounter, TokenId,
};
use rbee_models::{CpuRunner, ModelFiles, RunnerOptions, load};

use random_model::{Shape, median, write_model};

const SHAPES: [Shape; 3] = [
    Shape { name: "135m", sizes: [576, 30, 9, 3, 64, 1536, 49152], tied: true },
    Shape { name: "360m", sizes: [960, 32, 15, 5, 64, 2560, 49152], tied: true },
    Shape { name: "1.1b", sizes: [2048, 22, 32, 4, 64, 5632, 32000], tied: true },
];

const BLOCK: usize = 16;

/// Positions of KV in all: what bounds batch times context.
const POSITIONS: usize = 1 << 16;

const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const CONTEXTS: [usize; 4] = [128, 512, 2048, 8192];

/// Tokens of one prompt in one step, as the worker has it.
const PREFILL_CHUNK: usize = 256;

fn step(runner: &mut CpuRunner, chunks: Vec<Chunk<'_>>) -> Duration {
    let mut logits = Logits::default();
    let before = Instant::now();
    runner.step(&StepBatch { chunks }, &mut logits).unwrap();
    before.elapsed()
}

/// Writes to every block, so that each has memory of its own.
fn touch(runner: &mut CpuRunner) {
    let all: Vec<[BlockId; 1]> = (0..(POSITIONS / BLOCK) as u32).map(|i| [BlockId(i)]).collect();
    for blocks in all.chunks(256) {
        let chunk = |blocks| Chunk { tokens: &[1], start: 0, blocks, regime: Regime::Usual, wanted: Wanted::Nothing };
        step(runner, blocks.iter().map(|blocks| chunk(&blocks[..])).collect());
    }
}

/// Steps of one token for each of so many sequences, each at the end of its context.
fn decode(runner: &mut CpuRunner, rounds: usize) {
    touch(runner);
    let settings: Vec<(usize, usize)> = CONTEXTS
        .iter()
        .flat_map(|context| BATCHES.iter().map(|batch| (*batch, *context)))
        .filter(|(batch, context)| batch * context <= POSITIONS)
        .collect();
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); settings.len()];
    for _ in 0..rounds {
        for ((batch, context), times) in settings.iter().zip(&mut times) {
            let blocks: Vec<Vec<BlockId>> = (0..*batch)
                .map(|i| (0..context / BLOCK).map(|b| BlockId((i * context / BLOCK + b) as u32)).collect())
                .collect();
            let chunks = blocks.iter().map(|blocks| Chunk {
                tokens: &[2],
                start: context - 1,
                blocks,
                regime: Regime::Usual,
                wanted: Wanted::Logits,
            });
            times.push(step(runner, chunks.collect()).as_secs_f64());
        }
    }
    println!("\nDecode, tokens a second of all sequences together:\n");
    println!("| context | {} |", BATCHES.map(|batch| format!("batch {batch}")).join(" | "));
    println!("|---|{}", "---|".repeat(BATCHES.len()));
    for context in CONTEXTS {
        let row = BATCHES.map(|batch| {
            let at = settings.iter().position(|setting| *setting == (batch, context));
            at.map_or_else(|| "-".to_owned(), |at| format!("{:.1}", batch as f64 / median(times[at].clone())))
        });
        println!("| {context} | {} |", row.join(" | "));
    }
}

struct NoText;

impl OutputText for NoText {
    fn push(&mut self, _: TokenId) -> Pushed {
        Pushed::default()
    }
    fn finish(&mut self) -> Piece {
        Piece::default()
    }
}

fn request(prompt: Vec<TokenId>, tokens: usize) -> Request {
    Request {
        prompt,
        goal: Goal::Answer,
        max_tokens: Some(tokens),
        min_tokens: 0,
        eos: Vec::new(),
        ignore_eos: true,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        logprobs: None,
        tenant: [0; 16],
        choices: vec![Choice { text: Box::new(NoText), constraint: None, resume: Vec::new() }],
    }
}

fn prompt(seed: usize, len: usize) -> Vec<TokenId> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729) % 30_000) as TokenId).collect()
}

/// One step of the engine, told its time: the tokens that came of it, and how long it took.
fn turn(engine: &mut Engine) -> (Vec<RequestId>, Duration) {
    let mut outputs = Vec::new();
    let before = Instant::now();
    engine.step(&mut outputs);
    let took = before.elapsed();
    engine.took(took);
    let token = |(id, output)| matches!(output, Output::Token { .. }).then_some(id);
    (outputs.into_iter().filter_map(token).collect(), took)
}

/// Time until a request has its first token, with nothing else to do.
fn first_token(engine: &mut Engine, prompt: Vec<TokenId>) -> f64 {
    let before = Instant::now();
    engine.submit(request(prompt, 1)).unwrap();
    while turn(engine).0.is_empty() {}
    before.elapsed().as_secs_f64()
}

fn prefill(engine: &mut Engine, rounds: usize) {
    println!("\nTime to first token, nothing else running:\n");
    println!("| prompt | miss | prefill | hit | ratio |\n|---|---|---|---|---|");
    for len in [128, 1024] {
        let (mut miss, mut hit) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let prompt = prompt(len + round, len);
            miss.push(first_token(engine, prompt.clone()));
            hit.push(first_token(engine, prompt));
        }
        let (miss, hit) = (median(miss), median(hit));
        println!(
            "| {len} | {:.0} ms | {:.0} tokens/s | {:.1} ms | {:.0} |",
            miss * 1e3,
            len as f64 / miss,
            hit * 1e3,
            miss / hit
        );
    }
}

/// Four streams run; a long prompt comes. Gaps between the tokens of a stream are whole steps.
fn gap(engine: &mut Engine) {
    const STREAMS: usize = 4;
    const LONG: usize = 4096;
    for i in 0..STREAMS {
        engine.submit(request(prompt(1000 + i, 32), 4000)).unwrap();
    }
    while turn(engine).0.len() < STREAMS {}
    let normal: Vec<f64> = (0..60).map(|_| turn(engine).1.as_secs_f64()).collect();
    let before = Instant::now();
    let long = engine.submit(request(prompt(2000, LONG), 1)).unwrap();
    let mut beside = Vec::new();
    loop {
        let (tokens, took) = turn(engine);
        beside.push(took.as_secs_f64());
        if tokens.contains(&long) {
            break;
        }
    }
    let waited = before.elapsed().as_secs_f64();
    let after: Vec<f64> = (0..60).map(|_| turn(engine).1.as_secs_f64()).collect();
    let normal = median([normal, after].concat());
    let steps = beside.len();
    let high = |share: f64| {
        let mut sorted = beside.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((steps - 1) as f64 * share) as usize]
    };
    println!("\nGap between the tokens of {STREAMS} streams while a prompt of {LONG} tokens joins them:\n");
    println!("| | normal | median | p95 | p99 | longest | ratio of medians | the prompt's first token | its prefill |");
    println!("|---|---|---|---|---|---|---|---|---|");
    println!(
        "| ms | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.2} | {:.0} | {:.0} tokens/s |",
        normal * 1e3,
        high(0.5) * 1e3,
        high(0.95) * 1e3,
        high(0.99) * 1e3,
        high(1.0) * 1e3,
        high(0.5) / normal,
        waited * 1e3,
        LONG as f64 / waited,
    );
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let flag = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)).cloned();
    let name = flag("--shape").unwrap_or_else(|| "360m".into());
    let rounds = flag("--rounds").map_or(5, |rounds| rounds.parse().unwrap());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let options = RunnerOptions {
        threads: flag("--threads").map_or(cores, |threads| threads.parse().unwrap()),
        slots: POSITIONS / 8192,
        context: Some(8192),
        kv_bytes: None,
        kv_type: flag("--kv-type").map(|kind| kind.parse().unwrap()),
        quantize: flag("--quantize").map(|form| form.parse().unwrap()),
        exact: std::env::var("RBEE_EXACT").is_ok_and(|exact| exact == "1"),
        isa: std::env::var("RBEE_ISA").ok(),
    };
    let shape = SHAPES.iter().find(|shape| shape.name == name).expect("--shape is 135m, 360m or 1.1b");
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), shape);
    let before = Instant::now();
    let files = ModelFiles::folder(folder.path()).unwrap();
    let mut runner = load(&files, &options, &StepCounter::default(), &|_, _| ()).unwrap();
    let (weights, _) = runner.held();
    println!(
        "llama of {name}, weights {} in {} MiB, KV {}, {} threads, {rounds} rounds; loaded in {:.1} s",
        flag("--quantize").unwrap_or_else(|| "bf16".into()),
        weights >> 20,
        flag("--kv-type").unwrap_or_else(|| "as usual".into()),
        options.threads,
        before.elapsed().as_secs_f64(),
    );
    if flag("--only").is_none() {
        decode(&mut runner, rounds);
    }
    let config = EngineConfig {
        slots: 8,
        step_tokens: 8 + PREFILL_CHUNK,
        prefill_chunk: PREFILL_CHUNK,
        queue: 8,
        // Figures are of steps without; with them, in a table of their own.
        speculation: Speculation::Off,
    };
    let mut engine = Engine::new(Box::new(runner), config).unwrap();
    let only = |name: &str| flag("--only").is_none_or(|only| only == name);
    if only("prefill") {
        prefill(&mut engine, rounds);
        gap(&mut engine);
    }
    if only("forms") {
        forms::forms(&mut engine, rounds);
    }
    if only("speculation") {
        speculation::speculation(&mut engine, rounds);
    }
}
