//! What the cache has, and taking things out of it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rbee_wire::ModelRef;

use crate::disk;
use crate::error::Error;
use crate::layout::{self, Repo, State};
use crate::local::{self, Local, MAIN};
use crate::lock;
use crate::names::{self, Commit};
use crate::part;
use crate::select;

/// A repository with files in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// `org/name`.
    pub repo: String,
    /// Branches and tags with the commits that they mean here.
    pub refs: Vec<(String, Commit)>,
    /// Its snapshots.
    pub commits: Vec<StoredCommit>,
    /// Bytes that it takes on the disk, each blob once; unfinished ones with what they have reserved.
    pub bytes: u64,
    /// Bytes of that in files that are not finished.
    pub partial: u64,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredCommit {
    /// The commit.
    pub commit: Commit,
    /// The models that are complete in it, by the references that mean them. None: it is only begun, or no model.
    pub models: Vec<Local>,
    /// When one of its files was last opened, as far as the file system keeps that, or made.
    pub last_used: Option<SystemTime>,
}

impl Stored {
    /// Whether some model of it can be loaded.
    pub fn is_complete(&self) -> bool {
        self.commits.iter().any(|commit| !commit.models.is_empty())
    }
}

/// The repositories of a cache.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn list(hub: &Path) -> Result<Vec<Stored>, Error> {
    let mut folders = layout::entries(hub)?;
    folders.sort_unstable();
    let mut found = Vec::new();
    for name in folders.iter().filter_map(|folder| names::repo_of_folder(folder)) {
        let repo = Repo::of(hub, &name)?;
        if !repo.folder.is_dir() {
            continue;
        }
        let refs = repo.all_refs()?;
        let commits = repo.commits()?.into_iter().map(|commit| stored_commit(&repo, &refs, commit));
        let partial = |file: &str| file.ends_with(part::PART) || file.ends_with(".incomplete");
        found.push(Stored {
            commits: commits.collect::<Result<_, _>>()?,
            bytes: below(&repo.folder, &|_| true)?,
            partial: below(&repo.blobs(), &partial)?,
            refs,
            repo: name,
        });
    }
    Ok(found)
}

fn stored_commit(repo: &Repo, refs: &[(String, Commit)], commit: Commit) -> Result<StoredCommit, Error> {
    let files = repo.files(&commit)?;
    let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let revision = refs.iter().find(|(_, of)| *of == commit).map_or(commit.as_str(), |(name, _)| name);
    let model =
        |file: Option<String>| ModelRef::Hub { repo: repo.name.clone(), revision: Some(revision.to_owned()), file };
    let mut models = Vec::new();
    for file in select::every(&paths) {
        // A file that is refused makes its model none; the others are still listed.
        if let Ok(Some(local)) = local::in_snapshot(&model(file.clone()), repo, &commit, file.as_deref()) {
            models.push(local);
        }
    }
    let folder = repo.snapshot(&commit);
    let used = |facts: fs::Metadata| facts.accessed().into_iter().chain(facts.modified()).max();
    let last_used = files
        .iter()
        .filter(|file| matches!(file.state, State::File { .. }))
        .filter_map(|file| folder.join(&file.path).metadata().ok().and_then(used))
        .max();
    Ok(StoredCommit { commit, models, last_used })
}

/// Bytes of a whole cache.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn used_bytes(hub: &Path) -> Result<u64, Error> {
    let folders = layout::entries(hub)?;
    folders.iter().filter(|name| *name != ".locks").map(|name| below(&hub.join(name), &|_| true)).sum()
}

/// Bytes on the disk of the files below a folder whose names fit; links count nothing.
fn below(root: &Path, fits: &dyn Fn(&str) -> bool) -> Result<u64, Error> {
    let mut bytes = 0u64;
    let mut seen = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for name in layout::entries(&folder)? {
            let path = folder.join(&name);
            let Ok(facts) = path.symlink_metadata() else { continue };
            if facts.is_dir() {
                folders.push(path);
            } else if facts.is_file() && fits(&name) && seen.insert((facts.dev(), facts.ino())) {
                bytes += disk::on_disk(&facts);
            }
        }
    }
    Ok(bytes)
}

/// Removes a model.
///
/// # Errors
/// See [`crate::Store::delete`].
pub(crate) fn delete(hub: &Path, model: &ModelRef) -> Result<u64, Error> {
    let ModelRef::Hub { repo, revision, file } = model else {
        return Err(Error::NotStored { model: model.to_string() });
    };
    let repo = Repo::of(hub, repo)?;
    let nothing = || Error::NoModelHere { path: repo.folder.clone(), problem: format!("there is nothing of {model}") };
    if !repo.folder.is_dir() {
        return Err(nothing());
    }
    // A transfer holds the lock of its blob: what it writes must not be taken from under it.
    for hex in layout::entries(&repo.blobs())?.iter().filter_map(|name| name.strip_suffix(part::PART)) {
        if lock::take(&lock::path(&repo.locks, hex))?.is_none() {
            return Err(Error::Busy { waiting: 1 });
        }
    }
    let before = below(&repo.folder, &|_| true)?;
    let commit = repo.commit_of(revision.as_deref().unwrap_or(MAIN))?;
    match (&commit, file) {
        (Some(commit), Some(file)) => unlink(&repo, commit, model, file)?,
        (Some(commit), None) => forget(&repo, commit)?,
        // Begun and never finished: there is no snapshot that is known by this name.
        (None, None) if revision.is_none() => {}
        (None, _) => return Err(nothing()),
    }
    sweep(&repo)?;
    let after = if repo.folder.is_dir() { below(&repo.folder, &|_| true)? } else { 0 };
    Ok(before.saturating_sub(after))
}

/// Takes one file's model out of a snapshot, and the snapshot away when nothing that matters is left.
fn unlink(repo: &Repo, commit: &Commit, model: &ModelRef, file: &str) -> Result<(), Error> {
    let files = repo.files(commit)?;
    let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let selection = select::select(model, local::wanted(Some(file)), &paths)?;
    for path in selection.files() {
        let path = repo.snapshot(commit).join(path);
        fs::remove_file(&path).map_err(Error::file("remove", path))?;
    }
    repo.forget_one(commit, &selection.key());
    let left = repo.files(commit)?;
    let paths: Vec<&str> = left.iter().map(|file| file.path.as_str()).collect();
    if select::every(&paths).is_empty() { forget(repo, commit) } else { Ok(()) }
}

/// Takes a snapshot away, and every name of it.
fn forget(repo: &Repo, commit: &Commit) -> Result<(), Error> {
    for (name, of) in repo.all_refs()? {
        if of == *commit {
            let path = repo.refs().join(name);
            fs::remove_file(&path).map_err(Error::file("remove", path))?;
        }
    }
    let snapshot = repo.snapshot(commit);
    match fs::remove_dir_all(&snapshot) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::file("remove", snapshot)(error));
        }
        _ => repo.forget(commit),
    }
    Ok(())
}

/// Removes the blobs that no snapshot refers to, and the repository once it has none.
fn sweep(repo: &Repo) -> Result<(), Error> {
    let commits = repo.commits()?;
    let mut used: BTreeSet<PathBuf> = BTreeSet::new();
    for commit in &commits {
        let folder = repo.snapshot(commit);
        let links = repo.files(commit)?.into_iter().filter_map(|file| fs::read_link(folder.join(file.path)).ok());
        used.extend(links.filter_map(|target| target.file_name().map(PathBuf::from)));
    }
    for name in layout::entries(&repo.blobs())? {
        if !used.contains(Path::new(&name)) {
            let path = repo.blobs().join(&name);
            fs::remove_file(&path).map_err(Error::file("remove", path))?;
        }
    }
    if commits.is_empty() {
        fs::remove_dir_all(&repo.folder).map_err(Error::file("remove", &repo.folder))?;
        let _ = fs::remove_dir_all(&repo.locks);
    }
    Ok(())
}
