//! A job's stream, event by event: progress and notes go to stderr, the end is checked, the rest is the
//! command's.

use std::time::Duration;

use rbee_client::{EventStream, QueenClient, StreamEvent};
use rbee_wire::event::{Event, NoteLevel};
use rbee_wire::{JobId, JobRequest};
use serde_json::Value;
use tokio::signal::unix::Signal;

use crate::exit::{Exit, Failure};
use crate::settings::Context;

/// How often a wait without events is shown to go on.
const TICK: Duration = Duration::from_millis(500);

/// A job's stream, event by event.
pub struct Follower<'a> {
    context: &'a Context,
    client: QueenClient,
    stream: EventStream,
    waiting_for: String,
    ours: bool,
}

impl<'a> Follower<'a> {
    /// Follows a stream; `waiting_for` is what a person reads until the first event says more.
    pub fn new(context: &'a Context, client: QueenClient, stream: EventStream, waiting_for: &str) -> Self {
        Self { context, client, stream, waiting_for: waiting_for.to_owned(), ours: true }
    }

    /// Listens to a job that another command posted: Ctrl-C leaves it alone.
    pub fn listening(context: &'a Context, client: QueenClient, stream: EventStream, waiting_for: &str) -> Self {
        Self { ours: false, ..Self::new(context, client, stream, waiting_for) }
    }

    /// The next event, `None` after the end. Progress and notes have been shown already when it returns them.
    ///
    /// # Errors
    /// When the stream breaks off. The job's own `error` event is an event like others.
    pub async fn next(&mut self) -> Result<Option<StreamEvent>, Failure> {
        let printer = &self.context.printer;
        let event = loop {
            tokio::select! {
                event = self.stream.next() => break event,
                () = tokio::time::sleep(TICK) => printer.progress(&self.waiting_for),
            }
        };
        let Some(event) = event.transpose()? else {
            printer.progress_over();
            return Ok(None);
        };
        match &event.event {
            Event::Queued { position, eta_ms } => {
                self.waiting_for = match position {
                    0 => "waiting for a free worker".into(),
                    1 => "waiting: 1 job before this one".into(),
                    n => format!("waiting: {n} jobs before this one"),
                };
                self.waiting_for.push_str(&eta(*eta_ms));
                printer.progress(&self.waiting_for);
            }
            Event::Progress { stage, done, total, unit, eta_ms, detail } => {
                self.waiting_for = progress(stage, *done, *total, unit, detail.as_deref());
                self.waiting_for.push_str(&eta(*eta_ms));
                printer.progress(&self.waiting_for);
            }
            Event::Started(started) => {
                if self.ours {
                    self.context.current.replace(Some((self.client.clone(), started.job_id.clone())));
                }
                self.waiting_for = "reading the prompt".into();
                printer.detail(&format!(
                    "{} on {}: {} prompt tokens, {} cached, seed {} ({})",
                    started.model,
                    started.worker_id,
                    started.prompt_tokens,
                    started.cached_tokens,
                    started.seed,
                    started.why
                ));
            }
            Event::Note { level: NoteLevel::Info, text, .. } => printer.note(text),
            Event::Note { level: NoteLevel::Warn, text, .. } => printer.warn(text),
            Event::Resumed { from_worker, to_worker, at, exact } => {
                let how = if *exact { "" } else { "; the text from here on may differ from what it would have been" };
                printer.note(&format!("{from_worker} is gone: {to_worker} goes on after {at} tokens{how}"));
            }
            Event::Token(_) => {
                "waiting for the next token".clone_into(&mut self.waiting_for);
                printer.progress_over();
            }
            Event::Data { .. } => printer.progress_over(),
            Event::Done(_) | Event::Error(_) => {
                printer.progress_over();
                self.context.current.replace(None);
            }
        }
        Ok(Some(event))
    }
}

fn eta(eta_ms: Option<u64>) -> String {
    eta_ms.map(|ms| format!(", about {} s", ms.div_ceil(1000))).unwrap_or_default()
}

fn progress(stage: &str, done: u64, total: u64, unit: &str, detail: Option<&str>) -> String {
    let mut text = match stage {
        "start" => "starting".to_owned(),
        "load" => "loading".into(),
        "warm_up" => "warming up".into(),
        "prefill" => "reading the prompt".into(),
        "download" => "downloading".into(),
        "drain" => "draining".into(),
        other => other.to_owned(),
    };
    if let Some(detail) = detail {
        text = format!("{text} {detail}");
    }
    if total > 0 {
        let part = done.min(total) as f64 / total as f64 * 100.0;
        text = match unit {
            "bytes" => {
                let (done, total) = (crate::render::bytes(done), crate::render::bytes(total));
                format!("{text}: {:.0}% ({done} of {total})", part.floor())
            }
            _ => format!("{text}: {:.0}%", part.floor()),
        };
    }
    text
}

/// The failure of a job that somebody else cancelled.
pub fn cancelled() -> Failure {
    Failure::new(Exit::Failed, "the job was cancelled by somebody else")
}

/// Posts a job and collects the values of its `data` events. Ctrl-C cancels it.
///
/// # Errors
/// The job's own error, or what went wrong on the way.
pub async fn call(context: &Context, queen: &QueenClient, job: &JobRequest) -> Result<Vec<Value>, Failure> {
    let accepted = queen.post_job(job, None).await?;
    context.current.replace(Some((queen.clone(), accepted.job_id.clone())));
    let stream = queen.stream_job(&accepted.job_id, None).await?;
    let about = format!("waiting for {}", job.operation().name());
    let mut follower = Follower::new(context, queen.clone(), stream, &about);
    let mut values = Vec::new();
    while let Some(event) = follower.next().await? {
        match event.event {
            Event::Data { value: Value::Array(items) } if values.is_empty() => values = items,
            Event::Data { value } => values.push(value),
            Event::Error(body) => return Err(Failure::refused(body)),
            Event::Done(done) if done.cancelled() => return Err(cancelled()),
            _ => {}
        }
    }
    Ok(values)
}

/// Cancels the job under way, if there is one; gives up after a moment, or at a second Ctrl-C.
pub async fn cancel_current(context: &Context, interrupts: &mut Signal) {
    context.printer.progress_over();
    let current: Option<(QueenClient, JobId)> = context.current.take();
    if let Some((client, job)) = current {
        tokio::select! {
            _ = tokio::time::timeout(Duration::from_secs(2), client.cancel(&job)) => {}
            _ = interrupts.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_reads_as_a_sentence() {
        assert_eq!(progress("load", 512, 2048, "bytes", Some("org/name")), "loading org/name: 25% (512B of 2.0KiB)");
        assert_eq!(progress("warm_up", 0, 0, "steps", None), "warming up");
        assert_eq!(progress("prefill", 3, 2, "tokens", None), "reading the prompt: 100%");
        assert_eq!(eta(Some(1)), ", about 1 s");
    }
}
