//! What stands before every route: request ids, the bearer, and the checks that keep other sites' pages and
//! proxies away from a server that trusts its own machine.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use rbee_wire::{ErrorBody, ErrorCode, PROTOCOL, RequestId, routes};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::clock::random_hex;
use crate::error::{ApiError, REQUEST_ID};

const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");
const PROTOCOL_HEADER: HeaderName = HeaderName::from_static("x-rbee-protocol");

/// Headers that a proxy adds. Behind one, everybody looks like this machine.
const FORWARDED: [&str; 6] =
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"];

/// Paths that answer without a token.
const PUBLIC: [&str; 4] = [routes::HEALTH, routes::LIVEZ, routes::READY, routes::READYZ];

/// Who may call.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    digest: Option<[u8; 32]>,
    public: &'static [&'static str],
}

impl Guard {
    /// Everybody on this machine, no page of another site, nobody through a proxy.
    pub fn loopback() -> Self {
        Self { digest: None, public: &PUBLIC }
    }

    /// Whoever sends this bearer; liveness and readiness are public.
    pub fn bearer(token: &str) -> Self {
        Self { digest: Some(Sha256::digest(token.as_bytes()).into()), public: &PUBLIC }
    }

    /// As the settings have it.
    pub fn of(token: Option<&str>) -> Self {
        token.map_or_else(Self::loopback, Self::bearer)
    }

    /// With other public paths.
    #[must_use]
    pub fn with_public(mut self, public: &'static [&'static str]) -> Self {
        self.public = public;
        self
    }

    fn check(&self, request: &Request) -> Result<(), ErrorBody> {
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
        match &self.digest {
            Some(digest) => {
                if self.public.contains(&request.uri().path()) || bearer_fits(headers, digest) {
                    Ok(())
                } else {
                    Err(ErrorBody::new(ErrorCode::Unauthorized, "this server asks for a token"))
                }
            }
            None => {
                if let Some(name) = FORWARDED.iter().find(|name| headers.contains_key(**name)) {
                    let message =
                        format!("`{name}` shows a proxy, and without a token everybody behind it would be trusted");
                    return Err(ErrorBody::new(ErrorCode::ForbiddenOrigin, message)
                        .with_hint("set a token to serve through a proxy"));
                }
                if host_is_loopback(headers) {
                    Ok(())
                } else {
                    Err(ErrorBody::new(
                        ErrorCode::ForbiddenOrigin,
                        "the Host header does not name this machine's loopback",
                    ))
                }
            }
        }
    }
}

fn is_json(kind: &[u8]) -> bool {
    let kind = kind.split(|&b| b == b';').next().unwrap_or_default();
    kind.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

fn bearer_fits(headers: &HeaderMap, digest: &[u8; 32]) -> bool {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return false;
    };
    let value = value.as_bytes();
    if value.len() < 7 || !value[..7].eq_ignore_ascii_case(b"bearer ") {
        return false;
    }
    Sha256::digest(value[7..].trim_ascii()).as_slice().ct_eq(digest).into()
}

fn host_is_loopback(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let Some(host) = host.to_str().ok().and_then(|text| text.parse::<Authority>().ok()) else {
        return false;
    };
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

async fn check(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    // A caller's id is a label in logs and never a key.
    let given = request.headers().get(&REQUEST_ID_HEADER).and_then(|value| value.to_str().ok());
    let id = given
        .and_then(|text| RequestId::new(text).ok())
        .unwrap_or_else(|| RequestId::new(format!("req-{}", random_hex(16))).expect("hexadecimal digits make an id"));
    let mut response = REQUEST_ID
        .scope(id.clone(), async move {
            match guard.check(&request) {
                Ok(()) => next.run(request).await,
                Err(error) => ApiError(error).into_response(),
            }
        })
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

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn verdict(guard: &Guard, headers: &[(&str, &str)]) -> Option<ErrorCode> {
        let mut request = axum::http::Request::builder().method("POST").uri("/v1/jobs");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        guard.check(&request.body(Body::empty()).unwrap()).err().map(|error| error.code)
    }

    #[test]
    fn without_a_token_only_this_machine_itself_may_call() {
        let guard = Guard::loopback();
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
        for guard in [Guard::loopback(), Guard::bearer("t")] {
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
        let guard = Guard::bearer("secret");
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
}
