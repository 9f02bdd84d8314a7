//! What ours is measured beside.

use std::path::Path;

use anyhow::Result;

use super::candle::Candle;
use super::llama_cpp::{self, LlamaCpp};
use super::{Beside, Figure, Plan};

/// Another program, ready to be measured.
pub(super) enum Peer {
    LlamaCpp(LlamaCpp),
    Candle(Candle),
}

impl Peer {
    /// Builds the one that is asked for, where it is not there.
    ///
    /// # Errors
    /// When it cannot be had.
    pub(super) fn install(root: &Path, plan: &Plan) -> Result<Self> {
        Ok(match (plan.beside, &plan.llama) {
            (Beside::LlamaCpp, Some(folder)) => Self::LlamaCpp(LlamaCpp::of(folder)?),
            (Beside::LlamaCpp, None) => Self::LlamaCpp(LlamaCpp::install(root)?),
            (Beside::Candle, _) => Self::Candle(Candle::build(root)?),
        })
    }

    /// The figures of a group, in order.
    ///
    /// # Errors
    /// When it fails, or does not say what was asked.
    pub(super) fn measure(&self, figures: &[Figure], file: &Path, threads: usize) -> Result<Vec<f64>> {
        match self {
            Self::LlamaCpp(llama) => llama.measure(figures, file, threads),
            Self::Candle(candle) => candle.measure(figures, file, threads),
        }
    }
}

impl Beside {
    /// Its name in a table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::LlamaCpp => "llama.cpp",
            Self::Candle => "candle",
        }
    }

    /// Whether it has all figures of a group.
    pub(super) fn has(self, figures: &[Figure]) -> bool {
        match self {
            Self::LlamaCpp => true,
            Self::Candle => figures.iter().all(Candle::has),
        }
    }

    /// Which one it is, and where from.
    pub(super) fn about(self, llama: Option<&Path>) -> String {
        match (self, llama) {
            (Self::LlamaCpp, Some(folder)) => format!("llama.cpp in {}", folder.display()),
            (Self::LlamaCpp, None) => format!("llama.cpp of {}", llama_cpp::PACKAGE),
            (Self::Candle, _) => "candle-transformers 0.11.1, which computes BF16 as f32".to_owned(),
        }
    }
}
