//! The events of jobs as answers of the dialect: in chunks as they come, or whole.
//!
//! A request has one part per job; the choices of part p are numbered after those of the parts before it.

use rbee_wire::event::{Done, Event, Started, Token, ToolCallPart, Usage};
use rbee_wire::job::{CalledFunction, ToolCall};
use rbee_wire::{ErrorBody, ErrorCode};
use serde::Serialize;
use serde_json::Value;

use crate::body::{
    Answer, CallDelta, ChatChoice, ChatLogprobs, ChatMessage, ChatPiece, Chunk, Counts, Delta, Finish, Lists,
    TextChoice, TextPiece,
};
use crate::error::Reply;

/// What kind of answer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A message, as a chat has it.
    Chat,
    /// A text that goes on, as a completion has it.
    Text,
}

/// What is the same in all of an answer.
#[derive(Clone, Debug)]
pub struct Head {
    /// What kind of answer it is.
    pub form: Form,
    /// The answer's id.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name as the client gave it; else the one that answers.
    pub model: Option<String>,
    /// Release and build of the suite.
    pub build: String,
    /// Choices of each part.
    pub choices: Vec<usize>,
}

/// What an event brought.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing that the client sees.
    Waiting,
    /// Something that the client sees.
    Moving,
    /// All parts are done.
    Over,
    /// A part failed, and with it the answer.
    Failed(Box<ErrorBody>),
}

/// What both forms of an answer keep track of.
#[derive(Debug)]
struct Progress {
    head: Head,
    model: String,
    fingerprint: Option<String>,
    open: usize,
    usage: Counts,
}

impl Progress {
    fn new(head: Head) -> Self {
        let model = head.model.clone().unwrap_or_default();
        Self { open: head.choices.len(), head, model, fingerprint: None, usage: Counts::default() }
    }

    /// The number of a part's choice among all.
    fn index(&self, part: usize, choice: usize) -> usize {
        self.head.choices[..part].iter().sum::<usize>() + choice
    }

    fn started(&mut self, started: &Started) {
        if self.model.is_empty() {
            self.model = started.model.to_string();
        }
        let short = |text: &Option<String>| text.as_deref().map(|text| text.chars().take(8).collect::<String>());
        let named = [Some(self.head.build.clone()), short(&started.fingerprint), short(&started.numerics_id)];
        self.fingerprint = Some(named.into_iter().flatten().collect::<Vec<_>>().join("-"));
    }

    /// Counts a part's end; the error if it is not a good one.
    fn done(&mut self, done: &Done) -> Result<(), Box<ErrorBody>> {
        if done.cancelled() {
            let error = ErrorBody::new(ErrorCode::Cancelled, "somebody cancelled the job before its answer was whole");
            return Err(Box::new(error));
        }
        let Usage { prompt_tokens, completion_tokens, total_tokens, cached_tokens } = done.usage.unwrap_or_default();
        self.usage.prompt_tokens += prompt_tokens;
        self.usage.completion_tokens += completion_tokens;
        self.usage.total_tokens += total_tokens;
        self.usage.prompt_tokens_details.cached_tokens += cached_tokens;
        self.open -= 1;
        Ok(())
    }

    /// The whole answer of these choices.
    fn answer<C: Serialize>(self, choices: Vec<C>) -> Value {
        let object = self.object(false);
        let Self { head, model, fingerprint, usage, .. } = self;
        let (id, created) = (head.id, head.created);
        let answer = Answer { id, object, created, model, system_fingerprint: fingerprint, choices, usage };
        serde_json::to_value(answer).expect("the dialect's types serialize to JSON")
    }

    fn object(&self, chunk: bool) -> &'static str {
        match (self.head.form, chunk) {
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Chat, false) => "chat.completion",
            (Form::Text, _) => "text_completion",
        }
    }
}

/// An answer in chunks.
#[derive(Debug)]
pub struct Chunks {
    progress: Progress,
    with_usage: bool,
    /// Whether each choice has begun.
    begun: Vec<bool>,
    /// Characters of each choice.
    lengths: Vec<usize>,
}

impl Chunks {
    /// An answer of which nothing is out yet.
    pub fn new(head: Head, with_usage: bool) -> Self {
        let all = head.choices.iter().sum();
        Self { progress: Progress::new(head), with_usage, begun: vec![false; all], lengths: vec![0; all] }
    }

    /// Takes a part's next event and appends what the client gets of it. After a failure the caller appends
    /// [`failure`], or answers with the error's own status where nothing is out yet.
    pub fn take(&mut self, part: usize, event: &Event, out: &mut Vec<u8>) -> Step {
        match event {
            Event::Started(started) => {
                self.progress.started(started);
                Step::Waiting
            }
            Event::Token(token) => self.token(part, token, out),
            Event::Done(done) => self.done(part, done, out),
            Event::Error(error) => Step::Failed(Box::new(error.clone())),
            _ => Step::Waiting,
        }
    }

    fn token(&mut self, part: usize, token: &Token, out: &mut Vec<u8>) -> Step {
        let index = self.progress.index(part, token.choice as usize);
        self.begin(index, out);
        let silent = token.t.is_empty() && token.reasoning.is_empty() && token.tool_calls.is_empty();
        if silent && token.logprobs.is_none() {
            return Step::Moving;
        }
        let offset = self.lengths[index];
        self.lengths[index] += token.t.chars().count();
        match self.progress.head.form {
            Form::Chat => {
                let logprobs =
                    token.logprobs.as_ref().map(|one| ChatLogprobs { content: vec![one.into()], refusal: None });
                let reasoning_content = Some(token.reasoning.as_str()).filter(|text| !text.is_empty());
                let tool_calls: Vec<CallDelta<'_>> = token.tool_calls.iter().map(CallDelta::from).collect();
                let alone = reasoning_content.is_none() && tool_calls.is_empty();
                let content = Some(token.t.as_str()).filter(|text| alone || !text.is_empty());
                let delta = Delta { role: None, content, reasoning_content, tool_calls };
                self.write(&[ChatPiece { index, delta, logprobs, finish_reason: None }], out);
            }
            Form::Text => {
                let lists = token.logprobs.as_ref().map(|one| {
                    let mut lists = Lists::default();
                    lists.push(one, offset);
                    lists
                });
                self.write(&[TextPiece { index, text: &token.t, logprobs: lists.as_ref(), finish_reason: None }], out);
            }
        }
        Step::Moving
    }

    /// The first chunk of a chat's choice names the role.
    fn begin(&mut self, index: usize, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.begun[index], true) || self.progress.head.form != Form::Chat {
            return;
        }
        let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
        self.write(&[ChatPiece { index, delta, logprobs: None, finish_reason: None }], out);
    }

    fn done(&mut self, part: usize, done: &Done, out: &mut Vec<u8>) -> Step {
        if let Err(error) = self.progress.done(done) {
            return Step::Failed(error);
        }
        for (choice, end) in done.choices.iter().enumerate() {
            let index = self.progress.index(part, choice);
            self.begin(index, out);
            let finish_reason = Some(Finish::from(end.finish_reason));
            match self.progress.head.form {
                Form::Chat => {
                    self.write(&[ChatPiece { index, delta: Delta::default(), logprobs: None, finish_reason }], out);
                }
                Form::Text => {
                    self.write(&[TextPiece { index, text: "", logprobs: None, finish_reason }], out);
                }
            }
        }
        if self.progress.open > 0 {
            return Step::Moving;
        }
        if self.with_usage {
            let usage = Some(Some(self.progress.usage));
            self.write_with::<ChatPiece<'_>>(&[], usage, out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
        Step::Over
    }

    fn write<C: Serialize>(&self, choices: &[C], out: &mut Vec<u8>) {
        self.write_with(choices, self.with_usage.then_some(None), out);
    }

    fn write_with<C: Serialize>(&self, choices: &[C], usage: Option<Option<Counts>>, out: &mut Vec<u8>) {
        let Progress { head, model, fingerprint, .. } = &self.progress;
        let chunk = Chunk {
            id: &head.id,
            object: self.progress.object(true),
            created: head.created,
            model,
            system_fingerprint: fingerprint.as_deref(),
            choices,
            usage,
        };
        event(&chunk, out);
    }
}

fn event(value: &impl Serialize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, value).expect("the dialect's types serialize to JSON");
    out.extend_from_slice(b"\n\n");
}

/// The last event of a stream that failed: without it the SDKs take the end for a good one.
pub fn failure(error: &ErrorBody) -> Vec<u8> {
    let mut out = Vec::new();
    event(&Reply::from(error), &mut out);
    out
}

/// One choice of a whole answer.
#[derive(Clone, Debug, Default)]
struct Text {
    text: String,
    reasoning: String,
    calls: Vec<ToolCall>,
    chars: usize,
    chat_logprobs: Option<ChatLogprobs>,
    lists: Option<Lists>,
    finish: Option<Finish>,
}

impl Text {
    fn call(&mut self, part: &ToolCallPart) {
        if let (Some(id), Some(name)) = (&part.id, &part.name) {
            let function = CalledFunction { name: name.clone(), arguments: String::new() };
            self.calls.push(ToolCall { id: id.clone(), kind: "function".into(), function });
        }
        if let Some(call) = self.calls.get_mut(part.index as usize) {
            call.function.arguments.push_str(&part.arguments);
        }
    }

    fn chat_choice(self, index: usize) -> ChatChoice {
        // A message that calls and says nothing has no text.
        let content = Some(self.text).filter(|text| self.calls.is_empty() || !text.is_empty());
        let message = ChatMessage {
            role: "assistant",
            content,
            refusal: None,
            reasoning_content: self.reasoning,
            tool_calls: self.calls,
        };
        ChatChoice { index, message, logprobs: self.chat_logprobs, finish_reason: self.finish }
    }

    fn text_choice(self, index: usize) -> TextChoice {
        TextChoice { index, text: self.text, logprobs: self.lists, finish_reason: self.finish }
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Whole {
    progress: Progress,
    texts: Vec<Text>,
}

impl Whole {
    /// An answer of which nothing is there yet.
    pub fn new(head: Head) -> Self {
        let all: usize = head.choices.iter().sum();
        Self { progress: Progress::new(head), texts: vec![Text::default(); all] }
    }

    /// Takes a part's next event.
    pub fn take(&mut self, part: usize, event: &Event) -> Step {
        match event {
            Event::Started(started) => self.progress.started(started),
            Event::Token(token) => {
                let text = &mut self.texts[self.progress.index(part, token.choice as usize)];
                if let Some(logprobs) = &token.logprobs {
                    match self.progress.head.form {
                        Form::Chat => text.chat_logprobs.get_or_insert_default().content.push(logprobs.into()),
                        Form::Text => text.lists.get_or_insert_default().push(logprobs, text.chars),
                    }
                }
                text.text.push_str(&token.t);
                text.reasoning.push_str(&token.reasoning);
                for part in &token.tool_calls {
                    text.call(part);
                }
                text.chars += token.t.chars().count();
                return Step::Moving;
            }
            Event::Done(done) => {
                if let Err(error) = self.progress.done(done) {
                    return Step::Failed(error);
                }
                for (choice, end) in done.choices.iter().enumerate() {
                    let index = self.progress.index(part, choice);
                    self.texts[index].finish = Some(end.finish_reason.into());
                }
                return if self.progress.open == 0 { Step::Over } else { Step::Moving };
            }
            Event::Error(error) => return Step::Failed(Box::new(error.clone())),
            _ => {}
        }
        Step::Waiting
    }

    /// The answer's JSON, once all parts are done.
    pub fn into_json(self) -> Value {
        let Self { progress, texts } = self;
        let texts = texts.into_iter().enumerate();
        match progress.head.form {
            Form::Chat => progress.answer(texts.map(|(index, text)| text.chat_choice(index)).collect()),
            Form::Text => progress.answer(texts.map(|(index, text)| text.text_choice(index)).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rbee_wire::event::{ChoiceEnd, FinishReason, TokenLogprobs, TopLogprob};
    use rbee_wire::{JobId, ModelRef, WorkerId};
    use serde_json::json;

    use super::*;

    fn head(form: Form, choices: &[usize]) -> Head {
        let model = Some("m".to_owned());
        Head { form, id: "x-1".into(), created: 7, model, build: "rbee-0".into(), choices: choices.to_vec() }
    }

    fn started() -> Event {
        Event::Started(Started {
            job_id: JobId::new("job-1").unwrap(),
            worker_id: WorkerId::new("w").unwrap(),
            model: ModelRef::Tinybee,
            prompt_tokens: 3,
            cached_tokens: 1,
            seed: 1,
            why: String::new(),
            fingerprint: Some("0123456789".into()),
            numerics_id: Some("abcdefghij".into()),
        })
    }

    fn token(choice: u32, i: u64, t: &str) -> Event {
        Event::Token(Token { i, choice, t: t.into(), id: 5, ..Token::default() })
    }

    fn done(reasons: &[FinishReason]) -> Event {
        Event::Done(Done {
            choices: reasons.iter().map(|&finish_reason| ChoiceEnd { finish_reason }).collect(),
            usage: Some(Usage { prompt_tokens: 3, completion_tokens: 2, total_tokens: 5, cached_tokens: 1 }),
            timings: None,
        })
    }

    fn chunks(form: Form, choices: &[usize], usage: bool, events: &[(usize, Event)]) -> (Vec<Value>, Step) {
        let mut chunks = Chunks::new(head(form, choices), usage);
        let mut out = Vec::new();
        let mut last = Step::Waiting;
        for (part, event) in events {
            last = chunks.take(*part, event, &mut out);
        }
        let mut values = Vec::new();
        rbee_wire::sse::Decoder::new(1 << 20)
            .feed(&out, |frame| {
                assert_eq!(frame.id, None, "the SDKs cannot take ids beside comments");
                values.push(serde_json::from_slice(&frame.data).unwrap_or(Value::String("[DONE]".into())));
            })
            .unwrap();
        (values, last)
    }

    #[test]
    fn a_chat_has_its_role_first_its_reason_last_and_its_usage_after_that() {
        let events = [
            (0, started()),
            (0, token(0, 0, "Hel")),
            (0, token(0, 1, "")),
            (0, token(0, 2, "lo")),
            (0, done(&[FinishReason::Stop])),
        ];
        let (values, last) = chunks(Form::Chat, &[1], true, &events);
        assert_eq!(last, Step::Over);
        let deltas: Vec<_> = values[..4].iter().map(|chunk| chunk["choices"][0]["delta"].clone()).collect();
        let want = [
            json!({"role": "assistant", "content": ""}),
            json!({"content": "Hel"}),
            json!({"content": "lo"}),
            json!({}),
        ];
        assert_eq!(deltas, want);
        let reasons: Vec<_> = values[..4].iter().map(|chunk| chunk["choices"][0]["finish_reason"].clone()).collect();
        assert_eq!(reasons, [Value::Null, Value::Null, Value::Null, json!("stop")]);
        for chunk in &values[..5] {
            assert_eq!((&chunk["id"], &chunk["created"], &chunk["model"]), (&json!("x-1"), &json!(7), &json!("m")));
            assert_eq!(chunk["object"], "chat.completion.chunk");
            assert_eq!(chunk["system_fingerprint"], "rbee-0-01234567-abcdefgh");
        }
        assert!(values[..4].iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
        assert_eq!(values[4]["choices"], json!([]));
        assert_eq!(values[4]["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
        assert_eq!(values[5], "[DONE]");
        let (values, _) = chunks(Form::Chat, &[1], false, &events);
        assert!(values.len() == 5 && values.iter().all(|chunk| chunk.get("usage").is_none()));
    }

    #[test]
    fn reasoning_and_calls_come_in_parts_and_whole() {
        let part = |index, id: Option<&str>, arguments: &str| {
            let name = id.map(|_| "f".to_owned());
            let tool_calls = vec![ToolCallPart { index, id: id.map(Into::into), name, arguments: arguments.into() }];
            (0, Event::Token(Token { id: 5, tool_calls, ..Token::default() }))
        };
        let events = [
            (0, started()),
            (0, Event::Token(Token { id: 5, reasoning: "hm".into(), ..Token::default() })),
            part(0, Some("c0"), ""),
            part(0, None, "{}"),
            part(1, Some("c1"), "{\"a\": 1}"),
            (0, done(&[FinishReason::ToolCalls])),
        ];
        let (values, _) = chunks(Form::Chat, &[1], false, &events);
        let deltas: Vec<_> = values[1..6].iter().map(|chunk| chunk["choices"][0]["delta"].clone()).collect();
        let call = |index, rest: Value| {
            let mut call = json!({ "index": index });
            call.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            json!({ "tool_calls": [call] })
        };
        let want = [
            json!({ "reasoning_content": "hm" }),
            call(0, json!({ "id": "c0", "type": "function", "function": { "name": "f", "arguments": "" } })),
            call(0, json!({ "function": { "arguments": "{}" } })),
            call(1, json!({ "id": "c1", "type": "function", "function": { "name": "f", "arguments": "{\"a\": 1}" } })),
            json!({}),
        ];
        assert_eq!(deltas, want);
        assert_eq!(values[5]["choices"][0]["finish_reason"], "tool_calls");
        let mut whole = Whole::new(head(Form::Chat, &[1]));
        events.iter().for_each(|(part, event)| drop(whole.take(*part, event)));
        let function = |arguments: &str| json!({ "name": "f", "arguments": arguments });
        assert_eq!(
            whole.into_json()["choices"][0]["message"],
            json!({ "role": "assistant", "content": null, "refusal": null, "reasoning_content": "hm", "tool_calls": [
                { "id": "c0", "type": "function", "function": function("{}") },
                { "id": "c1", "type": "function", "function": function("{\"a\": 1}") },
            ] })
        );
    }

    #[test]
    fn choices_of_several_prompts_are_numbered_through_and_end_once_each() {
        let two = done(&[FinishReason::Length, FinishReason::Stop]);
        let events = [
            (1, started()),
            (0, started()),
            (1, token(1, 0, "d")),
            (0, token(0, 0, "a")),
            (1, token(0, 0, "c")),
            (1, two.clone()),
            (0, two.clone()),
        ];
        let (values, last) = chunks(Form::Text, &[2, 2], true, &events);
        assert_eq!(last, Step::Over);
        let ends = |index: usize| {
            let of = |chunk: &&Value| {
                chunk["choices"][0]["index"] == index && !chunk["choices"][0]["finish_reason"].is_null()
            };
            values.iter().filter(of).count()
        };
        assert_eq!([0, 1, 2, 3].map(ends), [1; 4]);
        let texts: Vec<_> =
            values[..3].iter().map(|chunk| (&chunk["choices"][0]["index"], &chunk["choices"][0]["text"])).collect();
        assert_eq!(texts, [(&json!(3), &json!("d")), (&json!(0), &json!("a")), (&json!(2), &json!("c"))]);
        assert_eq!(values[values.len() - 2]["usage"]["total_tokens"], 10);
    }

    #[test]
    fn errors_and_cancellations_are_failures_and_never_ends() {
        let error = Event::Error(ErrorBody::new(ErrorCode::WorkerLost, "gone"));
        for (end, code) in [(error, ErrorCode::WorkerLost), (done(&[FinishReason::Cancelled]), ErrorCode::Cancelled)] {
            let (values, last) =
                chunks(Form::Chat, &[1], true, &[(0, started()), (0, token(0, 0, "a")), (0, end.clone())]);
            assert!(values.iter().all(|chunk| chunk != "[DONE]" && chunk["choices"][0]["finish_reason"].is_null()));
            let Step::Failed(error) = last else { panic!("{last:?}") };
            assert_eq!(error.code, code);
            let text = String::from_utf8(failure(&error)).unwrap();
            assert!(text.starts_with("data: {\"error\":{\"message\":") && text.ends_with("}\n\n"), "{text}");
            let mut whole = Whole::new(head(Form::Chat, &[1]));
            assert!(matches!(whole.take(0, &end), Step::Failed(_)));
        }
    }

    #[test]
    fn a_whole_answer_is_the_sum_of_its_chunks_log_probabilities_included() {
        let logprobs = TokenLogprobs {
            t: "é".into(),
            logprob: -0.5,
            top: vec![
                TopLogprob { id: 5, t: "é".into(), logprob: -0.5 },
                TopLogprob { id: 6, t: "\u{fffd}".into(), logprob: -1.5 },
            ],
        };
        let with = Event::Token(Token { t: "é".into(), id: 5, logprobs: Some(logprobs), ..Token::default() });
        let events = [started(), with.clone(), with, done(&[FinishReason::Length])];
        let whole = |form| {
            let mut whole = Whole::new(head(form, &[1]));
            let steps: Vec<Step> = events.iter().map(|event| whole.take(0, event)).collect();
            assert_eq!(steps, [Step::Waiting, Step::Moving, Step::Moving, Step::Over]);
            whole.into_json()
        };
        let chat = whole(Form::Chat);
        assert_eq!(chat["choices"][0]["message"], json!({"role": "assistant", "content": "éé", "refusal": null}));
        let entry = &chat["choices"][0]["logprobs"]["content"][1];
        assert_eq!((&entry["token"], &entry["bytes"]), (&json!("é"), &json!([195, 169])));
        assert_eq!(entry["top_logprobs"][1]["bytes"], Value::Null);
        assert_eq!(chat["choices"][0]["finish_reason"], "length");
        let text = whole(Form::Text);
        assert_eq!(text["object"], "text_completion");
        assert_eq!(text["choices"][0]["logprobs"]["text_offset"], json!([0, 1]));
        assert_eq!(text["choices"][0]["logprobs"]["top_logprobs"][0], json!({"é": -0.5, "\u{fffd}": -1.5}));
        assert_eq!(text["usage"]["completion_tokens"], 2);
    }
}
