//! Memory of this process: how much it has, and a bound on how much more it may take while it parses.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Pages by kind, from `/proc/self/statm`: 0 are all that are mapped, 1 those in memory.
fn pages(column: usize) -> u64 {
    std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(column)?.parse::<u64>().ok())
        .unwrap_or(0)
}

/// Resident bytes of this process.
pub fn resident() -> u64 {
    pages(1) * rustix::param::page_size() as u64
}

/// Runs something that parses what others wrote with at most `more` bytes of address space beyond what the process has. A
/// parser that is led to take more finds no memory: where it can say so that is its error, else the process ends, which is this
/// worker and nothing else.
pub fn bounded<T>(more: u64, parse: impl FnOnce() -> T) -> T {
    struct Restore(Rlimit);
    impl Drop for Restore {
        fn drop(&mut self) {
            let _ = setrlimit(Resource::As, Rlimit { current: self.0.current, maximum: self.0.maximum });
        }
    }
    let before = getrlimit(Resource::As);
    let limit = (pages(0) * rustix::param::page_size() as u64).saturating_add(more);
    let limit = before.current.map_or(limit, |current| current.min(limit));
    let _restore = Restore(before);
    if let Err(error) = setrlimit(Resource::As, Rlimit { current: Some(limit), maximum: before.maximum }) {
        tracing::warn!(%error, "the address space is not bounded while the model's files are parsed");
    }
    parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_parsed_cannot_take_more_than_its_bound() {
        let reserve = |bytes: usize| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
        assert!(reserve(4 << 30), "nothing is bounded before");
        bounded(1 << 30, || assert!(reserve(256 << 20) && !reserve(4 << 30)));
        assert!(reserve(4 << 30), "nor after");
        assert!(resident() > 1 << 20);
    }
}
