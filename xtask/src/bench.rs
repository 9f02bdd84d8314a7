//! `cargo xtask bench`: figures for `docs/PERFORMANCE.md`, measured on real processes, or on the real scheduler.
//!
//! For relay, start and the serving of cpu the programs must be built: `cargo build --release --workspace --bins`.

mod api;
mod cpu;
mod engine;
mod fleet;
mod machine;
mod random_gguf;
mod relay;
mod start;

use std::process::Command;

use anyhow::{Result, bail};

const USAGE: &str = "usage: cargo xtask bench relay [--streams N] [--tokens N] [--workers N] [--rounds N] | bench start [--times N] | bench api [--rounds N] | bench download [--rounds N] \
     | bench fleet [--workers N] [--hives N] [--models N] [--owners N] [--jobs N] [--events N] [--policy NAME] \
     | bench kernels [--rounds N] | bench engine [--shape 135m|360m|1.1b] [--quantize FORM] [--kv-type T] [--threads N] [--rounds N] \
     | bench cpu [--beside llama.cpp|candle] [--rounds N] [--shape 135m,1.1b,3b] [--types q8_0,q4_k_m,bf16,q4_0] [--threads N,N] [--only prefill,decode,depth,batch,serve,load] [--llama FOLDER]";

/// Runs the bench that the arguments after `bench` name.
///
/// # Errors
/// A wrong command line, or a bench that could not measure or found a token that must not be.
pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((name, rest)) if name == "relay" => relay::run(&relay::Plan::parse(rest)?),
        Some((name, rest)) if name == "api" => api::run(numbers(rest, [("--rounds", 3)])?[0]),
        Some((name, rest)) if name == "cpu" => cpu::run(&crate::root(), &cpu::Plan::parse(rest)?),
        Some((name, rest)) if name == "download" => download(numbers(rest, [("--rounds", 5)])?[0]),
        Some((name, rest)) if name == "fleet" => fleet::run(&fleet::Plan::parse(rest)?),
        Some((name, rest)) if name == "engine" => engine::run("engine", rest),
        Some((name, rest)) if name == "kernels" => engine::run("products", rest),
        Some((name, rest)) if name == "start" => start::run(numbers(rest, [("--times", 7)])?[0]),
        _ => bail!(USAGE),
    }
}

/// A gigabyte from a hub on loopback, beside curl and sha256sum. The program is an example of the crate that downloads, which alone
/// has what it takes.
fn download(rounds: usize) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let args = ["run", "--release", "--locked", "--quiet", "-p", "rbee-catalog", "--example", "download", "--"];
    let status = Command::new(cargo).args(args).arg(rounds.to_string()).status()?;
    if !status.success() {
        bail!("the download could not be measured");
    }
    Ok(())
}

/// Flags that take a whole number, in the order of their defaults.
fn numbers<const N: usize>(args: &[String], mut flags: [(&str, usize); N]) -> Result<[usize; N]> {
    for pair in args.chunks(2) {
        let flag = flags.iter_mut().find(|(name, _)| pair[0] == *name);
        match (flag, pair.get(1).and_then(|text| text.parse().ok())) {
            (Some(flag), Some(number)) if number > 0 => flag.1 = number,
            _ => bail!(USAGE),
        }
    }
    Ok(flags.map(|(_, number)| number))
}

/// The value below which this share of sorted values lies.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}
