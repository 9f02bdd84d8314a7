//! The store, and transfers that several askers share.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rbee_wire::ModelRef;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::download::blocking;
use crate::error::{Error, SharedError};
use crate::http::Fetcher;
use crate::local::{self, Local};
use crate::manage::{self, Stored};
use crate::options::{Offline, Options};
use crate::progress::{Meter, Progress, Stage};
use crate::{import, transfer};

/// Most models that are fetched at once.
const AT_ONCE: usize = 2;

/// Most transfers that wait for that; one more is [`Error::Busy`].
const MAX_WAITING: usize = 64;

/// Time between two looks at a transfer's meter.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// The models of this machine, and the hub that more come from. Clones share everything.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: Arc<Options>,
    /// Made when it is first needed: it reads the system's certificates.
    fetcher: OnceLock<Fetcher>,
    slots: Semaphore,
    waiting: AtomicUsize,
    transfers: Mutex<HashMap<ModelRef, Arc<Transfer>>>,
}

type Outcome = Option<Result<Local, SharedError>>;

/// A transfer under way.
#[derive(Debug)]
struct Transfer {
    progress: watch::Receiver<Progress>,
    outcome: watch::Receiver<Outcome>,
    /// How many want it; guarded by the map's lock.
    askers: AtomicUsize,
    stop: CancellationToken,
}

/// A share in a transfer. The transfer stops when the last one is dropped, and what is there by then is kept.
#[derive(Debug)]
pub struct Fetch {
    inner: Arc<Inner>,
    model: ModelRef,
    transfer: Arc<Transfer>,
}

impl Store {
    /// The store that these options describe. Nothing is read or made yet.
    pub fn new(options: Options) -> Self {
        let inner = Inner {
            options: Arc::new(options),
            fetcher: OnceLock::new(),
            slots: Semaphore::new(AT_ONCE),
            waiting: AtomicUsize::new(0),
            transfers: Mutex::new(HashMap::new()),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The options it was made with.
    pub fn options(&self) -> &Options {
        &self.inner.options
    }

    /// The model, if all its files are here. Makes no request; looks at the disk, so not for an async thread.
    ///
    /// # Errors
    /// [`Error::NotStored`] for the built-in model and aliases, [`Error::NoModelHere`] for a path without a model,
    /// [`Error::Ambiguous`], [`Error::RefusedFile`], [`Error::BadName`], [`Error::File`].
    pub fn local(&self, model: &ModelRef) -> Result<Option<Local>, Error> {
        local::find(&self.inner.options.hub, model)
    }

    /// Begins to fetch a model, or joins who does. A model that is here already is done at once, without a request.
    ///
    /// Must be called on a tokio runtime.
    pub fn fetch(&self, model: &ModelRef) -> Fetch {
        let mut transfers = self.inner.transfers();
        let running = transfers.get(model).filter(|transfer| !transfer.stop.is_cancelled());
        let transfer = match running {
            Some(transfer) => Arc::clone(transfer),
            None => {
                let transfer = Arc::new(start(&self.inner, model));
                transfers.insert(model.clone(), Arc::clone(&transfer));
                transfer
            }
        };
        transfer.askers.fetch_add(1, Ordering::Relaxed);
        drop(transfers);
        Fetch { inner: Arc::clone(&self.inner), model: model.clone(), transfer }
    }

    /// Every model with files in the cache, complete or not, whichever tool put them there.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn list(&self) -> Result<Vec<Stored>, Error> {
        manage::list(&self.inner.options.hub)
    }

    /// Bytes that the whole cache takes on the disk.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn used_bytes(&self) -> Result<u64, Error> {
        manage::used_bytes(&self.inner.options.hub)
    }

    /// Removes a model's snapshot, or one file's part of it, with the blobs that nothing else refers to; gives the bytes
    /// that became free. Whether it is in use is the caller's to know.
    ///
    /// # Errors
    /// [`Error::NotStored`], [`Error::NoModelHere`] when there is nothing of it, [`Error::Busy`] when it is being
    /// fetched, [`Error::File`].
    pub fn delete(&self, model: &ModelRef) -> Result<u64, Error> {
        manage::delete(&self.inner.options.hub, model)
    }

    /// Copies a local folder or `.gguf` file into the cache under a repository's name.
    ///
    /// # Errors
    /// [`Error::NoModelHere`], [`Error::RefusedFile`], [`Error::BadName`], [`Error::DiskFull`], [`Error::File`].
    pub fn import(&self, path: &Path, repo: &str) -> Result<Local, Error> {
        import::import(&self.inner.options, path, repo)
    }
}

impl Inner {
    fn transfers(&self) -> std::sync::MutexGuard<'_, HashMap<ModelRef, Arc<Transfer>>> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetcher(&self) -> Result<Fetcher, Error> {
        if let Some(fetcher) = self.fetcher.get() {
            return Ok(fetcher.clone());
        }
        let options = Arc::clone(&self.options);
        let made = blocking(move || Fetcher::new(options)).await?;
        Ok(self.fetcher.get_or_init(|| made).clone())
    }

    async fn bring(&self, model: &ModelRef, meter: Arc<Meter>) -> Result<Local, Error> {
        let (hub, wanted) = (self.options.hub.clone(), model.clone());
        if let Some(local) = blocking(move || local::find(&hub, &wanted)).await? {
            return Ok(local);
        }
        if self.options.offline == Offline::Yes {
            return Err(Error::Offline { model: model.to_string() });
        }
        let _slot = match self.slots.try_acquire() {
            Ok(slot) => slot,
            Err(_) => {
                let waiting = Waiting::begin(&self.waiting)?;
                let slot = self.slots.acquire().await.map_err(|_| Error::Lost)?;
                drop(waiting);
                slot
            }
        };
        let fetcher = self.fetcher().await?;
        transfer::fetch(&fetcher, model, meter).await
    }
}

/// A place in the line of those that wait.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(line: &'a AtomicUsize) -> Result<Self, Error> {
        let waiting = line.fetch_add(1, Ordering::Relaxed);
        let place = Self(line);
        if waiting >= MAX_WAITING { Err(Error::Busy { waiting }) } else { Ok(place) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Starts the task of a transfer.
fn start(inner: &Arc<Inner>, model: &ModelRef) -> Transfer {
    let (progress, progress_seen) = watch::channel(Progress::default());
    let (outcome, outcome_seen) = watch::channel(None);
    let stop = CancellationToken::new();
    let (inner, model, stopped) = (Arc::clone(inner), model.clone(), stop.clone());
    tokio::spawn(async move {
        let meter = Arc::new(Meter::default());
        let mut work = std::pin::pin!(inner.bring(&model, Arc::clone(&meter)));
        let mut ticks = tokio::time::interval(REPORT_EVERY);
        let result = loop {
            tokio::select! {
                result = &mut work => break result,
                () = stopped.cancelled() => break Err(Error::Cancelled),
                _ = ticks.tick() => {
                    progress.send_replace(meter.read(Instant::now()));
                }
            }
        };
        if let Ok(local) = &result {
            let (done, total) = (local.bytes, local.bytes);
            progress.send_replace(Progress { stage: Stage::Done, done, total, ..Progress::default() });
        }
        {
            // Whoever asks from now on starts anew; one that was stopped may have been replaced already.
            let mut transfers = inner.transfers();
            let ours = transfers.get(&model).is_some_and(|now| now.outcome.same_channel(&outcome.subscribe()));
            if ours {
                transfers.remove(&model);
            }
        }
        outcome.send_replace(Some(result.map_err(Arc::new)));
    });
    Transfer { progress: progress_seen, outcome: outcome_seen, askers: AtomicUsize::new(0), stop }
}

impl Fetch {
    /// How far it is, as it changes: a few times a second.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.transfer.progress.clone()
    }

    /// Waits for the model.
    ///
    /// # Errors
    /// Any of the store's; all who share the transfer get the same.
    pub async fn finished(&self) -> Result<Local, SharedError> {
        let mut outcome = self.transfer.outcome.clone();
        let seen = outcome.wait_for(Option::is_some).await.map_err(|_| Arc::new(Error::Lost))?;
        seen.clone().unwrap_or_else(|| Err(Arc::new(Error::Lost)))
    }

    /// Waits for the model or for the token, and gives up this share at the latter.
    ///
    /// # Errors
    /// [`Error::Cancelled`], and as [`Fetch::finished`].
    pub async fn finished_unless(self, cancel: &CancellationToken) -> Result<Local, SharedError> {
        tokio::select! {
            outcome = self.finished() => outcome,
            () = cancel.cancelled() => Err(Arc::new(Error::Cancelled)),
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        // Under the map's lock, so that nobody joins in between.
        let mut transfers = self.inner.transfers();
        if self.transfer.askers.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.transfer.stop.cancel();
            if transfers.get(&self.model).is_some_and(|now| Arc::ptr_eq(now, &self.transfer)) {
                transfers.remove(&self.model);
            }
        }
    }
}
