//! Kernels for NVIDIA GPUs: `cuda/`, and their typed calls through the driver's own interface.
//!
//! Nothing but the driver is needed to run them, and nothing of it is linked: [`Gpu::open`] looks for it and says what is
//! missing. Without feature `cuda` this crate is empty, and builds without nvcc.
//!
//! Invariants
//! - Shapes are checked before a launch; a kernel is never started on buffers that are too short.
//! - All work of a [`Gpu`] is in the order of its calls, on one stream.
//! - Each row's sums have one order, whatever rows are beside it.

#![cfg(feature = "cuda")]

mod attention;
mod gpu;
mod kernels;

pub use attention::{BLOCK, Heads, Kv, Padded, Partials, Picked, RopeTable, Rows, Scores, Stretch, WIDTHS};
pub use gpu::{Buffer, Error, Gpu, Graph, Pinned, Which};
pub use kernels::{Experts, Gate, Linear, Norm, Onto, Picks, QkNorm, STEP, Shared};
