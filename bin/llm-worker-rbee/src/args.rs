//! The worker's command line: for people who start one by hand, and for simulations.

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use rbee_wire::worker::LoadOptions;
use rbee_wire::{DeviceSpec, ModelRef};

/// One loaded model behind HTTP.
#[derive(Clone, Debug, Parser)]
#[command(name = "llm-worker-rbee", version)]
pub struct Cli {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The model to serve: `tinybee` or the absolute path of a folder.
    #[arg(long, default_value = "tinybee")]
    pub model: ModelRef,
    /// The device to compute on.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
    /// What computes the tokens.
    #[arg(long, value_enum, default_value_t = Backend::DEFAULT)]
    pub backend: Backend,
    /// Where heartbeats go.
    #[arg(long, env = "RBEE_QUEEN_URL", default_value = "http://127.0.0.1:7833")]
    pub queen: String,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub bind: SocketAddr,
    /// Sizes of the engine.
    #[command(flatten)]
    pub sizes: Sizes,
    /// The simulation.
    #[command(flatten)]
    pub sim: SimArgs,
    /// What is logged.
    #[arg(long, env = "RBEE_LOG", default_value = "info")]
    pub log: String,
}

/// Sizes that are chosen at start.
#[derive(Clone, Debug, Default, Args)]
pub struct Sizes {
    /// Context length in tokens.
    #[arg(long)]
    pub ctx: Option<u32>,
    /// Requests generated for at once.
    #[arg(long)]
    pub slots: Option<u32>,
    /// Compute threads.
    #[arg(long)]
    pub threads: Option<u32>,
    /// Type of the KV cache: f32, f16, bf16 or q8_0.
    #[arg(long)]
    pub kv_type: Option<String>,
    /// Keep the weights with fewer bits: q8_0 or q4_k.
    #[arg(long)]
    pub quantize: Option<String>,
}

impl From<Sizes> for LoadOptions {
    fn from(Sizes { ctx, slots, threads, kv_type, quantize }: Sizes) -> Self {
        Self { ctx, slots, threads, kv_type, quantize }
    }
}

/// What else the worker can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Prints what a model needs in memory, as JSON, without loading it.
    Inspect {
        /// `tinybee` or the absolute path of a folder.
        model: ModelRef,
        /// Sizes of the engine.
        #[command(flatten)]
        sizes: Sizes,
    },
}

/// What computes the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// The model itself, on the CPU.
    Cpu,
    /// The model itself, on an NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda,
    /// A hash of the tokens so far: no weights, any pace; for tests and for measuring everything else.
    Sim,
}

impl Backend {
    /// That of the program's own device.
    #[cfg(feature = "cuda")]
    pub const DEFAULT: Self = Self::Cuda;
    /// That of the program's own device.
    #[cfg(not(feature = "cuda"))]
    pub const DEFAULT: Self = Self::Cpu;
}

/// The pace and shape of a simulated model.
#[derive(Clone, Debug, Args)]
pub struct SimArgs {
    /// Another seed is another model.
    #[arg(long, default_value_t = 0, hide = true)]
    pub sim_seed: u64,
    /// Microseconds that one step takes.
    #[arg(long, default_value_t = 0, hide = true)]
    pub sim_step_us: u64,
    /// Microseconds that one prompt token takes.
    #[arg(long, default_value_t = 0, hide = true)]
    pub sim_prefill_us: u64,
    /// Milliseconds that the load takes.
    #[arg(long, default_value_t = 0, hide = true)]
    pub sim_load_ms: u64,
    /// One in so many tokens ends the text.
    #[arg(long, hide = true)]
    pub sim_eos_every: Option<u32>,
    /// Tokens spread over the vocabulary, so that sampling matters.
    #[arg(long, hide = true)]
    pub sim_spread: bool,
    /// The load fails at its end.
    #[arg(long, hide = true)]
    pub sim_load_fails: bool,
    /// Context length in tokens unless `--ctx` is given.
    #[arg(long, default_value_t = 65_536, hide = true)]
    pub sim_context: u32,
}
