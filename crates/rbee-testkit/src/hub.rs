//! A model hub on loopback, with a second server that large files are redirected to.
//!
//! It speaks what the product and the hub's own Python tools ask for, counts what it sends, remembers who showed which
//! token, and misbehaves as it is told, file by file. `HF_ENDPOINT` set to [`Hub::url`] makes any program use it;
//! that its large files come from another origin needs [`Hub::cdn`] among the trusted ones.

mod serve;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Name under which faults of the answers about a revision are kept.
pub const REVISION: &str = "@revision";

/// Name under which faults of the list of files are kept.
pub const TREE: &str = "@tree";

/// What a server does wrong with one file, or with an answer of the API.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Breaks the connection after so many bytes of a body, so many times.
    Cut {
        /// Bytes that are still sent.
        after: u64,
        /// How often; then no more.
        times: u32,
    },
    /// Breaks the connection after a random number of bytes below `within`, so many times.
    CutSomewhere {
        /// Bound of the bytes that are still sent.
        within: u64,
        /// How often; then no more.
        times: u32,
    },
    /// Sends the whole file with status 200 whatever part is asked for.
    IgnoreRange,
    /// Sends this instead of its own `ETag`.
    ETag(String),
    /// Sends this instead of its own `X-Repo-Commit`.
    CommitHeader(String),
    /// Sends other bytes of the same number, so many times.
    WrongBytes {
        /// How often; then no more.
        times: u32,
    },
    /// Ends the body, in order, after half of it.
    Short,
    /// Redirects here.
    Redirect(String),
    /// Redirects to itself.
    RedirectLoop,
    /// Sends so many bytes and then nothing, and keeps the connection.
    Stall {
        /// Bytes that are still sent.
        after: u64,
    },
    /// Sends one byte a second.
    Drip,
    /// Answers with this status, so many times.
    Status {
        /// The status.
        status: u16,
        /// `Retry-After`, in seconds.
        retry_after: Option<u64>,
        /// How often; then no more.
        times: u32,
    },
    /// Answers with 64 MiB of zeros, compressed.
    GzipBomb,
    /// Lists so many files more.
    ManyFiles(usize),
    /// Answers with this body.
    Body(String),
    /// Sends signed addresses that are good for so many requests.
    Expire {
        /// Requests.
        uses: u32,
    },
}

/// Who may read a repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    #[default]
    Public,
    /// Who has this token; for others it does not exist.
    Private(String),
    /// Everybody may list it, who has this token may read it.
    Gated(String),
}

/// A file of a repository.
#[derive(Clone, Debug)]
pub(crate) struct HubFile {
    pub(crate) bytes: Bytes,
    pub(crate) sha256: String,
    pub(crate) git: String,
    pub(crate) lfs: bool,
}

impl HubFile {
    fn new(bytes: Bytes, lfs: bool) -> Self {
        let sha256 = if lfs { hex(&Sha256::digest(&bytes)) } else { String::new() };
        Self { git: git_blob(&bytes), sha256, bytes, lfs }
    }

    /// What names its blob.
    pub(crate) fn etag(&self) -> &str {
        if self.lfs { &self.sha256 } else { &self.git }
    }
}

/// A repository as a test makes it.
#[derive(Clone, Debug, Default)]
pub struct HubRepo {
    files: BTreeMap<String, HubFile>,
    access: Access,
}

impl HubRepo {
    /// One without files.
    pub fn new() -> Self {
        Self::default()
    }

    /// With a file that is in the repository itself.
    #[must_use]
    pub fn file(mut self, path: &str, bytes: impl Into<Bytes>) -> Self {
        self.files.insert(path.to_owned(), HubFile::new(bytes.into(), false));
        self
    }

    /// With a file in large-file storage.
    #[must_use]
    pub fn lfs(mut self, path: &str, bytes: impl Into<Bytes>) -> Self {
        self.files.insert(path.to_owned(), HubFile::new(bytes.into(), true));
        self
    }

    /// With what a small model has beside its weights, and weights of so many random bytes.
    #[must_use]
    pub fn model(self, seed: u64, bytes: usize) -> Self {
        self.file("config.json", "{\"model_type\":\"llama\"}")
            .file("tokenizer.json", "{\"version\":\"1.0\"}")
            .file("README.md", "not needed")
            .lfs("model.safetensors", noise(seed, bytes))
            .lfs("pytorch_model.bin", noise(seed + 1, 1000))
    }

    /// Readable for some only.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }
}

/// What one server did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests.
    pub requests: u64,
    /// Requests for files, or parts of them.
    pub downloads: u64,
    /// Bytes of files that were sent.
    pub bytes: u64,
    /// What each request showed as `Authorization`.
    pub authorizations: Vec<Option<String>>,
    /// Method and path of each request.
    pub paths: Vec<String>,
}

/// Which of the two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Server {
    /// The API and small files.
    Hub,
    /// Large files.
    Cdn,
}

#[derive(Debug, Default)]
pub(crate) struct Repository {
    pub(crate) access: Access,
    pub(crate) revisions: HashMap<String, String>,
    pub(crate) commits: HashMap<String, BTreeMap<String, HubFile>>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) repos: HashMap<String, Repository>,
    pub(crate) faults: HashMap<(String, String), Vec<Fault>>,
    pub(crate) counts: HashMap<Server, Count>,
    pub(crate) uses: HashMap<String, u32>,
    pub(crate) page: usize,
    pub(crate) signatures: u64,
    random: u64,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) pace: serve::Rate,
    pub(crate) hub: String,
    pub(crate) cdn: String,
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A number below `bound` that only the seed decides.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.random = next(self.random);
        self.random % bound.max(1)
    }
}

/// The hub while it runs.
#[derive(Debug)]
pub struct Hub {
    /// Its address, without a slash at the end.
    pub url: String,
    /// The address of the server that large files are redirected to.
    pub cdn: String,
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Hub {
    /// Starts both servers on ports of their own.
    ///
    /// # Panics
    /// When the system has no port, or no thread.
    pub fn start() -> Self {
        Self::seeded(1)
    }

    /// As [`Hub::start`], with a seed for what happens at random.
    ///
    /// # Panics
    /// As [`Hub::start`].
    pub fn seeded(seed: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("fake-hub")
            .enable_all()
            .build()
            .expect("a runtime");
        let bind = || std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let (hub, cdn) = (bind(), bind());
        let url = |listener: &std::net::TcpListener| format!("http://{}", listener.local_addr().expect("an address"));
        let shared = Arc::new(Shared {
            state: Mutex::new(State { page: 1000, random: seed ^ 0x9e37_79b9_7f4a_7c15, ..State::default() }),
            pace: serve::Rate::default(),
            hub: url(&hub),
            cdn: url(&cdn),
        });
        for (server, listener) in [(Server::Hub, hub), (Server::Cdn, cdn)] {
            runtime.spawn(serve::accept(server, listener, Arc::clone(&shared)));
        }
        Self { url: shared.hub.clone(), cdn: shared.cdn.clone(), shared, runtime: Some(runtime) }
    }

    /// Puts a repository's files at a branch or tag, which gives a new commit. Earlier commits stay.
    pub fn put(&self, name: &str, revision: &str, repo: HubRepo) -> String {
        let mut text = String::new();
        for (path, file) in &repo.files {
            text.push_str(&format!("{} {path}\n", file.git));
        }
        let commit = hex(&Sha1::digest(text.as_bytes()));
        let mut state = self.shared.state();
        let known = state.repos.entry(name.to_owned()).or_default();
        known.access = repo.access;
        known.revisions.insert(revision.to_owned(), commit.clone());
        known.commits.insert(commit.clone(), repo.files);
        commit
    }

    /// Lets something go wrong with a file, or with [`REVISION`] or [`TREE`].
    pub fn fault(&self, repo: &str, path: &str, fault: Fault) {
        self.shared.state().faults.entry((repo.to_owned(), path.to_owned())).or_default().push(fault);
    }

    /// Lets nothing go wrong any more.
    pub fn heal(&self) {
        self.shared.state().faults.clear();
    }

    /// How many files a page of a listing has.
    pub fn page(&self, files: usize) {
        self.shared.state().page = files;
    }

    /// Sends at most so many bytes of files a second, both servers together; 0: as many as it can.
    pub fn limit(&self, bytes_per_s: u64) {
        self.shared.pace.set(bytes_per_s);
    }

    /// What a server did since the start or [`Hub::forget`].
    pub fn count(&self, server: Server) -> Count {
        self.shared.state().counts.get(&server).cloned().unwrap_or_default()
    }

    /// Bytes of files that both servers sent.
    pub fn bytes(&self) -> u64 {
        self.shared.state().counts.values().map(|count| count.bytes).sum()
    }

    /// Requests that both servers got.
    pub fn requests(&self) -> u64 {
        self.shared.state().counts.values().map(|count| count.requests).sum()
    }

    /// Begins to count anew.
    pub fn forget(&self) {
        self.shared.state().counts.clear();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // Also from within a runtime, where waiting is not allowed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::ZERO);
        }
    }
}

fn next(mut x: u64) -> u64 {
    // xorshift64, which never gives 0 from anything else.
    x = if x == 0 { 1 } else { x };
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

/// Random bytes that only the seed decides.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        x = next(x);
        noise.extend_from_slice(&x.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn git_blob(bytes: &[u8]) -> String {
    let mut sha1 = Sha1::new();
    sha1.update(format!("blob {}\0", bytes.len()));
    sha1.update(bytes);
    hex(&sha1.finalize())
}
