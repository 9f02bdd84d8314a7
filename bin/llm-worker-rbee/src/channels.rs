//! Channels: connections that carry the events of many inferences.
//!
//! What the tokens of one step give goes out in one write. A channel that is closed cancels its inferences.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures::Stream;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{BoxStream, SelectAll, StreamExt};
use rbee_wire::channel::MAX_ID;
use rbee_wire::{ErrorBody, ErrorCode};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

/// Channels open at once.
const MAX_CHANNELS: usize = 64;

/// Bytes of one write, about.
const PIECE: usize = 64 << 10;

/// An inference's encoded events.
type Events = BoxStream<'static, Bytes>;

/// The open channels.
#[derive(Clone, Default)]
pub struct Channels(Arc<Mutex<HashMap<String, UnboundedSender<Events>>>>);

impl Channels {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, UnboundedSender<Events>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a channel that ends by itself when `ending` is ready and nothing runs on it any more.
    ///
    /// # Errors
    /// For a name that is taken or none, and when there are too many.
    pub fn open(&self, id: &str, ending: BoxFuture<'static, ()>) -> Result<Channel, ErrorBody> {
        if id.is_empty() || id.len() > MAX_ID {
            let message = format!("a channel's name has 1 to {MAX_ID} bytes");
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
        }
        let mut open = self.lock();
        if open.len() >= MAX_CHANNELS {
            return Err(ErrorBody::new(ErrorCode::Overloaded, "too many channels are open"));
        }
        let Entry::Vacant(place) = open.entry(id.to_owned()) else {
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, "this channel is open already"));
        };
        // Bounded by the engine: whatever comes here has been given a place by it.
        let (sender, joining) = mpsc::unbounded_channel();
        place.insert(sender);
        Ok(Channel {
            id: id.to_owned(),
            channels: self.clone(),
            joining,
            running: SelectAll::new(),
            ending,
            ends: false,
        })
    }

    /// Lets an inference's events out over a channel.
    ///
    /// # Errors
    /// When the channel is not open; the inference is dropped with its events.
    pub fn join(&self, id: &str, events: Events) -> Result<(), ErrorBody> {
        let open = self.lock();
        let sent = open.get(id).is_some_and(|channel| channel.send(events).is_ok());
        if sent { Ok(()) } else { Err(ErrorBody::new(ErrorCode::InvalidRequest, "the request's channel is not open")) }
    }
}

/// An open channel as a stream of pieces to write.
pub struct Channel {
    id: String,
    channels: Channels,
    joining: UnboundedReceiver<Events>,
    running: SelectAll<Events>,
    ending: BoxFuture<'static, ()>,
    ends: bool,
}

impl Stream for Channel {
    type Item = Bytes;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while let Poll::Ready(Some(events)) = self.joining.poll_recv(cx) {
            self.running.push(events);
        }
        let mut first: Option<Bytes> = None;
        let mut more = BytesMut::new();
        while more.len() < PIECE
            && let Poll::Ready(Some(bytes)) = self.running.poll_next_unpin(cx)
        {
            match &first {
                None => first = Some(bytes),
                Some(before) => {
                    if more.is_empty() {
                        more.extend_from_slice(before);
                    }
                    more.extend_from_slice(&bytes);
                }
            }
        }
        match first {
            Some(only) if more.is_empty() => return Poll::Ready(Some(only)),
            Some(_) => return Poll::Ready(Some(more.freeze())),
            None => {}
        }
        if !self.ends {
            self.ends = self.ending.poll_unpin(cx).is_ready();
        }
        if self.ends && self.running.is_empty() { Poll::Ready(None) } else { Poll::Pending }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.channels.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use futures::{future, stream};

    use super::*;

    fn said(text: &'static str) -> Events {
        stream::iter([Bytes::from_static(text.as_bytes())]).boxed()
    }

    #[tokio::test]
    async fn what_is_there_goes_out_together_and_the_end_waits_for_the_last() {
        let channels = Channels::default();
        let (end, ending) = tokio::sync::oneshot::channel::<()>();
        let mut channel = channels.open("a", ending.map(drop).boxed()).unwrap();
        for text in ["one\n", "two\n", "three\n"] {
            channels.join("a", said(text)).unwrap();
        }
        let mut lines: Vec<String> =
            String::from_utf8(channel.next().await.unwrap().to_vec()).unwrap().lines().map(str::to_owned).collect();
        lines.sort_unstable();
        assert_eq!(lines, ["one", "three", "two"]);
        let (last, late) = tokio::sync::oneshot::channel::<Bytes>();
        channels.join("a", stream::once(async move { late.await.unwrap() }).boxed()).unwrap();
        assert!(futures::poll!(channel.next()).is_pending());
        end.send(()).unwrap();
        assert!(futures::poll!(channel.next()).is_pending(), "one still runs");
        last.send(Bytes::from_static(b"last\n")).unwrap();
        assert_eq!(channel.next().await.unwrap(), "last\n");
        assert!(channel.next().await.is_none());
    }

    #[tokio::test]
    async fn names_are_taken_once_and_free_again_when_the_channel_is_dropped() {
        let channels = Channels::default();
        let never = || future::pending().boxed();
        let open = channels.open("a", never()).unwrap();
        assert!(channels.open("a", never()).is_err() && channels.open("", never()).is_err());
        assert!(channels.open(&"x".repeat(65), never()).is_err());
        drop(open);
        assert!(channels.join("a", said("x")).is_err(), "nobody would hear it");
        let all: Vec<Channel> = (0..MAX_CHANNELS).map(|i| channels.open(&i.to_string(), never()).unwrap()).collect();
        assert!(channels.open("one more", never()).is_err());
        drop(all);
    }
}
