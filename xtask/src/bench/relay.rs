//! `bench relay`: what the queen costs between clients and workers.
//!
//! Simulated workers give every stream a token at a fixed pace. Most streams go through the queen; a few go straight
//! to each worker and sit in the same batches, so that a step's tokens leave the worker at one time and their
//! arrivals can be compared within that step. Every token of every stream is checked against the hash it must be.
//!
//! Beside it, what the same number of bare writes cost here: each token is one write to a connection of its own, and no
//! relay is cheaper than that.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rbee_testkit::http::{Http, Parser, Request, post};
use rbee_testkit::process::{self, Process, raise_open_files};
use rbee_testkit::{HandWorker, Setup, sim, wait_for};
use rbee_wire::job::Generation;
use rbee_wire::sse::{DONE, Decoder};
use rbee_wire::view::StatusView;
use rbee_wire::worker::InferenceRequest;
use rbee_wire::{Event, Incarnation, JobId, RequestId, WorkerId, routes};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::machine::{self, Busy};
use super::{numbers, quantile, sorted};

/// Tokens a second of each stream.
const PACE: u64 = 5;

/// Streams that go straight to each worker.
const STRAIGHT: usize = 10;

/// How long a stream may be silent: many steps.
const SILENCE: Duration = Duration::from_secs(20);

/// What the streams through the queen are asked for by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surface {
    /// Jobs of our own.
    Jobs,
    /// Chats of the OpenAI dialect; they do not say which worker answers, so there must be one.
    Chat,
}

pub(super) struct Plan {
    pub(super) streams: usize,
    pub(super) tokens: usize,
    pub(super) workers: usize,
    pub(super) rounds: usize,
}

impl Plan {
    pub(super) fn parse(args: &[String]) -> Result<Self> {
        let flags = [("--streams", 1000), ("--tokens", 100), ("--workers", 20), ("--rounds", 3)];
        let [streams, tokens, workers, rounds] = numbers(args, flags)?;
        ensure!(streams % workers == 0, "the streams must spread evenly over the workers");
        Ok(Self { streams, tokens, workers, rounds })
    }
}

/// One stream to be read.
struct Talk {
    surface: Surface,
    address: SocketAddr,
    request: Request,
    prompt: String,
    tokens: usize,
    /// Once set, the stream may be left before its end.
    enough: Arc<AtomicBool>,
}

/// One stream that was read.
struct Line {
    worker: Option<WorkerId>,
    arrivals: Vec<Instant>,
}

pub(super) struct Figures {
    events: usize,
    /// Of the queen, per token event.
    pub(super) cpu_us: f64,
    /// Of the queen, per stream.
    pub(super) bytes: f64,
    /// Milliseconds after a step's first straight arrival, p50 and p99.
    straight: [f64; 2],
    pub(super) relayed: [f64; 2],
    pub(super) foreign: f64,
}

pub(super) fn run(plan: &Plan) -> Result<()> {
    raise_open_files();
    println!(
        "{}; {} streams of {} tokens at {PACE} tokens/s from {} workers, {STRAIGHT} more straight to each",
        machine::describe(),
        plan.streams,
        plan.tokens,
        plan.workers
    );
    println!();
    println!(
        "| round | token events, each checked | relay CPU us/event | bare write us | KiB/stream | straight p50/p99 ms \
         | relayed p50/p99 ms | added p50/p99 ms | other work on the machine |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for round in 1..=plan.rounds {
        let f = measure(plan, Surface::Jobs)?;
        let bare = bare_write(plan.streams)?;
        println!(
            "| {round} | {} | {:.1} | {bare:.1} | {:.1} | {:.2} / {:.2} | {:.2} / {:.2} | {:.2} / {:.2} | {:.0} % |",
            f.events,
            f.cpu_us,
            f.bytes / 1024.0,
            f.straight[0],
            f.straight[1],
            f.relayed[0],
            f.relayed[1],
            f.relayed[0] - f.straight[0],
            f.relayed[1] - f.straight[1],
            f.foreign * 100.0,
        );
    }
    Ok(())
}

/// One round: a fleet, its streams, and what the queen spent on them.
///
/// # Errors
/// A stream that broke off, or a token that must not be.
pub(super) fn measure(plan: &Plan, surface: Surface) -> Result<Figures> {
    let cluster = Setup::sim("").env("RBEE_LOG", "warn").env("RBEE_QUEUE_LIMIT", plan.streams).home();
    let started = cluster.rbee(&["queen", "start"]);
    ensure!(started.code == 0, "{}", started.stderr);
    let slots = (plan.streams / plan.workers + STRAIGHT).to_string();
    let step = (1_000_000 / PACE).to_string();
    let workers: Vec<HandWorker> = (0..plan.workers)
        .map(|_| cluster.worker_by_hand(&["--sim-step-us", &step, "--slots", &slots, "--ctx", "1024"]))
        .collect();
    cluster.serving(plan.workers);
    let queen = cluster.the("queen-rbee");
    // One answer before, so that what is made once is not counted for the streams.
    ensure!(cluster.job(&infer("warm up", 2)).tokens().len() == 2, "the warm-up");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let own = || cluster.processes().iter().map(Process::cpu).sum::<Duration>() + process::cpu(std::process::id());
    let (busy, clock, own_before) = (Busy::now(), Instant::now(), own());
    let (cpu, resident) = (queen.cpu(), queen.resident());
    let enough = Arc::new(AtomicBool::new(false));
    let (relayed, straight, peak) = runtime.block_on(async {
        let straight: Vec<_> =
            straight_talks(&workers, &enough).into_iter().map(|talk| tokio::spawn(talk.read())).collect();
        wait_until_booked(cluster.queen(), plan.workers * STRAIGHT).await?;
        let peak = tokio::spawn(peak(queen.clone(), Arc::clone(&enough)));
        let relayed: Vec<_> = (0..plan.streams)
            .map(|i| tokio::spawn(relayed_talk(surface, cluster.queen, i, plan.tokens).read()))
            .collect();
        let relayed = gather(relayed).await?;
        enough.store(true, Ordering::Relaxed);
        anyhow::Ok((relayed, gather(straight).await?, peak.await?))
    })?;
    let foreign = Busy::now().foreign_share(busy, own().saturating_sub(own_before), clock.elapsed());
    let cpu = queen.cpu() - cpu;

    let events: usize = relayed.iter().map(|line| line.arrivals.len()).sum();
    ensure!(events == plan.streams * plan.tokens, "{events} token events");
    let (straight, relayed) = lateness(&straight, &relayed);
    drop(workers);
    let both = |values: &[f64]| [quantile(values, 0.5), quantile(values, 0.99)];
    Ok(Figures {
        events,
        cpu_us: cpu.as_secs_f64() * 1e6 / events as f64,
        bytes: peak.saturating_sub(resident) as f64 / plan.streams as f64,
        straight: both(&straight),
        relayed: both(&relayed),
        foreign,
    })
}

/// CPU microseconds of one write to a connection whose reader waits, over so many connections in bursts as a step's
/// tokens come.
fn bare_write(connections: usize) -> Result<f64> {
    const ROUNDS: usize = 20;
    const BURST: usize = 50;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut writers = Vec::new();
    let mut readers = Vec::new();
    for _ in 0..connections {
        let writer = std::net::TcpStream::connect(address)?;
        writer.set_nodelay(true)?;
        writers.push(writer);
        let (reader, _) = listener.accept()?;
        reader.set_nonblocking(true)?;
        readers.push(reader);
    }
    let reading = std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut tasks = Vec::new();
            for reader in readers {
                let mut reader = TcpStream::from_std(reader)?;
                tasks.push(tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while reader.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
                }));
            }
            for task in tasks {
                task.await?;
            }
            Ok(())
        })
    });
    let event = [b'x'; 120];
    let before = machine::thread_cpu()?;
    for _ in 0..ROUNDS {
        for burst in writers.chunks_mut(BURST) {
            for writer in burst {
                std::io::Write::write_all(writer, &event)?;
            }
            std::thread::sleep(Duration::from_millis(200) * BURST as u32 / connections as u32);
        }
    }
    let spent = machine::thread_cpu()? - before;
    drop(writers);
    reading.join().map_err(|_| anyhow::anyhow!("the readers panicked"))??;
    Ok(spent.as_secs_f64() * 1e6 / (ROUNDS * connections) as f64)
}

fn infer(prompt: &str, tokens: usize) -> Value {
    json!({ "operation": "infer", "prompt": prompt, "max_tokens": tokens, "temperature": 0 })
}

fn relayed_talk(surface: Surface, queen: SocketAddr, number: usize, tokens: usize) -> Talk {
    let prompt = format!("stream {number} through the queen");
    let request = match surface {
        Surface::Jobs => post(routes::JOBS, &infer(&prompt, tokens)).header("Accept", "text/event-stream"),
        Surface::Chat => {
            let messages = json!([{ "role": "user", "content": prompt }]);
            let chat = json!({ "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": true });
            post(routes::CHAT_COMPLETIONS, &chat)
        }
    };
    Talk { surface, address: queen, request, prompt, tokens, enough: Arc::default() }
}

fn straight_talks(workers: &[HandWorker], enough: &Arc<AtomicBool>) -> Vec<Talk> {
    let life = Incarnation { counter: 0, random: "b".repeat(32) };
    let mut talks = Vec::new();
    for (number, worker) in workers.iter().enumerate() {
        for i in 0..STRAIGHT {
            let (prompt, tokens) = (format!("stream {i} straight to worker {number}"), 900);
            let body = InferenceRequest {
                traceparent: None,
                job_id: JobId::of(&life, &format!("{:032x}", number * STRAIGHT + i)),
                request_id: RequestId::new(format!("bench-{number}-{i}")).expect("short words make an id"),
                generation: Generation {
                    prompt: Some(prompt.clone().into()),
                    max_tokens: Some(tokens),
                    temperature: Some(0.0),
                    seed: Some(0),
                    ..Generation::default()
                },
                resume: None,
                tenant: None,
                channel: None,
            };
            let bearer = format!("Bearer {}", worker.http.bearer.as_deref().unwrap_or_default());
            let request = post(routes::INFERENCE, &json!(body))
                .header("Accept", "text/event-stream")
                .header("Authorization", &bearer);
            let enough = Arc::clone(enough);
            let (surface, address) = (Surface::Jobs, worker.http.address);
            talks.push(Talk { surface, address, request, prompt, tokens: tokens as usize, enough });
        }
    }
    talks
}

/// Waits until the workers' heartbeats have told the queen of the slots that the straight streams take.
async fn wait_until_booked(queen: Http, wanted: usize) -> Result<()> {
    let look = move || {
        wait_for("the straight streams in the queen's books", SILENCE, || {
            let mut stream = queen.try_open(
                post(routes::JOBS, &json!({ "operation": "status" })).header("Accept", "text/event-stream"),
            )?;
            let status = stream.rest().data::<StatusView>().pop().ok_or("no status")?;
            let used: u64 = status.workers.iter().map(|worker| worker.slots.used).sum();
            if used as usize >= wanted { Ok(()) } else { Err(format!("{used} of {wanted}")) }
        });
    };
    Ok(tokio::task::spawn_blocking(look).await?)
}

/// The most memory that a process has until it is enough.
async fn peak(process: Process, enough: Arc<AtomicBool>) -> u64 {
    let mut most = 0;
    while !enough.load(Ordering::Relaxed) {
        most = most.max(process.resident());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    most
}

async fn gather(tasks: Vec<tokio::task::JoinHandle<Result<Line>>>) -> Result<Vec<Line>> {
    let mut lines = Vec::with_capacity(tasks.len());
    for task in tasks {
        lines.push(task.await??);
    }
    Ok(lines)
}

impl Talk {
    /// Reads the stream to its end and checks every token on the way.
    async fn read(self) -> Result<Line> {
        let about = self.prompt.clone();
        self.read_all().await.with_context(|| about)
    }

    async fn read_all(self) -> Result<Line> {
        let wanted = sim::ids(0, &self.prompt, self.tokens);
        let mut socket = TcpStream::connect(self.address).await?;
        socket.set_nodelay(true)?;
        socket.write_all(&self.request.bytes(self.address)).await?;
        let (mut parser, mut decoder) = (Parser::default(), Decoder::new(1 << 20));
        let (mut buffer, mut body) = (vec![0; 4096], Vec::new());
        let (mut worker, mut arrivals, mut over) = (None, Vec::with_capacity(self.tokens), false);
        while !parser.is_complete() && !self.enough.load(Ordering::Relaxed) {
            let count = tokio::time::timeout(SILENCE, socket.read(&mut buffer)).await.context("silence")??;
            let now = Instant::now();
            ensure!(count > 0, "broke off after {} tokens", arrivals.len());
            parser.feed(&buffer[..count], &mut body).map_err(anyhow::Error::msg)?;
            let mut frames = Vec::new();
            decoder.feed(&body, |frame| frames.push(frame))?;
            body.clear();
            for frame in frames {
                if frame.data == DONE.as_bytes() {
                    over = true;
                    continue;
                }
                if self.surface == Surface::Chat {
                    let chunk: Value = serde_json::from_slice(&frame.data)?;
                    ensure!(chunk["error"].is_null(), "{chunk}");
                    let text = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty());
                    if let Some(text) = text {
                        let word = wanted.get(arrivals.len()).map(|id| sim::word(*id));
                        ensure!(word.as_deref() == Some(text), "token {} is {text}", arrivals.len());
                        arrivals.push(now);
                    }
                    continue;
                }
                match serde_json::from_slice(&frame.data)? {
                    Event::Started(started) => worker = Some(started.worker_id),
                    Event::Token(token) => {
                        let at = arrivals.len();
                        let fits = token.i == at as u64 && wanted.get(at) == Some(&token.id);
                        ensure!(fits, "token {at} is {token:?}, and must be {:?}", wanted.get(at));
                        arrivals.push(now);
                    }
                    Event::Error(error) => bail!("{error}"),
                    _ => {}
                }
            }
        }
        ensure!(
            self.enough.load(Ordering::Relaxed) || over,
            "no end mark; status {:?}",
            parser.head.map(|head| head.status)
        );
        ensure!(worker.is_some() || self.surface == Surface::Chat, "it never started");
        Ok(Line { worker, arrivals })
    }
}

/// How long after a step's first straight arrival each of its tokens came, in sorted milliseconds: those of the
/// straight streams, and those that came through the queen.
fn lateness(straight: &[Line], relayed: &[Line]) -> (Vec<f64>, Vec<f64>) {
    let half_a_step = Duration::from_micros(500_000 / PACE);
    let mut steps: HashMap<&WorkerId, Vec<Instant>> = HashMap::new();
    for line in straight {
        if let Some(worker) = &line.worker {
            steps.entry(worker).or_default().extend(&line.arrivals);
        }
    }
    let mut of_straight = Vec::new();
    for arrivals in steps.values_mut() {
        arrivals.sort_unstable();
        let mut firsts: Vec<Instant> = Vec::new();
        for &arrival in &*arrivals {
            match firsts.last() {
                Some(first) if arrival.duration_since(*first) < half_a_step => {}
                _ => firsts.push(arrival),
            }
            let first = firsts[firsts.len() - 1];
            of_straight.push(arrival.duration_since(first).as_secs_f64() * 1000.0);
        }
        *arrivals = firsts;
    }
    let mut of_relayed = Vec::new();
    for line in relayed {
        // Who does not say where it came from came from the only worker there is.
        let own = line.worker.as_ref().map_or_else(|| steps.values().next(), |worker| steps.get(worker));
        let Some(firsts) = own else { continue };
        for &arrival in &line.arrivals {
            // A token that overtook its step's straight ones counts as negative, not as very late in the step before.
            let next = firsts.partition_point(|&first| first < arrival + half_a_step / 2);
            let Some(first) = next.checked_sub(1).map(|at| firsts[at]) else { continue };
            let late = arrival.saturating_duration_since(first).as_secs_f64();
            let early = first.saturating_duration_since(arrival).as_secs_f64();
            of_relayed.push((late - early) * 1000.0);
        }
    }
    (sorted(of_straight), sorted(of_relayed))
}
