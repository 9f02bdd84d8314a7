//! Commands with a hard time limit, run to their end or talked to while they run.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Signal, send};

/// Longest time that a command may take unless the test says otherwise.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How a command ended and what it said.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit code; 128 and the signal's number when one ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it told.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Output {
    /// Asserts the exit code.
    ///
    /// # Panics
    /// When it is another one.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "exit code; stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Asserts that stderr has these texts.
    ///
    /// # Panics
    /// When one is not there.
    #[track_caller]
    pub fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stderr.contains(text), "stderr has no {text:?}:\n{}", self.stderr);
        }
        self
    }

    /// stdout as one JSON document.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("stdout is not one JSON document: {error}\n{}", self.stdout))
    }

    /// stdout as JSON lines.
    ///
    /// # Panics
    /// When a line is not JSON.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.stdout.lines().map(parse).collect()
    }
}

/// What a command writes, as it comes.
#[derive(Debug)]
struct Heard {
    pieces: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
}

/// Whether more can come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum More {
    MayCome,
    Timeout,
    Closed,
}

impl Heard {
    fn listen(mut pipe: impl Read + Send + 'static) -> Self {
        let (send_piece, pieces) = channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            loop {
                match pipe.read(&mut buffer) {
                    Ok(count) if count > 0 && send_piece.send(buffer[..count].to_vec()).is_ok() => {}
                    _ => return,
                }
            }
        });
        Self { pieces, bytes: Vec::new() }
    }

    fn wait(&mut self, deadline: Instant) -> More {
        match self.pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => {
                self.bytes.extend_from_slice(&piece);
                More::MayCome
            }
            Err(RecvTimeoutError::Timeout) => More::Timeout,
            Err(RecvTimeoutError::Disconnected) => More::Closed,
        }
    }

    /// Takes what comes until the pipe is closed by everybody who holds it.
    fn wait_closed(&mut self, deadline: Instant) -> bool {
        loop {
            match self.wait(deadline) {
                More::MayCome => {}
                More::Timeout => return false,
                More::Closed => return true,
            }
        }
    }

    fn text(&mut self) -> String {
        self.bytes.extend(self.pieces.try_iter().flatten());
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    what: String,
    child: Child,
    stdout: Heard,
    stderr: Heard,
    began: Instant,
}

/// What a command reads.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Nothing: stdin is empty and no pipe.
    Null,
    /// This text through a pipe, which is then closed.
    Text(&'a str),
}

/// Starts a command.
///
/// # Panics
/// When it cannot be started.
#[track_caller]
pub fn spawn(mut command: Command, input: Input<'_>) -> Running {
    let what = format!("{:?}", command.get_args().collect::<Vec<_>>());
    command.stdin(if matches!(input, Input::Null) { Stdio::null() } else { Stdio::piped() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {:?}: {error}", command.get_program()));
    let stdin = child.stdin.take();
    if let (Input::Text(text), Some(mut pipe)) = (input, stdin) {
        let text = text.to_owned();
        // A command that does not read what it is given must not block the test.
        std::thread::spawn(move || pipe.write_all(text.as_bytes()));
    }
    let stdout = Heard::listen(child.stdout.take().expect("stdout is piped"));
    let stderr = Heard::listen(child.stderr.take().expect("stderr is piped"));
    Running { what, child, stdout, stderr, began }
}

impl Running {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Time since it was started.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        send(self.child.id(), signal);
    }

    /// Stops reading its stdout: its next write finds a closed pipe.
    pub fn close_stdout(&mut self) {
        self.stdout.pieces = channel().1;
    }

    /// Waits until stdout has enough, and returns it so far.
    ///
    /// # Panics
    /// When that does not come in time.
    #[track_caller]
    pub fn hear(&mut self, what: &str, enough: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let text = self.stdout.text();
            if enough(&text) {
                return text;
            }
            if self.stdout.wait(deadline) != More::MayCome {
                let stderr = self.stderr.text();
                panic!("{}: no {what} on stdout: {text:?}; stderr:\n{stderr}", self.what);
            }
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end within `limit`, or something keeps its stdout or stderr open after its end: a daemon
    /// that it started must not.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Output {
        let deadline = self.began + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() > deadline {
                let (stdout, stderr) = (self.stdout.text(), self.stderr.text());
                panic!("{} took over {limit:?}; stdout:\n{stdout}\nstderr:\n{stderr}", self.what);
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let took = self.began.elapsed();
        let pipes = Instant::now() + Duration::from_secs(10);
        for (name, heard) in [("stdout", &mut self.stdout), ("stderr", &mut self.stderr)] {
            assert!(heard.wait_closed(pipes), "{} has ended, and its {name} is still held open", self.what);
        }
        Output {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
