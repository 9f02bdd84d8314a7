//! Bounded, level-triggered waits: what is waited for is looked at until it holds, never slept for.

use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How long a test waits for something that is promised within `promise`: five times that, since the
/// machine that tests may be busy with much else.
pub const fn patience(promise: Duration) -> Duration {
    promise.saturating_mul(5)
}

/// Looks until it sees what it wants, and returns it.
///
/// # Panics
/// When that does not come within `limit`; the message has what the last look saw instead.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        match look() {
            Ok(value) => return value,
            Err(status) if began.elapsed() >= limit => {
                panic!("waited {:.1} s for {what}; last seen: {status}", limit.as_secs_f64())
            }
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}
