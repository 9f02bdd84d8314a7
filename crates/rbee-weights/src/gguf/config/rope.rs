//! Rope of a GGUF: its base, the part of a head that it rotates, and its scaling.
//!
//! Linear and YaRN scaling are keys. Llama 3.x's is a tensor of divisors, `rope_freqs.weight`; Phi-3's are two,
//! `rope_factors_short.weight` and `rope_factors_long.weight`.

use serde_json::{Map, Value, json};

use super::{Architecture, Keys, Shape};
use crate::Error;
use crate::config::{Rope, RopeScaling};

/// Base, width and scaling of rope.
pub(super) fn rope(keys: &Keys<'_>, shape: &Shape) -> Result<Map<String, Value>, Error> {
    let mut out = Map::new();
    let theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    out.insert("rope_theta".into(), json!(theta));
    if keys.arch == Architecture::Gemma3 {
        out.insert("rope_local_base_freq".into(), json!(keys.number("rope.freq_base_swa")?.unwrap_or(10_000.0)));
    }
    // Granite writes by this whether it rotates at all.
    if keys.arch == Architecture::Granite && keys.gguf.bool(&keys.name("rope.scaling.finetuned"))? == Some(false) {
        return Err(keys.unsupported("rope.scaling.finetuned"));
    }
    let dims = keys.size("rope.dimension_count")?.unwrap_or(shape.head_dim);
    if dims > shape.head_dim || dims < 2 || dims % 2 != 0 {
        return Err(keys.corrupt(format!("{dims} values of a head of {} cannot be rotated in pairs", shape.head_dim)));
    }
    if dims < shape.head_dim {
        // It is multiplied and cut off to a whole number, which an error of rounding must not take one from.
        out.insert("partial_rotary_factor".into(), json!(dims as f64 / shape.head_dim as f64 + 1e-9));
    }
    if let Some(scaling) = scaling(keys, shape, theta, dims as usize)? {
        out.insert("rope_scaling".into(), scaling);
    }
    Ok(out)
}

fn scaling(keys: &Keys<'_>, shape: &Shape, theta: f64, dims: usize) -> Result<Option<Value>, Error> {
    let kind = keys.gguf.str(&keys.name("rope.scaling.type"))?;
    let factor = match keys.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        // Its name in older files.
        None => keys.number("rope.scale_linear")?,
    };
    let factor = factor.filter(|factor| *factor != 0.0 && *factor != 1.0);
    let original = keys.size("rope.scaling.original_context_length")?;
    let attention = match keys.number("rope.scaling.attn_factor")? {
        Some(attention) => Some(attention),
        None => keys.number("rope.scaling.yarn_attn_factor")?,
    };
    let (fast, slow) = (keys.number("rope.scaling.yarn_beta_fast")?, keys.number("rope.scaling.yarn_beta_slow")?);
    let (short, long) =
        (keys.values("rope_factors_short.weight", dims / 2)?, keys.values("rope_factors_long.weight", dims / 2)?);
    if let (Some(short), Some(long)) = (&short, &long) {
        if !matches!(kind, None | Some("none" | "longrope")) {
            return Err(keys.unsupported("rope.scaling.type"));
        }
        let original = original.ok_or_else(|| keys.missing("rope.scaling.original_context_length"))?;
        return Ok(Some(longrope(shape, [short, long], original, attention)));
    }
    if short.is_some() || long.is_some() || kind == Some("longrope") {
        return Err(keys.corrupt("`rope_factors_short.weight` and `rope_factors_long.weight` must both be there"));
    }
    if let Some(factors) = keys.values("rope_freqs.weight", dims / 2)? {
        if !matches!(kind, None | Some("none" | "linear")) || factor.is_some() {
            return Err(keys.unsupported("rope.scaling.type"));
        }
        return Ok(divided(shape, theta, dims, &factors));
    }
    match kind {
        Some("none") => Ok(None),
        None | Some("linear") => Ok(factor.map(|factor| json!({ "rope_type": "linear", "factor": factor }))),
        Some("yarn") => {
            // Below nought stands for the usual one.
            if keys.number("rope.scaling.yarn_ext_factor")?.is_some_and(|factor| factor >= 0.0 && factor != 1.0) {
                return Err(keys.unsupported("rope.scaling.yarn_ext_factor"));
            }
            let mut yarn = Map::new();
            yarn.insert("rope_type".into(), json!("yarn"));
            yarn.insert("factor".into(), json!(factor.unwrap_or(1.0)));
            let original = original.ok_or_else(|| keys.missing("rope.scaling.original_context_length"))?;
            yarn.insert("original_max_position_embeddings".into(), json!(original));
            // What transformers has is written as it is, and stands in place of what the factor gives.
            for (key, value) in [("attention_factor", attention), ("beta_fast", fast), ("beta_slow", slow)] {
                if let Some(value) = value {
                    yarn.insert(key.into(), json!(value));
                }
            }
            Ok(Some(Value::Object(yarn)))
        }
        Some(other) => {
            let shown: String = other.chars().take(64).collect();
            Err(Error::unsupported(keys.gguf.file(), format!("rope type `{}`", shown.escape_debug())))
        }
    }
}

/// Two sets of divisors.
fn longrope(shape: &Shape, [short, long]: [&[f64]; 2], original: u64, attention: Option<f64>) -> Value {
    let mut out = Map::new();
    out.insert("rope_type".into(), json!("longrope"));
    out.insert("original_max_position_embeddings".into(), json!(original));
    out.insert("short_factor".into(), json!(short));
    out.insert("long_factor".into(), json!(long));
    // The stored one is the usual one rounded, unless somebody meant another.
    let stretch = shape.context as f64 / original as f64;
    let usual = if stretch > 1.0 { (1.0 + stretch.ln() / (original as f64).ln()).sqrt() } else { 1.0 };
    if let Some(attention) = attention.filter(|attention| (attention / usual - 1.0).abs() >= 1e-6) {
        out.insert("attention_factor".into(), json!(attention));
    }
    Value::Object(out)
}

/// One set of divisors. Those of Llama 3.x are named by what they were computed from, which is more exact; others stand
/// for themselves, within a length that no text is beyond.
fn divided(shape: &Shape, theta: f64, dims: usize, factors: &[f64]) -> Option<Value> {
    if factors.iter().all(|factor| *factor == 1.0) {
        return None;
    }
    // The converter knows one original length, and no model has other bounds.
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let factor = factors.last().copied().unwrap_or(1.0);
    let frequencies = |scaling| Rope { theta, dims, scaling }.inverse_frequencies(false);
    let plain = frequencies(RopeScaling::None);
    let llama3 = frequencies(RopeScaling::Llama3 { factor, low, high, original });
    let same = plain.iter().zip(&llama3).zip(factors).all(|((plain, llama3), factor)| {
        // The converter computes in single precision, and the blend makes its errors larger.
        (plain / llama3 / factor - 1.0).abs() < 1e-4
    });
    if same && factor > 1.0 {
        return Some(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }));
    }
    Some(json!({
        "rope_type": "longrope",
        "original_max_position_embeddings": shape.context,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
    }))
}
