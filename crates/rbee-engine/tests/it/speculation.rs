//! Guessed tokens: they change when tokens come and never which.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rbee_engine::sim::{EOS, Shape};
use rbee_engine::{EngineStats, Finish};

use super::*;

const ALWAYS: EngineConfig = EngineConfig { speculation: Speculation::Always, ..CONFIG };
const OFF: EngineConfig = EngineConfig { speculation: Speculation::Off, ..CONFIG };

/// An engine whose model is all but sure of `token(position)`, and the number of rows of its last step.
fn written(config: EngineConfig, token: impl Fn(usize) -> TokenId + Send + 'static) -> (Engine, Arc<AtomicUsize>) {
    let rows = Arc::new(AtomicUsize::new(0));
    let engine = hooked(config, {
        let rows = Arc::clone(&rows);
        move |batch, logits| {
            rows.store(batch.chunks.iter().map(|chunk| chunk.tokens.len()).sum(), Ordering::Relaxed);
            let Some(logits) = logits else { return Ok(()) };
            let mut row = 0;
            for chunk in &batch.chunks {
                let (end, wanted) = (chunk.start + chunk.tokens.len(), chunk.wanted.rows(chunk.tokens.len()));
                assert!(end <= 256, "beyond the context");
                for position in end - wanted..end {
                    logits.row_mut(row).fill(0.0);
                    logits.row_mut(row)[token(position + 1) as usize] = 1000.0;
                    row += 1;
                }
            }
            Ok(())
        }
    });
    (engine, rows)
}

/// Runs to the end, each step taking `cost` by its rows. The steps, and the stats after each.
fn timed(engine: &mut Engine, rows: &AtomicUsize, cost: impl Fn(usize) -> Duration) -> Vec<EngineStats> {
    let (mut outputs, mut stats) = (Vec::new(), Vec::new());
    while engine.has_work() {
        engine.step(&mut outputs);
        engine.took(cost(rows.load(Ordering::Relaxed)));
        stats.push(engine.stats());
    }
    stats
}

const STEP: Duration = Duration::from_millis(10);

fn seven(position: usize) -> TokenId {
    300 + (position % 7) as TokenId
}

#[test]
fn text_that_repeats_comes_in_a_fraction_of_the_steps() {
    for (speculation, steps) in [(Speculation::Off, 201), (Speculation::Measured, 40), (Speculation::Always, 40)] {
        let (mut engine, rows) = written(EngineConfig { speculation, ..CONFIG }, seven);
        engine.submit(request(&[1; 9], 200)).unwrap();
        let stats = timed(&mut engine, &rows, |_| STEP);
        let EngineStats { drafted_tokens, accepted_tokens, generated_tokens, .. } = engine.stats();
        assert!(stats.len() <= steps, "{speculation:?}: {} steps", stats.len());
        assert_eq!(generated_tokens, 200);
        let off = speculation == Speculation::Off;
        assert!((drafted_tokens == 0) == off && accepted_tokens >= drafted_tokens * 4 / 5, "{:?}", engine.stats());
    }
}

#[test]
fn rows_that_cost_as_much_as_steps_are_hardly_ever_guessed() {
    let (mut engine, rows) = written(CONFIG, seven);
    (0..4).for_each(|i| {
        engine.submit(request(&[1 + i; 9], 220)).unwrap();
    });
    let stats = timed(&mut engine, &rows, |rows| STEP * rows as u32);
    let drafting = stats.windows(2).filter(|two| two[1].drafted_tokens > two[0].drafted_tokens).count();
    assert!((1..=10).contains(&drafting), "{drafting} of {} steps", stats.len());
}

#[test]
fn guesses_that_are_always_wrong_are_given_up() {
    // Two tokens that are there again and again, and after them always others, one more of them than the last time.
    let (mut engine, rows) = written(CONFIG, |position| match position % 18 {
        0 | 3 | 7 | 12 => 300,
        1 | 4 | 8 | 13 => 301,
        _ => 400 + position as TokenId,
    });
    engine.submit(request(&[1], 240)).unwrap();
    let stats = timed(&mut engine, &rows, |_| STEP);
    let after = |steps: usize| stats[steps].drafted_tokens;
    assert!(after(60) > 0 && after(120) == after(239), "{} {} {}", after(60), after(120), after(239));
    assert_eq!(engine.stats().accepted_tokens, 0);
}

/// All outputs of a request in an engine of such a text.
fn outputs(config: EngineConfig, token: fn(usize) -> TokenId, request: Request) -> (Vec<Output>, EngineStats) {
    let (mut engine, _) = written(config, token);
    let outputs = answer(&mut engine, request);
    assert_eq!(in_use(&engine), (0, 0, 0));
    (outputs, engine.stats())
}

#[test]
fn an_answer_ends_with_the_token_that_ends_it_though_more_was_guessed() {
    let with_end = |position: usize| if position == 53 { EOS } else { seven(position) };
    let stop = |word_at: usize| stopping(&format!("{}{}", word(seven(word_at)), word(seven(word_at + 1))));
    for max_tokens in 30..50 {
        let once = || Request { logprobs: Some(2), ..request(&[1; 9], max_tokens) };
        let (got, stats) = outputs(ALWAYS, with_end, once());
        assert_eq!(got, outputs(OFF, with_end, once()).0);
        assert!(stats.accepted_tokens > 10);
        assert_eq!(stats.generated_tokens, max_tokens.min(45) as u64);
    }
    let once = || Request { max_tokens: None, ..request(&[1; 9], 1) };
    assert_eq!(outputs(ALWAYS, seven, once()).0, outputs(OFF, seven, once()).0, "the whole context");
    for at in 30..38 {
        // After twenty tokens with other words.
        let late = |position: usize| {
            if position < 29 { seven(position) + 100 * (position / 14 % 2) as u32 } else { seven(position) }
        };
        let once = || Request { choices: vec![stop(at), choice()], ..request(&[1; 9], 60) };
        let of = |(outputs, _): (Vec<Output>, EngineStats)| [0, 1].map(|choice| ids(&outputs, choice));
        assert_eq!(of(outputs(ALWAYS, late, once())), of(outputs(OFF, late, once())), "{at}");
    }
}

/// Allows at each place one token.
struct Copied {
    text: Vec<TokenId>,
    told: usize,
    mask: Vec<u32>,
}

impl Constraint for Copied {
    fn mask(&mut self) -> Result<Option<&[u32]>, String> {
        let id = *self.text.get(self.told).ok_or("asked beyond its end")?;
        self.mask = vec![0; id as usize / 32 + 1];
        self.mask[id as usize / 32] = 1 << (id % 32);
        Ok(Some(&self.mask))
    }

    fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        if self.text.get(self.told) != Some(&id) {
            return Err(format!("{id} may not come"));
        }
        self.told += 1;
        Ok(self.told == self.text.len())
    }
}

#[test]
fn a_form_has_its_say_about_every_guess() {
    // The prompt again, with every tenth token another one.
    let prompt: Vec<TokenId> = (0..60).map(|i| 300 + i).collect();
    let edited: Vec<TokenId> = prompt.iter().map(|id| if id % 10 == 9 { id + 200 } else { *id }).collect();
    let spread = SimModel { shape: Shape::Spread, ..SimModel::default() };
    let mut engines = [ALWAYS, OFF].map(|config| engine(spread, 64, config));
    let answers = engines.each_mut().map(|engine| {
        let copied = || Box::new(Copied { text: edited.clone(), told: 0, mask: Vec::new() });
        let choices = (0..2).map(|_| Choice { constraint: Some(copied()), ..choice() }).collect();
        answer(engine, Request { choices, logprobs: Some(3), ..request(&prompt, 90) })
    });
    for choice in 0..2 {
        assert_eq!(ids(&answers[0], choice), edited);
        let tokens = |outputs: &[Output]| {
            let of = |o: &&Output| matches!(o, Output::Token { choice: c, .. } if *c == choice);
            outputs.iter().filter(of).cloned().collect::<Vec<_>>()
        };
        assert_eq!(tokens(&answers[0]), tokens(&answers[1]));
    }
    assert!(matches!(answers[0].last(), Some(Output::Done { finish, .. }) if *finish == [Finish::Stop; 2]));
    let stats = engines[0].stats();
    assert!(stats.accepted_tokens > 60 && stats.drafted_tokens > stats.accepted_tokens, "{stats:?}");
}

/// What was computed for a guess that was wrong is in nobody's prefix, and who gets the block sees nothing of it.
#[test]
fn a_wrong_guess_leaves_nothing_behind() {
    struct Begins(bool);
    impl Constraint for Begins {
        fn mask(&mut self) -> Result<Option<&[u32]>, String> {
            // 301, and then anything.
            const ONLY: [u32; 10] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 13];
            Ok(if self.0 { None } else { Some(&ONLY) })
        }
        fn accept(&mut self, _: TokenId) -> Result<bool, String> {
            self.0 = true;
            Ok(false)
        }
    }
    let prompt = [300, 301, 302, 303, 304, 305, 306, 307, 300];
    let model = SimModel::default();
    let mut engine = engine(model, 9, ALWAYS);
    // The model never says what the guess says, which goes on as the prompt did.
    let choices = vec![Choice { constraint: Some(Box::new(Begins(false))), ..choice() }];
    let got = ids(&answer(&mut engine, Request { choices, ..request(&prompt, 12) }), 0);
    assert!(engine.stats().drafted_tokens >= 8 && engine.stats().accepted_tokens == 0);
    let begun: Vec<TokenId> = prompt.into_iter().chain([301]).collect();
    assert_eq!((got[0], &got[1..]), (301, &model.expected_tokens(&begun, 11)[..]));
    let guessed: Vec<TokenId> = begun.into_iter().chain(302..308).chain([300, 301]).collect();
    let hits = engine.stats().prefix_hits;
    let next = answer(&mut engine, request(&guessed, 12));
    assert_eq!(ids(&next, 0), model.expected_tokens(&guessed, 12));
    assert_eq!(engine.stats().prefix_hits - hits, 8, "the whole blocks of the prompt itself");
}

/// A device without memory for guesses gets none, and computes what it always could.
#[test]
fn want_of_memory_takes_guesses_first() {
    let failures = Arc::new(AtomicUsize::new(0));
    let mut engine = hooked(ALWAYS, {
        let failures = Arc::clone(&failures);
        move |batch, _| {
            let tokens: usize = batch.chunks.iter().map(|chunk| chunk.tokens.len()).sum();
            if tokens <= 4 {
                return Ok(());
            }
            failures.fetch_add(1, Ordering::Relaxed);
            Err(RunnerError::OutOfMemory(String::new()))
        }
    });
    let prompt = [300, 301, 300, 301];
    let sent: Vec<_> = (0..4).map(|_| engine.submit(request(&prompt, 20)).unwrap()).collect();
    let outputs = run(&mut engine);
    let want = SimModel::default().expected_tokens(&prompt, 20);
    assert!(sent.iter().all(|id| ids(&outputs[id], 0) == want));
    assert!((1..10).contains(&failures.load(Ordering::Relaxed)));
}
