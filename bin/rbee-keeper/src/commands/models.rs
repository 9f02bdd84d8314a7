//! `model …` and `plan`: a hive's store, and what is loaded.

use std::io::{self, IsTerminal, Write};

use rbee_wire::job::{ModelImport, ModelLoad, ModelPlan, ModelUnload, OfModel, OfStored};
use rbee_wire::worker::LoadOptions;
use rbee_wire::{JobRequest, ModelRef};

use super::infer::{checked, model_ref};
use super::workers::{at, list, one};
use crate::cli::{ImportArgs, LoadArgs, ModelVerb, PlanArgs, RemoveArgs, StoredArgs};
use crate::connect::Start;
use crate::exit::{Exit, Failure};
use crate::printer::Outcome;
use crate::render;
use crate::settings::Context;

pub(crate) async fn model(context: &Context, verb: ModelVerb) -> Result<Outcome, Failure> {
    match verb {
        ModelVerb::Download(args) => {
            let model = named(context, &args.model)?;
            let job = JobRequest::ModelDownload(OfModel { hive_id: args.on.hive, model });
            one(context, Start::IfNeeded, job, render::fetched).await
        }
        ModelVerb::List(on) => list(context, Start::Never, JobRequest::ModelList(at(on)), render::stored).await,
        ModelVerb::Get(args) => {
            one(context, Start::Never, JobRequest::ModelGet(stored(context, args)?), render::stored_one).await
        }
        ModelVerb::Delete(args) => delete(context, args).await,
        ModelVerb::Load(args) => load(context, args).await,
        ModelVerb::Unload(args) => {
            let job = JobRequest::ModelUnload(ModelUnload { model: named(context, &args.model)? });
            list(context, Start::Never, job, render::unloaded).await
        }
        ModelVerb::Import(args) => import(context, args).await,
    }
}

/// `rbee plan`.
pub(crate) async fn plan(context: &Context, args: PlanArgs) -> Result<Outcome, Failure> {
    let job = JobRequest::ModelPlan(ModelPlan {
        hive_id: args.on.hive,
        model: named(context, &args.model)?,
        device: args.device,
        fetch: false,
        load: LoadOptions {
            ctx: args.ctx,
            slots: args.slots,
            threads: None,
            kv_type: args.kv_type,
            quantize: args.quantize,
        },
    });
    one(context, Start::Never, checked(&job)?, render::plan).await
}

fn named(context: &Context, text: &str) -> Result<ModelRef, Failure> {
    model_ref(text, context.user.as_deref())
}

fn stored(context: &Context, args: StoredArgs) -> Result<OfStored, Failure> {
    Ok(OfStored { hive_id: args.on.hive, id: named(context, &args.id)?.to_string() })
}

async fn load(context: &Context, args: LoadArgs) -> Result<Outcome, Failure> {
    let job = JobRequest::ModelLoad(ModelLoad {
        model: named(context, &args.model)?,
        device: args.device,
        hive_id: args.hive,
        keep_alive: args.keep_alive,
    });
    one(context, Start::IfNeeded, job, render::loaded).await
}

/// Removes a model after a question, where somebody is there to answer it.
async fn delete(context: &Context, args: RemoveArgs) -> Result<Outcome, Failure> {
    let of = stored(context, args.of)?;
    let asks = !args.yes && io::stdin().is_terminal() && io::stderr().is_terminal();
    if asks {
        let id = of.id.clone();
        let answer = tokio::task::spawn_blocking(move || {
            eprint!("Remove {id} from this machine's store? [y/N] ");
            io::stderr().flush()?;
            let mut line = String::new();
            io::stdin().read_line(&mut line).map(|_| line)
        });
        let answer = answer.await.map_err(io::Error::other)??;
        if !matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
            return Err(Failure::new(Exit::Failed, "nothing was removed"));
        }
    }
    one(context, Start::Never, JobRequest::ModelDelete(of), render::removed).await
}

async fn import(context: &Context, args: ImportArgs) -> Result<Outcome, Failure> {
    let path = if args.path.starts_with(['/', '.', '~']) { args.path } else { format!("./{}", args.path) };
    let model = named(context, &path)?;
    let id = match args.name {
        Some(name) => name,
        None => {
            let text = model.to_string();
            let last = text.rsplit('/').next().unwrap_or_default();
            format!("local/{}", last.strip_suffix(".gguf").unwrap_or(last))
        }
    };
    if !matches!(id.parse(), Ok(ModelRef::Hub { revision: None, file: None, .. })) {
        return Err(
            Failure::usage(format!("`{id}` is not a name for a model in the store")).hint("name it with --as org/name")
        );
    }
    let job = JobRequest::ModelImport(ModelImport { hive_id: args.on.hive, model, id });
    one(context, Start::IfNeeded, job, render::fetched).await
}
