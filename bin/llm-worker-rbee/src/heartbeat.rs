//! Heartbeats: to the queen over HTTP and to the hive up the control pipe, from a thread of their own that
//! neither the engine's load nor the server's can delay.

use std::time::{Duration, Instant};

use rbee_client::QueenClient;
use rbee_wire::worker::WorkerState;

use crate::status::{Rates, Status};

/// Time between two heartbeats when nothing changes.
pub const EVERY: Duration = Duration::from_millis(500);

/// Least time between two heartbeats: at most 20 a second.
const LEAST: Duration = Duration::from_millis(50);

/// A heartbeat that takes longer is given up, so that the next one is not late.
const GIVE_UP: Duration = Duration::from_millis(900);

/// Runs on the heartbeat thread until the worker has stopped. `up` carries the beat to the hive.
pub fn run(status: &Status, up: &dyn Fn(u64, bool)) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let queen = QueenClient::new(&status.charge().queen_url, status.charge().queen_token.clone());
    runtime.block_on(async {
        let mut changes = status.changes();
        let mut meter = Meter::default();
        let mut seq = 0;
        let mut reachable = true;
        loop {
            changes.mark_unchanged();
            let (steps, working) = status.pulse();
            up(steps, working);
            seq += 1;
            let beat = status.heartbeat(seq, meter.read(status));
            let sent = Instant::now();
            let last = beat.state == WorkerState::Stopped;
            let answer = tokio::time::timeout(GIVE_UP, queen.worker_heartbeat(&beat)).await;
            let reached = matches!(answer, Ok(Ok(_)));
            if reached != reachable {
                reachable = reached;
                if reached {
                    tracing::info!("the queen answers");
                } else {
                    tracing::warn!("the queen does not answer; heartbeats go on");
                }
            }
            if last {
                return;
            }
            let resync = matches!(answer, Ok(Ok(reply)) if reply.resync);
            tokio::time::sleep(LEAST.saturating_sub(sent.elapsed())).await;
            if !resync {
                let rest = EVERY.saturating_sub(sent.elapsed());
                let _ = tokio::time::timeout(rest, changes.changed()).await;
            }
        }
    });
    Ok(())
}

/// Rates from the engine's counters, over the spans in which it had work throughout.
#[derive(Default)]
struct Meter {
    last: Option<(Instant, u64, u64, bool)>,
    rates: Rates,
}

impl Meter {
    fn read(&mut self, status: &Status) -> Rates {
        let Some(loaded) = status.loaded() else {
            return self.rates;
        };
        let stats = loaded.engine.stats();
        let now = Instant::now();
        if let Some((then, prompt, generated, worked)) = self.last {
            let seconds = now.duration_since(then).as_secs_f64();
            if seconds < EVERY.as_secs_f64() * 0.8 {
                return self.rates;
            }
            if worked && stats.working {
                smooth(&mut self.rates.prefill, (stats.prompt_tokens - prompt) as f64 / seconds);
                smooth(&mut self.rates.decode, (stats.generated_tokens - generated) as f64 / seconds);
            }
        }
        self.last = Some((now, stats.prompt_tokens, stats.generated_tokens, stats.working));
        self.rates
    }
}

fn smooth(rate: &mut f64, measured: f64) {
    if measured > 0.0 {
        *rate = if *rate > 0.0 { *rate * 0.7 + measured * 0.3 } else { measured };
    }
}
