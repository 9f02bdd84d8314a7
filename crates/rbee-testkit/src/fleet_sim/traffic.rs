//! Traffic for a simulated fleet: generated from a seed, or as it was recorded.

use std::time::Duration;

use rbee_wire::{KeyId, ModelRef};
use serde::Deserialize;

use super::Model;

/// A job that comes.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// When.
    pub at: Duration,
    /// Whose it is.
    pub owner: Option<KeyId>,
    /// What it is for.
    pub model: ModelRef,
    /// Tokens of its prompt.
    pub prompt: u64,
    /// Tokens of its answer.
    pub answer: u64,
}

/// A line of a recorded file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Seconds.
    at: f64,
    model: ModelRef,
    prompt: u64,
    answer: u64,
    #[serde(default)]
    owner: Option<KeyId>,
}

/// Reads recorded traffic: a line of JSON for each job.
///
/// # Errors
/// The number of the line that says something else, and what is wrong with it.
pub fn recorded(text: &str) -> Result<Vec<Arrival>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parsed = lines.map(|(number, line)| {
        let wrong = |what: String| format!("line {}: {what}", number + 1);
        let Line { at, model, prompt, answer, owner } =
            serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        let at = Duration::try_from_secs_f64(at).map_err(|error| wrong(error.to_string()))?;
        Ok(Arrival { at, owner, model, prompt, answer: answer.max(1) })
    });
    parsed.collect()
}

/// So many jobs that come one after the other by chance, this many a second, each for a model by its weight. Short prompts and
/// answers are common, long ones are rare.
pub fn poisson(seed: u64, jobs: usize, rate: f64, models: &[Model]) -> Vec<Arrival> {
    let mut random = Random::new(seed);
    let weight: f64 = models.iter().map(|model| model.weight).sum();
    let mut at = Duration::ZERO;
    let arrival = |_| {
        at += random.wait(rate);
        let mut left = random.unit() * weight;
        let chosen = models.iter().find(|model| {
            left -= model.weight;
            left < 0.0
        });
        let model = chosen.or(models.last()).map_or(ModelRef::Tinybee, |model| model.model.clone());
        // More than half of all is one owner's.
        let owner = KeyId::new(format!("key{}", (random.unit() * 8.0).floor().max(4.0))).ok();
        let prompt = 10 + (random.wait(1.0).as_secs_f64() * 400.0) as u64;
        let answer = 1 + (random.wait(1.0).as_secs_f64() * 150.0) as u64;
        Arrival { at, owner, model, prompt, answer }
    };
    (0..jobs).map(arrival).collect()
}

/// Chance from a seed: SplitMix64 (Steele, Lea, Flood 2014), the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins with a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A whole number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to 1, without 1.
    pub fn unit(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Whether something of this likelihood happens.
    pub fn chance(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// Time until the next of what comes so many times a second.
    pub fn wait(&mut self, rate: f64) -> Duration {
        Duration::from_secs_f64(-(1.0 - self.unit()).ln() / rate)
    }
}
