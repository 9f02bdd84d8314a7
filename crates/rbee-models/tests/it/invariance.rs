//! A row's logits are the same bits alone, in any chunking, beside any others, in any blocks, on any threads.

use proptest::prelude::*;
use rbee_engine::runner::{Chunk, Logits, LogitsWanted, ModelRunner, Regime, StepBatch};
use rbee_models::{KvType, RunnerOptions};

use crate::support::{blocks, logits, runner, tinybee, with_kv};

fn tokens(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (seed.wrapping_mul(2_654_435_761).wrapping_add(i * 40_503) >> 7) % 2048).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn logits_are_a_function_of_the_row_alone(
        seed in 0u32..1000,
        len in 1usize..90,
        cuts in prop::collection::vec(1usize..40, 0..6),
        others in prop::collection::vec((0u32..1000, 1usize..30), 0..3),
        threads in 1usize..5,
        kv in prop::sample::select(vec![KvType::F32, KvType::F16, KvType::Bf16, KvType::Q8_0]),
        isa in prop::sample::select(vec![None, Some("avx2"), Some("scalar")]),
    ) {
        let tokens = tokens(seed, len);
        let want = logits(&mut runner(&tinybee(), &with_kv(kv)), &tokens, &[], &blocks(0, 1, len));

        let options = RunnerOptions { threads, isa: isa.map(str::to_owned), ..with_kv(kv) };
        let mut other = runner(&tinybee(), &options);
        let got = logits(&mut other, &tokens, &cuts, &blocks(300, 2, len));
        prop_assert!(got == want, "chunked, other blocks, {threads} threads, {isa:?}");

        // The last token beside others' prefills.
        let rest: Vec<(Vec<u32>, Vec<_>)> = others
            .iter()
            .enumerate()
            .map(|(i, &(seed, len))| (self::tokens(seed, len), blocks(1 + 8 * i as u32, 1, len)))
            .collect();
        let own = blocks(300, 2, len);
        let mut chunks: Vec<Chunk<'_>> = rest
            .iter()
            .map(|(tokens, blocks)| Chunk { tokens, start: 0, blocks, regime: Regime::Usual, logits: LogitsWanted::Last })
            .collect();
        chunks.push(Chunk { tokens: &tokens[len - 1..], start: len - 1, blocks: &own, regime: Regime::Usual, logits: LogitsWanted::Last });
        let mut out = Logits::default();
        let last = chunks.len() - 1;
        other.step(&StepBatch { chunks }, &mut out).unwrap();
        prop_assert!(out.row(last) == want, "beside others");
    }
}

#[test]
fn two_partials_of_attention_are_the_same_bits_in_prefill_and_decode() {
    let tokens = tokens(7, 1100);
    let mut runner = runner(&tinybee(), &with_kv(KvType::Bf16));
    let want = logits(&mut runner, &tokens, &[], &blocks(0, 1, 1100));
    let got = logits(&mut runner, &tokens, &[1000, 30, 1, 1, 60], &blocks(128, 1, 1100));
    assert!(got == want);
}
