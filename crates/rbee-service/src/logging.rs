//! Where a daemon writes: one line a record, bounded files, no colour, no prompt text.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// A log file that is renamed to `.1` when it is full, so that at most twice its bound is kept.
#[derive(Clone, Debug)]
pub struct LogFile(Arc<Mutex<Rotating>>);

#[derive(Debug)]
struct Rotating {
    path: PathBuf,
    file: File,
    written: u64,
    max: u64,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

impl LogFile {
    /// Opens a file to append to, of at most `max` bytes.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path, max: u64) -> io::Result<Self> {
        let file = open(path)?;
        let written = file.metadata()?.len();
        Ok(Self(Arc::new(Mutex::new(Rotating { path: path.to_owned(), file, written, max }))))
    }
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if log.written >= log.max {
            let old = log.path.with_extension("log.1");
            std::fs::rename(&log.path, old)?;
            log.file = open(&log.path)?;
            log.written = 0;
        }
        log.file.write_all(bytes)?;
        log.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Sends the records of this process to the file, or to stderr without one, and panics with them.
///
/// # Errors
/// When `filter` is no filter, or logging was set up before.
pub fn init(filter: &str, file: Option<LogFile>) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("`{filter}` is no log filter: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_target(false);
    let done = match file {
        Some(file) => builder.with_writer(file).try_init(),
        None => builder.with_writer(io::stderr).try_init(),
    };
    done.map_err(|error| error.to_string())?;
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("(no text)");
        tracing::error!(place, text, "panic");
        before(panic);
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_never_outgrows_twice_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queen.log");
        let mut log = LogFile::open(&path, 100).unwrap();
        for i in 0..100 {
            writeln!(log, "line {i:04}").unwrap();
        }
        drop(log);
        let sizes: Vec<u64> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|&size| size <= 110), "{sizes:?}");
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("line 0099\n"));
    }
}
