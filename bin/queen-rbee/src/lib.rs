//! The queen: job API, registry, scheduler and relay.
//!
//! [`http`] and [`openai`] take requests, [`submit`] makes jobs of them, [`brain`] has the one loop that owns the scheduler, [`channel`] reads a worker's events and [`relay`] carries them into a
//! job's log, [`jobs`] keeps the logs, [`keys`] says who posts them and how many, [`hives`] and [`ops`] do the rest. Start reading at [`run`].
//!
//! Invariants
//! - Every accepted job ends in exactly one `done` or `error` in its log.
//! - The picture of the fleet is soft: it is whole again one heartbeat after a restart.
//! - A listener never slows a job, a job never waits for a listener.

pub mod args;

mod brain;
mod channel;
mod eta;
mod hives;
mod http;
mod jobs;
mod keys;
mod metrics;
mod openai;
mod ops;
mod relay;
mod submit;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rbee_config::{Home, Overrides, Settings};
use rbee_scheduler::{Config, Event as Heard, Policy, Scheduler};
use rbee_service::logging::{self, LogFile};
use rbee_service::{Clock, Guard, ServeLimits, Shutdown, bind, random_hex, serve};
use rbee_supervisor::{build_id, daemon};
use rbee_wire::view::InfoReply;
use rbee_wire::{ErrorBody, ErrorCode, HiveId, Incarnation, PROTOCOL, routes};

use crate::args::Cli;
use crate::brain::{Brain, Hands};
use crate::hives::{Hives, Wake};
use crate::http::Api;
use crate::jobs::{Jobs, Keep};
use crate::keys::Keys;
use crate::ops::Operations;

/// Bytes of one log file.
const MAX_LOG: u64 = 8 << 20;

/// What the queen's end takes along.
#[derive(Debug, Default)]
pub struct Stop {
    hives: AtomicBool,
}

impl Stop {
    fn take_hives(&self) {
        self.hives.store(true, Ordering::SeqCst);
    }
}

/// From where workers and hives may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// This machine only: without a token, whoever beats from elsewhere would be sent prompts.
    Loopback,
    /// Anywhere: whoever beats has shown the token.
    Anywhere,
}

impl Reach {
    /// Checks the address a heartbeat names.
    ///
    /// # Errors
    /// `FORBIDDEN_ORIGIN` for one that is out of reach.
    fn check(self, url: &str) -> Result<(), ErrorBody> {
        let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
        let host = authority.filter(|rest| !rest.contains(['/', '@', '?', '#'])).and_then(|rest| rest.rsplit_once(':'));
        let host = host.filter(|(_, port)| port.parse::<u16>().is_ok()).map(|(host, _)| host);
        let bare = host.map(|host| host.trim_start_matches('[').trim_end_matches(']'));
        let fits = match (self, bare) {
            (_, None) => false,
            (Self::Anywhere, Some(_)) => true,
            (Self::Loopback, Some(bare)) => bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()),
        };
        if fits {
            return Ok(());
        }
        Err(ErrorBody::new(ErrorCode::ForbiddenOrigin, "a heartbeat's url must be http://ADDRESS:PORT on this machine"))
    }
}

fn failed(what: &str, error: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(ErrorCode::Internal, format!("queen-rbee cannot start: {what}: {error}"))
}

/// Runs the queen until it is told to stop.
///
/// # Errors
/// What keeps it from starting.
pub fn run(cli: Cli) -> Result<(), ErrorBody> {
    let env = |name: &str| std::env::var(name).ok();
    let home = Home::from_env(&env).map_err(|error| failed("its folders", error))?;
    home.create().map_err(|error| failed("its folders", error))?;
    let mut flags = Overrides::default();
    flags.set("queen_bind", cli.bind);
    flags.set("log", cli.log.as_ref());
    let settings = Settings::load(&home, &flags, &env).map_err(|error| failed("its settings", error))?;
    let log = LogFile::open(&home.state.join("queen.log"), MAX_LOG).map_err(|error| failed("its log", error))?;
    logging::init(&settings.log.value, Some(log)).map_err(|error| failed("its log", error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| failed("its threads", error))?;
    let outcome = runtime.block_on(serve_queen(&home, settings));
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn serve_queen(home: &Home, settings: Settings) -> Result<(), ErrorBody> {
    let address = settings.queen_bind.value;
    let token = settings.token.value.clone();
    if !address.ip().is_loopback() && token.is_none() {
        let message = format!("queen-rbee does not listen on {address} without a token");
        return Err(
            ErrorBody::new(ErrorCode::InvalidRequest, message).with_hint("set RBEE_TOKEN, or listen on 127.0.0.1")
        );
    }
    let lock = daemon::try_lock(&home.run.join("queen.lock")).map_err(|error| failed("its lock", error))?;
    let _lock = lock.map_err(|holder| {
        let message = format!("a queen of this home runs already: {holder}");
        ErrorBody::new(ErrorCode::Internal, message)
            .with_hint("`rbee queen stop` ends it; another RBEE_HOME lives beside it")
    })?;
    let listener =
        bind(address, "queen-rbee", "free that port, or give another with --bind or RBEE_QUEEN_BIND").await?;
    let address = listener.local_addr().map_err(|error| failed("its address", error))?;
    let url = format!("http://{address}");
    let shutdown = Shutdown::on_signals().map_err(|error| failed("its signals", error))?;
    let home_proof = home.proof().map_err(|error| failed("its nonce", error))?;
    let keys = Keys::open(&home.data.join("keys.json"))?;

    let clock = Clock::default();
    let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let incarnation = Incarnation { counter: started, random: random_hex(16) };
    let keep = Keep {
        after_end: Duration::from_millis(settings.job_kept_ms.value),
        bytes: usize::try_from(settings.job_log_bytes.value).unwrap_or(usize::MAX),
    };
    let jobs = Jobs::new(incarnation.clone(), clock, keep);
    let hives = Arc::new(Hives {
        bind: settings.hive_bind.value,
        queen_url: url.clone(),
        home_proof: home_proof.clone(),
        run: home.run.clone(),
        state: home.state.clone(),
        token: token.clone(),
        local: tokio::sync::Mutex::default(),
    });
    let policy = settings.policy.value.parse::<Policy>().map_err(|_| {
        let names: Vec<&str> = Policy::ALL.iter().map(|(name, _)| *name).collect();
        failed("its setting policy", format!("`{}` is none of {}", settings.policy.value, names.join(", ")))
    })?;
    let (brain, brain_loop) = Brain::channel();
    let scheduler = Scheduler::new(Config {
        queue_limit: usize::try_from(settings.queue_limit.value).unwrap_or(usize::MAX),
        queue_timeout: Duration::from_millis(settings.queue_timeout_ms.value),
        default_model: settings.default_model.value.clone(),
        policy,
        keep_alive: settings.keep_alive.value,
        residency: Duration::from_millis(settings.residency_ms.value),
    });
    let hands = Hands { jobs: jobs.clone(), hives: Arc::clone(&hives), brain: brain.clone() };
    let thinking = tokio::spawn(brain_loop.run(scheduler, hands));
    let ops = Operations {
        brain: brain.clone(),
        hives: Arc::clone(&hives),
        jobs: jobs.clone(),
        keys: keys.clone(),
        info: InfoReply {
            program: "queen-rbee".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            build: build_id(std::path::Path::new("/proc/self/exe")).unwrap_or_default(),
            protocol: PROTOCOL,
            pid: std::process::id(),
            uptime_ms: 0,
            incarnation,
            home_proof: Some(home_proof),
            features: Vec::new(),
        },
    };
    let stop = Arc::new(Stop::default());
    let api = Api {
        ops,
        shutdown: shutdown.clone(),
        stop: Arc::clone(&stop),
        aliases: Arc::new(settings.aliases.clone()),
        model_dirs: settings.model_dirs.value.clone().into(),
        grace: Duration::from_millis(settings.job_grace_ms.value),
        reach: if token.is_some() { Reach::Anywhere } else { Reach::Loopback },
    };
    let guard = Guard::of(token.as_deref(), routes::QUEEN).with_keys(Arc::new(keys));
    let router = http::router(api, guard);
    let server = tokio::spawn(serve(listener, router, ServeLimits::default(), shutdown.now()));
    let swept = jobs.clone();
    tokio::spawn(async move {
        let mut every = tokio::time::interval(Duration::from_secs(1));
        loop {
            every.tick().await;
            swept.sweep();
        }
    });
    tracing::info!(%url, "listening");
    daemon::announce_ready(&url);

    tokio::select! {
        () = shutdown.begun() => {}
        ended = thinking => {
            tracing::error!(error = ?ended.err(), "the scheduler's loop ended; the queen ends with it");
            shutdown.begin();
        }
    }
    drain(&jobs, &brain, &shutdown, Duration::from_millis(settings.drain_ms.value)).await;
    if stop.hives.load(Ordering::SeqCst) {
        stop_local_hive(&hives, &brain).await;
    }
    shutdown.end_now();
    let _ = server.await;
    tracing::info!("stopped");
    Ok(())
}

/// Lets the jobs that there are finish, then ends what is left with an error.
async fn drain(jobs: &Jobs, brain: &Brain, shutdown: &Shutdown, limit: Duration) {
    tracing::info!("draining");
    brain.tell(Heard::Drain).await;
    let finished = async {
        while !jobs.open().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = finished => {}
        () = tokio::time::sleep(limit) => {}
        () = shutdown.now().cancelled_owned() => {}
    }
    for job in jobs.open() {
        job.fail(jobs.now(), ErrorBody::new(ErrorCode::Draining, "the queen stopped before this job was done"));
    }
}

async fn stop_local_hive(hives: &Hives, brain: &Brain) {
    let Ok(client) = hives.client(brain, &HiveId::localhost(), Wake::Never).await else { return };
    match client.shutdown().await {
        Ok(()) => tracing::info!("the local hive stops too"),
        Err(error) => tracing::warn!(%error, "the local hive could not be asked to stop"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_may_name_this_machine_only() {
        for url in ["http://127.0.0.1:80", "http://[::1]:80", "http://127.0.0.1:80/"] {
            assert!(Reach::Loopback.check(url).is_ok(), "{url}");
        }
        for url in [
            "http://10.0.0.1:80",
            "https://127.0.0.1:80",
            "http://127.0.0.1",
            "http://127.0.0.1:80/x",
            "http://evil@127.0.0.1:80",
            "http://localhost:80",
            "http://127.0.0.1:99999",
            "file:///etc/passwd",
            "http://127.0.0.1:80?x",
            "http://[::ffff:10.0.0.1]:80",
        ] {
            assert!(Reach::Loopback.check(url).is_err(), "{url}");
        }
        assert!(Reach::Anywhere.check("http://10.0.0.1:80").is_ok());
    }
}
