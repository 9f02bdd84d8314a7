//! Lives of the hive and of its workers: one counter on disk that every start raises.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rbee_service::random_hex;
use rbee_wire::Incarnation;

/// Gives out incarnations; each is higher than all before it, over restarts too.
pub struct Incarnations {
    path: PathBuf,
    last: Mutex<u64>,
}

impl Incarnations {
    /// Goes on from the counter in this file.
    pub fn open(path: &Path) -> Self {
        let last = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        Self { path: path.to_owned(), last: Mutex::new(last) }
    }

    /// The next life.
    pub fn next(&self) -> Incarnation {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last += 1;
        if let Err(error) = self.save(*last) {
            // The random part still tells lives apart; only their order over a restart of the hive is lost.
            tracing::warn!(%error, "the counter of lives cannot be written");
        }
        Incarnation { counter: *last, random: random_hex(16) }
    }

    fn save(&self, counter: u64) -> io::Result<()> {
        let aside = self.path.with_extension("new");
        let mut file = std::fs::File::create(&aside)?;
        file.write_all(counter.to_string().as_bytes())?;
        std::fs::rename(&aside, &self.path)
    }
}
