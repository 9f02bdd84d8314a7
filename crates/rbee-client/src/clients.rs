//! One type per program that can be called.

use rbee_wire::hive::HiveHeartbeat;
use rbee_wire::job::JobAccepted;
use rbee_wire::view::{DaemonReady, InfoReply, JobList, JobView};
use rbee_wire::worker::{HeartbeatReply, InferenceRequest, ReadyReply, WorkerHeartbeat};
use rbee_wire::{Event, JobId, JobRequest, WorkerId, routes};
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::channel::ChannelStream;
use crate::error::ClientError;
use crate::http::Http;
use crate::stream::EventStream;

/// The media type that turns a post into a stream.
const EVENT_STREAM: &str = "text/event-stream";

fn with_id(path: &str, id: &str) -> String {
    path.replace("{id}", &escape(id))
}

/// Percent-encodes everything in a path part but letters, digits, `-`, `_` and `.`.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

macro_rules! daemon_calls {
    () => {
        /// Its address.
        pub fn url(&self) -> &str {
            self.0.base()
        }

        /// What it says of itself.
        ///
        /// # Errors
        /// [`ClientError`]
        pub async fn info(&self) -> Result<InfoReply, ClientError> {
            self.0.get(routes::INFO).await
        }

        /// Posts a job and gives its stream at once; dropping the stream cancels an `infer` job.
        ///
        /// # Errors
        /// [`ClientError`]
        pub async fn run_job(&self, job: &JobRequest) -> Result<EventStream, ClientError> {
            let request = self.0.request(Method::POST, routes::JOBS).header("accept", EVENT_STREAM).json(job);
            Ok(EventStream::new(self.0.open(request).await?, self.0.base().to_owned()))
        }

        /// Posts a job and collects the values of its `data` events; an `error` event is a refusal.
        ///
        /// # Errors
        /// [`ClientError`]
        pub async fn call<T: DeserializeOwned>(&self, job: &JobRequest) -> Result<Vec<T>, ClientError> {
            let mut stream = self.run_job(job).await?;
            let mut values = Vec::new();
            while let Some(event) = stream.next().await {
                match event?.event {
                    Event::Data { value } => values.push(serde_json::from_value(value).map_err(|error| {
                        ClientError::Protocol { url: self.0.base().to_owned(), problem: error.to_string() }
                    })?),
                    Event::Error(body) => return Err(ClientError::Refused(Box::new(body))),
                    _ => {}
                }
            }
            Ok(values)
        }

        /// The stream of a job, from its beginning or after an offset.
        ///
        /// # Errors
        /// [`ClientError`]
        pub async fn stream_job(&self, job: &JobId, after: Option<u64>) -> Result<EventStream, ClientError> {
            let mut request = self.0.request(Method::GET, &with_id(routes::JOB_STREAM, job.as_str()));
            if let Some(after) = after {
                request = request.header("last-event-id", after.to_string());
            }
            Ok(EventStream::new(self.0.open(request).await?, self.0.base().to_owned()))
        }

        /// Whether it would take a request now; a refusal when it would not.
        ///
        /// # Errors
        /// [`ClientError`]
        pub async fn ready(&self) -> Result<DaemonReady, ClientError> {
            self.0.get(routes::READY).await
        }
    };
}

/// Calls a queen.
#[derive(Clone, Debug)]
pub struct QueenClient(Http);

impl QueenClient {
    /// A client of the queen at `url`; the key is sent where one is given.
    pub fn new(url: &str, api_key: Option<String>) -> Self {
        Self(Http::new(url, api_key))
    }

    daemon_calls!();

    /// Posts a job. The same idempotency key gives the same job.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn post_job(&self, job: &JobRequest, idempotency: Option<&str>) -> Result<JobAccepted, ClientError> {
        let mut request = self.0.request(Method::POST, routes::JOBS).json(job);
        if let Some(key) = idempotency {
            request = request.header("idempotency-key", key);
        }
        self.0.call(request).await
    }

    /// One job with its decisions.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn job(&self, job: &JobId) -> Result<JobView, ClientError> {
        self.0.get(&with_id(routes::JOB, job.as_str())).await
    }

    /// The jobs that are kept.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn jobs(&self) -> Result<JobList, ClientError> {
        self.0.get(routes::JOBS).await
    }

    /// Cancels a job.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn cancel(&self, job: &JobId) -> Result<(), ClientError> {
        let request = self.0.request(Method::DELETE, &with_id(routes::JOB, job.as_str()));
        self.0.call::<Value>(request).await.map(drop)
    }

    /// Drains and stops the queen, and its own machine's hive with it where wanted.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn shutdown(&self, hives: Hives) -> Result<(), ClientError> {
        let body = json!({ "hives": hives == Hives::Too });
        self.0.post::<Value>(routes::SHUTDOWN, &body).await.map(drop)
    }

    /// A worker says how it is.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn worker_heartbeat(&self, beat: &WorkerHeartbeat) -> Result<HeartbeatReply, ClientError> {
        self.0.post(routes::WORKER_HEARTBEAT, beat).await
    }

    /// A hive says how it is.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn hive_heartbeat(&self, beat: &HiveHeartbeat) -> Result<HeartbeatReply, ClientError> {
        self.0.post(routes::HIVE_HEARTBEAT, beat).await
    }
}

/// Whether a queen's shutdown takes the local hive along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hives {
    /// It goes on with its workers.
    Stay,
    /// It is drained and stopped too.
    Too,
}

/// Calls a hive.
#[derive(Clone, Debug)]
pub struct HiveClient(Http);

impl HiveClient {
    /// A client of the hive at `url`.
    pub fn new(url: &str, api_key: Option<String>) -> Self {
        Self(Http::new(url, api_key))
    }

    daemon_calls!();

    /// The last bytes of a worker's captured output.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn worker_logs(&self, worker: &WorkerId, tail: u64) -> Result<String, ClientError> {
        let path = with_id(routes::WORKER_LOGS, worker.as_str());
        self.0.text(self.0.request(Method::GET, &format!("{path}?tail={tail}"))).await
    }

    /// Drains and stops the hive and its workers.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn shutdown(&self) -> Result<(), ClientError> {
        self.0.post::<Value>(routes::SHUTDOWN, &json!({})).await.map(drop)
    }
}

/// Calls a worker.
#[derive(Clone, Debug)]
pub struct WorkerClient(Http);

impl WorkerClient {
    /// A client of the worker at `url`, with the bearer from its heartbeat.
    pub fn new(url: &str, bearer: String) -> Self {
        Self(Http::new(url, Some(bearer)))
    }

    /// Opens a channel: a connection for the events of many inferences. Dropping it cancels those that still run.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn channel(&self, id: &str) -> Result<ChannelStream, ClientError> {
        let request = self.0.request(Method::GET, &with_id(routes::CHANNEL, id));
        Ok(ChannelStream::new(self.0.open(request).await?, self.0.base().to_owned()))
    }

    /// Asks for text, whose events come over the request's channel.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn infer(&self, request: &InferenceRequest) -> Result<JobAccepted, ClientError> {
        self.0.post(routes::INFERENCE, request).await
    }

    /// Cancels an inference.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn cancel(&self, job: &JobId) -> Result<(), ClientError> {
        let request = self.0.request(Method::DELETE, &with_id(routes::INFERENCE_ONE, job.as_str()));
        self.0.call::<Value>(request).await.map(drop)
    }

    /// How far it is.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn ready(&self) -> Result<ReadyReply, ClientError> {
        self.0.get(routes::WORKER_READY).await
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn info(&self) -> Result<InfoReply, ClientError> {
        self.0.get(routes::INFO).await
    }

    /// Lets it finish what it has and take nothing new.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn drain(&self) -> Result<(), ClientError> {
        self.0.post::<Value>(routes::DRAIN, &json!({})).await.map(drop)
    }
}
