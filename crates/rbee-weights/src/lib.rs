//! Validated readers of safetensors headers and model configs, and what a model needs in memory.
//!
//! Pure: bytes are arguments. A file's header is checked here, whole, before anybody touches a tensor.
//! Start with [`safetensors::Index::parse`] and [`config::ModelConfig::parse`].

pub mod config;
pub mod gguf;
pub mod needs;
pub mod safetensors;

/// Why a model's files cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The files are damaged or contradict each other.
    #[error("{file} is damaged: {problem}")]
    Corrupt {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// The files are well formed and ask for something this build does not do.
    #[error("{file} is not supported: {problem}")]
    Unsupported {
        /// The file.
        file: String,
        /// What it asks for.
        problem: String,
    },
    /// A file that must be there is not.
    #[error("{0} is missing")]
    Missing(String),
}

impl Error {
    /// A damaged file.
    pub fn corrupt(file: &str, problem: impl Into<String>) -> Self {
        Self::Corrupt { file: file.into(), problem: problem.into() }
    }

    /// A file that asks for too much.
    pub fn unsupported(file: &str, problem: impl Into<String>) -> Self {
        Self::Unsupported { file: file.into(), problem: problem.into() }
    }
}
