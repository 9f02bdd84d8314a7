//! Row-invariant CPU kernels: matrix product, attention, norms, rope.
//!
//! A row's bits depend on that row alone, never on the rows beside it, the number of threads, or the instruction set.
//! Each kernel has a scalar reference that the tests compare bit for bit. Start with [`matmul::matmul`].

pub mod candle;
pub mod matmul;
pub mod ops;
pub mod pool;

pub use matmul::{Isa, Packed, Weights, matmul};
pub use pool::Pool;
