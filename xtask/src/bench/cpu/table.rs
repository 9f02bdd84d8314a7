//! Figures as Markdown, with the share that each is of the limit that it is bound by.

use super::super::random_gguf::{Mixture, Shape, Work};
use super::super::{quantile, sorted};
use super::ours::Limits;
use super::{BATCH_PROMPT, Figure, Sample, Series, serve};

/// What keeps something from being faster.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    Memory,
    Products,
}

/// The most tokens a second that a figure can have: no step is faster than its bytes are read, nor than its products are made.
fn most(figure: Figure, work: &Work, read: f64, products: Option<f64>) -> Option<(f64, Bound)> {
    // Tokens of a step that count, all of them, those whose logits are wanted, and positions of keys and values that it reads.
    let (counted, tokens, heads, positions) = match figure {
        Figure::Prefill { tokens } => (tokens, tokens, 1, tokens),
        Figure::Decode { tokens, context } => (1, 1, 1, context + tokens / 2),
        Figure::Batch { tokens, sequences } => {
            (sequences, sequences, sequences, sequences * (BATCH_PROMPT + tokens / 2))
        }
        // A step has its share of the prompts as well.
        Figure::Serve { clients } => {
            let busy = clients.min(serve::SLOTS);
            (busy, busy + busy * serve::PROMPT / serve::ANSWER, busy, busy * (serve::PROMPT + serve::ANSWER / 2))
        }
        Figure::Load { .. } | Figure::Peak => return None,
    };
    let bytes = (work.bytes + work.kv * positions) as f64 / (read * 1e9);
    let operations = (2 * (work.layers * tokens + work.head * heads)) as f64;
    match products.map(|products| operations / (products * 1e9)) {
        Some(seconds) if seconds > bytes => Some((counted as f64 / seconds, Bound::Products)),
        // A prompt is bound by products, known or not.
        None if tokens > 16 => None,
        _ => Some((counted as f64 / bytes, Bound::Memory)),
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(&sorted(values), 0.5)
}

/// The products that kernels of such files make.
fn products(mixture: Mixture, limits: &Limits) -> (Option<f64>, &'static str) {
    match mixture {
        Mixture::BF16 if limits.bf16.is_some() => (limits.bf16, "bf16"),
        Mixture::BF16 => (limits.f32, "f32"),
        Mixture::Q8_0 | Mixture::Q4_K_M | Mixture::Q4_0 => (limits.int8, "int8"),
    }
}

fn name(figure: Figure) -> String {
    match figure {
        Figure::Prefill { tokens } => format!("prefill {tokens}, tokens/s"),
        Figure::Decode { tokens, context: 0 } => format!("decode {tokens}, tokens/s"),
        Figure::Decode { tokens, context } => format!("decode {tokens} at {context}, tokens/s"),
        Figure::Batch { sequences, .. } => format!("batch {sequences}, tokens/s"),
        Figure::Serve { clients: 1 } => "1 client, tokens/s".to_owned(),
        Figure::Serve { clients } => format!("{clients} clients, tokens/s"),
        Figure::Load { .. } => "load, ms".to_owned(),
        Figure::Peak => "peak memory, MiB".to_owned(),
    }
}

/// Three digits, or all before the point.
fn short(value: f64) -> String {
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$}")
}

/// Everything about a file.
pub(super) fn table(shape: &Shape, mixture: Mixture, peer: &str, all: &[Series]) -> String {
    let work = shape.work(mixture);
    let mut lines = vec![format!("### {} {}", shape.name, mixture.name()), String::new()];
    lines.push(format!(
        "A step reads {:.0} MB of weights, {:.0} as rbee keeps them. The machine's limits meanwhile, by threads: {}.",
        work.bytes as f64 / 1e6,
        work.kept as f64 / 1e6,
        limits(all)
    ));
    lines.push(String::new());
    lines.push(format!("| | threads | rbee | {peer} | ratio | in single rounds | limit | rbee of it | {peer} of it |"));
    lines.push("|---|---|---|---|---|---|---|---|---|".into());
    lines.extend(all.iter().map(|series| row(series, &work, mixture)));
    lines.join("\n")
}

fn row(series: &Series, work: &Work, mixture: Mixture) -> String {
    let samples = &series.samples;
    let (ours, theirs) = (median(samples.iter().map(|it| it.ours)), median(samples.iter().map(|it| it.theirs)));
    let ratios = sorted(samples.iter().map(|it| it.ours / it.theirs));
    let kept = Work { bytes: work.kept, ..*work };
    let share = |work: &Work, value: &dyn Fn(&Sample) -> f64| {
        let shares = samples.iter().filter_map(|sample| {
            let (products, _) = products(mixture, &sample.limits);
            Some(value(sample) / most(series.figure, work, sample.limits.read, products)?.0)
        });
        let shares: Vec<f64> = shares.collect();
        if shares.is_empty() { "-".to_owned() } else { format!("{:.0} %", median(shares) * 100.0) }
    };
    let bounds = samples.first().and_then(|sample| {
        let (products, kind) = products(mixture, &sample.limits);
        let (_, bound) = most(series.figure, &kept, sample.limits.read, products)?;
        Some(if bound == Bound::Memory { "memory" } else { kind })
    });
    format!(
        "| {} | {} | {} | {} | {:.2} | {:.2} to {:.2} | {} | {} | {} |",
        name(series.figure),
        series.threads,
        short(ours),
        short(theirs),
        ours / theirs,
        quantile(&ratios, 0.0),
        quantile(&ratios, 1.0),
        bounds.unwrap_or("-"),
        share(&kept, &|it| it.ours),
        share(work, &|it| it.theirs),
    )
}

/// Medians of the limits with each number of threads.
fn limits(all: &[Series]) -> String {
    let mut counts: Vec<usize> = all.iter().map(|series| series.threads).collect();
    counts.sort_unstable();
    counts.dedup();
    let of = |threads: usize| {
        let samples = || all.iter().filter(|it| it.threads == threads).flat_map(|it| &it.samples);
        let peak = |name: &str, peak: &dyn Fn(&Limits) -> Option<f64>| {
            let values: Vec<f64> = samples().filter_map(|sample| peak(&sample.limits)).collect();
            if values.is_empty() { String::new() } else { format!(", {name} {:.0}", median(values)) }
        };
        format!(
            "{threads}: reads {:.1} GB/s{} in 10^9 operations/s",
            median(samples().map(|sample| sample.limits.read)),
            [
                peak("int8", &|limits| limits.int8),
                peak("bf16", &|limits| limits.bf16),
                peak("f32", &|limits| limits.f32)
            ]
            .concat(),
        )
    };
    counts.into_iter().map(of).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work =
        Work { bytes: 1_000_000_000, kept: 1_000_000_000, layers: 1_000_000_000, head: 0, kv: 1_000_000 };

    #[test]
    fn one_token_is_bound_by_what_is_read_and_a_prompt_by_its_products() {
        let limit = |figure| most(figure, &WORK, 10.0, Some(1000.0));
        assert_eq!(limit(Figure::Decode { tokens: 2, context: 999 }), Some((5.0, Bound::Memory)));
        assert_eq!(limit(Figure::Prefill { tokens: 512 }), Some((500.0, Bound::Products)));
        assert_eq!(limit(Figure::Peak), None);
    }

    #[test]
    fn serving_computes_prompts_too_and_never_more_answers_at_once_than_there_are_slots() {
        let limit = |clients| most(Figure::Serve { clients }, &Work { kv: 0, ..WORK }, 100.0, Some(1000.0));
        assert_eq!(limit(1), Some((100.0, Bound::Memory)));
        assert_eq!(limit(16), Some((250.0, Bound::Products)));
        assert_eq!(limit(32), limit(16));
    }

    #[test]
    fn without_a_known_peak_only_what_memory_bounds_has_a_limit() {
        assert_eq!(most(Figure::Prefill { tokens: 512 }, &WORK, 10.0, None), None);
        let batch = Figure::Batch { tokens: 0, sequences: 4 };
        assert_eq!(most(batch, &Work { kv: 0, ..WORK }, 10.0, None), Some((40.0, Bound::Memory)));
    }
}
