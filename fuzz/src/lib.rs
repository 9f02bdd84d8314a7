//! Fuzz targets: what reads bytes that somebody else wrote, as functions of those bytes.
//!
//! A target returns for every input; a panic, a crash, too much memory or too much time is a bug, and so is an invariant
//! that does not hold, which it asserts. `corpus/TARGET` holds inputs that together reach what is known to be reachable:
//! `cargo test` replays them, `cargo xtask fuzz` goes on from them. Start with [`TARGETS`].

mod grammar;
mod text;
mod weights;
mod wire;

/// A reader of foreign bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder in `corpus`.
    pub name: &'static str,
    /// Runs it. Panics when an invariant does not hold.
    pub run: fn(&[u8]),
    /// Longest input that is tried, in bytes.
    pub max_len: usize,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "safetensors", run: weights::safetensors, max_len: 16 << 10 },
    Target { name: "gguf", run: weights::gguf, max_len: 16 << 10 },
    Target { name: "config", run: weights::config, max_len: 16 << 10 },
    Target { name: "tokenizer", run: text::tokenizer, max_len: 16 << 10 },
    Target { name: "template", run: text::template, max_len: 16 << 10 },
    Target { name: "schema", run: grammar::schema, max_len: 4 << 10 },
    Target { name: "job", run: wire::job, max_len: 16 << 10 },
    Target { name: "dialect", run: wire::dialect, max_len: 16 << 10 },
    Target { name: "sse", run: wire::sse, max_len: 256 },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
