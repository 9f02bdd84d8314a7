//! How a person names a model and a device.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The model that ships inside the worker.
pub const TINYBEE: &str = "tinybee";

/// Longest model reference, in bytes.
pub const MAX_MODEL_REF: usize = 1024;

/// A model as its user names it, checked and in canonical form.
///
/// `tinybee`, `org/name`, `org/name@revision`, `org/name:file.gguf`, `org/name:Q4_K_M`, an absolute path to a
/// folder or `.gguf` file, or an alias from the config. (`./` paths are made absolute by the CLI, which
/// knows the working directory.)
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum ModelRef {
    /// The model inside the worker.
    Tinybee,
    /// A repository of the model hub.
    Hub {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: Option<String>,
        /// A file of the repository, or a quantization that picks one.
        file: Option<String>,
    },
    /// A folder or `.gguf` file by absolute path, without `.` and `..` components.
    Path(String),
    /// A name to be looked up in the config's aliases.
    Alias(String),
}

/// Why a text is not a model reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelRefError {
    /// Nothing there.
    #[error("a model reference must not be empty")]
    Empty,
    /// Longer than [`MAX_MODEL_REF`].
    #[error("a model reference has at most {MAX_MODEL_REF} bytes")]
    TooLong,
    /// A relative path on the wire.
    #[error("a path to a model must be absolute")]
    RelativePath,
    /// `..` or an empty component.
    #[error("a path to a model must not contain `..`")]
    Traversal,
    /// A character or component that names cannot have.
    #[error("`{0}` is not a name of letters, digits, `.`, `_` and `-`")]
    BadName(String),
}

fn name(text: &str) -> Result<String, ModelRefError> {
    let fits = text.len() <= 96
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !text.contains("..");
    if fits { Ok(text.to_owned()) } else { Err(ModelRefError::BadName(text.to_owned())) }
}

/// A name that may have `/` between its parts: a file in a repository, a branch.
fn path_of_names(text: &str) -> Result<String, ModelRefError> {
    text.split('/').try_for_each(|part| name(part).map(drop))?;
    Ok(text.to_owned())
}

impl FromStr for ModelRef {
    type Err = ModelRefError;

    fn from_str(text: &str) -> Result<Self, ModelRefError> {
        if text.is_empty() {
            return Err(ModelRefError::Empty);
        }
        if text.len() > MAX_MODEL_REF {
            return Err(ModelRefError::TooLong);
        }
        if text == TINYBEE {
            return Ok(Self::Tinybee);
        }
        if text.starts_with('.') || text.starts_with('~') {
            return Err(ModelRefError::RelativePath);
        }
        if text.starts_with('/') {
            if text.chars().any(char::is_control) {
                return Err(ModelRefError::BadName(text.escape_debug().to_string()));
            }
            let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
            if parts.contains(&"..") {
                return Err(ModelRefError::Traversal);
            }
            return Ok(Self::Path(format!("/{}", parts.join("/"))));
        }
        let Some((org, rest)) = text.split_once('/') else {
            return Ok(Self::Alias(name(text)?));
        };
        let (rest, file) = match rest.split_once(':') {
            Some((rest, file)) => (rest, Some(path_of_names(file)?)),
            None => (rest, None),
        };
        let (repo, revision) = match rest.split_once('@') {
            Some((repo, revision)) => (repo, Some(path_of_names(revision)?)),
            None => (rest, None),
        };
        Ok(Self::Hub { repo: format!("{}/{}", name(org)?, name(repo)?), revision, file })
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tinybee => f.pad(TINYBEE),
            Self::Path(text) | Self::Alias(text) => f.pad(text),
            Self::Hub { repo, revision, file } => {
                let mut text = repo.clone();
                if let Some(revision) = revision {
                    text = format!("{text}@{revision}");
                }
                if let Some(file) = file {
                    text = format!("{text}:{file}");
                }
                f.pad(&text)
            }
        }
    }
}

impl TryFrom<String> for ModelRef {
    type Error = ModelRefError;
    fn try_from(text: String) -> Result<Self, ModelRefError> {
        text.parse()
    }
}

impl From<ModelRef> for String {
    fn from(model: ModelRef) -> String {
        model.to_string()
    }
}

/// The device a worker is wanted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DeviceSpec {
    /// The best that fits.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this index.
    Cuda(u32),
}

/// Why a text is not a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a device is `auto`, `cpu` or `cuda:N`")]
pub struct DeviceError;

impl FromStr for DeviceSpec {
    type Err = DeviceError;
    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" | "cpu:0" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:") {
                Some(index) if index.len() <= 3 && index.bytes().all(|b| b.is_ascii_digit()) => {
                    index.parse().map(Self::Cuda).map_err(|_| DeviceError)
                }
                _ => Err(DeviceError),
            },
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Cpu => f.pad("cpu"),
            Self::Cuda(index) => f.pad(&format!("cuda:{index}")),
        }
    }
}

impl TryFrom<String> for DeviceSpec {
    type Error = DeviceError;
    fn try_from(text: String) -> Result<Self, DeviceError> {
        text.parse()
    }
}

impl From<DeviceSpec> for String {
    fn from(device: DeviceSpec) -> String {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_parse_to_their_canonical_form() {
        for (text, want) in [
            ("tinybee", "tinybee"),
            ("org/name", "org/name"),
            ("org/name@main", "org/name@main"),
            ("org/name@refs/pr/1:Q4_K_M", "org/name@refs/pr/1:Q4_K_M"),
            ("org/name:sub/file.gguf", "org/name:sub/file.gguf"),
            ("/a//b/./c/", "/a/b/c"),
            ("llama", "llama"),
        ] {
            assert_eq!(text.parse::<ModelRef>().unwrap().to_string(), want);
        }
        assert_eq!("llama".parse(), Ok(ModelRef::Alias("llama".into())));
    }

    #[test]
    fn hostile_references_are_refused() {
        for text in [
            "",
            "./x",
            "../x",
            "~/x",
            "/a/../b",
            "org/..",
            "org/na me",
            "org/a/../b",
            "org/name:../x",
            "org/name@a/../b",
            "a\0b",
            "/a\nb",
            "-x",
            "org/-x",
            "a/b/c",
        ] {
            assert!(text.parse::<ModelRef>().is_err(), "{text:?}");
        }
        assert!("a".repeat(2000).parse::<ModelRef>().is_err());
    }

    #[test]
    fn devices_parse() {
        assert_eq!("cuda:12".parse(), Ok(DeviceSpec::Cuda(12)));
        assert_eq!("auto".parse(), Ok(DeviceSpec::Auto));
        for text in ["cuda:", "cuda:x", "cuda:-1", "gpu", "cuda:99999", ""] {
            assert!(text.parse::<DeviceSpec>().is_err(), "{text:?}");
        }
    }
}
