//! Settings: flags over environment over `config.toml` over defaults.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use rbee_wire::{KeepAlive, ModelRef};

use crate::home::Home;

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag of the command line.
    Flag,
    /// An environment variable.
    Env,
    /// `config.toml`.
    File,
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Flag => "flag",
            Self::Env => "environment",
            Self::File => "config.toml",
            Self::Default => "default",
        })
    }
}

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it came from.
    pub origin: Origin,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is there and cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{} is not valid TOML", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The file has a key that nothing reads.
    #[error("{} has the unknown key `{key}`; the keys are {known}", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Those there are.
        known: String,
    },
    /// A value is not what its key takes.
    #[error("`{key}` from {origin} {problem}")]
    Value {
        /// The key.
        key: &'static str,
        /// Where the value came from.
        origin: Origin,
        /// What is wrong.
        problem: String,
    },
}

/// What flags set; a key that stands here wins.
#[derive(Clone, Debug, Default)]
pub struct Overrides(BTreeMap<&'static str, String>);

impl Overrides {
    /// Takes a flag's value, if it was given. The key must be one of [`KEYS`].
    pub fn set(&mut self, key: &'static str, value: Option<impl ToString>) {
        debug_assert!(KEYS.iter().any(|known| known.name == key), "{key} is no key");
        if let Some(value) = value {
            self.0.insert(key, value.to_string());
        }
    }
}

/// One key of the settings, for the reference.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name in `config.toml`.
    pub name: &'static str,
    /// Its environment variable.
    pub env: &'static str,
    /// Its default, as text.
    pub default: &'static str,
    /// What it means.
    pub about: &'static str,
    /// Whether its value must not be shown.
    pub secret: bool,
}

/// One line of `rbee config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The key.
    pub key: &'static str,
    /// The value as text; `***` for a secret that is set.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

/// How a value is read from text and shown as text.
trait Value: Sized {
    fn read(text: &str) -> Result<Self, String>;
    fn show(&self) -> String;
}

macro_rules! parsed_value {
    ($($type:ty: $what:literal),*) => {$(
        impl Value for $type {
            fn read(text: &str) -> Result<Self, String> {
                text.parse().map_err(|_| concat!("must be ", $what).to_owned())
            }
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

parsed_value!(SocketAddr: "an address such as 127.0.0.1:7833", u64: "a whole number", u32: "a whole number", KeepAlive: "seconds, -1, or a text such as 5m", String: "a text");

impl Value for Option<String> {
    fn read(text: &str) -> Result<Self, String> {
        Ok((!text.is_empty()).then(|| text.to_owned()))
    }
    fn show(&self) -> String {
        self.clone().unwrap_or_default()
    }
}

impl Value for Option<ModelRef> {
    fn read(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|error| format!("is not a model reference: {error}"))
    }
    fn show(&self) -> String {
        self.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

impl Value for Vec<PathBuf> {
    fn read(text: &str) -> Result<Self, String> {
        let paths: Self = text.split([':', '\n']).filter(|part| !part.is_empty()).map(PathBuf::from).collect();
        if paths.iter().all(|path| path.is_absolute()) { Ok(paths) } else { Err("must be absolute paths".into()) }
    }
    fn show(&self) -> String {
        self.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(":")
    }
}

impl Value for Vec<String> {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text.split([',', '\n']).map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect())
    }
    fn show(&self) -> String {
        self.join(",")
    }
}

macro_rules! settings {
    ($($name:ident: $type:ty = $default:literal, $env:literal, $secret:literal, $about:literal;)*) => {
        /// The merged settings.
        #[derive(Clone, Debug)]
        pub struct Settings {
            $(#[doc = $about] pub $name: Setting<$type>,)*
            /// Names for models, from the file's table `aliases`.
            pub aliases: BTreeMap<String, ModelRef>,
        }

        /// Every key, in the order of the reference.
        pub const KEYS: &[Key] = &[$(Key { name: stringify!($name), env: $env, default: $default, about: $about, secret: $secret },)*];

        impl Settings {
            fn merge(sources: &Sources<'_>, aliases: BTreeMap<String, ModelRef>) -> Result<Self, ConfigError> {
                Ok(Self { $($name: sources.get(stringify!($name), $env, $default)?,)* aliases })
            }

            /// The settings as lines for people; secrets are not shown.
            pub fn rows(&self) -> Vec<Row> {
                let shown = |text: String, secret: bool| if secret && !text.is_empty() { "***".into() } else { text };
                vec![$(Row {
                    key: stringify!($name), value: shown(self.$name.value.show(), $secret), origin: self.$name.origin,
                },)*]
            }
        }
    };
}

settings! {
    queen_bind: SocketAddr = "127.0.0.1:7833", "RBEE_QUEEN_BIND", false, "where the queen listens; beyond loopback only with a token";
    hive_bind: SocketAddr = "127.0.0.1:7835", "RBEE_HIVE_BIND", false, "where the hive listens; beyond loopback only with a token";
    queen_url: String = "http://127.0.0.1:7833", "RBEE_QUEEN_URL", false, "the queen that the command line and the hive talk to";
    token: Option<String> = "", "RBEE_TOKEN", true, "the bearer that every route asks for, liveness excepted";
    default_model: Option<ModelRef> = "", "RBEE_DEFAULT_MODEL", false, "the model when none is named";
    model_dirs: Vec<PathBuf> = "", "RBEE_MODEL_DIRS", false, "folders from which models may be named by path when a token is set";
    policy: String = "first-available", "RBEE_POLICY", false, "which worker gets a job: first-available, least-loaded, or fastest, by rates as measured";
    queue_limit: u64 = "256", "RBEE_QUEUE_LIMIT", false, "jobs that may wait for a worker";
    queue_timeout_ms: u64 = "600000", "RBEE_QUEUE_TIMEOUT_MS", false, "most milliseconds a job may wait for a worker";
    job_grace_ms: u64 = "10000", "RBEE_JOB_GRACE_MS", false, "milliseconds a job goes on without a listener";
    job_kept_ms: u64 = "300000", "RBEE_JOB_KEPT_MS", false, "milliseconds a job's log is kept after its end";
    job_log_bytes: u64 = "67108864", "RBEE_JOB_LOG_BYTES", false, "bytes of job logs kept in all";
    slots: u32 = "8", "RBEE_SLOTS", false, "requests that one worker generates for at once, unless the spawn says otherwise";
    cpu_memory_bytes: u64 = "0", "RBEE_CPU_MEMORY_BYTES", false, "most bytes of this machine's memory that models may have; 0 is all that is free";
    disk_budget_bytes: u64 = "0", "RBEE_DISK_BUDGET_BYTES", false, "most bytes that the store of models may have on the disk; 0 is what the disk has";
    hub_mirrors: Vec<String> = "", "RBEE_HUB_MIRRORS", false, "origins such as http://10.0.0.5:8000, with commas between, that a hub may redirect downloads to although they are private";
    keep_alive: KeepAlive = "5m", "RBEE_KEEP_ALIVE", false, "how long a model that was loaded on demand stays when nobody uses it: `5m`, seconds, 0, or -1 for ever";
    residency_ms: u64 = "5000", "RBEE_RESIDENCY_MS", false, "least milliseconds that a model stays before it leaves for another";
    drain_ms: u64 = "30000", "RBEE_DRAIN_MS", false, "most milliseconds that a stopping daemon lets its jobs finish";
    log: String = "info", "RBEE_LOG", false, "what is logged: error, warn, info, debug, trace, or a filter";
}

struct Sources<'a> {
    flags: &'a Overrides,
    env: &'a dyn Fn(&str) -> Option<String>,
    file: BTreeMap<String, String>,
}

impl Sources<'_> {
    fn get<T: Value>(&self, key: &'static str, env: &str, default: &str) -> Result<Setting<T>, ConfigError> {
        let (text, origin) = if let Some(text) = self.flags.0.get(key) {
            (text.clone(), Origin::Flag)
        } else if let Some(text) = (self.env)(env).filter(|text| !text.is_empty()) {
            (text, Origin::Env)
        } else if let Some(text) = self.file.get(key) {
            (text.clone(), Origin::File)
        } else {
            (default.to_owned(), Origin::Default)
        };
        let value = T::read(&text).map_err(|problem| ConfigError::Value { key, origin, problem })?;
        Ok(Setting { value, origin })
    }
}

impl Settings {
    /// Merges all sources.
    ///
    /// # Errors
    /// [`ConfigError`] when the file cannot be read, has an unknown key, or a value does not fit.
    pub fn load(home: &Home, flags: &Overrides, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let path = home.config_file();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        let table: toml::Table =
            text.parse().map_err(|source| ConfigError::Syntax { path: path.clone(), source: Box::new(source) })?;
        let mut file = BTreeMap::new();
        let mut aliases = BTreeMap::new();
        for (key, value) in table {
            match (key.as_str(), value) {
                ("aliases", toml::Value::Table(table)) => {
                    for (name, model) in table {
                        let model = model.as_str().and_then(|text| text.parse::<ModelRef>().ok());
                        let model = model.filter(|model| !matches!(model, ModelRef::Alias(_)));
                        let model = model.ok_or_else(|| ConfigError::Value {
                            key: "aliases",
                            origin: Origin::File,
                            problem: format!("maps `{name}` to something that is no model reference"),
                        })?;
                        aliases.insert(name, model);
                    }
                }
                (name, value) if KEYS.iter().any(|known| known.name == name) => {
                    let text = match value {
                        toml::Value::String(text) => text,
                        toml::Value::Array(items) => {
                            items.iter().filter_map(toml::Value::as_str).collect::<Vec<_>>().join("\n")
                        }
                        other => other.to_string(),
                    };
                    file.insert(key, text);
                }
                _ => {
                    let known = KEYS.iter().map(|known| known.name).collect::<Vec<_>>().join(", ");
                    return Err(ConfigError::UnknownKey { path, key, known: format!("{known}, aliases") });
                }
            }
        }
        Self::merge(&Sources { flags, env, file }, aliases)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, flags: &Overrides, env: &[(&str, &str)]) -> Result<Settings, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::under(folder.path());
        home.create().unwrap();
        std::fs::write(home.config_file(), file).unwrap();
        Settings::load(&home, flags, &|name| env.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned()))
    }

    #[test]
    fn flag_wins_over_environment_over_file_over_default() {
        let file = "queue_limit = 7\nslots = 3\nqueue_timeout_ms = 5\n[aliases]\nsmall = \"org/name\"\n";
        let mut flags = Overrides::default();
        flags.set("queue_limit", Some(9));
        let settings = load(file, &flags, &[("RBEE_QUEUE_LIMIT", "8"), ("RBEE_SLOTS", "4")]).unwrap();
        assert_eq!((settings.queue_limit.value, settings.queue_limit.origin), (9, Origin::Flag));
        assert_eq!((settings.slots.value, settings.slots.origin), (4, Origin::Env));
        assert_eq!((settings.queue_timeout_ms.value, settings.queue_timeout_ms.origin), (5, Origin::File));
        assert_eq!(settings.job_grace_ms.origin, Origin::Default);
        assert_eq!(settings.aliases["small"].to_string(), "org/name");
    }

    #[test]
    fn what_nothing_reads_or_understands_is_refused() {
        for (file, want) in [
            ("quue_limit = 1", "unknown key `quue_limit`"),
            ("queue_limit = \"many\"", "`queue_limit` from config.toml must be a whole number"),
            ("queue_limit = ", "not valid TOML"),
            ("[aliases]\nx = 5", "maps `x`"),
            ("model_dirs = [\"relative\"]", "must be absolute paths"),
        ] {
            let error = load(file, &Overrides::default(), &[]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let settings = load("", &Overrides::default(), &[("RBEE_TOKEN", "s3cret")]).unwrap();
        assert_eq!(settings.rows().iter().find(|row| row.key == "token").unwrap().value, "***");
    }
}
