//! The models of this machine: what the store has, what is being fetched, and the operations on both.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rbee_catalog::{CancellationToken, Error, Local, Progress, Stage, Store};
use rbee_supervisor::Supervisor;
use rbee_wire::event::Event;
use rbee_wire::hive::{Download, ProcessState};
use rbee_wire::job::ModelImport;
use rbee_wire::view::{StoredFile, StoredView};
use rbee_wire::{ErrorBody, ErrorCode, HiveId, ModelRef, WorkerId};
use tokio::sync::watch;

/// Time between two looks at the store for what other programs have put there.
const LOOK: Duration = Duration::from_secs(30);

/// Models of the store that a heartbeat names at most.
const MAX_NAMED: usize = 1024;

/// A model that is being fetched, for one of its askers.
type Transfer = (ModelRef, watch::Receiver<Progress>);

/// The models of this machine; cheap to clone.
#[derive(Clone)]
pub struct Models {
    store: Store,
    hive_id: HiveId,
    supervisor: Supervisor,
    known: Arc<Mutex<Vec<ModelRef>>>,
    under_way: Arc<Mutex<Vec<Transfer>>>,
}

fn off(error: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(ErrorCode::Internal, format!("looking at the store was cut short: {error}"))
}

/// Takes a transfer off the list of those under way when its asker is done with it.
struct UnderWay<'a>(&'a Models, &'a ModelRef);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut list = self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = list.iter().position(|(model, _)| model == self.1) {
            list.swap_remove(at);
        }
    }
}

impl Models {
    /// The models of a store.
    pub fn new(store: Store, hive_id: HiveId, supervisor: Supervisor) -> Self {
        let models = Self { store, hive_id, supervisor, known: Arc::default(), under_way: Arc::default() };
        models.known.lock().unwrap_or_else(PoisonError::into_inner).push(ModelRef::Tinybee);
        models
    }

    /// Looks at the store now and then, until the program ends.
    pub async fn keep_known(self) {
        loop {
            self.look().await;
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn look(&self) {
        let store = self.store.clone();
        let found = tokio::task::spawn_blocking(move || store.list()).await;
        let found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return tracing::warn!(%error, "the store cannot be read"),
            Err(error) => return tracing::warn!(%error, "the store was not read"),
        };
        let models = found.into_iter().flat_map(|repo| repo.commits).flat_map(|commit| commit.models);
        let mut known: Vec<ModelRef> = models.map(|local| local.model).collect();
        known.sort_unstable();
        known.dedup();
        known.truncate(MAX_NAMED);
        known.insert(0, ModelRef::Tinybee);
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// The models that need no download, as they were last seen.
    pub fn known(&self) -> Vec<ModelRef> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is being fetched.
    pub fn downloads(&self) -> Vec<Download> {
        let list = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let mut downloads: Vec<Download> = Vec::new();
        for (model, progress) in &*list {
            if downloads.iter().all(|known| known.model != *model) {
                let Progress { done, total, bytes_per_s, .. } = *progress.borrow();
                downloads.push(Download { model: model.clone(), done, total, bytes_per_s });
            }
        }
        downloads
    }

    /// The files of a model of the hub: those in the store, fetched if need be. Each step goes to `tell`. Dropping this, or
    /// the token, leaves what is there by then, unless others wait for it.
    ///
    /// # Errors
    /// Why it can be neither found nor fetched.
    pub async fn bring(
        &self,
        model: &ModelRef,
        tell: &(dyn Fn(Event) + Sync),
        stop: &CancellationToken,
    ) -> Result<Local, ErrorBody> {
        if let Some(local) = self.local(model).await? {
            return Ok(local);
        }
        let fetch = self.store.fetch(model);
        let mut progress = fetch.progress();
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).push((model.clone(), progress.clone()));
        let _under_way = UnderWay(self, model);
        let mut finished = std::pin::pin!(fetch.finished_unless(stop));
        let local = loop {
            tokio::select! {
                outcome = &mut finished => break outcome,
                Ok(()) = progress.changed() => {
                    let now = progress.borrow_and_update().clone();
                    tell(told(&now));
                }
            }
        };
        let local = local.map_err(|error| error.body())?;
        tracing::info!(%model, bytes = local.bytes, "the model is in the store");
        self.look().await;
        Ok(local)
    }

    /// A model of the hub, if all its files are in the store.
    ///
    /// # Errors
    /// When its name means several, or the store cannot be read.
    pub async fn local(&self, model: &ModelRef) -> Result<Option<Local>, ErrorBody> {
        let (store, wanted) = (self.store.clone(), model.clone());
        self.blocking(move || store.local(&wanted)).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, ErrorBody> {
        tokio::task::spawn_blocking(work).await.map_err(off)?.map_err(|error| error.body())
    }

    /// The store's models.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn list(&self) -> Result<Vec<StoredView>, ErrorBody> {
        let store = self.store.clone();
        let mut views = Vec::new();
        for repo in self.blocking(move || store.list()).await? {
            let complete = repo.is_complete();
            for commit in &repo.commits {
                views.extend(commit.models.iter().map(|local| self.view(local, commit.last_used)));
            }
            if !complete {
                views.push(StoredView {
                    id: repo.repo,
                    hive_id: self.hive_id.clone(),
                    commit: None,
                    bytes: repo.bytes,
                    complete: false,
                    used_ms: None,
                    path: None,
                    files: Vec::new(),
                    workers: Vec::new(),
                });
            }
        }
        Ok(views)
    }

    fn view(&self, local: &Local, used: Option<SystemTime>) -> StoredView {
        let used = used.and_then(|used| SystemTime::now().duration_since(used).ok());
        StoredView {
            id: local.model.to_string(),
            hive_id: self.hive_id.clone(),
            commit: local.commit.as_ref().map(ToString::to_string),
            bytes: local.bytes,
            complete: true,
            used_ms: used.map(|used| u64::try_from(used.as_millis()).unwrap_or(u64::MAX)),
            path: Some(local.path.display().to_string()),
            files: Vec::new(),
            workers: self.users(&local.model),
        }
    }

    /// The workers that have a model of the same repository loaded, or are to.
    fn users(&self, model: &ModelRef) -> Vec<WorkerId> {
        let same = |other: &ModelRef| match (model, other) {
            (ModelRef::Hub { repo, .. }, ModelRef::Hub { repo: other, .. }) => repo == other,
            _ => model == other,
        };
        let list = self.supervisor.list().into_iter();
        list.filter(|process| process.state != ProcessState::Exited && same(&process.model))
            .map(|process| process.worker_id)
            .collect()
    }

    /// One model of the store, with its files.
    ///
    /// # Errors
    /// `MODEL_NOT_FOUND` with those there are.
    pub async fn get(&self, id: &str) -> Result<StoredView, ErrorBody> {
        let model = self.named(id)?;
        if let Some(local) = self.local(&model).await? {
            let files = local.files.iter().map(|file| StoredFile { name: file.path.clone(), bytes: file.bytes });
            return Ok(StoredView { files: files.collect(), ..self.view(&local, None) });
        }
        self.unfinished(&model).await
    }

    /// What there is of a model that is not complete.
    async fn unfinished(&self, model: &ModelRef) -> Result<StoredView, ErrorBody> {
        let all = self.list().await?;
        let id = model.to_string();
        let names: Vec<&str> = all.iter().map(|view| view.id.as_str()).collect();
        let there = if names.is_empty() { "nothing".into() } else { names.join(", ") };
        let missing = ErrorBody::new(ErrorCode::ModelNotFound, format!("{id} is not in the store; it has {there}"))
            .with_hint("`rbee model list` shows the store, `rbee model download REF` fetches a model");
        all.into_iter().find(|view| view.id == id).ok_or(missing)
    }

    fn named(&self, id: &str) -> Result<ModelRef, ErrorBody> {
        match id.parse() {
            Ok(model @ ModelRef::Hub { .. }) => Ok(model),
            Ok(other) => Err(ErrorBody::new(ErrorCode::ModelNotFound, format!("{other} is not a model of the store"))
                .with_hint("`rbee model list` shows the store")),
            Err(error) => Err(ErrorBody::new(ErrorCode::ModelNotFound, format!("no model is named so: {error}"))),
        }
    }

    /// Removes a model from the store; gives what it was, with the bytes that became free.
    ///
    /// # Errors
    /// `MODEL_IN_USE`, `MODEL_NOT_FOUND`, or what the disk says.
    pub async fn delete(&self, id: &str) -> Result<StoredView, ErrorBody> {
        let model = self.named(id)?;
        let users = self.users(&model);
        if !users.is_empty() {
            let names: Vec<&str> = users.iter().map(WorkerId::as_str).collect();
            let message = format!("{id} is in use by {}", names.join(", "));
            return Err(ErrorBody::new(ErrorCode::ModelInUse, message));
        }
        let view = match self.local(&model).await {
            Ok(Some(local)) => self.view(&local, None),
            _ => self.unfinished(&model).await?,
        };
        let store = self.store.clone();
        let freed = self.blocking(move || store.delete(&model)).await?;
        tracing::info!(id, freed, "removed from the store");
        self.look().await;
        Ok(StoredView { bytes: freed, ..view })
    }

    /// Copies files of this machine into the store.
    ///
    /// # Errors
    /// When they are no model, or the disk has no room.
    pub async fn import(&self, import: &ModelImport) -> Result<StoredView, ErrorBody> {
        let ModelRef::Path(path) = &import.model else {
            let message = format!("{} is not a path to a folder or a .gguf file", import.model);
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
        };
        let Ok(ModelRef::Hub { repo, revision: None, file: None }) = import.id.parse() else {
            let message = "a model of the store is named `org/name`";
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
        };
        let (store, path) = (self.store.clone(), PathBuf::from(path));
        let local = self.blocking(move || store.import(&path, &repo)).await?;
        self.look().await;
        Ok(self.view(&local, None))
    }

    /// A model that is now in the store, as an answer.
    pub fn answer(&self, local: &Local) -> StoredView {
        self.view(local, None)
    }
}

/// A step of a transfer as an event.
fn told(progress: &Progress) -> Event {
    let detail = match progress.stage {
        Stage::Waiting => Some("waits for other downloads".to_owned()),
        Stage::Listing => Some("asks the hub for its files".into()),
        Stage::Checking => Some("checks what is there already".into()),
        Stage::Elsewhere => Some("another program fetches it".into()),
        Stage::Downloading | Stage::Done => {
            let rate = progress.bytes_per_s as f64 / 1e6;
            progress.file.as_ref().map(|file| format!("{file} at {rate:.1} MB/s"))
        }
    };
    Event::Progress {
        stage: "download".into(),
        done: progress.done,
        total: progress.total,
        unit: "bytes".into(),
        eta_ms: progress.eta.map(|eta| u64::try_from(eta.as_millis()).unwrap_or(u64::MAX)),
        detail,
    }
}
