//! How fast models were on devices: what workers measured that are gone, for whoever loads the same again.

use std::collections::HashMap;
use std::time::Duration;

use rbee_wire::{DeviceId, HiveId, ModelRef};

use crate::place::Site;
use crate::policy::Work;
use crate::registry::Worker;

/// Most that is remembered.
const MOST: usize = 256;

/// By model, hive and device.
#[derive(Debug, Default)]
pub(crate) struct Learned(HashMap<(ModelRef, HiveId, DeviceId), Rates>);

#[derive(Debug)]
struct Rates {
    load: Duration,
    /// Tokens a second.
    prefill: f64,
    decode: f64,
    /// When its worker was heard last.
    heard: Duration,
}

impl Learned {
    /// Remembers what a worker that is gone has measured, if it has computed anything.
    pub(crate) fn note(&mut self, worker: &Worker) {
        let beat = &worker.beat;
        let (Some(load), true) = (worker.load_time, beat.prefill_rate > 0.0 && beat.decode_rate > 0.0) else { return };
        let rates = Rates { load, prefill: beat.prefill_rate, decode: beat.decode_rate, heard: worker.heard };
        self.0.insert((beat.model.clone(), beat.hive_id.clone(), beat.device.clone()), rates);
        if self.0.len() > MOST
            && let Some(oldest) = self.0.iter().min_by_key(|(_, rates)| rates.heard).map(|(key, _)| key.clone())
        {
            self.0.remove(&oldest);
        }
    }

    /// Seconds until a job would have its last token if its model were loaded there now; `None` where it never was.
    pub(crate) fn seconds(&self, model: &ModelRef, site: &Site, work: Work) -> Option<f64> {
        let rates = self.0.get(&(model.clone(), site.hive.clone(), site.device.clone()))?;
        Some(rates.load.as_secs_f64() + work.seconds(rates.prefill, rates.decode))
    }

    /// Orders those sites that a model was on by the seconds that it would take there. All others keep their places in the
    /// order of preference, so that a device is tried before it is judged.
    pub(crate) fn order(&self, model: &ModelRef, work: Work, sites: &mut [Site]) {
        let known: Vec<(usize, f64)> =
            sites.iter().enumerate().filter_map(|(at, site)| Some((at, self.seconds(model, site, work)?))).collect();
        let mut sorted = known.clone();
        sorted.sort_by(|a, b| a.1.total_cmp(&b.1));
        let before = sites.to_vec();
        for ((to, _), (from, _)) in known.into_iter().zip(sorted) {
            sites[to] = before[from].clone();
        }
    }
}
