//! The hive's process: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use rbee_hive::args::Cli;
use rbee_supervisor::daemon;

fn main() -> ExitCode {
    daemon::exit_code(rbee_hive::run(Cli::parse()))
}
