//! Heartbeats of workers and hives that do not exist, for tests and benches of the scheduler.

use rbee_wire::hive::{HiveHeartbeat, Process, ProcessState};
use rbee_wire::worker::{UsedOf, WorkerHeartbeat, WorkerMemory, WorkerState};
use rbee_wire::{DeviceId, HiveId, Incarnation, KeepAlive, ModelRef, WorkerId};

/// The first life of whatever has this name.
pub fn life(name: &str) -> Incarnation {
    Incarnation { counter: 1, random: name.into() }
}

/// A worker that serves, its slots free.
pub fn worker(worker: &WorkerId, hive: &HiveId, device: &DeviceId, model: &ModelRef, slots: u64) -> WorkerHeartbeat {
    WorkerHeartbeat {
        protocol: 1,
        worker_id: worker.clone(),
        incarnation: life(worker.as_str()),
        seq: 1,
        hive_id: hive.clone(),
        url: format!("http://{worker}"),
        bearer: "bearer".into(),
        state: WorkerState::Ready,
        load: None,
        model: model.clone(),
        fingerprint: None,
        device: device.clone(),
        memory: WorkerMemory::default(),
        slots: UsedOf { total: slots, used: 0 },
        queue: 0,
        kv_blocks: UsedOf::default(),
        preemptions: 0,
        steps: 0,
        working: false,
        numerics_id: None,
        row_invariant: true,
        prefill_rate: 0.0,
        decode_rate: 0.0,
        context: 8192,
        keep_alive: KeepAlive::Forever,
        capabilities: Vec::new(),
        version: "0".into(),
        build: "0".into(),
    }
}

/// A hive whose processes are these workers, all of which serve.
pub fn hive(hive: &HiveId, workers: &[WorkerHeartbeat]) -> HiveHeartbeat {
    let processes = workers.iter().map(|worker| Process {
        pid: 1,
        worker_id: worker.worker_id.clone(),
        incarnation: worker.incarnation.clone(),
        model: worker.model.clone(),
        device: worker.device.clone(),
        state: ProcessState::Ready,
        load: None,
        since_ms: 0,
        restarts: 0,
        last_exit: None,
        reserved: 0,
        url: None,
    });
    HiveHeartbeat {
        protocol: 1,
        hive_id: hive.clone(),
        incarnation: life(hive.as_str()),
        seq: 1,
        url: format!("http://{hive}"),
        devices: Vec::new(),
        models: Vec::new(),
        downloads: Vec::new(),
        processes: processes.collect(),
        version: "0".into(),
        build: "0".into(),
    }
}
