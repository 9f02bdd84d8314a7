//! Compiles the kernels with nvcc, where they are asked for.

use std::path::PathBuf;
use std::process::Command;

/// Machine code for the chips that servers have, and PTX that the driver compiles for all others since Ampere: bf16 in the
/// matrix units begins there.
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_80,code=compute_80"];

/// What is compiled, each into an image of its own.
const SOURCES: [&str; 2] = ["kernels", "attention"];

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names a folder"));
    let nvcc = std::env::var_os("CUDA_HOME").map_or_else(|| "nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"));
    for source in SOURCES {
        let mut command = Command::new(&nvcc);
        command.args(["-fatbin", "-O3", "-std=c++17", "--compress-mode=size", "-o"]).arg(out.join(source));
        command.args(TARGETS.map(|target| format!("-gencode={target}"))).arg(format!("cuda/{source}.cu"));
        let status = command.status();
        assert!(
            status.as_ref().is_ok_and(std::process::ExitStatus::success),
            "{} did not compile {source}.cu ({status:?}); `cargo xtask cuda check` brings a toolkit and uses it",
            nvcc.display()
        );
    }
}
