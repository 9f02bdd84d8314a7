//! A persistent pool of compute threads that share one piece of work at a time.
//!
//! The caller is one of the threads. Work is cut into tasks by index; which thread takes which task never
//! changes a result, since a task writes only its own part of the output. Idle threads spin for a moment,
//! for the next operation of the same step, and then park.

#![expect(unsafe_code, reason = "a borrowed closure is shared with threads that outlive the borrow's scope")]

use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Turns of the spinning wait before a thread parks: some tens of microseconds, about the time between two operations of a
/// step.
const SPINS: u32 = 4_000;

/// In place of the next task while no round is open.
const CLOSED: u64 = u32::MAX as u64;

/// The work all threads take part in, with the lifetime of its borrow erased.
type Job = &'static (dyn Fn(usize) + Sync);

struct Shared {
    /// The round in the upper half, the next task in the lower: a task is claimed by raising the lower half. What `job` and `tasks` hold
    /// belongs to a round for as long as this says so, since they are written while it says [`CLOSED`]; a claim succeeds only if it
    /// has said the same since before they were read.
    claims: AtomicU64,
    /// Points to a [`Job`] of the thread that runs the round, which waits for every task that was claimed.
    job: AtomicPtr<Job>,
    tasks: AtomicU32,
    /// Tasks of this round that have ended.
    done: AtomicU32,
    panicked: AtomicBool,
    parked: Mutex<()>,
    wake: Condvar,
    sleepers: AtomicUsize,
    stop: AtomicBool,
}

/// The pool. Dropping it ends its threads.
pub struct Pool {
    shared: Arc<Shared>,
    /// One for each thread.
    shares: Vec<Share>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Pool {
    /// A pool of so many threads, the caller's included.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            claims: AtomicU64::new(CLOSED),
            job: AtomicPtr::new(std::ptr::null_mut()),
            tasks: AtomicU32::new(0),
            done: AtomicU32::new(0),
            panicked: AtomicBool::new(false),
            parked: Mutex::new(()),
            wake: Condvar::new(),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let threads: Vec<_> = (1..threads)
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                // Fewer threads than wished for is slower and never wrong.
                std::thread::Builder::new().name(format!("compute-{i}")).spawn(move || shared.serve()).ok()
            })
            .collect();
        let shares = std::iter::repeat_with(Share::default).take(threads.len() + 1).collect();
        Self { shared, shares, threads }
    }

    /// Threads that take part, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `task(i)` for every `i` in `0..tasks`, on all threads, and returns when all are done.
    ///
    /// # Panics
    /// When a task panicked.
    pub fn run(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.round(tasks, task);
    }

    /// Runs `task` for ranges that are all of `0..units` together, on all threads, and returns when all are done. Each thread goes through a
    /// share of its own, of which it claims half of what is left, and `least` units at least; one that has none left takes the further
    /// half of another's. So a thread reads what stands in order of the units in one stream, and the last claims are of about `least`
    /// units: others wait longer only for a thread so slow that all else is done before the first half of its share.
    ///
    /// # Panics
    /// When a task panicked, or there are 2^32 units.
    pub fn share(&mut self, units: usize, least: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
        assert!(u32::try_from(units).is_ok(), "{units} units");
        let threads = self.threads();
        if threads == 1 || units <= 1 {
            return task(0..units);
        }
        for (thread, share) in self.shares.iter().enumerate() {
            share.set(units * thread / threads..units * (thread + 1) / threads);
        }
        self.round(threads, &|own| {
            while let Some(range) = next(&self.shares, own, least) {
                task(range);
            }
        });
    }

    fn round(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.threads.is_empty() || tasks <= 1 {
            (0..tasks).for_each(task);
            return;
        }
        let shared = &*self.shared;
        let count = u32::try_from(tasks).expect("a step has fewer than 2^32 tasks");
        // SAFETY: only the lifetime changes. The closure is called for claimed tasks only, and this function returns when all tasks of
        // the round have ended; a later claim for this round cannot succeed.
        let mut job: Job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(task) };
        let round = (shared.claims.load(Ordering::Relaxed) >> 32) as u32;
        shared.claims.store(u64::from(round) << 32 | CLOSED, Ordering::SeqCst);
        // Released: who sees one of these sees that the round before is closed.
        shared.job.store(&raw mut job, Ordering::Release);
        shared.tasks.store(count, Ordering::Release);
        shared.done.store(0, Ordering::Relaxed);
        shared.claims.store(u64::from(round.wrapping_add(1)) << 32, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _parked = shared.parked.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        shared.take();
        // Every task is claimed; those that others claimed are being worked on right now.
        let mut spins = 0u32;
        while shared.done.load(Ordering::Acquire) < count {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute task panicked");
    }
}

/// What is left of a thread's share: the first unit in the upper half of a word and the end in the lower, on cache lines of its own. Units
/// are claimed by whoever changes it, and nothing else is told by it.
#[derive(Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, units: Range<usize>) {
        self.0.store(Self::word(&units), Ordering::Relaxed);
    }

    fn word(units: &Range<usize>) -> u64 {
        (units.start as u64) << 32 | units.end as u64
    }

    fn of(word: u64) -> Range<usize> {
        (word >> 32) as usize..word as u32 as usize
    }

    fn left(&self) -> usize {
        Self::of(self.0.load(Ordering::Relaxed)).len()
    }

    /// Claims the nearer half, of at least so many units if there are.
    fn front(&self, least: usize) -> Option<Range<usize>> {
        self.claim(|units| {
            let middle = units.end.min(units.start + least.max(units.len() / 2));
            (units.start..middle, middle..units.end)
        })
    }

    /// Claims the further half.
    fn back(&self) -> Option<Range<usize>> {
        self.claim(|units| {
            let middle = units.start + units.len() / 2;
            (middle..units.end, units.start..middle)
        })
    }

    /// Claims the first of two parts of what is left and leaves the second, if there is anything.
    fn claim(&self, parts: impl Fn(Range<usize>) -> (Range<usize>, Range<usize>)) -> Option<Range<usize>> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let units = Self::of(word);
            if units.is_empty() {
                return None;
            }
            let (claimed, rest) = parts(units);
            match self.0.compare_exchange_weak(word, Self::word(&rest), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(claimed),
                Err(now) => word = now,
            }
        }
    }
}

/// The next units of a thread: of its own share, or of the longest that is left.
fn next(shares: &[Share], own: usize, least: usize) -> Option<Range<usize>> {
    loop {
        if let Some(units) = shares[own].front(least) {
            return Some(units);
        }
        let longest = shares.iter().max_by_key(|share| share.left()).filter(|share| share.left() > 0)?;
        if let Some(units) = longest.back() {
            shares[own].set(units);
        }
    }
}

/// An output whose parts are written by different tasks of one [`Pool::run`] or [`Pool::share`].
pub struct SharedOut<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out nothing but a pointer and, unsafely, parts of which no two may overlap.
unsafe impl<T: Send> Send for SharedOut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedOut<'_, T> {}

impl<'a, T> SharedOut<'a, T> {
    /// Shares an output for as long as it is borrowed.
    pub fn new(out: &'a mut [T]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len(), borrow: PhantomData }
    }

    pub(crate) fn start(&self) -> *mut T {
        self.start
    }

    /// The values of a range.
    ///
    /// # Safety
    /// No two parts that are alive at one time may overlap.
    ///
    /// # Panics
    /// When the range does not lie within the output.
    pub unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: the range is within the borrowed output, and the caller's parts do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.parked.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            self.take();
        }
    }

    /// Works on tasks until none is left to claim.
    fn take(&self) {
        let mut claims = self.claims.load(Ordering::SeqCst);
        loop {
            let (job, tasks) = (self.job.load(Ordering::Acquire), self.tasks.load(Ordering::Acquire));
            let next = claims as u32;
            if next >= tasks {
                return;
            }
            match self.claims.compare_exchange_weak(claims, claims + 1, Ordering::SeqCst, Ordering::SeqCst) {
                Err(now) => claims = now,
                Ok(_) => {
                    // SAFETY: the task is claimed and not counted as done, so `Pool::run` has not returned and what it lent is alive.
                    let task = unsafe { *job };
                    if catch_unwind(AssertUnwindSafe(|| task(next as usize))).is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.done.fetch_add(1, Ordering::Release);
                    claims = self.claims.load(Ordering::SeqCst);
                }
            }
        }
    }

    /// Waits for a round other than `seen`.
    fn wait(&self, seen: u32) -> u32 {
        let round = || (self.claims.load(Ordering::SeqCst) >> 32) as u32;
        for _ in 0..SPINS {
            if round() != seen || self.stop.load(Ordering::SeqCst) {
                return round();
            }
            std::hint::spin_loop();
        }
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while round() == seen && !self.stop.load(Ordering::SeqCst) {
            parked = self.wake.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        round()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn every_task_runs_once_in_every_round() {
        let mut pool = Pool::new(4);
        for tasks in [0usize, 1, 2, 3, 17, 100] {
            for _ in 0..500 {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn every_unit_is_in_one_range() {
        let mut pool = Pool::new(4);
        for units in [0usize, 1, 2, 3, 17, 1000] {
            for least in [1, 5, 2000] {
                for _ in 0..200 {
                    let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                    pool.share(units, least, &|range| {
                        for i in range {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn what_a_slow_thread_has_not_begun_is_taken_by_others() {
        const UNITS: usize = 1000;
        let (held, done) = (AtomicBool::new(false), AtomicUsize::new(0));
        Pool::new(2).share(UNITS, 1, &|range| {
            let units = range.len();
            if range.contains(&0) {
                let end = Instant::now() + Duration::from_secs(60);
                while done.load(Ordering::Relaxed) < UNITS - units && Instant::now() < end {
                    std::thread::yield_now();
                }
                held.store(done.load(Ordering::Relaxed) == UNITS - units, Ordering::Relaxed);
            }
            done.fetch_add(units, Ordering::Relaxed);
        });
        assert!(held.load(Ordering::Relaxed));
    }

    #[test]
    fn a_panic_of_a_task_is_the_callers() {
        let mut pool = Pool::new(2);
        let run = catch_unwind(AssertUnwindSafe(|| pool.run(10, &|i| assert!(i != 7))));
        assert!(run.is_err());
        pool.run(3, &|_| ());
    }
}
