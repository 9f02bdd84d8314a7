//! The one way a request leaves this crate: targets judged, redirects followed by hand, the token shown to one origin,
//! every wait and every body bounded.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Client, Response, Url};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::error::Error;
use crate::guard::{self, PublicResolver, Target};
use crate::options::{Options, Proxies};

/// Most redirects of one request.
const MAX_HOPS: usize = 5;

/// How often a request is tried that brings nothing.
pub(crate) const TRIES: u32 = 5;

/// Tries to reach a host at all.
const AWAY_TRIES: u32 = 2;

/// Longest wait that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Fewest bytes per second, on average over the stall timeout.
const FEWEST: f64 = 1024.0;

/// Makes requests to one hub and to where it redirects.
#[derive(Clone, Debug)]
pub(crate) struct Fetcher {
    pub(crate) options: Arc<Options>,
    /// For the endpoint and the listed origins.
    trusted: Client,
    /// For all others.
    public: Client,
}

/// Why a request brought nothing.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// No use to try again.
    Final(Error),
    /// An answer that is no success.
    Status { status: u16, code: Option<String>, retry_after: Option<Duration> },
    /// No connection, or it broke.
    Broken(reqwest::Error),
    /// Too little for too long.
    Stalled,
    /// The answer has less than was asked for, or something else.
    Short,
}

impl Trouble {
    /// Whether the same request may bring more.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Final(_) | Self::Stalled => false,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            Self::Broken(error) => !error.is_builder(),
            Self::Short => true,
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

impl Fetcher {
    /// Reads the system's certificates, which takes some milliseconds.
    ///
    /// # Errors
    /// [`Error::Tls`].
    pub(crate) fn new(options: Arc<Options>) -> Result<Self, Error> {
        let hosts = [&options.proxies.http, &options.proxies.https].into_iter().flatten();
        let hosts = hosts.filter_map(|proxy| proxy.host_str().map(str::to_owned)).collect();
        let tls = tls(&options)?;
        let client = |resolver: Option<PublicResolver>| {
            let mut builder = Client::builder()
                .user_agent(concat!("rbee/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(options.connect_timeout)
                .tcp_nodelay(true)
                .tls_backend_preconfigured(tls.clone())
                .no_proxy();
            if let Some(resolver) = resolver {
                builder = builder.dns_resolver(resolver);
            }
            for proxy in proxies(&options)? {
                builder = builder.proxy(proxy);
            }
            builder.build()
        };
        let failed = |error: reqwest::Error| Error::Tls { problem: error.to_string() };
        let public = client(Some(PublicResolver { proxies: hosts })).map_err(failed)?;
        Ok(Self { trusted: client(None).map_err(failed)?, public, options })
    }

    /// One request with its redirects. The answer is a success (2xx), and comes with where it came from.
    ///
    /// # Errors
    /// Why not.
    pub(crate) async fn get(&self, url: &Url, range: Option<(u64, u64)>) -> Result<(Response, Url), Trouble> {
        let mut url = url.clone();
        for _ in 0..=MAX_HOPS {
            let client = match guard::judge(&self.options, &url).map_err(Trouble::Final)? {
                Target::Trusted => &self.trusted,
                Target::Public => &self.public,
            };
            let mut request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let (Some(token), true) = (&self.options.token, guard::is_endpoint(&self.options, &url)) {
                request = request.bearer_auth(token.secret());
            }
            if let Some((first, last)) = range {
                request = request.header(RANGE, format!("bytes={first}-{last}"));
            }
            let limit = self.options.connect_timeout + self.options.stall_timeout;
            let response = match timeout(limit, request.send()).await {
                Err(_) => return Err(Trouble::Stalled),
                Ok(Err(error)) => return Err(refused_address(&url, error)),
                Ok(Ok(response)) => response,
            };
            let status = response.status();
            if status.is_success() {
                if response.headers().get(CONTENT_ENCODING).is_some_and(|kind| kind != "identity") {
                    return Err(Trouble::Final(self.bad("an answer", "it is compressed, which was not asked for")));
                }
                return Ok((response, url));
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            match location {
                Some(location) if matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) => {
                    url = url.join(location).map_err(|_| {
                        Trouble::Final(Error::RefusedTarget {
                            url: guard::origin(&url),
                            problem: "it redirects to no address".to_owned(),
                        })
                    })?;
                    url.set_fragment(None);
                }
                _ => {
                    let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
                    return Err(Trouble::Status {
                        status: status.as_u16(),
                        code: code.map(str::to_owned),
                        retry_after: retry_after(response.headers()),
                    });
                }
            }
        }
        let problem = format!("more than {MAX_HOPS} redirects");
        Err(Trouble::Final(Error::RefusedTarget { url: guard::origin(&url), problem }))
    }

    /// A JSON answer of at most `most` bytes, with its headers; tried a few times.
    ///
    /// # Errors
    /// [`Error::BadAnswer`], and what [`Fetcher::error`] makes of the last try. Statuses are the caller's to read.
    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        url: &Url,
        what: &'static str,
        most: usize,
    ) -> Result<(T, HeaderMap), Trouble> {
        let mut tries = 0;
        loop {
            let trouble = match self.bounded(url, what, most).await {
                Ok((bytes, headers)) => {
                    let value = serde_json::from_slice(&bytes)
                        .map_err(|error| Trouble::Final(self.bad(what, &error.to_string())))?;
                    return Ok((value, headers));
                }
                Err(trouble) => trouble,
            };
            tries += 1;
            // A hub that is not there is not waited for as long as one that stumbles.
            let away = matches!(&trouble, Trouble::Broken(error) if error.is_connect());
            if tries == TRIES || away && tries == AWAY_TRIES || !trouble.may_pass() {
                return Err(match trouble {
                    Trouble::Status { status, .. } if trouble.may_pass() => Trouble::Final(Error::Status {
                        what: what.to_owned(),
                        endpoint: guard::origin(url),
                        status,
                        tries,
                    }),
                    Trouble::Status { .. } => trouble,
                    other => Trouble::Final(self.error(what, other, tries, (0, 0))),
                });
            }
            sleep(self.pause(tries, &trouble)).await;
        }
    }

    async fn bounded(&self, url: &Url, what: &'static str, most: usize) -> Result<(Vec<u8>, HeaderMap), Trouble> {
        let (mut response, _) = self.get(url, None).await?;
        let headers = response.headers().clone();
        let mut pace = Pace::new(self.options.stall_timeout);
        let mut bytes = Vec::new();
        while let Some(chunk) = pace.next(&mut response).await? {
            if bytes.len() + chunk.len() > most {
                return Err(Trouble::Final(self.bad(what, &format!("it is larger than {most} bytes"))));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok((bytes, headers))
    }

    /// How long to wait before try number `tries + 1`: what the server asks for, else twice as long each time, with
    /// jitter so that many do not come back together.
    pub(crate) fn pause(&self, tries: u32, trouble: &Trouble) -> Duration {
        if let Some(asked) = trouble.retry_after() {
            return asked.min(MAX_RETRY_AFTER);
        }
        let base = self.options.backoff.saturating_mul(1 << tries.saturating_sub(1).min(4));
        let mut random = [0u8; 1];
        let _ = rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty());
        base.mul_f64(0.5 + f64::from(random[0]) / 510.0)
    }

    /// What a trouble is to whoever asked, when it is not tried again.
    pub(crate) fn error(&self, what: &str, trouble: Trouble, tries: u32, (done, total): (u64, u64)) -> Error {
        let endpoint = guard::origin(&self.options.endpoint);
        match trouble {
            Trouble::Final(error) => error,
            Trouble::Status { status, .. } => Error::Status { what: what.to_owned(), endpoint, status, tries },
            Trouble::Broken(source) => {
                Error::Request { what: what.to_owned(), endpoint, tries, source: source.without_url() }
            }
            Trouble::Stalled => {
                Error::Stalled { what: what.to_owned(), after: self.options.stall_timeout, done, total }
            }
            Trouble::Short => Error::Short { file: what.to_owned(), tries, done, total },
        }
    }

    pub(crate) fn bad(&self, what: &'static str, problem: &str) -> Error {
        Error::BadAnswer { what, endpoint: guard::origin(&self.options.endpoint), problem: problem.to_owned() }
    }
}

/// The resolver's refusal is final; any other failure to connect may pass.
fn refused_address(url: &Url, error: reqwest::Error) -> Trouble {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(inner) = cause {
        if inner.to_string().ends_with("has no public address") {
            let problem = inner.to_string();
            return Trouble::Final(Error::RefusedTarget { url: guard::origin(url), problem });
        }
        cause = inner.source();
    }
    Trouble::Broken(error)
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// The operator's proxies, but never for a loopback address.
fn proxies(options: &Options) -> Result<Vec<reqwest::Proxy>, reqwest::Error> {
    let Proxies { http, https, none_for } = &options.proxies;
    let none_for = format!("{},localhost,127.0.0.0/8,::1", none_for.as_deref().unwrap_or_default());
    let proxy = |made: Result<reqwest::Proxy, _>| Ok(made?.no_proxy(reqwest::NoProxy::from_string(&none_for)));
    let http = http.clone().map(|address| proxy(reqwest::Proxy::http(address)));
    let https = https.clone().map(|address| proxy(reqwest::Proxy::https(address)));
    http.into_iter().chain(https).collect()
}

/// TLS with the system's certificates. Without any, only a hub without TLS can be used.
fn tls(options: &Options) -> Result<rustls::ClientConfig, Error> {
    let mut roots = rustls::RootCertStore::empty();
    let loaded = rustls_native_certs::load_native_certs();
    let (added, _) = roots.add_parsable_certificates(loaded.certs);
    if added == 0 && options.endpoint.scheme() == "https" {
        let problem = loaded.errors.first().map_or("the system has no certificates".to_owned(), ToString::to_string);
        return Err(Error::Tls { problem });
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Tls { problem: error.to_string() })?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Reads a body as long as it comes fast enough.
#[derive(Debug)]
pub(crate) struct Pace {
    window: Duration,
    /// The last byte, or the beginning.
    last: Instant,
    /// The window under way: since when, and how much came in it.
    since: Instant,
    bytes: u64,
}

impl Pace {
    pub(crate) fn new(window: Duration) -> Self {
        let now = Instant::now();
        Self { window, last: now, since: now, bytes: 0 }
    }

    /// The next bytes; `None` at the body's end.
    ///
    /// # Errors
    /// [`Trouble::Stalled`] after a whole window of silence, or of fewer than 1 KiB/s; [`Trouble::Broken`].
    pub(crate) async fn next(&mut self, response: &mut Response) -> Result<Option<Bytes>, Trouble> {
        loop {
            let deadline = (self.last + self.window).min(self.since + self.window);
            match timeout_at(deadline, response.chunk()).await {
                Ok(Ok(Some(chunk))) => {
                    self.last = Instant::now();
                    self.bytes += chunk.len() as u64;
                    self.turn()?;
                    return Ok(Some(chunk));
                }
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => return Err(Trouble::Broken(error)),
                Err(_) if self.last.elapsed() >= self.window => return Err(Trouble::Stalled),
                Err(_) => self.turn()?,
            }
        }
    }

    /// Begins a new window when one is over.
    fn turn(&mut self) -> Result<(), Trouble> {
        if self.since.elapsed() < self.window {
            return Ok(());
        }
        if (self.bytes as f64) < FEWEST * self.since.elapsed().as_secs_f64() {
            return Err(Trouble::Stalled);
        }
        (self.since, self.bytes) = (Instant::now(), 0);
        Ok(())
    }

    /// Does not count a time in which nobody could read.
    pub(crate) fn forgive(&mut self, time: Duration) {
        self.last += time;
        self.since += time;
    }
}
