//! What a request gets is a function of the request alone, for every architecture: whatever else runs, in whatever pieces its
//! prompt is computed, on however many threads, with its prefix in the cache or not, preempted or not, from its beginning or
//! continued from tokens that another runner gave, with guessed tokens and without.

use std::path::Path;

use proptest::prelude::*;
use rbee_engine::{
    Choice, Engine, EngineConfig, Goal, Output, OutputText, Piece, Pushed, Request, RequestId, Sampling, Speculation,
    TokenId,
};
use rbee_models::{KvType, ModelFiles, Quantize, RunnerOptions, inspect};

use crate::families::all;
use crate::support::{runner, with_kv};

/// Ids are below every fixture's vocabulary.
const VOCAB: u32 = 240;

const CONTEXT: usize = 96;

#[derive(Clone, Debug)]
struct Case {
    prompt: Vec<TokenId>,
    max_tokens: usize,
    sampling: Sampling,
    choices: usize,
    /// How much of each choice exists already, in percent.
    resume: usize,
    arrival: usize,
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

impl Case {
    fn request(&self, resume: impl Fn(u32) -> Vec<TokenId>) -> Request {
        let choice = |number| Choice { text: Box::new(NoText), constraint: None, resume: resume(number) };
        Request {
            prompt: self.prompt.clone(),
            goal: Goal::Answer,
            max_tokens: Some(self.max_tokens),
            min_tokens: 0,
            eos: vec![7],
            ignore_eos: false,
            sampling: self.sampling.clone(),
            // The chosen token's is a sum over the whole row of logits.
            logprobs: Some(20),
            tenant: [0; 16],
            choices: (0..self.choices as u32).map(choice).collect(),
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let prompt = prop_oneof![
        prop::collection::vec(0..VOCAB, 1..50),
        // Many begin alike: with a block or two in common.
        (16u32..44, prop::collection::vec(0u32..3, 0..5)).prop_map(|(shared, rest)| (1..shared).chain(rest).collect()),
    ];
    let sampling = (any::<u64>(), prop_oneof![Just(0.0f32), Just(1.0)]).prop_map(|(seed, temperature)| Sampling {
        seed,
        temperature,
        repetition_penalty: 1.1,
        ..Sampling::default()
    });
    (prompt, 1usize..24, sampling, 1usize..3, prop_oneof![Just(0usize), 1..=100usize], 0usize..12).prop_map(
        |(prompt, max_tokens, sampling, choices, resume, arrival)| Case {
            prompt,
            max_tokens,
            sampling,
            choices,
            resume,
            arrival,
        },
    )
}

fn engine(fixture: &Path, options: &RunnerOptions, slots: usize, chunk: usize, speculation: Speculation) -> Engine {
    let config = EngineConfig { slots, step_tokens: slots + chunk, prefill_chunk: chunk, queue: 64, speculation };
    Engine::new(Box::new(runner(fixture, options)), config).unwrap()
}

/// Tokens of one choice: id and log-probabilities, bit for bit.
fn tokens(outputs: &[(RequestId, Output)], request: RequestId, number: u32) -> Vec<(TokenId, String)> {
    let of = |(id, output): &(RequestId, Output)| match output {
        Output::Token { choice, id: token, logprobs, .. } if *id == request && *choice == number => {
            let logprobs = logprobs.as_ref().unwrap();
            let bits = logprobs.top.iter().map(|(id, value)| format!("{id}:{:08x}", value.to_bits()));
            Some((*token, format!("{:08x} {}", logprobs.chosen.to_bits(), bits.collect::<Vec<_>>().join(" "))))
        }
        _ => None,
    };
    outputs.iter().filter_map(of).collect()
}

fn ends_well(outputs: &[(RequestId, Output)], request: RequestId) -> bool {
    outputs.iter().filter(|(id, output)| *id == request && matches!(output, Output::Done { .. })).count() == 1
}

/// How the engine under test is set up.
#[derive(Clone, Debug)]
struct Setting {
    slots: usize,
    chunk: usize,
    threads: usize,
    /// KV beyond one whole context.
    blocks: usize,
    kv: KvType,
    quantize: Option<Quantize>,
    isa: Option<&'static str>,
}

/// Runs the cases alone and together on every fixture, together with guesses; gives what the engines counted: preemptions, prompt
/// tokens found in the cache, tokens guessed and those of them that were right.
fn check(cases: &[Case], setting: &Setting) -> Result<[u64; 4], TestCaseError> {
    let mut counted = [0; 4];
    for fixture in all() {
        let plain =
            RunnerOptions { context: Some(CONTEXT), quantize: setting.quantize, slots: 8, ..with_kv(setting.kv) };
        // Each in an engine of its own, in one piece.
        let alone = |case: &Case| -> Vec<Vec<(TokenId, String)>> {
            let mut engine = engine(&fixture, &plain, 8, 512, Speculation::Off);
            let id = engine.submit(case.request(|_| Vec::new())).unwrap();
            let mut outputs = Vec::new();
            while engine.has_work() {
                engine.step(&mut outputs);
            }
            assert!(ends_well(&outputs, id));
            (0..case.choices as u32).map(|choice| tokens(&outputs, id, choice)).collect()
        };
        let alone: Vec<_> = cases.iter().map(alone).collect();

        let options = RunnerOptions { threads: setting.threads, isa: setting.isa.map(str::to_owned), ..plain.clone() };
        let needs = inspect(&ModelFiles::folder(&fixture).unwrap(), &options).unwrap();
        let kv_bytes = Some(needs.kv_per_token * (CONTEXT + 16 * setting.blocks) as u64);
        let options = RunnerOptions { kv_bytes, ..options };
        let mut engine = engine(&fixture, &options, setting.slots, setting.chunk, Speculation::Always);
        let mut sent: Vec<Option<RequestId>> = vec![None; cases.len()];
        let mut outputs = Vec::new();
        let last = cases.iter().map(|case| case.arrival).max().unwrap_or(0);
        for step in 0.. {
            prop_assert!(step < 20_000, "no end");
            for (i, case) in cases.iter().enumerate().filter(|(_, case)| case.arrival == step) {
                let resume = |choice: u32| {
                    let all = &alone[i][choice as usize];
                    all[..all.len() * case.resume / 100].iter().map(|(id, _)| *id).collect()
                };
                sent[i] = Some(engine.submit(case.request(resume)).unwrap());
            }
            engine.step(&mut outputs);
            if step >= last && !engine.has_work() {
                break;
            }
        }
        let stats = engine.stats();
        let here = [stats.preemptions, stats.prefix_hits, stats.drafted_tokens, stats.accepted_tokens];
        counted.iter_mut().zip(here).for_each(|(all, here)| *all += here);
        for (i, case) in cases.iter().enumerate() {
            let id = sent[i].unwrap();
            prop_assert!(ends_well(&outputs, id), "{}: case {i}", fixture.display());
            for (choice, want) in alone[i].iter().enumerate() {
                let from = want.len() * case.resume / 100;
                let got = tokens(&outputs, id, choice as u32);
                prop_assert!(got == want[from..], "{}: case {i}, choice {choice}", fixture.display());
            }
        }
    }
    Ok(counted)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn answers_of_every_architecture_do_not_depend_on_the_schedule(
        cases in prop::collection::vec(case(), 2..6),
        (slots, chunk, threads, blocks) in (1usize..5, 1usize..40, 1usize..4, 0usize..12),
        (kv, quantize) in prop::sample::select(vec![
            (KvType::F32, None), (KvType::F16, None), (KvType::Bf16, None), (KvType::Q8_0, Some(Quantize::Q8_0)),
        ]),
        isa in prop::sample::select(vec![None, Some("avx2"), Some("scalar")]),
    ) {
        check(&cases, &Setting { slots, chunk, threads, blocks, kv, quantize, isa })?;
    }
}

#[test]
fn preempted_and_cached_prompts_give_the_same_answers() {
    let case = |i: usize| Case {
        prompt: (1..41).chain(i as u32..4).collect(),
        max_tokens: 24,
        sampling: Sampling { seed: i as u64, ..Sampling::default() },
        choices: 1,
        resume: 0,
        // The first is done with its prompt when the others come.
        arrival: i * 3,
    };
    let cases: Vec<Case> = (0..4).map(case).collect();
    let setting = Setting { slots: 4, chunk: 64, threads: 2, blocks: 0, kv: KvType::Bf16, quantize: None, isa: None };
    let [preemptions, hits, ..] = check(&cases, &setting).unwrap();
    assert!(preemptions > 0 && hits > 0, "{preemptions} preemptions, {hits} tokens from the cache");
}

/// Answers of a few words, as they are likely to repeat what was said, often and not always.
#[test]
fn guessed_tokens_are_those_that_would_have_come() {
    let case = |i: usize| Case {
        prompt: (0..30).map(|at| 40 + at % (3 + i as u32)).collect(),
        max_tokens: 40,
        sampling: Sampling {
            seed: i as u64,
            temperature: [0.0, 0.3, 1.0][i],
            logit_bias: (40..43).map(|id| (id, 1000.0)).collect(),
            ..Sampling::default()
        },
        choices: 1 + i % 2,
        resume: 0,
        arrival: i,
    };
    let cases: Vec<Case> = (0..3).map(case).collect();
    for (kv, quantize, isa) in [
        (KvType::Bf16, None, None),
        (KvType::Q8_0, Some(Quantize::Q8_0), Some("avx2")),
        (KvType::F32, None, Some("scalar")),
    ] {
        let setting = Setting { slots: 4, chunk: 64, threads: 2, blocks: 9, kv, quantize, isa };
        let [_, _, drafted, accepted] = check(&cases, &setting).unwrap();
        assert!(accepted > 100 && drafted > accepted + 100, "{accepted} of {drafted} were right");
    }
}
