//! The same decoder on an NVIDIA GPU: weights and KV in bf16, sums and the residual stream in f32.
//!
//! [`loader`] brings the plan's matrices to the GPU, padded to what the kernels take; [`decoder`] is one forward pass;
//! [`runner`] cuts batches into steps and launches recordings for those that only decode. Kernels are those of `rbee-cuda`:
//! a row has the same bits in any step.

mod decoder;
mod loader;
mod runner;

pub use rbee_cuda::Which;
pub use runner::{CudaRunner, inspect_cuda, load_cuda};

use crate::error::Error;

impl From<rbee_cuda::Error> for Error {
    fn from(error: rbee_cuda::Error) -> Self {
        match error {
            rbee_cuda::Error::OutOfMemory { need, free } => Self::OutOfMemory { need: need as u64, free: free as u64 },
            other => Self::Device(other.to_string()),
        }
    }
}
