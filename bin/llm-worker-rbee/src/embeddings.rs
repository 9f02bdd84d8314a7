//! The embeddings of one request: its texts go through the engine a few at a time and come out in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::task::AtomicWaker;
use rbee_engine::{Choice, EngineError, Finish, Goal, Output, Overloaded, Request, Sampling, TokenId, TokenStream};
use rbee_wire::ErrorBody;
use rbee_wire::job::Input;
use rbee_wire::view::Embedding;

use crate::backend::{Answer, Loaded};
use crate::inference::engine_error;

/// Texts in the engine at once: enough that short ones fill a step, few enough that others find room beside them.
const AT_ONCE: usize = 4;

/// What came next.
pub enum Next {
    /// A text's embedding.
    Embedding(Embedding),
    /// Something that an answer has too.
    Output(Output),
}

/// Ends a request from outside.
#[derive(Default)]
pub struct Stop {
    asked: AtomicBool,
    waker: AtomicWaker,
}

impl Stop {
    /// The request ends with what is done.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.waker.wake();
    }
}

/// A refusal as the request would have it: what the engine was given as a prompt is one of the texts.
fn by_name(error: EngineError) -> EngineError {
    match error {
        EngineError::Invalid { field: "prompt", problem } => EngineError::Invalid { field: "embed", problem },
        other => other,
    }
}

/// A request's texts on their way. Dropping it cancels what runs.
pub struct Embeddings {
    loaded: Arc<Loaded>,
    tenant: [u8; 16],
    waiting: VecDeque<Vec<TokenId>>,
    running: VecDeque<TokenStream>,
    /// The place of the first that runs.
    index: u32,
    prompt_tokens: usize,
    started: bool,
    stop: Arc<Stop>,
}

impl Embeddings {
    /// Makes tokens of all texts and hands over the first. Blocks for as long as tokenizing takes.
    ///
    /// # Errors
    /// Whatever a text is refused for, and an engine without a place.
    pub fn begin(loaded: Arc<Loaded>, inputs: &[Input], tenant: [u8; 16]) -> Result<Self, ErrorBody> {
        let tokens = |input: &Input| match input {
            Input::Text(text) => loaded.text.embedded(text),
            Input::Tokens(ids) => Ok(ids.clone()),
        };
        let waiting = inputs.iter().map(tokens).collect::<Result<VecDeque<_>, _>>()?;
        let prompt_tokens = waiting.iter().map(Vec::len).sum();
        let (running, stop) = (VecDeque::new(), Arc::default());
        let mut embeddings = Self { loaded, tenant, waiting, running, index: 0, prompt_tokens, started: false, stop };
        embeddings.fill().map_err(|error| engine_error(&error))?;
        Ok(embeddings)
    }

    /// What ends it from outside.
    pub fn stop(&self) -> Arc<Stop> {
        Arc::clone(&self.stop)
    }

    /// Hands over as many as may run.
    fn fill(&mut self) -> Result<(), EngineError> {
        while self.running.len() < AT_ONCE
            && let Some(prompt) = self.waiting.front()
        {
            let text = self.loaded.text.output(&[], &Answer::Text);
            let text = text.map_err(|error| EngineError::Internal(error.message))?;
            let request = Request {
                prompt: prompt.clone(),
                goal: Goal::Embedding,
                max_tokens: None,
                min_tokens: 0,
                eos: Vec::new(),
                ignore_eos: true,
                sampling: Sampling::default(),
                logprobs: None,
                tenant: self.tenant,
                choices: vec![Choice { text, constraint: None, resume: Vec::new() }],
            };
            match self.loaded.engine.submit(request) {
                Ok(stream) => self.running.push_back(stream),
                // There will be room when the first of those that run is over.
                Err(Overloaded::Full { .. }) if !self.running.is_empty() => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// What comes next; the last is terminal.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Next> {
        if !std::mem::replace(&mut self.started, true) {
            let started = Output::Started { prompt_tokens: self.prompt_tokens, cached_tokens: 0 };
            return Poll::Ready(Next::Output(started));
        }
        loop {
            self.stop.waker.register(context.waker());
            if self.stop.asked.load(Ordering::SeqCst) {
                return Poll::Ready(self.done(Finish::Cancelled));
            }
            if let Err(error) = self.fill() {
                return Poll::Ready(Next::Output(Output::Failed(error)));
            }
            let Some(first) = self.running.front_mut() else {
                return Poll::Ready(self.done(Finish::Stop));
            };
            let gone = || EngineError::Internal("the engine is gone".into());
            match ready!(first.poll_next(context)).unwrap_or_else(|| Output::Failed(gone())) {
                Output::Embedding { values } => {
                    let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
                    let embedding = BASE64_STANDARD.encode(bytes);
                    return Poll::Ready(Next::Embedding(Embedding { index: self.index, embedding }));
                }
                Output::Done { finish, .. } if finish == [Finish::Stop] => {
                    self.running.pop_front();
                    self.index += 1;
                }
                Output::Done { .. } => return Poll::Ready(self.done(Finish::Cancelled)),
                Output::Failed(error) => return Poll::Ready(Next::Output(Output::Failed(by_name(error)))),
                Output::Started { .. } | Output::Prefill { .. } | Output::Token { .. } => {}
            }
        }
    }

    fn done(&mut self, finish: Finish) -> Next {
        self.running.clear();
        let prompt_tokens = self.prompt_tokens;
        Next::Output(Output::Done { finish: vec![finish], prompt_tokens, completion_tokens: 0, cached_tokens: 0 })
    }
}
