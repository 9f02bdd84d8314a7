//! The worker's process: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use llm_worker_rbee::args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let inspects = cli.command.is_some();
    match llm_worker_rbee::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if inspects {
                // The hive reads it from there.
                println!("{}", serde_json::to_string(&error).expect("wire types serialize to JSON"));
            }
            eprintln!("error: {error}");
            if let Some(hint) = &error.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(error.code.exit_code())
        }
    }
}
