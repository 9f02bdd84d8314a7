//! The runner through the engine's seam, on the built-in model and on small random ones.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[cfg(feature = "cuda")]
mod cuda;
mod encoders;
mod families;
mod gguf;
mod gguf_file;
mod invariance;
mod quantized;
mod reference;
mod rounded;
mod schedules;
mod support;
mod tinybee;
