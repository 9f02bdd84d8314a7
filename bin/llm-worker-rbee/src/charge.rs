//! What this worker is to be: from the hive's control pipe, or made up for a worker started by hand.

use rbee_service::random_hex;
use rbee_wire::ids::DeviceId;
use rbee_wire::worker::WorkerCharge;
use rbee_wire::{DeviceSpec, HiveId, Incarnation, KeepAlive, WorkerId};

#[cfg(feature = "cuda")]
use crate::args::Backend;
use crate::args::Cli;

/// The charge of a worker that nobody supervises.
pub fn by_hand(cli: &Cli) -> WorkerCharge {
    let device = match (cli.device, cli.backend) {
        #[cfg(feature = "cuda")]
        (DeviceSpec::Auto, Backend::Cuda) => "cuda:0".to_owned(),
        (DeviceSpec::Auto, _) => "cpu".to_owned(),
        (named, _) => named.to_string(),
    };
    let id = |text: String| WorkerId::new(text).expect("hexadecimal digits make an id");
    WorkerCharge {
        nonce: random_hex(16),
        worker_id: id(format!("worker-{}", random_hex(4))),
        incarnation: Incarnation { counter: 1, random: random_hex(16) },
        hive_id: HiveId::new("by-hand").expect("short words make an id"),
        bearer: random_hex(32),
        queen_url: cli.queen.clone(),
        queen_token: std::env::var("RBEE_TOKEN").ok(),
        model: cli.model.clone(),
        device: DeviceId::new(device).expect("a short word is an id"),
        device_uuid: None,
        path: None,
        cores: None,
        keep_alive: KeepAlive::Forever,
        load: cli.sizes.clone().into(),
        kv_bytes: None,
    }
}
