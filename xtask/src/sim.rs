//! `cargo xtask sim`: the policies against each other in virtual time, over the real scheduler.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use rbee_scheduler::Policy;
use rbee_testkit::fleet_sim::traffic::{Arrival, poisson, recorded};
use rbee_testkit::fleet_sim::{Outcome, Setup, run, trial};

const USAGE: &str =
    "usage: cargo xtask sim [--seed S] [--jobs N] [--rate JOBS_PER_SECOND] [--recorded FILE] | sim --seeds N";

/// Traffic that lies in the repository.
const RECORDED: &str = "xtask/traffic.jsonl";

/// Compares the policies on generated and on recorded traffic, or looks for a seed that breaks what must hold.
///
/// # Errors
/// A wrong command line, traffic that cannot be read, or an invariant that does not hold, with its seed.
pub fn main(root: &Path, args: &[String]) -> Result<()> {
    let (mut seed, mut jobs, mut rate, mut file, mut seeds) = (1u64, 2000usize, 0.5f64, root.join(RECORDED), None);
    for pair in args.chunks(2) {
        let [flag, text] = pair else { bail!(USAGE) };
        match flag.as_str() {
            "--seed" => seed = text.parse().context(USAGE)?,
            "--seeds" => seeds = Some(text.parse::<u64>().context(USAGE)?),
            "--jobs" => jobs = text.parse().context(USAGE)?,
            "--rate" => rate = text.parse::<f64>().ok().filter(|rate| *rate > 0.0).context(USAGE)?,
            "--recorded" => file = text.into(),
            _ => bail!(USAGE),
        }
    }
    if let Some(seeds) = seeds {
        return search(seed, seeds);
    }
    let models = Setup::mixed(Policy::FirstAvailable).models;
    println!("{jobs} jobs at {rate} a second, seed {seed}:\n");
    table(&poisson(seed, jobs, rate, &models)).with_context(|| format!("seed {seed}"))?;
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let arrivals = recorded(&text).map_err(|error| anyhow!("{}: {error}", file.display()))?;
    println!("\n{} jobs of {}:\n", arrivals.len(), file.strip_prefix(root).unwrap_or(&file).display());
    table(&arrivals)
}

/// Runs so many trials, from a seed on.
fn search(first: u64, seeds: u64) -> Result<()> {
    let (mut broken, mut done, mut loads, mut evictions) = (0, 0, 0, 0);
    for seed in first..first.saturating_add(seeds) {
        match trial(seed) {
            Ok(outcome) => {
                done += outcome.done;
                loads += outcome.loads;
                evictions += outcome.evictions;
            }
            Err(error) => {
                eprintln!("seed {seed}: {error}");
                broken += 1;
            }
        }
    }
    println!("{seeds} seeds from {first}: {done} jobs done, {loads} loads, {evictions} evictions, {broken} broken");
    if broken > 0 {
        bail!("{broken} of {seeds} seeds break what must hold");
    }
    Ok(())
}

fn table(arrivals: &[Arrival]) -> Result<()> {
    println!("| policy | jobs done | first token p50 s | p95 | total p50 s | p95 | loads | evictions | refused |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, policy) in Policy::ALL {
        let setup = Setup::mixed(*policy);
        let Outcome { done, first, total, loads, evictions, refused, .. } = run(&setup, arrivals)?;
        let at = |values: &[f64], share: f64| {
            let mut values = values.to_vec();
            values.sort_by(f64::total_cmp);
            let last = values.len().saturating_sub(1);
            values.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
        };
        let refused: Vec<String> = refused.iter().map(|(code, count)| format!("{count} {code}")).collect();
        println!(
            "| {name} | {done} | {:.2} | {:.2} | {:.2} | {:.2} | {loads} | {evictions} | {} |",
            at(&first, 0.5),
            at(&first, 0.95),
            at(&total, 0.5),
            at(&total, 0.95),
            if refused.is_empty() { "0".into() } else { refused.join(", ") },
        );
    }
    Ok(())
}
