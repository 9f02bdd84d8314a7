//! What it costs to hold eight answers to a schema: steps with and without, and with masks made beside the step.

use std::sync::mpsc::{Receiver, Sender, channel};

use rbee_engine::{Choice, Constraint, Engine, Request, Sampling, TokenId};
use rbee_tokenizer::{Form, Grammar, Grammars, Matcher, Tokenizer};
use serde_json::{Map, Value, json};

use super::{NoText, median, prompt, request, turn};

const STREAMS: usize = 8;
const STEPS: usize = 40;

/// A vocabulary of so many tokens: bytes, and words with and without a space before them.
fn tokenizer(vocab: usize) -> Tokenizer {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0x100..0x144).map(|code| char::from_u32(code).unwrap());
    let bytes = (0..=255u8).filter(printable).map(char::from).chain(others).map(String::from);
    let syllables = ["an", "be", "co", "di", "en", "fo", "ga", "he", "in", "ju", "ka", "lo", "me", "no", "or", "pe"];
    let words = (0..).map(|number: usize| {
        let mut rest = number / 4;
        let mut word = String::new();
        while rest > 0 || word.is_empty() {
            word.push_str(syllables[rest % 16]);
            rest /= 16;
        }
        match number % 4 {
            0 => format!("Ġ{word}"),
            1 => word,
            2 => format!("{word}\","),
            _ => format!("Ġ{}{word}", number % 1000),
        }
    });
    let mut entries = Map::new();
    for (id, name) in bytes.chain(words).enumerate() {
        if entries.len() == vocab {
            break;
        }
        entries.entry(name).or_insert_with(|| json!(id));
    }
    for (id, value) in entries.values_mut().enumerate() {
        *value = json!(id);
    }
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": entries, "merges": [] },
    });
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

struct Work {
    matcher: Matcher,
    words: Vec<u32>,
}

/// Gives work away to be done, and gets it back.
type Away = (Sender<(Box<Work>, Sender<Box<Work>>)>, Option<Receiver<Box<Work>>>);

struct Masked {
    here: Option<Box<Work>>,
    away: Option<Away>,
}

impl Masked {
    fn work(&mut self) -> &mut Work {
        if let Some((_, back @ Some(_))) = &mut self.away {
            self.here = back.take().unwrap().recv().ok();
        }
        self.here.as_mut().unwrap()
    }
}

impl Constraint for Masked {
    fn mask(&mut self) -> Result<Option<&[u32]>, String> {
        let made = self.away.as_ref().is_some_and(|(_, back)| back.is_some());
        let work = self.work();
        if !made {
            work.matcher.mask(&mut work.words).map_err(|error| error.to_string())?;
        }
        Ok(Some(&work.words))
    }

    fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        self.work().matcher.accept(id).map_err(|error| error.to_string())
    }

    fn prepare(&mut self) {
        if let Some((work, back)) = &mut self.away
            && let Some(here) = self.here.take()
        {
            let (done, receiver) = channel();
            work.send((here, done)).unwrap();
            *back = Some(receiver);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Setting {
    Free,
    Beside,
    Within,
}

fn schema() -> Value {
    json!({ "type": "object", "properties": { "items": { "type": "array", "minItems": 40, "items": {
        "type": "object",
        "properties": { "name": { "type": "string" }, "count": { "type": "integer" }, "kind": { "enum": ["a", "b", "c"] } },
        "required": ["name", "count", "kind"], "additionalProperties": false,
    } } }, "required": ["items"], "additionalProperties": false })
}

fn formed(
    setting: Setting,
    grammar: &Grammar,
    vocab: usize,
    seed: usize,
    work: &Sender<(Box<Work>, Sender<Box<Work>>)>,
) -> Request {
    let sampling = Sampling { seed: seed as u64, ..Sampling::default() };
    let constraint: Option<Box<dyn Constraint>> = (setting != Setting::Free).then(|| {
        let here = Some(Box::new(Work { matcher: grammar.start(), words: vec![0; vocab.div_ceil(32)] }));
        let away = (setting == Setting::Beside).then(|| (work.clone(), None));
        // Without a thread the work stays here.
        Box::new(Masked { here, away }) as Box<dyn Constraint>
    });
    let choices = vec![Choice { text: Box::new(NoText), constraint, resume: Vec::new() }];
    Request { sampling, ignore_eos: false, choices, ..request(prompt(seed, 32), STEPS + 20) }
}

pub(crate) fn forms(engine: &mut Engine, rounds: usize) {
    let vocab = engine.limits().vocab;
    let grammars = Grammars::new(&tokenizer(vocab), vocab, &[]).unwrap();
    let grammar = grammars.compile(&Form::JsonSchema(schema())).unwrap();
    let (work, queue) = channel::<(Box<Work>, Sender<Box<Work>>)>();
    std::thread::spawn(move || {
        for (mut work, done) in queue {
            work.matcher.mask(&mut work.words).unwrap();
            let _ = done.send(work);
        }
    });
    let settings = [Setting::Free, Setting::Beside, Setting::Within];
    let mut times: [Vec<f64>; 3] = Default::default();
    for round in 0..rounds.max(1) {
        for (setting, times) in settings.iter().zip(&mut times) {
            let sent: Vec<_> = (0..STREAMS)
                .map(|i| engine.submit(formed(*setting, &grammar, vocab, round * STREAMS + i, &work)).unwrap())
                .collect();
            while turn(engine).0.len() < STREAMS {}
            for _ in 0..STEPS {
                let (tokens, took) = turn(engine);
                if tokens.len() == STREAMS {
                    times.push(took.as_secs_f64());
                }
            }
            sent.into_iter().for_each(|id| engine.cancel(id));
            while engine.has_work() {
                turn(engine);
            }
        }
    }
    let [free, beside, within] = times.map(median);
    println!("\nA step of {STREAMS} streams, held to a JSON schema or not:\n");
    println!("| | free | masks beside the step | ratio | masks within the step | ratio |\n|---|---|---|---|---|---|");
    println!(
        "| ms | {:.2} | {:.2} | {:.3} | {:.2} | {:.3} |",
        free * 1e3,
        beside * 1e3,
        beside / free,
        within * 1e3,
        within / free
    );
}
