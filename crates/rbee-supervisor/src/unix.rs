//! The system calls: spawning with a control pipe, watching by pidfd, signalling groups.
//!
//! A child inherits its stdio and the one descriptor that it is given, whatever else is open here and by whomever.

#![expect(unsafe_code, reason = "work between fork and exec")]

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::unix::AsyncFd;

/// Names the descriptor of the control pipe in a worker's environment.
pub(crate) const CONTROL_FD: &str = "RBEE_CONTROL_FD";

/// A worker's process: the leader of its own group.
pub(crate) struct WorkerProcess {
    leader: Leader,
    pidfd: AsyncFd<OwnedFd>,
}

/// A child that leads a group. Dropped before it was reaped, it is killed with its group and reaped then.
struct Leader {
    child: Child,
    reaped: bool,
}

/// What is started.
pub(crate) struct Spawn {
    pub(crate) command: Command,
    pub(crate) control: UnixStream,
}

/// A spawned child and its pidfd.
type Spawned = (Leader, OwnedFd);

type Job = Box<dyn FnOnce() + Send>;

/// The thread that starts all children. `PR_SET_PDEATHSIG` is bound to the thread that forked, so that thread must
/// live as long as the process.
///
/// # Errors
/// When there is no room for the thread; a later call tries again.
fn spawner() -> io::Result<Sender<Job>> {
    static SPAWNER: Mutex<Option<Sender<Job>>> = Mutex::new(None);
    let mut spawner = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sender) = &*spawner {
        return Ok(sender.clone());
    }
    let (sender, jobs) = channel::<Job>();
    let thread = std::thread::Builder::new().name("spawner".into());
    thread.spawn(move || jobs.into_iter().for_each(|job| job()))?;
    Ok(spawner.insert(sender).clone())
}

/// Starts a process in a group of its own that dies with this one, handing it one end of the control pipe.
///
/// # Errors
/// The system's; nothing is left of the child then.
pub(crate) async fn spawn(spawn: Spawn) -> io::Result<WorkerProcess> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let gone = || io::Error::other("the thread that starts processes is gone");
    let job: Job = Box::new(move || drop(answer.send(spawn_here(spawn))));
    spawner()?.send(job).map_err(|_| gone())?;
    let (leader, pidfd) = answered.await.map_err(|_| gone())??;
    // SAFETY: the pidfd is owned by the AsyncFd for all of its life, so it stays open and the same.
    let pidfd = unsafe { AsyncFd::register(pidfd) }.map_err(io::Error::from)?;
    Ok(WorkerProcess { leader, pidfd })
}

fn spawn_here(Spawn { mut command, control }: Spawn) -> io::Result<Spawned> {
    let fd = control.as_raw_fd();
    let parent = rustix::process::getpid();
    command.env(CONTROL_FD, fd.to_string()).process_group(0);
    // SAFETY: the closure runs between fork and exec and makes system calls only, all async-signal-safe; it
    // allocates nothing. `control` is open until after the spawn, so the borrowed descriptor is valid.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have ended before the line above: then nobody would ever send the signal.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::ErrorKind::NotConnected.into());
            }
            keep_only(fd)
        });
    }
    let leader = Leader { child: command.spawn()?, reaped: false };
    drop(control);
    // Without a pidfd the child could not be watched: it ends with its handle then.
    let pidfd = rustix::process::pidfd_open(Pid::from_child(&leader.child), PidfdFlags::NONBLOCK)?;
    Ok((leader, pidfd))
}

/// Leaves one descriptor beside stdio to what is executed next, and of the others none: neither what whoever started
/// this program left open nor what a library of another language opens at this moment.
///
/// # Safety
/// To be called between fork and exec, with `keep` open. It makes system calls only, all async-signal-safe, and
/// allocates nothing.
unsafe fn keep_only(keep: RawFd) -> io::Result<()> {
    let folder = rustix::fs::open(c"/proc/self/fd", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(&folder, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let Some(fd) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else { continue };
        if fd > 2 {
            // SAFETY: it is open, as the folder has just said, and this is the only thread of the child.
            rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, FdFlags::CLOEXEC)?;
        }
    }
    // SAFETY: the caller has it open.
    rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(keep) }, FdFlags::empty())?;
    Ok(())
}

impl WorkerProcess {
    /// Its process id, valid until [`WorkerProcess::ended`] returns.
    pub(crate) fn pid(&self) -> u32 {
        self.leader.child.id()
    }

    /// Its output, once.
    pub(crate) fn take_output(&mut self) -> [Option<OwnedFd>; 2] {
        let child = &mut self.leader.child;
        [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)]
    }

    /// Signals the whole group. The leader is not reaped before [`WorkerProcess::ended`] returns, so its number cannot
    /// be another's.
    pub(crate) fn signal_group(&self, signal: Signal) {
        self.leader.signal_group(signal);
    }

    /// Waits until the leader has ended, ends what it forked, and reaps it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) async fn ended(&mut self) -> io::Result<ExitStatus> {
        let _ready = self.pidfd.readable().await?;
        self.signal_group(Signal::KILL);
        self.leader.reap()
    }
}

impl Leader {
    /// Its number is no other's as long as it is not reaped.
    fn signal_group(&self, signal: Signal) {
        if !self.reaped {
            let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), signal);
        }
    }

    fn reap(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal_group(Signal::KILL);
            let _ = self.reap();
        }
    }
}

/// Waits for a child that leads a group, and kills the group when the grace is over. Blocks; reaps in any case.
pub(crate) fn end_group(child: &mut Child, grace: Duration) -> Option<ExitStatus> {
    let began = Instant::now();
    while let Ok(None) = child.try_wait() {
        if began.elapsed() >= grace {
            let _ = rustix::process::kill_process_group(Pid::from_child(child), Signal::KILL);
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait().ok()
}

/// Start time of a process in clock ticks since boot (field 22 of `/proc/PID/stat`); `None` when it is gone or a
/// zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may have any character; the fields behind it are numbers.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Kills the group of a process that is proven to be the one meant: same number and same start time.
pub(crate) fn kill_proven(pid: u32, started: u64) {
    let same = start_time(pid) == Some(started);
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && same
    {
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    }
}

/// Exit code and signal of a status.
pub(crate) fn code_and_signal(status: ExitStatus) -> (Option<i32>, Option<i32>) {
    (status.code(), status.signal())
}

/// Runs a program to its end and gives its exit code and at most `max` bytes of its stdout. Blocks.
///
/// # Errors
/// The system's; a program that takes longer than `limit` is killed.
pub fn run_bounded(command: &mut Command, limit: Duration, max: u64) -> io::Result<(Option<i32>, Vec<u8>)> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0).spawn()?;
    let stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(stdout) = stdout {
            let _ = stdout.take(max).read_to_end(&mut bytes);
        }
        bytes
    });
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if began.elapsed() > limit {
            let _ = rustix::process::kill_process_group(Pid::from_child(&child), Signal::KILL);
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let bytes = reader.join().unwrap_or_default();
    match status {
        Some(status) => Ok((status.code(), bytes)),
        None => Err(io::Error::new(io::ErrorKind::TimedOut, format!("it took longer than {} s", limit.as_secs()))),
    }
}

/// Whether the descriptor is a socket.
pub(crate) fn is_socket(fd: impl AsFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_socket())
}

/// Takes over an inherited descriptor by its number.
pub(crate) fn adopt(fd: i32) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    if fd <= 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a descriptor that could be inherited"));
    }
    // SAFETY: fcntl on a number that is no descriptor fails and touches nothing.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, as fcntl has just shown; the program was given it for this and nobody else adopts it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes the child a session of its own between fork and exec, and hands it a descriptor.
pub(crate) fn detach(command: &mut Command, keep: RawFd) {
    // SAFETY: system calls only, all async-signal-safe; the caller keeps the descriptor open until after the spawn.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            keep_only(keep)
        });
    }
}
