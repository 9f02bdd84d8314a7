//! The fixed set of KV blocks and who has them.
//!
//! A sequence reserves every block it can ever need when it is admitted, so a running sequence never
//! waits for memory. [`Blocks`] gives them back when it is dropped and in no other way, so a sequence
//! that ends, however it ends, leaks nothing.

use std::sync::{Arc, Mutex, PoisonError};

use crate::runner::BlockId;

/// All blocks of one runner.
#[derive(Debug)]
pub struct BlockPool {
    free: Arc<Mutex<Vec<BlockId>>>,
    total: usize,
}

/// Blocks of one sequence, in order of position.
#[derive(Debug)]
pub struct Blocks {
    ids: Vec<BlockId>,
    free: Arc<Mutex<Vec<BlockId>>>,
}

impl BlockPool {
    /// A pool of blocks `0..total`, all free.
    pub fn new(total: usize) -> Self {
        let ids = 0..u32::try_from(total).unwrap_or(u32::MAX);
        let free: Vec<_> = ids.rev().map(BlockId).collect();
        Self { total: free.len(), free: Arc::new(Mutex::new(free)) }
    }

    /// Takes `count` blocks, or none where there are fewer.
    pub fn reserve(&self, count: usize) -> Option<Blocks> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = free.len().checked_sub(count)?;
        let mut ids = free.split_off(rest);
        ids.reverse();
        Some(Blocks { ids, free: Arc::clone(&self.free) })
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that someone has.
    pub fn used(&self) -> usize {
        self.total - self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Blocks {
    /// The blocks in order.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.ids.reverse();
        self.free.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.ids);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Any order of reservations and releases: no block has two owners, a refusal is given only for
        /// want of blocks, and at the end all are back.
        #[test]
        fn no_block_leaks_or_has_two_owners(
            total in 0usize..40,
            steps in prop::collection::vec((0usize..12, any::<prop::sample::Index>()), 0..80),
        ) {
            let pool = BlockPool::new(total);
            let mut held: Vec<Blocks> = Vec::new();
            for (count, which) in steps {
                if count % 3 == 0 && !held.is_empty() {
                    held.swap_remove(which.index(held.len()));
                } else {
                    let used = pool.used();
                    match pool.reserve(count) {
                        Some(blocks) => {
                            prop_assert_eq!(blocks.ids().len(), count);
                            held.push(blocks);
                        }
                        None => prop_assert!(count > total - used),
                    }
                }
                let ids: Vec<_> = held.iter().flat_map(Blocks::ids).collect();
                let distinct: HashSet<_> = ids.iter().collect();
                prop_assert_eq!(distinct.len(), ids.len());
                prop_assert!(ids.iter().all(|id| (id.0 as usize) < total));
                prop_assert_eq!(pool.used(), ids.len());
            }
            drop(held);
            prop_assert_eq!(pool.used(), 0);
        }
    }
}
