//! What guessed tokens bring on text that repeats, and what they cost on text that does not.
//!
//! Random weights write nothing that repeats, so the text is given: a constraint leaves one token at each place.

use std::time::Instant;

use rbee_engine::{Choice, Constraint, Engine, Request, Speculation, TokenId};

use super::{NoText, median, prompt, request, turn};

const PROMPT: usize = 400;
const ANSWER: usize = 240;

/// Allows one token at each place.
struct Given {
    text: Vec<TokenId>,
    told: usize,
    mask: Vec<u32>,
}

impl Given {
    fn new(text: Vec<TokenId>, vocab: usize) -> Self {
        let mut mask = vec![0; vocab.div_ceil(32)];
        mask[text[0] as usize / 32] |= 1 << (text[0] % 32);
        Self { text, told: 0, mask }
    }
}

impl Constraint for Given {
    fn mask(&mut self) -> Result<Option<&[u32]>, String> {
        Ok(Some(&self.mask))
    }

    fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        self.mask[id as usize / 32] = 0;
        self.told += 1;
        let next = self.text.get(self.told);
        if let Some(next) = next {
            self.mask[*next as usize / 32] |= 1 << (next % 32);
        }
        Ok(next.is_none())
    }
}

/// What an answer is.
#[derive(Clone, Copy)]
enum Text {
    /// The prompt again, with one token in sixteen replaced: code that is edited.
    Edited,
    /// New tokens, and after every forty of them forty of the prompt: a summary with quotes.
    Quoted,
    /// No two tokens that were there before.
    New,
    /// Two tokens of the prompt, and then always another one: every guess is wrong.
    Misleading,
}

impl Text {
    /// The answer to a prompt, of tokens that the prompt does not have but where it repeats it.
    fn answer(self, prompt: &[TokenId], seed: usize) -> Vec<TokenId> {
        let new = |i: usize| (30_000 + (i * 7 + seed * 13) % 1_900) as TokenId;
        let token = |i: usize| match self {
            Self::Edited if i % 16 == 11 => new(i),
            Self::Quoted if (i / 40).is_multiple_of(2) => new(i),
            Self::Misleading if i % 3 == 2 => new(i),
            Self::Misleading => prompt[(i / 3 * 5 + i % 3) % prompt.len()],
            Self::Edited | Self::Quoted => prompt[i % prompt.len()],
            // The second of two is another one each time.
            Self::New => {
                if i.is_multiple_of(2) {
                    prompt[i / 2 % prompt.len()]
                } else {
                    new(i)
                }
            }
        };
        (0..ANSWER).map(token).collect()
    }
}

/// Tokens a second of so many answers to one prompt, from where all of them have begun.
fn decode(engine: &mut Engine, text: Text, streams: usize, seed: usize) -> f64 {
    let vocab = engine.limits().vocab;
    let prompt = prompt(seed, PROMPT);
    let choice = |i: usize| Choice {
        text: Box::new(NoText),
        constraint: Some(Box::new(Given::new(text.answer(&prompt, seed * streams + i), vocab))),
        resume: Vec::new(),
    };
    let choices = (0..streams).map(choice).collect();
    engine.submit(Request { ignore_eos: false, choices, ..request(prompt.clone(), ANSWER) }).unwrap();
    // A prompt's last step has the first token.
    let mut tokens = 0;
    while tokens < streams {
        tokens += turn(engine).0.len();
    }
    let before = Instant::now();
    let mut tokens = 0;
    while engine.has_work() {
        tokens += turn(engine).0.len();
    }
    tokens as f64 / before.elapsed().as_secs_f64()
}

pub(crate) fn speculation(engine: &mut Engine, rounds: usize) {
    println!("\nTokens a second of answers of {ANSWER} tokens to prompts of {PROMPT}, without and with guesses:\n");
    println!("| answer | streams | without | with | ratio | guessed | right |\n|---|---|---|---|---|---|---|");
    let settings =
        [Text::Edited, Text::Quoted, Text::New, Text::Misleading].map(|text| [1, 4].map(|streams| (text, streams)));
    for (text, streams) in settings.into_iter().flatten() {
        let name = match text {
            Text::Edited => "the prompt, one token in 16 replaced",
            Text::Quoted => "half new, half quoted, 40 tokens each",
            Text::New => "nothing repeats",
            Text::Misleading => "all guesses are wrong",
        };
        let (mut without, mut with) = (Vec::new(), Vec::new());
        let before = engine.stats();
        for round in 0..rounds.max(1) {
            for (speculation, rates) in [(Speculation::Off, &mut without), (Speculation::Measured, &mut with)] {
                engine.set_speculation(speculation);
                // Each its own prompt, so that neither finds the other's in the prefix cache.
                rates.push(decode(engine, text, streams, 2 * round + usize::from(speculation == Speculation::Off)));
            }
        }
        engine.set_speculation(Speculation::Off);
        let after = engine.stats();
        let guessed = after.drafted_tokens - before.drafted_tokens;
        let right = after.accepted_tokens - before.accepted_tokens;
        let (without, with) = (median(without), median(with));
        println!(
            "| {name} | {streams} | {without:.1} | {with:.1} | {:.2} | {guessed} | {:.0} % |",
            with / without,
            100.0 * right as f64 / guessed.max(1) as f64,
        );
    }
}
