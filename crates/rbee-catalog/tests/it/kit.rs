//! What every test here starts with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rbee_catalog::{Error, Local, Options, SharedError, Store, Url};
use rbee_testkit::hub::Hub;
use rbee_wire::ModelRef;

/// A hub, and an empty cache to fill from it.
pub(crate) struct Place {
    pub(crate) hub: Hub,
    pub(crate) folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::seeded(1)
    }

    pub(crate) fn seeded(seed: u64) -> Self {
        Self { hub: Hub::seeded(seed), folder: tempfile::tempdir().unwrap() }
    }

    /// With the cache in memory, where a sync costs nothing; on disk where the system has no such place.
    pub(crate) fn in_memory(seed: u64) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self { hub: Hub::seeded(seed), folder }
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    /// Options with waits that a test can afford.
    pub(crate) fn options(&self) -> Options {
        let mut options = Options::new(self.cache(), &self.hub.url).unwrap();
        options.trusted_origins = vec![Url::parse(&self.hub.cdn).unwrap()];
        options.backoff = Duration::from_millis(5);
        options.reserve = 0;
        options
    }

    pub(crate) fn store(&self) -> Store {
        Store::new(self.options())
    }

    pub(crate) fn repo_folder(&self) -> PathBuf {
        self.cache().join("models--org--name")
    }
}

pub(crate) fn model(text: &str) -> ModelRef {
    text.parse().unwrap()
}

/// Fetches on a runtime of its own.
pub(crate) fn fetch(store: &Store, name: &str) -> Result<Local, SharedError> {
    runtime().block_on(async { store.fetch(&model(name)).finished().await })
}

pub(crate) fn refused(store: &Store, name: &str) -> SharedError {
    match fetch(store, name) {
        Err(error) => error,
        Ok(local) => panic!("{name} was fetched: {local:?}"),
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Every path below a folder, links not followed, without what only the product itself reads.
pub(crate) fn all_below(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(root).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The whole chain of causes.
pub(crate) fn told(error: &Error) -> String {
    error.body().message
}
