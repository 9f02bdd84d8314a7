//! What fewer bits cost, and that a load with them is another model to whoever continues a text.

use rbee_models::{KvType, Quantize, RunnerOptions};

use crate::support::{exact, followed, runner, tinybee};

/// Root mean square of the differences, relative to that of the values.
fn error(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    let pairs = || got.iter().flatten().zip(want.iter().flatten());
    let square = |value: f32| f64::from(value) * f64::from(value);
    let off: f64 = pairs().map(|(got, want)| square(got - want)).sum();
    (off / pairs().map(|(_, want)| square(*want)).sum::<f64>()).sqrt()
}

#[test]
fn fewer_bits_change_little_and_change_the_numerics_id() {
    let tokens: Vec<u32> = (0..40).map(|i| 100 + i * 7 % 900).collect();
    let (prompt, following) = tokens.split_at(20);
    let exact = exact();
    let mut reference = runner(&tinybee(), &exact);
    let want = followed(&mut reference, prompt, following);
    let mut ids = vec![reference.about().numerics_id.to_owned()];
    for (what, options, least, most) in [
        ("whole numbers for bf16", RunnerOptions { exact: false, ..exact.clone() }, 1e-6, 3e-4),
        ("weights", RunnerOptions { quantize: Some(Quantize::Q8_0), ..exact.clone() }, 1e-4, 0.02),
        ("KV", RunnerOptions { kv_type: Some(KvType::Q8_0), ..exact.clone() }, 1e-4, 0.02),
        // Four bits in its down projections alone: the other rows are no blocks of 256.
        ("four bits", RunnerOptions { quantize: Some(Quantize::Q4K), ..exact.clone() }, 1e-4, 0.1),
    ] {
        let mut runner = runner(&tinybee(), &options);
        let off = error(&followed(&mut runner, prompt, following), &want);
        assert!(off > least && off < most, "{what}: {off}");
        assert!(!ids.contains(&runner.about().numerics_id.to_owned()), "{what}");
        ids.push(runner.about().numerics_id.to_owned());
    }
}
