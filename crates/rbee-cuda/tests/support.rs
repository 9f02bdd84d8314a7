//! A GPU for one test at a time, and values to compare.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rbee_cuda::{Error, Gpu, Which};

/// One test at a time: some measure the GPU's memory.
static ALONE: Mutex<()> = Mutex::new(());

/// A GPU, and the right to use it.
pub struct Held {
    gpu: Gpu,
    _alone: MutexGuard<'static, ()>,
}

impl Deref for Held {
    type Target = Gpu;
    fn deref(&self) -> &Gpu {
        &self.gpu
    }
}

/// The GPU, or the reason why there is none.
pub fn gpu(test: &str) -> Option<Held> {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Gpu::open(&Which::Number(0)) {
        Ok(gpu) => Some(Held { gpu, _alone: alone }),
        Err(error @ (Error::NoDriver | Error::NoDevice { .. } | Error::TooOld { .. })) => {
            eprintln!("{test} is skipped: {error}");
            None
        }
        Err(error) => panic_with(&error),
    }
}

#[expect(clippy::panic, reason = "a GPU that fails is a failed test")]
fn panic_with(error: &Error) -> ! {
    panic!("the GPU cannot be used: {error}")
}

/// Values between -1 and 1.
pub fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Length of the difference over the length of what was wanted.
pub fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(got, want)| square(f64::from(*got) - want)).sum();
    (off / want.iter().map(|want| square(*want)).sum::<f64>()).sqrt()
}
