//! Captured output of a worker: one bounded file on disk, the last bytes in memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// Bytes of one log file; it is renamed to `.1` when full.
const MAX_FILE: u64 = 1 << 20;

/// Bytes of output kept in memory for the report of an exit.
const TAIL: usize = 4 << 10;

/// Where a worker's output goes.
#[derive(Clone)]
pub struct Capture {
    inner: Arc<Mutex<Inner>>,
    /// How many outputs are being followed.
    open: watch::Sender<usize>,
}

struct Inner {
    path: PathBuf,
    file: Option<File>,
    written: u64,
    tail: Vec<u8>,
}

impl Capture {
    /// Appends to this file. A file that cannot be written costs the log and nothing else.
    pub fn new(path: &Path) -> Self {
        let file = open(path).ok();
        let written = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |meta| meta.len());
        let inner = Inner { path: path.to_owned(), file, written, tail: Vec::new() };
        Self { inner: Arc::new(Mutex::new(inner)), open: watch::channel(0).0 }
    }

    /// Copies what comes from this descriptor until its end, on a thread of its own.
    pub fn follow(&self, from: OwnedFd) {
        let capture = self.clone();
        self.open.send_modify(|open| *open += 1);
        let thread = std::thread::Builder::new().name("capture".into()).spawn(move || {
            let mut from = File::from(from);
            let mut buffer = [0u8; 8192];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                capture.write(&buffer[..count]);
            }
            capture.open.send_modify(|open| *open -= 1);
        });
        if let Err(error) = thread {
            self.open.send_modify(|open| *open -= 1);
            tracing::warn!(%error, "a worker's output is not captured");
        }
    }

    /// Waits until all that is followed has ended, or the limit is over.
    pub async fn drained(&self, limit: Duration) {
        let mut open = self.open.subscribe();
        let _ = tokio::time::timeout(limit, open.wait_for(|open| *open == 0)).await;
    }

    fn write(&self, bytes: &[u8]) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.tail.extend_from_slice(bytes);
        let excess = inner.tail.len().saturating_sub(TAIL);
        inner.tail.drain(..excess);
        if inner.written >= MAX_FILE {
            let old = inner.path.with_extension("log.1");
            let _ = std::fs::rename(&inner.path, old);
            inner.file = open(&inner.path).ok();
            inner.written = 0;
        }
        if let Some(file) = &mut inner.file
            && file.write_all(bytes).is_ok()
        {
            inner.written += bytes.len() as u64;
        }
    }

    /// The last output, control characters escaped; at most 4 KiB of text.
    pub fn tail(&self) -> String {
        let text = escaped(&self.inner.lock().unwrap_or_else(PoisonError::into_inner).tail);
        // What is escaped is longer than what was written.
        let mut start = text.len().saturating_sub(TAIL);
        while !text.is_char_boundary(start) {
            start += 1;
        }
        text[start..].to_owned()
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Text with its control characters escaped, line ends and tabs kept.
pub fn escaped(bytes: &[u8]) -> String {
    let mut out = String::new();
    for c in String::from_utf8_lossy(bytes).chars() {
        if c.is_control() && c != '\n' && c != '\t' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// The last `max` bytes of a file, control characters escaped; empty when it is not there.
///
/// # Errors
/// When it is there and cannot be read.
pub fn tail_of(path: &Path, max: u64) -> io::Result<String> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(max)))?;
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes)?;
    Ok(escaped(&bytes))
}
