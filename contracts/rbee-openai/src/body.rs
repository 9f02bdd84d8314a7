//! Bodies of answers, as they are sent and as the OpenAPI document describes them.

use rbee_wire::event::{FinishReason, TokenLogprobs, ToolCallPart};
use rbee_wire::job::ToolCall;
use schemars::JsonSchema;
use serde::Serialize;

/// Token counts as the dialect has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "CompletionUsage")]
pub struct Counts {
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Tokens of the answers.
    pub completion_tokens: u64,
    /// Both.
    pub total_tokens: u64,
    /// The prompts' in detail.
    pub prompt_tokens_details: Cached,
}

/// Tokens of the prompts in detail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "PromptTokensDetails")]
pub struct Cached {
    /// Those whose KV was there already.
    pub cached_tokens: u64,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "ChoiceFinishReason")]
pub enum Finish {
    /// It was at its end, or at a stop text.
    Stop,
    /// It has as many tokens as it may.
    Length,
    /// The model called.
    ToolCalls,
}

impl From<FinishReason> for Finish {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop | FinishReason::Cancelled => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::ToolCalls => Self::ToolCalls,
        }
    }
}

/// One token of a chat's log-probabilities.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ChatTopLogprob {
    /// Its text alone.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// Its bytes; null for a part of a character, whose bytes its text does not tell.
    pub bytes: Option<Vec<u8>>,
}

impl ChatTopLogprob {
    fn of(text: &str, logprob: f32) -> Self {
        let bytes = (!text.contains('\u{fffd}')).then(|| text.as_bytes().to_vec());
        Self { token: text.to_owned(), logprob: logprob.into(), bytes }
    }
}

/// A token of a chat with the likeliest others.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ChatLogprob {
    /// Its text alone.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// Its bytes; null for a part of a character.
    pub bytes: Option<Vec<u8>>,
    /// The likeliest tokens in its place.
    pub top_logprobs: Vec<ChatTopLogprob>,
}

impl From<&TokenLogprobs> for ChatLogprob {
    fn from(logprobs: &TokenLogprobs) -> Self {
        let ChatTopLogprob { token, logprob, bytes } = ChatTopLogprob::of(&logprobs.t, logprobs.logprob);
        let top_logprobs = logprobs.top.iter().map(|top| ChatTopLogprob::of(&top.t, top.logprob)).collect();
        Self { token, logprob, bytes, top_logprobs }
    }
}

/// A chat's log-probabilities.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct ChatLogprobs {
    /// One each token.
    pub content: Vec<ChatLogprob>,
    /// Always null.
    pub refusal: Option<String>,
}

/// The lists of a completion's log-probabilities.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
#[schemars(rename = "TextLogprobs")]
pub struct Lists {
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// Natural logarithms of their probabilities.
    pub token_logprobs: Vec<f64>,
    /// The likeliest tokens in each one's place.
    pub top_logprobs: Vec<serde_json::Map<String, serde_json::Value>>,
    /// Characters of the answer before each token's text.
    pub text_offset: Vec<usize>,
}

impl Lists {
    pub(crate) fn push(&mut self, logprobs: &TokenLogprobs, offset: usize) {
        self.tokens.push(logprobs.t.clone());
        self.token_logprobs.push(logprobs.logprob.into());
        self.top_logprobs.push(logprobs.top.iter().map(|top| (top.t.clone(), f64::from(top.logprob).into())).collect());
        self.text_offset.push(offset);
    }
}

/// A piece of an answer.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ChunkOf{C}")]
pub struct Chunk<'a, C> {
    /// The answer's id, the same in all of its chunks.
    pub id: &'a str,
    /// `chat.completion.chunk` or `text_completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name as the request gave it; else the one that answers.
    pub model: &'a str,
    /// Release, build, weights and numerics id.
    pub system_fingerprint: Option<&'a str>,
    /// Pieces of choices; none in the chunk of the counts.
    pub choices: &'a [C],
    /// The counts in the last chunk and null before, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Counts>>,
}

/// A piece of a chat's choice.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatPiece<'a> {
    /// The choice, from 0.
    pub index: usize,
    /// What it has more.
    pub delta: Delta<'a>,
    /// Where they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// In the choice's last piece.
    pub finish_reason: Option<Finish>,
}

/// What a message has more.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct Delta<'a> {
    /// `assistant`, in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More of the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
    /// More of the reasoning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
    /// Parts of calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<CallDelta<'a>>,
}

/// A part of a call; its first part has the id, the type and the name.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CallDelta<'a> {
    /// The call, from 0.
    pub index: u32,
    /// Its name in the tool's answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<&'a str>,
    /// `function`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// What is called.
    pub function: FunctionDelta<'a>,
}

/// A part of a called function.
#[derive(Debug, Serialize, JsonSchema)]
pub struct FunctionDelta<'a> {
    /// Its name, in the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    /// More of the arguments, which together are JSON if the model wrote it well.
    pub arguments: &'a str,
}

impl<'a> From<&'a ToolCallPart> for CallDelta<'a> {
    fn from(part: &'a ToolCallPart) -> Self {
        Self {
            index: part.index,
            id: part.id.as_deref(),
            kind: part.id.is_some().then_some("function"),
            function: FunctionDelta { name: part.name.as_deref(), arguments: &part.arguments },
        }
    }
}

/// A piece of a completion's choice.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TextPiece<'a> {
    /// The choice, from 0.
    pub index: usize,
    /// More of the text.
    pub text: &'a str,
    /// Where they were asked for.
    pub logprobs: Option<&'a Lists>,
    /// In the choice's last piece.
    pub finish_reason: Option<Finish>,
}

/// A whole answer.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "AnswerOf{C}")]
pub struct Answer<C> {
    /// Its id.
    pub id: String,
    /// `chat.completion` or `text_completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name as the request gave it; else the one that answers.
    pub model: String,
    /// Release, build, weights and numerics id.
    pub system_fingerprint: Option<String>,
    /// The answers.
    pub choices: Vec<C>,
    /// Tokens in and out.
    pub usage: Counts,
}

/// One answer of a chat.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatChoice {
    /// Its number, from 0.
    pub index: usize,
    /// What was said.
    pub message: ChatMessage,
    /// Where they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: Option<Finish>,
}

/// What an assistant said.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatMessage {
    /// `assistant`.
    pub role: &'static str,
    /// Its text; null where it calls and says nothing.
    pub content: Option<String>,
    /// Always null.
    pub refusal: Option<String>,
    /// Its reasoning, where the model's family has it apart from the text.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning_content: String,
    /// What it called.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// One answer of a completion.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TextChoice {
    /// Its number, from 0; choices of later prompts are numbered after those of earlier ones.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// Where they were asked for.
    pub logprobs: Option<Lists>,
    /// Why it ended.
    pub finish_reason: Option<Finish>,
}

/// Vectors of texts.
#[derive(Debug, Serialize, JsonSchema)]
pub struct EmbeddingList {
    /// `list`.
    pub object: &'static str,
    /// One each text, in their order.
    pub data: Vec<EmbeddingItem>,
    /// The model's name as the request gave it; else the one that answers.
    pub model: Option<String>,
    /// Tokens in.
    pub usage: EmbeddingUsage,
}

/// The vector of one text.
#[derive(Debug, Serialize, JsonSchema)]
pub struct EmbeddingItem {
    /// `embedding`.
    pub object: &'static str,
    /// Its place among the texts, from 0.
    pub index: u32,
    /// Its values.
    pub embedding: Values,
}

/// A vector's values.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "EmbeddingValues")]
pub enum Values {
    /// As numbers.
    Floats(Vec<f32>),
    /// Little-endian f32 in base64.
    Base64(String),
}

/// Tokens in.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct EmbeddingUsage {
    /// Tokens of all texts.
    pub prompt_tokens: u64,
    /// The same.
    pub total_tokens: u64,
}
