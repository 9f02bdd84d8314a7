//! GGUF: the format, and what a model's metadata mean.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod config;
mod format;
mod names;
