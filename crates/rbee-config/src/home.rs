//! The folders of one installation.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The folders of one installation: XDG's, or all below `RBEE_HOME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// `config.toml`.
    pub config: PathBuf,
    /// What is worth keeping.
    pub data: PathBuf,
    /// What can be fetched again.
    pub cache: PathBuf,
    /// Logs and counters.
    pub state: PathBuf,
    /// Locks and the nonce; gone after a reboot.
    pub run: PathBuf,
}

impl Home {
    /// Everything below one folder, which must be absolute.
    pub fn under(root: &Path) -> Self {
        Self {
            config: root.join("config"),
            data: root.join("data"),
            cache: root.join("cache"),
            state: root.join("state"),
            run: root.join("run"),
        }
    }

    /// The home that this environment names: `RBEE_HOME`, else the XDG folders, else those below `HOME`.
    ///
    /// # Errors
    /// When `RBEE_HOME` is relative, or nothing names a home.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> io::Result<Self> {
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text.to_owned());
        if let Some(root) = env("RBEE_HOME").filter(|text| !text.is_empty()) {
            let root = PathBuf::from(root);
            return if root.is_absolute() {
                Ok(Self::under(&root))
            } else {
                Err(invalid("RBEE_HOME must be an absolute path"))
            };
        }
        let absolute = |name: &str| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let user = absolute("HOME").ok_or_else(|| invalid("neither RBEE_HOME nor HOME names a folder"))?;
        let folder = |name: &str, below: &str| absolute(name).unwrap_or_else(|| user.join(below)).join("rbee");
        let state = folder("XDG_STATE_HOME", ".local/state");
        Ok(Self {
            config: folder("XDG_CONFIG_HOME", ".config"),
            data: folder("XDG_DATA_HOME", ".local/share"),
            cache: folder("XDG_CACHE_HOME", ".cache"),
            run: absolute("XDG_RUNTIME_DIR").map_or_else(|| state.join("run"), |path| path.join("rbee")),
            state,
        })
    }

    /// Makes the folders, readable by this user alone.
    ///
    /// # Errors
    /// The folder that could not be made.
    pub fn create(&self) -> io::Result<()> {
        for folder in [&self.config, &self.data, &self.cache, &self.state, &self.run] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot make {}: {error}", folder.display())))?;
        }
        Ok(())
    }

    /// The settings file.
    pub fn config_file(&self) -> PathBuf {
        self.config.join("config.toml")
    }

    /// The secret that shows a daemon to be this home's: 64 hexadecimal digits in `run/nonce`, made by
    /// whoever asks first. The home's folders must exist.
    ///
    /// # Errors
    /// When the file can neither be read nor made.
    pub fn nonce(&self) -> io::Result<String> {
        let path = self.run.join("nonce");
        if let Some(nonce) = read_nonce(&path)? {
            return Ok(nonce);
        }
        let mut random = [0u8; 32];
        fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let nonce = hex(&random);
        // Written aside and linked into place, so that nobody ever reads a half-written one.
        let aside = self.run.join(format!("nonce.{}.{}", std::process::id(), &nonce[..16]));
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
        file.write_all(nonce.as_bytes())?;
        let linked = fs::hard_link(&aside, &path);
        fs::remove_file(&aside)?;
        match linked {
            Ok(()) => Ok(nonce),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => read_nonce(&path)?
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged", path.display()))),
            Err(error) => Err(error),
        }
    }

    /// What a daemon of this home shows of the nonce: its SHA-256 in hexadecimal.
    ///
    /// # Errors
    /// As [`Home::nonce`].
    pub fn proof(&self) -> io::Result<String> {
        Ok(hex(&Sha256::digest(self.nonce()?.as_bytes())))
    }
}

fn read_nonce(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(Some(text)),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged: delete it", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_the_folders() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned())
        };
        let home = Home::from_env(&env(&[("RBEE_HOME", "/r"), ("HOME", "/h")])).unwrap();
        assert_eq!(home, Home::under(Path::new("/r")));
        let home =
            Home::from_env(&env(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c"), ("XDG_DATA_HOME", "relative")])).unwrap();
        assert_eq!(home.cache, Path::new("/c/rbee"));
        assert_eq!(home.data, Path::new("/h/.local/share/rbee"));
        assert_eq!(home.run, Path::new("/h/.local/state/rbee/run"));
        assert!(Home::from_env(&env(&[("RBEE_HOME", "x")])).is_err());
        assert!(Home::from_env(&env(&[])).is_err());
    }

    #[test]
    fn many_starters_agree_on_one_nonce() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::under(folder.path());
        home.create().unwrap();
        let nonces: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| home.nonce().unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(nonces.iter().all(|nonce| nonce == &nonces[0]));
        assert_eq!(fs::read_dir(&home.run).unwrap().count(), 1);
        assert_ne!(home.proof().unwrap(), nonces[0]);
    }
}
