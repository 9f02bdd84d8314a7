//! One base address, one connection pool, one bearer.

use std::sync::Arc;
use std::time::Duration;

use rbee_wire::error::ErrorReply;
use rbee_wire::{ErrorBody, ErrorCode};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::ClientError;

/// Time to get a connection; loopback and local networks answer at once or never.
const CONNECT: Duration = Duration::from_secs(3);

/// Time for a short call, from sending it to its whole answer. Streams have an idle limit instead.
const CALL: Duration = Duration::from_secs(15);

/// Largest answer of a short call, in bytes.
const MAX_ANSWER: usize = 16 << 20;

#[derive(Clone, Debug)]
pub(crate) struct Http {
    client: reqwest::Client,
    base: String,
    bearer: Option<String>,
}

/// A TLS setup that trusts nobody. All hops are plain HTTP; without it the client would read the system's certificates
/// each time it is made.
fn no_tls() -> rustls::ClientConfig {
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider has the suites of the default versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}

impl Http {
    pub(crate) fn new(base: &str, bearer: Option<String>) -> Self {
        // Prompts and answers of the own machines go no way round: no proxy, no redirect.
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .tcp_nodelay(true)
            .tls_backend_preconfigured(no_tls())
            .build()
            .expect("a client that trusts no certificate needs nothing that could be missing");
        Self { client, base: base.trim_end_matches('/').to_owned(), bearer }
    }

    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        match &self.bearer {
            Some(bearer) => request.bearer_auth(bearer),
            None => request,
        }
    }

    /// Sends a request whose answer is a stream; a refusal becomes its own error.
    pub(crate) async fn open(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(|source| self.way_fault(source))?;
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await) }
    }

    /// Sends a request and reads its JSON answer.
    pub(crate) async fn call<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = self.open(request.timeout(CALL)).await?;
        let bytes = self.read(response).await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| ClientError::Protocol { url: self.base.clone(), problem: error.to_string() })
    }

    /// Sends a request and reads its text answer.
    pub(crate) async fn text(&self, request: RequestBuilder) -> Result<String, ClientError> {
        let response = self.open(request.timeout(CALL)).await?;
        Ok(String::from_utf8_lossy(&self.read(response).await?).into_owned())
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(self.request(Method::POST, path).json(body)).await
    }

    async fn read(&self, mut response: Response) -> Result<Vec<u8>, ClientError> {
        let mut bytes = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) if bytes.len() + chunk.len() > MAX_ANSWER => {
                    let problem = format!("the answer is larger than {MAX_ANSWER} bytes");
                    return Err(ClientError::Protocol { url: self.base.clone(), problem });
                }
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
                Ok(None) => return Ok(bytes),
                Err(source) => return Err(ClientError::Broken { url: self.base.clone(), source: Some(source) }),
            }
        }
    }

    async fn refusal(&self, response: Response) -> ClientError {
        let status = response.status();
        let bytes = match self.read(response).await {
            Ok(bytes) => bytes,
            Err(error) => return error,
        };
        match serde_json::from_slice::<ErrorReply>(&bytes) {
            Ok(reply) => ClientError::Refused(Box::new(reply.error)),
            Err(_) if status == StatusCode::NOT_FOUND => ClientError::Refused(Box::new(ErrorBody::new(
                ErrorCode::NotFound,
                format!("{} has no such path: it may not be rbee", self.base),
            ))),
            Err(_) => ClientError::Protocol { url: self.base.clone(), problem: format!("HTTP status {status}") },
        }
    }

    fn way_fault(&self, source: reqwest::Error) -> ClientError {
        let url = self.base.clone();
        // Only what failed before the connection stood is sure not to have reached the other end.
        if source.is_connect() || source.is_builder() {
            ClientError::Unreachable { url, source }
        } else {
            ClientError::Broken { url, source: Some(source) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_client_is_made_in_under_a_millisecond() {
        // The best of some: other work on the machine is not the client's.
        let made = (0..20).map(|_| {
            let began = Instant::now();
            drop(Http::new("http://127.0.0.1:1", None));
            began.elapsed()
        });
        let best = made.min().unwrap_or_default();
        eprintln!("{best:?}");
        assert!(best < Duration::from_millis(1), "{best:?}");
    }
}
