//! The events of an embedding job as the answer of `POST /v1/embeddings`.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rbee_wire::event::Event;
use rbee_wire::job::invalid;
use rbee_wire::view::Embedding;
use rbee_wire::{ErrorBody, ErrorCode};
use serde_json::Value;

use crate::answer::Step;
use crate::body::{EmbeddingItem, EmbeddingList, EmbeddingUsage, Values};
use crate::request::{Encoding, TEXTS, renamed};

/// An answer on its way.
#[derive(Debug)]
pub struct Vectors {
    encoding: Encoding,
    model: Option<String>,
    data: Vec<EmbeddingItem>,
    prompt_tokens: u64,
}

impl Vectors {
    /// An answer of which nothing is there yet, under the model's name as the client gave it.
    pub fn new(encoding: Encoding, model: Option<String>) -> Self {
        Self { encoding, model, data: Vec::new(), prompt_tokens: 0 }
    }

    /// Takes the job's next event.
    pub fn take(&mut self, event: &Event) -> Step {
        match event {
            Event::Started(started) => {
                self.model.get_or_insert_with(|| started.model.to_string());
                Step::Waiting
            }
            Event::Data { value } => match self.vector(value) {
                Some(data) => {
                    self.data.push(data);
                    Step::Moving
                }
                None => failed(ErrorCode::Internal, "the worker sent something that is no embedding"),
            },
            Event::Done(done) if done.cancelled() => {
                failed(ErrorCode::Cancelled, "somebody cancelled the job before its answer was whole")
            }
            Event::Done(done) => {
                self.prompt_tokens = done.usage.map_or(0, |usage| usage.prompt_tokens);
                Step::Over
            }
            Event::Error(error) => {
                let named = renamed(error, &[TEXTS]).map(invalid);
                Step::Failed(Box::new(named.unwrap_or_else(|| error.clone())))
            }
            _ => Step::Waiting,
        }
    }

    fn vector(&self, value: &Value) -> Option<EmbeddingItem> {
        let Embedding { index, embedding } = serde_json::from_value(value.clone()).ok()?;
        let values = match self.encoding {
            Encoding::Base64 => Values::Base64(embedding),
            Encoding::Floats => {
                let bytes = BASE64_STANDARD.decode(embedding).ok()?;
                let (values, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() {
                    return None;
                }
                Values::Floats(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
            }
        };
        Some(EmbeddingItem { object: "embedding", index, embedding: values })
    }

    /// The answer's JSON, once the job is done.
    pub fn into_json(self) -> Value {
        let usage = EmbeddingUsage { prompt_tokens: self.prompt_tokens, total_tokens: self.prompt_tokens };
        let list = EmbeddingList { object: "list", data: self.data, model: self.model, usage };
        serde_json::to_value(list).expect("the dialect's types serialize to JSON")
    }
}

fn failed(code: ErrorCode, message: &str) -> Step {
    Step::Failed(Box::new(ErrorBody::new(code, message)))
}

#[cfg(test)]
mod tests {
    use rbee_wire::event::{Done, Usage};
    use serde_json::json;

    use super::*;

    #[test]
    fn vectors_are_base64_or_numbers_as_asked() {
        let bytes: Vec<u8> = [0.5f32, -2.0].into_iter().flat_map(f32::to_le_bytes).collect();
        let text = BASE64_STANDARD.encode(bytes);
        let event = Event::Data { value: json!(Embedding { index: 0, embedding: text.clone() }) };
        for (encoding, want) in [(Encoding::Floats, json!([0.5, -2.0])), (Encoding::Base64, json!(text))] {
            let mut vectors = Vectors::new(encoding, Some("m".into()));
            assert_eq!(vectors.take(&event), Step::Moving);
            let usage = Some(Usage { prompt_tokens: 3, completion_tokens: 0, total_tokens: 3, cached_tokens: 0 });
            assert_eq!(vectors.take(&Event::Done(Done { usage, ..Done::default() })), Step::Over);
            let data = json!([{ "object": "embedding", "index": 0, "embedding": want }]);
            let usage = json!({ "prompt_tokens": 3, "total_tokens": 3 });
            assert_eq!(vectors.into_json(), json!({ "object": "list", "data": data, "model": "m", "usage": usage }));
        }
        let mut vectors = Vectors::new(Encoding::Floats, None);
        assert!(matches!(
            vectors.take(&Event::Data { value: json!({ "index": 0, "embedding": "AAA" }) }),
            Step::Failed(_)
        ));
        assert!(matches!(vectors.take(&Event::Done(Done::cancelled_before_start())), Step::Failed(_)));
    }
}
