//! rbee, the command line: thin, and without state of its own.
//!
//! A command line is parsed ([`cli`]), flags, environment and file are merged ([`settings`]), the verb runs
//! and returns its result, and the printer shows it as text or JSON. Start with [`run`]; the way to the
//! queen is [`connect`], the way through a job's events is [`follow`].

pub mod cli;
mod commands;
mod connect;
mod exit;
mod follow;
mod launch;
mod printer;
mod processes;
mod render;
mod settings;

use std::ffi::OsString;

use clap::{CommandFactory, Parser};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::{Cli, Verb};
use crate::exit::{Exit, Failure};
use crate::printer::{Outcome, Printer};
use crate::settings::{Context, CtrlC};

/// The command line's description, for the generated reference and the completions.
pub fn cli() -> clap::Command {
    Cli::command()
}

/// Runs a command line and gives the exit code.
pub fn run(args: impl IntoIterator<Item = OsString>, env: &dyn Fn(&str) -> Option<String>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are printed to stdout, what is wrong with the command line to stderr.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.code() } else { Exit::Done.code() };
        }
    };
    let printer = Printer::new(&cli.global, env);
    let context = match Context::new(&cli.global, printer, env) {
        Ok(context) => context,
        Err(failure) => {
            Printer::new(&cli.global, env).failure(&failure);
            return failure.exit.code();
        }
    };
    match execute(&context, cli.verb) {
        Ok(exit) => exit.code(),
        Err(failure) if failure.reader_left => Exit::Done.code(),
        Err(failure) => {
            context.printer.failure(&failure);
            failure.exit.code()
        }
    }
}

fn execute(context: &Context, verb: Verb) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let outcome = tokio::select! {
            outcome = commands::run(context, verb) => outcome,
            () = ended(context, &mut interrupts) => Err(Failure::interrupted()),
        };
        // Whoever asked has left or does not want it any more: nobody is to compute it.
        if outcome.as_ref().is_err_and(|failure| failure.reader_left || failure.exit == Exit::Interrupted) {
            follow::cancel_current(context, &mut interrupts).await;
        }
        outcome
    });
    // A write to a reader that stands still must not keep the program.
    runtime.shutdown_background();
    match outcome? {
        Outcome::Streamed => Ok(Exit::Done),
        Outcome::Shown(shown) => {
            context.printer.show(&shown)?;
            Ok(shown.exit)
        }
    }
}

/// Waits for a Ctrl-C that ends the program.
async fn ended(context: &Context, interrupts: &mut Signal) {
    loop {
        interrupts.recv().await;
        if context.ctrl_c.get() == CtrlC::Program {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere_and_every_verb_has_help() {
        fn walk(mut command: clap::Command) {
            let text = command.render_long_help().to_string();
            assert!(text.contains("Usage:"), "{text}");
            for verb in command.get_subcommands() {
                assert!(verb.get_about().is_some(), "{} says nothing of itself", verb.get_name());
                walk(verb.clone());
            }
        }
        let mut command = cli();
        command.clone().debug_assert();
        command.build();
        walk(command);
    }

    #[test]
    fn every_operation_of_the_job_api_has_its_verb() {
        for row in rbee_wire::op::OPERATIONS {
            let mut command = cli();
            for word in row.verb.split(' ').skip(1) {
                let Some(next) = command.find_subcommand(word) else { panic!("no `{}` for {}", row.verb, row.name) };
                command = next.clone();
            }
            assert!(!command.has_subcommands(), "`{}` is no verb", row.verb);
        }
    }

    fn exit_of(args: &[&str]) -> u8 {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().to_str().unwrap().to_owned();
        let env = move |name: &str| match name {
            "RBEE_HOME" => Some(path.clone()),
            // Nothing listens on port 1 of a machine that tests run on.
            "RBEE_QUEEN_URL" => Some("http://127.0.0.1:1".into()),
            "RBEE_HIVE_BIND" => Some("127.0.0.1:1".into()),
            _ => None,
        };
        let code = run(std::iter::once("rbee").chain(args.iter().copied()).map(OsString::from), &env);
        assert!(!root.path().join("run").exists(), "{args:?} started something");
        code
    }

    #[test]
    fn a_wrong_command_line_exits_with_2_before_anything_is_started() {
        for args in [
            &["no-such-verb"][..],
            &["infer", "a", "-p", "b"],
            &["infer", "a", "--temperature", "nan"],
            &[],
            &["infer", "a", "--raw", "--system", "s"],
            &["infer", "a", "-m", "a b"],
            &["infer", "a", "--device", "gpu"],
            &["worker", "spawn"],
            &["job", "get", ""],
            &["key", "create"],
            &["key", "create", "--name", "n", "--scope", "king"],
            &["key", "create", "--name", "n", "--rate", "0"],
            &["key", "revoke"],
            &["status", "-q", "-v"],
            &["status", "--queen", "ftp://x"],
        ] {
            assert_eq!(exit_of(args), 2, "{args:?}");
        }
    }

    #[test]
    fn a_value_out_of_range_is_a_refused_request_and_starts_nothing() {
        for flag in [["--temperature", "9"], ["--max-tokens", "0"], ["--top-p", "-1"], ["--stop", ""]] {
            assert_eq!(exit_of(&["infer", "a", flag[0], flag[1]]), 1, "{flag:?}");
        }
    }

    #[test]
    fn verbs_that_read_or_stop_start_nothing_and_exit_with_4() {
        for args in [
            &["status"][..],
            &["ps"],
            &["down"],
            &["queen", "stop"],
            &["queen", "status"],
            &["queen", "info"],
            &["hive", "stop"],
            &["hive", "list"],
            &["worker", "list"],
            &["worker", "retire", "w"],
            &["worker", "logs", "w"],
            &["worker", "process", "delete", "7"],
            &["job", "list"],
            &["key", "list"],
            &["key", "create", "--name", "n", "--no-start"],
            &["explain", "job-1"],
            &["model", "list"],
            &["infer", "a", "--no-start"],
            &["up", "--no-start"],
            &["worker", "spawn", "--model", "tinybee", "--no-start"],
        ] {
            assert_eq!(exit_of(args), 4, "{args:?}");
        }
    }

    #[test]
    fn what_needs_no_daemon_works_without_one() {
        for args in
            [&["version"][..], &["config", "--json"], &["completions", "bash"], &["--version"], &["infer", "--help"]]
        {
            assert_eq!(exit_of(args), 0, "{args:?}");
        }
    }
}
