//! A raw HTTP/1.1 client on a blocking socket, as far from the product's own client as can be: it shows the
//! bytes, tells a stream that was closed in order from one that broke off, and sends what no library would.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rbee_wire::error::ErrorReply;
use rbee_wire::event::{Done, Token};
use rbee_wire::sse::{DONE, Decoder, Frame};
use rbee_wire::{ErrorBody, Event};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Longest silence that a test puts up with.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The first line and the headers of an answer.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// The status.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Head,
    Fixed(usize),
    ChunkSize,
    Chunk(usize),
    ChunkEnd,
    Trailer,
    UntilClose,
    Complete,
}

/// An incremental parser of one answer.
#[derive(Debug)]
pub struct Parser {
    buffer: Vec<u8>,
    part: Part,
    /// The head, once it is whole.
    pub head: Option<Head>,
}

impl Default for Parser {
    fn default() -> Self {
        Self { buffer: Vec::new(), part: Part::Head, head: None }
    }
}

impl Parser {
    /// Whether the whole answer has come, by its own account.
    pub fn is_complete(&self) -> bool {
        self.part == Part::Complete
    }

    /// Takes bytes as they come and appends what they have of the body.
    ///
    /// # Errors
    /// What is not HTTP about them.
    pub fn feed(&mut self, bytes: &[u8], body: &mut Vec<u8>) -> Result<(), String> {
        self.buffer.extend_from_slice(bytes);
        loop {
            match self.part {
                Part::Complete if self.buffer.is_empty() => return Ok(()),
                Part::Complete => return Err(format!("{} bytes after the answer's end", self.buffer.len())),
                Part::UntilClose => {
                    body.append(&mut self.buffer);
                    return Ok(());
                }
                Part::Fixed(left) | Part::Chunk(left) => {
                    let count = left.min(self.buffer.len());
                    body.extend(self.buffer.drain(..count));
                    let left = left - count;
                    let chunked = matches!(self.part, Part::Chunk(_));
                    self.part = match (chunked, left) {
                        (false, 0) => Part::Complete,
                        (true, 0) => Part::ChunkEnd,
                        (false, _) => Part::Fixed(left),
                        (true, _) => Part::Chunk(left),
                    };
                    if left > 0 {
                        return Ok(());
                    }
                }
                Part::Head | Part::ChunkSize | Part::ChunkEnd | Part::Trailer => {
                    let mark: &[u8] = if self.part == Part::Head { b"\r\n\r\n" } else { b"\r\n" };
                    let Some(end) = self.buffer.windows(mark.len()).position(|window| window == mark) else {
                        return Ok(());
                    };
                    let text: Vec<u8> = self.buffer.drain(..end + mark.len()).take(end).collect();
                    let text = String::from_utf8(text).map_err(|_| "a head that is not UTF-8")?;
                    self.part = self.after_text(&text)?;
                }
            }
        }
    }

    fn after_text(&mut self, text: &str) -> Result<Part, String> {
        Ok(match self.part {
            Part::Head => {
                let head = parse_head(text)?;
                let part = if head.header("transfer-encoding") == Some("chunked") {
                    Part::ChunkSize
                } else if let Some(length) = head.header("content-length") {
                    Part::Fixed(length.parse().map_err(|_| format!("content-length {length:?}"))?)
                } else if head.status == 204 {
                    Part::Complete
                } else {
                    Part::UntilClose
                };
                self.head = Some(head);
                part
            }
            Part::ChunkSize => match usize::from_str_radix(text, 16).map_err(|_| format!("chunk size {text:?}"))? {
                0 => Part::Trailer,
                size => Part::Chunk(size),
            },
            Part::Trailer if text.is_empty() => Part::Complete,
            Part::Trailer => Part::Trailer,
            _ if text.is_empty() => Part::ChunkSize,
            _ => return Err(format!("{text:?} after a chunk")),
        })
    }
}

fn parse_head(text: &str) -> Result<Head, String> {
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
    let status = status.ok_or_else(|| format!("no status line: {text:?}"))?;
    let header = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    Ok(Head { status, headers: lines.filter_map(header).collect() })
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status and headers.
    pub head: Head,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The status.
    pub fn status(&self) -> u16 {
        self.head.status
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as a type of the wire.
    ///
    /// # Panics
    /// When it is something else.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {} {}", self.status(), self.text()))
    }

    /// The error in it, whose status must be its code's own.
    ///
    /// # Panics
    /// When the answer is none of our errors.
    #[track_caller]
    pub fn error(&self) -> ErrorBody {
        let error = self.json::<ErrorReply>().error;
        assert_eq!(self.status(), error.code.status(), "{}", self.text());
        assert!(error.request_id.is_some(), "no request id: {}", self.text());
        error
    }
}

/// A request as it is sent.
#[derive(Clone, Debug, Default)]
pub struct Request {
    head: String,
    body: Vec<u8>,
}

impl Request {
    /// A request without a body.
    pub fn new(method: &str, path: &str) -> Self {
        Self { head: format!("{method} {path} HTTP/1.1\r\n"), body: Vec::new() }
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.head.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    /// With a body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// The bytes on the wire; `Host` is added unless it is there.
    pub fn bytes(&self, host: SocketAddr) -> Vec<u8> {
        let mut text = self.head.clone();
        if !text.to_ascii_lowercase().contains("\r\nhost:") {
            text.push_str(&format!("Host: {host}\r\n"));
        }
        if !self.body.is_empty() {
            text.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        }
        text.push_str("Connection: close\r\n\r\n");
        let mut bytes = text.into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A server to talk to; every request takes a connection of its own.
#[derive(Clone, Debug)]
pub struct Http {
    /// Where it listens.
    pub address: SocketAddr,
    /// Sent as `Authorization: Bearer`, if there is one.
    pub bearer: Option<String>,
}

impl Http {
    /// The server at an address.
    pub fn new(address: SocketAddr) -> Self {
        Self { address, bearer: None }
    }

    /// Sends a request and gives the connection as soon as the answer's head is there.
    ///
    /// # Errors
    /// When nothing answers, or not in HTTP.
    pub fn try_open(&self, mut request: Request) -> Result<Stream, String> {
        if let Some(bearer) = &self.bearer {
            request = request.header("Authorization", &format!("Bearer {bearer}"));
        }
        let socket = TcpStream::connect_timeout(&self.address, Duration::from_secs(5))
            .map_err(|error| format!("cannot connect to {}: {error}", self.address))?;
        let _ = socket.set_nodelay(true);
        let mut stream = Stream::new(socket);
        // A server may refuse before it has read a large body; its answer counts, not our write.
        let sent = stream.socket.write_all(&request.bytes(self.address));
        while stream.parser.head.is_none() {
            match stream.read_more() {
                Ok(true) => {}
                Ok(false) => return Err(format!("{} closed without an answer ({sent:?})", self.address)),
                Err(error) => return Err(error),
            }
        }
        Ok(stream)
    }

    /// Sends a request and closes the connection without a look at the answer.
    ///
    /// # Errors
    /// When nothing takes it.
    pub fn send_and_leave(&self, request: Request) -> Result<(), String> {
        let mut socket = TcpStream::connect(self.address).map_err(|error| error.to_string())?;
        socket.write_all(&request.bytes(self.address)).map_err(|error| error.to_string())?;
        let _ = socket.shutdown(Shutdown::Both);
        Ok(())
    }

    /// As [`Http::try_open`].
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn open(&self, request: Request) -> Stream {
        self.try_open(request).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Sends a request and waits for the whole answer.
    ///
    /// # Errors
    /// When there is none.
    pub fn try_send(&self, request: Request) -> Result<Answer, String> {
        let mut stream = self.try_open(request)?;
        while !stream.parser.is_complete() {
            if !stream.read_more()? {
                if stream.parser.part == Part::UntilClose {
                    break;
                }
                return Err(format!("the answer of {} broke off", self.address));
            }
        }
        Ok(Answer { head: stream.head(), body: stream.body })
    }

    /// As [`Http::try_send`].
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn send(&self, request: Request) -> Answer {
        self.try_send(request).unwrap_or_else(|error| panic!("{error}"))
    }

    /// `GET`.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.send(Request::new("GET", path))
    }

    /// `DELETE`.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn delete(&self, path: &str) -> Answer {
        self.send(Request::new("DELETE", path))
    }

    /// `POST` with a JSON body.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(post(path, body))
    }

    /// Listens to an event stream.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn listen(&self, path: &str, after: Option<u64>) -> Stream {
        let mut request = Request::new("GET", path);
        if let Some(after) = after {
            request = request.header("Last-Event-ID", &after.to_string());
        }
        self.open(request)
    }

    /// Posts a job whose answer is its stream.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn stream_of(&self, path: &str, body: &Value) -> Stream {
        self.open(post(path, body).header("Accept", "text/event-stream"))
    }
}

/// A connection whose own end takes as little as the system lets it, until somebody reads.
///
/// # Panics
/// When there is none.
#[track_caller]
pub fn small_window(address: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, connect, socket, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let made = socket(family, SocketType::STREAM, None).expect("a socket");
    // Before it is connected: then the other end never hears of more.
    sockopt::set_socket_recv_buffer_size(&made, 1).expect("a small buffer");
    connect(&made, &address).unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
    made.into()
}

/// A post with a JSON body, to be sent as it is or with more headers.
pub fn post(path: &str, body: &Value) -> Request {
    Request::new("POST", path).header("Content-Type", "application/json").body(body.to_string())
}

/// One event as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// Its offset.
    pub id: Option<u64>,
    /// Its JSON.
    pub json: String,
    /// Its meaning.
    pub event: Event,
}

/// How a stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// `data: [DONE]`, then the answer was closed in order.
    Done,
    /// Closed in order without the end mark: what must never happen.
    ClosedWithoutDone,
    /// The connection ended within the answer.
    Broken,
    /// The end mark came, and the answer was not closed after it.
    DoneThenBroken,
}

/// What comes next of a stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// An event.
    Event(Box<Said>),
    /// The end.
    End(End),
}

/// An answer that is read as it comes. Dropping it closes the connection.
#[derive(Debug)]
pub struct Stream {
    socket: TcpStream,
    parser: Parser,
    body: Vec<u8>,
    decoder: Decoder,
    frames: VecDeque<Frame>,
    decoded: usize,
    done: bool,
}

impl Stream {
    fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            parser: Parser::default(),
            body: Vec::new(),
            decoder: Decoder::new(64 << 20),
            frames: VecDeque::new(),
            decoded: 0,
            done: false,
        }
    }

    /// Status and headers.
    pub fn head(&self) -> Head {
        self.parser.head.clone().unwrap_or_default()
    }

    /// The status.
    pub fn status(&self) -> u16 {
        self.head().status
    }

    /// The bytes of the body so far.
    pub fn bytes(&self) -> &[u8] {
        &self.body
    }

    /// Reads what comes, without a look at events; false at the connection's end.
    ///
    /// # Errors
    /// When nothing comes for [`LIMIT`], or what comes is not HTTP.
    pub fn read_more(&mut self) -> Result<bool, String> {
        let mut buffer = [0; 16 << 10];
        let _ = self.socket.set_read_timeout(Some(LIMIT));
        match self.socket.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(count) => self.parser.feed(&buffer[..count], &mut self.body).map(|()| true),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(format!("silence for {LIMIT:?}"))
            }
            Err(_) => Ok(false),
        }
    }

    /// The next event or the end.
    ///
    /// # Panics
    /// When no event comes for [`LIMIT`], comments not counted, or what comes is not of the protocol.
    #[track_caller]
    pub fn hear(&mut self) -> Heard {
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < LIMIT, "no event for {LIMIT:?}, though the stream is alive");
            if let Some(frame) = self.frames.pop_front() {
                assert!(!self.done, "an event after the end mark");
                if frame.data == DONE.as_bytes() {
                    self.done = true;
                    continue;
                }
                let json = String::from_utf8(frame.data).expect("events are UTF-8");
                let event = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
                return Heard::Event(Box::new(Said { id: frame.id, json, event }));
            }
            // What came with the head is looked at before more is waited for.
            if self.decoded < self.body.len() {
                let frames = &mut self.frames;
                let each = |frame| frames.push_back(frame);
                self.decoder.feed(&self.body[self.decoded..], each).expect("events have bounds");
                self.decoded = self.body.len();
                continue;
            }
            let open = !self.parser.is_complete() && self.read_more().unwrap_or_else(|error| panic!("{error}"));
            if !open && self.decoded == self.body.len() {
                return Heard::End(match (self.done, self.parser.is_complete()) {
                    (true, true) => End::Done,
                    (true, false) => End::DoneThenBroken,
                    (false, true) => End::ClosedWithoutDone,
                    (false, false) => End::Broken,
                });
            }
        }
    }

    /// Everything up to the end.
    ///
    /// # Panics
    /// As [`Stream::hear`].
    #[track_caller]
    pub fn rest(&mut self) -> Told {
        let mut said = Vec::new();
        loop {
            match self.hear() {
                Heard::Event(event) => said.push(*event),
                Heard::End(end) => return Told { said, end, refusal: self.refusal() },
            }
        }
    }

    /// Everything up to and with the first event that fits.
    ///
    /// # Panics
    /// As [`Stream::hear`], and when the stream ends before.
    #[track_caller]
    pub fn until(&mut self, what: &str, fits: impl Fn(&Event) -> bool) -> Vec<Said> {
        let mut said = Vec::new();
        loop {
            match self.hear() {
                Heard::Event(event) => {
                    said.push(*event);
                    if fits(&said[said.len() - 1].event) {
                        return said;
                    }
                }
                Heard::End(end) => panic!("the stream ended ({end:?}) without {what}: {said:#?} {:?}", self.refusal()),
            }
        }
    }

    /// Reads until so many tokens have come.
    ///
    /// # Panics
    /// As [`Stream::until`].
    #[track_caller]
    pub fn tokens(&mut self, count: usize) -> Vec<Said> {
        let mut said = Vec::new();
        for _ in 0..count {
            said.extend(self.until("a token", |event| matches!(event, Event::Token(_))));
        }
        said
    }

    /// Ends the connection, both ways.
    pub fn close(self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn refusal(&self) -> Option<ErrorBody> {
        serde_json::from_slice::<ErrorReply>(&self.body).ok().map(|reply| reply.error)
    }
}

/// A stream that has ended.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its events.
    pub said: Vec<Said>,
    /// How it ended.
    pub end: End,
    /// The error, when there was no stream but a refusal.
    pub refusal: Option<ErrorBody>,
}

impl Told {
    /// Asserts what holds for every stream that ended well: offsets from the first on without a gap, and one end
    /// that is the last event.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn whole(self) -> Self {
        assert_eq!(self.end, End::Done, "{:#?} {:?}", self.said, self.refusal);
        let first = self.said.first().and_then(|said| said.id).expect("an event with an offset");
        for (at, said) in (first..).zip(&self.said) {
            assert_eq!(said.id, Some(at), "offsets have a gap: {:#?}", self.said);
        }
        let ends: Vec<usize> = (0..self.said.len()).filter(|&i| self.said[i].event.is_end()).collect();
        assert_eq!(ends, [self.said.len() - 1], "ends: {:#?}", self.said);
        self
    }

    /// The tokens.
    pub fn tokens(&self) -> Vec<Token> {
        let token = |said: &Said| match &said.event {
            Event::Token(token) => Some(token.clone()),
            _ => None,
        };
        self.said.iter().filter_map(token).collect()
    }

    /// The text of all tokens.
    pub fn text(&self) -> String {
        self.tokens().into_iter().map(|token| token.t).collect()
    }

    /// The end of a job that worked.
    ///
    /// # Panics
    /// When it ended otherwise.
    #[track_caller]
    pub fn done(&self) -> Done {
        match self.said.last().map(|said| &said.event) {
            Some(Event::Done(done)) => done.clone(),
            other => panic!("no done: {other:#?} {:?} {:?}", self.end, self.refusal),
        }
    }

    /// The error that ended the job.
    ///
    /// # Panics
    /// When it ended otherwise.
    #[track_caller]
    pub fn error(&self) -> ErrorBody {
        match self.said.last().map(|said| &said.event) {
            Some(Event::Error(error)) => error.clone(),
            other => panic!("no error: {other:#?} {:?} {:?}", self.end, self.refusal),
        }
    }

    /// The values of `data` events, as one type.
    ///
    /// # Panics
    /// When one is of another type.
    #[track_caller]
    pub fn data<T: DeserializeOwned>(&self) -> Vec<T> {
        let value = |said: &Said| match &said.event {
            Event::Data { value } => Some(value.clone()),
            _ => None,
        };
        let parse =
            |value: Value| serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"));
        self.said.iter().filter_map(value).map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_split_of_an_answer_parses_to_the_same_body_and_a_cut_one_is_not_complete() {
        let whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX: a\r\n\r\n3\r\nabc\r\n5\r\ndefgh\r\n0\r\n\r\n";
        for cut in 0..whole.len() {
            let (mut parser, mut body) = (Parser::default(), Vec::new());
            parser.feed(&whole[..cut], &mut body).unwrap();
            assert!(!parser.is_complete());
            parser.feed(&whole[cut..], &mut body).unwrap();
            assert!(parser.is_complete());
            assert_eq!(body, b"abcdefgh");
            assert_eq!(parser.head.unwrap().header("x"), Some("a"));
        }
    }
}
