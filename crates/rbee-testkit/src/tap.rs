//! A tap on the line between a client and a daemon: everything passes, and what the client sent is kept.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

/// A tap. Its threads end with the connections.
#[derive(Debug)]
pub struct Tap {
    /// Where clients find it.
    pub address: SocketAddr,
    /// What each connection's client sent.
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Tap {
    /// A tap on who listens there.
    ///
    /// # Panics
    /// When no port is free.
    pub fn new(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let sent = Arc::new(Mutex::new(Vec::new()));
        let kept = sent.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A daemon that does not answer shows as a connection that ends.
                let Ok(daemon) = TcpStream::connect(to) else { continue };
                let place = {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.push(Vec::new());
                    kept.len() - 1
                };
                let (Ok(back_from), Ok(back_to)) = (daemon.try_clone(), client.try_clone()) else { continue };
                std::thread::spawn(move || pass(back_from, back_to, |_| {}));
                let kept = kept.clone();
                std::thread::spawn(move || {
                    pass(client, daemon, |bytes| {
                        kept.lock().unwrap_or_else(PoisonError::into_inner)[place].extend_from_slice(bytes);
                    });
                });
            }
        });
        Self { address, sent }
    }

    /// The `infer` jobs that were posted, in the order of each connection.
    pub fn infer_jobs(&self) -> Vec<Value> {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let start = "{\"operation\":\"infer\"";
        let mut jobs = Vec::new();
        for connection in &*sent {
            let text = String::from_utf8_lossy(connection);
            for (at, _) in text.match_indices(start) {
                jobs.extend(serde_json::Deserializer::from_str(&text[at..]).into_iter().next().and_then(Result::ok));
            }
        }
        jobs
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut seen: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        seen(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
