//! What becomes of each field of the dialect: one table serves parsing, the reference and the tests that walk it.

/// A request of the dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/completions`.
    Completions,
    /// `POST /v1/embeddings`.
    Embeddings,
}

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is the job's field of this name and means the same.
    Job(&'static str),
    /// It means what the dialect says; the sentence tells how.
    Own(&'static str),
    /// It is refused by name unless it asks for what is done anyway; the sentence says what that is.
    Refused(&'static str),
    /// It is accepted, changes nothing and is named in `x-rbee-ignored`.
    Ignored,
}

/// One field.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// What becomes of it.
    pub fate: Fate,
}

const fn job(name: &'static str) -> Field {
    Field { name, fate: Fate::Job(name) }
}

const fn own(name: &'static str, how: &'static str) -> Field {
    Field { name, fate: Fate::Own(how) }
}

const fn refused(name: &'static str, unless: &'static str) -> Field {
    Field { name, fate: Fate::Refused(unless) }
}

const fn ignored(name: &'static str) -> Field {
    Field { name, fate: Fate::Ignored }
}

/// Fields that answers have.
const SHARED: &[Field] = &[
    job("model"),
    job("min_tokens"),
    job("temperature"),
    job("top_p"),
    job("top_k"),
    job("min_p"),
    job("repetition_penalty"),
    job("frequency_penalty"),
    job("presence_penalty"),
    job("logit_bias"),
    job("stop"),
    own("seed", "negative ones too"),
    job("n"),
    job("ignore_eos"),
    own("stream", "as server-sent events"),
    own("stream_options", "`include_usage`"),
    ignored("user"),
];

/// Fields of `POST /v1/chat/completions` alone.
const CHAT: &[Field] = &[
    own(
        "messages",
        "roles system, developer, user, assistant, tool; content as a text or as parts of type `text`; `tool_calls`, \
         `tool_call_id`, `reasoning_content`",
    ),
    Field { name: "max_completion_tokens", fate: Fate::Job("max_tokens") },
    job("max_tokens"),
    job("logprobs"),
    job("top_logprobs"),
    job("chat_template_kwargs"),
    job("response_format"),
    own(
        "tools",
        "of type `function`; `strict` is adhered to where a call must come, and else told in `x-rbee-ignored`",
    ),
    job("tool_choice"),
    job("parallel_tool_calls"),
    refused("functions", "unless empty"),
    refused("function_call", "unless `none` or `auto`"),
    refused("modalities", "unless `[\"text\"]`"),
    refused("audio", "always"),
    refused("web_search_options", "always"),
    ignored("safety_identifier"),
    ignored("prompt_cache_key"),
    ignored("prompt_cache_retention"),
    ignored("metadata"),
    ignored("store"),
    ignored("service_tier"),
    ignored("prediction"),
    ignored("reasoning_effort"),
    ignored("verbosity"),
];

/// Fields of `POST /v1/completions` alone.
const COMPLETIONS: &[Field] = &[
    own(
        "prompt",
        "a text, a list of up to 16, or token ids of the model's own vocabulary in place of texts, to which nothing is added",
    ),
    own("max_tokens", "16 unless given, as the dialect has it"),
    own("logprobs", "the number of likeliest tokens, 0 to 20"),
    refused("best_of", "unless equal to `n`"),
    refused("echo", "unless false"),
    refused("suffix", "unless empty"),
];

/// Fields of `POST /v1/embeddings`.
const EMBEDDINGS: &[Field] = &[
    job("model"),
    own("input", "a text, a list of up to 2048, or token ids of the model's own vocabulary in place of texts"),
    own("encoding_format", "`float` or `base64`"),
    refused("dimensions", "always"),
    ignored("user"),
];

impl Endpoint {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Chat, Self::Completions, Self::Embeddings];

    /// Its fields.
    pub fn fields(self) -> impl Iterator<Item = &'static Field> {
        let (own, shared) = match self {
            Self::Chat => (CHAT, SHARED),
            Self::Completions => (COMPLETIONS, SHARED),
            Self::Embeddings => (EMBEDDINGS, [].as_slice()),
        };
        own.iter().chain(shared)
    }

    /// Its field of this name.
    pub fn field(self, name: &str) -> Option<&'static Field> {
        self.fields().find(|field| field.name == name)
    }

    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => rbee_wire::routes::CHAT_COMPLETIONS,
            Self::Completions => rbee_wire::routes::COMPLETIONS,
            Self::Embeddings => rbee_wire::routes::EMBEDDINGS,
        }
    }
}

#[cfg(test)]
mod tests {
    use rbee_wire::op::INFER_FIELDS;

    use super::*;

    #[test]
    fn every_field_stands_once_and_those_of_the_job_are_there() {
        for endpoint in Endpoint::ALL {
            let fields: Vec<&Field> = endpoint.fields().collect();
            for (i, field) in fields.iter().enumerate() {
                assert!(fields[..i].iter().all(|other| other.name != field.name), "{}", field.name);
                if let Fate::Job(name) = field.fate {
                    assert!(INFER_FIELDS.iter().any(|row| row.name == name), "{name}");
                }
            }
        }
    }
}
