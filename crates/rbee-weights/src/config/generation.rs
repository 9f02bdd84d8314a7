//! `generation_config.json`: how a model's makers want it sampled.

use serde_json::Value;

use super::reader::{Reader, object};
use crate::Error;

const GENERATION: &str = "generation_config.json";

/// Defaults from `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Top-p.
    pub top_p: Option<f32>,
    /// Top-k.
    pub top_k: Option<u32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

impl GenerationDefaults {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a value is outside its range.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let map = object(GENERATION, bytes)?;
        let read = Reader::new(&map, GENERATION);
        let greedy = read.get("do_sample") == Some(&Value::Bool(false));
        Ok(Self {
            temperature: if greedy { Some(0.0) } else { read.number("temperature", 0.0, 100.0)?.map(|t| t as f32) },
            top_p: read.number("top_p", 0.0, 1.0)?.filter(|p| *p > 0.0).map(|p| p as f32),
            // Zero switches it off.
            top_k: read.number("top_k", 0.0, f64::from(1 << 24))?.map(|k| k as u32).filter(|k| *k > 0),
            repetition_penalty: read.number("repetition_penalty", 0.01, 10.0)?.map(|p| p as f32),
            eos: read.ids("eos_token_id")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_defaults_are_read_or_refused() {
        let read = |text: &str| GenerationDefaults::parse(text.as_bytes());
        let all = read(r#"{"temperature":0.6,"top_p":0.9,"top_k":50,"repetition_penalty":1.1,"eos_token_id":[7,8]}"#);
        let want = GenerationDefaults {
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: Some(50),
            repetition_penalty: Some(1.1),
            eos: vec![7, 8],
        };
        assert_eq!(all.unwrap(), want);
        assert_eq!(read(r#"{"do_sample":false,"temperature":0.6}"#).unwrap().temperature, Some(0.0));
        assert_eq!(read(r#"{"top_k":0}"#).unwrap(), GenerationDefaults::default());
        for wrong in
            [r#"{"top_k":"x"}"#, r#"{"top_p":2}"#, r#"{"temperature":-1}"#, r#"{"eos_token_id":-1}"#, "[]", "{"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
