//! Copies a local folder or `.gguf` file into the cache.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use rbee_wire::ModelRef;

use crate::digest::{Digest, Hasher};
use crate::disk;
use crate::error::Error;
use crate::layout::{Manifest, Repo, Verified};
use crate::local::{self, Local, MAIN};
use crate::lock;
use crate::manage;
use crate::names::Commit;
use crate::options::Options;

/// Files at least this long are named by SHA-256, as the hub does with large ones; others by git's blob id.
const LARGE: u64 = 10 << 20;

/// Copies a model into the cache.
///
/// # Errors
/// See [`crate::Store::import`].
pub(crate) fn import(options: &Options, path: &Path, repo: &str) -> Result<Local, Error> {
    let repo = Repo::of(&options.hub, repo)?;
    let text = path.to_str().filter(|text| text.starts_with('/'));
    let model = text.and_then(|text| text.parse::<ModelRef>().ok()).ok_or_else(|| Error::NoModelHere {
        path: path.to_owned(),
        problem: "its path is not absolute, or has more than plain names".to_owned(),
    })?;
    let found = local::find(&options.hub, &model)?;
    let found = found.ok_or_else(|| Error::NoModelHere { path: path.to_owned(), problem: "it is gone".to_owned() })?;
    let folder = if found.path.is_dir() { found.path.clone() } else { path.parent().unwrap_or(path).to_owned() };

    disk::make_folder(&repo.blobs())?;
    let budget = match options.disk_budget {
        Some(budget) => budget.saturating_sub(manage::used_bytes(&options.hub)?),
        None => u64::MAX,
    };
    let free = disk::free(&repo.blobs()).map_err(Error::file("look at", repo.blobs()))?;
    let free = free.saturating_sub(options.reserve).min(budget);
    if found.bytes > free {
        return Err(Error::DiskFull { needed: found.bytes, free, path: repo.blobs() });
    }
    let mut files = Vec::new();
    for file in &found.files {
        let digest = copy(&repo, &folder.join(&file.path), file.bytes)?;
        files.push(Verified { path: file.path.clone(), bytes: file.bytes, digest: digest.hex().to_owned() });
    }
    // No hub has given it a commit: one that says the same as its content.
    let mut hasher = Hasher::sha256();
    for file in &files {
        hasher.update(format!("{} {}\n", file.digest, file.path).as_bytes());
    }
    let mut commit = hasher.hex();
    commit.truncate(40);
    let commit = Commit::parse(&commit).ok_or(Error::Lost)?;
    for file in &files {
        repo.link(&commit, &file.path, &file.digest)?;
    }
    let file = match &local::canonical(
        &ModelRef::Hub { repo: repo.name.clone(), revision: None, file: None },
        &selection(&found),
    ) {
        ModelRef::Hub { file, .. } => file.clone(),
        _ => None,
    };
    let key = selection(&found).key();
    repo.write_manifest(&commit, &key, &Manifest { files })?;
    disk::sync_folder(&repo.snapshots())?;
    repo.write_ref(MAIN, &commit)?;
    let model = ModelRef::Hub { repo: repo.name.clone(), revision: None, file };
    let ModelRef::Hub { file, .. } = &model else { return Err(Error::Lost) };
    local::in_snapshot(&model, &repo, &commit, file.as_deref())?.ok_or(Error::Lost)
}

/// Which selection of files a found model is.
fn selection(found: &Local) -> crate::select::Selection {
    let files: Vec<String> = found.files.iter().map(|file| file.path.clone()).collect();
    if found.path.is_dir() { crate::select::Selection::Folder(files) } else { crate::select::Selection::Gguf(files) }
}

/// A file's bytes as a blob: hashed, copied (shared, where the file system can), hashed again where it lies.
fn copy(repo: &Repo, source: &Path, size: u64) -> Result<Digest, Error> {
    let sample = if size >= LARGE { "0".repeat(64) } else { "0".repeat(40) };
    let kind = Digest::parse(&sample).ok_or(Error::Lost)?;
    let digest = Digest::parse(&hash(source, &kind, size)?).ok_or(Error::Lost)?;
    let blob = repo.blob(digest.hex());
    if blob.symlink_metadata().is_ok_and(|facts| facts.is_file() && facts.len() == size) {
        return Ok(digest);
    }
    let Some(_lock) = lock::take(&lock::path(&repo.locks, digest.hex()))? else {
        return Err(Error::Busy { waiting: 1 });
    };
    let part = repo.blobs().join(format!("{}.rbee-part", digest.hex()));
    let _ = fs::remove_file(&part);
    let copied = fs::copy(source, &part).map_err(Error::file("copy to", &part));
    let checked = copied.and_then(|_| hash(&part, &kind, size)).and_then(|got| {
        let wanted = digest.hex().to_owned();
        if got == wanted { Ok(()) } else { Err(Error::Checksum { file: source.display().to_string(), wanted, got }) }
    });
    let placed = checked.and_then(|()| {
        File::open(&part).and_then(|file| file.sync_all()).map_err(Error::file("sync", &part))?;
        fs::rename(&part, &blob).map_err(Error::file("rename to", &blob))?;
        disk::sync_folder(&repo.blobs())
    });
    if placed.is_err() {
        let _ = fs::remove_file(&part);
    }
    placed.map(|()| digest)
}

fn hash(path: &Path, kind: &Digest, size: u64) -> Result<String, Error> {
    let mut file = File::open(path).map_err(Error::file("open", path))?;
    let mut hasher = kind.hasher(size);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::file("read", path))? {
            0 => return Ok(hasher.hex()),
            count => hasher.update(&buffer[..count]),
        }
    }
}
