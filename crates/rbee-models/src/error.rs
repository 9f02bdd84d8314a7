//! What can go wrong between a folder and a runner.

use std::path::PathBuf;

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder is not there.
    #[error("there is no model at {}", .0.display())]
    NotFound(PathBuf),
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it may be: a link that leads out, a pipe, a device.
    #[error("{} is refused: {problem}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: &'static str,
    },
    /// The files are damaged, contradict each other, or ask for what this build does not do.
    #[error(transparent)]
    Files(#[from] rbee_weights::Error),
    /// The device does not have so much memory free.
    #[error("{need} bytes of GPU memory are needed and {free} are free")]
    OutOfMemory {
        /// Bytes that are needed.
        need: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The device cannot be used.
    #[error("{0}")]
    Device(String),
    /// An option does not fit the model.
    #[error("{0}")]
    Option(String),
}
