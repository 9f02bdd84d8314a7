//! What a person reads, as snapshots. The values are JSON as it comes from the wire.

use insta::assert_snapshot;
use rbee_wire::view::{JobView, StatusView};
use serde_json::{Value, json};

use super::*;

fn life() -> Value {
    json!({"counter": 3, "random": "0123456789abcdef0123456789abcdef"})
}

fn a_worker(id: &str, state: &str, load: Value) -> Value {
    json!({
        "worker_id": id, "hive_id": "localhost", "incarnation": life(), "model": "tinybee", "device": "cpu",
        "state": state, "load": load, "slots": {"total": 8, "used": 1}, "queue": 2,
        "kv_blocks": {"total": 64, "used": 3}, "memory": {"weights": 5_500_000, "kv": 1_048_576, "total": 30_000_000},
        "context": 1024, "url": "http://127.0.0.1:40001", "age_ms": 130, "numerics_id": "n1",
        "prefill_rate": 0.0, "decode_rate": 812.34, "version": "0.1.0"
    })
}

fn a_process() -> Value {
    json!({
        "pid": 0, "worker_id": "w2", "incarnation": life(), "model": "org/name", "device": "cuda:0",
        "state": "backoff", "since_ms": 61_000, "restarts": 2, "reserved": 3_000_000_000u64,
        "last_exit": {"code": 1, "reason": "failed", "stderr_tail": "no such file\n\u{1b}[31mred",
            "error": {"code": "MODEL_CORRUPT", "message": "m", "retryable": false}}
    })
}

fn a_hive() -> Value {
    json!({
        "hive_id": "localhost", "incarnation": life(), "url": "http://127.0.0.1:7835", "alive": true, "age_ms": 900,
        "devices": [{"id": "cpu", "name": "A processor", "kind": "cpu", "memory_total": 8_589_934_592u64,
            "memory_free": 4_000_000_000u64}],
        "processes": [a_process()], "version": "0.1.0"
    })
}

fn a_job() -> Value {
    json!({
        "job_id": "job-01234567-0123456789abcdef0123456789abcdef", "operation": "infer", "state": "failed",
        "model": "tinybee", "worker_id": "w1", "age_ms": 2500, "events": 12, "tokens": 9, "listeners": 0,
        "usage": {"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29, "cached_tokens": 16},
        "timings": {"queue_ms": 0.4, "load_ms": 0.0, "prefill_ms": 5.25, "decode_ms": 100.0, "total_ms": 106.0,
            "tokens_per_s": 80.0},
        "error": {"code": "WORKER_LOST", "message": "worker w1 ended", "hint": "run it again", "retryable": true},
        "trail": [{"at_ms": 0, "what": "dispatch", "why": "w1 is the first with a free slot"},
            {"at_ms": 106, "what": "end", "why": "worker w1 ended"}]
    })
}

#[test]
fn workers_are_a_table_that_can_be_cut_by_columns() {
    let load = json!({"stage": "load", "done": 1, "total": 3, "unit": "bytes"});
    let text = workers(&[a_worker("w1", "ready", Value::Null), a_worker("a-longer-name", "starting", load)]);
    assert_snapshot!(text, @r"
    WORKER         MODEL    HIVE       DEVICE  STATE               SLOTS  QUEUE  MEMORY   DECODE      UNTIL
    w1             tinybee  localhost  cpu     ready               1/8    2      28.6MiB  812.3tok/s  stays
    a-longer-name  tinybee  localhost  cpu     starting(load:33%)  1/8    2      28.6MiB  812.3tok/s  stays
    ");
    assert_snapshot!(workers(&[]), @"WORKER  MODEL  HIVE  DEVICE  STATE  SLOTS  QUEUE  MEMORY  DECODE  UNTIL");
}

#[test]
fn one_worker_shows_what_the_table_leaves_out() {
    assert_snapshot!(worker(&a_worker("w1", "ready", Value::Null)), @r"
    worker       w1
    model        tinybee
    hive         localhost
    device       cpu
    state        ready
    slots        1/8
    queue        2
    context      1024 tokens
    kv blocks    3/64
    memory       28.6MiB
      weights    5.2MiB
      kv         1.0MiB
    decode       812.3tok/s
    until        stays
    numerics     n1
    url          http://127.0.0.1:40001
    last heard   130ms ago
    version      0.1.0
    incarnation  3-0123456789abcdef0123456789abcdef
    ");
}

#[test]
fn a_hive_shows_its_devices_and_processes() {
    assert_snapshot!(hives(&[a_hive()]), @r"
    HIVE       STATE  URL                    DEVICES  WORKERS  SILENT  VERSION
    localhost  alive  http://127.0.0.1:7835  cpu      0        900ms   0.1.0
    ");
    assert_snapshot!(hive(&a_hive()), @r"
    hive         localhost
    state        alive
    url          http://127.0.0.1:7835
    last heard   900ms ago
    version      0.1.0
    incarnation  3-0123456789abcdef0123456789abcdef

    DEVICE  KIND  FREE    TOTAL   NAME
    cpu     cpu   3.7GiB  8.0GiB  A processor

    PID  WORKER  MODEL     DEVICE  STATE    SINCE  RESERVED  RESTARTS  LAST EXIT
    -    w2      org/name  cuda:0  backoff  1m01s  2.8GiB    2         failed (exit 1)
    ");
}

#[test]
fn a_process_that_failed_shows_its_last_words_without_control_characters() {
    assert_snapshot!(process(&a_process()), @r"
    worker       w2
    model        org/name
    device       cuda:0
    state        backoff
    since        1m01s
    reserved     2.8GiB
    restarts     2
    last exit    failed (exit 1)
    error        MODEL_CORRUPT: m
    incarnation  3-0123456789abcdef0123456789abcdef

    no such file
    \u{1b}[31mred
    ");
}

#[test]
fn binaries_and_spawns() {
    let binary_view =
        json!({"worker_type": "cpu", "path": "/opt/w", "size": 9_000_000, "version": "0.1.0", "devices": ["cpu"]});
    assert_snapshot!(binaries(std::slice::from_ref(&binary_view)), @r"
    TYPE  DEVICES  SIZE    VERSION  PATH
    cpu   cpu      8.6MiB  0.1.0    /opt/w
    ");
    let spawn = json!({"outcome": "existing", "worker_id": "w1", "hive_id": "localhost", "model": "tinybee",
        "device": "cpu", "pid": 7});
    assert_eq!(spawned(std::slice::from_ref(&spawn)), "w1\n");
    assert_snapshot!(spawn_note(&spawn).unwrap(), @"w1 serves already: tinybee on cpu of localhost");
}

#[test]
fn a_job_is_explained_by_its_decisions() {
    let view: JobView = serde_json::from_value(a_job()).unwrap();
    assert_snapshot!(jobs(std::slice::from_ref(&view)), @r"
    JOB                                            OPERATION  STATE                MODEL    WORKER  AGE  TOKENS
    job-01234567-0123456789abcdef0123456789abcdef  infer      failed(WORKER_LOST)  tinybee  w1      2s   9
    ");
    assert_snapshot!(explain(&view), @r"
    job        job-01234567-0123456789abcdef0123456789abcdef
    operation  infer
    state      failed
    model      tinybee
    worker     w1
    age        2s
    tokens     9
    events     12
    listeners  0
    error      WORKER_LOST: worker w1 ended
    hint       run it again

    prompt   20 tokens, 16 of them cached
    output   9 tokens
    queue    0.4 ms
    load     0.0 ms
    prefill  5.2 ms
    decode   100.0 ms
    total    106.0 ms
    speed    80.0 tokens/s

    AT     WHAT      WHY
    0ms    dispatch  w1 is the first with a free slot
    106ms  end       worker w1 ended
    ");
}

#[test]
fn the_status_shows_all_of_it_and_only_jobs_that_are_not_over() {
    let view: StatusView = serde_json::from_value(json!({
        "queen": {"program": "queen-rbee", "version": "0.1.0", "build": "b", "protocol": 1, "pid": 11,
            "uptime_ms": 3_660_000, "incarnation": life()},
        "hives": [a_hive()], "workers": [a_worker("w1", "ready", Value::Null)], "queued": 0, "running": 1
    }))
    .unwrap();
    let mut live = a_job();
    live["state"] = json!("running");
    live["error"] = Value::Null;
    let mut asked = live.clone();
    asked["operation"] = json!("status");
    let jobs: Vec<JobView> = serde_json::from_value(json!([live, asked, a_job()])).unwrap();
    assert_snapshot!(status("http://127.0.0.1:7833", &view, &jobs), @r"
    queen   http://127.0.0.1:7833 (version 0.1.0, pid 11, up 1h01m)
    models  tinybee
    jobs    0 waiting, 1 running

    HIVE       STATE  URL                    DEVICES  WORKERS  SILENT  VERSION
    localhost  alive  http://127.0.0.1:7835  cpu      0        900ms   0.1.0

    WORKER  MODEL    HIVE       DEVICE  STATE  SLOTS  QUEUE  MEMORY   DECODE      UNTIL
    w1      tinybee  localhost  cpu     ready  1/8    2      28.6MiB  812.3tok/s  stays

    JOB                                            OPERATION  STATE    MODEL    WORKER  AGE  TOKENS
    job-01234567-0123456789abcdef0123456789abcdef  infer      running  tinybee  w1      2s   9
    ");
}

#[test]
fn what_a_newer_peer_sends_is_shown_field_by_field() {
    assert_snapshot!(workers(&[json!({"worker_id": "w1", "state": "dreaming"})]), @r"
    worker_id  w1
    state      dreaming
    ");
    assert_eq!(any(&[json!("text")]), "text\n");
}

#[test]
fn keys_are_a_table_with_the_name_last() {
    let one = json!({"key_id": "key-1", "name": "the lab's", "scopes": ["inference"], "max_concurrent": 8, "rate": 60,
        "created": 1_709_210_096, "running": 3});
    let all = json!({"key_id": "key-2", "name": "me", "scopes": ["inference", "admin"], "created": 0, "running": 0});
    assert_snapshot!(keys(&[one, all]), @r"
    KEY    SCOPES           JOBS  AT-ONCE  A-MINUTE  CREATED            NAME
    key-1  inference        3     8        60        2024-02-29T12:34Z  the lab's
    key-2  inference,admin  0     -        -         1970-01-01T00:00Z  me
    ");
}

#[test]
fn dates_are_those_of_the_calendar() {
    for (seconds, want) in [
        (951_782_399, "2000-02-28T23:59Z"),
        (951_782_400, "2000-02-29T00:00Z"),
        (4_107_542_399, "2100-02-28T23:59Z"),
        (4_107_542_400, "2100-03-01T00:00Z"),
        (1_767_225_599, "2025-12-31T23:59Z"),
    ] {
        assert_eq!(table::date(seconds), want);
    }
}

#[test]
fn units_are_read_at_a_glance() {
    assert_eq!([0, 1023, 1024, 1 << 40, u64::MAX].map(bytes), ["0B", "1023B", "1.0KiB", "1.0TiB", "16777216.0TiB"]);
    assert_eq!([999, 1000, 61_000, 3_660_000, 90_000_000].map(age), ["999ms", "1s", "1m01s", "1h01m", "1d01h"]);
}

#[test]
fn a_plan_says_what_fits_and_what_else_would() {
    let room = |free: u64, would_fit: Value| {
        json!({ "model": "org/name", "hive_id": "localhost", "rooms": [{
            "device": "cuda:0", "total": 8u64 << 30, "free": free, "context_fits": 512, "would_fit": would_fit,
            "needs": { "weights": 2u64 << 30, "kv_per_token": 1024, "kv": 8 << 20, "scratch": 0,
                       "total": (2u64 << 30) + (8 << 20), "least": (2u64 << 30) + (1 << 20), "context": 1024 },
            "held": [{ "worker_id": "w1", "model": "tinybee", "bytes": 160 << 20 }],
        }] })
    };
    let fits = plan(&room(3 << 30, json!([])));
    assert!(fits.contains("  yes\n") && fits.contains("cuda:0: tinybee has 160.0MiB (w1)"), "{fits}");
    let less = plan(&room((2 << 30) + (2 << 20), json!([])));
    assert!(less.contains("yes, with less KV"), "{less}");
    let way = json!([{ "load": { "quantize": "q4_k" }, "needed": 700 << 20, "flags": "--quantize q4_k" }]);
    let no = plan(&room(1 << 30, way));
    assert!(no.contains("no: 512 tokens of context would"), "{no}");
    assert!(no.contains("with --quantize q4_k it needs 700.0MiB, which fits"), "{no}");
}
