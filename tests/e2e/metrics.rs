//! What Prometheus sees of a queen.

use std::time::Duration;

use rbee_testkit::http::Http;
use rbee_testkit::{Cluster, Setup, patience, wait_for};
use serde_json::json;

use crate::{infer, prompt, with};

/// The value of a line of this name with these labels; none if there is no such line.
pub fn value(text: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let line = text.lines().find(|line| {
        let own = line.split(['{', ' ']).next() == Some(name);
        own && labels.iter().all(|label| line.contains(label))
    });
    line?.rsplit(' ').next()?.parse().ok()
}

fn scrape(cluster: &Cluster) -> String {
    let answer = cluster.queen().get("/metrics");
    assert_eq!(answer.head.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    answer.text()
}

#[test]
fn what_a_vllm_dashboard_asks_for_is_there_and_right() {
    let cluster = Setup::sim("--sim-step-us 5000").env("RBEE_SLOTS", 1).warm();
    let text = prompt("counting");
    for _ in 0..3 {
        assert_eq!(cluster.job(&infer(&text, 20)).done().usage.unwrap().completion_tokens, 20);
    }
    cluster.job(&json!({ "operation": "infer", "model": "no-such", "prompt": text })).error();
    let mut running = cluster.stream(&infer(&text, 60_000));
    running.tokens(3);
    let waiting = cluster.post(&with(infer(&text, 5), json!({ "detach": true })));
    let seen = wait_for("one to run and one to wait", Duration::from_secs(5), || {
        let text = scrape(&cluster);
        let of = |name| value(&text, name, &["model_name=\"tinybee\""]);
        let waiting = value(&text, "vllm:num_requests_waiting", &["model_name=\"\""]);
        // KV is what the last heartbeat said.
        match (of("vllm:num_requests_running"), waiting, of("vllm:kv_cache_usage_perc")) {
            (Some(1.0), Some(1.0), Some(kv)) if kv > 0.0 => Ok(text),
            other => Err(format!("{other:?}")),
        }
    });
    let model = "model_name=\"tinybee\"";
    let of = |name: &str| value(&seen, name, &[model]).unwrap_or_else(|| panic!("no {name} in\n{seen}"));
    assert_eq!(value(&seen, "vllm:request_success_total", &[model, "finished_reason=\"length\""]), Some(3.0));
    assert_eq!(value(&seen, "rbee_request_failures_total", &["MODEL_NOT_FOUND", "model_name=\"\""]), Some(1.0));
    assert_eq!(of("vllm:generation_tokens_total"), 60.0);
    assert_eq!(of("vllm:prefix_cache_queries_total"), of("vllm:prompt_tokens_total"));
    assert!(of("vllm:prefix_cache_hits_total") < of("vllm:prefix_cache_queries_total"));
    for histogram in [
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
    ] {
        assert_eq!(of(&format!("{histogram}_count")), 3.0, "{histogram}");
        assert!(of(&format!("{histogram}_sum")) >= 0.0);
        assert_eq!(value(&seen, &format!("{histogram}_bucket"), &[model, "le=\"+Inf\""]), Some(3.0), "{histogram}");
    }
    // Each token but the first of three answers, and at least two of the one that runs.
    assert!(of("vllm:inter_token_latency_seconds_count") >= 59.0);
    assert!(of("vllm:inter_token_latency_seconds_sum") >= 0.2);
    assert!(of("vllm:kv_cache_usage_perc") <= 1.0);
    assert_eq!(of("vllm:num_preemptions_total"), 0.0);
    assert_eq!((of("rbee_worker_slots"), value(&seen, "rbee_hives", &[])), (1.0, Some(1.0)));
    running.close();
    wait_for("the other to be done", Duration::from_secs(5), || {
        let view = cluster.job_view(&waiting);
        view.usage.map(|_| ()).ok_or_else(|| format!("{view:?}"))
    });
}

#[test]
fn a_hive_tells_of_its_processes_and_a_worker_of_its_engine() {
    let cluster = Setup::sim("").warm();
    cluster.job(&infer(&prompt("engines"), 20)).done();
    let hive = Http::new(cluster.hive).get("/metrics").text();
    assert_eq!(value(&hive, "rbee_hive_workers", &["state=\"ready\""]), Some(1.0), "{hive}");
    assert_eq!(value(&hive, "rbee_hive_workers", &["state=\"backoff\""]), Some(0.0));
    assert_eq!(value(&hive, "rbee_hive_worker_restarts", &["worker="]), Some(0.0));

    let worker = cluster.worker_by_hand(&[]);
    let text = wait_for("the worker to serve", patience(Duration::from_secs(1)), || {
        let text = worker.http.get("/metrics").text();
        let blocks = value(&text, "rbee_engine_kv_blocks", &["engine="]);
        if blocks.is_some_and(|blocks| blocks > 0.0) { Ok(text) } else { Err(text) }
    });
    assert_eq!(value(&text, "rbee_engine_preemptions_total", &["model_name=\"tinybee\""]), Some(0.0), "{text}");
    worker.stop();
}
