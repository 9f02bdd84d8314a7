//! The way to the queen: find the one that answers and make sure whose it is, or start one.
//!
//! A daemon on a loopback address must show that it knows this home's nonce before it gets a prompt. Only
//! verbs that need a queen start one, only on a loopback address, and only where nothing answers.

use std::time::Duration;

use rbee_client::{ClientError, HiveClient, Hives, QueenClient};
use rbee_supervisor::build_id;
use rbee_supervisor::daemon::sibling;
use rbee_wire::view::{InfoReply, JobState};
use rbee_wire::{ErrorCode, Operation};

use crate::exit::{Exit, Failure, chain, root};
use crate::launch::launch;
use crate::processes::{Running, all_gone, listener_on};
use crate::settings::{AutoStart, Context};

/// The queen's program.
pub(crate) const QUEEN: &str = "queen-rbee";
/// The hive's program.
pub(crate) const HIVE: &str = "rbee-hive";
/// The worker's program.
pub(crate) const WORKER: &str = "llm-worker-rbee";

/// Most time that another `rbee` may take to replace a queen of another build.
const REPLACE: Duration = Duration::from_secs(60);

/// Time in which a process that was killed has closed its sockets.
const DYING: Duration = Duration::from_millis(200);

/// Whether a verb may start what is not running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// It needs a queen.
    IfNeeded,
    /// It only reads or stops.
    Never,
}

/// A queen that answers and is ours.
#[derive(Debug)]
pub(crate) struct Reached {
    /// To call it.
    pub(crate) client: QueenClient,
    /// What it says of itself.
    pub(crate) info: InfoReply,
    /// Whether this command started it.
    pub(crate) started: bool,
}

/// A client of a queen that answers and is ours.
pub(crate) async fn queen(context: &Context, start: Start) -> Result<QueenClient, Failure> {
    reach(context, start).await.map(|queen| queen.client)
}

/// Finds the queen, or starts it.
///
/// # Errors
/// Nothing answers and nothing may be started; who answers is not ours or no queen; the start failed.
pub(crate) async fn reach(context: &Context, start: Start) -> Result<Reached, Failure> {
    let may_start = start == Start::IfNeeded && context.start == AutoStart::Allowed && context.queen.loopback;
    let client = context.queen_client();
    let mut answer = client.info().await;
    if matches!(answer, Err(ClientError::Broken { .. })) {
        // A queen that is just dying still takes connections, and resets them.
        tokio::time::sleep(DYING).await;
        answer = client.info().await;
    }
    let info = match answer {
        Ok(info) => info,
        Err(ClientError::Unreachable { .. }) if may_start => {
            context.home.create()?;
            return launch(context, client).await;
        }
        Err(error) => return Err(no_queen(context, error, start)),
    };
    check(context, &info)?;
    context.printer.detail(&format!("queen at {} (pid {}, version {})", client.url(), info.pid, info.version));
    if context.queen.loopback && sibling_build(QUEEN).is_some_and(|build| build != info.build) {
        return other_build(context, client, info, may_start).await;
    }
    Ok(Reached { client, info, started: false })
}

/// This machine's hive, if one answers and is ours. Another's is let be, as if nobody answered.
pub(crate) async fn local_hive(context: &Context) -> Option<(HiveClient, InfoReply)> {
    let at = context.local_hive();
    let client = context.hive_client(&at.url);
    match client.info().await {
        Ok(info) if info.program == HIVE && is_ours(context, &info) => Some((client, info)),
        Ok(info) => {
            context.printer.detail(&format!("{} is a {} of another user or home", at.url, info.program));
            None
        }
        Err(error) => {
            context.printer.detail(&format!("no hive of ours at {}: {}", at.url, chain(&error)));
            None
        }
    }
}

/// Takes the answer to a request to stop: a daemon that is stopping already or has just gone does what was asked.
///
/// # Errors
/// When it refuses.
pub(crate) fn asked_to_stop(answer: Result<(), ClientError>) -> Result<(), Failure> {
    match answer {
        Ok(()) | Err(ClientError::Unreachable { .. } | ClientError::Broken { .. }) => Ok(()),
        Err(ClientError::Refused(body)) if body.code == ErrorCode::Draining => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a daemon knows this home's nonce. A home without one has no daemons.
pub(crate) fn is_ours(context: &Context, info: &InfoReply) -> bool {
    context.home.run.join("nonce").exists()
        && context.home.proof().is_ok_and(|proof| info.home_proof.as_deref() == Some(proof.as_str()))
}

/// The build of a program beside this one, if there is one.
pub(crate) fn sibling_build(program: &str) -> Option<String> {
    sibling(program).and_then(|path| build_id(&path)).ok()
}

/// Makes sure that a daemon is a queen, and on a loopback address this home's.
///
/// # Errors
/// Naming who it is and what to do.
pub(crate) fn check(context: &Context, info: &InfoReply) -> Result<(), Failure> {
    if info.program != QUEEN {
        let url = &context.queen.url;
        return Err(Failure::new(Exit::Unreachable, format!("{url} is a {}, not a queen", info.program))
            .hint("the queen's port is 7833 unless RBEE_QUEEN_BIND or --queen says otherwise"));
    }
    if context.queen.loopback && !is_ours(context, info) {
        return Err(foreign(&context.queen.url, info));
    }
    Ok(())
}

fn foreign(url: &str, info: &InfoReply) -> Failure {
    let who = format!("{} (pid {}, version {})", info.program, info.pid, info.version);
    Failure::new(Exit::Unreachable, format!("{url} is taken by the {who} of another user or home"))
        .hint("use another port: --queen http://127.0.0.1:PORT or RBEE_QUEEN_BIND=127.0.0.1:PORT")
        .hint("or use its home, if it is yours: RBEE_HOME")
}

fn no_queen(context: &Context, error: ClientError, start: Start) -> Failure {
    let url = &context.queen.url;
    match &error {
        ClientError::Unreachable { source, .. } => {
            let failure = Failure::new(Exit::Unreachable, format!("no queen answers at {url}: {}", root(source)));
            match (context.queen.loopback, start) {
                (false, _) => failure.hint("check its address (--queen, RBEE_QUEEN_URL) and the network"),
                (true, Start::IfNeeded) => failure.hint("--no-start was given: start it with `rbee up`"),
                (true, Start::Never) => failure.hint("nothing is running here: start it with `rbee up`"),
            }
        }
        ClientError::Refused(body) if body.code != ErrorCode::NotFound => error.into(),
        ClientError::Refused(_)
        | ClientError::Broken { .. }
        | ClientError::Protocol { .. }
        | ClientError::Idle { .. } => {
            let who = if context.queen.loopback { listener_on(context.queen.port) } else { None };
            let who = who.map(|who| format!(", which {who} holds")).unwrap_or_default();
            Failure::new(Exit::Unreachable, format!("no queen answers at {url}{who}: {}", chain(&error)))
                .hint("stop what is there, or use another port: --queen http://127.0.0.1:PORT or RBEE_QUEEN_BIND")
        }
    }
}

/// A queen of another build is replaced where that disturbs nobody, and named where it would.
async fn other_build(
    context: &Context,
    client: QueenClient,
    info: InfoReply,
    may_start: bool,
) -> Result<Reached, Failure> {
    let warning = |why: &str| {
        context.printer.warn(&format!(
            "the queen (pid {}) is of another build than this rbee{why}; `rbee down` stops it, the next command starts the new one",
            info.pid
        ));
    };
    if !may_start {
        warning("");
        return Ok(Reached { client, info, started: false });
    }
    // One replaces it; the others find the new one.
    let lock = std::fs::File::create(context.home.run.join("replace.lock"))?;
    let deadline = tokio::time::Instant::now() + REPLACE;
    while lock.try_lock().is_err() {
        if tokio::time::Instant::now() >= deadline {
            return Err(Failure::new(Exit::Unreachable, "another rbee has been replacing the queen for a minute")
                .hint("`rbee doctor` looks at the daemons"));
        }
        context.printer.progress("waiting for another rbee to replace the queen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    match client.info().await {
        Ok(now) if now.incarnation == info.incarnation => {}
        Ok(now) => {
            check(context, &now)?;
            return Ok(Reached { client, info: now, started: false });
        }
        Err(ClientError::Unreachable { .. }) => return launch(context, client).await,
        Err(error) => return Err(error.into()),
    }
    if busy(&client).await? {
        warning(" and has jobs");
        return Ok(Reached { client, info, started: false });
    }
    context.printer.note("the queen is of another build than this rbee: it is replaced");
    // The hive and its workers stay, unless they are of another build too.
    let hive = local_hive(context).await;
    let hive = hive.filter(|(_, info)| sibling_build(HIVE).is_some_and(|build| build != info.build));
    let mut old: Vec<Running> = Running::of("queen", info.pid).into_iter().collect();
    old.extend(hive.as_ref().and_then(|(_, info)| Running::of("hive", info.pid)));
    asked_to_stop(client.shutdown(if hive.is_some() { Hives::Too } else { Hives::Stay }).await)?;
    all_gone(context, &old).await?;
    launch(context, client).await
}

async fn busy(client: &QueenClient) -> Result<bool, Failure> {
    let live = |state| matches!(state, JobState::Queued | JobState::Loading | JobState::Running);
    let jobs = client.jobs().await?.jobs;
    Ok(jobs.iter().any(|job| live(job.state) && job.operation != Operation::Status))
}
