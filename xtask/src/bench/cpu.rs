//! `bench cpu`: our speed on CPUs beside llama.cpp's, or candle's, and beside what the machine can do, with the same files and
//! threads.
//!
//! Ours is a bench program of `rbee-models`, straight on the runner; llama.cpp's are its own benches; around
//! candle-transformers there is a program of ours. Serving is measured as
//! clients meet it: through our queen, hive and worker, and of llama-server. In each round each
//! group of figures is measured with both, one right after the other, and the one that was first is second in the next; the
//! machine's limits are measured beside them. So what else the machine does meets both alike, and a share of a limit is of
//! the limit of that moment.

mod candle;
mod children;
mod llama_cpp;
mod ours;
mod peer;
mod serve;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rbee_testkit::process;

use super::machine::{self, Busy};
use super::random_gguf::{self, Mixture, SHAPES, Shape};
use ours::{Limits, Ours};
use peer::Peer;

/// Positions of a context whose load and memory are measured.
const CONTEXT: u64 = 2048;

/// Tokens of each prompt of a batch.
const BATCH_PROMPT: u64 = 32;

/// Something measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    /// A prompt of so many tokens, in tokens a second.
    Prefill { tokens: u64 },
    /// So many tokens after a context, in tokens a second.
    Decode { tokens: u64, context: u64 },
    /// So many tokens in each of some sequences, in tokens a second of all together.
    Batch { tokens: u64, sequences: u64 },
    /// Answers to clients who each ask one thing after another, in tokens a second of all together.
    Serve { clients: u64 },
    /// A process's time, without that of a prompt of so many tokens and one more: starting, loading and ending, in milliseconds.
    Load { prompt: u64 },
    /// The most memory of that process, in MiB.
    Peak,
}

/// Figures that one process measures.
#[derive(Clone, Copy, Debug)]
struct Group {
    name: &'static str,
    threads: Threads,
    figures: &'static [Figure],
}

/// With which of the numbers of threads a group is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Threads {
    Each,
    Most,
}

const GROUPS: [Group; 6] = [
    Group {
        name: "prefill",
        threads: Threads::Each,
        figures: &[Figure::Prefill { tokens: 512 }, Figure::Prefill { tokens: 2048 }],
    },
    Group { name: "decode", threads: Threads::Each, figures: &[Figure::Decode { tokens: 64, context: 0 }] },
    Group {
        name: "depth",
        threads: Threads::Most,
        figures: &[Figure::Decode { tokens: 32, context: 2048 }, Figure::Decode { tokens: 32, context: 8192 }],
    },
    Group {
        name: "batch",
        threads: Threads::Most,
        figures: &[
            Figure::Batch { tokens: 32, sequences: 1 },
            Figure::Batch { tokens: 32, sequences: 4 },
            Figure::Batch { tokens: 32, sequences: 8 },
            Figure::Batch { tokens: 32, sequences: 16 },
        ],
    },
    Group {
        name: "serve",
        threads: Threads::Most,
        figures: &[
            Figure::Serve { clients: 1 },
            Figure::Serve { clients: 4 },
            Figure::Serve { clients: 16 },
            Figure::Serve { clients: 32 },
        ],
    },
    Group { name: "load", threads: Threads::Most, figures: &[Figure::Load { prompt: 512 }, Figure::Peak] },
];

/// A figure of both in one round, and the machine's limits then.
#[derive(Clone, Copy, Debug)]
struct Sample {
    ours: f64,
    theirs: f64,
    limits: Limits,
}

/// A figure with so many threads in all rounds.
struct Series {
    figure: Figure,
    threads: usize,
    samples: Vec<Sample>,
}

/// What ours is beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    LlamaCpp,
    Candle,
}

/// What is measured.
pub(super) struct Plan {
    beside: Beside,
    rounds: usize,
    shapes: Vec<&'static Shape>,
    types: Vec<Mixture>,
    threads: Vec<usize>,
    groups: Vec<Group>,
    llama: Option<PathBuf>,
}

impl Plan {
    /// Reads the flags.
    ///
    /// # Errors
    /// A flag or a value that there is not.
    pub(super) fn parse(args: &[String]) -> Result<Self> {
        let mut plan = Self {
            beside: Beside::LlamaCpp,
            rounds: 5,
            shapes: vec![shape("1.1b")?, shape("135m")?],
            types: vec![Mixture::Q8_0, Mixture::Q4_K_M, Mixture::BF16],
            threads: vec![1, 2],
            groups: Vec::new(),
            llama: None,
        };
        for pair in args.chunks(2) {
            let [flag, value] = pair else { bail!("{} has no value", pair[0]) };
            match flag.as_str() {
                "--beside" => plan.beside = beside(value)?,
                "--rounds" => plan.rounds = number(value)?,
                "--shape" => plan.shapes = list(value, shape)?,
                "--types" => plan.types = list(value, mixture)?,
                "--threads" => plan.threads = list(value, number)?,
                "--only" => plan.groups = list(value, group)?,
                "--llama" => plan.llama = Some(PathBuf::from(value)),
                _ => bail!("{flag} is not a flag; {}", super::USAGE),
            }
        }
        if plan.groups.is_empty() {
            plan.groups = GROUPS.into_iter().filter(|group| plan.beside.has(group.figures)).collect();
        }
        if let Some(group) = plan.groups.iter().find(|group| !plan.beside.has(group.figures)) {
            bail!("{} has nothing like {}", plan.beside.name(), group.name);
        }
        Ok(plan)
    }

    /// Groups and threads, in the order in which a round has them.
    fn turns(&self) -> Vec<(Group, usize)> {
        let most = self.threads.iter().copied().max().unwrap_or(1);
        let with = |group: &Group| {
            let group = *group;
            let threads = self.threads.iter().copied();
            threads.filter(move |threads| group.threads == Threads::Each || *threads == most).map(move |it| (group, it))
        };
        self.groups.iter().flat_map(with).collect()
    }
}

fn list<T>(text: &str, one: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    text.split(',').map(one).collect()
}

fn number(text: &str) -> Result<usize> {
    text.parse().ok().filter(|number| *number > 0).with_context(|| format!("{text} is not a number above 0"))
}

fn beside(name: &str) -> Result<Beside> {
    let known = [Beside::LlamaCpp, Beside::Candle].into_iter().find(|beside| beside.name() == name);
    known.with_context(|| format!("{name} is not llama.cpp or candle"))
}

fn shape(name: &str) -> Result<&'static Shape> {
    SHAPES.into_iter().find(|shape| shape.name == name).with_context(|| format!("{name} is not 135m, 1.1b or 3b"))
}

fn mixture(name: &str) -> Result<Mixture> {
    let known = Mixture::ALL.into_iter().find(|mixture| mixture.name().eq_ignore_ascii_case(name));
    known.with_context(|| format!("{name} is not q8_0, q4_k_m, bf16 or q4_0"))
}

fn group(name: &str) -> Result<Group> {
    let known = GROUPS.into_iter().find(|group| group.name == name);
    known.with_context(|| format!("{name} is not prefill, decode, depth, batch, serve or load"))
}

/// A file that goes when the bench ends, however it ends.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Measures, and prints a table for each file.
///
/// # Errors
/// When what it is beside cannot be had, or something could not be measured.
pub(super) fn run(root: &Path, plan: &Plan) -> Result<()> {
    let peer = Peer::install(root, plan)?;
    let ours = Ours::build(root)?;
    let folder = root.join("target/bench");
    fs::create_dir_all(&folder)?;
    let which = plan.beside.about(plan.llama.as_deref());
    println!("{}; beside {which}; rounds in turns: {}, medians", machine::describe(), plan.rounds);
    let began = (Busy::now(), Instant::now());
    for shape in &plan.shapes {
        for mixture in &plan.types {
            let file = Temporary(folder.join(format!("llama-{}-{}.gguf", shape.name, mixture.name())));
            random_gguf::write(&file.0, shape, *mixture)?;
            let own = || machine::children_cpu() + process::cpu(std::process::id()) + ours.daemons.get();
            let before = (Busy::now(), own(), Instant::now());
            let all = measure(plan, &file.0, &ours, &peer)?;
            let others = Busy::now().foreign_share(before.0, own() - before.1, before.2.elapsed());
            println!("\n{}", table::table(shape, *mixture, plan.beside.name(), &all));
            println!("\nOther work on the machine meanwhile: {:.0} %", others * 100.0);
        }
    }
    let stolen = Busy::now().stolen_share(began.0, began.1.elapsed());
    println!("\nStolen by others: {:.0} % of {:.0} s", stolen * 100.0, began.1.elapsed().as_secs_f64());
    Ok(())
}

/// All rounds over a file.
fn measure(plan: &Plan, file: &Path, ours: &Ours, peer: &Peer) -> Result<Vec<Series>> {
    let turns = plan.turns();
    let figures = turns.iter().flat_map(|(group, threads)| group.figures.iter().map(|figure| (*figure, *threads)));
    let mut all: Vec<Series> =
        figures.map(|(figure, threads)| Series { figure, threads, samples: Vec::new() }).collect();
    for round in 0..plan.rounds {
        let mut series = all.iter_mut();
        for (turn, (group, threads)) in turns.iter().enumerate() {
            eprintln!("{}: round {}, {} with {threads} threads", file.display(), round + 1, group.name);
            let limits = ours.limits(*threads)?;
            let (mine, other);
            if (round + turn).is_multiple_of(2) {
                mine = ours.measure(group.figures, file, *threads)?;
                other = peer.measure(group.figures, file, *threads)?;
            } else {
                other = peer.measure(group.figures, file, *threads)?;
                mine = ours.measure(group.figures, file, *threads)?;
            }
            for ((ours, theirs), series) in mine.into_iter().zip(other).zip(&mut series) {
                series.samples.push(Sample { ours, theirs, limits });
            }
        }
    }
    Ok(all)
}
