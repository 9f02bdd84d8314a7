//! Answers that must have a form.

use std::sync::{Arc, Mutex};

use rbee_engine::sim::{EOS, FIRST_WORD, Shape, expected_tokens};
use rbee_engine::{EngineError, Finish};

use super::*;

const SPREAD: SimModel = SimModel { seed: 0, vocab: 1024, eos_every: None, shape: Shape::Spread };

/// Words of the vocabulary as text of a form: at each place one of these ids.
struct Places {
    places: Vec<Vec<TokenId>>,
    told: usize,
    mask: Vec<u32>,
}

fn places(places: &[&[TokenId]]) -> Choice {
    let places = places.iter().map(|ids| ids.to_vec()).collect();
    Choice { constraint: Some(Box::new(Places { places, told: 0, mask: Vec::new() })), ..choice() }
}

impl Constraint for Places {
    fn mask(&mut self) -> Result<Option<&[u32]>, String> {
        let place = self.places.get(self.told).ok_or("asked beyond its end")?;
        // Only as long as it must be.
        self.mask = vec![0; place.iter().max().map_or(0, |id| *id as usize / 32 + 1)];
        for id in place {
            self.mask[*id as usize / 32] |= 1 << (id % 32);
        }
        Ok(Some(&self.mask))
    }

    fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        if !self.places.get(self.told).is_some_and(|place| place.contains(&id)) {
            return Err(format!("{id} may not come"));
        }
        self.told += 1;
        Ok(self.told == self.places.len())
    }
}

fn finish(outputs: &[Output]) -> Result<Vec<Finish>, EngineError> {
    match outputs.last() {
        Some(Output::Done { finish, .. }) => Ok(finish.clone()),
        Some(Output::Failed(error)) => Err(error.clone()),
        other => panic!("{other:?}"),
    }
}

fn walk(one_in: u64, complete: usize) -> Choice {
    Choice { constraint: Some(Box::new(Walk { one_in, complete, ..Walk::default() })), ..choice() }
}

#[test]
fn a_mask_that_leaves_one_token_gets_that_token_however_unlikely_it_is() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    for sampling in [
        Sampling::default(),
        Sampling::greedy(),
        Sampling { logit_bias: vec![(300, -100.0), (301, 100.0)], top_k: Some(1), ..Sampling::default() },
        Sampling { top_p: 0.1, min_p: 1.0, presence_penalty: 2.0, ..Sampling::default() },
    ] {
        let choices = vec![places(&[&[300], &[1023], &[0, 900]])];
        // The end is allowed at the third place, but the model would rather not.
        let got = answer(&mut engine, Request { sampling, choices, ..request(&[9], 10) });
        assert_eq!(ids(&got, 0)[..2], [300, 1023]);
        assert_eq!(finish(&got), Ok(vec![Finish::Stop]));
    }
}

/// Its last token is sent with its text and all that was held back, and nothing is computed after it.
#[test]
fn a_complete_form_ends_the_choice_with_its_last_token() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let stop = format!("{}!", word(302));
    let form = places(&[&[300], &[301], &[302]]);
    let choices = vec![Choice { text: stopping(&stop).text, ..form }];
    let got = answer(&mut engine, Request { choices, ..request(&[9], 3) });
    assert_eq!((ids(&got, 0), text(&got)), (vec![300, 301, 302], words(&[300, 301, 302])));
    assert_eq!(finish(&got), Ok(vec![Finish::Stop]), "also where no further token was asked for");
    assert_eq!(engine.stats().generated_tokens, 3);
    let got = answer(&mut engine, Request { choices: vec![places(&[&[300], &[301]])], ..request(&[9], 1) });
    assert_eq!(finish(&got), Ok(vec![Finish::Length]));
}

#[test]
fn the_end_comes_only_where_the_form_allows_it() {
    let sure_of_the_end = SimModel { eos_every: Some(1), ..SimModel::default() };
    let mut engine = engine(sure_of_the_end, 64, CONFIG);
    let form = || vec![places(&[&[300], &[301], &[EOS, 302], &[303]])];
    let got = answer(&mut engine, Request { choices: form(), ..request(&[9], 10) });
    assert_eq!((ids(&got, 0), finish(&got)), (vec![300, 301, EOS], Ok(vec![Finish::Stop])));
    // Held back by min_tokens, as without a form.
    let got = answer(&mut engine, Request { choices: form(), min_tokens: 4, ..request(&[9], 10) });
    assert_eq!((ids(&got, 0), finish(&got)), (vec![300, 301, 302, 303], Ok(vec![Finish::Stop])));
    // But a form that has nothing else ends before.
    let short = vec![places(&[&[300], &[EOS]])];
    let got = answer(&mut engine, Request { choices: short, min_tokens: 4, ..request(&[9], 10) });
    assert_eq!((ids(&got, 0), finish(&got)), (vec![300, EOS], Ok(vec![Finish::Stop])));
}

#[test]
fn a_form_that_cannot_go_on_ends_its_request_alone_and_says_where() {
    struct Fails(fn() -> Result<bool, String>);
    impl Constraint for Fails {
        fn mask(&mut self) -> Result<Option<&[u32]>, String> {
            (self.0)().map(|_| None)
        }
        fn accept(&mut self, _: TokenId) -> Result<bool, String> {
            Ok(false)
        }
    }
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let good = engine.submit(request(&[1], 10)).unwrap();
    let failing = |form| vec![choice(), Choice { constraint: Some(Box::new(Fails(form))), ..choice() }];
    let failed = engine.submit(Request { choices: failing(|| Err("too large".into())), ..request(&[2], 10) }).unwrap();
    let panicked = engine.submit(Request { choices: failing(|| panic!("broken")), ..request(&[3], 10) }).unwrap();
    // A token outside of the vocabulary is none.
    let nothing = engine.submit(Request { choices: vec![places(&[&[300], &[1024]])], ..request(&[4], 10) }).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(ids(&outputs[&good], 0), expected_tokens(0, &[1], 10));
    let error = |choice, index, problem: &str| Err(EngineError::Constraint { choice, index, problem: problem.into() });
    assert_eq!(finish(&outputs[&failed]), error(1, 0, "too large"));
    assert!(matches!(finish(&outputs[&panicked]), Err(EngineError::Internal(_))));
    assert_eq!(finish(&outputs[&nothing]), error(0, 1, "no token is left that may come next"));
    assert_eq!(in_use(&engine), (0, 0, 0));
}

#[test]
fn what_contradicts_a_form_is_refused_by_name() {
    let mut engine = engine(SimModel::default(), 64, CONFIG);
    let formed = || Request { choices: vec![places(&[&[300], &[301]])], ..request(&[9], 10) };
    let resumed = |ids: &[TokenId]| Request {
        choices: vec![Choice { resume: ids.to_vec(), ..places(&[&[300], &[301]]) }],
        ..request(&[9], 10)
    };
    for (bad, name) in [
        (Request { ignore_eos: true, ..formed() }, "ignore_eos"),
        (Request { goal: Goal::Embedding, ..formed() }, "choices"),
        (resumed(&[400]), "resume"),
        (resumed(&[300, 301, 302]), "resume"),
    ] {
        match engine.submit(bad) {
            Err(EngineError::Invalid { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(!engine.has_work());
}

#[test]
fn a_resumed_form_goes_on_with_the_tokens_it_would_have_had() {
    let mut engine = engine(SPREAD, 64, CONFIG);
    let once = |resume: &[TokenId]| Request {
        choices: vec![Choice { resume: resume.to_vec(), ..walk(40, 30) }],
        ..request(&[5], 30)
    };
    let all = ids(&answer(&mut engine, once(&[])), 0);
    assert!(all.len() > 5 && all.iter().all(|id| *id == EOS || *id >= FIRST_WORD), "{all:?}");
    for cut in 0..all.len() {
        assert_eq!(ids(&answer(&mut engine, once(&all[..cut])), 0), all[cut..], "{cut}");
    }
}

/// Of the forms of a batch none has a say in another's tokens, and taking a sequence's memory away does not disturb its own.
#[test]
fn forms_of_a_batch_are_those_of_each_alone() {
    let once =
        |i: u32| Request { choices: vec![walk(20 + u64::from(i), 18), choice(), walk(60, 18)], ..request(&[i; 6], 18) };
    let tokens = |outputs: &[Output]| [0, 1, 2].map(|choice| ids(outputs, choice));
    let alone: Vec<_> = (1..5).map(|i| tokens(&answer(&mut engine(SPREAD, 64, CONFIG), once(i)))).collect();
    let mut engine = engine(SPREAD, 14, EngineConfig { queue: 16, ..CONFIG });
    let sent: Vec<_> = (1..5).map(|i| engine.submit(once(i)).unwrap()).collect();
    let outputs = run(&mut engine);
    assert!(engine.stats().preemptions > 0);
    for (id, alone) in sent.iter().zip(&alone) {
        assert_eq!(&tokens(&outputs[id]), alone);
    }
}

/// A mask may be computed while the model computes: it is announced once before each time that it is asked for, and not for
/// tokens that are replayed.
#[test]
fn each_mask_is_announced_before_the_step_that_needs_it() {
    struct Noted(Arc<Mutex<String>>);
    impl Constraint for Noted {
        fn mask(&mut self) -> Result<Option<&[u32]>, String> {
            self.0.lock().unwrap().push('m');
            Ok(None)
        }
        fn accept(&mut self, _: TokenId) -> Result<bool, String> {
            self.0.lock().unwrap().push('a');
            Ok(false)
        }
        fn prepare(&mut self) {
            self.0.lock().unwrap().push('p');
        }
    }
    let noted = Arc::new(Mutex::new(String::new()));
    let mut engine = hooked(CONFIG, {
        let noted = Arc::clone(&noted);
        move |_, logits| {
            noted.lock().unwrap().push(if logits.is_none() { '(' } else { ')' });
            Ok(())
        }
    });
    let resume = expected_tokens(0, &[9], 2);
    let form = Choice { constraint: Some(Box::new(Noted(Arc::clone(&noted)))), resume, ..choice() };
    let got = answer(&mut engine, Request { choices: vec![form], ..request(&[9], 4) });
    assert_eq!(ids(&got, 0), expected_tokens(0, &[9], 4)[2..], "any token may come");
    assert_eq!(*noted.lock().unwrap(), "aap()map()ma");
}

#[test]
fn logprobs_of_a_form_are_those_of_the_model() {
    let mut engine = engine(SPREAD, 64, CONFIG);
    let plain = answer(&mut engine, Request { logprobs: Some(3), ..request(&[5], 1) });
    let formed = Request { logprobs: Some(3), choices: vec![places(&[&[300]])], ..request(&[5], 1) };
    let formed = answer(&mut engine, formed);
    let top = |outputs: &[Output]| {
        outputs.iter().find_map(|output| match output {
            Output::Token { logprobs, .. } => logprobs.clone(),
            _ => None,
        })
    };
    let (plain, formed) = (top(&plain).unwrap(), top(&formed).unwrap());
    assert_eq!(plain.top, formed.top);
    assert!(formed.chosen < plain.top[0].1 - 1.0, "{formed:?}");
}
