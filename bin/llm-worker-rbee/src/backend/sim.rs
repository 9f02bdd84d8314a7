//! A model without weights: hash-made tokens at a chosen pace.

use std::time::{Duration, Instant};

use rbee_engine::sim::{self, Shape, SimModel, SimRunner, Work};
use rbee_engine::{OutputText, Piece, Pushed, StepCounter, TokenId};
use rbee_tokenizer::{Scan, StopMatcher};
use rbee_wire::form::ResponseFormat;
use rbee_wire::job::Generation;
use rbee_wire::worker::{LoadProgress, WorkerCharge, WorkerMemory};
use rbee_wire::{ErrorBody, ErrorCode};

use super::{Answer, Encoded, Facts, Parts, SamplingDefaults, TextSide};
use crate::args::{Cli, SimArgs};
use crate::forms::{self, AnswerIn};

const BLOCK: usize = 16;

/// KV blocks of the simulation at most: 4 M positions, 32 MiB.
const MAX_BLOCKS: usize = 1 << 18;

pub(super) fn load(
    cli: &Cli,
    charge: &WorkerCharge,
    slots: usize,
    steps: &StepCounter,
    progress: &dyn Fn(LoadProgress),
) -> Result<Parts, ErrorBody> {
    let args = cli.sim.clone();
    let total = args.sim_load_ms;
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(total) {
        let done = u64::try_from(began.elapsed().as_millis()).unwrap_or(total).min(total);
        progress(LoadProgress { stage: "load".into(), done, total, unit: "bytes".into() });
        std::thread::sleep(Duration::from_millis(20.min(total)));
    }
    if args.sim_load_fails {
        return Err(ErrorBody::new(ErrorCode::ModelLoadFailed, "the simulated load was told to fail"));
    }
    let context = charge.load.ctx.unwrap_or(args.sim_context) as usize;
    let model = SimModel {
        seed: args.sim_seed,
        eos_every: args.sim_eos_every,
        shape: if args.sim_spread { Shape::Spread } else { Shape::Peaked },
        ..SimModel::default()
    };
    let blocks = (slots * context.div_ceil(BLOCK)).min(MAX_BLOCKS).max(context.div_ceil(BLOCK));
    let pace = pace(&args, steps.clone());
    let runner = SimRunner::new(model, context, BLOCK, blocks, steps.clone(), pace);
    let numerics_id = format!("sim-{}-{:?}-{:?}", args.sim_seed, args.sim_eos_every, model.shape);
    Ok(Parts {
        runner: Box::new(runner),
        text: Box::new(SimSide { eos: [sim::EOS], defaults: SamplingDefaults::default() }),
        facts: Facts {
            memory: WorkerMemory { weights: 0, kv: (blocks * BLOCK * 8) as u64, total: 0 },
            numerics_id: Some(numerics_id),
            fingerprint: Some(format!("sim-{}", args.sim_seed)),
            row_invariant: true,
        },
    })
}

/// Spends the time that a step takes, moving the step counter meanwhile as a real model's layers do.
fn pace(args: &SimArgs, steps: StepCounter) -> Box<dyn FnMut(Work) + Send> {
    let (step, prefill) = (Duration::from_micros(args.sim_step_us), Duration::from_micros(args.sim_prefill_us));
    Box::new(move |work| {
        let tokens = u32::try_from(work.prefill_tokens).unwrap_or(u32::MAX);
        let mut left = step + prefill.saturating_mul(tokens);
        while !left.is_zero() {
            let nap = left.min(Duration::from_millis(100));
            std::thread::sleep(nap);
            left -= nap;
            steps.advance();
        }
    })
}

struct SimSide {
    eos: [TokenId; 1],
    defaults: SamplingDefaults,
}

impl TextSide for SimSide {
    /// The bytes of the text: of the last message, for a chat, so that a client can tell what comes.
    fn encode(&self, generation: &Generation) -> Result<Encoded, ErrorBody> {
        if generation.may_call() {
            return Err(super::no_tools());
        }
        let text = match (generation.prompt_text(), &generation.messages) {
            (Some(prompt), _) => prompt,
            (None, Some(messages)) => messages.last().map_or("", |message| message.content.as_str()),
            (None, None) => "",
        };
        Ok(Encoded { prompt: sim::encode(text), note: None, answer: Answer::Text })
    }

    fn embedded(&self, text: &str) -> Result<Vec<TokenId>, ErrorBody> {
        Ok(sim::encode(text))
    }

    fn tokenize(&self, text: &str) -> Result<Vec<TokenId>, ErrorBody> {
        Ok(sim::encode(text))
    }

    fn output(&self, stop: &[String], _: &Answer) -> Result<Box<dyn OutputText>, ErrorBody> {
        let stops =
            StopMatcher::new(stop).map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.to_string()))?;
        Ok(Box::new(SimOutput(stops)))
    }

    fn form(&self, generation: &Generation, _: &Answer) -> Result<Option<AnswerIn>, ErrorBody> {
        match generation.response_format {
            None | Some(ResponseFormat::Text {}) => Ok(None),
            // Its tokens are words without a meaning.
            Some(_) => Err(forms::none_here()),
        }
    }

    fn token_text(&self, id: TokenId) -> String {
        sim::word(id)
    }

    fn eos(&self) -> &[TokenId] {
        &self.eos
    }

    fn defaults(&self) -> &SamplingDefaults {
        &self.defaults
    }
}

struct SimOutput(StopMatcher);

impl OutputText for SimOutput {
    fn push(&mut self, id: TokenId) -> Pushed {
        let mut text = String::new();
        let scan = self.0.push(&sim::word(id), &mut text);
        Pushed { piece: Piece::text(text), stopped: scan == Scan::Stopped }
    }

    fn finish(&mut self) -> Piece {
        let mut text = String::new();
        self.0.finish(&mut text);
        Piece::text(text)
    }
}
