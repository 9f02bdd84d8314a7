//! The program itself against a queen that says what it is told to: stdout, stderr and exit codes.
#![expect(clippy::unwrap_used, reason = "a test says that something is not so by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rbee_config::Home;
use serde_json::{Value, json};

/// What the queen answers to a posted job.
#[derive(Clone)]
enum Script {
    /// These events and the end mark.
    Whole(Vec<Value>),
    /// These events, then the connection closes without the end mark.
    Cut(Vec<Value>),
    /// These events, then silence with the connection open.
    Silent(Vec<Value>),
    /// A refusal.
    Refuse(u16, Value),
}

/// A queen that answers by script and keeps what it was asked.
struct Queen {
    root: tempfile::TempDir,
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

const JOB: &str = "job-01234567-0123456789abcdef0123456789abcdef";

impl Queen {
    fn start(script: Script) -> Self {
        let root = tempfile::tempdir().unwrap();
        let home = Home::under(root.path());
        home.create().unwrap();
        Self::of(root, home.proof().unwrap(), script)
    }

    fn of(root: tempfile::TempDir, proof: String, script: Script) -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").unwrap(), root, proof, script)
    }

    fn at(listener: TcpListener, root: tempfile::TempDir, proof: String, script: Script) -> Self {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        // Of the build that the command line would start, so that it is used and not replaced.
        let beside = Path::new(env!("CARGO_BIN_EXE_rbee")).with_file_name("queen-rbee");
        let build = rbee_supervisor::build_id(&beside).unwrap_or_default();
        let info = json!({
            "program": "queen-rbee", "version": "0.1.0", "build": build, "protocol": 1, "pid": std::process::id(),
            "uptime_ms": 1000, "incarnation": {"counter": 1, "random": "0123456789abcdef0123456789abcdef"},
            "home_proof": proof
        });
        let seen = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (info, script, seen) = (info.clone(), script.clone(), seen.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &info, &script, &seen));
            }
        });
        Self { root, url, asked }
    }

    fn command(&self, args: &[&str]) -> Command {
        command(Path::new(env!("CARGO_BIN_EXE_rbee")), self.root.path(), &self.url, args)
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn asked(&self) -> String {
        self.asked.lock().unwrap().join("\n")
    }
}

fn command(program: &Path, home: &Path, queen: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env_clear().env("RBEE_HOME", home).env("RBEE_QUEEN_URL", queen).env("PATH", "/usr/bin:/bin");
    // No hive listens there.
    command.env("RBEE_HIVE_BIND", "127.0.0.1:1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn serve(stream: TcpStream, info: &Value, script: &Script, seen: &Mutex<Vec<String>>) {
    let mut out = stream.try_clone().unwrap();
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
        let (mut length, mut one_call) = (0, false);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            one_call |= line == "accept: text/event-stream";
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let asked = head.trim().trim_end_matches(" HTTP/1.1").to_owned();
        seen.lock().unwrap().push(format!("{asked} {}", String::from_utf8(body).unwrap()).trim().to_owned());
        let answer = |out: &mut TcpStream, status: u16, body: &Value| {
            let body = body.to_string();
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            out.write_all(format!("{head}{body}").as_bytes()).unwrap();
        };
        match asked.as_str() {
            "GET /v1/info" => answer(&mut out, 200, info),
            "GET /v1/jobs" => answer(&mut out, 200, &json!({"jobs": []})),
            "POST /v1/jobs" if !one_call && !matches!(script, Script::Refuse(..)) => {
                answer(&mut out, 202, &json!({"job_id": JOB, "sse_url": format!("/v1/jobs/{JOB}/stream")}));
            }
            text if text.starts_with("DELETE ") => answer(&mut out, 200, &json!({})),
            _ => {
                let (events, end) = match script {
                    Script::Refuse(status, body) => {
                        answer(&mut out, *status, body);
                        continue;
                    }
                    Script::Whole(events) => (events, "data: [DONE]\n\n"),
                    Script::Cut(events) | Script::Silent(events) => (events, ""),
                };
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
                out.write_all(head.as_bytes()).unwrap();
                for (id, event) in events.iter().enumerate() {
                    if out.write_all(format!("id: {id}\ndata: {event}\n\n").as_bytes()).is_err() {
                        return;
                    }
                }
                let _ = out.write_all(end.as_bytes());
                if matches!(script, Script::Silent(_)) {
                    // Until the reader leaves.
                    let _ = reader.read(&mut [0; 1]);
                }
                return;
            }
        }
    }
}

fn token(i: u64, text: &str) -> Value {
    json!({"type": "token", "i": i, "t": text, "id": 7})
}

fn started() -> Value {
    json!({"type": "started", "job_id": JOB, "worker_id": "w1", "model": "tinybee", "prompt_tokens": 4,
        "cached_tokens": 0, "seed": 5, "why": "first"})
}

fn done(reason: &str) -> Value {
    json!({"type": "done", "choices": [{"finish_reason": reason}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6, "cached_tokens": 0},
        "timings": {"queue_ms": 0.0, "load_ms": 0.0, "prefill_ms": 1.0, "decode_ms": 2.0, "total_ms": 3.0, "tokens_per_s": 9.0}})
}

fn story() -> Vec<Value> {
    let note = json!({"type": "note", "level": "info", "text": "no model was named: tinybee answers"});
    vec![note, started(), token(0, " there was"), token(1, " a bee"), done("stop")]
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Exit code, stdout and stderr.
fn seen(output: &Output) -> (i32, &str, &str) {
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn stdout_is_the_text_and_nothing_else() {
    let queen = Queen::start(Script::Whole(story()));
    let plain = queen.run(&["infer", "Once", "--seed", "5"]);
    assert_eq!(seen(&plain), (0, " there was a bee", "no model was named: tinybee answers\n"));
    assert_eq!(
        queen.asked(),
        "GET /v1/info\nPOST /v1/jobs {\"operation\":\"infer\",\"messages\":[{\"role\":\"user\",\"content\":\"Once\"}],\"seed\":5}"
    );
    let quiet = queen.run(&["infer", "-q", "--no-stream", "-p", "Once"]);
    assert_eq!(seen(&quiet), (0, " there was a bee", ""));
    let timed = queen.run(&["run", "tinybee", "Once", "-q", "--timings"]);
    assert!(text(&timed.stderr).contains("prefill  1.0 ms\n"), "{timed:?}");
    let lines = queen.run(&["infer", "--json", "Once"]);
    let lines: Vec<Value> = text(&lines.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, story());
    let detached = queen.run(&["infer", "--detach", "Once"]);
    assert_eq!(text(&detached.stdout), format!("{JOB}\n"));
}

#[test]
fn a_pipe_is_the_prompt() {
    let queen = Queen::start(Script::Whole(story()));
    for (args, sent) in [
        (&["infer"][..], r#""content":"Once\nupon"}"#),
        (&["infer", "-"], r#""content":"Once\nupon"}"#),
        (&["run", "tinybee"], r#""content":"Once\nupon"}"#),
        (&["infer", "--raw", "-p", "-"], r#""prompt":"Once\nupon\n""#),
    ] {
        let mut child = queen.command(args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"Once\nupon\n").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{args:?}");
        assert!(queen.asked.lock().unwrap().pop().unwrap().contains(sent), "{args:?}: {}", queen.asked());
    }
    let nothing = queen.run(&["infer"]);
    assert_eq!((nothing.status.code(), text(&nothing.stdout)), (Some(2), ""));
}

#[test]
fn every_end_has_its_exit_code_and_says_what_to_do() {
    let error = json!({"type": "error", "code": "MODEL_NOT_FOUND", "message": "no model `x`", "hint": "try y", "retryable": false});
    let refusal = json!({"error": {"code": "QUEUE_FULL", "message": "256 jobs wait", "hint": "try later", "retryable": true,
        "retry_after_ms": 1500}});
    for (script, code, stdout, stderr) in [
        (Script::Whole(vec![error]), 3, "", "error: no model `x` (MODEL_NOT_FOUND)\nhint: try y\n"),
        (
            Script::Refuse(429, refusal),
            1,
            "",
            "error: 256 jobs wait (QUEUE_FULL)\nhint: try later\nhint: try again in 2 s\n",
        ),
        (
            Script::Whole(vec![started(), token(0, "a"), done("cancelled")]),
            1,
            "a",
            "error: the job was cancelled by somebody else\n",
        ),
        (Script::Cut(vec![started(), token(0, "a")]), 4, "a", "error: the queen went away"),
    ] {
        let queen = Queen::start(script);
        let output = queen.run(&["infer", "x"]);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(code), stdout), "{output:?}");
        assert!(text(&output.stderr).starts_with(stderr), "{output:?}");
    }
}

#[test]
fn an_error_is_json_too() {
    let refusal = json!({"error": {"code": "JOB_NOT_FOUND", "message": "no job", "retryable": false}});
    let queen = Queen::start(Script::Refuse(404, refusal.clone()));
    let output = queen.run(&["job", "get", "job-1", "--json"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), refusal);
}

#[test]
fn operations_that_are_not_built_pass_the_queens_word_on() {
    let error = json!({"type": "error", "code": "NOT_IMPLEMENTED", "message": "model_download is not built yet", "retryable": false});
    let queen = Queen::start(Script::Whole(vec![error]));
    let output = queen.run(&["pull", "org/name"]);
    assert_eq!(seen(&output), (1, "", "error: model_download is not built yet (NOT_IMPLEMENTED)\n"));
}

#[test]
fn a_queen_of_another_home_is_named_and_gets_no_prompt() {
    let root = tempfile::tempdir().unwrap();
    let home = Home::under(root.path());
    home.create().unwrap();
    home.nonce().unwrap();
    let queen = Queen::of(root, "0".repeat(64), Script::Whole(story()));
    for verb in [&["infer", "secret"][..], &["down"], &["status"]] {
        let output = queen.run(verb);
        assert_eq!(output.status.code(), Some(4));
        let said = text(&output.stderr);
        assert!(said.contains("of another user or home") && said.contains("RBEE_QUEEN_BIND"), "{said}");
    }
    assert!(!queen.asked().contains("POST"), "{}", queen.asked());
}

fn wait_for(what: &str, mut yes: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !yes() {
        assert!(Instant::now() < deadline, "{what} did not come about in 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn interrupt(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

#[test]
fn ctrl_c_cancels_the_job_and_exits_with_130() {
    let queen = Queen::start(Script::Silent(vec![started(), token(0, "a")]));
    let mut child = queen.command(&["infer", "x"]).spawn().unwrap();
    let mut first = [0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"a", "the first token is out before the second came");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    wait_for("the cancellation", || queen.asked().contains(&format!("DELETE /v1/jobs/{JOB}")));
}

#[test]
fn a_reader_that_leaves_is_success_and_cancels_the_job() {
    let mut events = vec![started()];
    events.extend((0..200).map(|i| token(i, "text ")));
    let queen = Queen::start(Script::Silent(events));
    let mut child = queen.command(&["infer", "x"]).spawn().unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
    wait_for("the cancellation", || queen.asked().contains(&format!("DELETE /v1/jobs/{JOB}")));
}

#[test]
fn who_holds_the_port_is_named() {
    let queen = Queen::start(Script::Whole(story()));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"220 mail.example\r\n");
        }
    });
    let output = queen.run(&["infer", "x", "--queen", &url]);
    assert_eq!(output.status.code(), Some(4));
    let said = text(&output.stderr);
    assert!(said.contains(&format!("process {} (", std::process::id())) && said.contains("another port"), "{said}");
}

/// The program in a folder of its own, beside a queen that is this shell script.
fn beside(folder: &Path, script: &str) -> PathBuf {
    // By another process: a file that this one has open for writing while it forks cannot be run.
    let make = r#"cp "$0" rbee; printf '%s' "$1" > queen-rbee; chmod +x queen-rbee"#;
    let mut made = Command::new("/bin/sh");
    made.args(["-c", make, env!("CARGO_BIN_EXE_rbee"), &format!("#!/bin/sh\n{script}")]);
    assert!(made.current_dir(folder).status().unwrap().success());
    folder.join("rbee")
}

/// An address where nothing listens now.
fn free_url() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn a_queen_is_started_where_nothing_answers_and_the_daemons_are_named_once() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().to_owned();
    let home = Home::under(&folder);
    home.create().unwrap();
    // It says what it was started with, and that it listens when the test listens in its place.
    let told = format!("cd {}\n", folder.display());
    let script = r#"echo "$@" > args; mv args started
        until [ -e go ]; do sleep 0.01; done
        echo '{"url":"http://anywhere"}' > "/proc/self/fd/$RBEE_READY_FD""#;
    let program = beside(&folder, &(told + script));
    let url = free_url();
    let mut child = command(&program, &folder, &url, &["infer", "Once"]).spawn().unwrap();
    wait_for("the start", || folder.join("started").exists());
    let at = url.strip_prefix("http://").unwrap();
    assert_eq!(std::fs::read_to_string(folder.join("started")).unwrap(), format!("--bind {at}\n"));
    let queen = Queen::at(TcpListener::bind(at).unwrap(), root, home.proof().unwrap(), Script::Whole(story()));
    assert!(queen.asked().is_empty());
    std::fs::write(folder.join("go"), "").unwrap();
    let (mut stdout, mut stderr) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((child.wait().unwrap().code(), stdout.as_str()), (Some(0), " there was a bee"), "{stderr}");
    assert_eq!(stderr, "queen and hive keep running; `rbee down` stops them\nno model was named: tinybee answers\n");
}

#[test]
fn a_queen_that_does_not_start_shows_its_last_words() {
    let root = tempfile::tempdir().unwrap();
    let program = beside(root.path(), "echo the last words >&2; exit 3");
    let output = command(&program, root.path(), &free_url(), &["infer", "x"]).output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    let said = text(&output.stderr);
    assert!(said.contains("error: cannot start queen-rbee") && said.contains("the last words"), "{said}");

    std::fs::remove_file(root.path().join("queen-rbee")).unwrap();
    let output = command(&program, root.path(), &free_url(), &["infer", "x"]).output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert!(text(&output.stderr).contains("queen-rbee is not there\nhint: "), "{output:?}");
}

#[test]
fn a_queen_of_another_build_is_named_by_verbs_that_may_not_replace_it() {
    let queen = Queen::start(Script::Whole(story()));
    let folder = tempfile::tempdir().unwrap();
    let program = beside(folder.path(), "");
    let output = command(&program, queen.root.path(), &queen.url, &["infer", "x", "--no-start"]).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), " there was a bee"));
    assert!(text(&output.stderr).starts_with("warning: the queen (pid "), "{output:?}");
    assert!(text(&output.stderr).contains("another build"), "{output:?}");
}
