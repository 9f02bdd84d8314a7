//! Where a load goes, and what has to leave for it: a pure choice over what devices have and who has it.
//!
//! Nothing is ever overcommitted: a load fits where its least need is within what is free, with the memory of those that leave
//! added. Whoever is used, pinned or has just come does not leave. Of the sets that make enough room the cheapest leaves: the one
//! whose models take the fewest seconds to load again, weighed by the chance that somebody asks for them.

use std::time::Duration;

use rbee_wire::view::WouldFit;
use rbee_wire::{DeviceId, HiveId, WorkerId};

/// A device as a load finds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Its hive.
    pub hive: HiveId,
    /// The device.
    pub device: DeviceId,
    /// Bytes that the load must have there; `None` where it cannot go.
    pub needs: Option<u64>,
    /// Bytes that are free.
    pub free: u64,
    /// Other ways to load the model that fit into what is free.
    pub would_fit: Vec<WouldFit>,
    /// Who has the rest.
    pub residents: Vec<Resident>,
}

/// A worker that has memory on a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Resident {
    /// The worker.
    pub worker: WorkerId,
    /// Bytes that are free when it is gone.
    pub bytes: u64,
    /// Whether it may leave.
    pub standing: Standing,
    /// Expected seconds that its leaving costs.
    pub cost: f64,
}

/// Whether a worker may leave for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody uses it, and it has been there long enough.
    Idle,
    /// It is used, or it came a moment ago: it may leave later.
    Occupied,
    /// It stays, or it is nobody's to send away.
    Pinned,
}

/// What is to be done about a load.
#[derive(Clone, Debug, PartialEq)]
pub enum Placement {
    /// It fits here now. The index is that of the site.
    Fits(usize),
    /// It fits here when these are gone.
    Evict(usize, Vec<WorkerId>),
    /// It will fit here when these, some of whom are occupied, are gone.
    Wait(usize, Vec<WorkerId>),
    /// It fits nowhere, whoever leaves.
    Never,
}

/// Most residents of a device that the cheapest set is looked for among exactly; of more, the dearest stay.
const EXACT: usize = 24;

/// Chooses among sites given in order of preference: the first that it fits in, else the first that can be made free now, else
/// the first that can be made free later.
pub fn place(sites: &[Site]) -> Placement {
    let fits = |site: &Site| site.needs.is_some_and(|needs| needs <= site.free);
    if let Some(at) = sites.iter().position(fits) {
        return Placement::Fits(at);
    }
    let leaving = |may: fn(Standing) -> bool| {
        sites.iter().enumerate().find_map(|(at, site)| {
            let missing = site.needs?.checked_sub(site.free)?;
            let residents: Vec<&Resident> =
                site.residents.iter().filter(|resident| may(resident.standing) && resident.bytes > 0).collect();
            Some((at, cheapest(&residents, missing)?))
        })
    };
    if let Some((at, workers)) = leaving(|standing| standing == Standing::Idle) {
        return Placement::Evict(at, workers);
    }
    match leaving(|standing| standing != Standing::Pinned) {
        Some((at, workers)) => Placement::Wait(at, workers),
        None => Placement::Never,
    }
}

/// The set of residents with at least so many bytes whose cost is least; of two equal ones that with fewer bytes.
fn cheapest(residents: &[&Resident], missing: u64) -> Option<Vec<WorkerId>> {
    // Dearest per byte last: a good set is found early, and what cannot be better is not looked at.
    let mut order: Vec<&Resident> = residents.to_vec();
    let density = |resident: &Resident| resident.cost / resident.bytes as f64;
    order.sort_by(|a, b| density(a).total_cmp(&density(b)).then_with(|| a.worker.cmp(&b.worker)));
    // Enough of them to have a set at all.
    let (mut few, mut bytes) = (0, 0u64);
    while few < order.len() && (few < EXACT || bytes < missing) {
        bytes = bytes.saturating_add(order[few].bytes);
        few += 1;
    }
    order.truncate(few);
    let mut after: Vec<u64> = order.iter().map(|resident| resident.bytes).collect();
    for at in (0..after.len().saturating_sub(1)).rev() {
        after[at] = after[at].saturating_add(after[at + 1]);
    }
    let mut search = Search { order: &order, after: &after, best: None, taken: Vec::new() };
    search.look(0, missing, 0.0, 0);
    let (_, _, taken) = search.best?;
    Some(taken.into_iter().map(|at| order[at].worker.clone()).collect())
}

/// Branch and bound over subsets.
struct Search<'a> {
    order: &'a [&'a Resident],
    /// Bytes of those from here on.
    after: &'a [u64],
    /// Cost, bytes and members of the best set so far.
    best: Option<(f64, u64, Vec<usize>)>,
    taken: Vec<usize>,
}

impl Search<'_> {
    fn look(&mut self, at: usize, missing: u64, cost: f64, bytes: u64) {
        if missing == 0 {
            let better = self.best.as_ref().is_none_or(|(least, fewest, _)| (cost, bytes) < (*least, *fewest));
            if better {
                self.best = Some((cost, bytes, self.taken.clone()));
            }
            return;
        }
        let Some(resident) = self.order.get(at).filter(|_| self.after[at] >= missing) else { return };
        // What is missing costs at least what the rest costs per byte at its cheapest.
        let bound = cost + missing as f64 * (resident.cost / resident.bytes as f64);
        if self.best.as_ref().is_some_and(|(least, _, _)| bound > *least * (1.0 + 1e-12)) {
            return;
        }
        self.taken.push(at);
        self.look(
            at + 1,
            missing.saturating_sub(resident.bytes),
            cost + resident.cost,
            bytes.saturating_add(resident.bytes),
        );
        self.taken.pop();
        self.look(at + 1, missing, cost, bytes);
    }
}

/// Expected seconds that it costs when a worker leaves: those of loading it again, by the chance that it is asked for. Half as
/// likely after each five minutes without a request. Loads of less than a second are all alike: who was used longest ago leaves.
pub fn cost(reload: Duration, idle: Duration) -> f64 {
    const HALF: f64 = 300.0;
    reload.as_secs_f64().max(1.0) * (-idle.as_secs_f64() / HALF).exp2()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that a load needs, bytes that are free, and residents as bytes, standing and cost.
    type Drawn = (Option<u64>, u64, Vec<(u64, Standing, u32)>);

    fn sites() -> impl Strategy<Value = Vec<Site>> {
        let standing =
            prop_oneof![Just(Standing::Idle), Just(Standing::Idle), Just(Standing::Occupied), Just(Standing::Pinned)];
        let resident = (0u64..40, standing, 0u32..50);
        let site = (prop::option::weighted(0.9, 1u64..100), 0u64..60, prop::collection::vec(resident, 0..9));
        prop::collection::vec(site, 1..5).prop_map(|sites| {
            let site = |(at, (needs, free, residents)): (usize, Drawn)| Site {
                hive: HiveId::localhost(),
                device: DeviceId::new(format!("d{at}")).unwrap(),
                needs,
                free,
                would_fit: Vec::new(),
                residents: residents
                    .into_iter()
                    .enumerate()
                    .map(|(n, (bytes, standing, cost))| Resident {
                        worker: WorkerId::new(format!("w{at}.{n}")).unwrap(),
                        bytes,
                        standing,
                        cost: f64::from(cost),
                    })
                    .collect(),
            };
            sites.into_iter().enumerate().map(site).collect()
        })
    }

    /// Least cost over all subsets of those that may leave; `None` when no subset is enough.
    fn brute(site: &Site, may: &dyn Fn(Standing) -> bool) -> Option<f64> {
        let needs = site.needs?;
        let who: Vec<&Resident> = site.residents.iter().filter(|resident| may(resident.standing)).collect();
        (0u32..1 << who.len())
            .filter_map(|set| {
                let members = who.iter().enumerate().filter(|(n, _)| set >> n & 1 == 1).map(|(_, resident)| resident);
                let (bytes, cost) = members.fold((0, 0.0), |(b, c), resident| (b + resident.bytes, c + resident.cost));
                (site.free + bytes >= needs).then_some(cost)
            })
            .min_by(f64::total_cmp)
    }

    fn cost_of(site: &Site, workers: &[WorkerId]) -> (u64, f64) {
        let of = |worker: &WorkerId| site.residents.iter().find(|resident| &resident.worker == worker).unwrap();
        workers.iter().map(of).fold((0, 0.0), |(b, c), resident| (b + resident.bytes, c + resident.cost))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn never_overcommits_never_refuses_what_fits_and_evicts_the_cheapest_set(sites in sites()) {
            let idle = |standing| standing == Standing::Idle;
            let later = |standing| standing != Standing::Pinned;
            let first = |may: &dyn Fn(Standing) -> bool| sites.iter().position(|site| brute(site, may).is_some());
            match place(&sites) {
                Placement::Fits(at) => {
                    prop_assert!(sites[at].needs.unwrap() <= sites[at].free);
                    prop_assert_eq!(first(&|_| false), Some(at));
                }
                Placement::Evict(at, workers) => {
                    prop_assert_eq!(first(&|_| false), None);
                    prop_assert_eq!(first(&idle), Some(at));
                    let (bytes, cost) = cost_of(&sites[at], &workers);
                    prop_assert!(sites[at].free + bytes >= sites[at].needs.unwrap());
                    prop_assert_eq!(Some(cost), brute(&sites[at], &idle));
                    let all_idle = workers.iter().all(|worker| sites[at].residents.iter().any(|r| &r.worker == worker && idle(r.standing)));
                    prop_assert!(all_idle);
                }
                Placement::Wait(at, workers) => {
                    prop_assert_eq!(first(&idle), None);
                    prop_assert_eq!(first(&later), Some(at));
                    prop_assert_eq!(Some(cost_of(&sites[at], &workers).1), brute(&sites[at], &later));
                }
                Placement::Never => prop_assert_eq!(first(&later), None),
            }
        }
    }

    #[test]
    fn a_model_that_loads_slowly_and_was_just_used_is_dearer() {
        let seconds = Duration::from_secs;
        assert!(cost(seconds(10), seconds(0)) > cost(seconds(5), seconds(0)));
        assert!(cost(seconds(10), seconds(600)) < cost(seconds(5), seconds(0)));
        assert!(cost(Duration::from_millis(900), seconds(3)) < cost(Duration::from_millis(20), seconds(1)));
    }

    #[test]
    fn a_crowded_device_is_decided_quickly() {
        let resident = |n: u64| Resident {
            worker: WorkerId::new(format!("w{n}")).unwrap(),
            bytes: 1000 + n * 37 % 101,
            standing: Standing::Idle,
            cost: 1.0 + (n * 53 % 97) as f64,
        };
        let site = Site {
            hive: HiveId::localhost(),
            device: DeviceId::new("cpu").unwrap(),
            needs: Some(9000),
            free: 0,
            would_fit: Vec::new(),
            residents: (0..64).map(resident).collect(),
        };
        assert!(matches!(place(&[site]), Placement::Evict(0, workers) if workers.len() <= 10));
    }
}
