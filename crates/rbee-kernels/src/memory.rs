//! The memory that packed weights stand in.

use bytemuck::AnyBitPattern;
use bytemuck::NoUninit;
use memmap2::MmapMut;

/// Zeros until they are written, in pages of their own: large ones where the system gives them, since a product reads all of a
/// matrix and small pages cost it a look-up each.
#[derive(Debug)]
pub(crate) struct Memory(MmapMut);

impl Memory {
    /// # Panics
    /// When the system has no room for them.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        let map = MmapMut::map_anon(bytes).expect("room for weights");
        // Slower without, and never wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self(map)
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn values<T: AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(&self.0)
    }

    pub(crate) fn values_mut<T: AnyBitPattern + NoUninit>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}
