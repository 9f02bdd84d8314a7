//! What this machine can do at most, by which kernels are measured: bytes read in a second, and operations on bytes, bf16
//! and f32. `cargo xtask bench cpu` runs it beside what it measures.
//!
//! Prints one line of JSON: 10^9 bytes a second, and 10^9 operations a second, where a product and its sum are two; null
//! where the processor lacks the instruction. Each is the best of several goes, as a limit is what nothing exceeds.

#![expect(unsafe_code, reason = "instructions that a processor must have")]
#![expect(clippy::unwrap_used, reason = "a bench that cannot measure ends")]

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use memmap2::MmapMut;

/// More than any cache holds.
const BYTES: usize = 1 << 30;

const GOES: usize = 7;

/// Instructions that wait for each other's sums run one after the other; so many do not, and keep every unit busy.
const SUMS: usize = 16;

/// Rounds of `SUMS` instructions in a go: some milliseconds.
const LOOPS: usize = 1 << 21;

/// A go of instructions of one kind, and the operations in it.
#[derive(Clone, Copy)]
struct Peak {
    go: fn(),
    operations: usize,
}

/// Billions of something in a second, done by all threads at once in the best of several goes.
fn rate(threads: usize, each: usize, work: impl Fn(usize) + Sync) -> f64 {
    let (work, barrier) = (&work, &Barrier::new(threads));
    let go = |_| {
        std::thread::scope(|scope| {
            let one = |thread| {
                scope.spawn(move || {
                    barrier.wait();
                    let before = Instant::now();
                    work(thread);
                    before.elapsed().as_secs_f64()
                })
            };
            let all: Vec<_> = (0..threads).map(one).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).fold(0.0, f64::max)
        })
    };
    let best = (0..GOES).map(go).fold(f64::INFINITY, f64::min);
    (threads * each) as f64 / best / 1e9
}

/// Bytes that all threads together read, each a part of its own in one stream.
fn read(threads: usize) -> f64 {
    let mut memory = MmapMut::map_anon(BYTES).unwrap();
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    let part = BYTES / threads / 4096 * 4096;
    std::thread::scope(|scope| {
        for part in memory.chunks_mut(part) {
            scope.spawn(move || part.fill(1));
        }
    });
    let part_of = |thread: usize| &memory[thread * part..(thread + 1) * part];
    let ways = readers().into_iter().map(|reader| rate(threads, part, |thread| reader(part_of(thread))));
    ways.fold(0.0, f64::max)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let threads = args.iter().position(|arg| arg == "--threads").map_or("1", |at| args[at + 1].as_str());
    let threads: usize = threads.parse().unwrap();
    let peak = |peak: Option<Peak>| {
        let billions = peak.map(|peak| rate(threads, peak.operations, |_| (peak.go)()));
        billions.map_or_else(|| "null".to_owned(), |billions| format!("{billions:.1}"))
    };
    println!(
        "{{\"threads\":{threads},\"read\":{:.2},\"int8\":{},\"bf16\":{},\"f32\":{}}}",
        read(threads),
        peak(int8()),
        peak(bf16()),
        peak(f32s())
    );
}

/// Reads everything, whatever the processor.
fn plain(bytes: &[u8]) {
    let mut sums = [0u64; 8];
    for line in bytes.chunks_exact(64) {
        for (sum, word) in sums.iter_mut().zip(line.chunks_exact(8)) {
            *sum ^= u64::from_ne_bytes(word.try_into().unwrap());
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
use x86::{bf16, f32s, int8, readers};

#[cfg(not(target_arch = "x86_64"))]
use elsewhere::{bf16, f32s, int8, readers};

#[cfg(not(target_arch = "x86_64"))]
mod elsewhere {
    use super::Peak;

    pub(crate) fn readers() -> Vec<fn(&[u8])> {
        vec![super::plain]
    }
    pub(crate) fn int8() -> Option<Peak> {
        None
    }
    pub(crate) fn bf16() -> Option<Peak> {
        None
    }
    pub(crate) fn f32s() -> Option<Peak> {
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{LOOPS, Peak, SUMS};

    /// How far before its use a line is asked for, in the ways that ask.
    const AHEAD: usize = 16 << 10;

    /// Ways to read: which is the fastest hangs on the machine.
    pub(crate) fn readers() -> Vec<fn(&[u8])> {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512.
            return vec![|bytes| unsafe { wide::<0>(bytes) }, |bytes| unsafe { wide::<AHEAD>(bytes) }];
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return vec![|bytes| unsafe { narrow::<0>(bytes) }, |bytes| unsafe { narrow::<AHEAD>(bytes) }];
        }
        vec![super::plain]
    }

    fn fetch<const AHEAD: usize>(line: &[u8]) {
        if AHEAD > 0 {
            // SAFETY: a prefetch reads nothing that the program sees, and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(AHEAD).cast()) };
        }
    }

    #[target_feature(enable = "avx512f")]
    fn wide<const AHEAD: usize>(bytes: &[u8]) {
        let mut sums = [_mm512_setzero_si512(); 8];
        for lines in bytes.chunks_exact(8 * 64) {
            for (sum, line) in sums.iter_mut().zip(lines.chunks_exact(64)) {
                fetch::<AHEAD>(line);
                // SAFETY: the line has 64 bytes.
                *sum = _mm512_xor_si512(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2")]
    fn narrow<const AHEAD: usize>(bytes: &[u8]) {
        let mut sums = [_mm256_setzero_si256(); 8];
        for lines in bytes.chunks_exact(4 * 64) {
            for (sums, line) in sums.chunks_exact_mut(2).zip(lines.chunks_exact(64)) {
                fetch::<AHEAD>(line);
                for (sum, half) in sums.iter_mut().zip(line.chunks_exact(32)) {
                    // SAFETY: the half has 32 bytes.
                    *sum = _mm256_xor_si256(*sum, unsafe { _mm256_loadu_si256(half.as_ptr().cast()) });
                }
            }
        }
        black_box(sums);
    }

    pub(crate) fn int8() -> Option<Peak> {
        // SAFETY: the processor has the instruction.
        let go = || unsafe { int8_512() };
        let here = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        here.then_some(Peak { go, operations: LOOPS * SUMS * 64 * 2 })
    }

    pub(crate) fn bf16() -> Option<Peak> {
        // SAFETY: the processor has the instruction.
        let go = || unsafe { bf16_512() };
        let here = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        here.then_some(Peak { go, operations: LOOPS * SUMS * 32 * 2 })
    }

    pub(crate) fn f32s() -> Option<Peak> {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512.
            let go = || unsafe { f32_512() };
            return Some(Peak { go, operations: LOOPS * SUMS * 16 * 2 });
        }
        // SAFETY: the processor has the instruction.
        let go = || unsafe { f32_256() };
        let here = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        here.then_some(Peak { go, operations: LOOPS * SUMS * 8 * 2 })
    }

    // The black boxes keep the compiler from seeing that all sums are the same.

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_512() {
        let (a, b) = black_box((_mm512_set1_epi8(1), _mm512_set1_epi8(2)));
        let mut sums = black_box([_mm512_setzero_si512(); SUMS]);
        for _ in 0..LOOPS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_512() {
        let ones = _mm512_set1_ps(1.0);
        let (a, b) = black_box((_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones)));
        let mut sums = black_box([_mm512_setzero_ps(); SUMS]);
        for _ in 0..LOOPS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    fn f32_512() {
        let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(1.0)));
        let mut sums = black_box([_mm512_setzero_ps(); SUMS]);
        for _ in 0..LOOPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    fn f32_256() {
        let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(1.0)));
        // Of sixteen registers two hold the factors: more sums than twelve would not stay in them.
        let mut sums = black_box([_mm256_setzero_ps(); SUMS / 2]);
        for _ in 0..2 * LOOPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }
}
