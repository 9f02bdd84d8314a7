//! The two digests that a hub's listing gives: SHA-256 of large files, git's blob id of the others. Both name blobs.

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::names::is_hex;

/// What a file's bytes must hash to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Digest {
    /// SHA-256, 64 hexadecimal digits.
    Sha256(String),
    /// SHA-1 over git's header and the bytes, 40 hexadecimal digits.
    GitBlob(String),
}

impl Digest {
    /// The digest of this text: 64 digits are a SHA-256, 40 a git blob id.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if is_hex(text, 64) {
            Some(Self::Sha256(text.to_owned()))
        } else if is_hex(text, 40) {
            Some(Self::GitBlob(text.to_owned()))
        } else {
            None
        }
    }

    /// Its hexadecimal digits: the name of the blob.
    pub(crate) fn hex(&self) -> &str {
        match self {
            Self::Sha256(text) | Self::GitBlob(text) => text,
        }
    }

    /// What computes a digest of this kind, for a file of `size` bytes.
    pub(crate) fn hasher(&self, size: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::GitBlob(_) => Hasher::git_blob(size),
        }
    }
}

/// A digest under way.
pub(crate) enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
}

impl Hasher {
    pub(crate) fn sha256() -> Self {
        Self::Sha256(Sha256::new())
    }

    fn git_blob(size: u64) -> Self {
        let mut sha1 = Sha1::new();
        sha1.update(format!("blob {size}\0"));
        Self::GitBlob(sha1)
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(sha256) => sha256.update(bytes),
            Self::GitBlob(sha1) => sha1.update(bytes),
        }
    }

    pub(crate) fn hex(self) -> String {
        match self {
            Self::Sha256(sha256) => hex(&sha256.finalize()),
            Self::GitBlob(sha1) => hex(&sha1.finalize()),
        }
    }
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_sha256sum() {
        // `printf hello | git hash-object --stdin` and `printf hello | sha256sum`.
        let git = Digest::parse("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0").unwrap();
        let sha = Digest::parse("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824").unwrap();
        for digest in [git, sha] {
            let mut hasher = digest.hasher(5);
            hasher.update(b"hel");
            hasher.update(b"lo");
            assert_eq!(hasher.hex(), digest.hex());
        }
        assert!(Digest::parse("../x").is_none() && Digest::parse(&"A".repeat(64)).is_none());
    }
}
