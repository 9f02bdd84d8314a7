//! Rotary embedding: the bases and scalings of both spellings (`rope_theta` with `rope_scaling`, and `rope_parameters`).

use super::CONFIG;
use super::reader::Reader;
use crate::Error;

/// Most frequencies of a head.
const MAX_PAIRS: usize = 1 << 11;

/// Rotary embedding of some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Values of a head that are rotated, from its beginning; even.
    pub dims: usize,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// How rope frequencies are changed for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by this (Chen et al. 2023).
    Linear(f64),
    /// Low ones divided, high ones kept, those between blended (Llama 3.1's `llama3`).
    Llama3 {
        /// Divides the low ones.
        factor: f64,
        /// Below original length over this, a wavelength is high.
        low: f64,
        /// Above original length over this, a wavelength is low.
        high: f64,
        /// The length the model was first made for.
        original: f64,
    },
    /// As `Llama3` by rotations within the original length, with sharper attention (Peng et al. 2023).
    Yarn {
        /// Divides the low ones.
        factor: f64,
        /// Dimensions before this one are kept, those after `high` divided.
        low: f64,
        /// See `low`.
        high: f64,
        /// Multiplies cosines and sines.
        attention: f64,
    },
    /// A divisor per frequency, in two sets: one for texts within the original length, one for longer ones (Ding et al.
    /// 2024).
    LongRope {
        /// Divisors within the original length.
        short: Vec<f64>,
        /// Divisors beyond it.
        long: Vec<f64>,
        /// The length the model was first made for.
        original: usize,
        /// Multiplies cosines and sines.
        attention: f64,
    },
}

/// What the rest of the config says about rope.
pub(super) struct Around {
    pub(super) head_dim: usize,
    pub(super) max_positions: usize,
    /// Base when none is named.
    pub(super) theta: f64,
    /// Whether the kinds `su` and `yarn` are old names of `longrope` (Phi-3).
    pub(super) old_names: bool,
}

/// The rope that the config's own keys and perhaps an object of them describe.
pub(super) fn rope(outer: &Reader<'_>, inner: Option<&Reader<'_>>, around: &Around) -> Result<Rope, Error> {
    let theta = outer.number("rope_theta", 1.0, 1e12)?;
    let partial = outer.number("partial_rotary_factor", 0.0, 1.0)?;
    let Some(inner) = inner else {
        let dims = dims(around.head_dim, partial)?;
        return Ok(Rope { theta: theta.unwrap_or(around.theta), dims, scaling: RopeScaling::None });
    };
    let theta = inner.number("rope_theta", 1.0, 1e12)?.or(theta).unwrap_or(around.theta);
    let dims = dims(around.head_dim, inner.number("partial_rotary_factor", 0.0, 1.0)?.or(partial))?;
    let kind = match (inner.text("rope_type")?, inner.text("type")?) {
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => "default",
    };
    let kind = if around.old_names && matches!(kind, "su" | "yarn") { "longrope" } else { kind };
    let original = || -> Result<usize, Error> {
        const KEY: &str = "original_max_position_embeddings";
        // Where both name one, the reference takes the outer.
        let (inner, outer) = (inner.size(KEY, 1 << 24)?, outer.size(KEY, 1 << 24)?);
        Ok(outer.or(inner).unwrap_or(around.max_positions))
    };
    let factor = || inner.need_number("factor", 1.0, 1e6);
    let attention = inner.number("attention_factor", 1e-3, 1e3)?;
    let unscaled = |scaling: RopeScaling| match attention {
        // The reference leaves it out for these kinds.
        Some(other) if other != 1.0 => {
            Err(Error::unsupported(CONFIG, format!("rope `attention_factor` {other} of type `{kind}`")))
        }
        _ => Ok(scaling),
    };
    let scaling = match kind {
        "default" => unscaled(RopeScaling::None)?,
        "linear" => unscaled(RopeScaling::Linear(factor()?))?,
        "llama3" => {
            let (low, high) =
                (inner.need_number("low_freq_factor", 1e-3, 1e6)?, inner.need_number("high_freq_factor", 1e-3, 1e6)?);
            if low >= high {
                return Err(Error::corrupt(CONFIG, "rope `low_freq_factor` is not below `high_freq_factor`"));
            }
            unscaled(RopeScaling::Llama3 { factor: factor()?, low, high, original: original()? as f64 })?
        }
        "yarn" => yarn(inner, theta, dims, original()?, attention, around)?,
        "longrope" => {
            let factors = |key: &'static str| -> Result<Vec<f64>, Error> {
                let factors = inner.numbers(key, 1e-3, 1e6, MAX_PAIRS)?;
                let factors = factors.filter(|factors| factors.len() == dims / 2);
                factors.ok_or_else(|| Error::corrupt(CONFIG, format!("rope `{key}` must be {} numbers", dims / 2)))
            };
            let original = original()?;
            let factor = match inner.number("factor", 1.0, 1e6)? {
                Some(factor) => factor,
                None => around.max_positions as f64 / original as f64,
            };
            let computed = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
            if !computed.is_finite() {
                return Err(Error::corrupt(CONFIG, "longrope of an original length of 1 has no attention factor"));
            }
            RopeScaling::LongRope {
                short: factors("short_factor")?,
                long: factors("long_factor")?,
                original,
                attention: attention.unwrap_or(computed),
            }
        }
        other => {
            let shown: String = other.chars().take(64).collect();
            return Err(Error::unsupported(CONFIG, format!("rope type `{}`", shown.escape_debug())));
        }
    };
    Ok(Rope { theta, dims, scaling })
}

fn dims(head_dim: usize, partial: Option<f64>) -> Result<usize, Error> {
    let dims = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    if dims < 2 || !dims.is_multiple_of(2) {
        return Err(Error::corrupt(CONFIG, format!("{dims} values of a head cannot be rotated in pairs")));
    }
    Ok(dims)
}

fn yarn(
    inner: &Reader<'_>,
    theta: f64,
    dims: usize,
    original: usize,
    attention: Option<f64>,
    around: &Around,
) -> Result<RopeScaling, Error> {
    let original = original as f64;
    let factor = match inner.number("factor", 1.0, 1e6)? {
        Some(factor) => factor,
        None => around.max_positions as f64 / original,
    };
    let sharper = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let scales = (inner.number("mscale", 0.0, 1e3)?, inner.number("mscale_all_dim", 0.0, 1e3)?);
    let computed = match scales {
        (Some(one), Some(all)) if one > 0.0 && all > 0.0 => sharper(one) / sharper(all),
        _ => sharper(1.0),
    };
    let rotations = |key: &'static str, default: f64| -> Result<f64, Error> {
        Ok(inner.number(key, 0.0, 1e6)?.filter(|value| *value > 0.0).unwrap_or(default))
    };
    let (fast, slow) = (rotations("beta_fast", 32.0)?, rotations("beta_slow", 1.0)?);
    // The dimension whose wavelength makes so many turns within the original length.
    let dimension =
        |turns: f64| dims as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (dimension(fast), dimension(slow));
    if !low.is_finite() || !high.is_finite() {
        return Err(Error::corrupt(CONFIG, "yarn of a `rope_theta` of 1 has no wavelengths"));
    }
    if inner.flag("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    Ok(RopeScaling::Yarn { factor, low, high, attention: attention.unwrap_or(computed) })
}

impl Rope {
    /// Inverse frequencies of the `dims / 2` pairs, as transformers computes them, for texts within the original length
    /// or beyond it.
    pub fn inverse_frequencies(&self, beyond: bool) -> Vec<f64> {
        let base = (0..self.dims / 2).map(|i| self.theta.powf(-(2.0 * i as f64) / self.dims as f64));
        base.enumerate()
            .map(|(i, frequency)| match &self.scaling {
                RopeScaling::None => frequency,
                RopeScaling::Linear(factor) => frequency / factor,
                RopeScaling::Llama3 { factor, low, high, original } => {
                    let wavelength = 2.0 * std::f64::consts::PI / frequency;
                    if wavelength < original / high {
                        frequency
                    } else if wavelength > original / low {
                        frequency / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                }
                RopeScaling::Yarn { factor, low, high, .. } => {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency / factor * divided + frequency * (1.0 - divided)
                }
                RopeScaling::LongRope { short, long, .. } => frequency / if beyond { long[i] } else { short[i] },
            })
            .collect()
    }

    /// What cosines and sines are multiplied with.
    pub fn attention(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention, .. } | RopeScaling::LongRope { attention, .. } => attention,
            _ => 1.0,
        }
    }

    /// The length beyond which other frequencies hold.
    pub fn original(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::LongRope { original, .. } => Some(original),
            _ => None,
        }
    }
}
