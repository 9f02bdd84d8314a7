//! Cores that the workers of a machine share: those that compute at one time have a part each.
//!
//! Twice as many threads as cores compute slower than as many: each waits at every operation for the one that does not run. So a worker
//! that computes says with how many threads it would, by a file in a folder that all workers of the hive know, on which it holds a
//! lock while it has work; and it computes each step with its part of the cores. The system lets go of a dead worker's lock, and
//! whoever finds a file without one takes it away.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rbee_engine::runner::{Logits, ModelLimits, ModelRunner, Regime, RunnerError, StepBatch};
use rbee_models::MAX_THREADS;
use rbee_service::random_hex;

/// How long what was seen of the others is taken to be true: steps of small models are shorter than looking is worth.
const FRESH: Duration = Duration::from_millis(5);

/// Workers that are looked at: a folder with more files is none of ours.
const MOST: usize = 256;

/// A worker's place among those that share.
pub struct Cores {
    folder: PathBuf,
    cores: usize,
    wanted: usize,
    /// The file that says that this worker computes, held.
    own: Option<Place>,
    part: usize,
    looked: Option<Instant>,
}

struct Place {
    name: String,
    path: PathBuf,
    /// Its lock ends with it.
    _held: File,
}

impl Drop for Place {
    fn drop(&mut self) {
        // While it is still held, so that nobody finds it without a lock.
        let _ = fs::remove_file(&self.path);
    }
}

impl Cores {
    /// A worker that computes with `wanted` threads when it is alone, on so many cores.
    pub fn new(folder: &Path, cores: usize, wanted: usize) -> Self {
        Self { folder: folder.to_owned(), cores, wanted, own: None, part: wanted, looked: None }
    }

    /// Threads to compute with now.
    pub fn part(&mut self) -> usize {
        if self.looked.is_none_or(|looked| looked.elapsed() >= FRESH) {
            self.looked = Some(Instant::now());
            // Who cannot tell the others computes as if there were none.
            self.part = self.look().unwrap_or(self.wanted);
        }
        self.part
    }

    /// This worker has nothing to compute: others may have its part.
    pub fn rest(&mut self) {
        (self.own, self.looked) = (None, None);
    }

    fn look(&mut self) -> io::Result<usize> {
        let own = match self.own.take() {
            Some(own) => own,
            None => self.enter()?,
        };
        let mut all = vec![own.name.clone()];
        for entry in fs::read_dir(&self.folder)?.take(MOST) {
            let name = entry?.file_name();
            let other = name.to_str().filter(|name| *name != own.name && threads(name).is_some());
            if let Some(name) = other.filter(|name| is_held(&self.folder.join(name))) {
                all.push(name.to_owned());
            }
        }
        // Each gives out the cores in the same order.
        all.sort();
        let at = all.iter().position(|name| *name == own.name).unwrap_or(0);
        let wants: Vec<usize> = all.iter().filter_map(|name| threads(name)).collect();
        self.own = Some(own);
        Ok(part(self.cores, &wants, at))
    }

    /// Says that this worker computes. The file has its name only when it is held.
    fn enter(&self) -> io::Result<Place> {
        fs::create_dir_all(&self.folder)?;
        let name = format!("{}-{}", self.wanted, random_hex(8));
        let (new, path) = (self.folder.join(format!(".{name}")), self.folder.join(&name));
        let held = File::create_new(&new)?;
        let moved = held.try_lock().map_err(io::Error::from).and_then(|()| fs::rename(&new, &path));
        if let Err(error) = moved {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        Ok(Place { name, path, _held: held })
    }
}

/// The threads that a worker wants, by its file's name.
fn threads(name: &str) -> Option<usize> {
    let (threads, _) = name.split_once('-')?;
    threads.parse().ok().filter(|threads| (1..=MAX_THREADS).contains(threads))
}

/// Whether a worker that computes holds this file. One that nobody holds is taken away.
fn is_held(path: &Path) -> bool {
    // One that is gone by now is its owner's.
    let Ok(file) = File::open(path) else { return false };
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => true,
        Err(TryLockError::Error(_)) => false,
        Ok(()) => {
            let _ = fs::remove_file(path);
            false
        }
    }
}

/// The part of the one at `at`: cores are given out one by one, in turns, to those that want more. At least one, and all that are wanted where
/// nobody else computes.
fn part(cores: usize, wants: &[usize], at: usize) -> usize {
    if wants.len() == 1 {
        return wants[at];
    }
    let (mut parts, mut left) = (vec![0; wants.len()], cores);
    while left > 0 && parts != wants {
        for (part, want) in parts.iter_mut().zip(wants) {
            if *part < *want && left > 0 {
                (*part, left) = (*part + 1, left - 1);
            }
        }
    }
    parts[at].max(1)
}

/// A runner that computes each step with its part of the cores.
pub struct Sharing {
    /// What computes.
    pub runner: Box<dyn ModelRunner>,
    /// Its part.
    pub cores: Cores,
}

impl ModelRunner for Sharing {
    fn limits(&self) -> &ModelLimits {
        self.runner.limits()
    }

    fn logits(&mut self) -> Logits {
        self.runner.logits()
    }

    fn regime(&self, prompt: usize) -> Regime {
        self.runner.regime(prompt)
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        self.runner.set_threads(self.cores.part());
        self.runner.step(batch, logits)
    }

    fn set_threads(&mut self, threads: usize) {
        self.runner.set_threads(threads);
    }

    fn rest(&mut self) {
        self.cores.rest();
        self.runner.rest();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_given_out_in_turns_to_those_that_want_more() {
        let parts = |cores, wants: &[usize]| (0..wants.len()).map(|at| part(cores, wants, at)).collect::<Vec<_>>();
        assert_eq!(parts(2, &[8]), [8]);
        assert_eq!(parts(2, &[2, 2]), [1, 1]);
        assert_eq!(parts(2, &[2, 2, 2]), [1, 1, 1]);
        assert_eq!(parts(8, &[8, 1]), [7, 1]);
        assert_eq!(parts(8, &[8, 8, 8]), [3, 3, 2]);
        assert_eq!(parts(8, &[2, 3]), [2, 3]);
        assert_eq!(parts(8, &[16, 1, 16]), [4, 1, 3]);
    }

    #[test]
    fn those_that_compute_share_and_those_that_rest_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let worker = |wanted| Cores::new(&folder.path().join("cores"), 4, wanted);
        let (mut one, mut two) = (worker(4), worker(4));
        assert_eq!(one.part(), 4);
        assert_eq!(two.part(), 2);
        one.looked = None;
        assert_eq!(one.part(), 2);
        two.rest();
        one.looked = None;
        assert_eq!(one.part(), 4);
        drop(one);
        assert_eq!(fs::read_dir(folder.path().join("cores")).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_worker_left_counts_for_nothing_and_is_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join("4-dead");
        fs::write(&left, "").unwrap();
        for name in ["notes", "0-none", "9999-many", "x-y"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(Cores::new(folder.path(), 4, 4).part(), 4);
        assert!(!left.exists() && folder.path().join("notes").exists());
    }

    #[test]
    fn a_worker_that_cannot_tell_the_others_computes_as_if_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(Cores::new(&file, 4, 3).part(), 3);
    }
}
