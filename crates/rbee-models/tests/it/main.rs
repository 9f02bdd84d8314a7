//! The runner through the engine's seam, on the built-in model and on small random ones.

mod invariance;
mod support;
mod tinybee;
