//! The fake hub's two servers: routes, ranges, and what is done wrong on purpose.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::HeaderValue;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Access, Fault, HubFile, REVISION, Server, Shared, TREE};

/// Bytes of a body that are sent at once.
const CHUNK: usize = 256 << 10;

/// The same while the rate is limited, so that little is on its way at any time.
const SMALL_CHUNK: usize = 16 << 10;

/// How many bytes a second may be sent.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    limit: AtomicU64,
    /// When the bytes promised so far are through.
    until: Mutex<Option<Instant>>,
}

impl Rate {
    pub(crate) fn set(&self, bytes_per_s: u64) {
        self.limit.store(bytes_per_s, Ordering::Relaxed);
    }

    fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    async fn take(&self, bytes: usize) {
        let limit = self.limit();
        if limit == 0 {
            return;
        }
        let wait_until = {
            let mut until = self.until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let now = Instant::now();
            let at = until.filter(|at| *at > now).unwrap_or(now);
            *until = Some(at + Duration::from_secs_f64(bytes as f64 / limit as f64));
            at
        };
        // Timers tick in milliseconds: what is due sooner goes at once, and the debt is kept.
        if wait_until > Instant::now() + Duration::from_millis(2) {
            tokio::time::sleep_until(wait_until).await;
        }
    }
}

/// A body that somebody sends piece by piece; an error breaks the connection.
pub(crate) struct Sent {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    length: Option<u64>,
}

impl Sent {
    fn of(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let (sender, pieces) = mpsc::channel(1);
        let length = Some(bytes.len() as u64);
        if !bytes.is_empty() {
            let _ = sender.try_send(Ok(bytes));
        }
        Self { pieces, length }
    }
}

impl Body for Sent {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.pieces.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

type Answer = Response<Sent>;

pub(crate) async fn accept(server: Server, listener: std::net::TcpListener, shared: Arc<Shared>) {
    listener.set_nonblocking(true).expect("a listener that can be polled");
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener of the runtime");
    while let Ok((socket, _)) = listener.accept().await {
        let _ = socket.set_nodelay(true);
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(server, &shared, &request)) }
            });
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

fn answer(server: Server, shared: &Arc<Shared>, request: &Request<Incoming>) -> Answer {
    let path = decoded(request.uri().path());
    {
        let mut state = shared.state();
        let count = state.counts.entry(server).or_default();
        count.requests += 1;
        let shown = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        count.authorizations.push(shown.map(str::to_owned));
        count.paths.push(format!("{} {path}", request.method()));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(405, "");
    }
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match (server, parts.as_slice()) {
        (Server::Hub, ["api", "models", org, name, "revision", revision @ ..]) => {
            info(shared, request, &format!("{org}/{name}"), &revision.join("/"))
        }
        (Server::Hub, ["api", "models", org, name]) => info(shared, request, &format!("{org}/{name}"), "main"),
        (Server::Hub, ["api", "models", org, name, "tree", commit]) => {
            tree(shared, request, &format!("{org}/{name}"), commit)
        }
        (Server::Hub, [org, name, "resolve", commit, file @ ..]) => {
            resolve(shared, request, &format!("{org}/{name}"), commit, &file.join("/"))
        }
        (Server::Cdn, ["cdn", org, name, commit, file @ ..]) => {
            cdn(shared, request, &format!("{org}/{name}"), commit, &file.join("/"))
        }
        _ => refusal(404, "EntryNotFound"),
    }
}

fn decoded(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'%').then(|| std::str::from_utf8(after.get(..2)?).ok()).flatten();
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn plain(status: u16, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Sent::of(body));
    *answer.status_mut() = StatusCode::from_u16(status).expect("a status");
    answer
}

fn with(mut answer: Answer, name: &'static str, value: &str) -> Answer {
    answer.headers_mut().append(name, HeaderValue::from_bytes(value.as_bytes()).expect("a header's value"));
    answer
}

fn refusal(status: u16, code: &str) -> Answer {
    with(plain(status, format!("{{\"error\":\"{code}\"}}")), "x-error-code", code)
}

/// The faults of a file; those that happen a number of times are counted down.
fn faults(shared: &Shared, repo: &str, path: &str) -> Vec<Fault> {
    let mut state = shared.state();
    let Some(faults) = state.faults.get_mut(&(repo.to_owned(), path.to_owned())) else { return Vec::new() };
    let now = faults.clone();
    let mut counted = false;
    faults.retain_mut(|fault| match fault {
        // One after the other.
        Fault::Cut { times, .. }
        | Fault::CutSomewhere { times, .. }
        | Fault::WrongBytes { times }
        | Fault::Status { times, .. }
            if !counted =>
        {
            counted = true;
            *times = times.saturating_sub(1);
            *times > 0
        }
        _ => true,
    });
    now
}

/// Who may not read, and how that is said.
fn barred(shared: &Shared, request: &Request<Incoming>, repo: &str, listing: bool) -> Option<Answer> {
    let state = shared.state();
    let shown = request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    match state.repos.get(repo).map(|repo| &repo.access) {
        None if shown.is_empty() => Some(refusal(401, "RepoNotFound")),
        None => Some(refusal(404, "RepoNotFound")),
        Some(Access::Private(token)) if shown != format!("Bearer {token}") => Some(if shown.is_empty() {
            refusal(401, "RepoNotFound")
        } else {
            plain(401, "{\"error\":\"Invalid credentials in Authorization header\"}")
        }),
        Some(Access::Gated(token)) if !listing && shown != format!("Bearer {token}") => {
            Some(refusal(if shown.is_empty() { 401 } else { 403 }, "GatedRepo"))
        }
        Some(_) => None,
    }
}

/// An answer that a fault asks for, whatever was asked.
fn spoilt(shared: &Shared, request: &Request<Incoming>, faults: &[Fault]) -> Option<Answer> {
    faults.iter().find_map(|fault| match fault {
        Fault::Status { status, retry_after, .. } => {
            let answer = plain(*status, "{}");
            Some(match retry_after {
                Some(seconds) => with(answer, "retry-after", &seconds.to_string()),
                None => answer,
            })
        }
        Fault::Redirect(target) => Some(with(plain(302, ""), "location", target)),
        Fault::RedirectLoop => {
            Some(with(plain(302, ""), "location", &format!("{}{}", shared.hub, request.uri().path())))
        }
        Fault::GzipBomb => Some(with(plain(200, gzip_of_zeros(64 << 20)), "content-encoding", "gzip")),
        Fault::Body(body) => Some(plain(200, body.clone())),
        _ => None,
    })
}

fn info(shared: &Arc<Shared>, request: &Request<Incoming>, repo: &str, revision: &str) -> Answer {
    if let Some(answer) = barred(shared, request, repo, true) {
        return answer;
    }
    if let Some(answer) = spoilt(shared, request, &faults(shared, repo, REVISION)) {
        return answer;
    }
    let state = shared.state();
    let known = &state.repos[repo];
    let commit = known.revisions.get(revision).map(String::as_str);
    let commit = commit.or_else(|| known.commits.keys().map(String::as_str).find(|commit| *commit == revision));
    let Some(commit) = commit else { return refusal(404, "RevisionNotFound") };
    let siblings: Vec<_> = known.commits[commit].keys().map(|path| json!({"rfilename": path})).collect();
    let gated = matches!(known.access, Access::Gated(_));
    let body = json!({
        "_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": false, "gated": gated,
        "disabled": false, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
    });
    with(plain(200, body.to_string()), "content-type", "application/json")
}

fn tree(shared: &Arc<Shared>, request: &Request<Incoming>, repo: &str, commit: &str) -> Answer {
    if let Some(answer) = barred(shared, request, repo, true) {
        return answer;
    }
    let faults = faults(shared, repo, TREE);
    if let Some(answer) = spoilt(shared, request, &faults) {
        return answer;
    }
    let state = shared.state();
    let known = &state.repos[repo];
    let commit = known.revisions.get(commit).map_or(commit, String::as_str);
    let Some(files) = known.commits.get(commit) else { return refusal(404, "RevisionNotFound") };
    let mut entries: Vec<_> = files
        .iter()
        .map(|(path, file)| {
            let mut entry = json!({"type": "file", "path": path, "size": file.bytes.len(), "oid": file.git});
            if file.lfs {
                entry["lfs"] = json!({"oid": file.sha256, "size": file.bytes.len(), "pointerSize": 134});
            }
            entry
        })
        .collect();
    entries.push(json!({"type": "directory", "path": "some_folder", "size": 0, "oid": "0".repeat(40)}));
    let more = faults.iter().find_map(|fault| if let Fault::ManyFiles(count) = fault { Some(*count) } else { None });
    let more = more.unwrap_or(0);
    let total = entries.len() + more;
    let many = (0..more).map(|n| json!({"type": "file", "path": format!("f{n}"), "size": 1, "oid": "0".repeat(40)}));
    let cursor: usize = request
        .uri()
        .query()
        .and_then(|query| query.split('&').find_map(|pair| pair.strip_prefix("cursor=")?.parse().ok()))
        .unwrap_or(0);
    let page: Vec<_> = entries.into_iter().chain(many).skip(cursor).take(state.page).collect();
    let answer = plain(200, serde_json::to_vec(&page).expect("JSON"));
    let next = cursor + state.page;
    let answer = with(answer, "content-type", "application/json");
    if next >= total {
        return answer;
    }
    let link = format!("<{}/api/models/{repo}/tree/{commit}?recursive=true&cursor={next}>; rel=\"next\"", shared.hub);
    with(answer, "link", &link)
}

/// The file, by commit or revision.
fn find(shared: &Shared, repo: &str, commit: &str, path: &str) -> Result<(String, HubFile), Answer> {
    let state = shared.state();
    let known = state.repos.get(repo).ok_or_else(|| refusal(404, "RepoNotFound"))?;
    let commit = known.revisions.get(commit).map_or(commit, String::as_str);
    let files = known.commits.get(commit).ok_or_else(|| refusal(404, "RevisionNotFound"))?;
    let file = files.get(path).ok_or_else(|| refusal(404, "EntryNotFound"))?;
    Ok((commit.to_owned(), file.clone()))
}

fn resolve(shared: &Arc<Shared>, request: &Request<Incoming>, repo: &str, commit: &str, path: &str) -> Answer {
    if let Some(answer) = barred(shared, request, repo, false) {
        return answer;
    }
    let (commit, file) = match find(shared, repo, commit, path) {
        Ok(found) => found,
        Err(answer) => return answer,
    };
    // What the other server is told to do is not used up here.
    let faults = if file.lfs {
        let state = shared.state();
        state.faults.get(&(repo.to_owned(), path.to_owned())).cloned().unwrap_or_default()
    } else {
        faults(shared, repo, path)
    };
    let redirects = |fault: &&Fault| matches!(fault, Fault::Redirect(_) | Fault::RedirectLoop);
    let first: Vec<Fault> = if file.lfs { faults.iter().filter(redirects).cloned().collect() } else { faults.clone() };
    let answer = match spoilt(shared, request, &first) {
        Some(answer) => answer,
        None if file.lfs => {
            let signature = {
                let mut state = shared.state();
                state.signatures += 1;
                state.signatures
            };
            let target = format!("{}/cdn/{repo}/{commit}/{path}?Signature=s{signature}", shared.cdn);
            with(plain(302, ""), "location", &target)
        }
        None => body(shared, Server::Hub, request, &file, &faults),
    };
    let etag = faults.iter().find_map(|fault| match fault {
        Fault::ETag(text) => Some(text.clone()),
        _ => None,
    });
    let header = faults.iter().find_map(|fault| match fault {
        Fault::CommitHeader(text) => Some(text.clone()),
        _ => None,
    });
    let etag = format!("\"{}\"", etag.unwrap_or_else(|| file.etag().to_owned()));
    let answer = with(answer, "x-repo-commit", &header.unwrap_or(commit));
    let answer = with(answer, "etag", &etag);
    if !file.lfs {
        return answer;
    }
    with(with(answer, "x-linked-etag", &etag), "x-linked-size", &file.bytes.len().to_string())
}

fn cdn(shared: &Arc<Shared>, request: &Request<Incoming>, repo: &str, commit: &str, path: &str) -> Answer {
    let file = match find(shared, repo, commit, path) {
        Ok((_, file)) => file,
        Err(answer) => return answer,
    };
    let faults = faults(shared, repo, path);
    let signature = request.uri().query().unwrap_or_default().to_owned();
    if let Some(uses) =
        faults.iter().find_map(|fault| if let Fault::Expire { uses } = fault { Some(*uses) } else { None })
    {
        let mut state = shared.state();
        let used = state.uses.entry(signature.clone()).or_default();
        *used += 1;
        if *used > uses {
            return plain(403, "<Error>AccessDenied</Error>");
        }
    }
    if !signature.starts_with("Signature=") {
        return plain(403, "<Error>AccessDenied</Error>");
    }
    let first: Vec<Fault> =
        faults.iter().filter(|fault| !matches!(fault, Fault::Redirect(_) | Fault::RedirectLoop)).cloned().collect();
    match spoilt(shared, request, &first) {
        Some(answer) => answer,
        None => body(shared, Server::Cdn, request, &file, &faults),
    }
}

/// The file's bytes, or the part that is asked for, with what goes wrong.
fn body(shared: &Arc<Shared>, server: Server, request: &Request<Incoming>, file: &HubFile, faults: &[Fault]) -> Answer {
    let size = file.bytes.len() as u64;
    let range = request.headers().get("range").and_then(|value| value.to_str().ok());
    let range = range.filter(|_| !faults.contains(&Fault::IgnoreRange)).and_then(|text| {
        let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
        let last = if last.is_empty() { size - 1 } else { last.parse::<u64>().ok()?.min(size - 1) };
        Some((first.parse::<u64>().ok()?, last))
    });
    if range.is_some_and(|(first, last)| first > last) {
        return plain(416, "");
    }
    let (first, last) = range.unwrap_or((0, size.saturating_sub(1)));
    let mut bytes = file.bytes.slice(first as usize..if size == 0 { 0 } else { last as usize + 1 });
    let mut ending = Ending::default();
    for fault in faults {
        match fault {
            Fault::Cut { after, .. } => ending.cut = ending.cut.or(Some(*after)),
            Fault::CutSomewhere { within, .. } => ending.cut = ending.cut.or(Some(shared.state().below(*within))),
            Fault::WrongBytes { .. } => bytes = bytes.iter().map(|byte| byte ^ 0x55).collect(),
            Fault::Short => bytes.truncate(bytes.len() / 2),
            Fault::Stall { after } => ending.stall = Some(*after),
            Fault::Drip => ending.drip = true,
            _ => {}
        }
    }
    let (sender, pieces) = mpsc::channel(1);
    let length = Some(bytes.len() as u64);
    if request.method() == Method::GET {
        shared.state().counts.entry(server).or_default().downloads += 1;
        tokio::spawn(send(Arc::clone(shared), server, bytes, ending, sender));
    }
    let mut answer = Response::new(Sent { pieces, length });
    if range.is_some() {
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        answer = with(answer, "content-range", &format!("bytes {first}-{last}/{size}"));
    }
    let answer = with(answer, "accept-ranges", "bytes");
    if request.method() == Method::HEAD { with(answer, "content-length", &size.to_string()) } else { answer }
}

/// How a body ends, if not with its last byte.
#[derive(Clone, Copy, Debug, Default)]
struct Ending {
    cut: Option<u64>,
    stall: Option<u64>,
    drip: bool,
}

async fn send(
    shared: Arc<Shared>,
    server: Server,
    mut bytes: Bytes,
    ending: Ending,
    sender: mpsc::Sender<io::Result<Bytes>>,
) {
    let mut sent = 0u64;
    while !bytes.is_empty() {
        let chunk = if shared.pace.limit() > 0 { SMALL_CHUNK } else { CHUNK };
        let until = ending.cut.into_iter().chain(ending.stall).min().map_or(u64::MAX, |end| end - sent.min(end));
        let count = if ending.drip { 1 } else { chunk }.min(bytes.len()).min(until as usize);
        if count == 0 && ending.stall.is_some_and(|end| sent >= end) {
            sender.closed().await;
            return;
        }
        if count == 0 {
            // What is counted as sent is out of our own buffers before the connection breaks.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = sender.send(Err(io::Error::other("cut"))).await;
            return;
        }
        shared.pace.take(count).await;
        if ending.drip {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        if sender.send(Ok(bytes.split_to(count))).await.is_err() {
            return;
        }
        sent += count as u64;
        shared.state().counts.entry(server).or_default().bytes += count as u64;
    }
}

/// A gzip stream of zeros: stored blocks would not be a bomb, so it is one deflate block of runs, written by hand.
fn gzip_of_zeros(bytes: usize) -> Vec<u8> {
    // Fixed Huffman codes: a literal 0 is 00110000, length 258 is 11000101, distance 1 is 00000.
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let (mut bits, mut filled) = (0u32, 0u32);
    let mut put = |code: u32, length: u32, out: &mut Vec<u8>| {
        for at in (0..length).rev() {
            bits |= (code >> at & 1) << filled;
            filled += 1;
            if filled == 8 {
                out.push(bits as u8);
                (bits, filled) = (0, 0);
            }
        }
    };
    put(1, 1, &mut out);
    put(0b10, 2, &mut out);
    put(0b0011_0000, 8, &mut out);
    for _ in 0..bytes / 258 {
        put(0b1100_0101, 8, &mut out);
        put(0, 5, &mut out);
    }
    put(0, 7, &mut out);
    put(0, 7, &mut out);
    out.extend([0; 8]);
    out
}
