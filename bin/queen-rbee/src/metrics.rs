//! What the queen counts, for Prometheus: under vLLM's names where the meaning is the same, so that its dashboards work, else
//! under our own.
//!
//! Requests are counted where they end, in [`crate::jobs`]; times between tokens where tokens pass, in [`crate::relay`]; the
//! fleet is looked at when somebody scrapes. Labels are bounded: a model is named once a worker has served it.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::prometheus_text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use rbee_wire::event::{FinishReason, Timings, Usage};
use rbee_wire::view::WorkerView;
use rbee_wire::{ErrorCode, ModelRef};

/// Seconds, as vLLM has them.
const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST: [f64; 20] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0,
];

/// Tokens of a request.
const TOKENS: [f64; 16] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfModel {
    model_name: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Finished {
    model_name: String,
    finished_reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Failed {
    model_name: String,
    code: &'static str,
}

/// `engine` is what vLLM calls one of several workers.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfWorker {
    model_name: String,
    engine: String,
}

type Histograms = Family<OfModel, Histogram, fn() -> Histogram>;

/// What is counted over the queen's life.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    finished: Family<Finished, Counter>,
    failed: Family<Failed, Counter>,
    prompt_tokens: Family<OfModel, Counter>,
    generation_tokens: Family<OfModel, Counter>,
    prefix_queries: Family<OfModel, Counter>,
    prefix_hits: Family<OfModel, Counter>,
    first_token: Histograms,
    between_tokens: Histograms,
    whole: Histograms,
    queued: Histograms,
    loading: Histograms,
    prefill: Histograms,
    decode: Histograms,
    request_prompt: Histograms,
    request_generation: Histograms,
}

/// An answer that ended, as far as it is counted.
#[derive(Clone, Copy, Debug)]
pub struct Ended<'a> {
    /// Its model, if a worker took it.
    pub model: Option<&'a ModelRef>,
    /// Where its time went.
    pub timings: &'a Timings,
    /// From its post to its first token.
    pub first_token: Option<Duration>,
}

impl Ended<'_> {
    fn label(&self) -> OfModel {
        OfModel { model_name: self.model.map(ToString::to_string).unwrap_or_default() }
    }
}

/// The fleet at one moment.
#[derive(Debug)]
pub struct Seen {
    /// Active workers.
    pub workers: Vec<WorkerView>,
    /// Hives that beat.
    pub hives: usize,
    /// Models of jobs that run, and of jobs that wait, where they name one.
    pub running: Vec<Option<ModelRef>>,
    /// See `running`.
    pub waiting: Vec<Option<ModelRef>>,
}

impl Default for Metrics {
    fn default() -> Self {
        fn histograms(registry: &mut Registry, name: &str, help: &str, new: fn() -> Histogram) -> Histograms {
            let family = Histograms::new_with_constructor(new);
            registry.register(name, help, family.clone());
            family
        }
        fn counters<L: Clone + std::hash::Hash + Eq + EncodeLabelSet + std::fmt::Debug + Send + Sync + 'static>(
            registry: &mut Registry,
            name: &str,
            help: &str,
        ) -> Family<L, Counter> {
            let family = Family::default();
            registry.register(name, help, family.clone());
            family
        }
        let mut registry = Registry::default();
        let r = &mut registry;
        let request: fn() -> Histogram = || Histogram::new(REQUEST);
        let tokens: fn() -> Histogram = || Histogram::new(TOKENS);
        Self {
            finished: counters(r, "vllm:request_success", "Answers by how they ended"),
            failed: counters(r, "rbee_request_failures", "Requests that failed, by error code"),
            prompt_tokens: counters(r, "vllm:prompt_tokens", "Tokens of prompts"),
            generation_tokens: counters(r, "vllm:generation_tokens", "Tokens generated"),
            prefix_queries: counters(r, "vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache"),
            prefix_hits: counters(r, "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"),
            first_token: histograms(r, "vllm:time_to_first_token_seconds", "From the post to the first token", || {
                Histogram::new(FIRST_TOKEN)
            }),
            between_tokens: histograms(
                r,
                "vllm:inter_token_latency_seconds",
                "Between two tokens of an answer",
                || Histogram::new(BETWEEN_TOKENS),
            ),
            whole: histograms(r, "vllm:e2e_request_latency_seconds", "From the post to the end", request),
            queued: histograms(r, "vllm:request_queue_time_seconds", "Waiting for a worker", request),
            loading: histograms(r, "rbee_request_load_time_seconds", "Waiting for the model to load", request),
            prefill: histograms(
                r,
                "vllm:request_prefill_time_seconds",
                "From the dispatch to the first token",
                request,
            ),
            decode: histograms(r, "vllm:request_decode_time_seconds", "From the first token to the last", request),
            request_prompt: histograms(r, "vllm:request_prompt_tokens", "Tokens of a prompt", tokens),
            request_generation: histograms(r, "vllm:request_generation_tokens", "Tokens of an answer", tokens),
            registry,
        }
    }
}

impl Metrics {
    /// Counts an answer that ended well or was cancelled.
    pub fn finished(&self, ended: Ended<'_>, usage: &Usage, reasons: impl Iterator<Item = FinishReason>) {
        let label = ended.label();
        for reason in reasons {
            let finished_reason = match reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
                FinishReason::Cancelled => "abort",
                FinishReason::ToolCalls => "tool_calls",
            };
            let model_name = label.model_name.clone();
            self.finished.get_or_create_owned(&Finished { model_name, finished_reason }).inc();
        }
        self.prompt_tokens.get_or_create_owned(&label).inc_by(usage.prompt_tokens);
        self.generation_tokens.get_or_create_owned(&label).inc_by(usage.completion_tokens);
        self.prefix_queries.get_or_create_owned(&label).inc_by(usage.prompt_tokens);
        self.prefix_hits.get_or_create_owned(&label).inc_by(usage.cached_tokens);
        self.request_prompt.get_or_create_owned(&label).observe(usage.prompt_tokens as f64);
        self.request_generation.get_or_create_owned(&label).observe(usage.completion_tokens as f64);
        self.times(ended, &label);
    }

    /// Counts a request that failed.
    pub fn failed(&self, ended: Ended<'_>, code: ErrorCode) {
        let label = ended.label();
        let model_name = label.model_name.clone();
        self.failed.get_or_create_owned(&Failed { model_name, code: code.name() }).inc();
        self.times(ended, &label);
    }

    fn times(&self, ended: Ended<'_>, label: &OfModel) {
        let Timings { queue_ms, load_ms, prefill_ms, decode_ms, total_ms, .. } = *ended.timings;
        let observe = |family: &Histograms, ms: f64| family.get_or_create_owned(label).observe(ms / 1e3);
        observe(&self.whole, total_ms);
        observe(&self.queued, queue_ms);
        observe(&self.loading, load_ms);
        if let Some(first_token) = ended.first_token {
            observe(&self.prefill, prefill_ms);
            observe(&self.decode, decode_ms);
            observe(&self.first_token, first_token.as_secs_f64() * 1e3);
        }
    }

    /// Where the times between a model's tokens go; kept by whoever sees them pass.
    pub fn between_tokens(&self, model: &ModelRef) -> Histogram {
        self.between_tokens.get_or_create_owned(&OfModel { model_name: model.to_string() })
    }

    /// Everything as Prometheus reads it.
    pub fn text(&self, seen: &Seen) -> String {
        let mut registry = Registry::default();
        let mut add = |name: &str, help: &str| {
            let family = Family::<OfWorker, Gauge<f64, AtomicU64>>::default();
            registry.register(name, help, family.clone());
            family
        };
        let kv = add("vllm:kv_cache_usage_perc", "KV blocks in use, 1 is all");
        let slots = add("rbee_worker_slots", "Requests that a worker generates for at once");
        let used = add("rbee_worker_slots_used", "Requests that a worker generates for now");
        let memory = add("rbee_worker_memory_bytes", "Resident memory of a worker");
        let preempted = Family::<OfWorker, Counter>::default();
        registry.register("vllm:num_preemptions", "Sequences that gave their KV up to others", preempted.clone());
        for worker in &seen.workers {
            let label = OfWorker { model_name: worker.model.to_string(), engine: worker.worker_id.to_string() };
            let share = worker.kv_blocks.used as f64 / worker.kv_blocks.total.max(1) as f64;
            preempted.get_or_create_owned(&label).inc_by(worker.preemptions);
            kv.get_or_create_owned(&label).set(share);
            slots.get_or_create_owned(&label).set(worker.slots.total as f64);
            used.get_or_create_owned(&label).set(worker.slots.used as f64);
            memory.get_or_create_owned(&label).set(worker.memory.total as f64);
        }
        let mut requests = |name: &str, help: &str, models: &[Option<ModelRef>]| {
            let family = Family::<OfModel, Gauge>::default();
            registry.register(name, help, family.clone());
            // What serves has a line, if only to say 0.
            let serving = seen.workers.iter().map(|worker| (worker.model.to_string(), 0));
            let counted = models.iter().map(|model| (model.as_ref().map(ToString::to_string).unwrap_or_default(), 1));
            for (model_name, count) in serving.chain(counted) {
                family.get_or_create_owned(&OfModel { model_name }).inc_by(count);
            }
        };
        requests("vllm:num_requests_running", "Requests on a worker", &seen.running);
        requests("vllm:num_requests_waiting", "Requests that wait for a worker", &seen.waiting);
        let hives = Gauge::<i64>::default();
        hives.set(i64::try_from(seen.hives).unwrap_or(i64::MAX));
        registry.register("rbee_hives", "Hives that beat", hives);

        let mut text = String::new();
        for registry in [&self.registry, &registry] {
            encode(&mut text, registry).expect("a string takes all that is written");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_under_the_names_that_dashboards_ask_for() {
        let metrics = Metrics::default();
        let timings = Timings {
            queue_ms: 20.0,
            load_ms: 0.0,
            prefill_ms: 400.0,
            network_ms: 1.0,
            decode_ms: 2000.0,
            total_ms: 2420.0,
            tokens_per_s: 5.0,
        };
        let ended =
            Ended { model: Some(&ModelRef::Tinybee), timings: &timings, first_token: Some(Duration::from_millis(420)) };
        let usage = Usage { prompt_tokens: 30, completion_tokens: 11, total_tokens: 41, cached_tokens: 16 };
        metrics.finished(ended, &usage, [FinishReason::Stop, FinishReason::Length].into_iter());
        metrics.failed(Ended { model: None, first_token: None, ..ended }, ErrorCode::ModelNotFound);
        metrics.between_tokens(&ModelRef::Tinybee).observe(0.2);
        let seen =
            Seen { workers: Vec::new(), hives: 1, running: vec![Some(ModelRef::Tinybee); 2], waiting: vec![None] };
        let text = metrics.text(&seen);
        for line in [
            "vllm:request_success_total{model_name=\"tinybee\",finished_reason=\"stop\"} 1",
            "rbee_request_failures_total{model_name=\"\",code=\"MODEL_NOT_FOUND\"} 1",
            "vllm:prompt_tokens_total{model_name=\"tinybee\"} 30",
            "vllm:prefix_cache_hits_total{model_name=\"tinybee\"} 16",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"tinybee\",le=\"0.25\"} 0",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"tinybee\",le=\"0.5\"} 1",
            "vllm:inter_token_latency_seconds_count{model_name=\"tinybee\"} 1",
            "vllm:e2e_request_latency_seconds_sum{model_name=\"tinybee\"} 2.42",
            "vllm:num_requests_running{model_name=\"tinybee\"} 2",
            "vllm:num_requests_waiting{model_name=\"\"} 1",
            "rbee_hives 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }
}
