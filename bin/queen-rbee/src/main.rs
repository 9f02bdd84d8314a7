//! The queen's process: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use queen_rbee::args::Cli;

fn main() -> ExitCode {
    match queen_rbee::run(Cli::parse()) {
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
