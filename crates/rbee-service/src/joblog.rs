//! A job's log: its events as encoded frames in one buffer, and listeners that are cursors into it.
//!
//! A listener never slows the job: the job appends and wakes, the listener copies when its connection takes more.
//! Frames that have come since are one piece, so that a listener that is behind catches up in one write.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures::Stream;
use rbee_wire::{Event, sse};

/// Most bytes that a listener is given at once.
const PIECE: usize = 16 << 10;

/// A job's log; share it in an `Arc`.
#[derive(Debug, Default)]
pub struct JobLog(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Frames, one after the other.
    frames: Vec<u8>,
    /// Where each event's frame ends.
    ends: Vec<u32>,
    /// Whether the end mark is written.
    over: bool,
    /// Whether the log breaks off: listeners must not take its end for a good one.
    broken: bool,
    listeners: Vec<Option<Waker>>,
    free: Vec<usize>,
}

impl JobLog {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an event and gives its offset; `None` when the job is over already. An event that is the end is followed
    /// by the end mark.
    pub fn push(&self, event: &Event) -> Option<u64> {
        let json = serde_json::to_vec(event).expect("wire types serialize to JSON");
        self.push_json(&json, event.is_end())
    }

    /// Appends an event that is encoded already; it must be one line.
    pub fn push_json(&self, json: &[u8], is_end: bool) -> Option<u64> {
        let mut inner = self.lock();
        if inner.over {
            return None;
        }
        let id = inner.ends.len() as u64;
        sse::write_event(&mut inner.frames, id, json);
        let end = u32::try_from(inner.frames.len()).ok()?;
        inner.ends.push(end);
        if is_end {
            sse::write_done(&mut inner.frames);
            inner.frames.shrink_to_fit();
            inner.over = true;
        }
        wake(inner);
        Some(id)
    }

    /// Ends all listeners without an end mark, as a daemon that dies does.
    pub fn break_off(&self) {
        let mut inner = self.lock();
        inner.broken = true;
        wake(inner);
    }

    /// Whether the job is over.
    pub fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        self.lock().ends.len() as u64
    }

    /// Bytes the log holds.
    pub fn bytes(&self) -> usize {
        let inner = self.lock();
        inner.frames.capacity() + inner.ends.capacity() * 4
    }

    /// Listeners now.
    pub fn listeners(&self) -> u64 {
        let inner = self.lock();
        (inner.listeners.len() - inner.free.len()) as u64
    }

    /// The log from its beginning, or from the event after an offset, until the end mark. `left` is called when the
    /// listener goes.
    pub fn listen(self: &Arc<Self>, after: Option<u64>, left: impl FnOnce() + Send + 'static) -> Listener {
        let mut inner = self.lock();
        let at = match after {
            None => 0,
            // An offset beyond the last event waits for the ones after it.
            Some(after) => usize::try_from(after)
                .ok()
                .and_then(|after| inner.ends.get(after))
                .map_or(inner.ends.last().copied().unwrap_or(0), |end| *end) as usize,
        };
        let place = match inner.free.pop() {
            Some(place) => place,
            None => {
                inner.listeners.push(None);
                inner.listeners.len() - 1
            }
        };
        Listener { log: Arc::clone(self), at, place, left: Some(Box::new(left)) }
    }
}

fn wake(mut inner: MutexGuard<'_, Inner>) {
    match &mut inner.listeners[..] {
        [] => {}
        [only] => {
            let waker = only.take();
            drop(inner);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        many => {
            let wakers: Vec<Waker> = many.iter_mut().filter_map(Option::take).collect();
            drop(inner);
            wakers.into_iter().for_each(Waker::wake);
        }
    }
}

/// A log that breaks off.
#[derive(Debug)]
pub struct BrokeOff;

impl std::fmt::Display for BrokeOff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the job's log breaks off")
    }
}

impl std::error::Error for BrokeOff {}

/// A cursor into a log.
pub struct Listener {
    log: Arc<JobLog>,
    at: usize,
    place: usize,
    left: Option<Box<dyn FnOnce() + Send>>,
}

impl Stream for Listener {
    type Item = Result<Bytes, BrokeOff>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let log = Arc::clone(&self.log);
        let mut inner = log.lock();
        if self.at < inner.frames.len() {
            let end = inner.frames.len().min(self.at + PIECE);
            let piece = Bytes::copy_from_slice(&inner.frames[self.at..end]);
            self.at = end;
            return Poll::Ready(Some(Ok(piece)));
        }
        if inner.over {
            return Poll::Ready(None);
        }
        if inner.broken {
            return Poll::Ready(Some(Err(BrokeOff)));
        }
        match &mut inner.listeners[self.place] {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut inner = self.log.lock();
        inner.listeners[self.place] = None;
        inner.free.push(self.place);
        drop(inner);
        if let Some(left) = self.left.take() {
            left();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use rbee_wire::event::{Done, NoteLevel};
    use rbee_wire::sse::{Decoder, Frame};

    use super::*;

    fn note(i: usize) -> Event {
        Event::note(NoteLevel::Info, format!("note {i}"))
    }

    async fn read(listener: Listener) -> Vec<u8> {
        listener
            .map(|piece| piece.unwrap())
            .fold(Vec::new(), |mut all, piece| async move {
                all.extend_from_slice(&piece);
                all
            })
            .await
    }

    #[tokio::test]
    async fn every_listener_gets_the_same_bytes_from_wherever_it_begins() {
        let log = Arc::new(JobLog::default());
        let early = tokio::spawn(read(log.listen(None, || ())));
        for i in 0..2000 {
            log.push(&note(i));
            if i % 100 == 0 {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(log.push(&Event::Done(Done::default())), Some(2000));
        assert_eq!(log.push(&note(1)), None, "nothing follows the end");
        let whole = early.await.unwrap();
        assert_eq!(read(log.listen(None, || ())).await, whole);
        for after in [0u64, 1, 999, 1999, 2000, 5000] {
            let mut frames = Vec::new();
            Decoder::new(1 << 20)
                .feed(&read(log.listen(Some(after), || ())).await, |frame| frames.push(frame))
                .unwrap();
            let want: Vec<Option<u64>> = (after + 1..=2000).map(Some).chain([None]).collect();
            assert_eq!(frames.iter().map(|frame: &Frame| frame.id).collect::<Vec<_>>(), want, "after {after}");
        }
        assert_eq!(log.listeners(), 0);
    }

    #[tokio::test]
    async fn a_log_that_breaks_off_is_an_error_to_its_listeners() {
        let log = Arc::new(JobLog::default());
        log.push(&note(0));
        let mut listener = log.listen(None, || ());
        assert!(listener.next().await.unwrap().is_ok());
        log.break_off();
        assert!(listener.next().await.unwrap().is_err());
    }
}
