//! Room on the disk, and the file operations that must survive a loss of power.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::Error;

/// Bytes that this user may still write to the file system of a folder.
///
/// # Errors
/// The system's.
pub(crate) fn free(folder: &Path) -> io::Result<u64> {
    let facts = rustix::fs::statvfs(folder)?;
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// Bytes that a file takes on the disk.
pub(crate) fn on_disk(facts: &std::fs::Metadata) -> u64 {
    facts.blocks().saturating_mul(512)
}

/// Makes a folder and what is missing above it.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn make_folder(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(Error::file("make the folder", path))
}

/// Makes what was renamed or linked into a folder last.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn sync_folder(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::file("sync the folder", path))
}

/// Replaces a small file as a whole: written in `scratch`, synced, renamed. Both are on one file system.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn replace(path: &Path, bytes: &[u8], scratch: &Path) -> Result<(), Error> {
    let aside = aside(scratch)?;
    let written = File::create_new(&aside).and_then(|mut file| {
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| std::fs::rename(&aside, path));
    if renamed.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    renamed.map_err(Error::file("write", path))?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Makes a symbolic link, or replaces what is there by it. Its folder is not synced.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn replace_link(target: &Path, path: &Path, scratch: &Path) -> Result<(), Error> {
    if std::fs::read_link(path).is_ok_and(|now| now == target) {
        return Ok(());
    }
    let aside = aside(scratch)?;
    let made = std::os::unix::fs::symlink(target, &aside).and_then(|()| std::fs::rename(&aside, path));
    if made.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    made.map_err(Error::file("link", path))
}

/// A new name in a folder, which is made: random, since processes of several containers may share a store.
fn aside(scratch: &Path) -> Result<PathBuf, Error> {
    make_folder(scratch)?;
    let mut random = [0u8; 12];
    rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::file("name a file in", scratch)(errno.into()))?;
    Ok(scratch.join(format!("new-{}", crate::digest::hex(&random))))
}

/// Removes what an ended process left in the scratch folder, once it is older than `age`.
pub(crate) fn sweep(scratch: &Path, age: Duration) {
    for entry in std::fs::read_dir(scratch).into_iter().flatten().flatten().take(10_000) {
        let path = entry.path();
        let old = path
            .symlink_metadata()
            .and_then(|facts| facts.modified())
            .is_ok_and(|made| SystemTime::now().duration_since(made).is_ok_and(|passed| passed > age));
        if old && entry.file_name().to_string_lossy().starts_with("new-") {
            let _ = std::fs::remove_file(path);
        }
    }
}
