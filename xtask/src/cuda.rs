//! What needs NVIDIA's compiler: a toolkit from PyPI's packages in `target/cuda`, and what is built and packed with it. No GPU
//! is needed for any of it but `gpu-check`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Compiler and headers of CUDA 13.0, whose code a driver of version 580 takes: newer compilers write what it refuses.
const PACKAGES: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// The test and bench programs that go into the archive: crate and target.
const PROGRAMS: [(&str, &str); 5] = [
    ("rbee-cuda", "parity"),
    ("rbee-cuda", "attention"),
    ("rbee-models", "it"),
    ("rbee-cuda", "decode"),
    ("rbee-models", "gpu"),
];

/// The worker's program.
const WORKER: &str = "llm-worker-rbee-cuda";

/// Largest archive, in bytes.
const LARGEST: u64 = 60 << 20;

fn folder(root: &Path) -> PathBuf {
    root.join("target/cuda")
}

/// Brings the toolkit, unless it is there; its folder.
///
/// # Errors
/// When the packages cannot be had.
pub fn toolkit(root: &Path) -> Result<PathBuf> {
    let site = folder(root).join("toolkit");
    let (home, made) = (site.join("nvidia/cu13"), site.join("made"));
    let packages = PACKAGES.join(" ");
    if std::fs::read_to_string(&made).is_ok_and(|before| before == packages) {
        return Ok(home);
    }
    let _ = std::fs::remove_dir_all(&site);
    std::fs::create_dir_all(&site).with_context(|| format!("cannot make {}", site.display()))?;
    let flags = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", "--target"];
    let mut pip = Command::new("python3");
    run(pip.args(flags).arg(&site).args(PACKAGES).env("PIP_ROOT_USER_ACTION", "ignore"))?;
    std::fs::write(made, packages).context("cannot write into the cache")?;
    Ok(home)
}

/// Cargo with the toolkit, on all crates with the feature: external crates are then those of every other build, made once.
fn cargo(root: &Path, home: &Path, args: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    let all = ["--release", "--locked", "--workspace", "--features", "llm-worker-rbee/cuda"];
    let (verb, rest) = args.split_first().map_or(("build", args), |(verb, rest)| (*verb, rest));
    cargo.arg(verb).args(all).args(rest).current_dir(root).env("CUDA_HOME", home);
    cargo
}

fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let status = command.status().with_context(|| shown.clone())?;
    if !status.success() {
        bail!("{shown} failed");
    }
    Ok(())
}

/// Compiles the kernels, lints all that uses them and runs the kernels' tests, which say what they skip where there is no GPU,
/// and sees the worker say what is missing there. The decoder's tests are in [`pack`]: without a GPU there is little to them.
///
/// # Errors
/// When any of it fails.
pub fn check(root: &Path) -> Result<()> {
    let home = toolkit(root)?;
    let crates = ["--exclude", "rbee-e2e", "--exclude", "xtask", "--exclude", "rbee-fuzz"];
    run(cargo(root, &home, &["clippy"]).args(crates).args(["--all-targets", "--", "-D", "warnings"]))?;
    run(cargo(root, &home, &["test"]).args(["--test", "parity", "--test", "attention", "--", "--nocapture"]))?;
    let worker = build(root)?;
    says(&worker, &["inspect", "tinybee"], 0, "weights")?;
    says(&worker, &["inspect", "tinybee", "--quantize", "q8_0"], 1, "kept in bf16")?;
    says(&worker, &["inspect", "tinybee", "--kv-type", "f32"], 1, "on a GPU it is bf16")?;
    says(&worker, &["--device", "cpu"], 3, "computes on NVIDIA GPUs only")?;
    if Path::new("/dev/nvidiactl").exists() {
        return Ok(());
    }
    says(&worker, &[], 3, "no NVIDIA driver")
}

/// Runs the worker and compares its exit code, and some words of what it says.
fn says(worker: &Path, args: &[&str], code: i32, words: &str) -> Result<()> {
    let output = Command::new(worker).args(args).output().context("the worker")?;
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    if output.status.code() != Some(code) || !said.contains(words) {
        bail!(
            "llm-worker-rbee-cuda {} ends with {:?}, not {code}, and says: {said}",
            args.join(" "),
            output.status.code()
        );
    }
    Ok(())
}

/// Builds the worker for GPUs and leaves it, stripped, where a hive that was built in this tree finds it.
///
/// # Errors
/// When it does not build.
pub fn build(root: &Path) -> Result<PathBuf> {
    let home = toolkit(root)?;
    run(cargo(root, &home, &["build"]).args(["--bin", WORKER]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let (built, worker) = (target.join("release").join(WORKER), folder(root).join(WORKER));
    // A worker may be running: its file is replaced, not written to.
    let fresh = worker.with_extension("new");
    run(Command::new("strip").arg("-o").arg(&fresh).arg(built))?;
    std::fs::rename(&fresh, &worker).context("the worker's program")?;
    eprintln!("cuda: {} is there; a hive that is built here uses it from now on", worker.display());
    Ok(worker)
}

/// [`check`] where the toolkit can be had, else a word that it was skipped.
///
/// # Errors
/// As [`check`].
pub fn check_if_possible(root: &Path) -> Result<()> {
    match toolkit(root) {
        Ok(_) => check(root),
        Err(why) => {
            eprintln!("cuda: SKIPPED: the kernels are not compiled, since their compiler cannot be had: {why:#}");
            Ok(())
        }
    }
}

/// Makes one archive with the test and bench programs and the script that runs them: all that a machine with a GPU needs.
///
/// # Errors
/// When something does not build, or the archive is too large.
pub fn pack(root: &Path) -> Result<PathBuf> {
    let home = toolkit(root)?;
    let worker = build(root)?;
    let programs = [
        "test",
        "--no-run",
        "--test",
        "parity",
        "--test",
        "attention",
        "--test",
        "it",
        "--bench",
        "decode",
        "--bench",
        "gpu",
    ];
    let built = executables(cargo(root, &home, &programs).arg("--message-format=json-render-diagnostics"))?;
    let pack = folder(root).join("gpu-check");
    let _ = std::fs::remove_dir_all(&pack);
    std::fs::create_dir_all(&pack).with_context(|| format!("cannot make {}", pack.display()))?;
    for (package, name) in PROGRAMS {
        let place = format!("crates/{package}#");
        let found = built.iter().find(|(id, program)| {
            let file = Path::new(program).file_stem().and_then(|file| file.to_str()).unwrap_or_default();
            id.contains(&place) && file.starts_with(&format!("{name}-"))
        });
        let (_, program) = found.with_context(|| format!("no {name} of {package}"))?;
        run(Command::new("strip").arg("-o").arg(pack.join(name)).arg(program))?;
    }
    std::fs::copy(&worker, pack.join(WORKER)).context("the worker's program")?;
    let fixtures = pack.join("fixtures");
    std::fs::create_dir_all(&fixtures).context("the fixtures")?;
    run(Command::new("cp").arg("-R").arg(root.join("tests/fixtures/models")).arg(&fixtures))?;
    run(Command::new("cp").arg("-R").arg(root.join("tinybee/model")).arg(fixtures.join("tinybee")))?;
    for script in ["crates/rbee-cuda/gpu-check.sh", "crates/rbee-models/benches/gpu_transformers.py"] {
        let file = root.join(script);
        std::fs::copy(&file, pack.join(file.file_name().unwrap_or_default())).context("a script")?;
    }
    let archive = folder(root).join("gpu-check.tar.gz");
    run(Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(folder(root)).arg("gpu-check"))?;
    let size = archive.metadata().context("the archive")?.len();
    if size > LARGEST {
        bail!("{} has {size} bytes, more than {LARGEST}", archive.display());
    }
    eprintln!(
        "cuda: {} ({} KiB); on a machine with a GPU, unpack it and run gpu-check/gpu-check.sh",
        archive.display(),
        size >> 10
    );
    Ok(pack)
}

/// Package and file of the programs that a build makes.
fn executables(build: &mut Command) -> Result<Vec<(String, String)>> {
    let output = build.stderr(std::process::Stdio::inherit()).output().context("cargo")?;
    if !output.status.success() {
        bail!("the programs do not build");
    }
    let lines = String::from_utf8(output.stdout).context("cargo's messages")?;
    let messages = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(messages.filter_map(|message| Some((text(&message["package_id"])?, text(&message["executable"])?))).collect())
}

/// Runs tests and bench on this machine's GPU; the report is `report.md` beside them.
///
/// # Errors
/// When there is no GPU, or a test fails.
pub fn gpu_check(root: &Path) -> Result<()> {
    let pack = pack(root)?;
    run(Command::new("sh").arg(pack.join("gpu-check.sh")))
}
