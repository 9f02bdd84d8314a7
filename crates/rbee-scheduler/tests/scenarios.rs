//! Scenarios as scripts: a line is a time, what happens then, and what the scheduler does about it.
//!
//! `beat w1 ready tinybee 0/2` is a heartbeat with slots used of total; `life=2` raises the incarnation, `steps=5` the step
//! counter of a worker with work. Behind `->` stand the effects in order; a line without it expects none.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;
use rbee_scheduler::{Config, Effect, Event, LoadKey, Policy, Purpose, Scheduler, Want};
use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::view::{Held, LoadNeeds, PlanView, Room};
use rbee_wire::worker::{LoadProgress, WorkerHeartbeat};
use rbee_wire::{DeviceId, DeviceSpec, ErrorBody, HiveId, JobId, KeepAlive, KeyId, ModelRef, WorkerId};
use serde_json::json;

fn job(name: &str) -> JobId {
    JobId::new(name).unwrap()
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn model(name: &str) -> ModelRef {
    if name == "tinybee" { ModelRef::Tinybee } else { ModelRef::Path(format!("/{name}")) }
}

fn config(queue_limit: usize) -> Config {
    Config {
        queue_limit,
        queue_timeout: Duration::from_secs(60),
        default_model: None,
        policy: Policy::FirstAvailable,
        keep_alive: KeepAlive::For(Duration::from_secs(300)),
        residency: Duration::from_secs(5),
    }
}

/// A load that may go anywhere.
fn load(name: &str) -> LoadKey {
    LoadKey { model: model(name), device: DeviceSpec::Auto, hive: None }
}

/// Hive h1's answer for a model: `gpu=5/10:w1=7,w2=3` is a device with 5 bytes free of which the load needs 10, and who has
/// the rest; `no` for the need is a device that the model cannot be loaded on.
fn plan(name: &str, rooms: &[&str]) -> PlanView {
    let room = |word: &&str| {
        let (device, rest) = word.split_once('=').unwrap();
        let (numbers, held) = rest.split_once(':').unwrap_or((rest, ""));
        let (free, least) = numbers.split_once('/').unwrap();
        let held = held.split(',').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, bytes) = pair.split_once('=').unwrap();
            Held { worker_id: worker(name), model: model("any"), bytes: bytes.parse().unwrap() }
        });
        Room {
            device: DeviceId::new(device).unwrap(),
            total: 100,
            free: free.parse().unwrap(),
            needs: least.parse().ok().map(|least| LoadNeeds { least, total: least, ..LoadNeeds::default() }),
            context_fits: None,
            would_fit: Vec::new(),
            refused: least.parse::<u64>().err().map(|_| "it is too old".into()),
            held: held.collect(),
        }
    };
    PlanView { model: model(name), hive_id: HiveId::new("h1").unwrap(), rooms: rooms.iter().map(room).collect() }
}

struct Script {
    scheduler: Scheduler,
    seq: u64,
}

impl Script {
    fn beat(&mut self, words: &[&str]) -> WorkerHeartbeat {
        let [name, state, model_name, slots, options @ ..] = words else { panic!("{words:?}") };
        let option =
            |key: &str| options.iter().find_map(|word| word.strip_prefix(key)).map(|v| v.parse::<u64>().unwrap());
        let (used, total) = slots.split_once('/').unwrap();
        let hive = options.iter().find_map(|word| word.strip_prefix("on=")).unwrap_or("h1");
        self.seq += 1;
        serde_json::from_value(json!({
            "protocol": 1, "worker_id": name, "incarnation": {"counter": option("life=").unwrap_or(1), "random": name},
            "seq": option("seq=").unwrap_or(self.seq), "hive_id": hive, "url": format!("http://{name}"), "bearer": "b",
            "state": state, "model": model(model_name).to_string(),
            "device": options.iter().find_map(|word| word.strip_prefix("at=")).unwrap_or("cpu"),
            "keep_alive": options.iter().find_map(|word| word.strip_prefix("keep=")).unwrap_or("-1"),
            "decode_rate": option("decode=").unwrap_or(0), "prefill_rate": option("prefill=").unwrap_or(0),
            "slots": {"total": total.parse::<u64>().unwrap(), "used": used.parse::<u64>().unwrap()},
            "steps": option("steps=").unwrap_or(0), "working": option("steps=").is_some(),
            "version": "0", "build": "0"
        }))
        .unwrap()
    }

    fn hive(&mut self, words: &[&str]) -> HiveHeartbeat {
        let processes = words[1..].iter().map(|word| {
            let (name, state) = word.split_once('=').unwrap();
            json!({"pid": 7, "worker_id": name, "incarnation": {"counter": 1, "random": name}, "model": "tinybee",
                   "device": "cpu", "state": state, "since_ms": 0, "restarts": 0})
        });
        self.seq += 1;
        serde_json::from_value(json!({
            "protocol": 1, "hive_id": words[0], "incarnation": {"counter": 1, "random": "h"}, "seq": self.seq,
            "url": "http://h", "devices": [], "processes": processes.collect::<Vec<_>>(), "version": "0", "build": "0"
        }))
        .unwrap()
    }

    fn event(&mut self, now: Duration, words: &[&str]) -> Event {
        let error = |code: &str| ErrorBody::new(serde_json::from_value(json!(code)).unwrap(), "said so");
        match words {
            ["beat", rest @ ..] => Event::WorkerBeat(Box::new(self.beat(rest))),
            ["hive", rest @ ..] => Event::HiveBeat(Box::new(self.hive(rest))),
            ["tick"] => Event::Tick,
            ["submit", name, options @ ..] => {
                let mut want = Want::default();
                for option in options {
                    match option.split_once('=') {
                        Some(("worker", id)) => want.worker_id = Some(worker(id)),
                        Some(("owner", id)) => want.owner = Some(KeyId::new(id).unwrap()),
                        Some(("prompt", tokens)) => want.work.prompt = tokens.parse().unwrap(),
                        Some(("answer", tokens)) => want.work.answer = tokens.parse().unwrap(),
                        Some(("device", device)) => want.device = Some(device.parse().unwrap()),
                        Some(("keep", keep)) => want.keep_alive = Some(keep.parse().unwrap()),
                        Some(("deadline", ms)) => {
                            want.deadline = Some(now + Duration::from_millis(ms.parse().unwrap()))
                        }
                        _ if *option == "only_load" => want.purpose = Purpose::Load,
                        _ if *option == "no_load" => want.no_load = Some("load it"),
                        _ => want.model = Some(model(option)),
                    }
                }
                Event::Submit { job: job(name), want }
            }
            ["first", name, on] => Event::FirstToken { job: job(name), worker: worker(on) },
            ["ended", name, on] => Event::Ended { job: job(name), worker: worker(on) },
            ["failed", name, on, code] => {
                Event::DispatchFailed { job: job(name), worker: worker(on), error: error(code), retry: true }
            }
            ["cut", name, on, code] => {
                Event::DispatchFailed { job: job(name), worker: worker(on), error: error(code), retry: false }
            }
            ["cancel", name] => Event::Cancel { job: job(name) },
            ["moved", name, done] => {
                let progress =
                    LoadProgress { stage: "load".into(), done: done.parse().unwrap(), total: 9, unit: "bytes".into() };
                Event::LoadProgress { model: model(name), progress }
            }
            ["planned", name, rooms @ ..] => Event::Planned { load: load(name), result: Ok(vec![plan(name, rooms)]) },
            ["unplannable", name, code] => Event::Planned { load: load(name), result: Err(error(code)) },
            ["loaded", name] => Event::LoadDone { load: load(name), result: Ok(()) },
            ["unloadable", name, code] => Event::LoadDone { load: load(name), result: Err(error(code)) },
            ["unloaded", name] => Event::Unloaded { worker: worker(name), result: Ok(()) },
            ["stays", name, code] => Event::Unloaded { worker: worker(name), result: Err(error(code)) },
            ["drain"] => Event::Drain,
            other => panic!("{other:?}"),
        }
    }
}

fn shown(effect: &Effect) -> String {
    match effect {
        Effect::Dispatch { job, worker, .. } => format!("dispatch {job} {worker}"),
        Effect::Halt { job } => format!("halt {job}"),
        Effect::Queued { job, position } => format!("queued {job} {position}"),
        Effect::Loading { job, .. } => format!("loading {job}"),
        Effect::Progress { job, progress } => format!("progress {job} {}", progress.done),
        Effect::Reject { job, error } => format!("reject {job} {}", error.code),
        Effect::Abort { job, error } => format!("abort {job} {}", error.code),
        Effect::Plan { load } => format!("plan {}", load.model),
        Effect::Abandon { load } => format!("abandon {}", load.model),
        Effect::Load { load, hive, device, keep_alive } => format!("load {} {hive}/{device} {keep_alive}", load.model),
        Effect::Decided { .. } => String::new(),
        Effect::Unload { worker, .. } => format!("unload {worker}"),
        Effect::Loaded { job, worker } => format!("loaded {job} {}", worker.worker_id),
        Effect::Forget { worker } => format!("forget {worker}"),
        Effect::Note { job, .. } => format!("note {job}"),
        Effect::RefuseBeat => "refuse".into(),
    }
}

fn check_with(config: Config, script: &str) {
    let mut run = Script { scheduler: Scheduler::new(config), seq: 0 };
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (said, want) = line.split_once(" -> ").unwrap_or((line, ""));
        let words: Vec<&str> = said.split_whitespace().collect();
        let seconds: f64 = words[0].strip_prefix("t=").unwrap().parse().unwrap();
        let now = Duration::from_secs_f64(seconds);
        let event = run.event(now, &words[1..]);
        let got: Vec<String> =
            run.scheduler.handle(now, event).iter().map(shown).filter(|text| !text.is_empty()).collect();
        assert_eq!(got.join(", "), want, "at `{said}`");
    }
}

fn check(script: &str) {
    check_with(config(100), script);
}

#[test]
fn the_first_free_worker_gets_the_job_and_own_dispatches_count_at_once() {
    check(
        "t=0.0 beat w1 ready tinybee 0/1
         t=0.0 beat w2 ready tinybee 0/2
         t=0.1 submit a tinybee -> dispatch a w1
         t=0.1 submit b tinybee -> dispatch b w2
         t=0.1 submit c tinybee -> dispatch c w2
         t=0.1 submit d tinybee -> queued d 0
         t=0.1 submit e tinybee -> queued e 1
         t=0.2 ended b w2 -> dispatch d w2, queued e 0
         t=0.3 cancel c -> dispatch e w2",
    );
}

#[test]
fn silence_stops_dispatches_and_then_ends_the_worker() {
    check(
        "t=0.0 beat w1 ready tinybee 0/4
         t=1.1 submit a tinybee -> dispatch a w1
         t=1.15 first a w1
         t=1.3 submit b tinybee -> queued b 0
         t=1.5 tick
         t=1.7 tick -> forget w1, abort a WORKER_LOST, plan tinybee, loading b
         t=1.8 beat w1 ready tinybee 0/4 -> dispatch b w1",
    );
}

#[test]
fn a_job_moves_before_its_first_token_and_never_after() {
    check(
        "t=0.0 beat w1 ready tinybee 0/4
         t=0.0 beat w2 ready tinybee 0/4
         t=0.1 submit a tinybee -> dispatch a w1
         t=0.1 submit b tinybee -> dispatch b w1
         t=0.2 first b w1
         t=0.3 failed a w1 WORKER_LOST -> halt a, dispatch a w2
         t=0.3 cut b w1 WORKER_LOST -> abort b WORKER_LOST
         t=0.4 failed a w2 WORKER_LOST -> abort a REQUEST_POISONED",
    );
}

#[test]
fn a_refusal_is_no_fault_of_the_request() {
    check(
        "t=0.0 beat w1 ready tinybee 0/4
         t=0.1 submit a tinybee -> dispatch a w1
         t=0.2 failed a w1 OVERLOADED -> queued a 0
         t=0.3 beat w1 ready tinybee 0/4 -> dispatch a w1
         t=0.4 failed a w1 OVERLOADED -> queued a 0
         t=0.5 beat w1 ready tinybee 0/4 -> dispatch a w1",
    );
}

#[test]
fn the_only_worker_is_tried_again_when_it_came_back() {
    check(
        "t=0.0 beat w1 ready tinybee 0/4
         t=0.1 submit a tinybee -> dispatch a w1
         t=0.2 failed a w1 WORKER_LOST -> halt a, queued a 0
         t=0.3 beat w1 ready tinybee 0/4 -> dispatch a w1",
    );
}

#[test]
fn frozen_processes_and_hung_engines_are_stalled_not_lost() {
    check(
        "t=0.0 beat w1 ready tinybee 0/4
         t=0.1 submit a tinybee -> dispatch a w1
         t=0.2 first a w1
         t=1.0 hive h1 w1=ready
         t=1.5 tick
         t=1.7 tick -> forget w1, abort a WORKER_STALLED",
    );
    let mut script = String::from(
        "t=0.0 beat w1 ready tinybee 0/4 steps=1\nt=0.1 submit a tinybee -> dispatch a w1\nt=0.2 first a w1\n",
    );
    for i in 1..=8 {
        script.push_str(&format!("t={:.1} beat w1 ready tinybee 1/4 steps=1\n", f64::from(i) * 0.5));
        let end = if i == 8 { " -> forget w1, abort a WORKER_STALLED" } else { "" };
        script.push_str(&format!("t={:.2} tick{end}\n", f64::from(i) * 0.5 + 0.01));
    }
    check(&script);
}

#[test]
fn a_hive_that_reports_a_dead_child_is_believed_at_once() {
    check(
        "t=0.0 beat w1 ready tinybee 0/4
         t=0.1 submit a tinybee -> dispatch a w1
         t=0.2 first a w1
         t=0.3 hive other w1=exited
         t=0.4 hive h1 w1=backoff -> forget w1, abort a WORKER_LOST
         t=0.5 beat w1 ready tinybee 0/4 -> refuse
         t=0.6 beat w1 ready tinybee 0/4 life=2",
    );
}

#[test]
fn a_new_life_ends_the_old_one() {
    check(
        "t=0.0 beat w1 ready tinybee 0/1
         t=0.1 submit a tinybee -> dispatch a w1
         t=0.2 first a w1
         t=0.3 beat w1 ready tinybee 0/1 life=2 -> abort a WORKER_LOST
         t=0.4 beat w1 ready tinybee 0/1 -> refuse
         t=0.5 submit b tinybee -> dispatch b w1
         t=0.6 beat w1 ready tinybee 0/1 life=2 seq=1
         t=0.7 submit c tinybee -> queued c 0
         t=0.8 beat w1 stopped tinybee 0/1 life=2 -> forget w1, halt b, plan tinybee, loading b, loading c",
    );
}

#[test]
fn the_queens_own_sleep_expires_nobody() {
    check(
        "t=0.0 tick
         t=0.0 beat w1 ready tinybee 0/4
         t=0.1 tick
         t=5.0 tick
         t=5.1 submit a tinybee -> dispatch a w1",
    );
}

#[test]
fn when_most_fall_silent_at_once_they_get_one_extra_period() {
    check(
        "t=0.0 beat w1 ready tinybee 0/4 on=h1
         t=0.0 beat w2 ready tinybee 0/4 on=h1
         t=0.0 beat w3 ready tinybee 0/4 on=h2
         t=0.5 tick
         t=1.0 tick
         t=1.5 tick
         t=1.7 tick
         t=2.2 tick
         t=2.7 tick
         t=3.2 tick
         t=3.4 tick -> forget w1, forget w2, forget w3",
    );
}

#[test]
fn loads_are_asked_for_once_and_told_to_all() {
    check(
        "t=0.0 submit a tinybee -> plan tinybee, loading a
         t=0.1 submit b tinybee -> loading b
         t=0.2 moved tinybee 3 -> progress a 3, progress b 3
         t=0.2 moved tinybee 3
         t=0.3 loaded tinybee
         t=0.4 beat w1 ready tinybee 0/4 -> dispatch a w1, dispatch b w1",
    );
    check(
        "t=0.0 submit a tinybee -> plan tinybee, loading a
         t=0.1 submit b tinybee -> loading b
         t=0.2 unloadable tinybee MODEL_CORRUPT -> reject a MODEL_CORRUPT, reject b MODEL_CORRUPT
         t=0.3 tick
         t=0.4 submit c tinybee -> plan tinybee, loading c
         t=0.5 loaded tinybee
         t=0.6 tick
         t=1.1 tick
         t=10.6 tick -> reject c MODEL_LOAD_FAILED",
    );
}

#[test]
fn a_worker_that_loads_is_waited_for() {
    check(
        "t=0.0 beat w1 starting tinybee 0/0
         t=0.1 submit a tinybee -> loading a
         t=0.2 beat w1 ready tinybee 0/4 -> dispatch a w1",
    );
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    check(
        "t=0.0 beat w1 ready other 0/4
         t=0.1 submit a tinybee no_load -> reject a NO_WORKER
         t=0.1 submit b worker=w9 -> reject b WORKER_NOT_FOUND
         t=0.1 submit c tinybee worker=w1 -> reject c NO_WORKER
         t=0.1 submit d -> dispatch d w1
         t=0.2 drain
         t=0.3 submit e other -> reject e DRAINING
         t=0.4 ended d w1",
    );
}

#[test]
fn who_posts_much_waits_behind_who_posts_little() {
    check(
        "t=0.0 beat w1 ready tinybee 0/2
         t=0.1 submit a1 tinybee owner=a -> dispatch a1 w1
         t=0.1 submit a2 tinybee owner=a -> dispatch a2 w1
         t=0.1 submit a3 tinybee owner=a -> queued a3 0
         t=0.1 submit a4 tinybee owner=a -> queued a4 1
         t=0.2 submit b1 tinybee owner=b -> queued b1 0, queued a3 1, queued a4 2
         t=0.2 submit b2 tinybee owner=b -> queued b2 1, queued a3 2, queued a4 3
         t=0.2 submit n1 tinybee -> queued n1 1, queued b2 2, queued a3 3, queued a4 4
         t=0.3 ended a1 w1 -> dispatch b1 w1, queued n1 0, queued a3 1, queued a4 3
         t=0.4 ended a2 w1 -> dispatch a3 w1, queued a4 1
         t=0.5 ended b1 w1 -> dispatch b2 w1
         t=0.6 ended b2 w1 -> dispatch n1 w1, queued a4 0
         t=0.7 ended a3 w1 -> dispatch a4 w1",
    );
}

#[test]
fn a_key_fills_half_of_the_line_and_others_find_the_rest_free() {
    check_with(
        config(3),
        "t=0.0 beat w1 ready tinybee 1/1
         t=0.0 beat w2 ready other 0/1
         t=0.1 submit a1 tinybee owner=a -> queued a1 0
         t=0.1 submit a2 tinybee owner=a -> queued a2 1
         t=0.1 submit a3 tinybee owner=a -> reject a3 QUEUE_FULL
         t=0.2 submit a4 other owner=a -> dispatch a4 w2
         t=0.2 submit b1 tinybee owner=b -> queued b1 0, queued a1 1, queued a2 2
         t=0.2 submit b2 tinybee owner=b -> reject b2 QUEUE_FULL
         t=0.3 cancel a1 -> queued a2 1
         t=0.3 submit a5 tinybee owner=a -> queued a5 2
         t=0.4 cancel a2 -> queued a5 1
         t=0.4 cancel a5
         t=0.4 cancel b1
         t=0.5 submit n1 tinybee -> queued n1 0
         t=0.5 submit n2 tinybee -> queued n2 1
         t=0.5 submit n3 tinybee -> queued n3 2
         t=0.5 submit n4 tinybee -> reject n4 QUEUE_FULL",
    );
    check_with(
        config(1),
        "t=0.0 beat w1 ready tinybee 1/1
         t=0.1 submit a1 tinybee owner=a -> queued a1 0
         t=0.1 submit a2 tinybee owner=a -> reject a2 QUEUE_FULL",
    );
}

#[test]
fn the_line_is_bounded_and_nobody_waits_for_ever() {
    check_with(
        config(1),
        "t=0.0 beat w1 ready tinybee 1/1
         t=0.1 submit a tinybee -> queued a 0
         t=0.1 submit b tinybee -> reject b QUEUE_FULL
         t=0.2 cancel a
         t=0.3 submit c tinybee deadline=1000 -> queued c 0
         t=0.8 beat w1 ready tinybee 1/1
         t=1.2 tick
         t=1.4 tick -> reject c DEADLINE_EXCEEDED
         t=1.5 beat w1 ready tinybee 0/1
         t=1.6 submit d tinybee deadline=1000 -> dispatch d w1
         t=2.1 tick
         t=2.2 beat w1 ready tinybee 1/1
         t=2.7 tick -> abort d DEADLINE_EXCEEDED",
    );
    let mut script = String::from("t=0.0 beat w1 ready tinybee 1/1\nt=0.0 submit a tinybee -> queued a 0\n");
    for i in 1..=119 {
        script.push_str(&format!("t={0} beat w1 ready tinybee 1/1\nt={0} tick\n", f64::from(i) * 0.5));
    }
    script.push_str("t=60 beat w1 ready tinybee 1/1\nt=60 tick -> reject a QUEUE_TIMEOUT\n");
    check(&script);
}

proptest! {
    #[test]
    fn every_job_ends_once_and_no_worker_is_overfull(steps in prop::collection::vec((0usize..12, 0usize..3, 0usize..8, 1u64..400), 1..120)) {
        let mut run = Script { scheduler: Scheduler::new(config(5)), seq: 0 };
        let mut now = Duration::ZERO;
        let mut on: HashMap<String, String> = HashMap::new();
        let mut ends: HashMap<String, usize> = HashMap::new();
        let mut submitted = 0;
        let mut lives = [1u64; 3];
        let total = 2;
        let feed = |run: &mut Script, now: Duration, words: &[&str], on: &mut HashMap<String, String>, ends: &mut HashMap<String, usize>| {
            let event = run.event(now, words);
            for effect in run.scheduler.handle(now, event) {
                match effect {
                    Effect::Dispatch { job, worker, .. } => {
                        let before = on.insert(job.to_string(), worker.to_string());
                        assert!(before.is_none(), "{job} runs twice");
                        let load = on.values().filter(|at| **at == worker.as_str()).count();
                        assert!(load <= total, "{worker} has {load}");
                    }
                    Effect::Halt { job } => drop(on.remove(job.as_str())),
                    Effect::Reject { job, .. } | Effect::Abort { job, .. } => {
                        on.remove(job.as_str());
                        *ends.entry(job.to_string()).or_default() += 1;
                    }
                    _ => {}
                }
            }
            assert!(run.scheduler.queued() <= 5 + 8, "{}", run.scheduler.queued());
        };
        for (what, who, which, ms) in steps {
            now += Duration::from_millis(ms);
            let (name, model) = (format!("w{who}"), ["tinybee", "other"][which % 2]);
            let life = format!("life={}", lives[who]);
            let running = on.iter().nth(which % on.len().max(1)).map(|(job, at)| (job.clone(), at.clone()));
            let words: Vec<String> = match (what, running) {
                (0..=2, _) => ["beat", &name, "ready", ["tinybee", "other"][who % 2], &format!("0/{total}"), &life].map(str::to_owned).to_vec(),
                (3..=5, _) => {
                    submitted += 1;
                    vec!["submit".into(), format!("j{submitted}"), model.into(), format!("owner=k{}", submitted % 3)]
                }
                (6, Some((job, at))) => vec!["first".into(), job, at],
                (7, Some((job, at))) => {
                    on.remove(&job);
                    *ends.entry(job.clone()).or_default() += 1;
                    vec!["ended".into(), job, at]
                }
                (8, Some((job, at))) => {
                    on.remove(&job);
                    vec!["failed".into(), job, at, "WORKER_LOST".into()]
                }
                (9, _) => vec!["unloadable".into(), model.into(), "MODEL_CORRUPT".into()],
                (10, Some((job, _))) => {
                    on.remove(&job);
                    *ends.entry(job.clone()).or_default() += 1;
                    vec!["cancel".into(), job]
                }
                (11, _) => {
                    lives[who] += 1;
                    vec!["tick".into()]
                }
                _ => vec!["tick".into()],
            };
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            feed(&mut run, now, &words, &mut on, &mut ends);
        }
        // Everybody falls silent, loads fail, time passes: whatever is left must end.
        for _ in 0..200 {
            now += Duration::from_millis(400);
            feed(&mut run, now, &["tick"], &mut on, &mut ends);
            feed(&mut run, now, &["unloadable", "tinybee", "MODEL_CORRUPT"], &mut on, &mut ends);
            feed(&mut run, now, &["unloadable", "other", "MODEL_CORRUPT"], &mut on, &mut ends);
        }
        for i in 1..=submitted {
            prop_assert_eq!(ends.get(&format!("j{i}")).copied(), Some(1), "j{}", i);
        }
    }
}

#[test]
fn a_load_goes_where_it_fits_and_tells_how_long_its_model_stays() {
    check(
        "t=0.0 submit a llama -> plan /llama, loading a
         t=0.1 planned llama gpu=5/10 cpu=20/10 -> load /llama h1/cpu 300s
         t=1.0 loaded llama
         t=1.1 beat w1 ready llama 0/1 -> dispatch a w1
         t=2.0 submit b qwen keep=-1 -> plan /qwen, loading b
         t=2.1 submit c qwen -> loading c
         t=2.1 planned qwen gpu=5/no cpu=10/10 -> load /qwen h1/cpu -1
         t=2.2 unloadable qwen MODEL_CORRUPT -> reject b MODEL_CORRUPT, reject c MODEL_CORRUPT",
    );
}

#[test]
fn the_cheapest_idle_model_leaves_and_the_load_is_planned_anew() {
    check(
        "t=0.0 beat w1 ready one 0/1 keep=300
         t=0.0 beat w2 ready two 0/1 keep=300
         t=0.0 beat w3 ready three 0/1
         t=5.9 beat w1 ready one 0/1 keep=300
         t=5.9 beat w2 ready two 0/1 keep=300
         t=5.9 beat w3 ready three 0/1
         t=6.0 submit a big -> plan /big, loading a
         t=6.0 planned big cpu=2/10:w1=20,w2=8,w3=9 -> unload w2
         t=6.1 beat w2 stopped two 0/1 keep=300 -> forget w2
         t=6.2 unloaded w2 -> plan /big
         t=6.2 planned big cpu=10/10:w1=20,w3=9 -> load /big h1/cpu 300s",
    );
}

#[test]
fn a_model_that_has_just_come_stays_for_the_residency_and_one_that_is_used_until_it_is_done() {
    check(
        "t=0.0 beat w1 ready one 0/2 keep=300
         t=0.5 submit a one -> dispatch a w1
         t=1.0 beat w1 busy one 1/2 keep=300
         t=1.0 submit b two -> plan /two, loading b
         t=1.0 planned two cpu=0/10:w1=12
         t=1.5 submit c one -> dispatch c w1
         t=2.1 beat w1 busy one 2/2 keep=300 -> plan /two
         t=2.1 planned two cpu=0/10:w1=12
         t=3.0 beat w1 busy one 2/2 keep=300
         t=4.0 beat w1 busy one 2/2 keep=300 -> plan /two
         t=5.1 beat w1 busy one 2/2 keep=300
         t=5.1 planned two cpu=0/10:w1=12
         t=5.2 ended a w1
         t=5.3 submit d one -> plan /one, loading d
         t=5.3 planned one cpu=0/12:w1=12
         t=5.4 ended c w1 -> unload w1
         t=5.5 unloaded w1 -> plan /two
         t=5.5 beat w1 stopped one 0/2 -> forget w1
         t=5.6 planned two cpu=12/10 -> load /two h1/cpu 300s
         t=5.9 loaded two
         t=5.9 beat w2 ready two 0/2 keep=300 -> dispatch b w2
         t=6.4 tick -> plan /one",
    );
}

/// A worker with a job takes no more of them, as its memory is wanted for another model.
const CLOSED: &str = "t=0.0 beat w1 ready one 0/2 keep=300
         t=5.5 beat w1 ready one 0/2 keep=300
         t=5.5 submit a one -> dispatch a w1
         t=5.6 submit b two -> plan /two, loading b
         t=5.6 planned two cpu=0/10:w1=12
         ";

#[test]
fn a_worker_that_nobody_waits_for_any_more_takes_jobs_again() {
    check(&format!(
        "{CLOSED}t=5.7 submit c one -> plan /one, loading c
         t=5.8 cancel b -> dispatch c w1"
    ));
}

#[test]
fn a_worker_takes_jobs_again_when_the_load_that_wanted_its_memory_fails() {
    check(&format!(
        "{CLOSED}t=6.6 tick -> plan /two
         t=6.6 unplannable two MODEL_CORRUPT -> reject b MODEL_CORRUPT
         t=6.7 beat w1 busy one 1/2 keep=300
         t=6.7 submit c one -> dispatch c w1"
    ));
}

#[test]
fn what_fits_nowhere_is_refused_whoever_leaves_and_what_is_pinned_stays() {
    check(
        "t=0.0 beat w1 ready one 0/1
         t=1.0 submit a two -> plan /two, loading a
         t=1.0 planned two cpu=5/10:w1=20 -> reject a INSUFFICIENT_MEMORY
         t=1.1 submit b two -> plan /two, loading b
         t=1.2 planned two cpu=5/no -> reject b MODEL_LOAD_FAILED
         t=1.3 submit c two -> plan /two, loading c
         t=1.3 unplannable two MODEL_NOT_FOUND -> reject c MODEL_NOT_FOUND",
    );
}

#[test]
fn memory_that_was_taken_meanwhile_is_looked_at_again_but_not_for_ever() {
    check(
        "t=0.0 submit a two -> plan /two, loading a
         t=0.1 planned two cpu=10/10 -> load /two h1/cpu 300s
         t=0.2 unloadable two INSUFFICIENT_MEMORY -> plan /two
         t=0.3 planned two cpu=10/10 -> load /two h1/cpu 300s
         t=0.3 unloadable two INSUFFICIENT_MEMORY -> plan /two
         t=0.3 planned two cpu=10/10 -> load /two h1/cpu 300s
         t=0.3 unloadable two INSUFFICIENT_MEMORY -> plan /two
         t=0.3 planned two cpu=10/10 -> load /two h1/cpu 300s
         t=0.3 unloadable two INSUFFICIENT_MEMORY -> plan /two
         t=0.3 planned two cpu=10/10 -> load /two h1/cpu 300s
         t=0.3 unloadable two INSUFFICIENT_MEMORY -> reject a INSUFFICIENT_MEMORY",
    );
}

#[test]
fn loads_on_different_devices_run_side_by_side_and_on_one_in_turn() {
    check(
        "t=0.0 beat w1 ready one 0/1 keep=300 at=gpu
         t=5.5 beat w1 ready one 0/1 keep=300 at=gpu
         t=5.5 submit x one -> dispatch x w1
         t=5.6 submit a two -> plan /two, loading a
         t=5.6 planned two gpu=0/10:w1=12 cpu=0/50
         t=5.7 submit b three -> plan /three, loading b
         t=5.7 planned three gpu=0/10:w1=12 cpu=20/10 -> load /three h1/cpu 300s
         t=5.7 submit c four -> plan /four, loading c
         t=5.7 planned four gpu=3/2:w1=12 cpu=0/10
         t=5.8 ended x w1 -> unload w1",
    );
}

#[test]
fn a_model_leaves_when_nobody_has_used_it_for_as_long_as_the_last_user_said() {
    check(
        "t=0.0 beat w1 ready one 0/1 keep=2
         t=1.0 beat w1 ready one 0/1 keep=2
         t=1.9 submit a one -> dispatch a w1
         t=2.0 beat w1 busy one 1/1 keep=2
         t=2.1 ended a w1
         t=3.0 beat w1 ready one 0/1 keep=2
         t=4.0 beat w1 ready one 0/1 keep=2
         t=4.2 tick -> unload w1
         t=4.3 submit b one -> plan /one, loading b
         t=4.4 stays w1 HIVE_UNREACHABLE -> dispatch b w1
         t=5.0 beat w1 ready one 0/1 keep=2 -> abandon /one",
    );
    check(
        "t=0.0 beat w1 ready one 0/2
         t=1.0 beat w1 ready one 0/2
         t=1.0 submit a one keep=0 -> dispatch a w1
         t=1.1 submit b one -> dispatch b w1
         t=1.2 ended a w1
         t=1.3 tick
         t=1.4 ended b w1
         t=1.4 tick -> unload w1",
    );
    check(
        "t=0.0 beat w1 ready one 0/1 keep=1
         t=0.5 submit a one keep=-1 -> dispatch a w1
         t=0.6 ended a w1
         t=1.0 beat w1 ready one 0/1 keep=1
         t=2.0 beat w1 ready one 0/1 keep=1
         t=3.0 beat w1 ready one 0/1 keep=1
         t=4.0 tick",
    );
}

#[test]
fn a_job_that_only_loads_ends_when_the_model_serves_busy_or_not() {
    check(
        "t=0.0 submit a one only_load keep=60 -> plan /one, loading a
         t=0.0 planned one cpu=20/10 -> load /one h1/cpu 60s
         t=0.5 loaded one
         t=0.5 beat w1 ready one 0/1 keep=60 -> loaded a w1
         t=0.6 submit b one -> dispatch b w1
         t=0.7 submit c one only_load -> loaded c w1
         t=0.8 beat w1 busy one 1/1 keep=60",
    );
}

#[test]
fn least_loaded_takes_the_one_with_most_of_its_slots_free() {
    check_with(
        Config { policy: Policy::LeastLoaded, ..config(100) },
        "t=0.0 beat w1 ready tinybee 3/4
         t=0.0 beat w2 ready tinybee 0/2
         t=0.1 submit a tinybee -> dispatch a w2
         t=0.2 submit b tinybee -> dispatch b w2
         t=0.3 submit c tinybee -> dispatch c w1",
    );
}

#[test]
fn fastest_counts_rates_and_its_own_dispatches_and_waits_for_a_much_faster_one() {
    check_with(
        Config { policy: Policy::Fastest, ..config(100) },
        "t=0.0 beat slow ready tinybee 0/1 decode=10 prefill=100
         t=0.0 beat quick ready tinybee 0/1 decode=200 prefill=2000
         t=0.1 submit a tinybee -> dispatch a quick
         t=0.1 submit b tinybee -> queued b 0
         t=0.2 ended a quick -> dispatch b quick",
    );
    check_with(
        Config { policy: Policy::Fastest, ..config(100) },
        "t=0.0 beat slow ready tinybee 0/1 decode=100 prefill=1000
         t=0.0 beat quick ready tinybee 0/1 decode=120 prefill=1200
         t=0.1 submit a tinybee -> dispatch a quick
         t=0.1 submit b tinybee -> dispatch b slow",
    );
    // Who is much better off with a busy one leaves the free one to whoever is not.
    check_with(
        Config { policy: Policy::Fastest, ..config(100) },
        "t=0.0 beat slow ready tinybee 0/1 decode=10 prefill=1000
         t=0.0 beat quick ready tinybee 0/1 decode=200 prefill=1000
         t=0.1 submit a tinybee -> dispatch a quick
         t=0.1 submit b tinybee prompt=100 answer=200 -> queued b 0
         t=0.1 submit c tinybee prompt=100 answer=200 -> queued c 1
         t=0.2 submit d tinybee prompt=10000 answer=1 -> dispatch d slow
         t=0.2 submit e tinybee prompt=10000 answer=1 -> queued e 2
         t=0.3 ended d slow -> dispatch e slow",
    );
}

#[test]
fn fastest_loads_a_model_where_it_was_done_soonest_before_and_tries_every_device_first() {
    let with = |policy| Config { policy, ..config(100) };
    // On the GPU it loads in ten seconds, on the CPU in one.
    let before = "t=0.0 beat g starting one 0/1 at=cuda:0 keep=1
         t=10.0 beat g ready one 0/1 at=cuda:0 keep=1 decode=100 prefill=1000
         t=10.1 beat g stopped one 0/1 at=cuda:0 keep=1 decode=100 prefill=1000 -> forget g
         t=20.0 beat c starting one 0/1 at=cpu keep=1
         t=21.0 beat c ready one 0/1 at=cpu keep=1 decode=10 prefill=100
         t=21.1 beat c stopped one 0/1 at=cpu keep=1 decode=10 prefill=100 -> forget c
         ";
    let ask = |answer: u32, device: &str| {
        format!(
            "t=30.0 submit a one prompt=1 answer={answer} -> plan /one, loading a
             t=30.0 planned one cuda:0=20/10 cpu=20/10 -> load /one h1/{device} 300s"
        )
    };
    check_with(with(Policy::Fastest), &format!("{before}{}", ask(20, "cpu")));
    check_with(with(Policy::Fastest), &format!("{before}{}", ask(200, "cuda:0")));
    check_with(with(Policy::LeastLoaded), &format!("{before}{}", ask(20, "cuda:0")));
    // Who was on the CPU alone does not keep others from the GPU.
    let cpu = before.lines().skip(3).collect::<Vec<_>>().join("\n");
    check_with(with(Policy::Fastest), &format!("{cpu}\n{}", ask(20, "cuda:0")));
}

#[test]
fn those_far_behind_are_told_their_place_among_all_owners() {
    let mut script = Script { scheduler: Scheduler::new(config(100)), seq: 0 };
    let now = Duration::ZERO;
    let beat = script.event(now, &["beat", "w1", "ready", "tinybee", "1/1"]);
    assert!(script.scheduler.handle(now, beat).is_empty());
    let mut submit = |name: &str, owner: &str| {
        let event = script.event(now, &["submit", name, "tinybee", &format!("owner={owner}")]);
        let effects = script.scheduler.handle(now, event);
        effects.into_iter().find_map(|effect| match effect {
            Effect::Queued { job: id, position } if id == job(name) => Some(position),
            _ => None,
        })
    };
    for at in 0..20 {
        assert_eq!(submit(&format!("a{at}"), "a"), Some(at));
    }
    // Each of b's comes behind as many of a's as b has before it, and the one of them that is older.
    for at in 0..20 {
        assert_eq!(submit(&format!("b{at}"), "b"), Some(2 * at + 1));
    }
}

#[test]
fn every_policy_is_known_by_its_name() {
    for (name, policy) in Policy::ALL {
        assert_eq!((name.parse(), policy.to_string()), (Ok(*policy), (*name).to_owned()));
    }
    assert!("slowest".parse::<Policy>().is_err());
}
