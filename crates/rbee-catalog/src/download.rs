//! One file of a repository into its blob.
//!
//! A loop owns the pieces and starts at most [`CONNECTIONS`] tasks, each of which fetches one. Their bytes go through one
//! bounded channel to the thread that owns the [`Part`]. Dropping the future ends the tasks, thereby the channel, thereby
//! the thread, which leaves a part that the next transfer goes on with.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, Url};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::error::Error;
use crate::http::{Fetcher, Pace, TRIES, Trouble};
use crate::hub::{self, Remote};
use crate::layout::Repo;
use crate::lock::{self, Lock};
use crate::names::{Commit, shown};
use crate::part::{self, Gauge, Part, Verdict};
use crate::progress::{Meter, Stage};
use crate::ranges::Ranges;

/// Most connections for one file.
const CONNECTIONS: usize = 4;

/// Bytes that one request asks for.
const PIECE: u64 = 16 << 20;

/// Bytes of the first request, which shows whether the server honours ranges.
const FIRST: u64 = 1 << 20;

/// How far beyond the first missing byte pieces are begun: what is read back to be hashed is still in memory then.
const AHEAD: u64 = 8 * PIECE;

/// Chunks between the connections and the writing thread, each of at most some 400 KiB. When it is full the connections
/// are not read, and the servers wait.
const CHUNKS: usize = 32;

/// New bytes that show a server to be of use, so that failures before them are forgotten.
const PROGRESS: u64 = 64 << 10;

/// Time between two looks at a lock that another process holds.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a download needs to know.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) fetcher: Fetcher,
    pub(crate) repo: Repo,
    pub(crate) commit: Commit,
    pub(crate) file: Remote,
    pub(crate) meter: Arc<Meter>,
}

/// A piece of the file's bytes that a connection is asked to fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
}

/// How a connection ended.
struct Ended {
    piece: Piece,
    /// Up to where its bytes came.
    reached: u64,
    why: Why,
}

enum Why {
    /// With all its bytes.
    Whole,
    /// The server sends the whole file whatever it is asked for.
    IgnoresRange,
    /// The writing thread is gone.
    NoWriter,
    Trouble(Trouble),
}

/// Sees to it that the file's blob is there.
///
/// # Errors
/// [`Error::Checksum`], [`Error::Stalled`], [`Error::DiskFull`], and those of requests and files.
pub(crate) async fn fetch(job: Arc<Job>) -> Result<(), Error> {
    let size = job.file.size;
    let blob = job.repo.blob(job.file.digest.hex());
    // A blob of another length is damaged; the new one takes its place.
    let is_there = || blob.symlink_metadata().is_ok_and(|facts| facts.is_file() && facts.len() == size);
    if is_there() {
        return Ok(());
    }
    let lock = acquire(&job, &is_there).await?;
    let Some(lock) = lock else { return Ok(()) };
    let lock = Arc::new(lock);
    let mut wrong = None;
    // Wrong bytes may be those of a bad part or a bad moment: one more time from the beginning.
    for _ in 0..2 {
        match attempt(&job, &blob, Arc::clone(&lock)).await? {
            Verdict::Blob => return Ok(()),
            Verdict::Wrong { got } => wrong = Some(got),
        }
    }
    let wanted = job.file.digest.hex().to_owned();
    Err(Error::Checksum { file: job.file.path.clone(), wanted, got: wrong.unwrap_or_default() })
}

/// Waits for the blob's lock; `None` when another process has made the blob meanwhile.
async fn acquire(job: &Job, is_there: &impl Fn() -> bool) -> Result<Option<Lock>, Error> {
    let hex = job.file.digest.hex();
    let path = lock::path(&job.repo.locks, hex);
    let mut looks = 0u32;
    loop {
        if let Some(lock) = lock::take(&path)? {
            return Ok((!is_there()).then_some(lock));
        }
        if is_there() {
            return Ok(None);
        }
        if looks.is_multiple_of(10) {
            job.meter.stage(Stage::Elsewhere);
            let gauge = Gauge::default();
            gauge.done.store(part::noted(&job.repo.blobs(), hex, job.file.size), Ordering::Relaxed);
            job.meter.file(&job.file.path, Arc::new(gauge));
        }
        looks += 1;
        sleep(LOOK_EVERY).await;
    }
}

/// Stops the writing thread's slow work when nobody waits for it any more.
struct StopOnDrop(Arc<Gauge>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

/// Fetches what is missing and makes it the blob.
async fn attempt(job: &Arc<Job>, blob: &std::path::Path, lock: Arc<Lock>) -> Result<Verdict, Error> {
    let gauge = Arc::new(Gauge::default());
    let _stop = StopOnDrop(Arc::clone(&gauge));
    job.meter.file(&job.file.path, Arc::clone(&gauge));
    job.meter.stage(Stage::Checking);
    let (blobs, digest, size) = (job.repo.blobs(), job.file.digest.clone(), job.file.size);
    let opening = Arc::clone(&gauge);
    let held = Arc::clone(&lock);
    let opened = blocking(move || {
        let _held = held;
        Part::open(&blobs, &digest, size, opening)
    });
    let part = opened.await?;
    job.meter.stage(Stage::Downloading);
    let have = part.have().clone();
    let (chunks, mut queue) = mpsc::channel::<(u64, Bytes)>(CHUNKS);
    let blob = blob.to_owned();
    let writing = tokio::task::spawn_blocking(move || {
        let _lock = lock;
        let mut part = part;
        while let Some((offset, bytes)) = queue.blocking_recv() {
            part.write(offset, &bytes)?;
        }
        // All connections have ended: with the last byte, or before it.
        if part.have().total() == size { part.finish(&blob).map(Some) } else { part.leave().map(|()| None) }
    });
    let fetched = pieces(job, have, chunks, &gauge).await;
    let written = writing.await.map_err(|_| Error::Lost)?;
    // What the disk said explains why the connections ended.
    let verdict = written?;
    fetched?;
    verdict.ok_or(Error::Lost)
}

/// Runs a blocking operation.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Lost)?
}

/// The pieces of one attempt: what is fetched or being fetched, and how it goes.
struct Pieces {
    size: u64,
    /// Bytes that came, or are asked for.
    taken: Ranges,
    /// Bytes that came.
    came: Ranges,
    ranged: Ranged,
    /// Failures since there was progress, and the bytes there were then.
    failures: u32,
    since: u64,
    /// When that was.
    last: Instant,
}

/// Whether the server sends the part of a file that it is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ranged {
    Unknown,
    Yes,
    No,
}

impl Pieces {
    fn new(size: u64, have: Ranges) -> Self {
        let since = have.total();
        let last = Instant::now();
        Self { size, taken: have.clone(), came: have, ranged: Ranged::Unknown, failures: 0, since, last }
    }

    fn is_whole(&self) -> bool {
        self.came.total() == self.size
    }

    /// The next piece to ask for, if there is one near enough to the first missing byte.
    fn next(&mut self, frontier: u64) -> Option<Piece> {
        let (start, end) = match self.ranged {
            Ranged::No => (0, self.size),
            Ranged::Unknown => self.taken.gap(0, self.size, FIRST)?,
            Ranged::Yes => self.taken.gap(0, self.size, PIECE)?,
        };
        if self.is_whole() || start > frontier.saturating_add(AHEAD) {
            return None;
        }
        self.taken.insert(start, end);
        Some(Piece { start, end })
    }

    fn connections(&self) -> usize {
        if self.ranged == Ranged::Yes { CONNECTIONS } else { 1 }
    }

    /// Notes what came of a piece, and gives back the rest.
    fn ended(&mut self, piece: Piece, reached: u64) {
        self.came.insert(piece.start, reached);
        self.taken.remove(reached, piece.end);
        for (start, end) in self.came.clone().iter() {
            self.taken.insert(start, end);
        }
        if self.is_whole() || self.came.total() >= self.since + PROGRESS {
            (self.failures, self.since, self.last) = (0, self.came.total(), Instant::now());
        }
    }

    /// Decides whether a trouble may pass.
    fn forgive(&mut self, job: &Job, trouble: &Trouble) -> bool {
        if matches!(trouble, Trouble::Stalled) {
            // One connection may stall; a file may not.
            return self.last.elapsed() < job.fetcher.options.stall_timeout;
        }
        self.failures += 1;
        trouble.may_pass() && self.failures < TRIES
    }
}

/// Fetches all missing pieces.
async fn pieces(job: &Arc<Job>, have: Ranges, chunks: mpsc::Sender<(u64, Bytes)>, gauge: &Gauge) -> Result<(), Error> {
    let mut state = Pieces::new(job.file.size, have);
    let address = hub::file_address(&job.fetcher, &job.repo.name, &job.commit, &job.file.path)?;
    let place = Arc::new(Place { address, found: Mutex::new(None) });
    let mut running: JoinSet<Ended> = JoinSet::new();
    let mut pause = None;
    while !state.is_whole() {
        while running.len() < state.connections()
            && let Some(piece) = state.next(gauge.frontier.load(Ordering::Relaxed))
        {
            let call = Call { job: Arc::clone(job), place: Arc::clone(&place), piece, ranged: state.ranged };
            running.spawn(call.run(chunks.clone(), pause.take()));
        }
        let ended = match running.join_next().await {
            // The next piece is too far ahead of the writing thread, which is on its way.
            None => {
                sleep(Duration::from_millis(1)).await;
                continue;
            }
            Some(ended) => ended.map_err(|_| Error::Lost)?,
        };
        state.ended(ended.piece, ended.reached);
        match ended.why {
            Why::Whole if state.ranged == Ranged::Unknown => state.ranged = Ranged::Yes,
            Why::Whole => {}
            Why::NoWriter => return Err(Error::Lost),
            Why::IgnoresRange => {
                running.shutdown().await;
                state.ranged = Ranged::No;
            }
            Why::Trouble(trouble) if state.forgive(job, &trouble) => {
                pause = Some(job.fetcher.pause(state.failures.max(1), &trouble));
                tracing::debug!(file = job.file.path, failures = state.failures, ?trouble, "a connection failed");
            }
            Why::Trouble(trouble) => {
                let (tries, file) = (state.failures, &job.file.path);
                return Err(match trouble {
                    Trouble::Status { status: 401 | 403 | 404, .. } => {
                        hub::refusal(&job.fetcher, &job.repo.name, Some(job.commit.as_str()), file, trouble)
                    }
                    other => job.fetcher.error(file, other, tries, (state.came.total(), state.size)),
                });
            }
        }
    }
    Ok(())
}

/// Where a file is.
struct Place {
    address: Url,
    /// Where the hub redirects to, for as long as that works.
    found: Mutex<Option<Url>>,
}

impl Place {
    fn found(&self) -> std::sync::MutexGuard<'_, Option<Url>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request for one piece.
struct Call {
    job: Arc<Job>,
    place: Arc<Place>,
    piece: Piece,
    ranged: Ranged,
}

impl Call {
    async fn run(self, chunks: mpsc::Sender<(u64, Bytes)>, pause: Option<Duration>) -> Ended {
        if let Some(pause) = pause {
            sleep(pause).await;
        }
        let mut reached = self.piece.start;
        let why = self.bytes(&chunks, &mut reached).await.err().unwrap_or(Why::Whole);
        if matches!(why, Why::Trouble(_)) {
            self.place.found().take();
        }
        Ended { piece: self.piece, reached, why }
    }

    async fn bytes(&self, chunks: &mpsc::Sender<(u64, Bytes)>, reached: &mut u64) -> Result<(), Why> {
        let mut response = self.open().await?;
        let mut pace = Pace::new(self.job.fetcher.options.stall_timeout);
        while *reached < self.piece.end {
            let chunk = pace.next(&mut response).await.map_err(Why::Trouble)?;
            let mut chunk = chunk.ok_or(Why::Trouble(Trouble::Short))?;
            // More than was asked for is nobody's.
            chunk.truncate(usize::try_from(self.piece.end - *reached).unwrap_or(usize::MAX));
            let (length, began) = (chunk.len() as u64, Instant::now());
            chunks.send((*reached, chunk)).await.map_err(|_| Why::NoWriter)?;
            pace.forgive(began.elapsed());
            *reached += length;
        }
        Ok(())
    }

    /// An answer whose body begins with the piece's first byte.
    async fn open(&self) -> Result<Response, Why> {
        let Piece { start, end } = self.piece;
        let range = (self.ranged != Ranged::No).then(|| (start, end - 1));
        let before = self.place.found().clone();
        let response = match before {
            Some(found) => match self.job.fetcher.get(&found, range).await {
                // The address that was redirected to has had its time.
                Err(Trouble::Status { status: 400..=407 | 410, .. }) => self.ask(range).await?,
                answer => answer.map_err(Why::Trouble)?.0,
            },
            None => self.ask(range).await?,
        };
        match response.status().as_u16() {
            206 if range.is_some() => {
                let got = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let want = format!("bytes {start}-{}/{}", end - 1, self.job.file.size);
                if got.is_none_or(|got| got.trim() != want) {
                    let problem = format!("asked for `{want}` it sends `{}`", shown(got.unwrap_or_default()));
                    return Err(Why::Trouble(Trouble::Final(self.job.fetcher.bad("a part of a file", &problem))));
                }
                Ok(response)
            }
            200 if range.is_none() || (start, end) == (0, self.job.file.size) => Ok(response),
            200 => Err(Why::IgnoresRange),
            status => Err(Why::Trouble(Trouble::Status { status, code: None, retry_after: None })),
        }
    }

    async fn ask(&self, range: Option<(u64, u64)>) -> Result<Response, Why> {
        let (response, found) = self.job.fetcher.get(&self.place.address, range).await.map_err(Why::Trouble)?;
        *self.place.found() = Some(found);
        Ok(response)
    }
}
