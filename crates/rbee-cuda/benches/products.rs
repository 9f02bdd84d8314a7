//! The matrix products, norms and gates of one decode step of real shapes with random bf16 weights: `cargo xtask cuda gpu-check`.
//! Attention and sampling are not in it.
//!
//! A step is one recording, as a worker would launch it. Batches are measured in turn, round by round; each figure is the
//! median of the rounds, beside the rate of a copy within the GPU's memory in the same rounds.

#![expect(clippy::unwrap_used, reason = "a bench that cannot measure ends")]

use half::bf16;
use rbee_cuda::{Buffer, Gate, Gpu, Graph, Linear};

/// Sizes of a model: hidden, layers, q + k + v, MLP, vocabulary.
struct Shape(&'static str, [usize; 5]);

const SHAPES: [Shape; 2] =
    [Shape("1.1b", [2048, 22, 2560, 5632, 32_000]), Shape("8b", [4096, 32, 6144, 14_336, 128_256])];

const BATCHES: [usize; 6] = [1, 2, 8, 16, 32, 64];
const ROUNDS: usize = 21;

/// Values of the stretch that is copied.
const COPIED: usize = 1 << 30;

struct Layer {
    qkv: Linear,
    output: Linear,
    gate_up: Linear,
    down: Linear,
}

struct Scratch {
    x: Buffer<f32>,
    normed: Buffer<bf16>,
    qkv: Buffer<f32>,
    gates: Buffer<f32>,
    gated: Buffer<bf16>,
    logits: Buffer<f32>,
}

fn noise(len: usize) -> Vec<bf16> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bf16::from_bits(0x3c00 | (state >> 48) as u16 & 0x80ff)
    };
    (0..len).map(|_| next()).collect()
}

fn median(mut values: Vec<f32>) -> f64 {
    values.sort_by(f32::total_cmp);
    f64::from(values[values.len() / 2])
}

fn step(
    gpu: &Gpu,
    layers: &[Layer],
    head: &Linear,
    norm: &Buffer<f32>,
    s: &mut Scratch,
    rows: usize,
    mlp: usize,
) -> Graph {
    let record = || {
        for layer in layers {
            gpu.rms_norm(&s.x, norm, 1e-5, &mut s.normed, rows)?;
            layer.qkv.apply(gpu, &s.normed, &mut s.qkv, rows, false)?;
            layer.output.apply(gpu, &s.normed, &mut s.x, rows, true)?;
            gpu.rms_norm(&s.x, norm, 1e-5, &mut s.normed, rows)?;
            layer.gate_up.apply(gpu, &s.normed, &mut s.gates, rows, false)?;
            gpu.gate_mul(Gate::Silu, &s.gates, &mut s.gated, rows, mlp)?;
            layer.down.apply(gpu, &s.gated, &mut s.x, rows, true)?;
        }
        gpu.rms_norm(&s.x, norm, 1e-5, &mut s.normed, rows)?;
        head.apply(gpu, &s.normed, &mut s.logits, rows, false)
    };
    gpu.record(record).unwrap()
}

#[expect(unsafe_code, reason = "graphs are launched while their buffers live")]
fn launch(graph: &Graph) -> Result<(), rbee_cuda::Error> {
    // SAFETY: the graphs are dropped before the buffers.
    unsafe { graph.launch() }
}

fn main() {
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("nothing is measured: {error}");
            std::process::exit(1);
        }
    };
    let source: Buffer<bf16> = gpu.upload(&noise(COPIED)).unwrap();
    let mut target = gpu.zeroed(COPIED).unwrap();
    println!("{}; each figure the median of {ROUNDS} rounds\n", gpu.name());
    println!("| shape | batch | ms a step | of copy bandwidth | rows a second over batch 1 |\n|---|---|---|---|---|");
    for Shape(name, [hidden, layers, qkv, mlp, vocab]) in SHAPES {
        let mut weights = 0;
        let mut matrix = |outputs: usize, inputs: usize| {
            weights += outputs * inputs;
            let mut all = gpu.zeroed(outputs * inputs).unwrap();
            gpu.copy(&source, &mut all).unwrap();
            Linear::new(&gpu, all, None, inputs).unwrap()
        };
        let all: Vec<Layer> = (0..layers)
            .map(|_| Layer {
                qkv: matrix(qkv, hidden),
                output: matrix(hidden, hidden),
                gate_up: matrix(2 * mlp, hidden),
                down: matrix(hidden, mlp),
            })
            .collect();
        let head = matrix(vocab, hidden);
        let norm = gpu.upload(&vec![1.0; hidden]).unwrap();
        let most = BATCHES.into_iter().max().unwrap();
        let mut scratch = Scratch {
            x: gpu.upload(&vec![0.5; most * hidden]).unwrap(),
            normed: gpu.zeroed(most * hidden).unwrap(),
            qkv: gpu.zeroed(most * qkv).unwrap(),
            gates: gpu.zeroed(most * 2 * mlp).unwrap(),
            gated: gpu.zeroed(most * mlp).unwrap(),
            logits: gpu.zeroed(most * vocab).unwrap(),
        };
        let graphs = BATCHES.map(|rows| step(&gpu, &all, &head, &norm, &mut scratch, rows, mlp));
        let mut times = vec![Vec::new(); BATCHES.len()];
        let mut copies = Vec::new();
        for _ in 0..ROUNDS {
            copies.push(gpu.time(|| gpu.copy(&source, &mut target)).unwrap());
            for (graph, times) in graphs.iter().zip(&mut times) {
                times.push(gpu.time(|| launch(graph)).unwrap());
            }
        }
        // A copy reads and writes.
        let rate = 4.0 * COPIED as f64 / median(copies);
        let times: Vec<f64> = times.into_iter().map(median).collect();
        for (rows, ms) in BATCHES.into_iter().zip(&times) {
            println!(
                "| {name} | {rows} | {ms:.3} | {:.2} | {:.1} |",
                2.0 * weights as f64 / ms / rate,
                rows as f64 * times[0] / ms
            );
        }
        println!("| {name} | copy | | {:.2} TB/s | |", rate / 1e9);
    }
}
