//! A persistent pool of compute threads that share one piece of work at a time.
//!
//! The caller is one of the threads. Work is cut into tasks by index; which thread takes which task never
//! changes a result, since a task writes only its own part of the output. Idle threads spin for a moment,
//! for the next operation of the same step, and then park.

#![expect(unsafe_code, reason = "a borrowed closure is shared with threads that outlive the borrow's scope")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Turns of the spinning wait before a thread parks: some tens of microseconds.
const SPINS: u32 = 20_000;

/// The work all threads take part in, with the lifetime of its borrow erased.
#[derive(Clone, Copy)]
struct Work {
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: the closure is Sync, and `Pool::run` does not return before no thread uses it any more.
unsafe impl Send for Work {}

struct Shared {
    /// Rises with each piece of work; threads wait for it to move.
    round: AtomicUsize,
    work: Mutex<Option<Work>>,
    next: AtomicUsize,
    /// Threads that have not finished this round.
    busy: AtomicUsize,
    panicked: AtomicBool,
    parked: Mutex<()>,
    wake: Condvar,
    sleepers: AtomicUsize,
    stop: AtomicBool,
}

/// The pool. Dropping it ends its threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Pool {
    /// A pool of so many threads, the caller's included.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            round: AtomicUsize::new(0),
            work: Mutex::new(None),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            parked: Mutex::new(()),
            wake: Condvar::new(),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let threads = (1..threads)
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                // Fewer threads than wished for is slower and never wrong.
                std::thread::Builder::new().name(format!("compute-{i}")).spawn(move || shared.serve()).ok()
            })
            .collect();
        Self { shared, threads }
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
        if self.threads.is_empty() || tasks <= 1 {
            (0..tasks).for_each(task);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No thread touches the closure after this function returns: it waits
        // until `busy` is zero, and a thread reads the work only between being counted busy and leaving.
        let run: *const (dyn Fn(usize) + Sync + 'static) =
            unsafe { std::mem::transmute(std::ptr::from_ref(task)) };
        *shared.work.lock().unwrap_or_else(PoisonError::into_inner) = Some(Work { run, tasks });
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.threads.len(), Ordering::Relaxed);
        shared.round.fetch_add(1, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _parked = shared.parked.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take(task, tasks)));
        let mut spins = 0u32;
        while shared.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute thread panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.round.fetch_add(1, Ordering::SeqCst);
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
            let work = *self.work.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(work) = work {
                // SAFETY: this thread is counted in `busy` until it says otherwise below, and `Pool::run`, which
                // borrows the closure, waits for that.
                let task = unsafe { &*work.run };
                if catch_unwind(AssertUnwindSafe(|| self.take(task, work.tasks))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    fn take(&self, task: &(dyn Fn(usize) + Sync), tasks: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            task(i);
        }
    }

    /// Waits for a round other than `seen`.
    fn wait(&self, seen: usize) -> usize {
        for _ in 0..SPINS {
            let round = self.round.load(Ordering::SeqCst);
            if round != seen {
                return round;
            }
            std::hint::spin_loop();
        }
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            let round = self.round.load(Ordering::SeqCst);
            if round != seen {
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                return round;
            }
            parked = self.wake.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
