//! The tokens of a request are a function of the request alone, whatever happens around it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use rbee_engine::sim::Shape;

use super::*;

#[derive(Clone, Debug)]
struct Case {
    prompt: Vec<TokenId>,
    max_tokens: usize,
    min_tokens: usize,
    sampling: Sampling,
    stop: Option<String>,
    /// A constraint of one in so many words, and when it is complete.
    form: Option<(u64, usize)>,
    choices: usize,
    /// How much of each choice exists already, in percent.
    resume: usize,
    arrival: usize,
    cancel: Option<usize>,
}

impl Case {
    fn request(&self, resume: impl Fn(usize) -> Vec<TokenId>) -> Request {
        let choice = |number| Choice {
            text: Box::new(StopText { stop: self.stop.clone(), ..StopText::default() }),
            constraint: self.form.map(|(one_in, complete)| {
                Box::new(Walk { one_in, complete, ..Walk::default() }) as Box<dyn Constraint>
            }),
            resume: resume(number),
        };
        Request {
            sampling: self.sampling.clone(),
            min_tokens: self.min_tokens,
            logprobs: Some(2),
            choices: (0..self.choices).map(choice).collect(),
            ..request(&self.prompt, self.max_tokens)
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let sampling = (any::<u64>(), prop_oneof![Just(0.0f32), Just(1.0)], prop::bool::ANY).prop_map(
        |(seed, temperature, filtered)| {
            let plain = Sampling { seed, temperature, ..Sampling::default() };
            let filters = Sampling {
                top_k: Some(200),
                top_p: 0.9,
                min_p: 0.05,
                repetition_penalty: 1.3,
                frequency_penalty: 0.4,
                presence_penalty: 0.2,
                logit_bias: vec![(300, 3.0)],
                ..plain.clone()
            };
            if filtered { filters } else { plain }
        },
    );
    // Three words are all that comes: what follows is easily guessed, and often wrongly.
    let repeating =
        (any::<u64>(), prop_oneof![Just(0.0f32), Just(0.5), Just(2.0)], prop_oneof![Just(1.0f32), Just(1.02)])
            .prop_map(|(seed, temperature, repetition_penalty)| Sampling {
                seed,
                temperature,
                repetition_penalty,
                logit_bias: vec![(300, 60.0), (301, 60.0), (302, 60.0)],
                ..Sampling::default()
            });
    let sampling = prop_oneof![2 => sampling, 1 => repeating];
    let stop = prop::option::of(prop_oneof![Just("na ".to_owned()), Just("bo".to_owned()), Just("e zi".to_owned())]);
    (
        // Many begin alike.
        prop_oneof![
            prop::collection::vec(1u32..256, 1..24),
            (1usize..24, prop::collection::vec(1u32..3, 0..4))
                .prop_map(|(shared, rest)| { (1..=shared as u32).chain(rest).collect() }),
            prop::collection::vec(300u32..303, 1..24),
        ],
        prop_oneof![1usize..20, 20usize..60],
        sampling,
        stop,
        1usize..4,
        prop_oneof![Just(0usize), 1..=100usize],
        (0usize..25, prop::option::of(0usize..40)),
        prop::option::of((1u64..400, 1usize..25)),
    )
        .prop_map(|(prompt, max_tokens, sampling, stop, choices, resume, (arrival, cancel), form)| Case {
            prompt,
            max_tokens,
            min_tokens: max_tokens / 3,
            sampling,
            stop,
            form,
            choices,
            resume,
            arrival,
            cancel,
        })
}

fn tokens_of(outputs: &[Output], choice: usize) -> Vec<Output> {
    let of = |o: &&Output| matches!(o, Output::Token { choice: c, .. } if *c as usize == choice);
    outputs.iter().filter(of).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn tokens_do_not_depend_on_the_company(
        cases in prop::collection::vec(case(), 1..9),
        shape in prop_oneof![Just(Shape::Peaked), Just(Shape::Spread)],
        (slots, spare, prefill_chunk, block_size) in (1usize..5, 0usize..12, 1usize..12, 1usize..7),
        (extra_blocks, memory) in (0usize..60, 1usize..40),
        (speculation, row_ms) in (prop_oneof![Just(Speculation::Always), Just(Speculation::Measured)], 0u64..8),
    ) {
        let model = SimModel { shape, eos_every: Some(15), ..SimModel::default() };
        let big = EngineConfig { slots: 8, step_tokens: 512, prefill_chunk: 512, queue: 0, speculation: Speculation::Off };
        let alone: Vec<Vec<Output>> =
            cases.iter().map(|case| answer(&mut engine(model, 256, big), case.request(|_| Vec::new()))).collect();
        if shape == Shape::Peaked {
            for (case, alone) in cases.iter().zip(&alone) {
                if case.min_tokens == 0 && case.form.is_none() && !case.sampling.has_filters() {
                    let got = ids(alone, 0);
                    let want = model.expected_tokens(&case.prompt, case.max_tokens);
                    prop_assert!(want.starts_with(&got) && (case.stop.is_some() || got == want));
                }
            }
        }

        // The engine under test: little room, and a device that runs out of memory now and then.
        let config = EngineConfig { slots, step_tokens: slots + spare, prefill_chunk, queue: 64, speculation };
        let need = cases.iter().map(|c| (c.prompt.len() + c.max_tokens).div_ceil(block_size)).max().unwrap();
        let inner = SimRunner::new(model, 256, block_size, need + extra_blocks, StepCounter::default(), Box::new(|_| {}));
        let rows = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&rows);
        let hook: Hook = Box::new(move |batch, _| {
            let tokens: usize = batch.chunks.iter().map(|c| c.tokens.len()).sum();
            counted.store(tokens as u64, Ordering::Relaxed);
            if tokens > memory { Err(RunnerError::OutOfMemory(String::new())) } else { Ok(()) }
        });
        let mut engine = Engine::new(Box::new(Hooked { runner: inner, hook }), config).unwrap();
        let mut sent: Vec<Option<RequestId>> = vec![None; cases.len()];
        let mut outputs = Vec::new();
        for step in 0.. {
            prop_assert!(step < 100_000, "no end");
            for (i, case) in cases.iter().enumerate() {
                if case.arrival == step {
                    let resume = |choice: usize| {
                        let all = ids(&alone[i], choice as u32);
                        all[..all.len() * case.resume / 100].to_vec()
                    };
                    sent[i] = Some(engine.submit(case.request(resume)).unwrap());
                }
                if case.cancel.is_some_and(|after| case.arrival + after == step) {
                    engine.cancel(sent[i].unwrap());
                }
            }
            engine.step(&mut outputs);
            engine.took(Duration::from_millis(8 + row_ms * rows.load(Ordering::Relaxed)));
            if step > 70 && !engine.has_work() {
                break;
            }
        }

        prop_assert_eq!(in_use(&engine), (0, 0, 0));
        for (i, case) in cases.iter().enumerate() {
            let mine: Vec<Output> =
                outputs.iter().filter(|o| Some(o.0) == sent[i]).map(|o| o.1.clone()).collect();
            prop_assert_eq!(mine.iter().filter(|o| o.is_terminal()).count(), 1);
            prop_assert!(mine.last().unwrap().is_terminal());
            let (Output::Done { finish, completion_tokens, .. }, Output::Done { finish: finish_alone, .. }) =
                (mine.last().unwrap(), alone[i].last().unwrap())
            else {
                return Err(TestCaseError::fail(format!("{:?}", mine.last())));
            };
            let mut total = 0;
            for choice in 0..case.choices {
                let want = tokens_of(&alone[i], choice);
                let resumed = want.len() * case.resume / 100;
                let got = tokens_of(&mine, choice);
                total += resumed + got.len();
                if finish[choice] == rbee_engine::Finish::Cancelled {
                    prop_assert!(case.cancel.is_some());
                    prop_assert!(want[resumed..].starts_with(&got));
                } else {
                    prop_assert_eq!(&got[..], &want[resumed..], "case {} choice {}", i, choice);
                    prop_assert_eq!(finish[choice], finish_alone[choice]);
                }
            }
            prop_assert_eq!(total, *completion_tokens);
        }
    }
}

trait Filters {
    fn has_filters(&self) -> bool;
}

impl Filters for Sampling {
    fn has_filters(&self) -> bool {
        self.top_k.is_some()
    }
}
