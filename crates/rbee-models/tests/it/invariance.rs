//! A row's logits are the same bits alone, in any chunking, beside any others, in any blocks, on any threads.

use std::path::Path;

use proptest::prelude::*;
use rbee_engine::runner::{Chunk, Logits, ModelRunner, Regime, StepBatch, Wanted};
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

        // The last token beside others' prefills, on other threads.
        other.set_threads(threads % 4 + 1);
        let rest: Vec<(Vec<u32>, Vec<_>)> = others
            .iter()
            .enumerate()
            .map(|(i, &(seed, len))| (self::tokens(seed, len), blocks(1 + 8 * i as u32, 1, len)))
            .collect();
        let own = blocks(300, 2, len);
        let mut chunks: Vec<Chunk<'_>> = rest
            .iter()
            .map(|(tokens, blocks)| Chunk { tokens, start: 0, blocks, regime: Regime::Usual, wanted: Wanted::Logits })
            .collect();
        chunks.push(Chunk { tokens: &tokens[len - 1..], start: len - 1, blocks: &own, regime: Regime::Usual, wanted: Wanted::Logits });
        let mut out = Logits::default();
        let last = chunks.len() - 1;
        other.step(&StepBatch { chunks }, &mut out).unwrap();
        prop_assert!(out.row(last) == want, "beside others");

        // Its last tokens in one chunk, each with its logits wanted, beside others'.
        let from = len - len.min(9);
        let mut chunks = vec![Chunk {
            tokens: &tokens[from..],
            start: from,
            blocks: &own,
            regime: Regime::Usual,
            wanted: Wanted::LogitsOfAll,
        }];
        chunks.extend(rest.iter().map(|(tokens, blocks)| Chunk {
            tokens,
            start: 0,
            blocks,
            regime: Regime::Usual,
            wanted: Wanted::Logits,
        }));
        let others = chunks.len() - 1;
        other.step(&StepBatch { chunks }, &mut out).unwrap();
        prop_assert_eq!(out.rows(), len - from + others);
        prop_assert!(out.row(len - from - 1) == want, "the last of a chunk");
        for (row, end) in (from + 1..len).enumerate() {
            let want = logits(&mut other, &tokens[..end], &[], &blocks(300, 2, end));
            prop_assert!(out.row(row) == want, "token {} of a chunk", row);
        }
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

/// A hidden state is what the head makes logits of: those of the fixture's own file, and of no other row.
#[test]
fn hidden_states_are_those_of_the_last_norm() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama3-gqa");
    let mut runner = runner(&folder, &with_kv(KvType::F32));
    let head = tensor(&folder.join("model.safetensors"), "lm_head.weight");
    let (tokens, other): (Vec<u32>, Vec<u32>) = ((1..40).collect(), (50..60).collect());
    let (own, beside) = (blocks(0, 1, 39), blocks(8, 1, 10));
    let mut out = Logits::default();
    let chunk = |tokens, blocks, wanted| Chunk { tokens, start: 0, blocks, regime: Regime::Usual, wanted };
    let chunks = vec![chunk(&other, &beside, Wanted::Logits), chunk(&tokens, &own, Wanted::Hidden)];
    runner.step(&StepBatch { chunks }, &mut out).unwrap();
    assert_eq!((out.rows(), out.hidden().len()), (1, 39));
    let last = out.hidden().next_back().unwrap().to_vec();
    let want = logits(&mut runner, &tokens, &[], &blocks(16, 1, 39));
    assert_eq!(head.len(), want.len() * last.len());
    for (row, want) in head.chunks_exact(last.len()).zip(&want) {
        let got: f32 = row.iter().zip(&last).map(|(a, b)| a * b).sum();
        assert!((got - want).abs() < 1e-3, "{got} {want}");
    }
}

/// The f32 values of a tensor in a file.
fn tensor(path: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let at: [usize; 2] = serde_json::from_value(header[name]["data_offsets"].clone()).unwrap();
    assert_eq!(header[name]["dtype"], "F32");
    data[at[0]..at[1]].as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}
