//! The engine from outside, over the simulated model.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may fail the test")]

mod constraint;
mod engine;
mod handle;
mod invariance;
mod speculation;
mod whole;

use std::collections::BTreeMap;

use rbee_engine::runner::{Logits, StepBatch};
use rbee_engine::sim::{SimModel, SimRunner, word};
use rbee_engine::{
    Choice, Constraint, Engine, EngineConfig, Goal, ModelLimits, ModelRunner, Output, OutputText, Piece, Pushed,
    Request, RequestId, RunnerError, Sampling, Speculation, StepCounter, TokenId,
};

const CONFIG: EngineConfig =
    EngineConfig { slots: 4, step_tokens: 32, prefill_chunk: 8, queue: 8, speculation: Speculation::Measured };

/// Looks at a batch before it runs, and at its logits after.
type Hook = Box<dyn FnMut(&StepBatch<'_>, Option<&mut Logits>) -> Result<(), RunnerError> + Send>;

struct Hooked {
    runner: SimRunner,
    hook: Hook,
}

impl ModelRunner for Hooked {
    fn limits(&self) -> &ModelLimits {
        self.runner.limits()
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        (self.hook)(batch, None)?;
        self.runner.step(batch, logits)?;
        (self.hook)(batch, Some(logits))
    }
}

/// Context 256, blocks of 4.
fn runner(model: SimModel, kv_blocks: usize) -> SimRunner {
    SimRunner::new(model, 256, 4, kv_blocks, StepCounter::default(), Box::new(|_| {}))
}

fn engine(model: SimModel, kv_blocks: usize, config: EngineConfig) -> Engine {
    Engine::new(Box::new(runner(model, kv_blocks)), config).unwrap()
}

fn hooked(
    config: EngineConfig,
    hook: impl FnMut(&StepBatch<'_>, Option<&mut Logits>) -> Result<(), RunnerError> + Send + 'static,
) -> Engine {
    let runner = Hooked { runner: runner(SimModel::default(), 256), hook: Box::new(hook) };
    Engine::new(Box::new(runner), config).unwrap()
}

/// Words with one stop string; holds back what may become it.
#[derive(Default)]
struct StopText {
    held: String,
    stop: Option<String>,
}

impl OutputText for StopText {
    fn push(&mut self, id: TokenId) -> Pushed {
        self.held.push_str(&word(id));
        let Some(stop) = &self.stop else {
            return Pushed { piece: Piece::text(std::mem::take(&mut self.held)), stopped: false };
        };
        if let Some(at) = self.held.find(stop) {
            self.held.truncate(at);
            return Pushed { piece: Piece::text(std::mem::take(&mut self.held)), stopped: true };
        }
        let from = self.held.len().saturating_sub(stop.len());
        let keep = (from..self.held.len()).find(|at| stop.starts_with(&self.held[*at..]));
        let held = self.held.split_off(keep.unwrap_or(self.held.len()));
        Pushed { piece: Piece::text(std::mem::replace(&mut self.held, held)), stopped: false }
    }

    fn finish(&mut self) -> Piece {
        Piece::text(std::mem::take(&mut self.held))
    }
}

fn choice() -> Choice {
    Choice { text: Box::new(StopText::default()), constraint: None, resume: Vec::new() }
}

fn stopping(stop: &str) -> Choice {
    Choice { text: Box::new(StopText { stop: Some(stop.into()), ..StopText::default() }), ..choice() }
}

/// Allows one in so many words, other ones after each token, and the end after every third.
#[derive(Default)]
struct Walk {
    one_in: u64,
    /// Tokens with which it is complete.
    complete: usize,
    told: Vec<TokenId>,
    mask: Vec<u32>,
}

impl Walk {
    fn allows(&self, id: TokenId) -> bool {
        let sum: u64 = self.told.iter().map(|id| u64::from(*id)).sum();
        let turn = (u64::from(id) + 7 * sum).is_multiple_of(self.one_in);
        if id == rbee_engine::sim::EOS { self.told.len() % 3 == 2 } else { id >= rbee_engine::sim::FIRST_WORD && turn }
    }
}

impl Constraint for Walk {
    fn mask(&mut self) -> Result<Option<&[u32]>, String> {
        let mut mask = vec![0; 1024 / 32];
        for id in (0..1024).filter(|id| self.allows(*id)) {
            mask[id as usize / 32] |= 1 << (id % 32);
        }
        self.mask = mask;
        Ok(Some(&self.mask))
    }

    fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        if !self.allows(id) {
            return Err(format!("{id} may not come"));
        }
        self.told.push(id);
        Ok(self.told.len() == self.complete)
    }
}

fn request(prompt: &[TokenId], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        goal: Goal::Answer,
        max_tokens: Some(max_tokens),
        min_tokens: 0,
        eos: vec![rbee_engine::sim::EOS],
        ignore_eos: false,
        sampling: Sampling::default(),
        logprobs: None,
        tenant: [0; 16],
        choices: vec![choice()],
    }
}

/// Steps until nothing is left to do.
fn run(engine: &mut Engine) -> BTreeMap<RequestId, Vec<Output>> {
    let mut outputs = Vec::new();
    for _ in 0..100_000 {
        if !engine.has_work() {
            let mut by_request: BTreeMap<_, Vec<_>> = BTreeMap::new();
            for (id, output) in outputs {
                by_request.entry(id).or_default().push(output);
            }
            return by_request;
        }
        engine.step(&mut outputs);
    }
    panic!("the engine does not come to an end");
}

/// The outputs of a request that is alone.
fn answer(engine: &mut Engine, request: Request) -> Vec<Output> {
    let id = engine.submit(request).unwrap();
    run(engine).remove(&id).unwrap()
}

fn ids(outputs: &[Output], choice: u32) -> Vec<TokenId> {
    let id = |output: &Output| match output {
        Output::Token { choice: c, id, .. } if *c == choice => Some(*id),
        _ => None,
    };
    outputs.iter().filter_map(id).collect()
}

fn text(outputs: &[Output]) -> String {
    let text = |output: &Output| match output {
        Output::Token { piece, .. } => Some(piece.text.clone()),
        _ => None,
    };
    outputs.iter().filter_map(text).collect()
}

fn words(ids: &[TokenId]) -> String {
    ids.iter().map(|id| word(*id)).collect()
}

/// (slots, waiting, blocks) in use.
fn in_use(engine: &Engine) -> (usize, usize, usize) {
    let stats = engine.stats();
    (stats.slots_used, stats.waiting, stats.kv_blocks_used)
}
