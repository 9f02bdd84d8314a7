//! How long a model stays loaded when nobody uses it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How long a model stays loaded after its last request, as Ollama has it: seconds as a number, a text such as `5m` or
/// `1h30m`, 0 to unload at once, and anything negative to keep it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Value", into = "Value")]
#[schemars(with = "Value")]
pub enum KeepAlive {
    /// So long.
    For(Duration),
    /// Until somebody unloads it: it is pinned.
    #[default]
    Forever,
}

/// Why a value is no [`KeepAlive`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be seconds, -1, or a text such as `5m`")]
pub struct KeepAliveError;

/// Longest that can be asked for; what is longer is longer than any process lives.
const MAX_SECONDS: f64 = 1e9;

impl KeepAlive {
    /// The time as a duration; `None` is for ever.
    pub fn duration(self) -> Option<Duration> {
        match self {
            Self::For(time) => Some(time),
            Self::Forever => None,
        }
    }

    fn seconds(seconds: f64) -> Result<Self, KeepAliveError> {
        match seconds {
            _ if seconds < 0.0 => Ok(Self::Forever),
            _ if seconds <= MAX_SECONDS => Ok(Self::For(Duration::from_millis((seconds * 1000.0).round() as u64))),
            _ => Err(KeepAliveError),
        }
    }
}

/// Seconds of a text of numbers with units, such as `1h30m`, `1.5h` or `300ms`; a number alone is seconds.
fn parse(text: &str) -> Option<f64> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Some(seconds);
    }
    let (negative, mut rest) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        seconds += number
            * match &rest[..unit] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Some(if negative { -seconds } else { seconds })
}

impl FromStr for KeepAlive {
    type Err = KeepAliveError;

    fn from_str(text: &str) -> Result<Self, KeepAliveError> {
        let short = !text.is_empty() && text.len() <= 16;
        Self::seconds(short.then(|| parse(text)).flatten().ok_or(KeepAliveError)?)
    }
}

impl TryFrom<Value> for KeepAlive {
    type Error = KeepAliveError;

    fn try_from(value: Value) -> Result<Self, KeepAliveError> {
        match value {
            Value::Number(number) => Self::seconds(number.as_f64().ok_or(KeepAliveError)?),
            Value::String(text) => text.parse(),
            _ => Err(KeepAliveError),
        }
    }
}

impl From<KeepAlive> for Value {
    fn from(keep: KeepAlive) -> Self {
        match keep {
            KeepAlive::Forever => Value::from(-1),
            KeepAlive::For(time) if time.subsec_millis() == 0 => Value::from(time.as_secs()),
            KeepAlive::For(time) => Value::from(time.as_secs_f64()),
        }
    }
}

impl fmt::Display for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&match self {
            Self::Forever => "-1".to_owned(),
            Self::For(time) if time.subsec_millis() == 0 => format!("{}s", time.as_secs()),
            Self::For(time) => format!("{}ms", time.as_millis()),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_ollama_takes_is_taken() {
        let seconds = |n: f64| KeepAlive::For(Duration::from_secs_f64(n));
        for (value, want) in [
            (json!(300), seconds(300.0)),
            (json!(0), seconds(0.0)),
            (json!(1.5), seconds(1.5)),
            (json!(-1), KeepAlive::Forever),
            (json!(-0.5), KeepAlive::Forever),
            (json!("5m"), seconds(300.0)),
            (json!("1h30m"), seconds(5400.0)),
            (json!("1.5h"), seconds(5400.0)),
            (json!("300ms"), seconds(0.3)),
            (json!("-1m"), KeepAlive::Forever),
            (json!("-1"), KeepAlive::Forever),
            (json!("0"), seconds(0.0)),
            (json!("24h"), seconds(86_400.0)),
        ] {
            let keep = KeepAlive::try_from(value.clone());
            assert_eq!(keep, Ok(want), "{value}");
            assert_eq!(KeepAlive::try_from(Value::from(want)), Ok(want), "{value} survives its encoding");
            assert_eq!(want.to_string().parse(), Ok(want), "{value} survives its text");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for value in [
            json!(""),
            json!("m"),
            json!("5 m"),
            json!("5x"),
            json!("nan"),
            json!("inf"),
            json!(1e300),
            json!([]),
            json!(true),
            json!("1.2.3s"),
        ] {
            assert_eq!(KeepAlive::try_from(value.clone()), Err(KeepAliveError), "{value}");
        }
    }
}
