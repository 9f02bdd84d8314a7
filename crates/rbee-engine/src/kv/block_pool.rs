//! The fixed set of KV blocks: who has them, and what the full ones hold.
//!
//! A block may have several owners: sequences that begin alike share the blocks of their beginning. A full block is found
//! by what is in it and in all blocks before it, exactly and not by a hash: its key is its own tokens and the block before
//! it, and the first one's is the tenant's [`Root`]. A block that nobody has but that holds something is kept until its
//! space is needed; those that were given back longest ago go first, the later of one sequence before the earlier.
//!
//! [`Blocks`] gives its blocks back when it is dropped and in no other way, so a sequence that ends, however it ends, leaks
//! nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::runner::{BlockId, Regime, TokenId};

/// What keeps texts apart that begin alike: nothing computed under one root is ever found under another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Root {
    /// Whose text it is.
    pub tenant: [u8; 16],
    /// The regime it is computed in.
    pub regime: Regime,
}

/// What a block's content follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Before {
    /// Nothing.
    Root(Root),
    /// The content of this serial number.
    Content(u64),
}

/// What a full block holds: its tokens, and what they follow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    before: Before,
    tokens: Box<[TokenId]>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Blocks that hold nothing and that nobody has.
    free: Vec<BlockId>,
    owners: Vec<u32>,
    /// The key of each block that can be found.
    held: Vec<Option<Key>>,
    /// Blocks that can be found and that nobody has, by when they were given back.
    idle: BTreeMap<u64, BlockId>,
    /// When an idle block was given back.
    since: Vec<u64>,
    /// Each content with its block and its serial number, which is never used again.
    found: HashMap<Key, (BlockId, u64)>,
    clock: u64,
    serials: u64,
}

/// All blocks of one runner; clones are the same.
#[derive(Clone, Debug)]
pub struct BlockPool(Arc<Mutex<Inner>>);

/// Blocks of one sequence, in order of position.
#[derive(Debug)]
pub struct Blocks {
    ids: Vec<BlockId>,
    pool: BlockPool,
}

impl BlockPool {
    /// A pool of blocks `0..total`, all free.
    pub fn new(total: usize) -> Self {
        let ids = 0..u32::try_from(total).unwrap_or(u32::MAX);
        let free: Vec<_> = ids.rev().map(BlockId).collect();
        let total = free.len();
        let inner =
            Inner { free, owners: vec![0; total], held: vec![None; total], since: vec![0; total], ..Inner::default() };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sequence's blocks: as many as hold the beginning of `tokens` already, at most `most` of them. Gives the serial
    /// number of each one's content too.
    pub fn find(&self, root: Root, tokens: &[TokenId], size: usize, most: usize) -> (Blocks, Vec<u64>) {
        let mut inner = self.lock();
        let (mut ids, mut serials, mut before) = (Vec::new(), Vec::new(), Before::Root(root));
        for tokens in tokens.chunks_exact(size).take(most) {
            let Some(&(id, serial)) = inner.found.get(&Key { before, tokens: tokens.into() }) else { break };
            inner.take(id);
            ids.push(id);
            serials.push(serial);
            before = Before::Content(serial);
        }
        drop(inner);
        (Blocks { ids, pool: self.clone() }, serials)
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.lock().owners.len()
    }

    /// Blocks that someone has.
    pub fn used(&self) -> usize {
        let inner = self.lock();
        inner.owners.len() - inner.free.len() - inner.idle.len()
    }

    /// Blocks that nobody has but that hold something.
    pub fn cached(&self) -> usize {
        self.lock().idle.len()
    }
}

impl Inner {
    fn take(&mut self, id: BlockId) {
        let at = id.0 as usize;
        if self.owners[at] == 0 {
            self.idle.remove(&self.since[at]);
        }
        self.owners[at] += 1;
    }

    fn give_back(&mut self, id: BlockId) {
        let at = id.0 as usize;
        self.owners[at] -= 1;
        if self.owners[at] > 0 {
            return;
        }
        if self.held[at].is_some() {
            self.clock += 1;
            self.since[at] = self.clock;
            self.idle.insert(self.clock, id);
        } else {
            self.free.push(id);
        }
    }

    /// An empty block, if need be one that held something.
    fn empty(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.idle.pop_first()?;
                if let Some(key) = self.held[id.0 as usize].take() {
                    self.found.remove(&key);
                }
                id
            }
        };
        self.owners[id.0 as usize] = 1;
        Some(id)
    }
}

impl Blocks {
    /// The blocks in order.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Takes empty blocks until there are `count`, or none at all where there are fewer.
    pub fn grow(&mut self, count: usize) -> bool {
        let Some(more) = count.checked_sub(self.ids.len()) else { return true };
        let mut inner = self.pool.lock();
        if inner.free.len() + inner.idle.len() < more {
            return false;
        }
        self.ids.extend((0..more).map_while(|_| inner.empty()));
        true
    }

    /// Makes block `i`, which is full now, known by its content; gives the content's serial number. Where another block
    /// holds the same already, that one stays the one to be found.
    pub fn publish(&self, i: usize, before: Before, tokens: &[TokenId]) -> u64 {
        let mut inner = self.pool.lock();
        let key = Key { before, tokens: tokens.into() };
        if let Some((_, serial)) = inner.found.get(&key) {
            return *serial;
        }
        inner.serials += 1;
        let serial = inner.serials;
        let id = self.ids[i];
        inner.held[id.0 as usize] = Some(key.clone());
        inner.found.insert(key, (id, serial));
        serial
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let mut inner = self.pool.lock();
        // The last first, so that it is also the first to go.
        for id in self.ids.drain(..).rev() {
            inner.give_back(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 2;

    fn root(tenant: u8) -> Root {
        Root { tenant: [tenant; 16], regime: Regime::Usual }
    }

    /// A sequence of these tokens: what is found, and the rest filled and published.
    fn text(pool: &BlockPool, root: Root, tokens: &[TokenId]) -> Option<(usize, Blocks)> {
        let (mut blocks, mut serials) = pool.find(root, tokens, SIZE, usize::MAX);
        let found = serials.len();
        if !blocks.grow(tokens.len().div_ceil(SIZE)) {
            return None;
        }
        for (i, chunk) in tokens.chunks_exact(SIZE).enumerate().skip(found) {
            let before = serials.last().map_or(Before::Root(root), |serial| Before::Content(*serial));
            serials.push(blocks.publish(i, before, chunk));
        }
        Some((found, blocks))
    }

    proptest! {
        /// Any order of texts and ends: what is found holds what it should, an empty block has one owner, a refusal is
        /// given only for want of blocks, and at the end nobody has any.
        #[test]
        fn no_block_leaks_or_holds_what_it_should_not(
            total in 0usize..24,
            steps in prop::collection::vec((0u8..2, prop::collection::vec(0u32..2, 0..12), any::<prop::sample::Index>()), 0..60),
        ) {
            let pool = BlockPool::new(total);
            let mut content: HashMap<BlockId, (u8, Vec<TokenId>)> = HashMap::new();
            let mut held: Vec<Blocks> = Vec::new();
            for (tenant, tokens, which) in steps {
                if tokens.len() % 3 == 0 && !held.is_empty() {
                    held.swap_remove(which.index(held.len()));
                    continue;
                }
                let (used, idle) = (pool.used(), pool.cached());
                prop_assert!(used + idle <= total);
                let Some((found, blocks)) = text(&pool, root(tenant), &tokens) else {
                    prop_assert!(tokens.len().div_ceil(SIZE) > total - used, "there was room");
                    continue;
                };
                for (i, id) in blocks.ids().iter().enumerate() {
                    let end = tokens.len().min((i + 1) * SIZE);
                    let whole = (tenant, tokens[..end].to_vec());
                    if i < found {
                        prop_assert_eq!(&content[id], &whole, "a block of another text");
                    } else {
                        prop_assert!(held.iter().all(|other| !other.ids().contains(id)), "an empty block has an owner");
                        content.insert(*id, whole);
                    }
                }
                held.push(blocks);
            }
            drop(held);
            prop_assert_eq!(pool.used(), 0);
        }
    }

    #[test]
    fn what_was_given_back_longest_ago_goes_first_and_the_end_of_a_text_before_its_beginning() {
        let pool = BlockPool::new(4);
        drop(text(&pool, root(0), &[1, 1, 2, 2]).unwrap());
        drop(text(&pool, root(0), &[3, 3, 4, 4]).unwrap());
        assert_eq!((pool.used(), pool.cached()), (0, 4));
        let found = |tokens: &[TokenId]| pool.find(root(0), tokens, SIZE, 9).1.len();
        let (_, _one) = text(&pool, root(0), &[9]).unwrap();
        assert_eq!((found(&[1, 1, 2, 2]), found(&[3, 3, 4, 4])), (1, 2));
        assert_eq!(pool.find(root(0), &[3, 3, 4, 4], SIZE, 1).1.len(), 1, "no more than asked for");
        assert_eq!(pool.find(root(1), &[3, 3], SIZE, 9).1.len(), 0, "another tenant's");
        let long = Root { regime: Regime::Long, ..root(0) };
        assert_eq!(pool.find(long, &[3, 3], SIZE, 9).1.len(), 0, "another regime's");
    }
}
