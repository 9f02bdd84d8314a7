//! The memory that packed weights stand in.
//!
//! A product reads all of a matrix, and small pages would cost it a look-up every 4 KiB. So matrices stand side by side in a few large
//! stretches for which the system is asked to take large pages; one that has a stretch of its own would have small ones at both
//! its ends.

#![expect(unsafe_code, reason = "parts of one mapping that do not overlap")]

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::{AnyBitPattern, NoUninit};
use memmap2::{MmapMut, MmapOptions};

/// Bytes of a stretch: what is not used of the last one was never touched, and is none.
const STRETCH: usize = 64 << 20;

/// Bytes of a large page.
const PAGE: usize = 2 << 20;

/// Where parts begin.
const LINE: usize = 64;

struct Stretch {
    map: MmapMut,
    /// The first byte on a large page.
    first: usize,
}

/// What is left of the newest stretch.
struct Rest {
    stretch: Arc<Stretch>,
    used: usize,
}

static REST: Mutex<Option<Rest>> = Mutex::new(None);

/// Zeros until they are written.
pub(crate) struct Memory {
    stretch: Arc<Stretch>,
    /// From the stretch's first byte on.
    start: usize,
    len: usize,
}

impl Memory {
    /// # Panics
    /// When the system has no room for them.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        let mut rest = REST.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = bytes.next_multiple_of(LINE);
        if rest.as_ref().is_none_or(|rest| rest.used + whole > rest.stretch.room()) {
            *rest = Some(Rest { stretch: Arc::new(Stretch::of(whole.max(STRETCH))), used: 0 });
        }
        let Some(rest) = &mut *rest else { unreachable!("it was made just now") };
        let start = rest.used;
        rest.used += whole;
        Self { stretch: Arc::clone(&rest.stretch), start, len: bytes }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn values<T: AnyBitPattern>(&self) -> &[T] {
        // SAFETY: this part is within the mapping, which lives as long as `self`, and is no other's.
        bytemuck::cast_slice(unsafe { std::slice::from_raw_parts(self.at(), self.len) })
    }

    pub(crate) fn values_mut<T: AnyBitPattern + NoUninit>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed alone.
        bytemuck::cast_slice_mut(unsafe { std::slice::from_raw_parts_mut(self.at().cast_mut(), self.len) })
    }

    fn at(&self) -> *const u8 {
        self.stretch.map.as_ptr().wrapping_add(self.stretch.first + self.start)
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

impl Stretch {
    fn of(bytes: usize) -> Self {
        let map = MmapOptions::new().len(bytes.next_multiple_of(PAGE) + PAGE).map_anon().expect("room for weights");
        // Slower without, and never wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let first = map.as_ptr().align_offset(PAGE);
        Self { map, first }
    }

    fn room(&self) -> usize {
        self.map.len() - self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_a_large_one_has_a_stretch_of_its_own() {
        let mut parts: Vec<Memory> =
            [1, 63, 64, 65, STRETCH + 1, 5, STRETCH / 2, STRETCH / 2 + 7, 3].map(Memory::zeroed).into();
        for (i, part) in parts.iter_mut().enumerate() {
            assert!(part.at().addr().is_multiple_of(LINE));
            let bytes = part.values_mut::<u8>();
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes.fill(i as u8 + 1);
        }
        for (i, part) in parts.iter().enumerate() {
            assert!(part.values::<u8>().iter().all(|byte| *byte == i as u8 + 1), "part {i}");
        }
    }
}
