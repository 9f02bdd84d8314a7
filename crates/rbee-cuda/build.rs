//! Compiles the kernels with nvcc, where they are asked for.

use std::path::PathBuf;
use std::process::Command;

/// Machine code for the chips that servers have, and PTX that the driver compiles for all others since Ampere: bf16 in the
/// matrix units begins there.
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_80,code=compute_80"];

fn main() {
    println!("cargo::rerun-if-changed=cuda/kernels.cu");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names a folder")).join("kernels.fatbin");
    let nvcc = std::env::var_os("CUDA_HOME").map_or_else(|| "nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"));
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "--compress-mode=size", "-o"]).arg(&out);
    for target in TARGETS {
        command.arg(format!("-gencode={target}"));
    }
    let status = command.arg("cuda/kernels.cu").status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{} did not compile the kernels ({status:?}); `cargo xtask cuda check` brings a toolkit and uses it",
        nvcc.display()
    );
}
