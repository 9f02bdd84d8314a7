//! Speed of the products alone, by what weights are kept in and the number of rows: `cargo xtask bench kernels`.
//!
//! The matrix has the shape of a 1.1B llama's largest, or another by `--outputs` and `--inputs`, in so many copies that a lone row finds none
//! of it in a cache.

use std::time::Instant;

use rbee_kernels::{Isa, Kept, Packed, Part, Pool, Quantization, WeightType, matmul};

/// More bytes of weights than caches hold.
const BYTES: u64 = 160 << 20;

const ROWS: [usize; 7] = [1, 2, 4, 6, 8, 16, 512];

const KEPT: [(&str, Kept); 9] = [
    ("Q8_0", Kept::Quantized(Quantization::Q8_0)),
    ("Q4_0", Kept::Quantized(Quantization::Q4_0)),
    ("Q4_K", Kept::Quantized(Quantization::Q4K)),
    ("Q5_K", Kept::Quantized(Quantization::Q5K)),
    ("Q6_K", Kept::Quantized(Quantization::Q6K)),
    ("block-float", Kept::BlockFloat),
    ("bf16", Kept::Bf16),
    ("f16", Kept::F16),
    ("f32", Kept::F32),
];

fn flag(name: &str, default: usize) -> usize {
    let args: Vec<String> = std::env::args().collect();
    let value = args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)?.parse().ok());
    value.unwrap_or(default)
}

/// What is measured is the forms that are named, or all.
fn named(name: &str) -> bool {
    let args: Vec<String> = std::env::args().collect();
    let only = args.iter().position(|arg| arg == "--only").and_then(|at| args.get(at + 1));
    only.is_none_or(|only| only.split(',').any(|only| only.eq_ignore_ascii_case(name)))
}

fn main() {
    let (rounds, isa) = (flag("--rounds", 5), Isa::detect());
    let (outputs, inputs) = (flag("--outputs", 5632), flag("--inputs", 2048));
    let weight = |i: usize| ((i * 7919 % 1000) as f32 / 500.0 - 1.0).to_le_bytes();
    let bytes: Vec<u8> = (0..outputs * inputs).flat_map(weight).collect();
    println!("{}; {outputs} outputs, {inputs} inputs, medians of {rounds}\n", isa.name());
    println!("| weights | rows | threads | microseconds | GB/s | 10^9 operations/s |");
    println!("|---|---|---|---|---|---|");
    for (name, kept) in KEPT.into_iter().filter(|(name, _)| named(name)) {
        let part = Part { kept, kind: WeightType::F32, bytes: &bytes };
        let copies = BYTES.div_ceil(Kept::bytes(&[(kept, outputs as u64)], inputs as u64));
        let pack = |_| Packed::new(&mut Pool::new(2), Isa::detect(), &[part], inputs).expect("the weights are numbers");
        let matrices: Vec<Packed> = (0..copies).map(pack).collect();
        for threads in [1, 2] {
            let mut pool = Pool::new(threads);
            for rows in ROWS {
                let x: Vec<f32> = (0..rows * inputs).map(|i| (i * 31 % 97) as f32 / 48.0 - 1.0).collect();
                let mut out = vec![0.0; rows * outputs];
                // Many rows take long enough with one of the copies.
                let matrices = &matrices[..if rows < 64 { matrices.len() } else { 1 }];
                let mut times: Vec<f64> = (0..=rounds)
                    .map(|_| {
                        let clock = Instant::now();
                        matrices.iter().for_each(|matrix| matmul(&mut pool, isa, &x, matrix, &mut out));
                        clock.elapsed().as_secs_f64() / matrices.len() as f64
                    })
                    .skip(1)
                    .collect();
                times.sort_by(f64::total_cmp);
                let time = times[times.len() / 2];
                let operations = 2.0 * (rows * outputs * inputs) as f64 / time / 1e9;
                let read = matrices[0].held() as f64 / time / 1e9;
                println!("| {name} | {rows} | {threads} | {:.0} | {read:.1} | {operations:.0} |", time * 1e6);
            }
        }
    }
}
