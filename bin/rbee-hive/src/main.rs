//! The hive's process: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use rbee_hive::args::Cli;

fn main() -> ExitCode {
    match rbee_hive::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            rbee_supervisor::daemon::announce_failure(&error);
            eprintln!("error: {error}");
            if let Some(hint) = &error.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(error.code.exit_code())
        }
    }
}
