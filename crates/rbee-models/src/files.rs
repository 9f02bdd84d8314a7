//! The files of a model: a folder on disk, or bytes inside the program.
//!
//! Every file must be a regular one. A link may lead only below the folder itself or, in a snapshot of the hub's cache
//! layout, into the same repository's `blobs/`.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::Error;

/// Largest of the small files that are read whole, in bytes.
const MAX_SMALL: u64 = 64 << 20;

/// Opens without blocking on a pipe that nobody writes to.
const O_NONBLOCK: i32 = 0o4000;

/// The files of a model.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// A folder.
    Folder(PathBuf),
    /// A GGUF file, or all that one was split into, in order.
    Gguf {
        /// Where they lie.
        folder: PathBuf,
        /// Their names; at least one.
        names: Vec<String>,
    },
    /// Files inside the program, by name.
    Builtin(&'static [(&'static str, &'static [u8])]),
}

/// The bytes of a weight file, mapped or inside the program.
pub enum WeightBytes {
    /// Mapped from disk.
    Mapped(Mmap),
    /// Inside the program.
    Static(&'static [u8]),
}

impl std::ops::Deref for WeightBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

impl WeightBytes {
    /// Gives back the memory of a part: reading it again reads the file again. What is packed need not be there twice.
    #[expect(unsafe_code, reason = "memory maps are unsafe by their nature")]
    pub(crate) fn release(&self, part: Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Self::Mapped(map) = self {
            // SAFETY: nobody writes to this map of a file, so what is dropped is read from the file again, as before. Memory
            // that is not given back is not missed.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, part.start, part.len()) };
        }
    }
}

impl ModelFiles {
    /// The folder at this path.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub fn folder(path: &Path) -> Result<Self, Error> {
        match path.canonicalize() {
            Ok(path) if path.is_dir() => Ok(Self::Folder(path)),
            Ok(path) => Err(Error::Refused { path, problem: "it is not a folder of model files" }),
            Err(_) => Err(Error::NotFound(path.to_owned())),
        }
    }

    /// The GGUF file at this path, with those beside it that it was split into.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none, [`Error::Refused`] when its name is not text.
    pub fn gguf(path: &Path) -> Result<Self, Error> {
        let missing = || Error::NotFound(path.to_owned());
        // In the hub's cache the name is a link's, and those of the other parts are beside it.
        let parent = path.parent().and_then(|parent| parent.canonicalize().ok()).ok_or_else(missing)?;
        let real = path.canonicalize().map_err(|_| missing())?;
        let (folder, name) = match blobs_of(&parent) {
            Some(_) => (parent, path.file_name()),
            None => (real.parent().ok_or_else(missing)?.to_owned(), real.file_name()),
        };
        let name = name.and_then(|name| name.to_str());
        let name = name.ok_or(Error::Refused { path: path.to_owned(), problem: "its name is not text" })?;
        Ok(Self::Gguf { folder, names: parts(name) })
    }

    /// Bytes of the files that are read whole, and of those that are mapped.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn sizes(&self) -> Result<(u64, u64), Error> {
        let folder = match self {
            Self::Builtin(_) => return Ok((0, 0)),
            Self::Gguf { folder, names } => {
                let sizes = names.iter().filter_map(|name| Some(folder.join(name).metadata().ok()?.len()));
                let all = sizes.fold(0u64, u64::saturating_add);
                // A header with its vocabulary is read whole.
                return Ok((all.min(MAX_SMALL), all));
            }
            Self::Folder(folder) => folder,
        };
        let failed = |source| Error::Read { path: folder.clone(), source };
        let (mut whole, mut mapped) = (0u64, 0u64);
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // What cannot be looked at cannot be read either.
            let Ok(len) = path.metadata().map(|facts| facts.len()) else { continue };
            if path.extension().is_some_and(|kind| kind == "safetensors") {
                mapped = mapped.saturating_add(len);
            } else if len <= MAX_SMALL {
                whole = whole.saturating_add(len);
            }
        }
        Ok((whole, mapped))
    }

    /// A small file, or `None` when it is not there.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Refused`].
    pub fn small(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, Error> {
        match self {
            Self::Builtin(files) => {
                Ok(files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
            Self::Gguf { .. } => Ok(None),
            Self::Folder(folder) => {
                let Some((path, file)) = open(folder, name)? else { return Ok(None) };
                let len = file.metadata().map_err(|source| Error::Read { path: path.clone(), source })?.len();
                if len > MAX_SMALL {
                    return Err(Error::Refused { path, problem: "it is larger than any such file" });
                }
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut std::io::Read::take(file, MAX_SMALL), &mut bytes)
                    .map_err(|source| Error::Read { path, source })?;
                Ok(Some(Cow::Owned(bytes)))
            }
        }
    }

    /// A small file that must be there.
    ///
    /// # Errors
    /// As [`ModelFiles::small`]; `Missing` when it is not there.
    pub fn required(&self, name: &str) -> Result<Cow<'static, [u8]>, Error> {
        self.small(name)?.ok_or_else(|| rbee_weights::Error::Missing(name.into()).into())
    }

    /// A weight file, mapped; `None` when it is not there.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Refused`].
    pub fn weights(&self, name: &str) -> Result<Option<WeightBytes>, Error> {
        match self {
            Self::Builtin(files) => {
                Ok(files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| WeightBytes::Static(bytes)))
            }
            Self::Folder(folder) | Self::Gguf { folder, .. } => {
                let Some((path, file)) = open(folder, name)? else { return Ok(None) };
                let map = map(&file).map_err(|source| Error::Read { path, source })?;
                Ok(Some(WeightBytes::Mapped(map)))
            }
        }
    }
}

/// Most files that a model is split into.
const MAX_PARTS: usize = 1000;

/// The names of all parts of a file: those that `model-00001-of-00003.gguf` counts up to, or itself alone.
fn parts(name: &str) -> Vec<String> {
    let count = || {
        let (rest, all) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, no) = rest.rsplit_once('-')?;
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let count: usize = all.parse().ok().filter(|count| (1..=MAX_PARTS).contains(count))?;
        (digits(no) && digits(all)).then(|| (1..=count).map(|no| format!("{stem}-{no:05}-of-{all}.gguf")).collect())
    };
    count().unwrap_or_else(|| vec![name.to_owned()])
}

#[expect(unsafe_code, reason = "memory maps are unsafe by their nature")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is only read, and only while weights are packed at load. A file that somebody cuts short
    // meanwhile ends this worker with SIGBUS and nothing else: files are parsed in workers for that reason.
    unsafe { Mmap::map(file) }
}

fn open(folder: &Path, name: &str) -> Result<Option<(PathBuf, File)>, Error> {
    let path = folder.join(name);
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { path, source }),
    };
    if !real.starts_with(folder) && !blobs_of(folder).is_some_and(|blobs| real.starts_with(blobs)) {
        return Err(Error::Refused { path, problem: "it is a link that leads out of the model's folder" });
    }
    let file = File::options()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(&real)
        .map_err(|source| Error::Read { path: path.clone(), source })?;
    let kind = file.metadata().map_err(|source| Error::Read { path: path.clone(), source })?;
    if !kind.is_file() {
        return Err(Error::Refused { path, problem: "it is not a regular file" });
    }
    Ok(Some((path, file)))
}

/// `models--org--name/blobs` for a folder `models--org--name/snapshots/REVISION`.
fn blobs_of(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))?;
    let repository = snapshots.parent()?;
    let named = repository.file_name()?.to_str()?.starts_with("models--");
    named.then(|| repository.join("blobs"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_regular_files_of_the_model_itself_are_opened() {
        let root = tempfile::tempdir().unwrap();
        let repository = root.path().join("models--a--b");
        let folder = repository.join("snapshots/1");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all(repository.join("blobs")).unwrap();
        std::fs::write(repository.join("blobs/x"), "good").unwrap();
        std::fs::write(root.path().join("secret"), "bad").unwrap();
        symlink("../../blobs/x", folder.join("linked")).unwrap();
        symlink("../../../secret", folder.join("out")).unwrap();
        std::fs::create_dir(folder.join("folder")).unwrap();
        let pipe = std::ffi::CString::new(folder.join("pipe").to_str().unwrap()).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(pipe.to_str().unwrap()).status().unwrap().success());
        let files = ModelFiles::folder(&folder).unwrap();
        assert_eq!(files.small("linked").unwrap().unwrap().as_ref(), b"good");
        assert!(files.small("absent").unwrap().is_none());
        for name in ["out", "folder", "pipe"] {
            assert!(matches!(files.small(name), Err(Error::Refused { .. })), "{name}");
        }
        assert!(matches!(ModelFiles::folder(&root.path().join("none")), Err(Error::NotFound(_))));
    }
}
