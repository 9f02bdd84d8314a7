//! One decode step of real shapes with random bf16 weights, from the residual stream to the logits, each sequence at the end of
//! its context: `cargo xtask cuda gpu-check`. Embedding and sampling are not in it.
//!
//! A step is one recording, as a worker would launch it. Batches are measured in turn, round by round; each figure is the
//! median of the rounds, beside the rate of a copy within the GPU's memory in the same rounds.

#![expect(clippy::unwrap_used, reason = "a bench that cannot measure ends")]

use half::bf16;
use rbee_cuda::{
    BLOCK, Buffer, Gate, Gpu, Graph, Heads, Kv, Linear, Norm, Onto, Partials, Picked, RopeTable, Rows, Scores, Stretch,
    Which,
};

/// Sizes of a model: hidden, layers, MLP, vocabulary, and its heads.
struct Shape(&'static str, [usize; 4], Heads);

const SHAPES: [Shape; 2] = [
    Shape("1.1b", [2048, 22, 5632, 32_000], Heads { queries: 32, kv: 4, dim: 64 }),
    Shape("8b", [4096, 32, 14_336, 128_256], Heads { queries: 32, kv: 8, dim: 128 }),
];

/// Positions of each sequence.
const CONTEXT: usize = 1024;

const BATCHES: [usize; 6] = [1, 2, 8, 16, 32, 64];
const ROUNDS: usize = 21;

/// Values of the stretch that is copied.
const COPIED: usize = 1 << 30;

struct Layer {
    qkv: Linear,
    output: Linear,
    gate_up: Linear,
    down: Linear,
    kv: Kv,
}

struct Scratch {
    x: Buffer<f32>,
    normed: Buffer<bf16>,
    qkv: Buffer<f32>,
    q: Buffer<bf16>,
    partials: Partials,
    attended: Buffer<bf16>,
    rope: RopeTable,
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

/// One step of a model.
struct Model {
    layers: Vec<Layer>,
    head: Linear,
    norm: Norm,
    mlp: usize,
}

impl Model {
    fn record(&mut self, gpu: &Gpu, places: &Rows, s: &mut Scratch, rows: usize) -> Graph {
        let scores = Scores { scale: 0.1, cap: None, window: None };
        let (norm, mlp) = (&self.norm, self.mlp);
        let step = || {
            for layer in &mut self.layers {
                norm.apply(gpu, &s.x, &mut s.normed, rows)?;
                layer.qkv.apply(gpu, &s.normed, &mut s.qkv, rows, Onto::Over)?;
                layer.kv.write(gpu, places, &s.rope, &s.qkv, &mut s.q)?;
                layer.kv.attend(gpu, places, scores, &s.q, &mut s.partials, &mut s.attended)?;
                layer.output.apply(gpu, &s.attended, &mut s.x, rows, Onto::Added(1.0))?;
                norm.apply(gpu, &s.x, &mut s.normed, rows)?;
                layer.gate_up.apply(gpu, &s.normed, &mut s.gates, rows, Onto::Over)?;
                gpu.gate_mul(Gate::Silu, &s.gates, &mut s.gated, rows, mlp)?;
                layer.down.apply(gpu, &s.gated, &mut s.x, rows, Onto::Added(1.0))?;
            }
            norm.apply(gpu, &s.x, &mut s.normed, rows)?;
            self.head.apply(gpu, &s.normed, &mut s.logits, rows, Onto::Over)
        };
        gpu.record(step).unwrap()
    }
}

#[expect(unsafe_code, reason = "graphs are launched while their buffers live")]
fn launch(graph: &Graph) -> Result<(), rbee_cuda::Error> {
    // SAFETY: the graphs are dropped before the buffers.
    unsafe { graph.launch() }
}

fn main() {
    let gpu = match Gpu::open(&Which::Number(0)) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("nothing is measured: {error}");
            std::process::exit(1);
        }
    };
    let source: Buffer<bf16> = gpu.upload(&noise(COPIED)).unwrap();
    let mut target = gpu.zeroed(COPIED).unwrap();
    println!("{}; contexts of {CONTEXT} tokens; each figure the median of {ROUNDS} rounds\n", gpu.name());
    println!("| shape | batch | ms a step | of copy bandwidth | rows a second over batch 1 |\n|---|---|---|---|---|");
    for Shape(name, [hidden, layers, mlp, vocab], heads) in SHAPES {
        let (width, qkv) = (heads.queries * heads.dim, (heads.queries + 2 * heads.kv) * heads.dim);
        let mut weights = 0;
        let mut matrix = |outputs: usize, inputs: usize| {
            weights += outputs * inputs;
            let mut all = gpu.zeroed(outputs * inputs).unwrap();
            gpu.copy(&source, &mut all).unwrap();
            Linear::new(&gpu, all, None, inputs).unwrap()
        };
        let most = BATCHES.into_iter().max().unwrap();
        let layers: Vec<Layer> = (0..layers)
            .map(|_| Layer {
                qkv: matrix(qkv, hidden),
                output: matrix(hidden, width),
                gate_up: matrix(2 * mlp, hidden),
                down: matrix(hidden, mlp),
                kv: Kv::new(&gpu, heads, most * CONTEXT / BLOCK).unwrap(),
            })
            .collect();
        let head = matrix(vocab, hidden);
        let norm = Norm::new(gpu.upload(&vec![1.0; hidden]).unwrap(), hidden, 1e-5).unwrap();
        let angles = vec![0.6; CONTEXT * heads.dim / 2];
        let mut model = Model { layers, head, norm, mlp };
        let mut scratch = Scratch {
            x: gpu.upload(&vec![0.5; most * hidden]).unwrap(),
            normed: gpu.zeroed(most * hidden).unwrap(),
            qkv: gpu.zeroed(most * qkv).unwrap(),
            q: gpu.zeroed(most * width).unwrap(),
            partials: Partials::new(&gpu, heads, most, CONTEXT).unwrap(),
            attended: gpu.zeroed(most * width).unwrap(),
            rope: RopeTable::new(&gpu, &angles, &angles, heads.dim / 2).unwrap(),
            gates: gpu.zeroed(most * 2 * mlp).unwrap(),
            gated: gpu.zeroed(most * mlp).unwrap(),
            logits: gpu.zeroed(most * vocab).unwrap(),
        };
        let blocks: Vec<u32> = (0..(most * CONTEXT / BLOCK) as u32).collect();
        let places = BATCHES.map(|rows| {
            let stretch = |blocks| Stretch { tokens: &[0], start: CONTEXT - 1, blocks, shift: 0, picked: Picked::Last };
            let all: Vec<Stretch> = blocks.chunks(CONTEXT / BLOCK).take(rows).map(stretch).collect();
            let mut places = Rows::new(&gpu, rows, rows, CONTEXT / BLOCK).unwrap();
            places.set(&gpu, heads, &all, None).unwrap();
            places
        });
        let graphs: Vec<Graph> =
            BATCHES.iter().zip(&places).map(|(rows, places)| model.record(&gpu, places, &mut scratch, *rows)).collect();
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
        let kv = model.layers.len() * CONTEXT * 2 * heads.kv * heads.dim;
        for (rows, ms) in BATCHES.into_iter().zip(&times) {
            println!(
                "| {name} | {rows} | {ms:.3} | {:.2} | {:.1} |",
                2.0 * (weights + rows * kv) as f64 / ms / rate,
                rows as f64 * times[0] / ms
            );
        }
        println!("| {name} | copy | | {:.2} TB/s | |", rate / 1e9);
    }
}
