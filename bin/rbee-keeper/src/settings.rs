//! What every command knows before it runs: flags, environment and `config.toml` merged, the queen's
//! address, and how to print. The environment is read here and nowhere else.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use rbee_client::{HiveClient, QueenClient};
use rbee_config::{Home, Origin, Overrides, Settings};
use rbee_wire::JobId;

use crate::cli::Global;
use crate::exit::Failure;
use crate::printer::Printer;

/// What every command knows before it runs.
#[derive(Debug)]
pub struct Context {
    /// The folders of this installation.
    pub home: Home,
    /// The merged settings.
    pub settings: Settings,
    /// Where the queen is.
    pub queen: Address,
    /// What to show to it.
    pub api_key: Option<String>,
    /// Whether daemons may be started.
    pub start: AutoStart,
    /// How to print.
    pub printer: Printer,
    /// The user's own folder, for `~/`.
    pub user: Option<PathBuf>,
    /// The job that Ctrl-C or a reader that leaves must cancel.
    pub current: RefCell<Option<(QueenClient, JobId)>>,
    /// What Ctrl-C ends.
    pub ctrl_c: Cell<CtrlC>,
}

/// What Ctrl-C ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtrlC {
    /// The program.
    Program,
    /// What the command under way makes of it: an answer, a line.
    Part,
}

/// Whether daemons may be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoStart {
    /// Where a verb needs them.
    Allowed,
    /// `--no-start`.
    Never,
}

impl Context {
    /// Merges flags, environment and file.
    ///
    /// # Errors
    /// When no home can be named, or a setting is wrong: a usage error.
    pub fn new(global: &Global, printer: Printer, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let home = Home::from_env(env).map_err(|error| Failure::usage(error.to_string()))?;
        let mut flags = Overrides::default();
        flags.set("queen_url", global.queen.as_ref());
        let settings = Settings::load(&home, &flags, env)?;
        // Who moved the queen's own port and named no other queen means that one.
        let queen = if settings.queen_url.origin == Origin::Default {
            Address::of(settings.queen_bind.value)
        } else {
            Address::parse(&settings.queen_url.value)?
        };
        let key = global.api_key.clone().or_else(|| env("RBEE_API_KEY").filter(|key| !key.is_empty()));
        // This machine's own token is shown to this machine only.
        let api_key = key.or_else(|| queen.loopback.then(|| settings.token.value.clone()).flatten());
        let start = if global.no_start { AutoStart::Never } else { AutoStart::Allowed };
        let user = env("HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        Ok(Self {
            home,
            settings,
            queen,
            api_key,
            start,
            printer,
            user,
            current: RefCell::new(None),
            ctrl_c: Cell::new(CtrlC::Program),
        })
    }

    /// A client of the queen.
    pub fn queen_client(&self) -> QueenClient {
        QueenClient::new(&self.queen.url, self.api_key.clone())
    }

    /// Where this machine's hive listens.
    pub fn local_hive(&self) -> Address {
        Address::of(self.settings.hive_bind.value)
    }

    /// A client of the hive at this address. Hives know the site's token and no keys: this machine's own hive is shown the
    /// token where there is one.
    pub fn hive_client(&self, url: &str) -> HiveClient {
        let own = Address::parse(url).is_ok_and(|at| at.loopback);
        let token = own.then(|| self.settings.token.value.clone()).flatten();
        HiveClient::new(url, token.or_else(|| self.api_key.clone()))
    }

    /// The log of a daemon of this home: `queen` or `hive`.
    pub fn log_file(&self, daemon: &str) -> PathBuf {
        self.home.state.join(format!("{daemon}.log"))
    }

    /// Where a daemon's own stdout and stderr go: what it says before it has a log, and last.
    pub fn out_file(&self, daemon: &str) -> PathBuf {
        self.home.state.join(format!("{daemon}.out.log"))
    }
}

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `http://HOST:PORT`.
    pub url: String,
    /// The host without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Whether it can only be this machine.
    pub loopback: bool,
}

impl Address {
    /// The address at which one can reach who listens there.
    pub fn of(bind: SocketAddr) -> Self {
        let ip = match bind.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let bind = SocketAddr::new(ip, bind.port());
        Self { url: format!("http://{bind}"), host: ip.to_string(), port: bind.port(), loopback: ip.is_loopback() }
    }

    /// Reads `http://HOST[:PORT]`.
    ///
    /// # Errors
    /// A usage error when it is not that.
    pub fn parse(url: &str) -> Result<Self, Failure> {
        let wrong = || {
            Failure::usage(format!("`{url}` is not a queen's address"))
                .hint("write it as http://HOST:PORT, for instance http://127.0.0.1:7833")
        };
        let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains(['/', '?', '#', '@', '\\']) || rest.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(wrong());
        }
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
                host.parse::<Ipv6Addr>().map_err(|_| wrong())?;
                (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(wrong)?) })
            }
            None => match rest.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        let port = match port {
            Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => port.parse().map_err(|_| wrong())?,
            Some(_) => return Err(wrong()),
            None => 80,
        };
        if host.is_empty() || port == 0 {
            return Err(wrong());
        }
        let loopback =
            host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let shown = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        Ok(Self { url: format!("http://{shown}:{port}"), host: host.to_owned(), port, loopback })
    }

    /// What a daemon must bind to in order to be found here.
    pub fn bind(&self) -> SocketAddr {
        let ip = self.host.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        SocketAddr::new(ip, self.port)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::printer::Printer;

    #[test]
    fn an_address_is_read_and_its_loopback_recognised() {
        for (text, want) in [
            ("http://127.0.0.1:7833", Some(("http://127.0.0.1:7833", true))),
            ("http://localhost:1/", Some(("http://localhost:1", true))),
            ("http://[::1]:9", Some(("http://[::1]:9", true))),
            ("http://box.lan", Some(("http://box.lan:80", false))),
            ("http://127.0.0.1.evil.example:7833", Some(("http://127.0.0.1.evil.example:7833", false))),
            ("https://box:1", None),
            ("127.0.0.1:7833", None),
            ("http://:7833", None),
            ("http://a:0", None),
            ("http://a:70000", None),
            ("http://a:+1", None),
            ("http://user@127.0.0.1:7833", None),
            ("http://127.0.0.1:7833/path", None),
        ] {
            let got = Address::parse(text).ok();
            assert_eq!(got.as_ref().map(|a| (a.url.as_str(), a.loopback)), want, "{text}");
        }
    }

    #[test]
    fn flag_wins_over_environment_and_a_moved_port_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_str().unwrap().to_owned();
        let url = |queen: Option<&str>, pairs: &[(&str, &str)]| {
            let env = |name: &str| {
                let pair = pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
                pair.or_else(|| (name == "RBEE_HOME").then(|| root.clone()))
            };
            let global = Global { queen: queen.map(str::to_owned), ..Global::default() };
            Context::new(&global, Printer::new(&global, &env), &env).map(|context| (context.queen.url, context.api_key))
        };
        let at = |queen, pairs: &[_]| url(queen, pairs).unwrap().0;
        assert_eq!(at(None, &[]), "http://127.0.0.1:7833");
        assert_eq!(at(None, &[("RBEE_QUEEN_BIND", "0.0.0.0:9")]), "http://127.0.0.1:9");
        assert_eq!(at(None, &[("RBEE_QUEEN_URL", "http://a:1"), ("RBEE_QUEEN_BIND", "0.0.0.0:9")]), "http://a:1");
        assert_eq!(at(Some("http://b:2"), &[("RBEE_QUEEN_URL", "http://a:1")]), "http://b:2");
        let key = |queen, pairs: &[_]| url(queen, pairs).unwrap().1;
        assert_eq!(key(None, &[("RBEE_TOKEN", "own")]).as_deref(), Some("own"));
        assert_eq!(key(Some("http://b:2"), &[("RBEE_TOKEN", "own")]), None);
        assert_eq!(key(Some("http://b:2"), &[("RBEE_API_KEY", "k")]).as_deref(), Some("k"));
        assert!(!Path::new(&root).join("run").exists(), "reading the settings makes no folders");
        assert_eq!(url(Some("nonsense"), &[]).unwrap_err().exit.code(), 2);
    }
}
