//! What the heartbeats of a fleet cost a real queen: each worker has a connection of its own and beats as often as ours do.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rbee_client::QueenClient;
use rbee_testkit::Setup;
use rbee_testkit::process::raise_open_files;
use rbee_wire::worker::WorkerHeartbeat;

/// Time between two heartbeats of one worker.
const EVERY: Duration = Duration::from_millis(500);
/// Until all are known and nothing grows any more.
const WARM_UP: Duration = Duration::from_secs(4);
const MEASURED: Duration = Duration::from_secs(20);

/// Prints what the queen takes while these beat.
///
/// # Errors
/// A queen that does not start, or a heartbeat that it does not take.
pub(super) fn run(beats: &[WorkerHeartbeat]) -> Result<()> {
    raise_open_files();
    let cluster = Setup::sim("").env("RBEE_LOG", "warn").home();
    let started = cluster.rbee(&["queen", "start"]);
    ensure!(started.code == 0, "{}", started.stderr);
    let queen = cluster.the("queen-rbee");
    let before = queen.resident();
    let http = cluster.queen();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (taken, cpu, resident) = runtime.block_on(async {
        let began = Instant::now();
        let (from, until) = (began + WARM_UP, began + WARM_UP + MEASURED);
        let tasks: Vec<_> = beats
            .iter()
            .enumerate()
            .map(|(at, beat)| {
                let first = began + EVERY.mul_f64(at as f64 / beats.len() as f64);
                tokio::spawn(beat_on(
                    QueenClient::new(&format!("http://{}", http.address), http.bearer.clone()),
                    beat.clone(),
                    first,
                    (from, until),
                ))
            })
            .collect();
        tokio::time::sleep_until(from.into()).await;
        let cpu = queen.cpu();
        tokio::time::sleep_until(until.into()).await;
        let (cpu, resident) = (queen.cpu() - cpu, queen.resident());
        let mut taken = 0;
        for task in tasks {
            taken += task.await??;
        }
        anyhow::Ok((taken, cpu, resident))
    })?;
    let seconds = MEASURED.as_secs_f64();
    println!();
    println!(
        "a queen with {} workers that beat every {} ms: {:.0} heartbeats a second, {:.1} % of a core, {:.0} us each; {:.1} MiB, {:.1} \
         before them, {:.1} KiB a worker and its connection",
        beats.len(),
        EVERY.as_millis(),
        f64::from(taken) / seconds,
        cpu.as_secs_f64() / seconds * 100.0,
        cpu.as_secs_f64() * 1e6 / f64::from(taken),
        resident as f64 / f64::from(1 << 20),
        before as f64 / f64::from(1 << 20),
        resident.saturating_sub(before) as f64 / 1024.0 / beats.len() as f64,
    );
    Ok(())
}

/// One worker's heartbeats until a time; how many of them the queen took from another on.
async fn beat_on(
    queen: QueenClient,
    mut beat: WorkerHeartbeat,
    first: Instant,
    (from, until): (Instant, Instant),
) -> Result<u32> {
    // Of this machine, as a queen without keys wants it.
    beat.url = "http://127.0.0.1:9".into();
    let (mut next, mut taken) = (first, 0);
    while next < until {
        tokio::time::sleep_until(next.into()).await;
        beat.seq += 1;
        queen.worker_heartbeat(&beat).await?;
        taken += u32::from(next >= from);
        next += EVERY;
    }
    Ok(taken)
}
