//! Identifiers. All are open strings of at most 128 characters without control characters, checked
//! where they enter.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest identifier, in characters.
pub const MAX_ID: usize = 128;

/// Why a string is not an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Nothing there.
    #[error("must not be empty")]
    Empty,
    /// More than [`MAX_ID`] characters.
    #[error("must have at most {MAX_ID} characters")]
    TooLong,
    /// A control character.
    #[error("must not have control characters")]
    Control,
    /// No place in a trace.
    #[error("must be 00-TRACE-PARENT-FLAGS in lower-case hexadecimal digits")]
    Trace,
}

/// Checks what every identifier must be.
pub fn check_id(text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.chars().count() > MAX_ID {
        return Err(IdError::TooLong);
    }
    if text.chars().any(char::is_control) {
        return Err(IdError::Control);
    }
    Ok(())
}

macro_rules! string_ids {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schemars(with = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// Checks and takes a string.
            ///
            /// # Errors
            /// [`IdError`] when it is empty, too long or has control characters.
            pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
                check_id(text.as_ref())?;
                Ok(Self(text.as_ref().into()))
            }

            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.to_string()
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(&self.0)
            }
        }
    )*};
}

string_ids! {
    /// A job at the queen or a hive: `job-<incarnation>-<random>`.
    JobId,
    /// A worker, unique for one life of one worker process.
    WorkerId,
    /// A hive; the one on the queen's machine is `localhost`.
    HiveId,
    /// A device of a hive: `cpu`, `cuda:0`.
    DeviceId,
    /// A key, as it is listed and revoked; not its secret.
    KeyId,
    /// A request as it travels through the programs; a label, never a key.
    RequestId,
}

/// Where a request belongs in a trace that its caller began, as W3C's Trace Context has it: `00-TRACE-PARENT-FLAGS`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct TraceParent(std::sync::Arc<str>);

impl TraceParent {
    /// Checks the header's value: version 00, no id of zeros.
    ///
    /// # Errors
    /// For anything else. Such a header is to be ignored, the recommendation says.
    pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
        let text = text.as_ref();
        let hex =
            |part: &str, length| part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let some = |part: &str| part.bytes().any(|b| b != b'0');
        match text.split('-').collect::<Vec<_>>()[..] {
            ["00", trace, parent, flags]
                if hex(trace, 32) && hex(parent, 16) && hex(flags, 2) && some(trace) && some(parent) =>
            {
                Ok(Self(text.into()))
            }
            _ => Err(IdError::Trace),
        }
    }

    /// The header's value.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trace's own id, which all that belongs to it shares.
    pub fn trace_id(&self) -> &str {
        &self.0[3..35]
    }
}

impl TryFrom<String> for TraceParent {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl From<TraceParent> for String {
    fn from(trace: TraceParent) -> Self {
        trace.0.to_string()
    }
}

impl HiveId {
    /// The hive on the queen's own machine.
    pub fn localhost() -> Self {
        Self("localhost".into())
    }
}

/// One life of a daemon: a counter that its machine raises with each start, and random bits.
/// A higher counter ends the lower ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct Incarnation {
    /// Rises with each start.
    pub counter: u64,
    /// 128 random bits as 32 hexadecimal digits.
    pub random: String,
}

impl std::fmt::Display for Incarnation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.counter, self.random)
    }
}

impl JobId {
    /// The id of a job of this incarnation; `random` is 128 random bits in hexadecimal.
    pub fn of(incarnation: &Incarnation, random: &str) -> Self {
        let life: String = incarnation.random.chars().take(8).collect();
        Self(format!("job-{life}-{random}").into())
    }

    /// Whether this id was given by that incarnation; `None` when it does not have a job id's shape.
    pub fn is_of(&self, incarnation: &Incarnation) -> Option<bool> {
        let (life, random) = self.0.strip_prefix("job-")?.split_once('-')?;
        let hex = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        (life.len() == 8 && random.len() == 32 && hex(life) && hex(random))
            .then(|| incarnation.random.starts_with(life))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_trace_is_what_the_recommendation_says() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(TraceParent::new(good).unwrap().trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        for wrong in [
            "",
            "00",
            &good[1..],
            &good.to_uppercase(),
            &good.replacen("00-", "ff-", 1),
            &good.replace("4bf92f3577b34da6a3ce929d0e0e4736", "00000000000000000000000000000000"),
            &good.replace("00f067aa0ba902b7", "0000000000000000"),
            &format!("{good}-x"),
            &good.replace("4bf9", "4b\u{e9}"),
        ] {
            assert_eq!(TraceParent::new(wrong), Err(IdError::Trace), "{wrong}");
        }
    }

    #[test]
    fn an_identifier_is_checked_where_it_enters() {
        for (text, want) in [
            (String::new(), Err(IdError::Empty)),
            ("a".repeat(128), Ok(())),
            ("é".repeat(128), Ok(())),
            ("a".repeat(129), Err(IdError::TooLong)),
            ("a\nb".into(), Err(IdError::Control)),
        ] {
            assert_eq!(check_id(&text), want, "{text:?}");
            let json = serde_json::to_string(&text).unwrap();
            assert_eq!(serde_json::from_str::<WorkerId>(&json).is_ok(), want.is_ok());
        }
    }

    #[test]
    fn a_job_id_tells_its_queens_life() {
        let life = |random: &str| Incarnation { counter: 1, random: random.into() };
        let id = JobId::of(&life("0123456789abcdef0123456789abcdef"), &"a".repeat(32));
        assert_eq!(id.is_of(&life("0123456789abcdef0123456789abcdef")), Some(true));
        assert_eq!(id.is_of(&life("ff23456789abcdef0123456789abcdef")), Some(false));
        assert_eq!(JobId::new("job-1").unwrap().is_of(&life("00")), None);
    }
}
