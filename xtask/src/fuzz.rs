//! `cargo xtask fuzz [SECONDS] [TARGET]`: libFuzzer over the targets of `fuzz/`, for so long each.
//!
//! LLVM's SanitizerCoverage works on the stable compiler; the sanitizers do not. So memory and stack are bounded by the
//! system: an allocation beyond the bound fails, and with it the input that asked for it. What was found lies under
//! `target/fuzz`: inputs that reach something new in `found/TARGET`, those that fail in `failures`. To keep what a long run
//! found: `RBEE_FUZZ_TARGET=TARGET target/fuzz/HOST/release/fuzz -merge=1 fuzz/corpus/TARGET target/fuzz/found/TARGET`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

/// For each target, in `ci`.
pub const CI_SECONDS: &str = "5";

/// Counts edges and compares for libFuzzer; and checks what the crates' authors hold to be true.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions=on",
];

/// Seconds that one input may take: far above any bound in the code, for a machine that does other things too.
const TIMEOUT: &str = "5";

/// Stack that threads have unless they ask for another, in KiB.
const STACK_KIB: u64 = 2 << 10;

/// Memory that any input may take, in KiB, and by how much more per byte of its length.
const MEMORY_KIB: u64 = 256 << 10;
const MEMORY_PER_BYTE: u64 = 4;

/// Lines of a failed run's log that are shown.
const SHOWN: usize = 20;

/// Runs one target or all.
///
/// # Errors
/// When the targets do not build, or an input fails.
pub fn run(root: &Path, seconds: &str, only: Option<&str>) -> Result<()> {
    let seconds: u64 = seconds.parse().context("the seconds of each target")?;
    if !has_compiler()? {
        eprintln!("fuzz: skipped: no C++ compiler (neither `CXX` nor `c++` runs), which libFuzzer needs");
        return Ok(());
    }
    let fuzzer = Fuzzer::build(root)?;
    let targets = fuzzer.targets()?;
    let wanted: Vec<&Target> = targets.iter().filter(|target| only.is_none_or(|only| only == target.name)).collect();
    if wanted.is_empty() {
        let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
        bail!("no target of this name; there are {}", names.join(", "));
    }
    let mut failed = Vec::new();
    for target in wanted {
        if !fuzzer.fuzz(target, seconds)? {
            failed.push(target.name.as_str());
        }
    }
    if !failed.is_empty() {
        bail!("inputs fail in {}", failed.join(", "));
    }
    Ok(())
}

struct Target {
    name: String,
    max_len: u64,
}

struct Fuzzer {
    program: PathBuf,
    corpus: PathBuf,
    folder: PathBuf,
}

impl Fuzzer {
    fn build(root: &Path) -> Result<Self> {
        let folder = root.join("target/fuzz");
        let host = host()?;
        // The variable would replace the flags of `.cargo/config.toml`, and ours: all three are put together.
        let own = std::env::var("RUSTFLAGS").unwrap_or_default();
        let flags: Vec<&str> = FLAGS.iter().copied().chain(own.split_whitespace()).collect();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.args(["build", "--release", "--locked", "--package", "rbee-fuzz", "--features", "libfuzzer"]);
        // With a target named, build scripts and macros of the compiler go without the flags.
        build.args(["--target", &host, "--config", &format!("build.rustflags={flags:?}"), "--target-dir"]).arg(&folder);
        build.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").current_dir(root);
        if !build.status().context("cargo build")?.success() {
            bail!("the fuzz targets do not build");
        }
        let program = folder.join(host).join("release/fuzz");
        Ok(Self { program, corpus: root.join("fuzz/corpus"), folder })
    }

    fn targets(&self) -> Result<Vec<Target>> {
        let output = Command::new(&self.program).env("RBEE_FUZZ_TARGET", "list").output().context("the fuzzer")?;
        let lines = String::from_utf8(output.stdout)?;
        let target = |line: &str| -> Result<Target> {
            let (name, max_len) = line.split_once(' ').with_context(|| format!("a target in `{line}`"))?;
            Ok(Target { name: name.into(), max_len: max_len.parse()? })
        };
        lines.lines().map(target).collect()
    }

    /// Whether no input failed.
    fn fuzz(&self, target: &Target, seconds: u64) -> Result<bool> {
        let name = &target.name;
        let failures = self.folder.join("failures");
        let found = self.folder.join("found").join(name);
        // A run begins with what is kept in the tree, not with what an earlier one happened to find.
        let _ = std::fs::remove_dir_all(&found);
        std::fs::create_dir_all(&found)?;
        std::fs::create_dir_all(&failures)?;
        let log = self.folder.join(format!("{name}.log"));
        let last = self.folder.join(format!("{name}.last"));
        let prefix = format!("{}/{name}-", failures.display());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        // 0 would have libFuzzer choose.
        let seed = (now.as_millis() as u32).max(1);

        let file = std::fs::File::create(&log)?;
        let status = self
            .bounded(target)
            .args([format!("-seed={seed}"), format!("-max_total_time={seconds}"), format!("-artifact_prefix={prefix}")])
            .args(["-timeout=".to_owned() + TIMEOUT, format!("-max_len={}", target.max_len)])
            .args(["-print_final_stats=1"])
            .args([&found, &self.corpus.join(name)])
            .env("RBEE_FUZZ_LAST", &last)
            .stdout(Stdio::null())
            .stderr(file)
            .status()
            .context("the fuzzer")?;
        let text = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
        if status.success() {
            println!("fuzz: {name}: {}, seed {seed}", summary(&text));
            return Ok(true);
        }
        let lines: Vec<&str> = text.lines().filter(|line| !is_frame(line)).collect();
        for line in &lines[lines.len().saturating_sub(SHOWN)..] {
            eprintln!("  {line}");
        }
        let input = match saved(&text) {
            Some(path) => path.to_owned(),
            None => {
                let path = format!("{prefix}killed-{seed}");
                std::fs::copy(&last, &path)?;
                path
            }
        };
        eprintln!("fuzz: {name} failed with seed {seed} ({status}); all that it wrote is in {}", log.display());
        eprintln!("fuzz: the input is kept; again with:\n  {}", self.shown(target, &input));
        Ok(false)
    }

    /// The fuzzer with bounds on its memory and stack.
    fn bounded(&self, target: &Target) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{} && exec \"$0\" \"$@\"", limits(target))]).arg(&self.program);
        command.args(memory_flags(target)).env("RBEE_FUZZ_TARGET", &target.name);
        command
    }

    /// As [`Self::bounded`], to be typed.
    fn shown(&self, target: &Target, input: &str) -> String {
        let (limits, program, flags) = (limits(target), self.program.display(), memory_flags(target).join(" "));
        format!("({limits} && RBEE_FUZZ_TARGET={} {program} {flags} {input})", target.name)
    }
}

fn memory_kib(target: &Target) -> u64 {
    MEMORY_KIB + (target.max_len * MEMORY_PER_BYTE).div_ceil(1 << 10)
}

/// Bounds as the shell sets them: where data has none, the resident memory has.
fn limits(target: &Target) -> String {
    format!("ulimit -s {STACK_KIB} && ulimit -d {}", memory_kib(target))
}

fn memory_flags(target: &Target) -> [String; 2] {
    let mib = memory_kib(target).div_ceil(1 << 10);
    [format!("-rss_limit_mb={mib}"), format!("-malloc_limit_mb={mib}")]
}

/// Whether a line belongs to the frames of a stack.
fn is_frame(line: &str) -> bool {
    let text = line.trim_start();
    text != line && (text.starts_with("at ") || text.starts_with(|first: char| first.is_ascii_digit()))
}

/// Where libFuzzer says that it saved the input.
fn saved(log: &str) -> Option<&str> {
    log.lines().rev().find_map(|line| Some(line.split_once("Test unit written to ")?.1))
}

/// The facts of a run, from libFuzzer's output.
fn summary(log: &str) -> String {
    let stat = |name: &str| {
        let line = log.lines().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        line.and_then(|rest| rest.trim_start_matches(':').trim().parse::<u64>().ok()).unwrap_or_default()
    };
    let edges = log.lines().rev().find_map(|line| line.split_once(" cov: ")?.1.split(' ').next());
    format!(
        "{} inputs, {} a second, {} edges, {} MiB at most",
        stat("number_of_executed_units"),
        stat("average_exec_per_sec"),
        edges.unwrap_or("no"),
        stat("peak_rss_mb"),
    )
}

/// The triple of this machine.
fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let output = Command::new(rustc).arg("-vV").output().context("rustc -vV")?;
    let text = String::from_utf8(output.stdout)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

/// Whether there is a C++ compiler, where the build of libFuzzer looks for one.
fn has_compiler() -> Result<bool> {
    let mut version = Command::new("sh");
    version.args(["-c", "${CXX:-c++} --version"]).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(version.status().context("sh")?.success())
}
