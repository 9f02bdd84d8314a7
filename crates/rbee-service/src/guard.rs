//! What stands before every route: request ids, credentials and what they open, and the checks that keep other sites'
//! pages and proxies away from a server that trusts its own machine.
//!
//! Who may use a route stands in the daemon's table of routes, under the path that the request was routed to, so that no
//! spelling of a path is another route for the guard than for the router. A path that leads nowhere asks for a credential
//! too: what is there is nobody else's business.

use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use rbee_wire::routes::{self, Route};
use rbee_wire::{Access, ErrorBody, ErrorCode, KeyId, PROTOCOL, RequestId, Scope, TraceParent};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::clock::random_hex;
use crate::error::{ApiError, REQUEST_ID, TRACE};

const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_HEADER: HeaderName = HeaderName::from_static("traceparent");
const PROTOCOL_HEADER: HeaderName = HeaderName::from_static("x-rbee-protocol");

/// Headers that a proxy adds. Behind one, everybody looks like this machine.
pub const FORWARDED: [&str; 6] =
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"];

/// Who calls. The guard leaves it in the request's extensions, unless nobody needed to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Who has the token, or is on the machine of a daemon without one: may do everything.
    Owner,
    /// Who has a key.
    Key {
        /// The key.
        id: KeyId,
        /// What it may do.
        scopes: Vec<Scope>,
    },
}

impl Caller {
    /// Checks that the caller may.
    ///
    /// # Errors
    /// `FORBIDDEN`, naming what was wanted.
    pub fn may(&self, access: Access, what: &str) -> Result<(), ErrorBody> {
        match self {
            Self::Key { scopes, .. } if !access.open_to(scopes) => {
                Err(ErrorBody::new(ErrorCode::Forbidden, format!("the scopes of this key do not open {what}")))
            }
            Self::Owner | Self::Key { .. } => Ok(()),
        }
    }
}

/// The keys that a daemon knows.
pub trait Keyring: Debug + Send + Sync {
    /// Who has the key of this digest. It compares with all keys and in constant time.
    fn who(&self, digest: &[u8; 32]) -> Option<Caller>;
}

/// Who may call.
#[derive(Clone, Debug)]
pub struct Guard {
    token: Option<[u8; 32]>,
    keys: Option<Arc<dyn Keyring>>,
    table: &'static [Route],
}

impl Guard {
    /// Without a token: everybody on this machine, no page of another site, nobody through a proxy. With one: whoever
    /// sends it, and what the table calls public.
    pub fn of(token: Option<&str>, table: &'static [Route]) -> Self {
        Self { token: token.map(|token| Sha256::digest(token.as_bytes()).into()), keys: None, table }
    }

    /// With keys beside the token. Without a token a known key is still that key, with its scopes and limits.
    #[must_use]
    pub fn with_keys(self, keys: Arc<dyn Keyring>) -> Self {
        Self { keys: Some(keys), ..self }
    }

    fn caller(&self, headers: &HeaderMap) -> Option<Caller> {
        let shown: Option<[u8; 32]> = bearer(headers).map(|bearer| Sha256::digest(bearer).into());
        let key = shown.and_then(|shown| self.keys.as_ref()?.who(&shown));
        let owner = match (&self.token, shown) {
            (None, _) => key.is_none(),
            (Some(token), Some(shown)) => shown.ct_eq(token).into(),
            (Some(_), None) => false,
        };
        if owner { Some(Caller::Owner) } else { key }
    }

    /// Who calls, if they may; `path` is the one of the table that the request was routed to.
    fn check(&self, path: Option<&str>, request: &Request) -> Result<Option<Caller>, ErrorBody> {
        let headers = request.headers();
        if let Some(origin) = headers.get(header::ORIGIN) {
            let host = headers.get(header::HOST).map(HeaderValue::as_bytes).unwrap_or_default();
            let same = origin.as_bytes().strip_prefix(b"http://").is_some_and(|origin| origin == host);
            if !same {
                return Err(ErrorBody::new(
                    ErrorCode::ForbiddenOrigin,
                    "pages of other sites may not call this server",
                ));
            }
            let json = headers.get(header::CONTENT_TYPE).is_some_and(|kind| is_json(kind.as_bytes()));
            if request.method() == Method::POST && !json {
                return Err(ErrorBody::new(ErrorCode::ForbiddenOrigin, "a page's post must be application/json"));
            }
        }
        if self.token.is_none() {
            if let Some(name) = FORWARDED.iter().find(|name| headers.contains_key(**name)) {
                let message =
                    format!("`{name}` shows a proxy, and without a token everybody behind it would be trusted");
                return Err(ErrorBody::new(ErrorCode::ForbiddenOrigin, message)
                    .with_hint("set a token to serve through a proxy"));
            }
            // A host in the first line is the one that is asked for.
            let named = request.uri().authority().is_none_or(is_loopback);
            if !named || !host_is_loopback(headers) {
                return Err(ErrorBody::new(
                    ErrorCode::ForbiddenOrigin,
                    "the Host header does not name this machine's loopback",
                ));
            }
        }
        let method = request.method().as_str();
        let access = path.map(|path| routes::access(self.table, method, path));
        match (self.caller(headers), access) {
            (caller, Some(Access::Public)) => Ok(caller),
            (None, _) => Err(ErrorBody::new(ErrorCode::Unauthorized, "this server asks for a token or a key")),
            // There is no such path, and whoever is known may hear it.
            (Some(caller), None) => Ok(Some(caller)),
            (Some(caller), Some(access)) => {
                caller.may(access, &format!("{method} {}", path.unwrap_or_default()))?;
                Ok(Some(caller))
            }
        }
    }
}

fn is_json(kind: &[u8]) -> bool {
    let kind = kind.split(|&b| b == b';').next().unwrap_or_default();
    kind.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

/// What a request shows, if it shows one thing.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, shown) = value.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| shown.trim_ascii())
}

fn host_is_loopback(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    host.to_str().ok().and_then(|text| text.parse::<Authority>().ok()).is_some_and(|host| is_loopback(&host))
}

fn is_loopback(host: &Authority) -> bool {
    if host.as_str().contains('@') {
        return false;
    }
    let name = host.host();
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Puts the guard, request ids, the protocol header and JSON answers for unknown paths around routes.
pub fn protect(router: Router, guard: Guard) -> Router {
    router
        .fallback(|| async { ApiError(ErrorBody::new(ErrorCode::NotFound, "there is no such path")) })
        .method_not_allowed_fallback(|| async {
            ApiError(ErrorBody::new(ErrorCode::MethodNotAllowed, "this path does not take that method"))
        })
        .layer(middleware::from_fn_with_state(Arc::new(guard), check))
}

async fn check(State(guard): State<Arc<Guard>>, mut request: Request, next: Next) -> Response {
    // A caller's id is a label in logs and never a key.
    let given = request.headers().get(&REQUEST_ID_HEADER).and_then(|value| value.to_str().ok());
    let id = given
        .and_then(|text| RequestId::new(text).ok())
        .unwrap_or_else(|| RequestId::new(format!("req-{}", random_hex(16))).expect("hexadecimal digits make an id"));
    let trace = request.headers().get(&TRACE_HEADER).and_then(|value| TraceParent::new(value.to_str().ok()?).ok());
    let mut response = REQUEST_ID
        .scope(
            id.clone(),
            TRACE.scope(trace, async move {
                let path = request.extensions().get::<MatchedPath>().cloned();
                match guard.check(path.as_ref().map(MatchedPath::as_str), &request) {
                    Ok(caller) => {
                        if let Some(caller) = caller {
                            request.extensions_mut().insert(caller);
                        }
                        refused_in_json(next.run(request).await)
                    }
                    Err(error) => ApiError(error).into_response(),
                }
            }),
        )
        .await;
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        headers.insert(REQUEST_ID_HEADER, value);
    }
    headers.insert(PROTOCOL_HEADER, HeaderValue::from(PROTOCOL));
    if response.status() == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// What is refused before a handler has it, a path or a query that cannot be read, comes as plain text.
fn refused_in_json(response: Response) -> Response {
    if !response.status().is_client_error() || response.extensions().get::<ErrorBody>().is_some() {
        return response;
    }
    let message = "a variable of the path or the query cannot be read";
    ApiError(ErrorBody::new(ErrorCode::InvalidRequest, message)).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn asked(
        guard: &Guard,
        method: &str,
        path: Option<&str>,
        headers: &[(&str, &str)],
    ) -> Result<Option<Caller>, ErrorCode> {
        let mut request = axum::http::Request::builder().method(method).uri("/whatever");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        guard.check(path, &request.body(Body::empty()).unwrap()).map_err(|error| error.code)
    }

    fn verdict(guard: &Guard, headers: &[(&str, &str)]) -> Option<ErrorCode> {
        asked(guard, "POST", Some(routes::JOBS), headers).err()
    }

    fn open() -> Guard {
        Guard::of(None, routes::QUEEN)
    }

    fn closed(token: &str) -> Guard {
        Guard::of(Some(token), routes::QUEEN)
    }

    #[test]
    fn without_a_token_only_this_machine_itself_may_call() {
        let guard = open();
        for host in ["localhost", "LOCALHOST:7833", "127.0.0.1:1", "127.9.9.9", "[::1]:7833"] {
            assert_eq!(verdict(&guard, &[("host", host)]), None, "{host}");
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "user@localhost",
            "192.168.0.1",
            "[::]",
            "0.0.0.0",
            "a b",
        ] {
            assert_eq!(verdict(&guard, &[("host", host)]), Some(ErrorCode::ForbiddenOrigin), "{host}");
        }
        assert_eq!(verdict(&guard, &[]), Some(ErrorCode::ForbiddenOrigin));
        assert_eq!(verdict(&guard, &[("host", "localhost"), ("host", "evil")]), Some(ErrorCode::ForbiddenOrigin));
        for name in FORWARDED {
            assert_eq!(verdict(&guard, &[("host", "localhost"), (name, "1.2.3.4")]), Some(ErrorCode::ForbiddenOrigin));
        }
        assert_eq!(verdict(&guard, &[("host", "localhost"), ("authorization", "Bearer whatever")]), None);
    }

    #[test]
    fn pages_of_other_sites_get_nothing() {
        let json = ("content-type", "application/json; charset=utf-8");
        for guard in [open(), closed("t")] {
            let auth = ("authorization", "Bearer t");
            let host = ("host", "localhost:7833");
            let with = |origin, kind| verdict(&guard, &[host, auth, ("origin", origin), kind]);
            assert_eq!(with("http://localhost:7833", json), None);
            for origin in [
                "http://evil.example",
                "null",
                "https://localhost:7833",
                "http://localhost:78",
                "http://localhost:78333",
            ] {
                assert_eq!(with(origin, json), Some(ErrorCode::ForbiddenOrigin), "{origin}");
            }
            let text = with("http://localhost:7833", ("content-type", "text/plain"));
            assert_eq!(text, Some(ErrorCode::ForbiddenOrigin));
        }
    }

    #[test]
    fn with_a_token_nothing_else_opens() {
        let guard = closed("secret");
        let host = ("host", "10.0.0.7:7833");
        assert_eq!(verdict(&guard, &[host, ("authorization", "Bearer secret")]), None);
        assert_eq!(verdict(&guard, &[host, ("authorization", "bearer secret")]), None);
        for value in ["Bearer secre", "Bearer secrett", "Bearer ", "Basic secret", "secret", ""] {
            assert_eq!(verdict(&guard, &[host, ("authorization", value)]), Some(ErrorCode::Unauthorized), "{value}");
        }
        let twice = [host, ("authorization", "Bearer secret"), ("authorization", "Bearer x")];
        assert_eq!(verdict(&guard, &twice), Some(ErrorCode::Unauthorized));
        assert_eq!(verdict(&guard, &[host]), Some(ErrorCode::Unauthorized));
    }

    /// A key for each word of two.
    #[derive(Debug)]
    struct Words;

    impl Keyring for Words {
        fn who(&self, digest: &[u8; 32]) -> Option<Caller> {
            let words = [("inference", Scope::Inference), ("admin", Scope::Admin)];
            let found = words.iter().find(|(word, _)| Sha256::digest(word.as_bytes()).as_slice() == digest);
            found.map(|&(word, scope)| Caller::Key { id: KeyId::new(word).unwrap(), scopes: vec![scope] })
        }
    }

    #[test]
    fn a_key_opens_what_its_scope_does_and_nothing_that_no_table_has() {
        let with = |guard: Guard| guard.with_keys(Arc::new(Words));
        let (open, closed) = (with(open()), with(closed("secret")));
        let host = ("host", "localhost");
        let (public, jobs, metrics) = (Some(routes::HEALTH), Some(routes::JOBS), Some(routes::METRICS));
        let new = Some("/v1/mounted-and-forgotten");
        for guard in [&open, &closed] {
            let asks = |bearer: &str, path| {
                let shown = format!("Bearer {bearer}");
                asked(guard, "GET", path, &[host, ("authorization", &shown)])
            };
            for (bearer, opens, shut) in [
                ("inference", &[public, jobs, None][..], &[metrics, new][..]),
                ("admin", &[public, jobs, metrics, new, None], &[]),
            ] {
                for &path in opens {
                    let caller = asks(bearer, path);
                    assert!(matches!(&caller, Ok(Some(Caller::Key { id, .. })) if id.as_str() == bearer), "{caller:?}");
                }
                for &path in shut {
                    assert_eq!(asks(bearer, path), Err(ErrorCode::Forbidden), "{bearer} {path:?}");
                }
            }
        }
        // One that nobody knows is nobody's, and on an open machine not looked at.
        let unknown = [host, ("authorization", "Bearer sk-unknown")];
        assert_eq!(asked(&open, "GET", metrics, &unknown), Ok(Some(Caller::Owner)));
        assert_eq!(asked(&closed, "GET", public, &unknown), Ok(None));
        for path in [jobs, metrics, new, None] {
            assert_eq!(asked(&closed, "GET", path, &unknown), Err(ErrorCode::Unauthorized), "{path:?}");
        }
        let owner = [host, ("authorization", "Bearer secret")];
        assert_eq!(asked(&closed, "GET", metrics, &owner), Ok(Some(Caller::Owner)));
    }
}
