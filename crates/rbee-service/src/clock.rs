//! Time and randomness for the pure cores.

use std::time::{Duration, Instant};

/// A monotonic clock that starts at zero.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Time since the clock was made.
    pub fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// So many random bytes of the operating system as hexadecimal text. 16 bytes make an id that cannot be guessed.
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0u8; bytes];
    let mut filled = 0;
    while filled < bytes {
        match rustix::rand::getrandom(&mut buffer[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => unreachable!("Linux always has random bytes once it is up: {error}"),
        }
    }
    buffer.iter().map(|byte| format!("{byte:02x}")).collect()
}
