//! The one connection over which a worker's events come, whichever jobs they are of.
//!
//! A task per channel reads it and passes each event to its [`Relay`]. The connection is opened for the first job and
//! again after it broke; when it ends, all that ran on it is cut off.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use rbee_client::{ChannelStream, ClientError, WorkerClient};
use rbee_service::random_hex;
use rbee_wire::worker::ChannelSeat;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{Mutex, oneshot};

use crate::relay::{Outcome, Relay};

/// What the reading task is asked.
enum Asked {
    Enter(u64, Box<Relay>, oneshot::Sender<Outcome>),
    Leave(u64),
}

/// A worker's channel.
pub struct Channel {
    client: WorkerClient,
    next: AtomicU64,
    open: Mutex<Option<Open>>,
}

#[derive(Clone)]
struct Open {
    id: String,
    /// Bounded by the jobs that the scheduler dispatches to the worker.
    asked: UnboundedSender<Asked>,
}

/// A job's place on a channel; what comes for it after this is dropped is passed over.
pub struct Seat {
    open: Open,
    stream: u64,
    outcome: oneshot::Receiver<Outcome>,
}

impl Channel {
    /// A channel that is yet to be opened.
    pub fn new(client: WorkerClient) -> Self {
        Self { client, next: AtomicU64::new(0), open: Mutex::new(None) }
    }

    /// Calls the worker.
    pub fn client(&self) -> &WorkerClient {
        &self.client
    }

    /// A place for a job whose request is yet to be posted.
    ///
    /// # Errors
    /// When the channel cannot be opened.
    pub async fn enter(&self, relay: Relay) -> Result<Seat, ClientError> {
        let mut place = self.open.lock().await;
        let open = match &*place {
            Some(open) if !open.asked.is_closed() => open.clone(),
            _ => {
                let id = random_hex(16);
                let stream = self.client.channel(&id).await?;
                let (sender, asked) = mpsc::unbounded_channel();
                tokio::spawn(read(stream, asked));
                place.insert(Open { id, asked: sender }).clone()
            }
        };
        drop(place);
        let stream = self.next.fetch_add(1, Ordering::Relaxed);
        let (end, outcome) = oneshot::channel();
        // A channel that ends just now drops what it is asked, and with it `end`.
        let _ = open.asked.send(Asked::Enter(stream, Box::new(relay), end));
        Ok(Seat { open, stream, outcome })
    }
}

impl Seat {
    /// What the worker is to know of it.
    pub fn place(&self) -> ChannelSeat {
        ChannelSeat { id: self.open.id.clone(), stream: self.stream }
    }

    /// Waits for the end of the inference; `None` when the channel ended before it was entered.
    pub async fn outcome(&mut self) -> Option<Outcome> {
        (&mut self.outcome).await.ok()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.open.asked.send(Asked::Leave(self.stream));
    }
}

type Relays = HashMap<u64, (Box<Relay>, oneshot::Sender<Outcome>)>;

fn note(relays: &mut Relays, asked: Asked) {
    match asked {
        Asked::Enter(stream, relay, end) => drop(relays.insert(stream, (relay, end))),
        Asked::Leave(stream) => drop(relays.remove(&stream)),
    }
}

async fn read(mut events: ChannelStream, mut asked: UnboundedReceiver<Asked>) {
    let mut relays = Relays::new();
    let why = loop {
        let batch = tokio::select! {
            biased;
            one = asked.recv() => match one {
                Some(one) => {
                    note(&mut relays, one);
                    continue;
                }
                // The worker is forgotten and nothing runs on it.
                None => return,
            },
            batch = events.next() => batch,
        };
        match batch {
            Some(Ok(batch)) => {
                for (stream, json) in batch.events() {
                    // One that left is passed over.
                    let Some((relay, _)) = relays.get_mut(&stream) else { continue };
                    if let Some(outcome) = relay.take(json).await
                        && let Some((_, end)) = relays.remove(&stream)
                    {
                        let _ = end.send(outcome);
                    }
                }
            }
            Some(Err(ClientError::Protocol { problem, .. })) => break Some(problem),
            Some(Err(_)) | None => break None,
        }
    };
    asked.close();
    while let Some(one) = asked.recv().await {
        note(&mut relays, one);
    }
    for (_, (relay, end)) in relays {
        let _ = end.send(relay.cut_off(why.as_deref()));
    }
}
