//! Decoder and encoder models behind the engine's [`ModelRunner`](rbee_engine::ModelRunner).
//!
//! [`files`] opens a model's folder or GGUF file and trusts nothing in it; [`arch`] says which tensors a model has; [`loader`] and [`weights`] turn
//! checked bytes into packed matrices; [`decoder`] and [`mlp`] are the one parametric decoder; [`runner`] drives it over paged KV. Start with [`load`].
//! [`encoder`] is the same for models that make embeddings of whole texts; start with [`load_encoder`].
//! With feature `cuda` the same plans become a decoder on an NVIDIA GPU, in `cuda`.
//!
//! Invariants
//! - A row's logits depend on that row's tokens alone: not on the batch, the chunking, the threads or the KV blocks it
//!   was given.
//! - K and V are rounded to the cache's type before anything reads them, also within the chunk that makes them.

pub mod files;
pub mod gguf;

mod about;
mod arch;
#[cfg(feature = "cuda")]
mod cuda;
mod decoder;
mod encoder;
mod error;
mod kv;
mod loader;
mod mlp;
mod runner;
mod weights;

pub use about::About;
#[cfg(feature = "cuda")]
pub use cuda::{CudaRunner, Which, inspect_cuda, load_cuda};
pub use encoder::runner::{EncoderRunner, load_encoder};
pub use error::Error;
pub use files::ModelFiles;
pub use kv::KvType;
pub use loader::{Kind, inspect};
pub use rbee_weights::Error as FileError;
pub use rbee_weights::config::GenerationDefaults;
pub use rbee_weights::gguf::Gguf;
pub use rbee_weights::needs::Needs;
pub use runner::{CpuRunner, MAX_THREADS, RunnerOptions, load};
pub use weights::Quantize;
