//! The workers, found by id and by model, in order of registration.
//!
//! Whoever changes a worker wakes the jobs that wait for its model: every change goes through here, and leaves its model among
//! [`Workers::touched`]. So no event has to know whom it may have helped.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use rbee_wire::{ModelRef, WorkerId};

use crate::registry::Worker;

/// Place in the order of registration; never given twice.
type Number = u64;
/// Where a worker lies.
type At = usize;

/// Everybody that is active; see the module.
#[derive(Debug, Default)]
pub struct Workers {
    /// Side by side: a decision may look at hundreds.
    all: Vec<Option<Worker>>,
    /// Places in `all` that nobody has.
    free: Vec<At>,
    in_order: BTreeMap<Number, At>,
    by_id: HashMap<WorkerId, (Number, At)>,
    by_model: BTreeMap<ModelRef, BTreeMap<Number, At>>,
    /// Those that take no new jobs so that their memory comes free.
    closed: BTreeSet<WorkerId>,
    touched: Vec<ModelRef>,
    next: Number,
}

impl Workers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.in_order.len()
    }

    /// Whether there is nobody.
    pub fn is_empty(&self) -> bool {
        self.in_order.is_empty()
    }

    /// In order of registration.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.in_order.values().filter_map(|at| self.all[*at].as_ref())
    }

    /// A worker by its id.
    pub fn get(&self, id: &WorkerId) -> Option<&Worker> {
        self.all[self.by_id.get(id)?.1].as_ref()
    }

    /// Those of a model, whatever their state, in order of registration.
    pub fn of_model(&self, model: &ModelRef) -> impl Iterator<Item = &Worker> {
        self.by_model.get(model).into_iter().flat_map(BTreeMap::values).filter_map(|at| self.all[*at].as_ref())
    }

    /// The models that somebody has, in their own order.
    pub fn models(&self) -> impl Iterator<Item = &ModelRef> {
        self.by_model.keys()
    }

    /// Changes a worker in what no index hangs on.
    pub(crate) fn change<T>(&mut self, id: &WorkerId, how: impl FnOnce(&mut Worker) -> T) -> Option<T> {
        let worker = self.all[self.by_id.get(id)?.1].as_mut()?;
        let changed = how(worker);
        touch(&mut self.touched, &worker.beat.model);
        Some(changed)
    }

    /// Takes a worker in: at the end, or in the place of the one of that id.
    pub(crate) fn put(&mut self, worker: Worker) {
        let (id, model) = (worker.beat.worker_id.clone(), worker.beat.model.clone());
        let (number, at) = match self.by_id.get(&id) {
            Some(known) => *known,
            None => {
                self.next += 1;
                let at = self.free.pop().unwrap_or(self.all.len());
                if at == self.all.len() {
                    self.all.push(None);
                }
                self.in_order.insert(self.next, at);
                self.by_id.insert(id, (self.next, at));
                (self.next, at)
            }
        };
        touch(&mut self.touched, &model);
        if let Some(before) = self.all[at].replace(worker)
            && before.beat.model != model
        {
            self.forget_model(&before.beat.model, number);
        }
        // Looked for first: nearly always it is there, and an entry would copy the name.
        match self.by_model.get_mut(&model) {
            Some(numbers) => drop(numbers.insert(number, at)),
            None => drop(self.by_model.insert(model, BTreeMap::from([(number, at)]))),
        }
    }

    /// Takes a worker out.
    pub(crate) fn remove(&mut self, id: &WorkerId) -> Option<Worker> {
        let (number, at) = self.by_id.remove(id)?;
        self.in_order.remove(&number);
        self.free.push(at);
        let worker = self.all[at].take()?;
        self.closed.remove(id);
        self.forget_model(&worker.beat.model, number);
        Some(worker)
    }

    fn forget_model(&mut self, model: &ModelRef, number: Number) {
        touch(&mut self.touched, model);
        if let Some(numbers) = self.by_model.get_mut(model) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_model.remove(model);
            }
        }
    }

    /// Whether a worker takes new jobs of those who do not name it.
    pub(crate) fn close(&mut self, id: &WorkerId) {
        if self.change(id, |worker| worker.closed = true).is_some() {
            self.closed.insert(id.clone());
        }
    }

    /// Lets those that were closed and are not wanted any more take jobs again.
    pub(crate) fn reopen(&mut self, wanted: impl Fn(&Worker) -> bool) {
        let free = |id: &&WorkerId| self.get(id).is_none_or(|worker| !wanted(worker));
        let free: Vec<WorkerId> = self.closed.iter().filter(free).cloned().collect();
        for id in free {
            self.closed.remove(&id);
            self.change(&id, |worker| worker.closed = false);
        }
    }

    /// Nobody could be heard for so long.
    pub(crate) fn extend(&mut self, by: Duration) {
        self.all.iter_mut().flatten().for_each(|worker| worker.extend(by));
    }

    /// As if everybody had just been heard.
    pub(crate) fn hear_all(&mut self, now: Duration) {
        self.all.iter_mut().flatten().for_each(|worker| worker.heard = worker.heard.max(now));
    }

    /// The models of those that changed since this was asked last.
    pub(crate) fn touched(&mut self) -> Vec<ModelRef> {
        std::mem::take(&mut self.touched)
    }
}

/// Notes a model; the same one twice in a row is common.
fn touch(touched: &mut Vec<ModelRef>, model: &ModelRef) {
    if touched.last() != Some(model) {
        touched.push(model.clone());
    }
}
