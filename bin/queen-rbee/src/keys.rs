//! The keys: who may call this queen beside the holder of its token, kept in one file, and how much each has in use.
//!
//! The file holds digests and never a secret. It is read once, at the start, and what is wrong with it stops the queen: a
//! key that was revoked must not come back, and one that was made must not be lost in silence. It is replaced as a whole.
//!
//! Invariants
//! - What the file says is what holds, but for a key that is being revoked: that one is closed first.
//! - A key never has more jobs alive than its limit, nor posts more than its rate.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rbee_service::{Caller, Keyring, random_hex};
use rbee_wire::ids::check_id;
use rbee_wire::key::{Hex, KeyCreate, KeyDigest, KeyLimits, KeyView, Tenant};
use rbee_wire::{ErrorBody, ErrorCode, KeyId, Scope};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio_util::sync::CancellationToken;

/// Keys at once. Each request is compared with all of them.
const MAX_KEYS: usize = 1024;

/// Largest file, in bytes: so many keys with the longest names, and room.
const MAX_FILE: u64 = 2 << 20;

/// The file's format.
const VERSION: u32 = 1;

/// How long a key that has all its jobs alive is told to wait: nobody knows when one of them ends.
const BUSY: Duration = Duration::from_secs(1);

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    /// Makes tenants that nobody can guess of the keys' ids.
    secret: Hex<32>,
    keys: Vec<Record>,
}

/// One key in the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    key_id: KeyId,
    name: String,
    digest: KeyDigest,
    scopes: Vec<Scope>,
    #[serde(flatten)]
    limits: KeyLimits,
    created: u64,
}

/// A key that is known.
#[derive(Debug)]
pub struct Key {
    record: Record,
    tenant: Tenant,
    /// Cancelled when the key is revoked.
    closed: CancellationToken,
    running: AtomicU32,
    /// When the posts so far are paid for at the key's rate, on the queen's clock.
    paid: Mutex<Duration>,
}

impl Key {
    fn new(record: Record, secret: &Hex<32>) -> Arc<Self> {
        let mut hash = Sha256::new();
        hash.update(secret.0);
        hash.update(record.key_id.as_str());
        let hash = hash.finalize();
        Arc::new(Self {
            record,
            tenant: Hex(std::array::from_fn(|i| hash[i])),
            closed: CancellationToken::new(),
            running: AtomicU32::new(0),
            paid: Mutex::default(),
        })
    }

    /// Its id.
    pub fn id(&self) -> &KeyId {
        &self.record.key_id
    }

    /// Whose cached prompts its requests may find.
    pub fn tenant(&self) -> Tenant {
        self.tenant
    }

    /// Whether it may do everything.
    pub fn is_admin(&self) -> bool {
        self.record.scopes.contains(&Scope::Admin)
    }

    /// Cancelled when the key is revoked.
    pub fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Lets one more job in. It counts until the permit is dropped.
    ///
    /// # Errors
    /// `UNAUTHORIZED` once the key is revoked, `RATE_LIMIT_EXCEEDED` over a limit; nothing is counted then.
    pub fn admit(self: &Arc<Self>, now: Duration) -> Result<Permit, ErrorBody> {
        if self.closed.is_cancelled() {
            return Err(revoked());
        }
        let KeyLimits { max_concurrent, rate } = self.record.limits;
        let limited = |limit: &str, most: u32, message: String, wait: Duration| {
            ErrorBody::new(ErrorCode::RateLimitExceeded, message)
                .with_details(json!({ "limit": limit, "most": most }))
                .with_retry_after(wait)
        };
        // Holds off others of this key until all is decided.
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(most) = max_concurrent
            && self.running.load(Ordering::Relaxed) >= most
        {
            let message = format!("this key has {most} jobs that wait or run, and may have no more at once");
            return Err(limited("max_concurrent", most, message, BUSY));
        }
        if let Some(most) = rate {
            // The bucket as the time at which it is full again: each post moves that on, a minute ahead at the most.
            let each = Duration::from_secs(60) / most;
            let next = (*paid).max(now) + each;
            let minute = each * most;
            if next > now + minute {
                let message = format!("this key has posted as much as it may, which is {most} jobs a minute");
                return Err(limited("rate", most, message, next - minute - now));
            }
            *paid = next;
        }
        self.running.fetch_add(1, Ordering::Relaxed);
        Ok(Permit(Arc::clone(self)))
    }

    fn view(&self) -> KeyView {
        let Record { key_id, name, scopes, limits, created, .. } = self.record.clone();
        KeyView { key_id, name, scopes, limits, created, running: self.running.load(Ordering::Relaxed).into() }
    }
}

/// One job that a key has alive.
#[derive(Debug)]
pub struct Permit(Arc<Key>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The refusal of a key that was revoked while its request was on its way.
pub fn revoked() -> ErrorBody {
    ErrorBody::new(ErrorCode::Unauthorized, "this key was revoked")
}

/// All keys; cheap to clone.
#[derive(Clone, Debug)]
pub struct Keys(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    file: PathBuf,
    secret: Hex<32>,
    keys: Mutex<Vec<Arc<Key>>>,
    /// Held from a change's first look at the keys until the file has it.
    changing: Mutex<()>,
}

impl Keys {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// What is wrong with it, and what to do.
    pub fn open(file: &Path) -> Result<Self, ErrorBody> {
        let read = read(file).map_err(|problem| {
            let message = format!("queen-rbee cannot start: the keys in {} cannot be used: {problem}", file.display());
            ErrorBody::new(ErrorCode::Internal, message)
                .with_hint("put a good copy back, or delete the file: that ends all keys, and new ones can be made")
        })?;
        let random = || Hex::try_from(random_hex(32)).expect("32 bytes are 64 hexadecimal digits");
        let (secret, records) = read.map_or_else(|| (random(), Vec::new()), |file| (file.secret, file.keys));
        let keys = records.into_iter().map(|record| Key::new(record, &secret)).collect();
        let shared = Shared { file: file.to_owned(), secret, keys: Mutex::new(keys), changing: Mutex::default() };
        Ok(Self(Arc::new(shared)))
    }

    fn keys(&self) -> MutexGuard<'_, Vec<Arc<Key>>> {
        self.0.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key of a caller who has one.
    ///
    /// # Errors
    /// `UNAUTHORIZED` when it was revoked since the guard saw it.
    pub fn of(&self, caller: &Caller) -> Result<Option<Arc<Key>>, ErrorBody> {
        let Caller::Key { id, .. } = caller else { return Ok(None) };
        let known = self.keys().iter().find(|key| key.id() == id && !key.closed.is_cancelled()).cloned();
        known.map(Some).ok_or_else(revoked)
    }

    /// All of them, oldest first.
    pub fn list(&self) -> Vec<KeyView> {
        self.keys().iter().map(|key| key.view()).collect()
    }

    /// Makes a key. Blocks until the file has it.
    ///
    /// # Errors
    /// When there are too many, when the digest is another key's, or when the file cannot be written.
    pub fn create(&self, new: KeyCreate, created: u64) -> Result<KeyView, ErrorBody> {
        let _one = self.0.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut keys = self.keys().clone();
        if keys.len() >= MAX_KEYS {
            let message = format!("there are {MAX_KEYS} keys, and no more may be");
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message)
                .with_hint("`rbee key revoke ID` ends one that is not needed any more"));
        }
        if let Some(twin) = keys.iter().find(|key| key.record.digest == new.digest) {
            let message = format!("key {} has this digest already", twin.id());
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
        }
        let KeyCreate { name, digest, mut scopes, limits } = new;
        scopes.sort_unstable();
        scopes.dedup();
        let key_id = KeyId::new(format!("key-{}", random_hex(8))).expect("hexadecimal digits make an id");
        let key = Key::new(Record { key_id, name, digest, scopes, limits, created }, &self.0.secret);
        keys.push(Arc::clone(&key));
        self.write(&keys).map_err(|error| {
            let message = format!("the key was not made: {} cannot be written: {error}", self.0.file.display());
            ErrorBody::new(ErrorCode::Internal, message)
        })?;
        *self.keys() = keys;
        tracing::info!(key = %key.id(), "a key was made");
        Ok(key.view())
    }

    /// Closes a key and strikes it from the file. Blocks until the file has it no more.
    ///
    /// # Errors
    /// `KEY_NOT_FOUND`; or that the file could not be written, which leaves the key closed until the queen's next start.
    pub fn revoke(&self, id: &KeyId) -> Result<KeyView, ErrorBody> {
        let _one = self.0.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut keys = self.keys().clone();
        let Some(at) = keys.iter().position(|key| key.id() == id) else {
            return Err(ErrorBody::new(ErrorCode::KeyNotFound, format!("there is no key `{id}`")));
        };
        let key = keys.remove(at);
        key.closed.cancel();
        self.write(&keys).map_err(|error| {
            let file = self.0.file.display();
            let message = format!("key {id} is closed, but not struck from {file}, which cannot be written: {error}");
            ErrorBody::new(ErrorCode::Internal, message).with_hint(
                "revoke it again once the file can be written: it would be open after the queen's next start",
            )
        })?;
        *self.keys() = keys;
        tracing::info!(key = %id, "a key was revoked");
        Ok(key.view())
    }

    /// Replaces the file: whoever reads it, also after a loss of power, finds the old one or the new one.
    fn write(&self, keys: &[Arc<Key>]) -> io::Result<()> {
        let keys = keys.iter().map(|key| key.record.clone()).collect();
        let file = File { version: VERSION, secret: self.0.secret, keys };
        let mut text = serde_json::to_vec_pretty(&file)?;
        text.push(b'\n');
        let (path, aside) = (&self.0.file, self.0.file.with_extension("json.new"));
        // One that a crash left may be anything.
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut out = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
        out.write_all(&text)?;
        out.sync_all()?;
        fs::rename(&aside, path)?;
        let folder = path.parent().ok_or_else(|| io::Error::other("the file lies in no folder"))?;
        fs::File::open(folder)?.sync_all()
    }
}

impl Keyring for Keys {
    fn who(&self, digest: &[u8; 32]) -> Option<Caller> {
        let mut found = None;
        let keys = self.keys();
        for key in keys.iter() {
            let same: bool = key.record.digest.0.ct_eq(digest).into();
            if same && !key.closed.is_cancelled() {
                found = Some(key);
            }
        }
        found.map(|key| Caller::Key { id: key.id().clone(), scopes: key.record.scopes.clone() })
    }
}

/// Reads and checks a file; none is none.
fn read(path: &Path) -> Result<Option<File>, String> {
    let facts = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
        Ok(facts) => facts,
    };
    if !facts.is_file() {
        return Err("it is not a regular file".into());
    }
    let mode = facts.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(format!("other users may read or change it (mode {mode:o}): `chmod 600` it"));
    }
    let mut text = Vec::new();
    let open = fs::File::open(path).map_err(|error| error.to_string())?;
    open.take(MAX_FILE + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("it is larger than {MAX_FILE} bytes"));
    }
    let file: File = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    check(&file)?;
    Ok(Some(file))
}

fn check(file: &File) -> Result<(), String> {
    if file.version != VERSION {
        return Err(format!("it is of version {}, and this build knows version {VERSION}", file.version));
    }
    if file.keys.len() > MAX_KEYS {
        return Err(format!("it has more than {MAX_KEYS} keys"));
    }
    for (i, key) in file.keys.iter().enumerate() {
        let wrong = |what: &str| Err(format!("key {} {what}", key.key_id));
        if check_id(&key.name).is_err() {
            return wrong("has a name that no key can have");
        }
        if key.scopes.is_empty() {
            return wrong("has no scope");
        }
        if [key.limits.max_concurrent, key.limits.rate].contains(&Some(0)) {
            return wrong("has a limit of 0");
        }
        if file.keys[..i].iter().any(|other| other.key_id == key.key_id || other.digest == key.digest) {
            return wrong("stands twice");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(name: &str, limits: KeyLimits) -> KeyCreate {
        let digest = Sha256::digest(name.as_bytes());
        KeyCreate {
            name: name.into(),
            digest: Hex(std::array::from_fn(|i| digest[i])),
            scopes: vec![Scope::Inference],
            limits,
        }
    }

    fn shows(keys: &Keys, secret: &str) -> Option<Caller> {
        keys.who(&Sha256::digest(secret.as_bytes()).into())
    }

    #[test]
    fn keys_outlive_the_queen_until_they_are_revoked() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.json");
        let keys = Keys::open(&file).unwrap();
        assert!(!file.exists(), "nothing is written before there is a key");
        let limits = KeyLimits { max_concurrent: Some(2), rate: Some(60) };
        let made: Vec<KeyView> = ["a", "b"].map(|name| keys.create(new(name, limits), 5).unwrap()).into();
        assert_eq!(
            keys.create(new("a", limits), 6).unwrap_err().code,
            ErrorCode::InvalidRequest,
            "one digest, one key"
        );
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Keys::open(&file).unwrap();
        assert_eq!(again.list(), made);
        let caller = shows(&again, "a").unwrap();
        assert_eq!(caller, Caller::Key { id: made[0].key_id.clone(), scopes: vec![Scope::Inference] });
        assert_eq!(shows(&again, "c"), None);
        let tenant = |keys: &Keys| keys.of(&caller).unwrap().unwrap().tenant();
        assert_eq!(tenant(&again), tenant(&keys));
        again.revoke(&made[0].key_id).unwrap();
        assert_eq!((shows(&again, "a"), again.of(&caller).unwrap_err().code), (None, ErrorCode::Unauthorized));
        assert_eq!(again.revoke(&made[0].key_id).unwrap_err().code, ErrorCode::KeyNotFound);
        assert_eq!(Keys::open(&file).unwrap().list(), made[1..]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_file_that_is_not_right_opens_no_door_and_stops_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.json");
        Keys::open(&file).unwrap().create(new("a", KeyLimits::default()), 5).unwrap();
        let good = fs::read_to_string(&file).unwrap();
        let whole: serde_json::Value = serde_json::from_str(&good).unwrap();
        let changed = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut value = whole.clone();
            change(&mut value);
            value.to_string()
        };
        let twin = whole["keys"][0].clone();
        let many: Vec<_> = (0..=MAX_KEYS)
            .map(|i| {
                let mut key = twin.clone();
                (key["key_id"], key["digest"]) = (json!(format!("k{i}")), json!(format!("{i:064x}")));
                key
            })
            .collect();
        for (text, want) in [
            (String::new(), "EOF"),
            (good[..good.len() / 2].to_owned(), "EOF"),
            ("[]".into(), "invalid"),
            (changed(&|v| v["version"] = json!(2)), "version 2"),
            (changed(&|v| v["more"] = json!(1)), "more"),
            (changed(&|v| v["secret"] = json!("00")), "hexadecimal"),
            (changed(&|v| v["keys"][0]["digest"] = json!("x")), "hexadecimal"),
            (changed(&|v| v["keys"][0]["scopes"] = json!(["king"])), "king"),
            (changed(&|v| v["keys"][0]["scopes"] = json!([])), "no scope"),
            (changed(&|v| v["keys"][0]["rate"] = json!(0)), "limit of 0"),
            (changed(&|v| v["keys"][0]["name"] = json!("a\nb")), "name"),
            (changed(&|v| v["keys"] = json!([twin, twin])), "twice"),
            (changed(&|v| v["keys"] = json!(many)), "more than 1024"),
            (" ".repeat(MAX_FILE as usize + 1), "larger"),
        ] {
            fs::write(&file, &text).unwrap();
            let error = Keys::open(&file).unwrap_err();
            let start: String = text.chars().take(60).collect();
            assert!(error.message.contains(want) && error.message.contains("keys.json"), "{start}: {error}");
            assert!(error.hint.is_some());
        }
        fs::write(&file, &good).unwrap();
        assert_eq!(Keys::open(&file).unwrap().list().len(), 1);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Keys::open(&file).unwrap_err().message.contains("chmod 600"));
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/null", &file).unwrap();
        assert!(Keys::open(&file).unwrap_err().message.contains("regular"));
    }

    #[test]
    fn what_cannot_be_written_is_not_made_and_what_is_revoked_is_closed_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.json");
        let keys = Keys::open(&file).unwrap();
        let made = keys.create(new("a", KeyLimits::default()), 5).unwrap();
        // A folder in the way of the new file.
        let aside = folder.path().join("keys.json.new");
        fs::create_dir(&aside).unwrap();
        assert!(keys.create(new("b", KeyLimits::default()), 5).unwrap_err().message.contains("not made"));
        assert_eq!(shows(&keys, "b"), None);
        assert!(keys.revoke(&made.key_id).unwrap_err().message.contains("is closed"));
        assert_eq!(shows(&keys, "a"), None);
        fs::remove_dir(&aside).unwrap();
        keys.revoke(&made.key_id).unwrap();
        assert_eq!(Keys::open(&file).unwrap().list(), []);
    }

    #[test]
    fn a_rate_is_a_bucket_of_a_minute_and_a_refusal_says_when() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(&folder.path().join("keys.json")).unwrap();
        keys.create(new("a", KeyLimits { rate: Some(3), max_concurrent: None }), 5).unwrap();
        let key = keys.of(&shows(&keys, "a").unwrap()).unwrap().unwrap();
        let at =
            |ms: u64| key.admit(Duration::from_millis(ms)).map(drop).map_err(|error| error.retry_after_ms.unwrap());
        for ms in [1000, 1000, 1000] {
            assert_eq!(at(ms), Ok(()));
        }
        assert_eq!(at(1000), Err(20_000));
        assert_eq!(at(20_900), Err(100));
        assert_eq!(at(21_000), Ok(()), "a refusal costs nothing");
        assert_eq!(at(21_000), Err(20_000));
        for ms in [200_000, 200_000, 200_000] {
            assert_eq!(at(ms), Ok(()), "a long rest fills it, and no more");
        }
        assert_eq!(at(200_000), Err(20_000));
    }

    #[test]
    fn many_at_once_are_never_more_than_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(&folder.path().join("keys.json")).unwrap();
        keys.create(new("a", KeyLimits { max_concurrent: Some(7), rate: None }), 5).unwrap();
        let key = keys.of(&shows(&keys, "a").unwrap()).unwrap().unwrap();
        let permits: Vec<Permit> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..64)
                .map(|_| scope.spawn(|| (0..50).filter_map(|_| key.admit(Duration::ZERO).ok()).collect::<Vec<_>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!((permits.len(), keys.list()[0].running), (7, 7));
        drop(permits);
        assert_eq!(keys.list()[0].running, 0);
        assert!(key.admit(Duration::ZERO).is_ok());
    }
}
