//! Row-invariant CPU kernels: matrix product, paged attention, norms, rope.
//!
//! A row's bits depend on that row alone, never on the rows beside it, the number of threads, or the instruction set.
//! Each kernel is compared bit for bit over all of these, and with double precision. Start with [`matmul::matmul`] and
//! [`attention::attend`]; [`simd`] says how one source serves every instruction set.

pub mod attention;
mod block_float;
pub mod compute;
pub mod ggml;
mod ints;
pub mod kv_form;
pub mod matmul;
mod memory;
pub mod ops;
pub mod packed;
pub mod pool;
mod products;
pub mod quantized;
mod rounded;
pub mod simd;

#[cfg(test)]
mod testing;

pub use ggml::Blocks;
pub use matmul::matmul;
pub use packed::{Kept, NotFinite, Packed, Part, WeightType};
pub use pool::Pool;
pub use quantized::Quantization;
pub use simd::Isa;
