//! The life of a worker process as its hive sees it. Pure: one total transition function.

use std::time::Duration;

use rbee_wire::worker::LoadProgress;

/// Time since the supervisor's start.
pub type Timestamp = Duration;

/// Exits within [`Timing::crash_window`] that make a crash loop.
pub const CRASHES: usize = 5;

/// The times that lives are judged by. The defaults are the product's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// No progress of a load for so long ends it.
    pub load_timeout: Duration,
    /// A control pipe that is silent for so long shows a frozen process: three beats missed.
    pub silence: Duration,
    /// A step counter that stands still for so long with work running shows a hung engine.
    pub stall: Duration,
    /// Grace between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// See [`CRASHES`].
    pub crash_window: Duration,
    /// Wait before the first restart; each one after it waits twice as long.
    pub first_wait: Duration,
    /// Longest wait before a restart.
    pub longest_wait: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            load_timeout: Duration::from_secs(120),
            silence: Duration::from_millis(1600),
            stall: Duration::from_secs(4),
            grace: Duration::from_secs(5),
            crash_window: Duration::from_secs(60),
            first_wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(60),
        }
    }
}

/// A worker process as the hive sees it. Only the supervisor moves it; everyone else reads a copy.
#[derive(Clone, Debug, PartialEq)]
pub enum ProcessState {
    /// Started, not heard of.
    Spawning {
        /// When.
        since: Timestamp,
    },
    /// Its server is up, its model is not.
    Loading {
        /// When the load last moved.
        moved: Timestamp,
        /// When the pipe last spoke.
        heard: Timestamp,
        /// How far it is.
        progress: LoadProgress,
    },
    /// It serves.
    Ready {
        /// Since when.
        since: Timestamp,
        /// When the pipe last spoke.
        heard: Timestamp,
        /// Its step counter.
        steps: u64,
        /// When the counter last moved or nothing was to be done.
        moved: Timestamp,
    },
    /// It was asked to finish.
    Draining {
        /// When it is asked with SIGTERM.
        deadline: Timestamp,
        /// Whether SIGTERM was sent.
        termed: bool,
    },
    /// It is being killed.
    Killing,
    /// It is gone.
    Exited,
}

/// What was seen of a process.
#[derive(Clone, Debug, PartialEq)]
pub enum Observation {
    /// Its server listens and it knows the nonce.
    Listening,
    /// Its load moved.
    Progress(LoadProgress),
    /// Its warm-up step has run.
    Ready,
    /// A beat of its pipe.
    Beat {
        /// Its step counter.
        steps: u64,
        /// Whether it has work.
        working: bool,
    },
    /// The pipe ended or spoke nonsense.
    PipeEnded,
    /// Its leader has exited.
    Exited,
    /// Somebody wants it to finish.
    DrainWanted {
        /// Within this time.
        grace: Duration,
    },
    /// Somebody wants it gone.
    KillWanted,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask it down the pipe to finish.
    SendDrain {
        /// Within this time.
        grace: Duration,
    },
    /// SIGTERM to its group.
    Terminate,
    /// SIGKILL to its group.
    Kill(&'static str),
}

/// Total: every state and observation has an answer.
pub fn observe(timing: &Timing, state: ProcessState, seen: Observation, now: Timestamp) -> (ProcessState, Vec<Action>) {
    use {Observation as O, ProcessState as S};
    let kill = |why| (S::Killing, vec![Action::Kill(why)]);
    match (state, seen) {
        (_, O::Exited) | (S::Exited, _) => (S::Exited, vec![]),
        (S::Killing, _) => (S::Killing, vec![]),
        (_, O::KillWanted) => kill("killed"),
        (S::Draining { .. }, O::PipeEnded) => kill("retired"),
        (_, O::PipeEnded) => kill("failed"),

        (S::Draining { deadline, termed }, O::Tick) if now >= deadline => {
            if termed {
                kill("killed")
            } else {
                (S::Draining { deadline: now + timing.grace, termed: true }, vec![Action::Terminate])
            }
        }
        (S::Draining { deadline, termed }, O::DrainWanted { grace }) => {
            (S::Draining { deadline: deadline.min(now + grace), termed }, vec![])
        }
        (state @ S::Draining { .. }, _) => (state, vec![]),
        (_, O::DrainWanted { grace }) => {
            (S::Draining { deadline: now + grace, termed: false }, vec![Action::SendDrain { grace }])
        }

        (S::Spawning { .. }, O::Listening) => {
            let progress = LoadProgress { stage: "start".into(), done: 0, total: 0, unit: "steps".into() };
            (S::Loading { moved: now, heard: now, progress }, vec![])
        }
        (S::Spawning { since }, O::Tick) if now >= since + timing.load_timeout => kill("load_timeout"),
        // A ready or progress line before the listening line is out of order, and a beat says nothing yet.
        (state @ S::Spawning { .. }, O::Progress(_) | O::Ready | O::Beat { .. } | O::Tick) => (state, vec![]),

        (S::Loading { moved, progress: before, .. }, O::Progress(progress)) => {
            let moved = if progress == before { moved } else { now };
            (S::Loading { moved, heard: now, progress }, vec![])
        }
        (S::Loading { .. }, O::Ready) => (S::Ready { since: now, heard: now, steps: 0, moved: now }, vec![]),
        (S::Loading { moved, progress, .. }, O::Beat { .. } | O::Listening) => {
            (S::Loading { moved, heard: now, progress }, vec![])
        }
        (S::Loading { heard, .. }, O::Tick) if now >= heard + timing.silence => kill("stalled"),
        (S::Loading { moved, .. }, O::Tick) if now >= moved + timing.load_timeout => kill("load_timeout"),
        (state @ S::Loading { .. }, O::Tick) => (state, vec![]),

        (S::Ready { since, steps: before, moved, .. }, O::Beat { steps, working }) => {
            let moved = if working && steps == before { moved } else { now };
            (S::Ready { since, heard: now, steps, moved }, vec![])
        }
        (S::Ready { heard, .. }, O::Tick) if now >= heard + timing.silence => kill("stalled"),
        (S::Ready { moved, heard, .. }, O::Tick) if heard >= moved + timing.stall => kill("stalled"),
        (state @ S::Ready { .. }, O::Tick | O::Listening | O::Progress(_) | O::Ready) => (state, vec![]),
    }
}

/// When a worker that ended by itself is started again.
#[derive(Clone, Debug, PartialEq)]
pub struct Restarts {
    timing: Timing,
    exits: Vec<Timestamp>,
    in_a_row: u32,
}

/// What follows an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Start it again after this time.
    Wait(Duration),
    /// It ended too often.
    CrashLoop,
}

impl Restarts {
    /// No exit yet.
    pub fn new(timing: Timing) -> Self {
        Self { timing, exits: Vec::new(), in_a_row: 0 }
    }

    /// An exit after so much time of service.
    pub fn exited(&mut self, now: Timestamp, served: Duration) -> Next {
        if served >= self.timing.crash_window {
            self.in_a_row = 0;
        }
        self.exits.retain(|exit| now < *exit + self.timing.crash_window);
        self.exits.push(now);
        if self.exits.len() >= CRASHES {
            return Next::CrashLoop;
        }
        let wait = (self.timing.first_wait * (1 << self.in_a_row.min(6))).min(self.timing.longest_wait);
        self.in_a_row += 1;
        Next::Wait(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Timestamp {
        Duration::from_millis(ms)
    }

    fn progress(done: u64) -> LoadProgress {
        LoadProgress { stage: "load".into(), done, total: 100, unit: "bytes".into() }
    }

    /// Follows a script of (milliseconds, observation) and gives every action with its time.
    fn run(script: &[(u64, Observation)]) -> (ProcessState, Vec<(u64, Action)>) {
        let mut state = ProcessState::Spawning { since: at(0) };
        let mut all = Vec::new();
        for (ms, seen) in script {
            let (next, actions) = observe(&Timing::default(), state, seen.clone(), at(*ms));
            all.extend(actions.into_iter().map(|action| (*ms, action)));
            state = next;
        }
        (state, all)
    }

    use Observation as O;

    fn ready() -> Vec<(u64, Observation)> {
        vec![(10, O::Listening), (20, O::Progress(progress(1))), (30, O::Ready)]
    }

    #[test]
    fn a_frozen_process_is_killed_after_three_missed_beats() {
        let mut script = ready();
        script.extend([(500, O::Beat { steps: 1, working: false }), (2099, O::Tick)]);
        assert_eq!(run(&script).1, []);
        script.push((2100, O::Tick));
        assert_eq!(run(&script).1, [(2100, Action::Kill("stalled"))]);
    }

    #[test]
    fn a_hung_engine_is_killed_and_an_idle_or_slow_one_is_not() {
        let beats = |working: bool, step: u64| {
            let mut script = ready();
            for i in 1..20 {
                script.push((i * 500, O::Beat { steps: i * step, working }));
                script.push((i * 500 + 1, O::Tick));
            }
            run(&script).1
        };
        assert_eq!(beats(false, 0), []);
        assert_eq!(beats(true, 1), []);
        assert_eq!(beats(true, 0).len(), 1);
    }

    #[test]
    fn a_slow_load_lives_as_long_as_it_moves() {
        let mut script = vec![(0, O::Listening)];
        for i in 1..=600u64 {
            script.push((i * 1000, O::Progress(progress(i))));
            script.push((i * 1000, O::Tick));
        }
        assert_eq!(run(&script).1, []);
        for i in 0..=120u64 {
            script.push((600_000 + i * 1000, O::Progress(progress(600))));
            script.push((600_000 + i * 1000, O::Tick));
        }
        assert_eq!(run(&script).1, [(720_000, Action::Kill("load_timeout"))]);
    }

    #[test]
    fn draining_asks_then_terminates_then_kills() {
        let mut script = ready();
        script.push((100, O::DrainWanted { grace: at(1000) }));
        for ms in [500, 1100, 3000, 6099, 6100, 7000] {
            script.push((ms, O::Tick));
        }
        let (state, actions) = run(&script);
        assert_eq!(
            actions,
            [(100, Action::SendDrain { grace: at(1000) }), (1100, Action::Terminate), (6100, Action::Kill("killed"))]
        );
        assert_eq!(state, ProcessState::Killing);
    }

    #[test]
    fn restarts_wait_longer_each_time_and_stop_in_a_crash_loop() {
        let mut restarts = Restarts::new(Timing::default());
        let next: Vec<Next> = (0..5).map(|i| restarts.exited(at(i * 1000), Duration::ZERO)).collect();
        let wait = |s| Next::Wait(Duration::from_secs(s));
        assert_eq!(next, [wait(1), wait(2), wait(4), wait(8), Next::CrashLoop]);
        let mut rare = Restarts::new(Timing::default());
        for i in 0..100 {
            assert_eq!(rare.exited(at(i * 100_000), Duration::from_secs(90)), wait(1));
        }
    }
}
