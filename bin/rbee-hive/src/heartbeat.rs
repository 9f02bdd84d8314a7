//! The hive's heartbeat: every second, and at once when a process changes, from a thread of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rbee_client::QueenClient;
use rbee_supervisor::Supervisor;
use rbee_wire::hive::HiveHeartbeat;

use crate::devices::Devices;
use crate::models::Models;

/// Time between two heartbeats when nothing changes.
const EVERY: Duration = Duration::from_secs(1);

/// Least time between two heartbeats.
const LEAST: Duration = Duration::from_millis(50);

/// A heartbeat that takes longer is given up.
const GIVE_UP: Duration = Duration::from_secs(2);

/// Sends heartbeats until the process ends. `beat` has everything that does not change.
pub fn start(
    beat: HiveHeartbeat,
    queen: String,
    token: Option<String>,
    devices: Arc<Devices>,
    models: Models,
    supervisor: Supervisor,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
        runtime.block_on(run(beat, &QueenClient::new(&queen, token), &devices, &models, &supervisor));
    })?;
    Ok(())
}

async fn run(
    mut beat: HiveHeartbeat,
    queen: &QueenClient,
    devices: &Devices,
    models: &Models,
    supervisor: &Supervisor,
) {
    let mut changes = supervisor.changes();
    let mut reachable = true;
    loop {
        let sent = Instant::now();
        changes.mark_unchanged();
        beat.seq += 1;
        beat.devices = devices.list();
        beat.processes = supervisor.list();
        beat.models = models.known();
        beat.downloads = models.downloads();
        let reached = matches!(tokio::time::timeout(GIVE_UP, queen.hive_heartbeat(&beat)).await, Ok(Ok(_)));
        if reached != reachable {
            reachable = reached;
            if reached {
                tracing::info!("the queen answers");
            } else {
                tracing::warn!("the queen does not answer; heartbeats go on");
            }
        }
        tokio::time::sleep(LEAST.saturating_sub(sent.elapsed())).await;
        let _ = tokio::time::timeout(EVERY.saturating_sub(sent.elapsed()), changes.changed()).await;
    }
}
