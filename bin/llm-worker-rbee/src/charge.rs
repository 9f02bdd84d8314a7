//! What this worker is to be: from the hive's control pipe, or made up for a worker started by hand.

use rbee_service::random_hex;
use rbee_wire::ids::DeviceId;
use rbee_wire::worker::WorkerCharge;
use rbee_wire::{DeviceSpec, ErrorBody, ErrorCode, HiveId, Incarnation, WorkerId};

use crate::args::Cli;

/// The charge of a worker that nobody supervises.
///
/// # Errors
/// `DEVICE_UNAVAILABLE` for a device that this binary does not compute on.
pub fn by_hand(cli: &Cli) -> Result<WorkerCharge, ErrorBody> {
    let device = match cli.device {
        DeviceSpec::Auto | DeviceSpec::Cpu => "cpu",
        DeviceSpec::Cuda(_) => return Err(no_cuda()),
    };
    let id = |text: String| WorkerId::new(text).expect("hexadecimal digits make an id");
    Ok(WorkerCharge {
        nonce: random_hex(16),
        worker_id: id(format!("worker-{}", random_hex(4))),
        incarnation: Incarnation { counter: 1, random: random_hex(16) },
        hive_id: HiveId::new("by-hand").expect("short words make an id"),
        bearer: random_hex(32),
        queen_url: cli.queen.clone(),
        queen_token: std::env::var("RBEE_TOKEN").ok(),
        model: cli.model.clone(),
        device: DeviceId::new(device).expect("a short word is an id"),
        load: cli.sizes.clone().into(),
        kv_bytes: None,
    })
}

/// The refusal of a device that this binary does not compute on.
pub fn no_cuda() -> ErrorBody {
    ErrorBody::new(ErrorCode::DeviceUnavailable, "this worker computes on the CPU only")
        .with_hint("a worker for NVIDIA GPUs is a binary of its own; use --device cpu")
}
