//! What was made lately, up to so many bytes; what was used longest ago goes first.

use std::collections::HashMap;

/// Values by their keys; see the module.
pub(super) struct Cache<V> {
    entries: HashMap<String, Entry<V>>,
    bytes: usize,
    most: usize,
    /// Counts the uses.
    clock: u64,
}

struct Entry<V> {
    value: V,
    bytes: usize,
    used: u64,
}

impl<V: Clone> Cache<V> {
    /// A cache of at most so many bytes, keys included.
    pub(super) fn new(most: usize) -> Self {
        Self { entries: HashMap::new(), bytes: 0, most, clock: 0 }
    }

    /// The value of this key, which is then the one used last.
    pub(super) fn get(&mut self, key: &str) -> Option<V> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(entry.value.clone())
    }

    /// Keeps a value of so many bytes, if it is not larger than all there may be.
    pub(super) fn put(&mut self, key: String, value: V, bytes: usize) {
        let bytes = bytes.saturating_add(key.len());
        self.remove(&key);
        if bytes > self.most {
            return;
        }
        while self.bytes + bytes > self.most
            && let Some(oldest) = self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone())
        {
            self.remove(&oldest);
        }
        self.clock += 1;
        self.bytes += bytes;
        self.entries.insert(key, Entry { value, bytes, used: self.clock });
    }

    fn remove(&mut self, key: &str) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_goes_when_there_is_no_room() {
        let mut cache = Cache::new(100);
        for key in ["a", "b", "c"] {
            cache.put(key.into(), key, 29);
        }
        assert_eq!(cache.get("a"), Some("a"));
        cache.put("d".into(), "d", 29);
        let there = ["a", "b", "c", "d"].map(|key| cache.get(key).is_some());
        assert_eq!((there, cache.bytes), ([true, false, true, true], 90));
        cache.put("a".into(), "A", 60);
        assert_eq!((cache.get("a"), cache.get("c"), cache.get("d")), (Some("A"), None, Some("d")));
        // What is larger than all is not kept, and its forerunner neither.
        cache.put("a".into(), "x", 100);
        assert_eq!((cache.get("a"), cache.get("d"), cache.bytes), (None, Some("d"), 30));
    }
}
