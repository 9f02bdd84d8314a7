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

/// The test and bench programs that go into the archive.
const PROGRAMS: [&str; 3] = ["parity", "attention", "decode"];

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

/// Cargo on the crate of the kernels, with the toolkit and a folder of its own for what it makes.
fn cargo(root: &Path, home: &Path, args: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    let all = ["--release", "--locked", "--package", "rbee-cuda", "--features", "cuda"];
    let (verb, rest) = args.split_first().map_or(("build", args), |(verb, rest)| (*verb, rest));
    cargo.arg(verb).args(all).args(rest).current_dir(root);
    cargo.env("CUDA_HOME", home).env("CARGO_TARGET_DIR", folder(root).join("build"));
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

/// Compiles the kernels, lints their crate and runs its tests, which say what they skip where there is no GPU.
///
/// # Errors
/// When any of it fails.
pub fn check(root: &Path) -> Result<()> {
    let home = toolkit(root)?;
    run(&mut cargo(root, &home, &["clippy", "--all-targets", "--", "-D", "warnings"]))?;
    run(&mut cargo(root, &home, &["test", "--", "--nocapture"]))
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
    let mut build = cargo(root, &home, &["build", "--tests", "--benches", "--message-format=json-render-diagnostics"]);
    let output = build.stderr(std::process::Stdio::inherit()).output().context("cargo build")?;
    if !output.status.success() {
        bail!("the programs do not build");
    }
    let pack = folder(root).join("gpu-check");
    let _ = std::fs::remove_dir_all(&pack);
    std::fs::create_dir_all(&pack).with_context(|| format!("cannot make {}", pack.display()))?;
    let lines = String::from_utf8(output.stdout).context("cargo's messages")?;
    let messages = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let built: Vec<(String, String)> = messages
        .filter_map(|message| {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            Some((text(&message["target"]["name"])?, text(&message["executable"])?))
        })
        .collect();
    for name in PROGRAMS {
        let (_, program) = built.iter().find(|(target, _)| target == name).with_context(|| format!("no {name}"))?;
        run(Command::new("strip").arg("-o").arg(pack.join(name)).arg(program))?;
    }
    std::fs::copy(root.join("crates/rbee-cuda/gpu-check.sh"), pack.join("gpu-check.sh")).context("the script")?;
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

/// Runs tests and bench on this machine's GPU; the report is `report.md` beside them.
///
/// # Errors
/// When there is no GPU, or a test fails.
pub fn gpu_check(root: &Path) -> Result<()> {
    let pack = pack(root)?;
    run(Command::new("sh").arg(pack.join("gpu-check.sh")))
}
