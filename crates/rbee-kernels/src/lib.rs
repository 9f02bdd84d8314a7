//! Row-invariant CPU kernels: matrix product, paged attention, norms, rope.
//!
//! A row's bits depend on that row alone, never on the rows beside it, the number of threads, or the instruction set.
//! Each kernel is compared bit for bit over all of these, and with double precision. Start with [`matmul::matmul`] and
//! [`attention::attend`]; [`simd`] says how one source serves every instruction set.

pub mod attention;
pub mod candle;
pub mod matmul;
pub mod ops;
pub mod pool;
pub mod simd;

#[cfg(test)]
mod testing;

pub use matmul::{NotFinite, Packed, WeightType, matmul};
pub use pool::Pool;
pub use simd::Isa;
