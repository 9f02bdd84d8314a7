//! The jobs that wait, in classes of equal wants.
//!
//! Whether a job can be placed, and what it waits for, depends on its class alone. So an event looks at the head of each class that
//! it may have helped, and at nobody behind a head that cannot go. Within a class each owner has a line of his own, by age; whose
//! turn it is depends on how much of each owner runs, which changes with every dispatch and is looked up, never stored.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use rbee_wire::worker::LoadProgress;
use rbee_wire::{JobId, KeyId, ModelRef, WorkerId};

use crate::{LoadKey, Purpose};

/// What all jobs of a class want.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    pub(crate) load: LoadKey,
    pub(crate) worker: Option<WorkerId>,
    pub(crate) purpose: Purpose,
    pub(crate) no_load: Option<&'static str>,
}

/// A class's name while somebody is in it.
pub(crate) type ClassId = u64;
/// A job's place among all that ever came.
pub(crate) type Age = u64;
/// An owner's place in [`Owners`].
pub(crate) type OwnerAt = usize;

/// Whose jobs there are, and how many of them run.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    at: HashMap<Option<KeyId>, OwnerAt>,
    all: Vec<Owner>,
    free: Vec<OwnerAt>,
}

#[derive(Debug, Default)]
struct Owner {
    key: Option<KeyId>,
    jobs: usize,
    running: usize,
}

impl Owners {
    /// A job of this owner has come.
    pub(crate) fn enter(&mut self, key: &Option<KeyId>) -> OwnerAt {
        let at = match self.at.get(key) {
            Some(at) => *at,
            None => {
                let at = self.free.pop().unwrap_or(self.all.len());
                if at == self.all.len() {
                    self.all.push(Owner::default());
                }
                self.all[at] = Owner { key: key.clone(), ..Owner::default() };
                self.at.insert(key.clone(), at);
                at
            }
        };
        self.all[at].jobs += 1;
        at
    }

    /// A job of this owner has ended.
    pub(crate) fn leave(&mut self, at: OwnerAt) {
        let owner = &mut self.all[at];
        owner.jobs -= 1;
        if owner.jobs == 0 {
            self.at.remove(&owner.key);
            self.free.push(at);
        }
    }

    /// How many jobs of an owner wait.
    pub(crate) fn waiting(&self, key: &Option<KeyId>) -> usize {
        self.at.get(key).map_or(0, |at| self.all[*at].jobs - self.all[*at].running)
    }

    pub(crate) fn start(&mut self, at: OwnerAt) {
        self.all[at].running += 1;
    }

    pub(crate) fn stop(&mut self, at: OwnerAt) {
        self.all[at].running -= 1;
    }
}

/// A job in its line.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) age: Age,
    pub(crate) since: Duration,
    pub(crate) id: JobId,
}

/// What those of a class were told last.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Standing {
    #[default]
    Nothing,
    Queued,
    Loading(Option<LoadProgress>),
}

/// Jobs of equal wants.
#[derive(Debug)]
pub(crate) struct Class {
    pub(crate) kind: Kind,
    pub(crate) standing: Standing,
    lines: BTreeMap<OwnerAt, VecDeque<Entry>>,
    /// Who came, or came back, since the class was told how it stands.
    fresh: Vec<(OwnerAt, Age)>,
}

impl Class {
    /// Everybody, an owner after the other, each owner's own by age.
    pub(crate) fn lines(&self) -> impl Iterator<Item = &VecDeque<Entry>> {
        self.lines.values()
    }

    /// Who is next, by how much of his owner runs and by age.
    fn head(&self, owners: &Owners) -> Option<(usize, Age, &JobId)> {
        let fronts = self.lines.iter().filter_map(|(at, line)| Some((owners.all[*at].running, line.front()?)));
        let (running, entry) = fronts.min_by_key(|(running, entry)| (*running, entry.age))?;
        Some((running, entry.age, &entry.id))
    }

    /// The first so many in the order of their turns, as if one after the other were dispatched.
    pub(crate) fn turns(&self, owners: &Owners, most: usize) -> Vec<JobId> {
        let front = |(at, line): (&OwnerAt, &VecDeque<Entry>)| {
            Some(Reverse((owners.all[*at].running, line.front()?.age, *at, 0)))
        };
        let mut next: BinaryHeap<_> = self.lines.iter().filter_map(front).collect();
        let mut turns = Vec::new();
        while turns.len() < most
            && let Some(Reverse((running, _, at, index))) = next.pop()
        {
            let line = &self.lines[&at];
            turns.push(line[index].id.clone());
            if let Some(entry) = line.get(index + 1) {
                next.push(Reverse((running + 1, entry.age, at, index + 1)));
            }
        }
        turns
    }

    /// How many of the class have their turn before this one.
    fn position(&self, owners: &Owners, owner: OwnerAt, age: Age) -> Option<(usize, &JobId)> {
        let line = self.lines.get(&owner)?;
        let index = line.binary_search_by_key(&age, |entry| entry.age).ok()?;
        let turn = owners.all[owner].running + index;
        let before = |(at, line): (&OwnerAt, &VecDeque<Entry>)| {
            let Some(sooner) = turn.checked_sub(owners.all[*at].running) else { return 0 };
            let older = line.get(sooner).is_some_and(|entry| entry.age < age);
            sooner.min(line.len()) + usize::from(older)
        };
        let others = self.lines.iter().filter(|(at, _)| **at != owner).map(before);
        Some((index + others.sum::<usize>(), &line[index].id))
    }

    /// Takes those who are new, with their positions.
    pub(crate) fn fresh(&mut self, owners: &Owners) -> Vec<(usize, JobId)> {
        let fresh = std::mem::take(&mut self.fresh);
        let place = |(owner, age)| self.position(owners, owner, age).map(|(position, id)| (position, id.clone()));
        fresh.into_iter().filter_map(place).collect()
    }
}

/// Everybody who waits; see the module.
#[derive(Debug, Default)]
pub(crate) struct Line {
    pub(crate) owners: Owners,
    classes: BTreeMap<ClassId, Class>,
    by_kind: HashMap<Kind, ClassId>,
    by_model: HashMap<ModelRef, BTreeSet<ClassId>>,
    woken: BTreeSet<ClassId>,
    len: usize,
    next: ClassId,
}

impl Line {
    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A job waits, before all of its class and owner who are younger.
    pub(crate) fn enter(&mut self, kind: Kind, owner: OwnerAt, entry: Entry) -> ClassId {
        let at = match self.by_kind.get(&kind) {
            Some(at) => *at,
            None => {
                self.next += 1;
                self.by_model.entry(kind.load.model.clone()).or_default().insert(self.next);
                self.by_kind.insert(kind.clone(), self.next);
                let class = Class { kind, standing: Standing::Nothing, lines: BTreeMap::new(), fresh: Vec::new() };
                self.classes.insert(self.next, class);
                self.next
            }
        };
        self.woken.insert(at);
        self.len += 1;
        if let Some(class) = self.classes.get_mut(&at) {
            class.fresh.push((owner, entry.age));
            let line = class.lines.entry(owner).or_default();
            let index = line.partition_point(|other| other.age < entry.age);
            line.insert(index, entry);
        }
        at
    }

    /// A job waits no longer.
    pub(crate) fn leave(&mut self, at: ClassId, owner: OwnerAt, age: Age) {
        let Some(class) = self.classes.get_mut(&at) else { return };
        let Some(line) = class.lines.get_mut(&owner) else { return };
        let Ok(index) = line.binary_search_by_key(&age, |entry| entry.age) else { return };
        line.remove(index);
        self.len -= 1;
        // The others move up.
        self.woken.insert(at);
        if !line.is_empty() {
            return;
        }
        class.lines.remove(&owner);
        if class.lines.is_empty()
            && let Some(class) = self.classes.remove(&at)
        {
            let model = &class.kind.load.model;
            self.by_kind.remove(&class.kind);
            if let Some(classes) = self.by_model.get_mut(model) {
                classes.remove(&at);
                if classes.is_empty() {
                    self.by_model.remove(model);
                }
            }
        }
    }

    pub(crate) fn class(&self, at: ClassId) -> Option<&Class> {
        self.classes.get(&at)
    }

    /// A class to be changed, and the owners.
    pub(crate) fn class_mut(&mut self, at: ClassId) -> Option<(&mut Class, &Owners)> {
        Some((self.classes.get_mut(&at)?, &self.owners))
    }

    /// Who of a class is next, by how much of his owner runs and by age.
    pub(crate) fn head(&self, at: ClassId) -> Option<(usize, Age, &JobId)> {
        self.classes.get(&at)?.head(&self.owners)
    }

    /// Every class, and what it is called.
    pub(crate) fn classes(&self) -> impl Iterator<Item = (ClassId, &Class)> {
        self.classes.iter().map(|(at, class)| (*at, class))
    }

    /// The classes that wait for a model.
    pub(crate) fn of_model(&self, model: &ModelRef) -> impl Iterator<Item = (ClassId, &Class)> {
        self.by_model.get(model).into_iter().flatten().filter_map(|at| Some((*at, self.classes.get(at)?)))
    }

    /// The classes that would wait for a load.
    pub(crate) fn of_load(&self, load: &LoadKey) -> impl Iterator<Item = &Class> {
        self.of_model(&load.model).map(|(_, class)| class).filter(move |class| class.kind.load == *load)
    }

    /// Something has changed for those who wait for a model.
    pub(crate) fn wake(&mut self, model: &ModelRef) {
        if let Some(classes) = self.by_model.get(model) {
            self.woken.extend(classes);
        }
    }

    /// Time has passed, for everybody.
    pub(crate) fn wake_all(&mut self) {
        self.woken.extend(self.classes.keys());
    }

    /// The classes for which something has changed since this was asked last.
    pub(crate) fn woken(&mut self) -> BTreeSet<ClassId> {
        std::mem::take(&mut self.woken)
    }
}
