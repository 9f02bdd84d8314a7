//! Serving: tokens a second that clients get who each ask one thing after another. Ours is all that a user has: clients talk to
//! a queen, the worker was started by its hive. llama.cpp's is llama-server.
//!
//! Both get the same prompts, of token ids that nothing was asked by before, so that no answer begins with what is remembered;
//! and both go on after an end of text, so that every answer has its full length, which is checked.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rbee_testkit::http::{Http, Parser, Request, post};
use rbee_testkit::process::Process;
use rbee_testkit::{Setup, port};
use rbee_wire::routes;
use rbee_wire::sse::{DONE, Decoder};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Figure;

/// Requests that a server generates for at once.
pub(super) const SLOTS: u64 = 16;

/// Tokens of a prompt.
pub(super) const PROMPT: u64 = 64;

/// Tokens of an answer.
pub(super) const ANSWER: u64 = 64;

/// Positions of a slot.
const CONTEXT: u64 = 512;

/// Ids of prompts lie above 0, which ends a text, and below this: all shapes have them.
const IDS: u64 = 32_000;

/// Bytes of a file below which it is asked more, so that fast models too are measured for seconds.
const SMALL: u64 = 512 << 20;

/// How long a server may take until it serves, and how long an answer may be silent while others are before it.
const PATIENCE: Duration = Duration::from_secs(300);

/// Our speeds, and the processor time of our daemons, which are nobody's children.
///
/// # Errors
/// When they do not start, or an answer is not what was asked for.
pub(super) fn ours(figures: &[Figure], file: &Path, threads: usize) -> Result<(Vec<f64>, Duration)> {
    // Random weights repeat themselves, and guesses of what comes next would be right more often than for any real text.
    let cluster = Setup::real().env("RBEE_LOG", "info").env("RBEE_SPECULATION", "off").home();
    let (slots, context, threads) = (SLOTS.to_string(), CONTEXT.to_string(), threads.to_string());
    let model = file.canonicalize()?.display().to_string();
    let args = ["worker", "spawn", "--model", &model, "--device", "cpu", "--slots", &slots, "--ctx", &context];
    let started = cluster.cmd(&[&args[..], &["--threads", &threads]].concat()).start().finish(PATIENCE);
    ensure!(started.code == 0, "exit code {}: {}", started.code, started.stderr);
    let speeds = speeds(cluster.queen, figures, file)?;
    Ok((speeds, cluster.processes().iter().map(Process::cpu).sum()))
}

/// llama-server's speeds.
///
/// # Errors
/// When it does not start, or an answer is not what was asked for.
pub(super) fn theirs(program: &Path, figures: &[Figure], file: &Path, threads: usize) -> Result<Vec<f64>> {
    let server = LlamaServer::start(program, file, threads)?;
    speeds(server.address, figures, file)
}

/// A llama-server that ends with its value.
struct LlamaServer {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
}

impl LlamaServer {
    fn start(program: &Path, file: &Path, threads: usize) -> Result<Self> {
        let address = port::free();
        let log = file.with_extension("log");
        let (slots, context, threads) = (SLOTS.to_string(), (SLOTS * CONTEXT).to_string(), threads.to_string());
        let mut command = Command::new(program);
        command.arg("-m").arg(file).args(["-np", &slots, "-c", &context, "-t", &threads, "-tb", &threads]);
        command.args(["-fa", "on", "-b", "2048", "-ub", "512", "--no-webui"]);
        command.args(["--host", &address.ip().to_string(), "--port", &address.port().to_string()]);
        let said = File::create(&log).with_context(|| log.display().to_string())?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn();
        let mut server = Self { child: child.with_context(|| format!("{command:?}"))?, address, log };
        server.wait().with_context(|| format!("{command:?}"))?;
        Ok(server)
    }

    /// Waits until it serves.
    fn wait(&mut self) -> Result<()> {
        let began = Instant::now();
        let is_ready =
            |address| Http::new(address).try_send(Request::new("GET", "/health")).is_ok_and(|it| it.status() == 200);
        while !is_ready(self.address) {
            let ended = self.child.try_wait()?;
            if ended.is_some() || began.elapsed() > PATIENCE {
                bail!("it does not serve: {ended:?}\n{}", fs::read_to_string(&self.log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.log);
    }
}

/// The speeds of what listens there.
fn speeds(address: SocketAddr, figures: &[Figure], file: &Path) -> Result<Vec<f64>> {
    let models: Value = Http::new(address).get(routes::MODELS).json();
    let model = models["data"][0]["id"].as_str().with_context(|| format!("no model in {models}"))?;
    let [least, most] = if fs::metadata(file)?.len() < SMALL { [4, 16] } else { [2, 4] };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut ids = Ids(1);
    let mut speed = |clients: u64, requests: u64| {
        let mut one = || body(model, &mut ids);
        let asked: Vec<Vec<Request>> =
            (0..clients).map(|_| (0..requests).map(|_| post(routes::COMPLETIONS, &one())).collect()).collect();
        let began = Instant::now();
        runtime.block_on(async {
            let clients: Vec<_> = asked.into_iter().map(|asked| tokio::spawn(client(address, asked))).collect();
            for client in clients {
                client.await??;
            }
            anyhow::Ok(())
        })?;
        anyhow::Ok((clients * requests * ANSWER) as f64 / began.elapsed().as_secs_f64())
    };
    // What is made once is not counted.
    speed(1, 1)?;
    let clients = figures.iter().filter_map(clients);
    clients.map(|clients| speed(clients, (2 * SLOTS / clients).clamp(least, most))).collect()
}

fn clients(figure: &Figure) -> Option<u64> {
    if let Figure::Serve { clients } = figure { Some(*clients) } else { None }
}

/// Token ids, the same for each server.
struct Ids(u64);

impl Ids {
    fn prompt(&mut self) -> Vec<u64> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            1 + (self.0 >> 33) % (IDS - 1)
        };
        (0..PROMPT).map(|_| next()).collect()
    }
}

fn body(model: &str, ids: &mut Ids) -> Value {
    json!({
        "model": model,
        "prompt": ids.prompt(),
        "max_tokens": ANSWER,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    })
}

/// Asks one thing after another.
async fn client(address: SocketAddr, asked: Vec<Request>) -> Result<()> {
    for request in asked {
        let mut socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        socket.write_all(&request.bytes(address)).await?;
        let (mut parser, mut answer) = (Parser::default(), Answer::default());
        let (mut buffer, mut body) = (vec![0; 4096], Vec::new());
        while !parser.is_complete() {
            let count = tokio::time::timeout(PATIENCE, socket.read(&mut buffer)).await.context("silence")??;
            ensure!(count > 0, "an answer broke off: {answer:?}");
            parser.feed(&buffer[..count], &mut body).map_err(anyhow::Error::msg)?;
            answer.take(&body)?;
            body.clear();
        }
        answer.check()?;
    }
    Ok(())
}

/// What has come of an answer. Only its end is looked into: it has the numbers of tokens, or the error.
#[derive(Debug)]
struct Answer {
    decoder: Decoder,
    last: Vec<u8>,
    is_over: bool,
}

impl Default for Answer {
    fn default() -> Self {
        Self { decoder: Decoder::new(1 << 20), last: Vec::new(), is_over: false }
    }
}

impl Answer {
    fn take(&mut self, body: &[u8]) -> Result<()> {
        let Self { decoder, last, is_over } = self;
        decoder.feed(body, |frame| {
            if frame.data == DONE.as_bytes() {
                *is_over = true;
            } else {
                *last = frame.data;
            }
        })?;
        Ok(())
    }

    /// Whether it has what was asked for.
    fn check(&self) -> Result<()> {
        let last = String::from_utf8_lossy(&self.last);
        ensure!(self.is_over, "an answer has no end; its last words: {last}");
        let chunk: Value = serde_json::from_str(&last).with_context(|| last.clone().into_owned())?;
        let usage = &chunk["usage"];
        let counted = ["prompt_tokens", "completion_tokens"].map(|key| usage[key].as_u64());
        ensure!(counted == [Some(PROMPT), Some(ANSWER)], "asked for {ANSWER} tokens after {PROMPT}, got {last}");
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        ensure!(cached.unwrap_or(0) == 0, "a prompt was remembered: {last}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of an answer of these events, however they are cut.
    fn check(events: &[&str]) -> Result<()> {
        let text: String = events.iter().map(|event| format!("data: {event}\n\n")).collect();
        let mut answer = Answer::default();
        for byte in text.as_bytes() {
            answer.take(std::slice::from_ref(byte)).unwrap();
        }
        answer.check()
    }

    fn usage(prompt: u64, answer: u64, cached: u64) -> String {
        let details = json!({ "cached_tokens": cached });
        let usage = json!({ "prompt_tokens": prompt, "completion_tokens": answer, "prompt_tokens_details": details });
        json!({ "choices": [], "usage": usage }).to_string()
    }

    #[test]
    fn only_a_whole_answer_to_a_prompt_that_nobody_remembers_is_counted() {
        let (token, whole) = (r#"{"choices":[{"text":"a"}],"usage":null}"#, usage(PROMPT, ANSWER, 0));
        assert!(check(&[token, &whole, "[DONE]"]).is_ok());
        for (events, what) in [
            (vec![token, &whole], "no end"),
            (vec![token, "[DONE]"], "got"),
            (vec![token, &usage(PROMPT, ANSWER - 1, 0), "[DONE]"], "got"),
            (vec![token, &usage(PROMPT + 1, ANSWER, 0), "[DONE]"], "got"),
            (vec![token, &usage(PROMPT, ANSWER, 16), "[DONE]"], "remembered"),
            (vec![token, r#"{"error":{"message":"all are busy"}}"#, "[DONE]"], "all are busy"),
        ] {
            let error = check(&events).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn both_servers_get_the_same_prompts_and_none_begins_as_another() {
        let prompts = || {
            let mut ids = Ids(1);
            (0..500).map(|_| ids.prompt()).collect::<Vec<_>>()
        };
        assert_eq!(prompts(), prompts());
        let mut first: Vec<Vec<u64>> = prompts().iter().map(|prompt| prompt[..2].to_vec()).collect();
        first.sort();
        first.dedup();
        assert_eq!(first.len(), 500);
    }
}
