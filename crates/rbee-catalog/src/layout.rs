//! A repository's folder in the hub's cache layout, shared with every tool that knows it.
//!
//! `blobs/` has the bytes under their digests, `snapshots/COMMIT/` links to them under the files' names, `refs/` has the
//! commit of each branch. Beside them `.rbee/` keeps what only this crate reads: what was verified (sizes and
//! digests of each selection of files) and files on their way to a place.

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk;
use crate::error::Error;
use crate::names::{self, Commit};

/// Longest manifest or index that is read, in bytes.
const MAX_SMALL: u64 = 64 << 20;

/// Most entries of a snapshot or local folder that are looked at.
const MAX_ENTRIES: usize = 20_000;

/// How deep folders of a snapshot are looked into.
const MAX_DEPTH: usize = 4;

/// One repository's folder, which need not exist.
#[derive(Clone, Debug)]
pub(crate) struct Repo {
    /// `org/name`.
    pub(crate) name: String,
    /// `HUB/models--org--name`.
    pub(crate) folder: PathBuf,
    /// `HUB/.locks/models--org--name`.
    pub(crate) locks: PathBuf,
}

/// A file as it lies in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its path within the folder.
    pub(crate) path: String,
    pub(crate) state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// A regular file, or a link to one where it may lead.
    File { bytes: u64 },
    /// A link to something that is not there yet, or no more.
    Dangling,
    /// Anything else.
    Refused(&'static str),
}

/// Where links may lead.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Links<'a> {
    /// Into this `blobs/` folder and nowhere else.
    Blobs(&'a Path),
    /// Below this folder.
    Below(&'a Path),
}

/// What was verified when a selection of files was fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) files: Vec<Verified>,
}

/// A verified file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verified {
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) digest: String,
}

impl Repo {
    /// # Errors
    /// [`Error::BadName`].
    pub(crate) fn of(hub: &Path, name: &str) -> Result<Self, Error> {
        let folder = names::repo_folder(name)?;
        Ok(Self { name: name.to_owned(), locks: hub.join(".locks").join(&folder), folder: hub.join(folder) })
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }

    pub(crate) fn blob(&self, hex: &str) -> PathBuf {
        self.folder.join("blobs").join(hex)
    }

    pub(crate) fn refs(&self) -> PathBuf {
        self.folder.join("refs")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.folder.join("snapshots")
    }

    pub(crate) fn snapshot(&self, commit: &Commit) -> PathBuf {
        self.snapshots().join(commit.as_str())
    }

    /// Where files are made before they are renamed to their place.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.folder.join(".rbee")
    }

    fn manifest_path(&self, commit: &Commit, key: &str) -> PathBuf {
        self.scratch().join("verified").join(commit.as_str()).join(format!("{key}.json"))
    }

    /// The commit that a revision means here: a branch or tag, or the beginning of a commit.
    ///
    /// # Errors
    /// [`Error::BadName`], [`Error::Ambiguous`], [`Error::File`].
    pub(crate) fn commit_of(&self, revision: &str) -> Result<Option<Commit>, Error> {
        let path = names::below(&self.refs(), revision)?;
        if let Some(text) = read_small(&path, 256)? {
            return Ok(std::str::from_utf8(&text).ok().and_then(|text| Commit::parse(text.trim())));
        }
        let prefix = revision.to_ascii_lowercase();
        if !(7..=40).contains(&prefix.len()) || !names::is_hex(&prefix, prefix.len()) {
            return Ok(None);
        }
        let mut found: Vec<Commit> = self.commits()?.into_iter().filter(|c| c.as_str().starts_with(&prefix)).collect();
        match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => Err(Error::Ambiguous {
                model: format!("{}@{revision}", self.name),
                candidates: found.iter().map(Commit::to_string).collect(),
            }),
        }
    }

    /// The commits that there are snapshots of, in order.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn commits(&self) -> Result<Vec<Commit>, Error> {
        let mut commits: Vec<Commit> =
            entries(&self.snapshots())?.into_iter().filter_map(|name| Commit::parse(&name)).collect();
        commits.sort_unstable();
        Ok(commits)
    }

    /// Every branch and tag, with its commit.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn all_refs(&self) -> Result<Vec<(String, Commit)>, Error> {
        let mut found = Vec::new();
        for Found { path, state } in walk(&self.refs(), Links::Below(&self.refs()))? {
            if !matches!(state, State::File { .. }) {
                continue;
            }
            let text = read_small(&self.refs().join(&path), 256)?.unwrap_or_default();
            if let Some(commit) = std::str::from_utf8(&text).ok().and_then(|text| Commit::parse(text.trim())) {
                found.push((path, commit));
            }
        }
        Ok(found)
    }

    /// The files of a snapshot.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn files(&self, commit: &Commit) -> Result<Vec<Found>, Error> {
        walk(&self.snapshot(commit), Links::Blobs(&self.blobs()))
    }

    /// Lets a snapshot have a blob under a file's name.
    ///
    /// # Errors
    /// [`Error::BadName`], [`Error::File`].
    pub(crate) fn link(&self, commit: &Commit, path: &str, hex: &str) -> Result<(), Error> {
        let place = names::below(&self.snapshot(commit), path)?;
        let folder = place.parent().unwrap_or(&self.folder);
        disk::make_folder(folder)?;
        let target = format!("{}blobs/{hex}", "../".repeat(path.split('/').count() + 1));
        disk::replace_link(Path::new(&target), &place, &self.scratch())?;
        disk::sync_folder(folder)
    }

    /// Lets a branch, tag or commit mean a commit.
    ///
    /// # Errors
    /// [`Error::BadName`], [`Error::File`].
    pub(crate) fn write_ref(&self, revision: &str, commit: &Commit) -> Result<(), Error> {
        let place = names::below(&self.refs(), revision)?;
        if fs::read(&place).is_ok_and(|now| now == commit.as_str().as_bytes()) {
            return Ok(());
        }
        disk::make_folder(place.parent().unwrap_or(&self.folder))?;
        disk::replace(&place, commit.as_str().as_bytes(), &self.scratch())
    }

    /// What was verified of a selection.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn manifest(&self, commit: &Commit, key: &str) -> Result<Option<Manifest>, Error> {
        let bytes = read_small(&self.manifest_path(commit, key), MAX_SMALL)?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Keeps what was verified. The last step of a fetch but for the refs.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn write_manifest(&self, commit: &Commit, key: &str, manifest: &Manifest) -> Result<(), Error> {
        let path = self.manifest_path(commit, key);
        disk::make_folder(path.parent().unwrap_or(&self.folder))?;
        let bytes = serde_json::to_vec(manifest).unwrap_or_default();
        disk::replace(&path, &bytes, &self.scratch())
    }

    /// Forgets what was verified of one selection.
    pub(crate) fn forget_one(&self, commit: &Commit, key: &str) {
        let _ = fs::remove_file(self.manifest_path(commit, key));
    }

    /// Forgets what was verified of a commit.
    pub(crate) fn forget(&self, commit: &Commit) {
        let _ = fs::remove_dir_all(self.scratch().join("verified").join(commit.as_str()));
    }
}

/// The names in a folder; none when it is not there.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn entries(folder: &Path) -> Result<Vec<String>, Error> {
    let listed = match fs::read_dir(folder) {
        Ok(listed) => listed,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(Error::file("list", folder)(error)),
    };
    let mut names = Vec::new();
    for entry in listed.take(MAX_ENTRIES) {
        let entry = entry.map_err(Error::file("list", folder))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// A small regular file's bytes; `None` when it is not there, or longer. Never blocks on a pipe.
///
/// # Errors
/// [`Error::File`], [`Error::RefusedFile`].
pub(crate) fn read_small(path: &Path, most: u64) -> Result<Option<Vec<u8>>, Error> {
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut file = match fs::OpenOptions::new().read(true).custom_flags(nonblock).open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(Error::file("open", path)(error)),
    };
    let facts = file.metadata().map_err(Error::file("look at", path))?;
    if facts.is_dir() {
        return Ok(None);
    }
    if !facts.is_file() {
        return Err(Error::RefusedFile { path: path.to_owned(), problem: "it is not a regular file" });
    }
    if facts.len() > most {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    (&mut file).take(most).read_to_end(&mut bytes).map_err(Error::file("read", path))?;
    Ok(Some(bytes))
}

/// The files below a folder that can be a model's, sorted by path. Nothing is opened.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn walk(root: &Path, links: Links<'_>) -> Result<Vec<Found>, Error> {
    look(root, links, MAX_DEPTH)
}

/// As [`walk`], without the folders in it.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn beside(root: &Path, links: Links<'_>) -> Result<Vec<Found>, Error> {
    look(root, links, 1)
}

fn look(root: &Path, links: Links<'_>, depth: usize) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let place = root.join(&folder);
        for name in entries(&place)? {
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            if !names::path_fits(&path) || found.len() >= MAX_ENTRIES {
                continue;
            }
            let place = place.join(&name);
            let Ok(facts) = place.symlink_metadata() else { continue };
            if facts.is_dir() {
                if path.split('/').count() < depth {
                    folders.push(path);
                }
                continue;
            }
            let state = if facts.is_symlink() { follow(&place, links) } else { of(&facts) };
            found.push(Found { path, state });
        }
    }
    found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn of(facts: &fs::Metadata) -> State {
    if facts.is_file() { State::File { bytes: facts.len() } } else { State::Refused("it is not a regular file") }
}

/// Where a link leads, if it may.
fn follow(link: &Path, links: Links<'_>) -> State {
    let Ok(target) = fs::read_link(link) else { return State::Dangling };
    let full = resolve(link.parent().unwrap_or(Path::new("/")), &target);
    match links {
        Links::Blobs(blobs) => {
            let name = full.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if full.parent() != Some(blobs) || !names::blob_fits(name) {
                return State::Refused("it is a link out of its repository's blobs");
            }
            // A blob is no link itself: one more could lead anywhere.
            match full.symlink_metadata() {
                Ok(facts) => of(&facts),
                Err(_) => State::Dangling,
            }
        }
        Links::Below(root) => match (full.canonicalize(), root.canonicalize()) {
            (Ok(full), Ok(root)) if full.starts_with(&root) => match full.symlink_metadata() {
                Ok(facts) => of(&facts),
                Err(_) => State::Dangling,
            },
            (Ok(_), Ok(_)) => State::Refused("it is a link out of its folder"),
            _ => State::Dangling,
        },
    }
}

/// A link's target as a path from the root, without asking the file system.
fn resolve(folder: &Path, target: &Path) -> PathBuf {
    let mut full = if target.is_absolute() { PathBuf::new() } else { folder.to_owned() };
    for part in target.components() {
        match part {
            Component::ParentDir => {
                full.pop();
            }
            Component::CurDir => {}
            other => full.push(other),
        }
    }
    full
}
