//! The worker that computes on NVIDIA GPUs.

fn main() -> std::process::ExitCode {
    llm_worker_rbee::program()
}
