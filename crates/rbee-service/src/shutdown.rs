//! How a daemon ends: the first signal drains, the second ends at once.

use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The daemon's end, seen by all its tasks.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    drain: CancellationToken,
    now: CancellationToken,
}

impl Shutdown {
    /// One that follows SIGTERM and SIGINT. Must be called within the runtime.
    ///
    /// # Errors
    /// When the signals cannot be listened to.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::default();
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let seen = shutdown.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                if seen.is_begun() {
                    return seen.end_now();
                }
                tracing::info!("a signal asks to stop");
                seen.begin();
            }
        });
        Ok(shutdown)
    }

    /// Takes nothing new from here on.
    pub fn begin(&self) {
        self.drain.cancel();
    }

    /// Whether draining has begun.
    pub fn is_begun(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// Waits until draining begins.
    pub async fn begun(&self) {
        self.drain.cancelled().await;
    }

    /// Stops waiting for anything.
    pub fn end_now(&self) {
        self.drain.cancel();
        self.now.cancel();
    }

    /// The token that ends the server itself.
    pub fn now(&self) -> CancellationToken {
        self.now.clone()
    }
}

/// The daemon's tasks by name. A task that panics ends the daemon, since nobody would do its work.
#[derive(Clone, Debug)]
pub struct Tasks {
    tracker: TaskTracker,
    shutdown: Shutdown,
}

impl Tasks {
    /// Tasks of a daemon that ends with `shutdown`.
    pub fn new(shutdown: Shutdown) -> Self {
        Self { tracker: TaskTracker::new(), shutdown }
    }

    /// Runs a task until it ends or the daemon does; its panic ends the daemon.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        let stop = shutdown.now();
        let inner = self.tracker.spawn(async move {
            tokio::select! {
                () = task => {}
                () = stop.cancelled() => {}
            }
        });
        self.tracker.spawn(async move {
            if inner.await.is_err_and(|error| error.is_panic()) {
                tracing::error!(task = name, "a task panicked; the daemon ends");
                shutdown.end_now();
            }
        });
    }

    /// Waits until all have ended.
    pub async fn wait(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}
