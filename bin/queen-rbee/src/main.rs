//! The queen's process: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use queen_rbee::args::Cli;
use rbee_supervisor::daemon;

fn main() -> ExitCode {
    daemon::exit_code(queen_rbee::run(Cli::parse()))
}
