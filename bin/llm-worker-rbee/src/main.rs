//! The worker that computes on the CPU.

fn main() -> std::process::ExitCode {
    llm_worker_rbee::program()
}
