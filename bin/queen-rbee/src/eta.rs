//! When a long step may be done, from how fast it has moved so far.

use std::time::Duration;

use rbee_wire::worker::LoadProgress;

/// Time over which a pace is looked at before it is believed.
const LONG_ENOUGH: Duration = Duration::from_secs(1);

/// Where a step was when it was first seen.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    stage: String,
    since: Duration,
    from: u64,
}

impl Pace {
    /// Takes what a step says of itself; when it may be done, if that can be told.
    pub fn eta(&mut self, now: Duration, progress: &LoadProgress) -> Option<Duration> {
        let LoadProgress { stage, done, total, .. } = progress;
        if self.stage != *stage || *done < self.from {
            *self = Self { stage: stage.clone(), since: now, from: *done };
        }
        let (seen, moved) = (now.saturating_sub(self.since), done - self.from);
        if seen < LONG_ENOUGH || moved == 0 || total <= done {
            return None;
        }
        let seconds = seen.as_secs_f64() * (total - done) as f64 / moved as f64;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eta_is_what_the_pace_so_far_leaves() {
        let at = |stage: &str, done| LoadProgress { stage: stage.into(), done, total: 1000, unit: "bytes".into() };
        let mut pace = Pace::default();
        // Somebody else's load that is half done when this job comes.
        assert_eq!(pace.eta(Duration::from_secs(10), &at("load", 500)), None);
        assert_eq!(pace.eta(Duration::from_millis(10_500), &at("load", 510)), None, "too early to tell");
        assert_eq!(pace.eta(Duration::from_secs(12), &at("load", 600)), Some(Duration::from_secs(8)));
        assert_eq!(pace.eta(Duration::from_secs(20), &at("load", 1000)), None);
        assert_eq!(pace.eta(Duration::from_secs(30), &at("warm_up", 0)), None, "another stage has its own pace");
        assert_eq!(pace.eta(Duration::from_secs(34), &at("warm_up", 1)), Some(Duration::from_secs(3996)));
    }
}
