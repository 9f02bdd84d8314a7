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

/// Everybody that is active; see the module.
#[derive(Debug, Default)]
pub struct Workers {
    all: BTreeMap<Number, Worker>,
    by_id: HashMap<WorkerId, Number>,
    by_model: BTreeMap<ModelRef, BTreeSet<Number>>,
    /// Those that take no new jobs so that their memory comes free.
    closed: BTreeSet<WorkerId>,
    touched: Vec<ModelRef>,
    next: Number,
}

impl Workers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is nobody.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// In order of registration.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.all.values()
    }

    /// A worker by its id.
    pub fn get(&self, id: &WorkerId) -> Option<&Worker> {
        self.all.get(self.by_id.get(id)?)
    }

    /// Those of a model, whatever their state, in order of registration.
    pub fn of_model(&self, model: &ModelRef) -> impl Iterator<Item = &Worker> {
        self.by_model.get(model).into_iter().flatten().filter_map(|number| self.all.get(number))
    }

    /// The models that somebody has, in their own order.
    pub fn models(&self) -> impl Iterator<Item = &ModelRef> {
        self.by_model.keys()
    }

    /// Changes a worker in what no index hangs on.
    pub(crate) fn change<T>(&mut self, id: &WorkerId, how: impl FnOnce(&mut Worker) -> T) -> Option<T> {
        let worker = self.all.get_mut(self.by_id.get(id)?)?;
        let changed = how(worker);
        touch(&mut self.touched, &worker.beat.model);
        Some(changed)
    }

    /// Takes a worker in: at the end, or in the place of the one of that id.
    pub(crate) fn put(&mut self, worker: Worker) {
        let (id, model) = (worker.beat.worker_id.clone(), worker.beat.model.clone());
        let number = match self.by_id.get(&id) {
            Some(number) => *number,
            None => {
                self.next += 1;
                self.by_id.insert(id, self.next);
                self.next
            }
        };
        touch(&mut self.touched, &model);
        if let Some(before) = self.all.insert(number, worker)
            && before.beat.model != model
        {
            self.forget_model(&before.beat.model, number);
        }
        // Looked for first: nearly always it is there, and an entry would copy the name.
        match self.by_model.get_mut(&model) {
            Some(numbers) => drop(numbers.insert(number)),
            None => drop(self.by_model.insert(model, BTreeSet::from([number]))),
        }
    }

    /// Takes a worker out.
    pub(crate) fn remove(&mut self, id: &WorkerId) -> Option<Worker> {
        let number = self.by_id.remove(id)?;
        let worker = self.all.remove(&number)?;
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
        self.all.values_mut().for_each(|worker| worker.extend(by));
    }

    /// As if everybody had just been heard.
    pub(crate) fn hear_all(&mut self, now: Duration) {
        self.all.values_mut().for_each(|worker| worker.heard = worker.heard.max(now));
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
