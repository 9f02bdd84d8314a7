//! Masks that are made while the model computes.
//!
//! The mask of the next token depends on tokens alone that were known when the last one was chosen: [`Ahead::prepare`] lays the work
//! out, and a thread of the [`MaskThreads`] takes it up while the forward pass runs. [`Ahead::mask`] waits for work that was taken up
//! and does itself what was not, so that it never waits behind others and the mask is the same whoever made it.
//!
//! The pool holds no more than [`QUEUE`] pieces of work; what finds no place is done by the one who needs it. A matcher is in one
//! place at a time: with its sequence, or with the thread that makes its mask.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rbee_engine::TokenId;

/// Pieces of work that may wait: more than sequences run at once as a rule.
const QUEUE: usize = 256;

/// Where an answer stands in its form.
pub(super) trait Match: Send {
    /// Sets the bits of the tokens that may come next and clears all others.
    fn mask(&mut self, words: &mut [u32]) -> Result<(), String>;
    /// Takes one more token; true when nothing can follow.
    fn accept(&mut self, id: TokenId) -> Result<bool, String>;
}

/// Threads that make masks. They end when the last one who may give them work is gone.
#[derive(Clone)]
pub(super) struct MaskThreads {
    work: SyncSender<Arc<Slot>>,
}

impl MaskThreads {
    /// Starts so many threads.
    ///
    /// # Errors
    /// When the system gives none.
    pub(super) fn start(count: usize) -> std::io::Result<Self> {
        let (work, queue) = sync_channel(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..count {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name(format!("masks-{number}")).spawn(move || serve(&queue))?;
        }
        Ok(Self { work })
    }
}

fn serve(queue: &Mutex<Receiver<Arc<Slot>>>) {
    loop {
        let next = lock(queue).recv();
        let Ok(slot) = next else { return };
        slot.make();
    }
}

/// A mutex is poisoned by a panic only, and nothing here panics that leaves half of a change behind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A matcher and the mask that is made with it.
struct Work {
    matcher: Box<dyn Match>,
    words: Vec<u32>,
    /// Whether the words are its mask.
    made: Option<Result<(), String>>,
}

impl Work {
    fn make(&mut self) {
        let Self { matcher, words, made } = self;
        // A fault of one form must not end the thread that others wait for.
        let mask = catch_unwind(AssertUnwindSafe(|| matcher.mask(words)));
        *made = Some(mask.unwrap_or_else(|_| Err("its matcher panicked".into())));
    }
}

/// Where a piece of work is.
enum Stage {
    /// For whoever comes first.
    Open(Box<Work>),
    /// With a thread.
    Taken,
    Done(Box<Work>),
    /// With its sequence again.
    Gone,
}

struct Slot {
    stage: Mutex<Stage>,
    done: Condvar,
}

impl Slot {
    /// Does the work, if nobody has begun with it.
    fn make(&self) {
        let mut work = {
            let mut stage = lock(&self.stage);
            match std::mem::replace(&mut *stage, Stage::Taken) {
                Stage::Open(work) => work,
                other => {
                    *stage = other;
                    return;
                }
            }
        };
        work.make();
        *lock(&self.stage) = Stage::Done(work);
        self.done.notify_one();
    }

    /// Takes the work back, done or not begun; waits for what a thread is doing.
    fn take(&self) -> Option<Box<Work>> {
        let mut stage = lock(&self.stage);
        loop {
            match std::mem::replace(&mut *stage, Stage::Gone) {
                Stage::Open(work) | Stage::Done(work) => return Some(work),
                Stage::Gone => return None,
                Stage::Taken => {
                    *stage = Stage::Taken;
                    stage = self.done.wait(stage).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// A matcher whose masks can be made ahead.
pub(super) struct Ahead {
    threads: MaskThreads,
    place: Place,
}

enum Place {
    Here(Box<Work>),
    Out(Arc<Slot>),
}

impl Ahead {
    /// At the beginning of an answer of so many words of mask.
    pub(super) fn new(matcher: Box<dyn Match>, words: usize, threads: MaskThreads) -> Self {
        let work = Work { matcher, words: vec![0; words], made: None };
        Self { threads, place: Place::Here(Box::new(work)) }
    }

    /// Lays the next mask out to be made.
    pub(super) fn prepare(&mut self) {
        let Place::Here(work) = &self.place else { return };
        if work.made.is_some() {
            return;
        }
        let slot = Arc::new(Slot { stage: Mutex::new(Stage::Gone), done: Condvar::new() });
        if let Place::Here(work) = std::mem::replace(&mut self.place, Place::Out(Arc::clone(&slot))) {
            *lock(&slot.stage) = Stage::Open(work);
        }
        // Without a place in the queue it stays open, and is done when it is asked for.
        let _ = self.threads.work.try_send(slot);
    }

    fn here(&mut self) -> Result<&mut Work, String> {
        if let Place::Out(slot) = &self.place {
            let work = slot.take().ok_or("its matcher is gone")?;
            self.place = Place::Here(work);
        }
        match &mut self.place {
            Place::Here(work) => Ok(work),
            Place::Out(_) => Err("its matcher is gone".into()),
        }
    }

    /// The tokens that may come next.
    pub(super) fn mask(&mut self) -> Result<&[u32], String> {
        let work = self.here()?;
        if work.made.is_none() {
            work.make();
        }
        match &work.made {
            Some(Err(problem)) => Err(problem.clone()),
            _ => Ok(&work.words),
        }
    }

    /// Takes one more token; true when nothing can follow.
    pub(super) fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        let work = self.here()?;
        work.made = None;
        work.matcher.accept(id)
    }
}

impl Drop for Ahead {
    /// Nobody makes a mask for an answer that is over.
    fn drop(&mut self) {
        if let Place::Out(slot) = &self.place {
            let mut stage = lock(&slot.stage);
            if matches!(*stage, Stage::Open(_)) {
                *stage = Stage::Gone;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;

    /// Its mask is the sum of the tokens it was told; it tells who asks for it, and can be made to wait.
    struct Sums {
        sum: u32,
        made_by: Sender<String>,
        wait: Option<Receiver<()>>,
    }

    impl Match for Sums {
        fn mask(&mut self, words: &mut [u32]) -> Result<(), String> {
            if let Some(wait) = &self.wait {
                wait.recv_timeout(Duration::from_secs(20)).map_err(|error| error.to_string())?;
            }
            self.made_by.send(std::thread::current().name().unwrap_or_default().to_owned()).unwrap();
            words.fill(self.sum);
            Ok(())
        }

        fn accept(&mut self, id: TokenId) -> Result<bool, String> {
            self.sum += id;
            Ok(id == 0)
        }
    }

    fn sums(threads: &MaskThreads) -> (Ahead, Receiver<String>) {
        let (made_by, seen) = channel();
        (Ahead::new(Box::new(Sums { sum: 0, made_by, wait: None }), 2, threads.clone()), seen)
    }

    #[test]
    fn a_mask_that_was_announced_is_made_by_a_thread_and_only_once() {
        let threads = MaskThreads::start(1).unwrap();
        let (mut ahead, seen) = sums(&threads);
        assert_eq!(ahead.accept(5), Ok(false));
        ahead.prepare();
        ahead.prepare();
        assert_eq!(seen.recv_timeout(Duration::from_secs(20)).unwrap(), "masks-0");
        assert_eq!(ahead.mask(), Ok(&[5, 5][..]));
        assert_eq!(ahead.mask(), Ok(&[5, 5][..]));
        assert!(seen.try_recv().is_err());
        // The next is another one, whether it was announced or not.
        ahead.accept(2).unwrap();
        assert_eq!(ahead.mask(), Ok(&[7, 7][..]));
        ahead.prepare();
        ahead.accept(1).unwrap();
        ahead.prepare();
        assert_eq!(ahead.mask(), Ok(&[8, 8][..]));
        assert_eq!(ahead.accept(0), Ok(true));
    }

    /// One mask keeps the only thread: the others are made by who needs them, without waiting for it.
    #[test]
    fn nobody_waits_behind_others() {
        let threads = MaskThreads::start(1).unwrap();
        let (made_by, slow_seen) = channel();
        let (release, wait) = channel();
        let mut slow = Ahead::new(Box::new(Sums { sum: 1, made_by, wait: Some(wait) }), 2, threads.clone());
        slow.prepare();
        let mut others: Vec<_> = (0..QUEUE + 50).map(|_| sums(&threads)).collect();
        for (number, (ahead, _)) in others.iter_mut().enumerate() {
            ahead.accept(number as TokenId).unwrap();
            ahead.prepare();
        }
        for (number, (ahead, _)) in others.iter_mut().enumerate() {
            assert_eq!(ahead.mask(), Ok(&[number as u32; 2][..]));
        }
        assert!(slow_seen.try_recv().is_err(), "it still waits");
        release.send(()).unwrap();
        assert_eq!(slow.mask(), Ok(&[1, 1][..]));
    }

    #[test]
    fn a_matcher_that_panics_fails_alone() {
        struct Broken;
        impl Match for Broken {
            fn mask(&mut self, _: &mut [u32]) -> Result<(), String> {
                panic!("broken matcher")
            }
            fn accept(&mut self, _: TokenId) -> Result<bool, String> {
                Ok(false)
            }
        }
        let threads = MaskThreads::start(1).unwrap();
        let mut broken = Ahead::new(Box::new(Broken), 2, threads.clone());
        broken.prepare();
        let (mut good, seen) = sums(&threads);
        good.prepare();
        assert_eq!(seen.recv_timeout(Duration::from_secs(20)).unwrap(), "masks-0", "the thread lives");
        assert_eq!(good.mask(), Ok(&[0, 0][..]));
        assert_eq!(broken.mask(), Err("its matcher panicked".into()));
    }

    #[test]
    fn the_threads_end_with_the_last_who_may_give_them_work() {
        let (work, queue) = sync_channel::<Arc<Slot>>(QUEUE);
        let thread = std::thread::spawn(move || serve(&Mutex::new(queue)));
        let (ahead, _seen) = sums(&MaskThreads { work });
        drop(ahead);
        thread.join().unwrap();
    }
}
