//! Ports for daemons of a test: free now, and not handed out to anybody else.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// Below the range from which the system takes ports for outgoing connections: no client of another test can
/// be given one of these between our look and the daemon's start.
const FIRST: u32 = 11_000;
const COUNT: u32 = 20_000;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A loopback address with a port that is free and that this process has not given out lately.
///
/// # Panics
/// When no port is free.
pub fn free() -> SocketAddr {
    // Test programs that run at once start at different places.
    let start = std::process::id().wrapping_mul(7919) % COUNT;
    for _ in 0..COUNT {
        let port = FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port as u16));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
    panic!("no port between {FIRST} and {} is free", FIRST + COUNT);
}

/// Takes a port and answers nobody.
///
/// # Panics
/// When it is taken already.
pub fn hold(address: SocketAddr) -> TcpListener {
    TcpListener::bind(address).unwrap_or_else(|error| panic!("cannot take {address}: {error}"))
}
