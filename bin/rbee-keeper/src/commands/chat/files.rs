//! Chats in files: nothing is overwritten that `/save` did not write itself.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::transcript::version;
use crate::exit::{Exit, Failure};

/// Largest chat that is read, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// The path that was typed, `~/` as a shell has it.
pub(super) fn path(text: &str, user: Option<&Path>) -> PathBuf {
    let below_user = text.strip_prefix("~/").and_then(|rest| user.map(|user| user.join(rest)));
    below_user.unwrap_or_else(|| PathBuf::from(text))
}

/// Reads a chat file's bytes.
///
/// # Errors
/// When it is not there, no regular file, or too large.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let wrong = |error: io::Error| Failure::new(Exit::Failed, error.to_string());
    // A named pipe would be waited for.
    if !fs::metadata(path).map_err(wrong)?.is_file() {
        return Err(Failure::new(Exit::Failed, "it is not a file"));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes)).map_err(wrong)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Failure::new(Exit::Failed, format!("it is larger than {} MiB", MAX_FILE >> 20)));
    }
    Ok(bytes)
}

/// Writes a chat file: a new one, or in place of an earlier one, which stays whole until the new one is.
///
/// # Errors
/// When something else is there, or it cannot be written.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let wrong = |error: io::Error| Failure::new(Exit::Failed, error.to_string());
    let create = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path);
    let fill = |mut file: File, at: &Path| {
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).inspect_err(|_| drop(fs::remove_file(at)))
    };
    match create(path) {
        Ok(file) => return fill(file, path).map_err(wrong),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(wrong(error)),
    }
    if read(path).ok().and_then(|bytes| version(&bytes)).is_none() {
        return Err(
            Failure::new(Exit::Failed, "it exists and is not a chat that /save wrote").hint("choose another name")
        );
    }
    // Where a link leads, so that the link stays.
    let path = path.canonicalize().map_err(wrong)?;
    let mut beside = path.clone().into_os_string();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    create(&beside).and_then(|file| fill(file, &beside)).map_err(wrong)?;
    fs::rename(&beside, &path).inspect_err(|_| drop(fs::remove_file(&beside))).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_chat_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chat.json");
        let (first, second) = (r#"{"rbee_chat":1,"messages":[]}"#, r#"{"rbee_chat":1,"messages":[],"x":1}"#);
        write(&file, first).unwrap();
        assert_eq!(read(&file).unwrap(), first.as_bytes());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write(&link, second).unwrap();
        assert_eq!(read(&file).unwrap(), second.as_bytes());
        assert!(link.is_symlink(), "the link stays");

        fs::write(&file, "precious").unwrap();
        let failure = write(&file, first).unwrap_err();
        assert!(failure.message.contains("is not a chat"), "{}", failure.message);
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert!(write(folder.path(), first).is_err());
        assert!(write(&folder.path().join("none/chat"), first).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left behind");
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(read(&pipe).unwrap_err().message.contains("not a file"));
        assert!(write(&pipe, "{}").is_err());
        assert!(read(folder.path()).is_err());
        assert!(read(&folder.path().join("none")).is_err());
    }
}
