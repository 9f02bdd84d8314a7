//! Starting the queen: the program beside this one, on the address it is expected at.

use std::net::TcpStream;
use std::time::Duration;

use rbee_client::{ClientError, QueenClient};
use rbee_supervisor::daemon::{self, DaemonSpec, sibling};
use tokio::time::{Instant, sleep};

use crate::connect::{QUEEN, Reached, check};
use crate::exit::{Exit, Failure};
use crate::settings::{Address, Context};

/// Longest time until the queen listens, and until one that another command started answers.
const LIMIT: Duration = Duration::from_secs(20);

/// How often a person is shown that the start goes on.
const TICK: Duration = Duration::from_millis(200);

/// Starts the queen, or finds the one that another command has just started.
///
/// # Errors
/// What kept it from listening, in its own words, or that who answers is not ours.
pub(crate) async fn launch(context: &Context, client: QueenClient) -> Result<Reached, Failure> {
    let spec = spec(context)?;
    context.printer.detail(&format!("starting {} {}", spec.program.display(), spec.args.join(" ")));
    let at = context.queen.bind();
    let there = move || TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_ok();
    let mut start = tokio::task::spawn_blocking(move || daemon::start(&spec, there).map_err(Failure::refused));
    let outcome = loop {
        tokio::select! {
            outcome = &mut start => break outcome.map_err(std::io::Error::from)?,
            () = sleep(TICK) => context.printer.progress("starting the queen"),
        }
    };
    context.printer.progress_over();
    let started = match outcome? {
        daemon::Start::Started(_) => true,
        daemon::Start::There => false,
    };
    let info = answer(&client).await?;
    check(context, &info)?;
    if started {
        context.printer.note("queen and hive keep running; `rbee down` stops them");
    }
    Ok(Reached { client, info, started })
}

fn spec(context: &Context) -> Result<DaemonSpec, Failure> {
    // Its own settings say where it binds, possibly wider than where it is found; a flag only where they differ.
    let expected = Address::of(context.settings.queen_bind.value) == context.queen;
    let args = if expected { Vec::new() } else { vec!["--bind".into(), context.queen.bind().to_string()] };
    let program = sibling(QUEEN)?;
    if !program.is_file() {
        return Err(Failure::new(Exit::Fault, format!("cannot start the queen: {} is not there", program.display()))
            .hint("the four programs belong into one folder: install or build rbee again"));
    }
    Ok(DaemonSpec {
        program,
        args,
        env: Vec::new(),
        lock: context.home.run.join("start-queen.lock"),
        log: context.out_file("queen"),
        limit: LIMIT,
    })
}

/// A queen that listens answers within moments; one that stands in its way may not be a queen.
async fn answer(client: &QueenClient) -> Result<rbee_wire::view::InfoReply, Failure> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match client.info().await {
            Err(ClientError::Unreachable { .. }) if Instant::now() < deadline => sleep(Duration::from_millis(5)).await,
            answer => return answer.map_err(Failure::from),
        }
    }
}
