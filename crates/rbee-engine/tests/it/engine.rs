use std::sync::{Arc, Mutex};

use rbee_engine::runner::Wanted;
use rbee_engine::sim::{EOS, Shape, SimText, expected_tokens, hidden_state};
use rbee_engine::{EngineError, Finish, Overloaded};

use super::*;

fn finishes(outputs: &[Output]) -> Vec<Finish> {
    match outputs.last() {
        Some(Output::Done { finish, .. }) => finish.clone(),
        other => panic!("{other:?}"),
    }
}

fn failure(outputs: &[Output]) -> EngineError {
    match outputs.last() {
        Some(Output::Failed(error)) => error.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_answer_has_its_events_in_order() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let prompt: Vec<TokenId> = (1..=19).collect();
    let got = answer(&mut engine, request(&prompt, 3));
    let tokens = expected_tokens(0, &prompt, 3);
    let token = |i: usize| Output::Token {
        choice: 0,
        index: i,
        id: tokens[i],
        piece: Piece::text(word(tokens[i])),
        logprobs: None,
    };
    let want = [
        Output::Started { prompt_tokens: 19, cached_tokens: 0 },
        Output::Prefill { done: 8, total: 19 },
        Output::Prefill { done: 16, total: 19 },
        Output::Prefill { done: 19, total: 19 },
        token(0),
        token(1),
        token(2),
        Output::Done { finish: vec![Finish::Length], prompt_tokens: 19, completion_tokens: 3, cached_tokens: 0 },
    ];
    assert_eq!(got, want);
    let stats = engine.stats();
    assert_eq!((stats.prompt_tokens, stats.generated_tokens, stats.working), (19, 3, false));
}

#[test]
fn context_is_never_exceeded_and_never_truncated() {
    // 16 blocks of 4 positions hold less than the model's 256.
    let mut engine = engine(SimModel::default(), 16, CONFIG);
    assert_eq!(engine.limits().context, 64);
    for (prompt, max_tokens) in [(64, None), (64, Some(1)), (65, Some(1)), (60, Some(5)), (1, Some(usize::MAX))] {
        let error = engine.submit(Request { max_tokens, ..request(&vec![7; prompt], 1) }).unwrap_err();
        assert_eq!(error, EngineError::ContextLength { prompt, max_tokens, context: 64 });
    }
    let whole = answer(&mut engine, Request { max_tokens: None, ..request(&[7; 60], 1) });
    assert_eq!(ids(&whole, 0), expected_tokens(0, &[7; 60], 4));
    assert_eq!(in_use(&engine), (0, 0, 0));
}

#[test]
fn fields_outside_their_range_are_named_and_nothing_is_kept() {
    let mut engine = engine(SimModel::default(), 64, EngineConfig { slots: 1, queue: 0, ..CONFIG });
    type Spoil = fn(&mut Request);
    let table: [(&str, Spoil); 18] = [
        ("prompt", |r| r.prompt.clear()),
        ("prompt", |r| r.prompt[0] = 1024),
        ("max_tokens", |r| r.max_tokens = Some(0)),
        ("min_tokens", |r| r.min_tokens = 6),
        ("eos", |r| r.eos[0] = TokenId::MAX),
        ("choices", |r| r.choices.clear()),
        ("choices", |r| r.choices = (0..129).map(|_| choice()).collect()),
        ("logprobs", |r| r.logprobs = Some(21)),
        ("resume", |r| r.choices[0].resume = vec![5000]),
        ("resume", |r| r.choices[0].resume = vec![300; 6]),
        ("temperature", |r| r.sampling.temperature = -0.1),
        ("temperature", |r| r.sampling.temperature = f32::NAN),
        ("top_k", |r| r.sampling.top_k = Some(0)),
        ("top_p", |r| r.sampling.top_p = 1.1),
        ("min_p", |r| r.sampling.min_p = f32::NAN),
        ("repetition_penalty", |r| r.sampling.repetition_penalty = 0.0),
        ("presence_penalty", |r| r.sampling.presence_penalty = f32::INFINITY),
        ("logit_bias", |r| r.sampling.logit_bias = vec![(1024, 1.0)]),
    ];
    for (name, spoil) in table {
        let mut bad = request(&[1, 2], 5);
        spoil(&mut bad);
        match engine.submit(bad) {
            Err(EngineError::Invalid { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
        assert!(!engine.has_work());
    }
    // The one place was given back each time.
    assert_eq!(ids(&answer(&mut engine, request(&[1, 2], 5)), 0), expected_tokens(0, &[1, 2], 5));
}

#[test]
fn the_queue_is_bounded_and_places_come_back() {
    let config = EngineConfig { slots: 2, queue: 1, ..CONFIG };
    let mut engine = engine(SimModel::default(), 256, config);
    let full = EngineError::Overloaded(Overloaded::Full { live: 3, capacity: 3 });
    let first = engine.submit(request(&[1], 4)).unwrap();
    let two = Request { choices: vec![choice(), choice()], ..request(&[2], 9) };
    engine.submit(two).unwrap();
    assert_eq!(engine.submit(request(&[3], 4)).unwrap_err(), full);
    engine.cancel(first);
    engine.submit(request(&[3], 4)).unwrap();
    assert_eq!(engine.submit(request(&[3], 4)).unwrap_err(), full);
    run(&mut engine);
    // More choices than places: they take turns.
    let many = Request { choices: (0..7).map(|_| choice()).collect(), ..request(&[4], 3) };
    let got = answer(&mut engine, many);
    assert!((0..7).all(|c| ids(&got, c) == expected_tokens(0, &[4], 3)));
    assert_eq!(finishes(&got), [Finish::Length; 7]);
    assert_eq!(in_use(&engine), (0, 0, 0));
}

/// Slots, then memory: a request runs when there is a slot and room for its prompt, in order of arrival, and not before.
#[test]
fn admission_is_in_order_and_needs_room_for_the_prompt_only() {
    let mut engine = engine(SimModel::default(), 10, CONFIG);
    let mut outputs = Vec::new();
    let a = engine.submit(request(&[1; 20], 20)).unwrap(); // 6 of 10 blocks, 10 in the end
    let b = engine.submit(request(&[2; 20], 4)).unwrap(); // 6 blocks: waits for a
    let c = engine.submit(request(&[3; 4], 4)).unwrap(); // 2 blocks would fit, but b is before it
    engine.step(&mut outputs);
    assert_eq!(in_use(&engine), (1, 2, 6));
    let started = |outputs: &[(RequestId, Output)]| {
        outputs.iter().filter(|o| matches!(o.1, Output::Started { .. })).map(|o| o.0).collect::<Vec<_>>()
    };
    assert_eq!(started(&outputs), [a]);
    engine.cancel(a);
    engine.step(&mut outputs);
    assert_eq!(started(&outputs), [a, b, c]);
    assert_eq!(in_use(&engine), (2, 0, 8));
}

/// Two texts that do not fit together: the later one gives its blocks up and says the same in the end.
#[test]
fn without_room_the_later_text_is_computed_again_and_stays_the_same() {
    let mut engine = engine(SimModel::default(), 10, CONFIG);
    let mut outputs = Vec::new();
    let all: Vec<_> = [5u32, 6].map(|id| (id, engine.submit(request(&[id; 8], 24)).unwrap())).into();
    while engine.has_work() {
        engine.step(&mut outputs);
    }
    for (id, sent) in all {
        let mine: Vec<Output> = outputs.iter().filter(|o| o.0 == sent).map(|o| o.1.clone()).collect();
        assert_eq!(ids(&mine, 0), expected_tokens(0, &[id; 8], 24));
        let prefill: Vec<_> = mine.iter().filter(|o| matches!(o, Output::Prefill { .. })).collect();
        assert_eq!(prefill, [&Output::Prefill { done: 8, total: 8 }], "what is computed again is not told again");
    }
    assert!(engine.stats().preemptions > 0);
    assert_eq!(in_use(&engine), (0, 0, 0));
}

fn cached(outputs: &[Output]) -> [usize; 2] {
    let Some(Output::Started { cached_tokens: started, .. }) = outputs.first() else { panic!("{:?}", outputs.first()) };
    let Some(Output::Done { cached_tokens: done, .. }) = outputs.last() else { panic!("{:?}", outputs.last()) };
    [*started, *done]
}

/// Whole blocks that another text began with are there already; the last token is always computed, and tenants never share.
#[test]
fn a_prompt_that_was_there_before_is_not_computed_again() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let prompt: Vec<TokenId> = (1..=16).collect();
    assert_eq!(cached(&answer(&mut engine, request(&prompt, 3))), [0, 0]);
    let before = engine.stats().prompt_tokens;
    let again = answer(&mut engine, request(&prompt, 3));
    assert_eq!(cached(&again), [12, 12], "three blocks of four; the fourth has the last token");
    assert_eq!(engine.stats().prompt_tokens - before, 4);
    assert_eq!(ids(&again, 0), expected_tokens(0, &prompt, 3));
    let longer: Vec<TokenId> = prompt.iter().chain(&expected_tokens(0, &prompt, 3)).copied().chain([9, 9]).collect();
    let got = answer(&mut engine, request(&longer, 3));
    assert_eq!(cached(&got), [16, 16], "the answer's first token was not in a full block");
    assert_eq!(ids(&got, 0), expected_tokens(0, &longer, 3));
    let other = Request { tenant: [1; 16], ..request(&prompt, 3) };
    assert_eq!(cached(&answer(&mut engine, other)), [0, 0], "another tenant's");
    let stats = engine.stats();
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (16 + 16 + 21 + 16, 28));
}

/// The answers to one prompt compute its whole blocks once.
#[test]
fn answers_to_one_prompt_share_its_blocks() {
    let mut engine = engine(SimModel { shape: Shape::Spread, ..SimModel::default() }, 64, CONFIG);
    let three = Request { choices: (0..3).map(|_| choice()).collect(), ..request(&[7; 18], 6) };
    let got = answer(&mut engine, three);
    assert_eq!(engine.stats().prompt_tokens, 18 + 2 + 2, "16 of 18 tokens are in whole blocks");
    for c in 0..3 {
        assert_eq!(ids(&got, c).len(), 6);
    }
}

#[test]
fn cancelling_frees_the_memory_at_once_wherever_the_request_is() {
    let mut engine = engine(SimModel::default(), 64, EngineConfig { slots: 2, ..CONFIG });
    let mut outputs = Vec::new();
    let decoding = engine.submit(request(&[1], 50)).unwrap();
    engine.step(&mut outputs);
    let prefilling = engine.submit(request(&[2; 100], 50)).unwrap();
    let queued = engine.submit(request(&[3], 50)).unwrap();
    engine.step(&mut outputs);
    assert_eq!(in_use(&engine), (2, 1, 1 + 26));
    for (id, left, tokens) in [(queued, (2, 0, 27), 0), (prefilling, (1, 0, 1), 0), (decoding, (0, 0, 0), 2)] {
        engine.cancel(id);
        engine.cancel(id);
        assert_eq!(in_use(&engine), left);
        outputs.clear();
        assert!(engine.has_work(), "the end is still to be told");
        engine.step(&mut outputs);
        let ends: Vec<_> = outputs.iter().filter(|o| o.1.is_terminal()).collect();
        match ends[..] {
            [(got, Output::Done { finish, completion_tokens, .. })] => {
                assert_eq!((*got, finish.as_slice()), (id, [Finish::Cancelled].as_slice()));
                assert!(*completion_tokens >= tokens);
            }
            _ => panic!("{ends:?}"),
        }
    }
    assert!(!engine.has_work());
}

/// Tokens, start and whether logits are wanted of each chunk of each step.
type Steps = Arc<Mutex<Vec<Vec<(usize, usize, bool)>>>>;

fn watched(config: EngineConfig) -> (Engine, Steps) {
    let seen = Steps::default();
    let log = Arc::clone(&seen);
    let engine = hooked(config, move |batch, logits| {
        if logits.is_none() {
            let chunks = batch.chunks.iter().map(|c| (c.tokens.len(), c.start, c.wanted == Wanted::Logits));
            log.lock().unwrap().push(chunks.collect::<Vec<_>>());
        }
        Ok(())
    });
    (engine, seen)
}

#[test]
fn running_streams_go_first_then_the_oldest_prompt_and_the_shortest() {
    let config = EngineConfig { slots: 3, step_tokens: 10, prefill_chunk: 8, queue: 0, ..CONFIG };
    let (mut engine, seen) = watched(config);
    let mut outputs = Vec::new();
    engine.submit(request(&[1; 2], 9)).unwrap();
    engine.step(&mut outputs);
    engine.submit(request(&[2; 17], 2)).unwrap();
    engine.submit(request(&[3; 3], 2)).unwrap();
    for _ in 0..4 {
        engine.step(&mut outputs);
    }
    let want: [&[_]; 5] = [
        &[(2, 0, true)],
        // Of nine tokens the long prompt has five, the short one the three it needs, and the long one the last.
        &[(1, 2, true), (3, 0, true), (6, 0, false)],
        &[(1, 3, true), (1, 3, true), (8, 6, false)],
        &[(1, 4, true), (3, 14, true)],
        &[(1, 5, true), (1, 17, true)],
    ];
    assert_eq!(*seen.lock().unwrap(), want);
}

#[test]
fn prompts_join_running_streams_in_pieces_that_hardly_stretch_a_step() {
    let config = EngineConfig { slots: 2, step_tokens: 200, prefill_chunk: 100, queue: 0, ..CONFIG };
    let (mut engine, seen) = watched(config);
    let ms = std::time::Duration::from_millis;
    let mut outputs = Vec::new();
    let mut step = |engine: &mut Engine| {
        engine.step(&mut outputs);
        // A model whose step takes 20 ms, and 2 ms for each token of a prompt.
        let prompt = |chunk: &&(usize, usize, bool)| chunk.0 > 1;
        let tokens: usize = seen.lock().unwrap().last().unwrap().iter().filter(prompt).map(|chunk| chunk.0).sum();
        let took = ms(20 + 2 * tokens as u64);
        engine.took(took);
        took
    };
    engine.submit(request(&[1; 2], 200)).unwrap();
    for _ in 0..10 {
        step(&mut engine);
    }
    engine.submit(request(&[2; 180], 2)).unwrap();
    // The first piece is a guess; from then on a step takes less than twice as long.
    step(&mut engine);
    let stretched: Vec<_> = (0..20).map(|_| step(&mut engine)).collect();
    assert!(stretched.iter().all(|took| *took < ms(40)), "{stretched:?}");
    let alone = stretched.iter().filter(|took| **took == ms(20)).count();
    assert!(alone <= 2, "steps that measure are few: {stretched:?}");
    assert!(stretched.iter().all(|took| *took == ms(20) || *took > ms(30)), "the others are used: {stretched:?}");
}

#[test]
fn a_stop_string_over_two_tokens_ends_the_choice_and_is_never_sent() {
    let tokens = expected_tokens(0, &[9], 10);
    let whole = words(&tokens);
    // From the middle of the fourth word into the fifth.
    let at = words(&tokens[..3]).len() + 3;
    let stop = &whole[at..at + 4];
    assert_eq!(whole.find(stop), Some(at), "the example must be unambiguous");
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let got = answer(&mut engine, Request { choices: vec![stopping(stop)], ..request(&[9], 10) });
    assert_eq!(text(&got), whole[..at]);
    assert_eq!(finishes(&got), [Finish::Stop]);
    assert!(ids(&got, 0).len() < 10);
}

#[test]
fn text_held_back_for_a_stop_string_is_flushed_with_the_last_token() {
    let tokens = expected_tokens(0, &[9], 4);
    let whole = words(&tokens);
    let stop = format!("{}!", &whole[whole.len() - 7..]);
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let got = answer(&mut engine, Request { choices: vec![stopping(&stop)], ..request(&[9], 4) });
    assert_eq!(text(&got), whole);
    assert_eq!(finishes(&got), [Finish::Length]);
    // The same where an end-of-sequence id comes last: it carries the rest and none of its own.
    let eos = vec![tokens[1], tokens[3]];
    let stop = format!("{}!", &words(&tokens[..3])[4..]);
    let until_eos = |eos: Vec<TokenId>, min_tokens, ignore_eos| Request {
        eos,
        ignore_eos,
        min_tokens,
        choices: vec![stopping(&stop)],
        ..request(&[9], 8)
    };
    let got = answer(&mut engine, until_eos(eos[1..].to_vec(), 0, false));
    assert_eq!(ids(&got, 0), tokens);
    assert_eq!(text(&got), words(&tokens[..3]));
    assert_eq!(finishes(&got), [Finish::Stop]);
    assert!(matches!(got.last(), Some(Output::Done { completion_tokens: 4, .. })));
    // Any of several ids ends it, none does when they are ignored, and none comes before its time.
    assert_eq!(ids(&answer(&mut engine, until_eos(eos.clone(), 0, false)), 0), tokens[..2]);
    assert_eq!(ids(&answer(&mut engine, until_eos(eos.clone(), 0, true)), 0), expected_tokens(0, &[9], 8));
    let late = ids(&answer(&mut engine, until_eos(eos.clone(), 3, false)), 0);
    assert!(late.len() >= 3 && late[0] == tokens[0] && late[1] != tokens[1], "{late:?}");
}

#[test]
fn the_model_can_end_by_itself() {
    let model = SimModel { eos_every: Some(5), ..SimModel::default() };
    let mut engine = engine(model, 64, CONFIG);
    for first in 1..20 {
        let got = answer(&mut engine, request(&[first], 40));
        let want = model.expected_tokens(&[first], 40);
        let finish = if want.last() == Some(&EOS) { Finish::Stop } else { Finish::Length };
        assert_eq!((ids(&got, 0), finishes(&got)), (want, vec![finish]));
    }
}

#[test]
fn a_choice_that_was_complete_when_it_is_resumed_generates_nothing() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let tokens = expected_tokens(0, &[9], 6);
    let resumed = |n: usize| Choice { resume: tokens[..n].to_vec(), ..choice() };
    let got = answer(&mut engine, Request { choices: vec![resumed(6), resumed(4)], ..request(&[9], 6) });
    assert_eq!((ids(&got, 0), ids(&got, 1)), (vec![], tokens[4..].to_vec()));
    let got = answer(&mut engine, Request { choices: vec![resumed(6)], ..request(&[9], 6) });
    let done = Output::Done { finish: vec![Finish::Length], prompt_tokens: 1, completion_tokens: 6, cached_tokens: 0 };
    assert_eq!(got, [Output::Started { prompt_tokens: 1, cached_tokens: 0 }, done]);
}

#[test]
fn choices_of_one_request_differ_and_repeat() {
    let model = SimModel { shape: Shape::Spread, ..SimModel::default() };
    let mut engine = engine(model, 64, CONFIG);
    let mut once = || {
        let got = answer(&mut engine, Request { choices: vec![choice(), choice()], ..request(&[9], 12) });
        (ids(&got, 0), ids(&got, 1))
    };
    let first = once();
    assert_ne!(first.0, first.1);
    assert_eq!(first, once());
}

#[test]
fn logits_that_are_not_numbers_end_only_their_request() {
    let mut engine = hooked(CONFIG, |batch, logits| {
        if let Some(logits) = logits {
            for (row, chunk) in batch.chunks.iter().filter(|c| c.wanted == Wanted::Logits).enumerate() {
                if chunk.start == 5 {
                    logits.row_mut(row)[3] = f32::NAN;
                }
            }
        }
        Ok(())
    });
    let good = engine.submit(request(&[1; 8], 10)).unwrap();
    let bad = engine.submit(Request { choices: vec![choice(), choice()], ..request(&[2; 3], 10) }).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(ids(&outputs[&good], 0), expected_tokens(0, &[1; 8], 10));
    assert_eq!(failure(&outputs[&bad]), EngineError::BadLogits { choice: 0, index: 3 });
    assert_eq!(ids(&outputs[&bad], 0), expected_tokens(0, &[2; 3], 3));
    assert_eq!(in_use(&engine), (0, 0, 0));
}

/// The mean of the hidden states, of length 1: the same in one piece, in chunks, beside others, with its beginning cached or after a
/// preemption.
#[test]
fn an_embedding_does_not_depend_on_how_its_prompt_was_computed() {
    let prompt: Vec<TokenId> = (0..40).map(|i| i * 7 % 256).collect();
    let sums = prompt.iter().fold([0.0f64; 8], |sums, id| {
        let state = hidden_state(*id);
        std::array::from_fn(|i| sums[i] + f64::from(state[i]))
    });
    let length = sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt();
    let embed = || Request { goal: Goal::Embedding, max_tokens: None, ..request(&prompt, 1) };
    let vectors = |outputs: &[Output]| -> Vec<Vec<f32>> {
        let of = |output: &Output| if let Output::Embedding { values } = output { Some(values.clone()) } else { None };
        outputs.iter().filter_map(of).collect()
    };
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let alone = answer(&mut engine, embed());
    let values = vectors(&alone);
    assert_eq!(values.len(), 1);
    for (value, sum) in values[0].iter().zip(sums) {
        assert!((f64::from(*value) - sum / length).abs() < 1e-6, "{value} {}", sum / length);
    }
    assert!(matches!(alone.last(), Some(Output::Done { completion_tokens: 0, cached_tokens: 0, .. })), "{alone:?}");
    assert_eq!(finishes(&alone), [Finish::Stop]);
    // Now its blocks are there, and others run beside it.
    let others: Vec<_> = (1..4).map(|id| engine.submit(request(&[id; 30], 20)).unwrap()).collect();
    let id = engine.submit(embed()).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(vectors(&outputs[&id]), values);
    assert!(matches!(outputs[&id].last(), Some(Output::Done { cached_tokens: 0, .. })));
    assert!(others.iter().all(|id| ids(&outputs[id], 0).len() == 20));
    assert_eq!(engine.stats().kv_blocks_used, 0);
    let two = Request { choices: vec![choice(), choice()], ..embed() };
    assert!(matches!(engine.submit(two), Err(EngineError::Invalid { .. })));
}

#[test]
fn text_that_panics_ends_only_its_request() {
    struct Broken;
    impl OutputText for Broken {
        fn push(&mut self, _: TokenId) -> Pushed {
            panic!("broken text")
        }
        fn finish(&mut self) -> Piece {
            Piece::default()
        }
    }
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let good = engine.submit(request(&[1], 10)).unwrap();
    let choices = vec![Choice { text: Box::new(Broken), constraint: None, resume: vec![] }];
    let bad = engine.submit(Request { choices, ..request(&[2], 10) }).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(ids(&outputs[&good], 0).len(), 10);
    assert!(matches!(failure(&outputs[&bad]), EngineError::Internal(_)));
}

#[test]
fn a_failed_forward_pass_ends_everything() {
    let mut steps = 0;
    let mut engine = hooked(CONFIG, move |_, logits| {
        steps += usize::from(logits.is_none());
        if steps > 3 { Err(RunnerError::Forward("device lost".into())) } else { Ok(()) }
    });
    let a = engine.submit(request(&[1; 4], 10)).unwrap();
    let queued = engine.submit(Request { choices: (0..6).map(|_| choice()).collect(), ..request(&[2], 10) }).unwrap();
    let outputs = run(&mut engine);
    for id in [a, queued] {
        assert_eq!(failure(&outputs[&id]), EngineError::Forward("device lost".into()));
        assert_eq!(outputs[&id].iter().filter(|o| o.is_terminal()).count(), 1);
    }
    assert!(engine.has_failed());
    assert_eq!(engine.submit(request(&[1], 1)).unwrap_err(), EngineError::Overloaded(Overloaded::Dead));
    assert_eq!(in_use(&engine), (0, 0, 0));
}

#[test]
fn out_of_memory_shrinks_the_step_and_only_then_fails_the_request() {
    let limit = Arc::new(Mutex::new(3));
    let now = Arc::clone(&limit);
    let mut engine = hooked(CONFIG, move |batch, _| {
        let tokens: usize = batch.chunks.iter().map(|c| c.tokens.len()).sum();
        if tokens > *now.lock().unwrap() { Err(RunnerError::OutOfMemory("1 GiB".into())) } else { Ok(()) }
    });
    let prompts: Vec<Vec<TokenId>> = (1..=4).map(|i| vec![i; 11]).collect();
    let sent: Vec<_> = prompts.iter().map(|p| engine.submit(request(p, 30)).unwrap()).collect();
    let outputs = run(&mut engine);
    for (id, prompt) in sent.iter().zip(&prompts) {
        assert_eq!(ids(&outputs[id], 0), expected_tokens(0, prompt, 30));
    }
    *limit.lock().unwrap() = 0;
    let got = answer(&mut engine, request(&[1; 20], 5));
    assert_eq!(failure(&got), EngineError::OutOfMemory("1 GiB".into()));
    assert_eq!(in_use(&engine), (0, 0, 0));
}

#[test]
fn a_step_too_small_for_all_is_shared_fairly() {
    let mut engine =
        hooked(
            CONFIG,
            |batch, _| {
                if batch.chunks.len() > 2 { Err(RunnerError::OutOfMemory(String::new())) } else { Ok(()) }
            },
        );
    let sent: Vec<_> = (1..=4).map(|i| engine.submit(request(&[i], 60)).unwrap()).collect();
    let mut outputs = Vec::new();
    let mut most_apart = 0;
    for _ in 0..100 {
        engine.step(&mut outputs);
        let tokens = |id: &RequestId| {
            let mine = |o: &&(RequestId, Output)| o.0 == *id && matches!(o.1, Output::Token { .. });
            outputs.iter().filter(mine).count()
        };
        let counts: Vec<_> = sent.iter().map(tokens).collect();
        if counts.iter().all(|n| *n > 0) {
            most_apart = most_apart.max(counts.iter().max().unwrap() - counts.iter().min().unwrap());
        }
    }
    assert!((1..=4).contains(&most_apart), "{most_apart}");
}

#[test]
fn penalties_see_the_tokens_that_were_generated_and_resumed() {
    let model = SimModel { vocab: 320, ..SimModel::default() };
    let once = |choices| Request {
        sampling: Sampling { presence_penalty: 1e6, ..Sampling::greedy() },
        ignore_eos: true,
        choices,
        ..request(&[5], 60)
    };
    let repeats = |ids: &[TokenId]| ids.len() - ids.iter().collect::<std::collections::BTreeSet<_>>().len();
    let mut engine = engine(model, 64, CONFIG);
    assert!(repeats(&model.expected_tokens(&[5], 60)) > 5);
    let all = ids(&answer(&mut engine, once(vec![choice()])), 0);
    assert_eq!((all.len(), repeats(&all)), (60, 0));
    let resumed = Choice { resume: all[..30].to_vec(), ..choice() };
    assert_eq!(ids(&answer(&mut engine, once(vec![resumed])), 0), all[30..]);
}

#[test]
fn a_finished_choice_gives_its_place_back_before_the_request_ends() {
    let mut engine = engine(SimModel::default(), 64, EngineConfig { slots: 2, queue: 0, ..CONFIG });
    let nearly = Choice { resume: expected_tokens(0, &[1], 19), ..choice() };
    engine.submit(Request { choices: vec![choice(), nearly], ..request(&[1], 20) }).unwrap();
    assert!(engine.submit(request(&[2], 1)).is_err());
    let mut outputs = Vec::new();
    while engine.stats().generated_tokens < 4 {
        engine.step(&mut outputs);
    }
    engine.submit(request(&[2], 1)).unwrap();
    run(&mut engine);
}

#[test]
fn logprobs_come_with_each_token_when_asked_for() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let got = answer(&mut engine, Request { logprobs: Some(2), ..request(&[5], 2) });
    for output in &got {
        if let Output::Token { id, logprobs, .. } = output {
            let logprobs = logprobs.as_ref().unwrap();
            assert_eq!((logprobs.chosen, logprobs.top[0], logprobs.top.len()), (0.0, (*id, 0.0), 2));
        }
    }
    assert_eq!(ids(&got, 0).len(), 2);
}

#[test]
fn simulated_text_is_the_words_of_its_tokens() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let prompt = rbee_engine::sim::encode("Once upon a time");
    let choices = vec![Choice { text: Box::new(SimText), constraint: None, resume: vec![] }];
    let got = answer(&mut engine, Request { choices, ..request(&prompt, 6) });
    assert_eq!(text(&got), words(&expected_tokens(0, &prompt, 6)));
}
