//! Keys: credentials for people and programs beside the site's own token, what each may do, and how much.
//!
//! The secret of a key is made where it is used and never travels here: a queen is told its SHA-256.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::KeyId;

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Generate text, and see and cancel its own jobs.
    Inference,
    /// Everything.
    Admin,
}

impl Scope {
    /// The scopes by their names on the wire.
    pub const NAMES: &[&str] = &["inference", "admin"];
}

/// Who may use a route or an operation. There is no default: every row of their tables says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Everybody, without a credential.
    Public,
    /// Every key.
    Inference,
    /// The site's token, and keys with the scope `admin`.
    Admin,
}

impl Access {
    /// Whether a key with these scopes may.
    pub fn open_to(self, scopes: &[Scope]) -> bool {
        match self {
            Self::Public => true,
            Self::Inference => !scopes.is_empty(),
            Self::Admin => scopes.contains(&Scope::Admin),
        }
    }
}

/// So many bytes as lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hex<const N: usize>(pub [u8; N]);

/// SHA-256 of a key's secret.
pub type KeyDigest = Hex<32>;

/// Whose cached prompts a request may find: those of the same tenant alone.
pub type Tenant = Hex<16>;

impl<const N: usize> TryFrom<String> for Hex<N> {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("must be {} lower-case hexadecimal digits", 2 * N);
        let digits = text.bytes().map(|byte| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        });
        let digits: Vec<u8> = digits.collect::<Option<_>>().ok_or_else(wrong)?;
        if digits.len() != 2 * N {
            return Err(wrong());
        }
        Ok(Self(std::array::from_fn(|i| digits[2 * i] << 4 | digits[2 * i + 1])))
    }
}

impl<const N: usize> From<Hex<N>> for String {
    fn from(hex: Hex<N>) -> Self {
        hex.to_string()
    }
}

impl<const N: usize> std::fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> std::fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// How much a key may have of the queen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeyLimits {
    /// Jobs alive at once, those that wait included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_concurrent: Option<u32>,
    /// Jobs posted in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u32>,
}

/// Makes a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct KeyCreate {
    /// What people call it; need not be the only one of that name.
    pub name: String,
    /// SHA-256 of its secret, as 64 lower-case hexadecimal digits.
    #[schemars(with = "String")]
    pub digest: KeyDigest,
    /// What it may do; `inference` unless given.
    #[serde(default = "inference", skip_serializing_if = "is_inference")]
    pub scopes: Vec<Scope>,
    /// How much it may have.
    #[serde(flatten)]
    pub limits: KeyLimits,
}

fn inference() -> Vec<Scope> {
    vec![Scope::Inference]
}

fn is_inference(scopes: &[Scope]) -> bool {
    scopes == [Scope::Inference]
}

/// One key as others see it: without its digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct KeyView {
    /// The key.
    pub key_id: KeyId,
    /// What people call it.
    pub name: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// How much it may have.
    #[serde(flatten)]
    pub limits: KeyLimits,
    /// When it was made, in seconds since 1970 UTC.
    pub created: u64,
    /// Jobs that it has alive.
    pub running: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_survives_the_wire_and_nothing_else_passes() {
        let tenant = Hex(std::array::from_fn(|i| i as u8 * 17));
        let text = serde_json::to_string(&tenant).unwrap();
        assert_eq!(text, "\"00112233445566778899aabbccddeeff\"");
        assert_eq!(serde_json::from_str::<Tenant>(&text).unwrap(), tenant);
        for wrong in ["", "0011", "00112233445566778899AABBCCDDEEFF", "0x112233445566778899aabbccddeeff", "é"] {
            assert!(Tenant::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_scope_opens_its_own_and_what_is_below() {
        use Access::{Admin, Inference, Public};
        for (scopes, opens) in [
            (&[][..], [true, false, false]),
            (&[Scope::Inference], [true, true, false]),
            (&[Scope::Admin], [true, true, true]),
        ] {
            assert_eq!([Public, Inference, Admin].map(|access| access.open_to(scopes)), opens, "{scopes:?}");
        }
        let names: Vec<_> = [Scope::Inference, Scope::Admin].map(|scope| serde_json::to_value(scope).unwrap()).into();
        assert_eq!(names, Scope::NAMES);
    }
}
