//! A whole rbee of real processes in a home and on ports of its own.
//!
//! Nothing runs until a test starts something. At the end of its life a cluster runs `rbee down`, fails the test
//! when a process is left or a log has prompt text, and ends by proof whatever the test left behind.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rbee_wire::view::{HiveView, JobView, StatusView, WorkerView};
use rbee_wire::worker::WorkerState;
use rbee_wire::{Operation, routes};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bins;
use crate::canary;
use crate::command::{self, Input, Output, Running};
use crate::http::{Http, Stream, Told};
use crate::port;
use crate::process::{self, Process, Signal};
use crate::terminal::Terminal;
use crate::wait::{patience, wait_for};

/// Time in which every process is gone after `down`.
const GONE: Duration = Duration::from_secs(2);

/// How a cluster's workers compute.
#[derive(Clone, Debug)]
enum Workers {
    Real,
    Sim(String),
}

/// What a cluster is to be.
#[derive(Clone, Debug)]
pub struct Setup {
    workers: Workers,
    env: Vec<(String, String)>,
}

impl Setup {
    /// Workers that compute the models they are asked for.
    pub fn real() -> Self {
        Self { workers: Workers::Real, env: Vec::new() }
    }

    /// Workers that simulate, with these further arguments, whatever model they are asked for.
    pub fn sim(args: &str) -> Self {
        Self { workers: Workers::Sim(args.to_owned()), env: Vec::new() }
    }

    /// With an environment variable for all programs.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// A home without any process.
    ///
    /// # Panics
    /// When the home cannot be made.
    pub fn home(self) -> Cluster {
        let bins = bins::built();
        let home = tempfile::Builder::new().prefix("rb-").rand_bytes(6).tempdir().expect("a temporary folder");
        Cluster { setup: self, bins, home, queen: port::free(), hive: port::free() }
    }

    /// A home with a queen, a hive and one ready worker of the built-in model.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn warm(self) -> Cluster {
        let cluster = self.home();
        cluster.rbee(&["worker", "spawn", "--model", "tinybee"]).exits(0);
        cluster
    }
}

/// A whole rbee.
#[derive(Debug)]
pub struct Cluster {
    setup: Setup,
    /// Where its programs are.
    pub bins: PathBuf,
    home: TempDir,
    /// Where its queen listens.
    pub queen: SocketAddr,
    /// Where its hive listens.
    pub hive: SocketAddr,
}

/// A command of a cluster that is about to run.
#[derive(Debug)]
pub struct Cmd<'a> {
    command: Command,
    input: Input<'a>,
    limit: Duration,
}

impl<'a> Cmd<'a> {
    /// With this text through a pipe as stdin.
    #[must_use]
    pub fn stdin(mut self, text: &'a str) -> Self {
        self.input = Input::Text(text);
        self
    }

    /// With one more environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.command.env(name, value.to_string());
        self
    }

    /// In this folder.
    #[must_use]
    pub fn folder(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// When it takes longer than [`command::LIMIT`].
    #[track_caller]
    pub fn run(self) -> Output {
        let limit = self.limit;
        self.start().finish(limit)
    }

    /// Starts it.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn start(self) -> Running {
        command::spawn(self.command, self.input)
    }

    /// Starts it on a terminal of this size.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn on_terminal(self, columns: u16, rows: u16) -> Terminal {
        Terminal::start(self.command, columns, rows)
    }
}

impl Cluster {
    /// The home's folder.
    pub fn folder(&self) -> &Path {
        self.home.path()
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        // Nothing of the user's own settings may reach a test.
        command.env_clear();
        for (name, value) in self.env() {
            command.env(name, value);
        }
        command.current_dir(self.folder());
        command
    }

    fn env(&self) -> Vec<(String, String)> {
        let mut env: Vec<(String, String)> = [
            ("PATH", "/usr/bin:/bin".to_owned()),
            ("HOME", self.folder().display().to_string()),
            ("RBEE_HOME", self.folder().display().to_string()),
            ("RBEE_QUEEN_BIND", self.queen.to_string()),
            ("RBEE_HIVE_BIND", self.hive.to_string()),
            ("RBEE_QUEEN_URL", format!("http://{}", self.queen)),
            ("RBEE_LOG", "debug".to_owned()),
            // No test leaves this machine: a hub that is not there, unless a test has one.
            ("HF_ENDPOINT", "http://127.0.0.1:1".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        if let Workers::Sim(args) = &self.setup.workers {
            env.push(("RBEE_WORKER_ARGS".into(), format!("--backend sim {args}").trim_end().to_owned()));
        }
        env.extend(self.setup.env.iter().cloned());
        env
    }

    /// A command line of `rbee`, to be run or talked to.
    pub fn cmd<'a>(&self, args: &[&str]) -> Cmd<'a> {
        self.program("rbee", args)
    }

    /// Another program of this home, to be run or talked to.
    pub fn program<'a>(&self, program: &str, args: &[&str]) -> Cmd<'a> {
        self.any(&self.bins.join(program), args)
    }

    /// Any program in the environment of this home.
    pub fn any<'a>(&self, program: &Path, args: &[&str]) -> Cmd<'a> {
        let mut command = self.command(program);
        command.args(args);
        Cmd { command, input: Input::Null, limit: command::LIMIT }
    }

    /// Runs `rbee` to its end.
    ///
    /// # Panics
    /// When it takes longer than [`command::LIMIT`].
    #[track_caller]
    pub fn rbee(&self, args: &[&str]) -> Output {
        self.cmd(args).run()
    }

    /// The queen, raw.
    pub fn queen(&self) -> Http {
        Http::new(self.queen)
    }

    /// The hive, raw.
    pub fn hive(&self) -> Http {
        Http::new(self.hive)
    }

    /// Posts a job whose answer is its stream.
    ///
    /// # Panics
    /// When the queen does not answer.
    #[track_caller]
    pub fn stream(&self, body: &Value) -> Stream {
        self.queen().stream_of(routes::JOBS, body)
    }

    /// Posts a job, and everything that its stream tells.
    ///
    /// # Panics
    /// When the queen does not answer.
    #[track_caller]
    pub fn job(&self, body: &Value) -> Told {
        self.stream(body).rest()
    }

    /// Posts a job to be listened to later, and gives its id.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn post(&self, body: &Value) -> String {
        let answer = self.queen().post(routes::JOBS, body);
        assert_eq!(answer.status(), 202, "{}", answer.text());
        answer.json::<Value>()["job_id"].as_str().expect("a job id").to_owned()
    }

    /// One job as the queen sees it.
    ///
    /// # Panics
    /// When it does not know it.
    #[track_caller]
    pub fn job_view(&self, job: &str) -> JobView {
        self.queen().get(&format!("{}/{job}", routes::JOBS)).json()
    }

    /// The jobs that are kept.
    ///
    /// # Panics
    /// When the queen does not answer.
    #[track_caller]
    pub fn jobs(&self) -> Vec<JobView> {
        self.queen().get(routes::JOBS).json::<rbee_wire::view::JobList>().jobs
    }

    /// The kept jobs that generate text, newest first.
    ///
    /// # Panics
    /// When the queen does not answer.
    #[track_caller]
    pub fn answers(&self) -> Vec<JobView> {
        self.jobs().into_iter().filter(|job| job.operation == Operation::Infer).collect()
    }

    /// What the queen sees, or why it does not tell.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn try_status(&self) -> Result<StatusView, String> {
        let request = crate::http::post(routes::JOBS, &json!({ "operation": "status" }));
        let mut stream = self.queen().try_open(request.header("Accept", "text/event-stream"))?;
        let told = stream.rest();
        told.data::<StatusView>().pop().ok_or_else(|| format!("{:?} {:?}", told.end, told.refusal))
    }

    /// What the queen sees.
    ///
    /// # Panics
    /// When it does not answer.
    #[track_caller]
    pub fn status(&self) -> StatusView {
        self.try_status().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Waits until what the queen sees of the workers fits, and returns them.
    ///
    /// # Panics
    /// When it does not within `limit`.
    #[track_caller]
    pub fn workers_when(&self, what: &str, limit: Duration, fits: impl Fn(&[WorkerView]) -> bool) -> Vec<WorkerView> {
        wait_for(what, limit, || {
            let status = self.try_status()?;
            if fits(&status.workers) { Ok(status.workers) } else { Err(show_workers(&status.workers, &status.hives)) }
        })
    }

    /// Waits for so many workers that serve.
    ///
    /// # Panics
    /// When they are not there within 30 s.
    #[track_caller]
    pub fn serving(&self, count: usize) -> Vec<WorkerView> {
        self.workers_when(&format!("{count} workers that serve"), Duration::from_secs(30), |workers| {
            workers.iter().filter(|worker| serves(worker)).count() == count
        })
    }

    /// Every process of this home.
    pub fn processes(&self) -> Vec<Process> {
        process::of_home(self.folder())
    }

    /// The processes of this home that run this program.
    pub fn running(&self, program: &str) -> Vec<Process> {
        self.processes().into_iter().filter(|process| process.program == program).collect()
    }

    /// Waits until so many processes of this home run this program.
    ///
    /// # Panics
    /// When there are more, or fewer, for as long as `limit`.
    #[track_caller]
    pub fn left_running(&self, program: &str, count: usize, limit: Duration) {
        wait_for(&format!("{count} of {program} to be left"), limit, || match self.running(program) {
            left if left.len() == count => Ok(()),
            left => Err(format!("{left:?}")),
        });
    }

    /// The only process of this home that runs this program.
    ///
    /// # Panics
    /// When there is none, or more.
    #[track_caller]
    pub fn the(&self, program: &str) -> Process {
        match &self.running(program)[..] {
            [one] => one.clone(),
            other => panic!("not one {program}: {other:?}; all: {:?}", self.processes()),
        }
    }

    /// Starts a simulated worker by hand, without a hive.
    ///
    /// # Panics
    /// When it does not say where it listens.
    #[track_caller]
    pub fn worker_by_hand(&self, args: &[&str]) -> HandWorker {
        self.worker_by_hand_on("sim", args)
    }

    /// Starts a worker of this backend by hand, without a hive.
    ///
    /// # Panics
    /// When it does not say where it listens.
    #[track_caller]
    pub fn worker_by_hand_on(&self, backend: &str, args: &[&str]) -> HandWorker {
        let queen = format!("http://{}", self.queen);
        let log = self.folder().join(format!("by-hand-{}.log", self.queen.port()));
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(log).expect("a log in the test's own home");
        let mut command = self.command(&self.bins.join("llm-worker-rbee"));
        command.args(["--backend", backend, "--queen", &queen]).args(args);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().expect("the worker can be started");
        let mut stdout = std::io::BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut line = |label: &str| {
            let mut text = String::new();
            let _ = std::io::BufRead::read_line(&mut stdout, &mut text);
            let value = text.strip_prefix(label).unwrap_or_else(|| panic!("no {label:?} but {text:?}"));
            value.trim().to_owned()
        };
        let (url, bearer) = (line("listening on http://"), line("bearer "));
        let address = url.parse().unwrap_or_else(|error| panic!("{error}: {url}"));
        HandWorker { child, http: Http { address, bearer: Some(bearer) } }
    }

    /// Everything that daemons and workers of this home have logged.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        collect_logs(self.folder(), &mut text);
        text
    }

    /// Ends everything of this home by proof.
    pub fn kill_all(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let left = self.processes();
            if left.is_empty() || Instant::now() > deadline {
                return;
            }
            // Again and again: a hive that dies last may have started one more worker.
            left.iter().for_each(|process| process.signal(Signal::KILL));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end_in_order(&self) -> Result<(), String> {
        let told: Vec<String> = self.processes().into_iter().map(|process| process.argv).collect();
        if let Some(argv) = told.iter().find(|argv| argv.contains(canary::CANARY)) {
            return Err(format!("a process shows prompt text in its command line: {argv}"));
        }
        if !told.is_empty() {
            let down = self.rbee(&["down"]);
            if !matches!(down.code, 0 | 4) {
                return Err(format!("`rbee down` ended with {}: {}{}", down.code, down.stdout, down.stderr));
            }
        }
        let deadline = Instant::now() + GONE;
        loop {
            match self.processes() {
                left if left.is_empty() => break,
                left if Instant::now() > deadline => {
                    return Err(format!("left {GONE:?} after `rbee down`: {left:#?}"));
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        let seen = canary::sightings(self.folder());
        if seen.is_empty() { Ok(()) } else { Err(format!("prompt text in logs: {seen:#?}")) }
    }
}

/// Whether a request sent now would be served.
pub fn serves(worker: &WorkerView) -> bool {
    matches!(worker.state, WorkerState::Ready | WorkerState::Busy)
}

fn show_workers(workers: &[WorkerView], hives: &[HiveView]) -> String {
    let mut text = format!("{} workers", workers.len());
    for worker in workers {
        let _ = write!(text, "; {} {:?} {}/{}", worker.worker_id, worker.state, worker.slots.used, worker.slots.total);
    }
    for hive in hives {
        let _ = write!(text, "; {} alive {} processes {:?}", hive.hive_id, hive.alive, hive.processes);
    }
    text
}

fn collect_logs(folder: &Path, text: &mut String) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect_logs(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let all = std::fs::read(&path).unwrap_or_default();
            let _ = writeln!(text, "== {}\n{}", path.display(), String::from_utf8_lossy(&all));
        }
    }
}

/// The last part of each log, for a test that failed.
const SHOWN: usize = 6_000;

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("processes: {:#?}", self.processes());
            for log in self.logs().split("== ").filter(|log| !log.is_empty()) {
                let start = log.floor_char_boundary(log.len().saturating_sub(SHOWN));
                eprintln!("== {} … {}", log.lines().next().unwrap_or_default(), &log[start..]);
            }
            self.kill_all();
            return;
        }
        let ended = self.end_in_order();
        self.kill_all();
        if let Err(problem) = ended {
            panic!("{problem}\n{}", self.logs());
        }
    }
}

/// A worker that no hive watches. It ends with its value.
#[derive(Debug)]
pub struct HandWorker {
    child: Child,
    /// Its own routes, with its bearer.
    pub http: Http,
}

impl HandWorker {
    /// Waits until its model is loaded.
    ///
    /// # Panics
    /// When that takes more than half a minute.
    #[track_caller]
    pub fn ready(&self) {
        wait_for("the model", Duration::from_secs(30), || match self.http.get("/v1/ready").json::<Value>() {
            said if said["ready"] == true => Ok(()),
            other => Err(other.to_string()),
        });
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end in order, and waits until it has.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn stop(mut self) {
        process::send(self.child.id(), Signal::TERM);
        wait_for("the worker's end", patience(Duration::from_secs(2)), || match self.child.try_wait() {
            Ok(Some(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
}

impl Drop for HandWorker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
