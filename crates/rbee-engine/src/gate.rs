//! How much the engine has taken on. One word holds the count and whether the gate is shut, so a
//! caller on any thread gets its answer at once and a drained engine is known to stay drained.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Overloaded;

const SHUT: usize = 1 << (usize::BITS - 1);
const DEAD: usize = 1 << (usize::BITS - 2);
const COUNT: usize = DEAD - 1;

/// Places for choices: slots and queue together.
#[derive(Debug)]
pub(crate) struct Gate {
    state: AtomicUsize,
    capacity: usize,
}

impl Gate {
    pub(crate) fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self { state: AtomicUsize::new(0), capacity })
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Choices taken on and not ended.
    pub(crate) fn live(&self) -> usize {
        self.state.load(Ordering::SeqCst) & COUNT
    }

    /// Shut and empty: nothing is here and nothing can come.
    pub(crate) fn is_drained(&self) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        state & SHUT != 0 && state & COUNT == 0
    }

    pub(crate) fn shut(&self) {
        self.state.fetch_or(SHUT, Ordering::SeqCst);
    }

    pub(crate) fn shut_dead(&self) {
        self.state.fetch_or(SHUT | DEAD, Ordering::SeqCst);
    }

    /// Takes `choices` places, or all there are where a request has more choices than that: it then
    /// runs its choices in turn.
    pub(crate) fn acquire(self: &Arc<Self>, choices: usize) -> Result<Permit, Overloaded> {
        let wanted = choices.clamp(1, self.capacity);
        let taken = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |state| {
            (state & SHUT == 0 && state + wanted <= self.capacity).then(|| state + wanted)
        });
        match taken {
            Ok(_) => Ok(Permit { gate: Arc::clone(self), held: wanted }),
            Err(state) if state & DEAD != 0 => Err(Overloaded::Dead),
            Err(state) if state & SHUT != 0 => Err(Overloaded::Draining),
            Err(state) => Err(Overloaded::Full { live: state, capacity: self.capacity }),
        }
    }
}

/// Places held by one request; given back as its choices end, all of them on drop.
#[derive(Debug)]
pub(crate) struct Permit {
    gate: Arc<Gate>,
    held: usize,
}

impl Permit {
    /// Gives back what more than `needed` places are held.
    pub(crate) fn shrink_to(&mut self, needed: usize) {
        let surplus = self.held.saturating_sub(needed);
        self.gate.state.fetch_sub(surplus, Ordering::SeqCst);
        self.held -= surplus;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}
