//! The engine on its own thread: the only impure file of the crate.
//!
//! [`EngineHandle::submit`] answers at once from any thread. A [`TokenStream`] carries one request's
//! outputs; dropping it cancels. The thread sleeps while there is nothing to do.
//!
//! Bounds: requests by the engine's gate (slots and queue), which also bounds the command channel;
//! outputs by [`STREAM_CAPACITY`] per stream, with one place beyond that kept for the terminal output, so
//! that even a full stream is told how it ended. A cancellation is a flag in the stream and a wake-up:
//! it cannot be lost, and the engine looks before every step.
//!
//! However the thread ends (drained, shut down, a failed forward pass, a panic), every stream that is
//! still open gets its terminal output: a `Sink` that is dropped without one sends it.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, OwnedPermit, error::TrySendError};
use tokio::sync::watch;

use crate::engine::{Engine, EngineConfig, EngineStats};
use crate::error::{EngineError, Overloaded};
use crate::gate::{Gate, Permit};
use crate::request::{Output, Request, RequestId};
use crate::runner::{ModelLimits, StepCounter};

/// Unread outputs a stream holds before the request ends with [`EngineError::SlowConsumer`]: hundreds of
/// milliseconds of the fastest model, so that only a reader that has stopped reading meets it.
pub const STREAM_CAPACITY: usize = 1024;

/// How the engine thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All work was finished after [`EngineHandle::drain`], or nobody could send any more.
    Drained,
    /// After [`EngineHandle::shutdown`].
    ShutDown,
    /// The engine failed; its process should report it and exit.
    Dead(EngineError),
}

/// Holds the engine thread. Clones are the same engine; with the last handle and stream gone the thread
/// ends.
#[derive(Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    published: Arc<Published>,
    ended: watch::Receiver<Option<Ended>>,
}

/// What the thread and its callers share.
struct Published {
    gate: Arc<Gate>,
    wake: Wake,
    shutdown: AtomicBool,
    stats: Mutex<EngineStats>,
    steps: StepCounter,
    limits: ModelLimits,
    config: EngineConfig,
}

/// Set while a wake-up is on its way, so that there is never more than one.
#[derive(Clone, Default)]
struct Wake(Arc<AtomicBool>);

impl Wake {
    fn send(&self, commands: &SyncSender<Command>) {
        // Refused by an engine that is gone, or that is awake with a full channel and will look anyway.
        if !self.0.swap(true, Ordering::SeqCst) && commands.try_send(Command::Wake).is_err() {
            self.received();
        }
    }

    fn received(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

enum Command {
    Submit(Box<Submission>),
    Wake,
}

struct Submission {
    request: Request,
    permit: Permit,
    sink: Sink,
}

/// An output and when the step that gave it was over; no time for ends that no step gave.
type Timed = (Option<Instant>, Output);

/// The engine's end of a stream.
struct Sink {
    outputs: mpsc::Sender<Timed>,
    /// The place of the terminal output; taken when it is sent.
    terminal: Option<OwnedPermit<Timed>>,
    cancelled: Arc<AtomicBool>,
}

impl Sink {
    fn end(mut self, output: Output) {
        if let Some(place) = self.terminal.take() {
            place.send((None, output));
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Some(place) = self.terminal.take() {
            place.send((None, Output::Failed(EngineError::Internal("the engine is gone".into()))));
        }
    }
}

/// The outputs of one request. Dropping it cancels the request.
pub struct TokenStream {
    outputs: mpsc::Receiver<Timed>,
    ended: bool,
    /// When the first and the last of the tokens that were read were computed.
    computed: Option<(Instant, Instant)>,
    canceller: Canceller,
}

/// Cancels one request; cheap to clone and to keep after its end.
#[derive(Clone)]
pub struct Canceller {
    cancelled: Arc<AtomicBool>,
    wake: Wake,
    commands: SyncSender<Command>,
}

impl Canceller {
    /// Ends the request before the engine's next step; the stream gets a `Done` with what was finished
    /// and the rest cancelled. Nothing happens to a request that has ended.
    pub fn cancel(&self) {
        if !self.cancelled.swap(true, Ordering::SeqCst) {
            self.wake.send(&self.commands);
        }
    }
}

impl TokenStream {
    /// The next output; `None` after the terminal one. Cancel safe.
    pub async fn next(&mut self) -> Option<Output> {
        let output = self.outputs.recv().await;
        self.note(output)
    }

    /// [`TokenStream::next`] for hand-written futures.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Output>> {
        self.outputs.poll_recv(context).map(|output| self.note(output))
    }

    fn note(&mut self, timed: Option<Timed>) -> Option<Output> {
        self.ended |= timed.as_ref().is_none_or(|(_, output)| output.is_terminal());
        let (at, output) = timed?;
        if let (Some(at), Output::Token { .. }) = (at, &output) {
            self.computed = Some((self.computed.map_or(at, |(first, _)| first), at));
        }
        Some(output)
    }

    /// From the first to the last of the tokens that were read, as the engine computed them, however late they were read.
    pub fn decode_time(&self) -> Duration {
        self.computed.map_or(Duration::ZERO, |(first, last)| last - first)
    }

    /// When the first of the tokens that were read was computed.
    pub fn first_computed(&self) -> Option<Instant> {
        self.computed.map(|(first, _)| first)
    }

    /// A way to cancel while somebody else reads.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if !self.ended {
            self.outputs.close();
            self.canceller.cancel();
        }
    }
}

impl EngineHandle {
    /// Starts the engine thread. `steps` is the runner's counter, for [`EngineHandle::stats`].
    ///
    /// # Errors
    /// The system gives no thread.
    #[expect(clippy::disallowed_methods, reason = "the engine's one thread is started here")]
    pub fn start(engine: Engine, steps: StepCounter) -> std::io::Result<Self> {
        let gate = Arc::clone(engine.gate());
        // A submission holds at least one place of the gate, and there is one wake-up at most.
        let (commands, received) = sync_channel(gate.capacity() + 1);
        let published = Arc::new(Published {
            gate,
            wake: Wake::default(),
            shutdown: AtomicBool::new(false),
            stats: Mutex::new(engine.stats()),
            steps,
            limits: engine.limits().clone(),
            config: *engine.config(),
        });
        let (ended_sender, ended) = watch::channel(None);
        let shared = Arc::clone(&published);
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || EngineThread::new(engine, shared, received).run(&ended_sender))?;
        Ok(Self { commands, published, ended })
    }

    /// Hands a request over; never waits. A request that can never run is accepted and its stream ends
    /// with the reason.
    ///
    /// # Errors
    /// There is no place for it; the request is dropped.
    pub fn submit(&self, request: Request) -> Result<TokenStream, Overloaded> {
        let gate = &self.published.gate;
        let permit = gate.acquire(request.choices.len())?;
        let (sender, outputs) = mpsc::channel(STREAM_CAPACITY + 1);
        let terminal = sender.clone().try_reserve_owned().map_err(|_| Overloaded::Dead)?;
        let canceller =
            Canceller { cancelled: Arc::default(), wake: self.published.wake.clone(), commands: self.commands.clone() };
        let sink = Sink { outputs: sender, terminal: Some(terminal), cancelled: Arc::clone(&canceller.cancelled) };
        match self.commands.try_send(Command::Submit(Box::new(Submission { request, permit, sink }))) {
            Ok(()) => Ok(TokenStream { outputs, ended: false, computed: None, canceller }),
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) if self.is_dead() => Err(Overloaded::Dead),
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) => Err(Overloaded::Draining),
            Err(std::sync::mpsc::TrySendError::Full(_)) => {
                Err(Overloaded::Full { live: gate.live(), capacity: gate.capacity() })
            }
        }
    }

    /// What the model can take here: `context` is bounded by the KV.
    pub fn limits(&self) -> &ModelLimits {
        &self.published.limits
    }

    /// The engine's sizes.
    pub fn config(&self) -> &EngineConfig {
        &self.published.config
    }

    /// Where the engine stands; never waits for a step.
    pub fn stats(&self) -> EngineStats {
        let published = &self.published;
        let stats = *published.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let live = published.gate.live();
        EngineStats {
            // What is on its way to the thread waits too, and must be worked on.
            waiting: live.saturating_sub(stats.slots_used),
            working: stats.working || live > 0,
            steps: published.steps.get(),
            ..stats
        }
    }

    /// Takes no more requests; the thread ends when those it has are done.
    pub fn drain(&self) {
        self.published.gate.shut();
        self.published.wake.send(&self.commands);
    }

    /// Ends every stream with [`EngineError::ShutDown`] and the thread with it, after the step in progress.
    pub fn shutdown(&self) {
        self.published.shutdown.store(true, Ordering::SeqCst);
        self.drain();
    }

    /// Whether the engine has failed and its process should exit.
    pub fn is_dead(&self) -> bool {
        matches!(*self.ended.borrow(), Some(Ended::Dead(_)))
    }

    /// Waits for the end of the engine thread; weights and KV are freed by then, unless it failed.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(Ended::Drained),
            Err(_) => Ended::Dead(EngineError::Internal("the engine thread vanished".into())),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "steps and outputs are timed where the engine is not pure any more")]
fn now() -> Instant {
    Instant::now()
}

struct EngineThread {
    engine: Engine,
    published: Arc<Published>,
    commands: Receiver<Command>,
    sinks: HashMap<RequestId, Sink>,
    outputs: Vec<(RequestId, Output)>,
}

impl EngineThread {
    fn new(engine: Engine, published: Arc<Published>, commands: Receiver<Command>) -> Self {
        Self { engine, published, commands, sinks: HashMap::new(), outputs: Vec::new() }
    }

    fn run(mut self, ended: &watch::Sender<Option<Ended>>) {
        let end = catch_unwind(AssertUnwindSafe(|| self.work())).unwrap_or_else(|panic| {
            Ended::Dead(EngineError::Internal(format!("the engine panicked: {}", message(&*panic))))
        });
        let error = match &end {
            Ended::Dead(error) => {
                // Known to be dead before the first stream hears of it.
                self.published.gate.shut_dead();
                ended.send_replace(Some(end.clone()));
                error.clone()
            }
            Ended::ShutDown | Ended::Drained => EngineError::ShutDown,
        };
        // What was computed before the end is still true; then the rest is told.
        let _ = catch_unwind(AssertUnwindSafe(|| self.deliver()));
        for (_, sink) in self.sinks.drain() {
            sink.end(Output::Failed(error.clone()));
        }
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                submission.sink.end(Output::Failed(error.clone()));
            }
        }
        let Self { engine, published, commands, .. } = self;
        // What a panic left behind may panic again when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(move || drop(engine)));
        drop(commands);
        let idle = EngineStats { slots_used: 0, waiting: 0, kv_blocks_used: 0, working: false, ..read(&published) };
        publish(&published, idle);
        ended.send_replace(Some(end));
    }

    fn work(&mut self) -> Ended {
        loop {
            if !self.receive() {
                return Ended::Drained;
            }
            if self.published.shutdown.load(Ordering::SeqCst) {
                return Ended::ShutDown;
            }
            for (id, sink) in &self.sinks {
                if sink.cancelled.load(Ordering::SeqCst) {
                    self.engine.cancel(*id);
                }
            }
            publish(&self.published, self.engine.stats());
            let before = now();
            self.engine.step(&mut self.outputs);
            self.engine.took(now() - before);
            // Published before the outputs are: whoever has seen a stream end finds its memory free.
            publish(&self.published, self.engine.stats());
            if self.engine.has_failed() {
                return Ended::Dead(self.failure());
            }
            self.deliver();
        }
    }

    /// Takes all commands there are, and waits for one while there is nothing to do. False when nothing
    /// can come any more.
    fn receive(&mut self) -> bool {
        loop {
            let command = match self.commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Disconnected) if !self.engine.has_work() => return false,
                Err(_) if self.engine.has_work() || self.published.shutdown.load(Ordering::SeqCst) => return true,
                Err(_) if self.published.gate.is_drained() => return false,
                Err(_) => {
                    self.engine.rest();
                    match self.commands.recv() {
                        Ok(command) => command,
                        Err(_) => return false,
                    }
                }
            };
            match command {
                Command::Wake => self.published.wake.received(),
                Command::Submit(submission) => self.accept(*submission),
            }
        }
    }

    fn accept(&mut self, submission: Submission) {
        let Submission { request, permit, sink } = submission;
        match self.engine.accept(request, permit) {
            Ok(id) => {
                self.sinks.insert(id, sink);
            }
            Err(error) => sink.end(Output::Failed(error)),
        }
    }

    fn deliver(&mut self) {
        let now = now();
        for (id, output) in self.outputs.drain(..) {
            // A request without a sink has been told its end already.
            let Some(sink) = self.sinks.get(&id) else { continue };
            let last = if output.is_terminal() {
                output
            } else {
                match sink.outputs.try_send((Some(now), output)) {
                    Ok(()) => continue,
                    // A token is lost: nothing but a failure may follow.
                    Err(TrySendError::Full(_)) => {
                        Output::Failed(EngineError::SlowConsumer { capacity: STREAM_CAPACITY })
                    }
                    // Nobody reads it.
                    Err(TrySendError::Closed(_)) => Output::Failed(EngineError::ShutDown),
                }
            };
            if let Some(sink) = self.sinks.remove(&id) {
                sink.end(last);
            }
            self.engine.cancel(id);
        }
    }

    /// Why the engine failed: what its requests were told.
    fn failure(&mut self) -> EngineError {
        let told = self.outputs.iter().rev().find_map(|(_, output)| match output {
            Output::Failed(error @ EngineError::Forward(_)) => Some(error.clone()),
            _ => None,
        });
        told.unwrap_or_else(|| EngineError::Internal("the engine failed".into()))
    }
}

fn read(published: &Published) -> EngineStats {
    *published.stats.lock().unwrap_or_else(PoisonError::into_inner)
}

fn publish(published: &Published, stats: EngineStats) {
    *published.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
}

fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The case of a request that was on its way when the thread ended.
    #[test]
    fn a_sink_that_is_dropped_ends_its_stream() {
        let (sender, mut outputs) = mpsc::channel(2);
        let terminal = sender.clone().try_reserve_owned().ok();
        drop(Sink { outputs: sender, terminal, cancelled: Arc::default() });
        let (_, last) = outputs.try_recv().unwrap();
        assert!(matches!(last, Output::Failed(EngineError::Internal(_))), "{last:?}");
        assert!(outputs.try_recv().is_err());
    }
}
