//! `job list|get|cancel|attach` and `explain`.

use rbee_wire::JobId;
use serde_json::json;

use super::infer::{Print, Stream, follow};
use crate::cli::JobVerb;
use crate::connect::{self, Start};
use crate::exit::Failure;
use crate::follow::Follower;
use crate::printer::{Outcome, Shown};
use crate::render;
use crate::settings::Context;

pub(crate) async fn job(context: &Context, verb: JobVerb) -> Result<Outcome, Failure> {
    let queen = connect::queen(context, Start::Never).await?;
    Ok(match verb {
        JobVerb::List => {
            let list = queen.jobs().await?;
            Shown::new(json!(list.jobs), render::jobs(&list.jobs)).into()
        }
        JobVerb::Get(args) => {
            let view = queen.job(&args.job).await?;
            Shown::new(json!(view), render::job(&view)).into()
        }
        JobVerb::Cancel(args) => {
            queen.cancel(&args.job).await?;
            Shown::new(json!({ "job_id": args.job, "cancelled": true }), format!("{} is cancelled\n", args.job)).into()
        }
        JobVerb::Attach(args) => {
            let stream = queen.stream_job(&args.job, None).await?;
            let follower = Follower::listening(context, queen, stream, "waiting for the job");
            return follow(context, follower, Print { stream: Stream::AsItComes, timings: false }).await;
        }
    })
}

pub(crate) async fn explain(context: &Context, job: &JobId) -> Result<Outcome, Failure> {
    let view = connect::queen(context, Start::Never).await?.job(job).await?;
    Ok(Shown::new(json!(view), render::explain(&view)).into())
}
