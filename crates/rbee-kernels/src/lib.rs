//! Row-invariant CPU kernels: matrix product, paged attention, norms, rope.
//!
//! A row's bits depend on that row alone, never on the rows beside it, the number of threads, or the instruction set.
//! Each kernel is compared bit for bit over all of these, and with double precision. Start with [`matmul::matmul`] and
//! [`attention::attend`]; [`simd`] says how one source serves every instruction set.

pub mod attention;
pub mod candle;
pub mod ggml;
pub mod kv_form;
pub mod matmul;
pub mod ops;
pub mod packed;
pub mod pool;
pub mod quantized;
pub mod simd;

#[cfg(test)]
mod testing;

pub use ggml::Blocks;
pub use matmul::matmul;
pub use packed::{Kept, NotFinite, Packed, WeightType};
pub use pool::Pool;
pub use quantized::Quantization;
pub use simd::Isa;
