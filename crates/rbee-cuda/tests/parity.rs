//! The kernels against double precision, on a GPU. Without one each test says so and checks that the reason is told.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "support.rs"]
mod support;

use half::bf16;
use rbee_cuda::{Buffer, Error, Gate, Gpu, Linear};
use support::{error, gpu, values};

fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|value| bf16::from_f32(*value)).collect()
}

fn linear(gpu: &Gpu, linear: &Linear, x: &[bf16], before: &[f32], rows: usize, add: bool) -> Vec<f32> {
    let (x, mut out) = (gpu.upload(x).unwrap(), gpu.upload(before).unwrap());
    linear.apply(gpu, &x, &mut out, rows, add).unwrap();
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
            for rows in [1, 2, 8, 9, 16, 31, 33, 64, 65, 200] {
                if n * rows > 70_000 {
                    continue;
                }
                let x = narrow(&values(3 + rows as u64, rows * k));
                // What stood there before must be gone, or be added to.
                let before = values(5, rows * n);
                for add in [false, true] {
                    let want: Vec<f64> = (0..rows * n)
                        .map(|at| {
                            let (row, output) = (at / n, at % n);
                            let pairs = x[row * k..][..k].iter().zip(&weights[output * k..][..k]);
                            let sum: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                            let bias = if biased { f64::from(bias[output]) } else { 0.0 };
                            sum + bias + if add { f64::from(before[at]) } else { 0.0 }
                        })
                        .collect();
                    let off = error(&linear(&gpu, &matrix, &x, &before, rows, add), &want);
                    assert!(off < 1e-5, "{rows} x {k} by {n}, bias {biased}, add {add}: {off}");
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
        (0..150).flat_map(|row| linear(&gpu, &matrix, &x[row * k..][..k], &vec![0.0; n], 1, false)).collect();
    for rows in [2, 8, 11, 16, 20, 32, 50, 64, 100, 150] {
        let together = linear(&gpu, &matrix, &x[..rows * k], &vec![0.0; rows * n], rows, false);
        assert!(together == alone[..rows * n], "{rows} rows");
    }
}

#[test]
fn norms_and_gates_agree_with_double_precision() {
    let Some(gpu) = gpu("norms_and_gates_agree_with_double_precision") else { return };
    for (rows, n) in [(1, 64), (3, 100), (7, 4096), (200, 576)] {
        let (x, weight) = (values(1, rows * n), values(2, n));
        let mut out: Buffer<bf16> = gpu.zeroed(rows * n).unwrap();
        gpu.rms_norm(&gpu.upload(&x).unwrap(), &gpu.upload(&weight).unwrap(), 1e-5, &mut out, rows).unwrap();
        let got: Vec<f32> = gpu.download(&out).unwrap().iter().map(|value| value.to_f32()).collect();
        let want: Vec<f64> = x
            .chunks(n)
            .flat_map(|row| {
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64;
                let scaled = row.iter().zip(&weight);
                scaled.map(move |(x, weight)| f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*weight))
            })
            .collect();
        assert!(error(&got, &want) < 2e-3, "norm of {rows} x {n}: {}", error(&got, &want));

        let x: Vec<f32> = values(3, rows * 2 * n).iter().map(|x| x * 6.0).collect();
        for gate in [Gate::Silu, Gate::GeluTanh] {
            let mut out: Buffer<bf16> = gpu.zeroed(rows * n).unwrap();
            gpu.gate_mul(gate, &gpu.upload(&x).unwrap(), &mut out, rows, n).unwrap();
            let got: Vec<f32> = gpu.download(&out).unwrap().iter().map(|value| value.to_f32()).collect();
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

#[test]
fn a_recording_does_again_what_was_recorded() {
    let Some(gpu) = gpu("a_recording_does_again_what_was_recorded") else { return };
    let (n, k) = (64, 64);
    let matrix = Linear::new(&gpu, gpu.upload(&narrow(&values(1, n * k))).unwrap(), None, k).unwrap();
    let x = gpu.upload(&narrow(&values(2, k))).unwrap();
    let mut out = gpu.zeroed(n).unwrap();
    let graph = gpu.record(|| matrix.apply(&gpu, &x, &mut out, 1, true)).unwrap();
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
    assert!(matrix.apply(&gpu, &x, &mut out, 2, false).is_ok());
    assert!(matches!(matrix.apply(&gpu, &x, &mut out, 3, false), Err(Error::Shape(_))));
    let (_, total) = gpu.memory().unwrap();
    assert!(matches!(gpu.zeroed::<u8>(total + 1), Err(Error::OutOfMemory { need, .. }) if need == total + 1));
    let (before, _) = gpu.memory().unwrap();
    drop(gpu.zeroed::<u8>(1 << 30).unwrap());
    assert_eq!(gpu.memory().unwrap().0, before, "memory comes back");
}

#[test]
fn a_gpu_that_is_not_there_is_named() {
    let error = Gpu::open(99).err().unwrap();
    assert!(matches!(error, Error::NoDriver | Error::NoDevice { wanted: 99, .. }), "{error}");
    assert!(error.to_string().contains("no NVIDIA driver") || error.to_string().contains("no GPU 99"), "{error}");
}

#[test]
fn work_that_is_launched_early_waits_for_what_it_reads() {
    let Some(gpu) = gpu("work_that_is_launched_early_waits_for_what_it_reads") else { return };
    let (hidden, rows) = (2048, 40);
    let weight = gpu.upload(&vec![0.1; hidden]).unwrap();
    let weights = gpu.upload(&narrow(&values(1, hidden * hidden))).unwrap();
    let matrix = Linear::new(&gpu, weights, None, hidden).unwrap();
    let run = |waits: bool| {
        let mut x = gpu.upload(&values(2, rows * hidden)).unwrap();
        let mut normed = gpu.zeroed(rows * hidden).unwrap();
        for _ in 0..50 {
            gpu.rms_norm(&x, &weight, 1e-5, &mut normed, rows).unwrap();
            if waits {
                gpu.wait().unwrap();
            }
            matrix.apply(&gpu, &normed, &mut x, rows, true).unwrap();
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
