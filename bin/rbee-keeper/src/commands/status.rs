//! `status`: the whole picture, once or again and again.

use std::time::Duration;

use rbee_client::{ClientError, QueenClient};
use rbee_wire::JobRequest;
use rbee_wire::view::StatusView;
use serde_json::json;

use super::the_one;
use crate::cli::StatusArgs;
use crate::connect::{self, Start};
use crate::exit::Failure;
use crate::follow;
use crate::printer::{Data, Outcome, Shown};
use crate::render;
use crate::settings::Context;

pub(crate) async fn status(context: &Context, args: StatusArgs) -> Result<Outcome, Failure> {
    let queen = connect::queen(context, Start::Never).await?;
    if !args.watch {
        return Ok(look(context, &queen).await?.into());
    }
    let printer = &context.printer;
    let mut first = true;
    loop {
        let mut shown = look(context, &queen).await?;
        if printer.stdout_terminal && printer.data == Data::Text {
            // Home, and clear to the end: the picture is redrawn in place.
            shown.text = format!("\x1b[H\x1b[2J{}", shown.text);
        } else if !first {
            shown.text = format!("\n{}", shown.text);
        }
        first = false;
        printer.show(&shown)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn look(context: &Context, queen: &QueenClient) -> Result<Shown, Failure> {
    let value = the_one(follow::call(context, queen, &JobRequest::Status {}).await?);
    let view: StatusView = serde_json::from_value(value.clone())
        .map_err(|error| ClientError::Protocol { url: queen.url().to_owned(), problem: error.to_string() })?;
    let jobs = queen.jobs().await?.jobs;
    let text = render::status(queen.url(), &view, &jobs);
    let mut json = value;
    if let Some(map) = json.as_object_mut() {
        map.insert("jobs".into(), json!(jobs));
    }
    Ok(Shown::new(json, text))
}
