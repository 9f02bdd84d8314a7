//! A blob on its way: `blobs/DIGEST.rbee-part` with the bytes that are there, `blobs/DIGEST.rbee-journal` with which
//! those are, and a digest that follows the first missing byte.
//!
//! The journal says what the disk has: a range is noted after the data were synced, by a thread that does nothing else.
//! Between syncs it also says what the kernel has, with the boot for which that is true: a process that is killed loses
//! next to nothing, a machine that loses its power what was not synced. Neither is believed without the digest. The part
//! becomes the blob by a rename, after the digest was found right and everything synced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use crate::digest::{Digest, Hasher};
use crate::disk;
use crate::error::Error;
use crate::layout;
use crate::ranges::Ranges;

/// Ends of the names of parts and journals.
pub(crate) const PART: &str = ".rbee-part";
const JOURNAL: &str = ".rbee-journal";

/// Longest journal that is read, in bytes: one transfer writes some 2 MiB at most.
const MAX_JOURNAL: u64 = 64 << 20;

/// Bytes that are read back at once.
const READ_BACK: usize = 1 << 20;

/// What is known outside the writing thread.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    /// Bytes that are there.
    pub(crate) done: AtomicU64,
    /// The first byte that is missing.
    pub(crate) frontier: AtomicU64,
    /// Set when nobody waits for the part any more.
    pub(crate) stop: AtomicBool,
}

/// A blob that is being written. One thread owns it.
pub(crate) struct Part {
    file: Arc<File>,
    path: PathBuf,
    journal: PathBuf,
    size: u64,
    digest: Digest,
    hasher: Hasher,
    frontier: u64,
    have: Ranges,
    /// Bytes that are not known to the journal, and how many make it worth a sync.
    unsynced: u64,
    interval: u64,
    /// Bytes that were written and not noted at all.
    fresh: Ranges,
    notes: Notes,
    syncer: Option<Syncer>,
    gauge: Arc<Gauge>,
}

/// How a finished part ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the blob now.
    Blob,
    /// The digest is another one; the part is gone.
    Wrong {
        /// In hexadecimal.
        got: String,
    },
}

impl Part {
    /// Opens the part of a blob, new or as it was left. The caller holds the blob's lock.
    ///
    /// Reads and hashes what is there from the beginning.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::File`], [`Error::RefusedFile`], [`Error::Cancelled`].
    pub(crate) fn open(blobs: &Path, digest: &Digest, size: u64, gauge: Arc<Gauge>) -> Result<Self, Error> {
        disk::make_folder(blobs)?;
        let path = blobs.join(format!("{}{PART}", digest.hex()));
        let journal = blobs.join(format!("{}{JOURNAL}", digest.hex()));
        let nofollow = i32::try_from((rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits()).unwrap_or(0);
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).custom_flags(nofollow).open(&path);
        let file = file.map_err(Error::file("open", &path))?;
        let facts = file.metadata().map_err(Error::file("look at", &path))?;
        if !facts.is_file() {
            return Err(Error::RefusedFile { path, problem: "it is not a regular file" });
        }
        let boot = boot();
        let have = match read_journal(&journal, size, &boot)? {
            Some(have) if facts.len() == size => have,
            _ => {
                fresh(&file, &path, &journal, size)?;
                Ranges::default()
            }
        };
        let notes = Notes::open(&journal, boot).map_err(Error::file("open", &journal))?;
        let mut part = Self {
            file: Arc::new(file),
            path,
            journal,
            size,
            hasher: digest.hasher(size),
            digest: digest.clone(),
            frontier: 0,
            have,
            unsynced: 0,
            interval: (size / 64).clamp(1 << 20, 64 << 20),
            fresh: Ranges::default(),
            notes,
            syncer: None,
            gauge,
        };
        part.gauge.done.store(part.have.total(), Ordering::Relaxed);
        part.advance()?;
        Ok(part)
    }

    /// Which bytes are there.
    pub(crate) fn have(&self) -> &Ranges {
        &self.have
    }

    /// Takes bytes of the file. Positions that are there already keep their bytes, which may be hashed.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::File`]; the part is of no more use.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let end = offset.saturating_add(bytes.len() as u64).min(self.size);
        let mut at = offset;
        while let Some((start, until)) = self.have.gap(at, end, u64::MAX) {
            let (from, to) = ((start - offset) as usize, (until - offset) as usize);
            self.put(start, &bytes[from..to])?;
            at = until;
        }
        // As often as is worth a line.
        if self.fresh.total() >= (self.size / 4096).max(256 << 10) {
            let noted = self.notes.add(&std::mem::take(&mut self.fresh), Grade::Written);
            noted.map_err(|error| self.failed("note", error))?;
        }
        if self.unsynced >= self.interval {
            self.sync_aside()?;
        }
        Ok(())
    }

    fn put(&mut self, start: u64, bytes: &[u8]) -> Result<(), Error> {
        let end = start + bytes.len() as u64;
        self.file.write_all_at(bytes, start).map_err(|error| self.failed("write", error))?;
        self.have.insert(start, end);
        self.fresh.insert(start, end);
        self.unsynced += bytes.len() as u64;
        self.gauge.done.store(self.have.total(), Ordering::Relaxed);
        if start != self.frontier {
            return Ok(());
        }
        self.hasher.update(bytes);
        self.frontier = end;
        self.advance()
    }

    /// Hashes what follows the frontier and came before it.
    fn advance(&mut self) -> Result<(), Error> {
        let end = self.have.end_from(self.frontier);
        if self.frontier < end {
            let mut buffer = vec![0; READ_BACK];
            while self.frontier < end {
                if self.gauge.stop.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let count = usize::try_from(end - self.frontier).unwrap_or(READ_BACK).min(READ_BACK);
                let read = self.file.read_exact_at(&mut buffer[..count], self.frontier);
                read.map_err(Error::file("read", &self.path))?;
                self.hasher.update(&buffer[..count]);
                self.frontier += count as u64;
            }
        }
        self.gauge.frontier.store(self.frontier, Ordering::Relaxed);
        Ok(())
    }

    /// Has what is there synced and noted, unless that is still under way.
    fn sync_aside(&mut self) -> Result<(), Error> {
        if self.syncer.is_none() {
            let started = self.notes.again().and_then(|notes| Syncer::start(Arc::clone(&self.file), notes));
            self.syncer = Some(started.map_err(Error::file("start the syncing thread for", &self.path))?);
        }
        let Some(syncer) = &self.syncer else { return Ok(()) };
        if let Some(error) = syncer.failure() {
            return Err(self.failed("sync", error));
        }
        match syncer.work.try_send(self.have.clone()) {
            Ok(()) => self.unsynced = 0,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
        Ok(())
    }

    /// Leaves the part for another time: all that is there is synced and noted.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::File`].
    pub(crate) fn leave(mut self) -> Result<(), Error> {
        self.join_syncer()?;
        if self.have.total() == 0 {
            self.discard();
            return Ok(());
        }
        let noted = self.file.sync_data().and_then(|()| self.notes.add(&self.have, Grade::Synced));
        noted.map_err(|error| self.failed("sync", error))
    }

    /// Makes the complete part the blob, if it is what was promised.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::File`]; the part is gone then.
    pub(crate) fn finish(mut self, blob: &Path) -> Result<Verdict, Error> {
        debug_assert!(self.frontier == self.size, "only a complete part is finished");
        self.join_syncer()?;
        let got = std::mem::replace(&mut self.hasher, Hasher::sha256()).hex();
        if got != self.digest.hex() {
            self.discard();
            return Ok(Verdict::Wrong { got });
        }
        self.file.sync_all().map_err(|error| self.failed("sync", error))?;
        fs::rename(&self.path, blob).map_err(Error::file("rename to", blob))?;
        disk::sync_folder(blob.parent().unwrap_or(blob))?;
        let _ = fs::remove_file(&self.journal);
        Ok(Verdict::Blob)
    }

    fn join_syncer(&mut self) -> Result<(), Error> {
        match self.syncer.take().map(Syncer::end) {
            Some(Some(error)) => Err(self.failed("sync", error)),
            _ => Ok(()),
        }
    }

    /// A failed write or sync: after one, nobody knows what the disk has, so the part is not used again.
    fn failed(&self, action: &'static str, error: io::Error) -> Error {
        self.discard();
        let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        if full {
            let free = disk::free(self.path.parent().unwrap_or(&self.path)).unwrap_or(0);
            return Error::DiskFull { needed: self.size, free, path: self.path.clone() };
        }
        Error::file(action, &self.path)(error)
    }

    fn discard(&self) {
        let _ = fs::remove_file(&self.journal);
        let _ = fs::remove_file(&self.path);
    }
}

/// An empty part with its whole room, and an empty journal.
fn fresh(file: &File, path: &Path, journal: &Path, size: u64) -> Result<(), Error> {
    let _ = fs::remove_file(journal);
    file.set_len(0).map_err(Error::file("empty", path))?;
    let full = |error: io::Error| {
        let _ = fs::remove_file(path);
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                let free = disk::free(path.parent().unwrap_or(path)).unwrap_or(0);
                Error::DiskFull { needed: size, free, path: path.to_owned() }
            }
            _ => Error::file("reserve room for", path)(error),
        }
    };
    if size > 0 {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size) {
            // Not every file system can; then room is found missing when it is.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(errno) => return Err(full(errno.into())),
        }
        file.set_len(size).map_err(full)?;
    }
    fs::write(journal, header(size) + "\n").map_err(Error::file("begin", journal))
}

/// The thread that syncs data and then notes them in the journal.
struct Syncer {
    work: SyncSender<Ranges>,
    failure: Arc<Mutex<Option<io::Error>>>,
    thread: JoinHandle<()>,
}

impl Syncer {
    fn start(file: Arc<File>, notes: Notes) -> io::Result<Self> {
        // One order waits at most: the next one has all that it would have had.
        let (work, orders): (SyncSender<Ranges>, Receiver<Ranges>) = sync_channel(1);
        let failure = Arc::new(Mutex::new(None));
        let seen = Arc::clone(&failure);
        let thread = std::thread::Builder::new().name("catalog-sync".into()).spawn(move || {
            for have in orders {
                if let Err(error) = file.sync_data().and_then(|()| notes.add(&have, Grade::Synced)) {
                    *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        })?;
        Ok(Self { work, failure, thread })
    }

    fn failure(&self) -> Option<io::Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn end(self) -> Option<io::Error> {
        drop(self.work);
        let _ = self.thread.join();
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How sure a note is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grade {
    /// The disk has it.
    Synced,
    /// The kernel has it, for as long as it runs.
    Written,
}

/// The journal as it is written: whole lines, appended.
struct Notes {
    file: File,
    /// What this boot is called; `None` when the system does not tell, and only synced ranges are noted.
    boot: Option<String>,
}

impl Notes {
    fn open(journal: &Path, boot: Option<String>) -> io::Result<Self> {
        Ok(Self { file: File::options().append(true).open(journal)?, boot })
    }

    fn again(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, boot: self.boot.clone() })
    }

    fn add(&self, ranges: &Ranges, grade: Grade) -> io::Result<()> {
        let mut text = String::new();
        for (start, end) in ranges.iter() {
            match (grade, &self.boot) {
                (Grade::Synced, _) => text.push_str(&format!("{start} {end}\n")),
                (Grade::Written, Some(boot)) => text.push_str(&format!("{start} {end} {boot}\n")),
                (Grade::Written, None) => {}
            }
        }
        (&self.file).write_all(text.as_bytes())?;
        if grade == Grade::Synced { self.file.sync_data() } else { Ok(()) }
    }
}

/// What the kernel calls this boot.
fn boot() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let text = text.trim();
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')).then(|| text.to_owned())
}

/// What a journal notes that holds in this boot; `None` when there is none for a file of this size.
///
/// # Errors
/// [`Error::File`], [`Error::RefusedFile`].
fn read_journal(path: &Path, size: u64, boot: &Option<String>) -> Result<Option<Ranges>, Error> {
    let Some(bytes) = layout::read_small(path, MAX_JOURNAL)? else { return Ok(None) };
    Ok(parse_journal(&String::from_utf8_lossy(&bytes), size, boot.as_deref()))
}

fn parse_journal(text: &str, size: u64, boot: Option<&str>) -> Option<Ranges> {
    // A line counts once its end is there.
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let mut lines = whole.lines();
    if lines.next()? != header(size) {
        return None;
    }
    let mut have = Ranges::default();
    for line in lines {
        let mut words = line.split(' ');
        let start: u64 = words.next()?.parse().ok()?;
        let end: u64 = words.next()?.parse().ok()?;
        if start >= end || end > size {
            return None;
        }
        if words.next().is_none_or(|of| Some(of) == boot) {
            have.insert(start, end);
        }
    }
    Some(have)
}

fn header(size: u64) -> String {
    format!("rbee-journal 1 {size}")
}

/// Bytes of an unfinished part that are noted, to show another process's progress.
pub(crate) fn noted(blobs: &Path, hex: &str, size: u64) -> u64 {
    let journal = blobs.join(format!("{hex}{JOURNAL}"));
    read_journal(&journal, size, &boot()).ok().flatten().map_or(0, |have| have.total())
}

/// Removes parts and journals that nobody has touched for `age`, but for those of `keep`.
pub(crate) fn sweep(blobs: &Path, age: Duration, keep: &dyn Fn(&str) -> bool) {
    for name in layout::entries(blobs).unwrap_or_default() {
        let Some(hex) = name.strip_suffix(PART).or_else(|| name.strip_suffix(JOURNAL)) else { continue };
        let path = blobs.join(&name);
        let old = path
            .symlink_metadata()
            .and_then(|facts| facts.modified())
            .is_ok_and(|touched| SystemTime::now().duration_since(touched).is_ok_and(|passed| passed > age));
        if old && !keep(hex) {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"hello";
    const SHA: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn part(folder: &Path) -> Part {
        Part::open(folder, &Digest::parse(SHA).unwrap(), 5, Arc::default()).unwrap()
    }

    #[test]
    fn pieces_in_any_order_and_over_several_lives_make_the_blob() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = part(folder.path());
        first.write(3, &TEXT[3..]).unwrap();
        first.write(0, &TEXT[..1]).unwrap();
        first.leave().unwrap();
        assert_eq!(noted(folder.path(), SHA, 5), 3);
        let mut second = part(folder.path());
        assert_eq!(second.have().gap(0, 5, 9), Some((1, 3)));
        // What is there stays, whatever comes again.
        second.write(0, b"XelXX and more").unwrap();
        let blob = folder.path().join(SHA);
        assert_eq!(second.finish(&blob).unwrap(), Verdict::Blob);
        assert_eq!(fs::read(blob).unwrap(), TEXT);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn wrong_bytes_are_never_a_blob() {
        let folder = tempfile::tempdir().unwrap();
        let mut part = part(folder.path());
        part.write(0, b"hellO").unwrap();
        assert!(matches!(part.finish(&folder.path().join(SHA)).unwrap(), Verdict::Wrong { .. }));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_writer_that_is_killed_loses_less_than_a_note_is_worth() {
        let folder = tempfile::tempdir().unwrap();
        let digest = Digest::parse(SHA).unwrap();
        let open = || Part::open(folder.path(), &digest, 8 << 20, Arc::default()).unwrap();
        let mut part = open();
        for chunk in 0..10 {
            part.write(chunk * (100 << 10), &[7; 100 << 10]).unwrap();
        }
        // Gone without a last word, and with no sync yet: those come every MiB.
        drop(part);
        let have = open().have().total();
        assert!((744 << 10..1000 << 10).contains(&have), "{have}");
    }

    #[test]
    fn a_journal_is_believed_line_by_whole_line() {
        let total = |text: &str| parse_journal(text, 100, Some("b1")).map(|have| have.total());
        assert_eq!(total("rbee-journal 1 100\n0 10\n20 30\n"), Some(20));
        assert_eq!(total("rbee-journal 1 100\n0 10\n20 3"), Some(10));
        // What was not synced holds for the boot in which it was written.
        assert_eq!(total("rbee-journal 1 100\n0 10 b1\n20 30 b0\n40 50\n"), Some(20));
        for text in ["", "rbee-journal 1 100", "rbee-journal 1 99\n0 10\n", "rbee-journal 1 100\n0 101\n", "x\n"] {
            assert_eq!(total(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_nobody_touched_for_long_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        for hex in ["aa", "bb"] {
            fs::write(folder.path().join(format!("{hex}{PART}")), "x").unwrap();
        }
        fs::write(folder.path().join("cc.incomplete"), "x").unwrap();
        sweep(folder.path(), Duration::from_secs(60), &|_| false);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
        sweep(folder.path(), Duration::ZERO, &|hex| hex == "bb");
        let left = layout::entries(folder.path()).unwrap();
        assert!(left.len() == 2 && left.contains(&format!("bb{PART}")), "{left:?}");
    }
}
