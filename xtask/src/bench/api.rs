//! `bench api`: what a chat of the OpenAI dialect costs over the stream of the job that it is.
//!
//! Rounds of raw job streams and of chats take turns in one process of measurement, at 1, 100 and 1,000 streams from one
//! simulated worker; every token is checked. The queen's CPU and memory are those of [`super::relay`]'s rounds; latencies are
//! those after the first arrival of the same step at a client that reads from the worker itself.

use anyhow::Result;
use rbee_testkit::process::raise_open_files;

use super::relay::{Figures, Plan, Surface, measure};
use super::{machine, quantile, sorted};

const STREAMS: [usize; 3] = [1, 100, 1000];

/// Token events of a round at least, so that the queen's CPU time, counted in hundredths of a second, says something.
const EVENTS: usize = 3000;

/// Most tokens of a stream: at 5 a second it takes 20 s.
const MOST: usize = 100;

pub(super) fn run(rounds: usize) -> Result<()> {
    raise_open_files();
    println!("{}; one worker, medians of {rounds} rounds each, in turns", machine::describe());
    println!();
    println!(
        "| streams | job: CPU us/event | chat | ratio | job: KiB/stream | chat | job: late p50/p99 ms | chat | added p50/p99 ms | \
         other work, most |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for streams in STREAMS {
        let plan = Plan { streams, tokens: (EVENTS / streams).clamp(50, MOST), workers: 1, rounds };
        let (mut jobs, mut chats) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            jobs.push(measure(&plan, Surface::Jobs)?);
            chats.push(measure(&plan, Surface::Chat)?);
        }
        let median = |all: &[Figures], of: fn(&Figures) -> f64| quantile(&sorted(all.iter().map(of)), 0.5);
        let both = |of: fn(&Figures) -> f64| (median(&jobs, of), median(&chats, of));
        let (cpu, bytes) = (both(|f| f.cpu_us), both(|f| f.bytes / 1024.0));
        let (p50, p99) = (both(|f| f.relayed[0]), both(|f| f.relayed[1]));
        let foreign = jobs.iter().chain(&chats).map(|f| f.foreign).fold(0.0, f64::max);
        println!(
            "| {streams} | {:.1} | {:.1} | {:.2} | {:.1} | {:.1} | {:.2} / {:.2} | {:.2} / {:.2} | {:.2} / {:.2} | {:.0} % |",
            cpu.0,
            cpu.1,
            cpu.1 / cpu.0,
            bytes.0,
            bytes.1,
            p50.0,
            p99.0,
            p50.1,
            p99.1,
            p50.1 - p50.0,
            p99.1 - p99.0,
            foreign * 100.0,
        );
    }
    Ok(())
}
