//! The queen's command line.

use std::net::SocketAddr;

use clap::Parser;

/// The queen: job API, registry, scheduler and relay.
#[derive(Clone, Debug, Parser)]
#[command(name = "queen-rbee", version)]
pub struct Cli {
    /// Where to listen; beyond loopback only with a token.
    #[arg(long)]
    pub bind: Option<SocketAddr>,
    /// What is logged.
    #[arg(long)]
    pub log: Option<String>,
}
