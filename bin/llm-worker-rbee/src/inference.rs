//! One inference: the wire's request into the engine's, the engine's outputs into the wire's events.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::Stream;
use rbee_engine::{
    CallPart, Choice, EngineError, Finish, Goal, Output, Overloaded, Piece, Reading, Request, Sampling, TokenStream,
};
use rbee_service::random_hex;
use rbee_wire::event::{
    ChoiceEnd, Done, Event, FinishReason, NoteLevel, Started, Timings, Token, TokenLogprobs, ToolCallPart, TopLogprob,
    Usage,
};
use rbee_wire::fields::Violation;
use rbee_wire::job::{Generation, Input, invalid};
use rbee_wire::worker::InferenceRequest;
use rbee_wire::{ErrorBody, ErrorCode, JobId, ModelRef, WorkerId, channel, sse};

use serde_json::json;

use crate::backend::{Answer, Encoded, Loaded, SamplingDefaults, only_embeds};
use crate::embeddings::{Embeddings, Next, Stop};
use crate::forms::AnswerIn;
use crate::status::Status;

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// As server-sent events with an end mark.
    Sse,
    /// As lines of this stream of a channel.
    Channel(u64),
}

/// An accepted inference, ready to be streamed.
pub struct Inference {
    /// The queen's job.
    pub job_id: JobId,
    source: Source,
    facts: StreamFacts,
}

/// Where its events come from.
enum Source {
    Answer(TokenStream),
    Embeddings(Embeddings),
}

/// Ends an inference from outside.
#[derive(Clone)]
pub enum Canceller {
    /// An answer.
    Answer(rbee_engine::Canceller),
    /// Embeddings.
    Embeddings(Arc<Stop>),
}

impl Canceller {
    /// The inference ends with what there is.
    pub fn cancel(&self) {
        match self {
            Self::Answer(canceller) => canceller.cancel(),
            Self::Embeddings(stop) => stop.cancel(),
        }
    }
}

struct StreamFacts {
    job_id: JobId,
    worker_id: WorkerId,
    model: ModelRef,
    seed: u64,
    note: Option<String>,
    /// When the request was there.
    received: Instant,
    loaded: Arc<Loaded>,
    status: Status,
}

/// Turns a request into tokens to come. Blocks for as long as tokenizing takes.
///
/// # Errors
/// Whatever the request is refused for; nothing of it is kept then.
pub fn begin(status: &Status, loaded: Arc<Loaded>, request: InferenceRequest) -> Result<Inference, ErrorBody> {
    let received = Instant::now();
    let InferenceRequest { job_id, request_id, traceparent, generation, resume, tenant, .. } = request;
    if let Some(trace) = &traceparent {
        tracing::info!(job = %job_id, request = %request_id, trace = trace.trace_id(), "a traced inference begins");
    }
    let facts = |seed, note| StreamFacts {
        job_id: job_id.clone(),
        worker_id: status.charge().worker_id.clone(),
        model: status.model().clone(),
        seed,
        note,
        received,
        loaded: Arc::clone(&loaded),
        status: status.clone(),
    };
    // Requests without a key share what they cached.
    let tenant = tenant.map_or([0; 16], |tenant| tenant.0);
    if !generation.embed.is_empty() {
        let embeddings = Embeddings::begin(Arc::clone(&loaded), &generation.embed, tenant)?;
        status.touch();
        let facts = facts(generation.seed.unwrap_or(0), None);
        return Ok(Inference { job_id, source: Source::Embeddings(embeddings), facts });
    }
    if loaded.engine.limits().reading == Reading::Whole {
        return Err(only_embeds(status.model()));
    }
    let encoded = match &generation.prompt {
        // Whether the vocabulary has them is the engine's to say.
        Some(Input::Tokens(ids)) => Encoded { prompt: ids.clone(), note: None, answer: Answer::GoesOn },
        Some(Input::Text(_)) | None => loaded.text.encode(&generation)?,
    };
    let seed = match generation.seed {
        Some(seed) => seed,
        None => u64::from_str_radix(&random_hex(8), 16).expect("16 hexadecimal digits are a u64"),
    };
    let choices = generation.n.unwrap_or(1);
    let resumed = match resume {
        None => Vec::new(),
        Some(_) if choices != 1 => {
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, "only a single answer can be resumed"));
        }
        Some(resume) => {
            if loaded.facts.numerics_id.as_deref() != Some(resume.numerics_id.as_str()) {
                return Err(ErrorBody::new(
                    ErrorCode::InvalidRequest,
                    "the answer was begun under another numerics id and cannot be resumed here exactly",
                ));
            }
            resume.tokens
        }
    };
    let form = loaded.text.form(&generation, &encoded.answer)?;
    let mut outputs = Vec::new();
    for _ in 0..choices {
        let text = loaded.text.output(&generation.stop, &encoded.answer)?;
        let constraint = form.as_ref().map(AnswerIn::constraint);
        outputs.push(Choice { text, constraint, resume: resumed.clone() });
    }
    let logprobs = generation.logprobs.unwrap_or(false).then(|| usize::from(generation.top_logprobs.unwrap_or(0)));
    let request = Request {
        prompt: encoded.prompt,
        goal: Goal::Answer,
        max_tokens: generation.max_tokens.map(|count| usize::try_from(count).unwrap_or(usize::MAX)),
        min_tokens: generation.min_tokens.map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX)),
        eos: loaded.text.eos().to_vec(),
        ignore_eos: generation.ignore_eos.unwrap_or(false),
        sampling: sampling(&generation, loaded.text.defaults(), seed),
        logprobs,
        tenant,
        choices: outputs,
    };
    let tokens = loaded.engine.submit(request).map_err(|error| engine_error(&EngineError::Overloaded(error)))?;
    status.touch();
    let facts = facts(seed, encoded.note);
    Ok(Inference { job_id, source: Source::Answer(tokens), facts })
}

fn sampling(generation: &Generation, defaults: &SamplingDefaults, seed: u64) -> Sampling {
    let top_k = generation.top_k.map(|k| u32::try_from(k).unwrap_or(u32::MAX)).or(defaults.top_k);
    Sampling {
        temperature: generation.temperature.or(defaults.temperature).unwrap_or(1.0),
        top_k: top_k.filter(|&k| k > 0),
        top_p: generation.top_p.or(defaults.top_p).unwrap_or(1.0),
        min_p: generation.min_p.unwrap_or(0.0),
        repetition_penalty: generation.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        frequency_penalty: generation.frequency_penalty.unwrap_or(0.0),
        presence_penalty: generation.presence_penalty.unwrap_or(0.0),
        logit_bias: generation.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect(),
        seed,
    }
}

/// The engine's error as the wire has it.
pub fn engine_error(error: &EngineError) -> ErrorBody {
    let code = match error {
        EngineError::ContextLength { .. } => ErrorCode::ContextLengthExceeded,
        EngineError::Invalid { field, problem } => {
            return invalid(vec![Violation { field: (*field).into(), problem: problem.clone() }]);
        }
        EngineError::Constraint { .. } => {
            let problem = format!("cannot be adhered to: {error}");
            return invalid(vec![Violation { field: "response_format".into(), problem }]);
        }
        EngineError::Overloaded(Overloaded::Full { .. }) => ErrorCode::Overloaded,
        EngineError::Overloaded(Overloaded::Draining) | EngineError::ShutDown => ErrorCode::Draining,
        EngineError::OutOfMemory(_) => ErrorCode::Oom,
        EngineError::SlowConsumer { .. } => ErrorCode::SlowConsumer,
        EngineError::BadLogits { .. }
        | EngineError::Forward(_)
        | EngineError::Internal(_)
        | EngineError::Overloaded(Overloaded::Dead) => ErrorCode::Internal,
    };
    ErrorBody::new(code, error.to_string())
}

impl Inference {
    /// What ends it from outside.
    pub fn canceller(&self) -> Canceller {
        match &self.source {
            Source::Answer(tokens) => Canceller::Answer(tokens.canceller()),
            Source::Embeddings(embeddings) => Canceller::Embeddings(embeddings.stop()),
        }
    }

    /// The encoded events, as many in one piece as have come, up to the end. Dropping it cancels.
    pub fn into_stream(self, framing: Framing) -> impl Stream<Item = Bytes> + Send {
        let Self { mut source, facts, .. } = self;
        let mut next_id = 0u64;
        let mut over = false;
        futures::stream::poll_fn(move |cx| {
            let mut bytes = Vec::new();
            while !over {
                let next = match &mut source {
                    // The engine ends every stream with a terminal output; this is the answer if it ever did not.
                    Source::Answer(tokens) => tokens.poll_next(cx).map(|output| {
                        Next::Output(
                            output
                                .unwrap_or_else(|| Output::Failed(EngineError::Internal("the engine is gone".into()))),
                        )
                    }),
                    Source::Embeddings(embeddings) => embeddings.poll_next(cx),
                };
                let events = match next {
                    Poll::Pending if bytes.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                    Poll::Ready(Next::Output(output)) => facts.events(output),
                    Poll::Ready(Next::Embedding(embedding)) => vec![Event::Data { value: json!(embedding) }],
                };
                for mut event in events {
                    if let (Event::Done(done), Source::Answer(tokens)) = (&mut event, &source) {
                        let ms = |time: Duration| time.as_secs_f64() * 1e3;
                        let prefill = tokens.first_computed().map(|at| at.saturating_duration_since(facts.received));
                        done.timings = Some(Timings {
                            prefill_ms: ms(prefill.unwrap_or_default()),
                            decode_ms: ms(tokens.decode_time()),
                            ..Timings::default()
                        });
                    }
                    over |= event.is_end();
                    let json = serde_json::to_vec(&event).expect("wire types serialize to JSON");
                    match framing {
                        Framing::Sse => sse::write_event(&mut bytes, next_id, &json),
                        Framing::Channel(stream) => channel::write_line(&mut bytes, stream, &json),
                    }
                    next_id += 1;
                }
                if over {
                    if framing == Framing::Sse {
                        sse::write_done(&mut bytes);
                    }
                    facts.status.touch();
                }
            }
            Poll::Ready((!bytes.is_empty()).then(|| Bytes::from(bytes)))
        })
    }
}

impl StreamFacts {
    fn events(&self, output: Output) -> Vec<Event> {
        match output {
            Output::Started { prompt_tokens, cached_tokens } => {
                let started = Event::Started(Started {
                    job_id: self.job_id.clone(),
                    worker_id: self.worker_id.clone(),
                    model: self.model.clone(),
                    prompt_tokens: prompt_tokens as u64,
                    cached_tokens: cached_tokens as u64,
                    seed: self.seed,
                    why: String::new(),
                    fingerprint: self.loaded.facts.fingerprint.clone(),
                    numerics_id: self.loaded.facts.numerics_id.clone(),
                });
                let note = self.note.as_ref().map(|text| Event::note(NoteLevel::Warn, text));
                std::iter::once(started).chain(note).collect()
            }
            // The last piece is told by the first token itself.
            Output::Prefill { done, total } if done >= total => Vec::new(),
            Output::Prefill { done, total } => vec![Event::Progress {
                stage: "prefill".into(),
                done: done as u64,
                total: total as u64,
                unit: "tokens".into(),
                eta_ms: None,
                detail: None,
            }],
            Output::Token { choice, index, id, piece, logprobs } => {
                let logprobs = logprobs.map(|logprobs| TokenLogprobs {
                    t: self.loaded.text.token_text(id),
                    logprob: logprobs.chosen,
                    top: logprobs
                        .top
                        .iter()
                        .map(|&(id, logprob)| TopLogprob { id, t: self.loaded.text.token_text(id), logprob })
                        .collect(),
                });
                let Piece { text, reasoning, calls } = piece;
                let part = |CallPart { index, name, arguments }| {
                    let id = name.is_some().then(|| call_id(&self.job_id, choice, index));
                    ToolCallPart { index, id, name, arguments }
                };
                let tool_calls = calls.into_iter().map(part).collect();
                vec![Event::Token(Token { i: index as u64, choice, t: text, id, reasoning, tool_calls, logprobs })]
            }
            Output::Done { finish, prompt_tokens, completion_tokens, cached_tokens } => vec![Event::Done(Done {
                choices: finish.into_iter().map(|finish| ChoiceEnd { finish_reason: reason(finish) }).collect(),
                usage: Some(Usage {
                    prompt_tokens: prompt_tokens as u64,
                    completion_tokens: completion_tokens as u64,
                    total_tokens: (prompt_tokens + completion_tokens) as u64,
                    cached_tokens: cached_tokens as u64,
                }),
                timings: None,
            })],
            Output::Failed(error) => vec![Event::Error(engine_error(&error))],
            // Of embeddings, which number them.
            Output::Embedding { .. } => Vec::new(),
        }
    }
}

/// The id of a call: the same wherever the job is run again, and nine letters and digits, which is what Mistral's templates ask for.
fn call_id(job: &JobId, choice: u32, index: u32) -> String {
    const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut hasher = DefaultHasher::new();
    (job.as_str(), choice, index).hash(&mut hasher);
    let mut rest = hasher.finish();
    let mut letter = || {
        let letter = LETTERS[(rest % 62) as usize];
        rest /= 62;
        char::from(letter)
    };
    (0..9).map(|_| letter()).collect()
}

fn reason(finish: Finish) -> FinishReason {
    match finish {
        Finish::Stop => FinishReason::Stop,
        Finish::Called => FinishReason::ToolCalls,
        Finish::Length => FinishReason::Length,
        Finish::Cancelled => FinishReason::Cancelled,
    }
}
