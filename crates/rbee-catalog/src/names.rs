//! The one place where names that others chose become paths.
//!
//! Every component is matched to a strict alphabet before it is joined to anything, so that no listing, header or
//! reference leads out of its repository's folder.

use std::path::{Path, PathBuf};

use crate::error::Error;

/// Longest component of a path, in bytes.
const MAX_COMPONENT: usize = 200;

/// Longest path of a file within its repository, in bytes.
const MAX_PATH: usize = 1024;

/// Most components of such a path.
const MAX_DEPTH: usize = 16;

/// A commit: 40 hexadecimal digits in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Commit(String);

impl Commit {
    /// Checks the text of one.
    pub fn parse(text: &str) -> Option<Self> {
        is_hex(text, 40).then(|| Self(text.to_owned()))
    }

    /// Its 40 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Commit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// Whether a text is exactly `digits` hexadecimal digits in lower case.
pub(crate) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether a component of a listing can be the name of a file: what the hub's repositories use, and nothing that a
/// file system, a shell or a terminal reads as more than a name.
fn component_fits(part: &str) -> bool {
    (1..=MAX_COMPONENT).contains(&part.len())
        && part != "."
        && part != ".."
        && !part.starts_with('-')
        && part.chars().all(|c| c.is_alphanumeric() || " ._-+=@()[],&#~!'%".contains(c))
}

/// Whether a path of a listing stays within its repository, component by component.
pub(crate) fn path_fits(path: &str) -> bool {
    path.len() <= MAX_PATH && path.split('/').count() <= MAX_DEPTH && path.split('/').all(component_fits)
}

/// Whether a listing that has this path is not an honest one. A name that is merely unusual does not fit either
/// ([`path_fits`]), but it only cannot be fetched.
pub(crate) fn is_hostile(path: &str) -> bool {
    path.len() > MAX_PATH
        || path.chars().any(char::is_control)
        || path.contains('\\')
        || path.split('/').any(|part| part.is_empty() || part == "." || part == ".." || part.len() > 255)
}

/// Joins a checked path to a folder.
///
/// # Errors
/// [`Error::BadName`] when a component is none.
pub(crate) fn below(folder: &Path, path: &str) -> Result<PathBuf, Error> {
    if path_fits(path) { Ok(folder.join(path)) } else { Err(Error::BadName { name: shown(path) }) }
}

/// A foreign name as it can be printed: escaped, and cut to a length that fits a line.
pub(crate) fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(120).collect::<String>().escape_debug().to_string();
    if name.chars().nth(120).is_some() {
        text.push('…');
    }
    text
}

/// `models--org--name` of `org/name`.
///
/// # Errors
/// [`Error::BadName`] when it is no repository's name.
pub(crate) fn repo_folder(repo: &str) -> Result<String, Error> {
    match repo.split_once('/') {
        Some((org, name)) if [org, name].iter().all(|part| is_repo_part(part)) => Ok(format!("models--{org}--{name}")),
        _ => Err(Error::BadName { name: shown(repo) }),
    }
}

/// `org/name` of `models--org--name`. Neither part may have `--` in it on the hub.
pub(crate) fn repo_of_folder(folder: &str) -> Option<String> {
    let (org, name) = folder.strip_prefix("models--")?.split_once("--")?;
    [org, name].iter().all(|part| is_repo_part(part)).then(|| format!("{org}/{name}"))
}

fn is_repo_part(part: &str) -> bool {
    (1..=96).contains(&part.len())
        && !part.contains("..")
        && !part.contains("--")
        && !part.starts_with(['.', '-'])
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Whether a text can be the name of a blob that some tool has put into the cache: an ETag, as it stands.
pub(crate) fn blob_fits(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_none() {
        for path in
            ["config.json", "1_Pooling/config.json", "BF16/x-00001-of-00002.gguf", "a b (1).gguf", ".gitattributes"]
        {
            assert!(path_fits(path), "{path:?}");
        }
        let long = "a/".repeat(20) + "a";
        for path in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a//b",
            "a/",
            "./a",
            "a\\b",
            "a\0b",
            "a\nb",
            "\u{1b}[2J",
            "-rf",
            "a:b",
            "a\u{202e}b",
            "a*b",
            "$(x)",
            "`x`",
            &long,
            &"a".repeat(201),
        ] {
            assert!(!path_fits(path), "{path:?}");
            assert!(below(Path::new("/r"), path).is_err());
        }
        for path in ["", "/x", "../x", "a/../b", "a//b", "a\nb", "a\\b", &"a".repeat(300)] {
            assert!(is_hostile(path), "{path:?}");
        }
        for path in ["a:b", "what?.png", ".gitattributes", "图.png"] {
            assert!(!is_hostile(path), "{path:?}");
        }
    }

    #[test]
    fn repositories_and_folders_name_each_other() {
        for repo in ["org/name", "a/B.c_d-e", "org/x-2.5"] {
            assert_eq!(repo_of_folder(&repo_folder(repo).unwrap()).as_deref(), Some(repo));
        }
        for repo in ["name", "a/b/c", "../x", "a/..", "a/.git", "/a", "a/", "a--b/c"] {
            assert!(repo_folder(repo).is_err(), "{repo}");
        }
        for folder in ["datasets--a--b", "models--a", "models--..--b", ".locks", "models--a--"] {
            assert_eq!(repo_of_folder(folder), None, "{folder}");
        }
    }
}
