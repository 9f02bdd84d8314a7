//! The hive's command line.

use std::net::SocketAddr;

use clap::Parser;
use rbee_wire::HiveId;

/// The hive: devices and workers of one machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "rbee-hive", version)]
pub struct Cli {
    /// Where to listen; beyond loopback only with a token.
    #[arg(long)]
    pub bind: Option<SocketAddr>,
    /// The queen that heartbeats go to.
    #[arg(long)]
    pub queen: Option<String>,
    /// This hive's name.
    #[arg(long, default_value = "localhost")]
    pub hive_id: HiveId,
    /// Arguments that every worker is started with, such as `--backend sim`; separated by spaces.
    #[arg(long, env = "RBEE_WORKER_ARGS", default_value = "")]
    pub worker_args: String,
    /// What is logged.
    #[arg(long)]
    pub log: Option<String>,
}
