//! The kernels against double precision, on a GPU. Without one each test says so and checks that the reason is told.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "support.rs"]
mod support;

use half::bf16;
use rbee_cuda::{
    Buffer, Error, Experts, Gate, Gpu, Heads, Linear, Norm, Onto, Picked, Picks, QkNorm, Rows, Shared, Stretch, Which,
};
use support::{error, gpu, values};

fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|value| bf16::from_f32(*value)).collect()
}

fn linear(gpu: &Gpu, linear: &Linear, x: &[bf16], before: &[f32], rows: usize, onto: Onto) -> Vec<f32> {
    let (x, mut out) = (gpu.upload(x).unwrap(), gpu.upload(before).unwrap());
    linear.apply(gpu, &x, &mut out, rows, onto).unwrap();
    gpu.download(&out).unwrap()
}

#[test]
fn products_agree_with_double_precision() {
    let Some(gpu) = gpu("products_agree_with_double_precision") else { return };
    for (n, k) in [(1, 32), (16, 64), (100, 96), (576, 1536), (1000, 2048)] {
        let weights = narrow(&values(1, n * k));
        let bias = values(2, n);
        for biased in [false, true] {
            let bias_there = biased.then(|| gpu.upload(&bias).unwrap());
            let matrix = Linear::new(&gpu, gpu.upload(&weights).unwrap(), bias_there, k).unwrap();
            for rows in [1, 2, 8, 9, 16, 31, 33, 64, 65, 128, 200] {
                if n * rows > 70_000 {
                    continue;
                }
                let x = narrow(&values(3 + rows as u64, rows * k));
                // What stood there before must be gone, or be added to.
                let before = values(5, rows * n);
                for onto in [Onto::Over, Onto::Added(1.0), Onto::Added(0.4)] {
                    let want: Vec<f64> = (0..rows * n)
                        .map(|at| {
                            let (row, output) = (at / n, at % n);
                            let pairs = x[row * k..][..k].iter().zip(&weights[output * k..][..k]);
                            let sum: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                            let bias = if biased { f64::from(bias[output]) } else { 0.0 };
                            match onto {
                                Onto::Over => sum + bias,
                                Onto::Added(factor) => f64::from(before[at]) + f64::from(factor) * (sum + bias),
                            }
                        })
                        .collect();
                    let off = error(&linear(&gpu, &matrix, &x, &before, rows, onto), &want);
                    assert!(off < 1e-5, "{rows} x {k} by {n}, bias {biased}, {onto:?}: {off}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_among_any_others() {
    let Some(gpu) = gpu("a_row_has_the_same_bits_among_any_others") else { return };
    let (n, k) = (300, 1024);
    let matrix = Linear::new(&gpu, gpu.upload(&narrow(&values(1, n * k))).unwrap(), None, k).unwrap();
    let x = narrow(&values(2, 150 * k));
    let alone: Vec<f32> =
        (0..150).flat_map(|row| linear(&gpu, &matrix, &x[row * k..][..k], &vec![0.0; n], 1, Onto::Over)).collect();
    for rows in [2, 8, 11, 16, 20, 32, 50, 64, 100, 150] {
        let together = linear(&gpu, &matrix, &x[..rows * k], &vec![0.0; rows * n], rows, Onto::Over);
        assert!(together == alone[..rows * n], "{rows} rows");
    }
    let frugal = Gpu::open(&Which::Number(0)).unwrap().frugal();
    let matrix = Linear::new(&frugal, frugal.upload(&narrow(&values(1, n * k))).unwrap(), None, k).unwrap();
    let together = linear(&frugal, &matrix, &x, &vec![0.0; 150 * n], 150, Onto::Over);
    assert!(together == alone, "with little shared memory");
}

#[test]
fn norms_and_gates_agree_with_double_precision() {
    let Some(gpu) = gpu("norms_and_gates_agree_with_double_precision") else { return };
    for (rows, n, real) in [(1, 64, 64), (3, 100, 90), (7, 4096, 4096), (200, 576, 560)] {
        let weight = values(2, n);
        let mut x = values(1, rows * n);
        for row in x.chunks_exact_mut(n) {
            row[real..].fill(0.0);
        }
        let norm = Norm::new(gpu.upload(&weight).unwrap(), real, 1e-5).unwrap();
        let from = gpu.upload(&x).unwrap();
        let mut out: Buffer<bf16> = gpu.zeroed(rows * n).unwrap();
        norm.apply(&gpu, &from, &mut out, rows).unwrap();
        let want: Vec<f64> = x.chunks(n).flat_map(|row| normed(&row[..real], &weight, n)).collect();
        assert!(error(&widened(&gpu, &out), &want) < 2e-3, "norm of {rows} x {n}");

        let before = values(4, rows * n);
        let mut sum = gpu.upload(&before).unwrap();
        norm.add(&gpu, &from, &mut sum, rows, 0.3).unwrap();
        let added: Vec<f64> = want.iter().zip(&before).map(|(want, before)| f64::from(*before) + 0.3 * want).collect();
        assert!(error(&gpu.download(&sum).unwrap(), &added) < 1e-6, "norm of {rows} x {n}, added");

        // The last and the first row, in this order.
        let mut places = Rows::new(&gpu, rows, 2, 20).unwrap();
        let heads = Heads { queries: 1, kv: 1, dim: 64 };
        let tokens = vec![0; rows];
        let stretch = |tokens, picked| Stretch { tokens, start: 0, blocks: &[0; 20], shift: 0, picked };
        let (first, last) = tokens.split_at(rows - 1);
        let stretches = [stretch(first, Picked::None), stretch(last, Picked::Last)];
        let some = if first.is_empty() { &stretches[1..] } else { &stretches[..] };
        places.set(&gpu, heads, some, None).unwrap();
        let mut states = gpu.zeroed(real).unwrap();
        norm.states(&gpu, &from, &places, &mut states).unwrap();
        let row = &want[(rows - 1) * n..];
        assert!(error(&gpu.download(&states).unwrap(), &row[..real]) < 1e-6, "norm of the last of {rows} x {n}");
        let mut picked: Buffer<bf16> = gpu.zeroed(n).unwrap();
        norm.picked(&gpu, &from, &places, &mut picked).unwrap();
        assert!(error(&widened(&gpu, &picked), row) < 2e-3, "norm of the last of {rows} x {n}, rounded");

        let x: Vec<f32> = values(3, rows * 2 * n).iter().map(|x| x * 6.0).collect();
        for gate in [Gate::Silu, Gate::GeluTanh] {
            let mut out: Buffer<bf16> = gpu.zeroed(rows * n).unwrap();
            gpu.gate_mul(gate, &gpu.upload(&x).unwrap(), &mut out, rows, n).unwrap();
            let got = widened(&gpu, &out);
            let act = |x: f64| match gate {
                Gate::Silu => x / (1.0 + (-x).exp()),
                Gate::GeluTanh => {
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                    0.5 * x * (1.0 + inner.tanh())
                }
            };
            let pairs = x.chunks(2 * n).flat_map(|row| row[..n].iter().zip(&row[n..]));
            let want: Vec<f64> = pairs.map(|(gate, up)| act(f64::from(*gate)) * f64::from(*up)).collect();
            assert!(error(&got, &want) < 2e-3, "{gate:?} of {rows} x {n}: {}", error(&got, &want));
        }
    }
}

/// A row divided by the root of its mean square and multiplied with weights, and zeros up to `n`.
fn normed(row: &[f32], weight: &[f32], n: usize) -> Vec<f64> {
    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
    let scaled = row.iter().zip(weight).map(|(x, weight)| f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*weight));
    scaled.chain(std::iter::repeat(0.0)).take(n).collect()
}

fn widened(gpu: &Gpu, values: &Buffer<bf16>) -> Vec<f32> {
    gpu.download(values).unwrap().iter().map(|value| value.to_f32()).collect()
}

#[test]
fn norms_of_queries_and_keys_leave_values_alone() {
    let Some(gpu) = gpu("norms_of_queries_and_keys_leave_values_alone") else { return };
    let heads = Heads { queries: 4, kv: 2, dim: 64 };
    let (rows, width) = (3, 8 * 64);
    for (q_len, k_len) in [(64, 64), (256, 128)] {
        let (wq, wk, x) = (values(1, q_len), values(2, k_len), values(3, rows * width));
        let norm = |weight: &[f32]| Norm::new(gpu.upload(weight).unwrap(), weight.len(), 1e-5).unwrap();
        let mut qkv = gpu.upload(&x).unwrap();
        QkNorm { q: norm(&wq), k: norm(&wk) }.apply(&gpu, heads, &mut qkv, rows).unwrap();
        let want: Vec<f64> = x
            .chunks(width)
            .flat_map(|row| {
                let q = row[..256].chunks(q_len).flat_map(|part| normed(part, &wq, q_len));
                let k = row[256..384].chunks(k_len).flat_map(|part| normed(part, &wk, k_len));
                q.chain(k).chain(row[384..].iter().map(|x| f64::from(*x))).collect::<Vec<_>>()
            })
            .collect();
        assert!(error(&gpu.download(&qkv).unwrap(), &want) < 1e-6, "{q_len} {k_len}");
    }
}

#[test]
fn tokens_become_rows_of_the_table_and_none_beyond_it() {
    let Some(gpu) = gpu("tokens_become_rows_of_the_table_and_none_beyond_it") else { return };
    let table = narrow(&values(1, 50 * 64));
    let linear = Linear::new(&gpu, gpu.upload(&table).unwrap(), None, 64).unwrap();
    let mut rows = Rows::new(&gpu, 3, 1, 1).unwrap();
    let heads = Heads { queries: 1, kv: 1, dim: 64 };
    let mut embedded = |tokens: &[u32]| {
        rows.set(&gpu, heads, &[Stretch { tokens, start: 0, blocks: &[0], shift: 0, picked: Picked::None }], None)
            .unwrap();
        let mut out = gpu.zeroed(3 * 64).unwrap();
        linear.embed(&gpu, &rows, 2.0, &mut out).map(|()| gpu.download(&out).unwrap())
    };
    let got = embedded(&[49, 0, 7]).unwrap();
    for (token, row) in [49, 0, 7].into_iter().zip(got.chunks(64)) {
        assert!(row.iter().zip(&table[token * 64..]).all(|(got, want)| *got == 2.0 * want.to_f32()), "{token}");
    }
    assert!(matches!(embedded(&[0, 50, 1]), Err(Error::Shape(_))));
}

#[test]
fn experts_are_picked_and_summed_as_in_double_precision() {
    let Some(gpu) = gpu("experts_are_picked_and_summed_as_in_double_precision") else { return };
    let (n, k) = (48, 64);
    for (rows, of, picked, normalised) in [(5, 8, 2, true), (3, 8, 8, false), (4, 70, 9, true), (1, 128, 4, false)] {
        let weights = narrow(&values(1, of * n * k));
        let experts = Experts::new(&gpu, gpu.upload(&weights).unwrap(), of, k).unwrap();
        let mut scores = values(2, rows * of);
        // More equal scores than are picked: the lower index wins.
        scores[..of].iter_mut().skip(1).step_by(2).for_each(|score| *score = 2.0);
        let x = narrow(&values(3, rows * k));
        let mut picks = Picks::new(&gpu, rows, of, picked).unwrap();
        picks.set(&gpu, &gpu.upload(&scores).unwrap(), normalised, rows).unwrap();
        let mut each = gpu.zeroed(rows * picked * n).unwrap();
        experts.apply(&gpu, &gpu.upload(&x).unwrap(), Shared::ByPicks, &picks, &mut each, rows).unwrap();
        let mut out = gpu.zeroed(rows * n).unwrap();
        picks.sum(&gpu, &each, &mut out, rows, n, Onto::Over).unwrap();
        let mut want = Vec::new();
        for (row, scores) in scores.chunks(of).enumerate() {
            let shares: Vec<f64> = scores.iter().map(|score| f64::from(*score).exp()).collect();
            let mut order: Vec<usize> = (0..of).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            order.truncate(picked);
            let total: f64 = if normalised { order.iter().map(|e| shares[*e]).sum() } else { shares.iter().sum() };
            want.extend((0..n).map(|output| {
                let product = |expert: usize| {
                    let weights = &weights[(expert * n + output) * k..][..k];
                    let pairs = x[row * k..][..k].iter().zip(weights);
                    pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>()
                };
                order.iter().map(|expert| shares[*expert] / total * product(*expert)).sum::<f64>()
            }));
        }
        let off = error(&gpu.download(&out).unwrap(), &want);
        assert!(off < 1e-5, "{picked} of {of}, normalised {normalised}: {off}");
        // Each pick with a row of its own gives what it gives with the row that its picks share.
        let own: Vec<bf16> = x.chunks(k).flat_map(|row| row.repeat(picked)).collect();
        let mut again = gpu.zeroed(rows * picked * n).unwrap();
        experts.apply(&gpu, &gpu.upload(&own).unwrap(), Shared::Not, &picks, &mut again, rows).unwrap();
        assert!(gpu.download(&again).unwrap() == gpu.download(&each).unwrap());
    }
}

#[test]
fn values_are_bent_rounded_and_found_not_finite() {
    let Some(gpu) = gpu("values_are_bent_rounded_and_found_not_finite") else { return };
    let x: Vec<f32> = values(1, 1000).iter().map(|x| x * 90.0).collect();
    for cap in [None, Some(30.0)] {
        let mut bent = gpu.upload(&x).unwrap();
        gpu.bend(&mut bent, 1000, 0.5, cap).unwrap();
        let want = |x: &f32| {
            let x = 0.5 * f64::from(*x);
            cap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
        };
        assert!(error(&gpu.download(&bent).unwrap(), &x.iter().map(want).collect::<Vec<_>>()) < 1e-6, "{cap:?}");
    }
    let mut rounded = gpu.zeroed(1000).unwrap();
    gpu.round(&gpu.upload(&x).unwrap(), &mut rounded, 1000).unwrap();
    assert!(gpu.download(&rounded).unwrap() == narrow(&x));
    assert!(gpu.is_finite(&rounded).unwrap());
    for bad in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
        gpu.write(&mut rounded, 999, &[bad]).unwrap();
        assert!(!gpu.is_finite(&rounded).unwrap(), "{bad}");
    }
}

#[test]
fn a_recording_does_again_what_was_recorded() {
    let Some(gpu) = gpu("a_recording_does_again_what_was_recorded") else { return };
    let (n, k) = (64, 64);
    let matrix = Linear::new(&gpu, gpu.upload(&narrow(&values(1, n * k))).unwrap(), None, k).unwrap();
    let x = gpu.upload(&narrow(&values(2, k))).unwrap();
    let mut out = gpu.zeroed(n).unwrap();
    let graph = gpu.record(|| matrix.apply(&gpu, &x, &mut out, 1, Onto::Added(1.0))).unwrap();
    assert_eq!(gpu.download(&out).unwrap(), vec![0.0; n], "a recording computes nothing");
    let times = |count: usize, out: &Buffer<f32>| {
        for _ in 0..count {
            #[expect(unsafe_code, reason = "the buffers live as long as the graph")]
            // SAFETY: all of them are still there.
            unsafe {
                graph.launch().unwrap();
            }
        }
        gpu.download(out).unwrap()
    };
    let once = times(1, &out);
    let twice: Vec<f32> = once.iter().map(|value| value + value).collect();
    assert!(once.iter().any(|value| *value != 0.0));
    assert_eq!(times(1, &out), twice);
}

#[test]
fn what_does_not_fit_is_refused_before_a_launch() {
    let Some(gpu) = gpu("what_does_not_fit_is_refused_before_a_launch") else { return };
    let weights = || gpu.upload(&narrow(&values(1, 64 * 64))).unwrap();
    assert!(matches!(Linear::new(&gpu, weights(), None, 48), Err(Error::Shape(_))));
    assert!(matches!(Linear::new(&gpu, weights(), Some(gpu.zeroed(3).unwrap()), 64), Err(Error::Shape(_))));
    let matrix = Linear::new(&gpu, weights(), None, 64).unwrap();
    let (x, mut out) = (gpu.zeroed(2 * 64).unwrap(), gpu.zeroed(2 * 64).unwrap());
    assert!(matrix.apply(&gpu, &x, &mut out, 2, Onto::Over).is_ok());
    assert!(matches!(matrix.apply(&gpu, &x, &mut out, 3, Onto::Over), Err(Error::Shape(_))));
    let (_, total) = gpu.memory().unwrap();
    assert!(matches!(gpu.zeroed::<u8>(total + 1), Err(Error::OutOfMemory { need, .. }) if need == total + 1));
    let (before, _) = gpu.memory().unwrap();
    drop(gpu.zeroed::<u8>(1 << 30).unwrap());
    assert_eq!(gpu.memory().unwrap().0, before, "memory comes back");
}

#[test]
fn a_gpu_that_is_not_there_is_named() {
    for (which, name) in [(Which::Number(99), "99"), (Which::Uuid("GPU-1".into()), "GPU-1")] {
        let error = Gpu::open(&which).err().unwrap();
        assert!(matches!(&error, Error::NoDriver | Error::NoDevice { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("no NVIDIA driver") || text.contains(&format!("no GPU {name}")), "{text}");
    }
}

#[test]
fn work_that_is_launched_early_waits_for_what_it_reads() {
    let Some(gpu) = gpu("work_that_is_launched_early_waits_for_what_it_reads") else { return };
    let (hidden, rows) = (2048, 40);
    let norm = Norm::new(gpu.upload(&vec![0.1; hidden]).unwrap(), hidden, 1e-5).unwrap();
    let weights = gpu.upload(&narrow(&values(1, hidden * hidden))).unwrap();
    let matrix = Linear::new(&gpu, weights, None, hidden).unwrap();
    let run = |waits: bool| {
        let mut x = gpu.upload(&values(2, rows * hidden)).unwrap();
        let mut normed = gpu.zeroed(rows * hidden).unwrap();
        for _ in 0..50 {
            norm.apply(&gpu, &x, &mut normed, rows).unwrap();
            if waits {
                gpu.wait().unwrap();
            }
            matrix.apply(&gpu, &normed, &mut x, rows, Onto::Added(1.0)).unwrap();
            if waits {
                gpu.wait().unwrap();
            }
        }
        gpu.download(&x).unwrap()
    };
    let want = run(true);
    for _ in 0..5 {
        assert!(run(false) == want);
    }
}
