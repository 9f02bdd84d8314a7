//! Processes of this machine as `/proc` shows them: whether one is still the same, and who holds a port.

use std::fs;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::exit::{Exit, Failure};
use crate::settings::Context;

/// A process, told apart from a later one of the same number by its start time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Running {
    /// What it is to a person.
    pub(crate) name: String,
    /// Its number.
    pub(crate) pid: u32,
    started: u64,
}

impl Running {
    /// The process of this number, if there is one.
    pub(crate) fn of(name: &str, pid: u32) -> Option<Self> {
        started(pid).map(|started| Self { name: name.to_owned(), pid, started })
    }

    /// Whether it is still there.
    pub(crate) fn is_there(&self) -> bool {
        started(self.pid) == Some(self.started)
    }
}

/// Start time in clock ticks since boot; `None` for nobody and for one that has ended and waits to be reaped.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may have any character; the fields behind it are numbers.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Time that a daemon may take beyond its drain: to end its children and exit.
const BEYOND_DRAIN: Duration = Duration::from_secs(10);

/// How long stopping may take in all.
pub(crate) fn limit(context: &Context) -> Duration {
    Duration::from_millis(context.settings.drain_ms.value) + BEYOND_DRAIN
}

/// Waits until all are gone.
///
/// # Errors
/// When some are still there after the drain's time.
pub(crate) async fn all_gone(context: &Context, all: &[Running]) -> Result<(), Failure> {
    let limit = limit(context);
    let deadline = Instant::now() + limit;
    loop {
        let left: Vec<&Running> = all.iter().filter(|process| process.is_there()).collect();
        if left.is_empty() {
            context.printer.progress_over();
            return Ok(());
        }
        let names: Vec<_> = left.iter().map(|process| format!("{} (pid {})", process.name, process.pid)).collect();
        if Instant::now() >= deadline {
            let pids: Vec<_> = left.iter().map(|process| process.pid.to_string()).collect();
            let what = format!("asked to stop {} s ago and still there: {}", limit.as_secs(), names.join(", "));
            let logs = context.home.state.display();
            return Err(Failure::new(Exit::Failed, what)
                .hint(format!("their logs are in {logs}; `kill -9 {}` ends them", pids.join(" "))));
        }
        context.printer.progress(&format!("waiting for {} to end", names.join(", ")));
        sleep(Duration::from_millis(10)).await;
    }
}

/// Who listens on a TCP port of this machine, as `process N (NAME)`; only the processes of this user can be named.
pub(crate) fn listener_on(port: u16) -> Option<String> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(handles) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = |handle: fs::DirEntry| {
            fs::read_link(handle.path()).is_ok_and(|link| inodes.iter().any(|inode| link.as_os_str() == inode.as_str()))
        };
        if handles.flatten().any(holds) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim().escape_debug()));
        }
    }
    Some("a process of another user".into())
}

/// Inodes of the sockets that listen on a port, from a table like `/proc/net/tcp`.
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let mut found = Vec::new();
    for line in table.lines().skip(1) {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else { continue };
        let on_port = local.rsplit_once(':').and_then(|(_, hex)| u16::from_str_radix(hex, 16).ok()) == Some(port);
        if on_port && state == "0A" {
            found.push(inode.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_named_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let name = listener_on(port).unwrap();
        assert!(name.starts_with(&format!("process {} (", std::process::id())), "{name}");
        drop(listener);
        assert_eq!(listener_on(port), None);
    }

    #[test]
    fn a_process_that_ended_is_gone_even_before_it_is_reaped() {
        let me = Running::of("me", std::process::id()).unwrap();
        assert!(me.is_there());
        assert!(!Running { started: me.started + 1, ..me }.is_there(), "a later process of the same number");
        assert_eq!(Running::of("nobody", u32::MAX), None);

        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let cat = Running::of("cat", child.id()).unwrap();
        assert!(cat.is_there());
        drop(child.stdin.take());
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while cat.is_there() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!cat.is_there() && std::path::Path::new(&format!("/proc/{}", cat.pid)).exists());
        child.wait().unwrap();
    }
}
