//! One transfer of a blob at a time among all processes: `flock` on the file that Python's tools lock as well.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk;
use crate::error::Error;

/// The lock while it is held. The system frees it with the process.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Where the lock of a blob is.
pub(crate) fn path(locks: &Path, hex: &str) -> PathBuf {
    locks.join(format!("{hex}.lock"))
}

/// Takes the lock, unless another has it.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn take(path: &Path) -> Result<Option<Lock>, Error> {
    disk::make_folder(path.parent().unwrap_or(path))?;
    loop {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(Error::file("open the lock", path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(Error::file("lock", path)(error)),
        }
        // Some versions of Python's tools remove the file when they are done: then this is a lock on nothing.
        let ours = file.metadata().map_err(Error::file("look at", path))?;
        if path.metadata().is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino())) {
            return Ok(Some(Lock { _file: file }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holds_it_and_a_removed_file_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path(), "aa");
        let held = take(&path).unwrap();
        assert!(held.is_some() && take(&path).unwrap().is_none());
        std::fs::remove_file(&path).unwrap();
        let again = take(&path).unwrap();
        assert!(again.is_some() && take(&path).unwrap().is_none());
        drop((held, again));
        assert!(take(&path).unwrap().is_some());
    }
}
