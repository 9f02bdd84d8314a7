//! The control pipe: one socketpair per worker, JSON lines both ways. Its end ends the worker.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rbee_wire::worker::{ControlDown, ControlUp, WorkerCharge};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

use crate::unix::{CONTROL_FD, adopt, is_socket};

/// Longest line, in bytes.
const MAX_LINE: usize = 256 << 10;

/// The hive's end.
pub struct HiveEnd {
    reader: tokio::io::BufReader<tokio::net::unix::OwnedReadHalf>,
    writer: tokio::net::unix::OwnedWriteHalf,
    line: Vec<u8>,
}

impl HiveEnd {
    /// A pair: the hive's end, and the socket that the worker inherits.
    ///
    /// # Errors
    /// The system's, when no more descriptors are to be had.
    pub fn pair() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (reader, writer) = tokio::net::UnixStream::from_std(ours)?.into_split();
        Ok((Self { reader: tokio::io::BufReader::new(reader), writer, line: Vec::new() }, theirs))
    }

    /// Sends a line down.
    ///
    /// # Errors
    /// When the worker is gone or does not read.
    pub async fn send(&mut self, line: &ControlDown) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        let limit = std::time::Duration::from_secs(1);
        tokio::time::timeout(limit, self.writer.write_all(&bytes)).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    /// The next line from the worker; `None` at the pipe's end. Cancel safe.
    ///
    /// # Errors
    /// When a line is too long or not of the protocol.
    pub async fn next(&mut self) -> io::Result<Option<ControlUp>> {
        loop {
            let available = self.reader.fill_buf().await?;
            if available.is_empty() {
                return Ok(None);
            }
            let (used, whole) = match available.iter().position(|&b| b == b'\n') {
                Some(end) => (end + 1, true),
                None => (available.len(), false),
            };
            self.line.extend_from_slice(&available[..used]);
            self.reader.consume(used);
            if self.line.len() > MAX_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a control line is too long"));
            }
            if whole {
                let line = serde_json::from_slice(&self.line);
                self.line.clear();
                return line.map(Some).map_err(io::Error::from);
            }
        }
    }
}

/// The worker's end.
pub struct WorkerEnd {
    reader: Mutex<Option<BufReader<UnixStream>>>,
    writer: Mutex<UnixStream>,
}

impl WorkerEnd {
    /// The end that this process was started with; `None` when it was started by hand.
    ///
    /// # Errors
    /// When the environment names a descriptor that is no socket.
    pub fn take_inherited() -> io::Result<Option<Self>> {
        let Ok(text) = std::env::var(CONTROL_FD) else { return Ok(None) };
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{CONTROL_FD} names no control pipe"));
        let fd = adopt(text.parse().map_err(|_| invalid())?)?;
        if !is_socket(&fd) {
            return Err(invalid());
        }
        Self::over(UnixStream::from(fd)).map(Some)
    }

    /// An end over this socket.
    ///
    /// # Errors
    /// The system's.
    pub fn over(socket: UnixStream) -> io::Result<Self> {
        // A hive that does not read must not hold the worker up.
        socket.set_write_timeout(Some(std::time::Duration::from_millis(200)))?;
        let reader = BufReader::new(socket.try_clone()?);
        Ok(Self { reader: Mutex::new(Some(reader)), writer: Mutex::new(socket) })
    }

    /// Waits for the charge, the first line. Call it before [`WorkerEnd::listen`].
    ///
    /// # Errors
    /// When the pipe ends first, or something else comes.
    pub fn charge(&mut self) -> io::Result<WorkerCharge> {
        let reader = self.reader.get_mut().unwrap_or_else(PoisonError::into_inner);
        match reader.as_mut().map(read_line) {
            Some(Ok(Some(ControlDown::Charge(charge)))) => Ok(*charge),
            Some(Err(error)) => Err(error),
            _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the hive gave no charge")),
        }
    }

    /// Follows the pipe on a thread of its own: `each` line, then `end` once when the pipe does.
    pub fn listen(&self, each: impl Fn(ControlDown) + Send + 'static, end: impl FnOnce() + Send + 'static) {
        let Some(mut reader) = self.reader.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
            while let Ok(Some(line)) = read_line(&mut reader) {
                each(line);
            }
            end();
        });
        if let Err(error) = thread {
            tracing::error!(%error, "nobody watches the control pipe: the worker ends");
            std::process::exit(1);
        }
    }

    /// Sends a line up. A pipe that has ended is noticed by the listening thread.
    pub fn send(&self, line: &ControlUp) {
        let Ok(mut bytes) = serde_json::to_vec(line) else { return };
        bytes.push(b'\n');
        let _ = self.writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(&bytes);
    }
}

fn read_line(reader: &mut BufReader<UnixStream>) -> io::Result<Option<ControlDown>> {
    let mut line = Vec::new();
    let read = reader.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(io::Error::from)
}
