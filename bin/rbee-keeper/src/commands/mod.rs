//! A file per family of verbs. A command returns its result; those that stream print as they go along.

mod about;
mod chat;
mod daemons;
mod doctor;
mod infer;
mod jobs;
mod keys;
mod models;
mod status;
mod workers;

use rbee_wire::JobRequest;
use serde_json::Value;

use crate::cli::{ModelVerb, Verb};
use crate::connect::{self, Start};
use crate::exit::Failure;
use crate::follow;
use crate::printer::Outcome;
use crate::settings::Context;

/// Carries a verb out.
///
/// # Errors
/// What was attempted, what happened and what to do next.
pub(crate) async fn run(context: &Context, verb: Verb) -> Result<Outcome, Failure> {
    match verb {
        Verb::Infer(args) => infer::infer(context, args).await,
        Verb::Chat(args) => chat::chat(context, args).await,
        Verb::Run(args) => infer::run(context, args).await,
        Verb::Status(args) => status::status(context, args).await,
        Verb::Up => daemons::up(context).await,
        Verb::Down => daemons::down(context).await,
        Verb::Queen(verb) => daemons::queen(context, verb).await,
        Verb::Hive(verb) => daemons::hive(context, verb).await,
        Verb::Worker(verb) => workers::worker(context, verb).await,
        Verb::Model(verb) => models::model(context, verb).await,
        Verb::Pull(args) => models::model(context, ModelVerb::Download(args)).await,
        Verb::Ls(args) => models::model(context, ModelVerb::List(args)).await,
        Verb::Show(args) => models::model(context, ModelVerb::Get(args)).await,
        Verb::Rm(args) => models::model(context, ModelVerb::Delete(args)).await,
        Verb::Stop(args) => models::model(context, ModelVerb::Unload(args)).await,
        Verb::Plan(args) => models::plan(context, args).await,
        Verb::Job(verb) => jobs::job(context, verb).await,
        Verb::Key(verb) => keys::key(context, verb).await,
        Verb::Explain(args) => jobs::explain(context, &args.job).await,
        Verb::Config => about::config(context),
        Verb::Doctor => doctor::doctor(context).await,
        Verb::Completions { shell } => about::completions(shell),
        Verb::Version => about::version(),
    }
}

/// Finds or starts the queen, runs one operation there, and gives its values.
async fn call(context: &Context, start: Start, job: &JobRequest) -> Result<Vec<Value>, Failure> {
    let queen = connect::queen(context, start).await?;
    follow::call(context, &queen, job).await
}

/// The value of an operation that has one.
fn the_one(values: Vec<Value>) -> Value {
    values.into_iter().next().unwrap_or(Value::Null)
}

/// The last lines of a text.
fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| format!("{}\n", crate::printer::printable(line))).collect()
}
