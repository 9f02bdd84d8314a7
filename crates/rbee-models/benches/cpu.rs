//! Cases of CPU speed over a GGUF file, straight on the runner: the half of `cargo xtask bench cpu` that is ours.
//!
//! `cpu FILE --threads N [--chunk N] CASE...`, where a case is
//! - `prefill:P`: a prompt of so many tokens,
//! - `decode:TxC`: so many tokens after a context of C,
//! - `batch:TxB`: so many tokens in each of B sequences, after prompts of 32 tokens,
//! - `load:P`: the first prompt after the load, and a token.
//!
//! Prints for each a line of JSON with its tokens and seconds. As llama.cpp's benches do, the file is first warmed up by a step
//! of 16 tokens; each case but `load` runs twice, and the second time counts.

#![expect(clippy::unwrap_used, reason = "a bench that cannot measure ends")]

use std::path::Path;
use std::time::Instant;

use rbee_engine::runner::{BlockId, Chunk, Logits, ModelRunner, Regime, StepBatch, Wanted};
use rbee_engine::{StepCounter, TokenId};
use rbee_models::{CpuRunner, ModelFiles, RunnerOptions, load};
use serde_json::json;

/// Tokens of one prompt in one step, as the worker has it.
const PREFILL_CHUNK: usize = 256;

const BLOCK: usize = 16;

/// Positions that there is always room for.
const CONTEXT: usize = 2048;

/// Tokens of the prompts of a batch.
const PROMPT: usize = 32;

#[derive(Clone, Copy)]
enum Case {
    Prefill { tokens: usize },
    Decode { tokens: usize, context: usize },
    Batch { tokens: usize, sequences: usize },
    Load { tokens: usize },
}

impl Case {
    fn parse(text: &str) -> Option<Self> {
        let (kind, sizes) = text.split_once(':')?;
        let sizes: Vec<usize> = sizes.split('x').map(str::parse).collect::<Result<_, _>>().ok()?;
        match (kind, sizes.as_slice()) {
            ("prefill", &[tokens]) => Some(Self::Prefill { tokens }),
            ("decode", &[tokens, context]) => Some(Self::Decode { tokens, context }),
            ("batch", &[tokens, sequences]) => Some(Self::Batch { tokens, sequences }),
            ("load", &[tokens]) => Some(Self::Load { tokens }),
            _ => None,
        }
    }

    /// Positions of all its sequences together.
    fn positions(self) -> usize {
        match self {
            Self::Prefill { tokens } => tokens,
            Self::Decode { tokens, context } => tokens + context,
            Self::Batch { tokens, sequences } => sequences * (PROMPT + tokens).next_multiple_of(BLOCK),
            Self::Load { tokens } => tokens + 1,
        }
    }

    /// Tokens that are counted.
    fn tokens(self) -> usize {
        match self {
            Self::Prefill { tokens } | Self::Decode { tokens, .. } => tokens,
            Self::Batch { tokens, sequences } => tokens * sequences,
            Self::Load { tokens } => tokens + 1,
        }
    }
}

struct Session {
    runner: CpuRunner,
    logits: Logits,
    chunk: usize,
    prompt: Vec<TokenId>,
    blocks: Vec<BlockId>,
}

impl Session {
    fn open(file: &Path, options: &RunnerOptions, chunk: usize) -> Self {
        let files = ModelFiles::gguf(file).unwrap();
        let mut runner = load(&files, options, &StepCounter::default(), &|_, _| ()).unwrap();
        let (logits, limits) = (runner.logits(), runner.limits());
        assert_eq!(limits.block_size, BLOCK);
        let prompt = (0..limits.context).map(|i| ((i * 7919 + 104_729) % limits.vocab) as TokenId).collect();
        let blocks = (0..limits.kv_blocks as u32).map(BlockId).collect();
        Self { runner, logits, chunk, prompt, blocks }
    }

    fn step(&mut self, chunks: Vec<Chunk<'_>>) {
        self.runner.step(&StepBatch { chunks }, &mut self.logits).unwrap();
    }

    /// A prompt in the sequence that has the blocks from this one on.
    fn prefill(&mut self, first: usize, tokens: usize) {
        let (prompt, blocks) = (self.prompt.clone(), self.blocks.clone());
        for (i, part) in prompt[..tokens].chunks(self.chunk).enumerate() {
            let start = i * self.chunk;
            let wanted = if start + part.len() == tokens { Wanted::Logits } else { Wanted::Nothing };
            let blocks = &blocks[first..first + (start + part.len()).div_ceil(BLOCK)];
            self.step(vec![Chunk { tokens: part, start, blocks, regime: Regime::Usual, wanted }]);
        }
    }

    /// So many steps of a token in each sequence; these have their blocks one after the other.
    fn decode(&mut self, sequences: usize, context: usize, tokens: usize) {
        let each = (context + tokens).div_ceil(BLOCK);
        let (prompt, blocks) = (self.prompt.clone(), self.blocks.clone());
        for start in context..context + tokens {
            let chunk = |i: usize| Chunk {
                tokens: &prompt[start..=start],
                start,
                blocks: &blocks[i * each..(i + 1) * each],
                regime: Regime::Usual,
                wanted: Wanted::Logits,
            };
            self.step((0..sequences).map(chunk).collect());
        }
    }

    /// Seconds of what counts.
    fn run(&mut self, case: Case) -> f64 {
        let goes = if matches!(case, Case::Load { .. }) { 1 } else { 2 };
        if let Case::Decode { context, .. } = case {
            self.prefill(0, context);
        }
        let mut seconds = 0.0;
        for _ in 0..goes {
            if let Case::Batch { tokens, sequences } = case {
                (0..sequences).for_each(|i| self.prefill(i * (PROMPT + tokens).div_ceil(BLOCK), PROMPT));
            }
            let before = Instant::now();
            match case {
                Case::Prefill { tokens } => self.prefill(0, tokens),
                Case::Decode { tokens, context } => self.decode(1, context, tokens),
                Case::Batch { tokens, sequences } => self.decode(sequences, PROMPT, tokens),
                Case::Load { tokens } => {
                    self.prefill(0, tokens);
                    self.decode(1, tokens, 1);
                }
            }
            seconds = before.elapsed().as_secs_f64();
        }
        seconds
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| args.iter().position(|arg| arg == name).map(|at| args[at + 1].parse::<usize>().unwrap());
    let cases: Vec<(&String, Case)> = args.iter().filter_map(|arg| Some((arg, Case::parse(arg)?))).collect();
    let Some(file) = args.first().filter(|_| !cases.is_empty()) else {
        eprintln!("usage: cpu FILE --threads N [--chunk N] CASE...");
        return;
    };
    let positions = cases.iter().map(|(_, case)| case.positions()).fold(CONTEXT, usize::max);
    let options = RunnerOptions {
        threads: flag("--threads").unwrap(),
        slots: 1,
        context: Some(positions.next_multiple_of(BLOCK)),
        kv_bytes: None,
        kv_type: None,
        quantize: None,
        exact: std::env::var("RBEE_EXACT").is_ok_and(|exact| exact == "1"),
        isa: std::env::var("RBEE_ISA").ok(),
    };
    let mut session = Session::open(Path::new(file), &options, flag("--chunk").unwrap_or(PREFILL_CHUNK));
    session.prefill(0, 16);
    for (name, case) in cases {
        let seconds = session.run(case);
        println!("{}", json!({ "case": name, "tokens": case.tokens(), "seconds": seconds }));
    }
}
