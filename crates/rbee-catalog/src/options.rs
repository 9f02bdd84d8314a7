//! Where the store is, which hub it fills itself from, and with which limits.
//!
//! The variables are those of the Hub's own tools and mean the same.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;

use crate::error::Error;

/// The public hub.
const HUB: &str = "https://huggingface.co";

/// A secret that is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token, without the white space around it; `None` when it is empty or could not be a header's value.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty() && text.len() <= 4096 && text.bytes().all(|b| b.is_ascii_graphic()))
            .then(|| Self(text.to_owned()))
    }

    pub(crate) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Which proxy a request takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    /// For `http` targets.
    pub http: Option<Url>,
    /// For `https` targets.
    pub https: Option<Url>,
    /// Hosts that are reached without one, as `NO_PROXY` lists them.
    pub none_for: Option<String>,
}

impl Proxies {
    fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let read = |name: &str| env(&name.to_ascii_lowercase()).or_else(|| env(name)).filter(|text| !text.is_empty());
        let proxy = |name: &str| {
            let text = read(name).or_else(|| read("ALL_PROXY"))?;
            let text = if text.contains("://") { text } else { format!("http://{text}") };
            Url::parse(&text).ok()
        };
        Self { http: proxy("HTTP_PROXY"), https: proxy("HTTPS_PROXY"), none_for: read("NO_PROXY") }
    }
}

/// How a store works. [`Options::from_env`] makes the usual one.
#[derive(Clone, Debug)]
pub struct Options {
    /// The hub cache's folder, with `models--org--name` in it.
    pub hub: PathBuf,
    /// The hub's address.
    pub endpoint: Url,
    /// Shown to the endpoint's own origin and to no other.
    pub token: Option<Token>,
    /// Whether no request may be made at all.
    pub offline: Offline,
    /// Origins (`http://host:port`) that a redirect may lead to although their addresses are private ones, or
    /// without TLS: mirrors in the own network.
    pub trusted_origins: Vec<Url>,
    /// Proxies that requests take, but never those to a loopback address.
    pub proxies: Proxies,
    /// Most bytes that the whole store may take; `None`: what the disk has.
    pub disk_budget: Option<u64>,
    /// Bytes of the disk that are left free.
    pub reserve: u64,
    /// Time to get a connection.
    pub connect_timeout: Duration,
    /// Silence, or less than 1 KiB/s on average over this time, that ends a transfer.
    pub stall_timeout: Duration,
    /// First pause before a request is made again; later ones are up to 16 times as long.
    pub backoff: Duration,
}

/// Whether requests may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offline {
    /// None: `HF_HUB_OFFLINE` is set.
    Yes,
    /// They may.
    No,
}

impl Options {
    /// The usual limits for a store in this folder.
    ///
    /// # Errors
    /// [`Error::Endpoint`] when the address is none of a hub.
    pub fn new(hub: impl Into<PathBuf>, endpoint: &str) -> Result<Self, Error> {
        Ok(Self {
            hub: hub.into(),
            endpoint: parse_endpoint(endpoint)?,
            token: None,
            offline: Offline::No,
            trusted_origins: Vec::new(),
            proxies: Proxies::default(),
            disk_budget: None,
            reserve: 64 << 20,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            backoff: Duration::from_millis(500),
        })
    }

    /// What the environment says: `HF_HUB_CACHE`, `HF_HOME`, `RBEE_HOME`, `XDG_CACHE_HOME`, `HOME` for the folder,
    /// in this order, then `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_DISABLE_IMPLICIT_TOKEN`,
    /// `HF_HUB_OFFLINE` and the usual names of proxies.
    ///
    /// # Errors
    /// [`Error::NoHome`] when nothing names a folder, [`Error::Endpoint`].
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let env = |name: &str| env(name).filter(|text| !text.is_empty());
        let user = env("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        let expand = |text: String| match (text.strip_prefix("~/"), &user) {
            (Some(rest), Some(user)) => user.join(rest),
            _ => PathBuf::from(text),
        };
        let user_cache = || {
            let xdg = env("XDG_CACHE_HOME").map(expand);
            Some(xdg.or_else(|| Some(user.as_ref()?.join(".cache")))?.join("huggingface"))
        };
        let hf_home = env("HF_HOME").map(expand);
        let rbee_home = env("RBEE_HOME").map(|root| Path::new(&root).join("cache/huggingface"));
        let home = hf_home.or(rbee_home).or_else(user_cache);
        let below = |name: &str| Some(home.as_ref()?.join(name));
        let hub = env("HF_HUB_CACHE").map(expand).or_else(|| below("hub")).ok_or(Error::NoHome)?;
        if !hub.is_absolute() {
            return Err(Error::NoHome);
        }
        let mut options = Self::new(hub, env("HF_ENDPOINT").as_deref().unwrap_or(HUB))?;
        options.token = env("HF_TOKEN").or_else(|| env("HUGGING_FACE_HUB_TOKEN")).as_deref().and_then(Token::new);
        if options.token.is_none() && !env("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|text| is_true(&text)) {
            let file = env("HF_TOKEN_PATH").map(expand).or_else(|| below("token"));
            options.token = file.and_then(|file| read_token(&file));
        }
        if ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].iter().any(|name| env(name).is_some_and(|text| is_true(&text))) {
            options.offline = Offline::Yes;
        }
        options.proxies = Proxies::from_env(&env);
        Ok(options)
    }
}

fn parse_endpoint(text: &str) -> Result<Url, Error> {
    let wrong = |problem: &str| Error::Endpoint { endpoint: crate::names::shown(text), problem: problem.to_owned() };
    let mut url = Url::parse(text.trim_end_matches('/')).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(wrong("it is neither http nor https"));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("it has more than a host and a path; a token goes into HF_TOKEN"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

fn is_true(text: &str) -> bool {
    matches!(text.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

fn read_token(path: &Path) -> Option<Token> {
    let facts = std::fs::metadata(path).ok()?;
    if !facts.is_file() || facts.len() > 4096 {
        return None;
    }
    Token::new(&std::fs::read_to_string(path).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Options {
        let env = |name: &str| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
        Options::from_env(&env).unwrap()
    }

    #[test]
    fn the_first_variable_that_is_set_names_the_folder() {
        let all =
            [("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h"), ("RBEE_HOME", "/r"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/u")];
        let want = ["/c", "/h/hub", "/r/cache/huggingface/hub", "/x/huggingface/hub", "/u/.cache/huggingface/hub"];
        for (skip, want) in want.iter().enumerate() {
            assert_eq!(from(&all[skip..]).hub, Path::new(want));
        }
        assert_eq!(from(&[("HF_HOME", "~/h"), ("HOME", "/u")]).hub, Path::new("/u/h/hub"));
        assert!(matches!(Options::from_env(&|_| None), Err(Error::NoHome)));
    }

    #[test]
    fn the_token_comes_from_where_the_hubs_tools_look() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        std::fs::write(folder.path().join("token"), "from-file\n").unwrap();
        let token = |pairs: &[(&str, &str)]| from(pairs).token.map(|token| token.secret().to_owned());
        assert_eq!(token(&[("HF_HOME", home)]).as_deref(), Some("from-file"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", " from-env ")]).as_deref(), Some("from-env"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let path = format!("{home}/token");
        assert_eq!(token(&[("HOME", "/nowhere"), ("HF_TOKEN_PATH", &path)]).as_deref(), Some("from-file"));
        assert!(!format!("{:?}", from(&[("HF_HOME", home)])).contains("from-file"));
        assert_eq!(Token::new("a\nb"), None);
    }

    #[test]
    fn an_endpoint_is_an_address_and_nothing_else() {
        for text in ["", "hub", "ftp://x", "https://user:pass@x", "https://x?token=y", "file:///etc"] {
            assert!(Options::new("/h", text).is_err(), "{text}");
        }
        assert_eq!(Options::new("/h", "https://x/mirror/").unwrap().endpoint.path(), "/mirror");
        assert_eq!(from(&[("HOME", "/u"), ("HF_HUB_OFFLINE", "1")]).offline, Offline::Yes);
        assert_eq!(from(&[("HOME", "/u"), ("HF_HUB_OFFLINE", "0")]).offline, Offline::No);
    }
}
