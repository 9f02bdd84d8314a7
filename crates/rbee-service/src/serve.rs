//! Connections: bounded in number, in the time a header may take, and closed in order.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rbee_wire::{ErrorBody, ErrorCode};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::stall::Unstalled;

/// Bytes that a connection may have in its buffers, one way and the other: headers are no larger, and a listener that does not
/// read costs no more.
const BUFFER: usize = 64 << 10;

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct ServeLimits {
    /// Connections at once; further ones wait in the kernel's backlog.
    pub connections: usize,
    /// Longest time for a request's header, also between two requests of one connection.
    pub header: Duration,
    /// Longest time that a write may wait for its reader.
    pub stalled: Duration,
    /// Longest time that open connections may take to end once the server stops.
    pub linger: Duration,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            header: Duration::from_secs(10),
            stalled: Duration::from_secs(30),
            linger: Duration::from_secs(2),
        }
    }
}

/// Takes a port, or says who has it.
///
/// # Errors
/// An error that names the address and, where the machine tells, the process that holds it.
pub async fn bind(address: SocketAddr, program: &str, how: &str) -> Result<TcpListener, ErrorBody> {
    TcpListener::bind(address).await.map_err(|error| {
        if error.kind() != io::ErrorKind::AddrInUse {
            return ErrorBody::new(ErrorCode::Internal, format!("{program} cannot listen on {address}: {error}"))
                .with_hint(how);
        }
        let holder = port_holder(address);
        ErrorBody::new(ErrorCode::Internal, format!("{program} cannot listen on {address}: {holder} has that port"))
            .with_hint(how)
    })
}

/// The process that listens on this port, from `/proc`, as `process PID (NAME)`. Only this user's processes can be named.
pub fn port_holder(address: SocketAddr) -> String {
    holder_of(address).map_or_else(|| "another process".into(), |(pid, name)| format!("process {pid} ({name})"))
}

fn holder_of(address: SocketAddr) -> Option<(u32, String)> {
    let wanted = format!(":{:04X}", address.port());
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|table| {
        let text = std::fs::read_to_string(table).ok()?;
        text.lines().skip(1).find_map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            // Column 1 is the local address, 3 the state (0A is LISTEN), 9 the socket's inode.
            let listens = columns.get(1)?.ends_with(&wanted) && *columns.get(3)? == "0A";
            listens.then(|| columns.get(9).map(|inode| (*inode).to_owned())).flatten()
        })
    })?;
    let socket = format!("socket:[{inode}]");
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find_map(|pid| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let holds =
            files.flatten().any(|file| std::fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == &*socket));
        let name = || std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        holds.then(|| name().map(|name| (pid, name.trim().escape_debug().to_string()))).flatten()
    })
}

/// Serves until `stop`; then takes no more connections, lets open ones end their current answer for
/// `limits.linger`, and returns.
pub async fn serve(listener: TcpListener, router: Router, limits: ServeLimits, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let connections = TaskTracker::new();
    let hurry = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let (socket, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file handles: nothing to do but to wait until some are free again.
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let (stop, hurry) = (stop.clone(), hurry.clone());
        connections.spawn(async move {
            let _place = place;
            let _ = socket.set_nodelay(true);
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(limits.header).writev(false).max_buf_size(BUFFER);
            let connection = builder.serve_connection(TokioIo::new(Unstalled::new(socket, limits.stalled)), service);
            let mut connection = std::pin::pin!(connection);
            // Ends of clients are not faults; what matters of them is in the handlers' own logs.
            tokio::select! {
                _ = connection.as_mut() => return,
                () = stop.cancelled() => {}
            }
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                _ = connection => {}
                () = hurry.cancelled() => {}
            }
        });
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(limits.linger, connections.wait()).await.is_err() {
        hurry.cancel();
        connections.wait().await;
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (socket, _) = listener.accept().await?;
    Ok((socket, place))
}

#[cfg(test)]
mod tests {
    use axum::routing::post;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::error::{JsonBytes, MAX_BODY};
    use crate::guard::{Guard, protect};

    async fn start(limits: ServeLimits) -> (SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let router = Router::new().route("/echo", post(|JsonBytes(bytes): JsonBytes| async move { bytes }));
        tokio::spawn(serve(listener, protect(router, Guard::of(None, &[])), limits, stop.clone()));
        (address, stop)
    }

    async fn talk(address: SocketAddr, text: &str) -> String {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut answer))
            .await
            .expect("closed in time");
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn unknown_paths_methods_and_large_bodies_are_refused_in_json() {
        let (address, _stop) = start(ServeLimits::default()).await;
        let tail = "Host: localhost\r\nConnection: close\r\n";
        for (head, status, code) in [
            (format!("GET /x HTTP/1.1\r\n{tail}\r\n"), "404", "NOT_FOUND"),
            (format!("GET /echo HTTP/1.1\r\n{tail}\r\n"), "405", "METHOD_NOT_ALLOWED"),
            (
                format!("POST /echo HTTP/1.1\r\n{tail}Content-Length: {}\r\n\r\n", MAX_BODY + 1),
                "413",
                "PAYLOAD_TOO_LARGE",
            ),
            ("POST /echo HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n".into(), "403", "FORBIDDEN_ORIGIN"),
        ] {
            let answer = talk(address, &head).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
            assert!(answer.contains(code) && answer.contains("request_id"), "{answer}");
            assert!(answer.contains("x-rbee-protocol: 1") && answer.contains("x-request-id: req-"), "{answer}");
        }
    }

    #[tokio::test]
    async fn two_lengths_are_never_two_requests() {
        let (address, _stop) = start(ServeLimits::default()).await;
        for odd in ["Content-Length: 0\r\nContent-Length: 5\r\n", "Content-Length : 5\r\n", "X: a\r\n b: c\r\n"] {
            let text = format!("POST /echo HTTP/1.1\r\nHost: localhost\r\n{odd}Connection: close\r\n\r\nhello");
            let answer = talk(address, &text).await;
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{odd}: {answer}");
        }
    }

    #[tokio::test]
    async fn a_header_that_does_not_come_is_closed() {
        let limits = ServeLimits { header: Duration::from_millis(100), ..ServeLimits::default() };
        let (address, _stop) = start(limits).await;
        talk(address, "GET / HTTP/1.1\r\nHost:").await;
    }

    #[tokio::test]
    async fn a_reader_that_stops_is_dropped() {
        let limits = ServeLimits { stalled: Duration::from_millis(200), ..ServeLimits::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (gone, left) = tokio::sync::oneshot::channel();
        let gone = Arc::new(std::sync::Mutex::new(Some(gone)));
        let endless = move || {
            let told = DropTold(gone.lock().unwrap().take());
            let events = futures::stream::repeat_with(move || {
                let _held = &told;
                bytes::Bytes::from_static(&[b'x'; 4096])
            });
            async move { crate::sse::infallible(events) }
        };
        let router = Router::new().route("/flood", axum::routing::get(endless));
        tokio::spawn(serve(listener, router, limits, CancellationToken::new()));
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), left).await.expect("dropped in time").unwrap();
    }

    /// Tells when it is dropped.
    struct DropTold(Option<tokio::sync::oneshot::Sender<()>>);
    impl Drop for DropTold {
        fn drop(&mut self) {
            let _ = self.0.take().map(|told| told.send(()));
        }
    }

    #[tokio::test]
    async fn a_taken_port_names_its_holder() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let error = bind(listener.local_addr().unwrap(), "queen-rbee", "use --bind").await.unwrap_err();
        assert!(error.message.contains(&format!("process {} (", std::process::id())), "{error}");
        assert_eq!(error.hint.as_deref(), Some("use --bind"));
    }
}
