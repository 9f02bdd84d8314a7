//! `doctor`: this machine, point by point, with what to do where something is amiss. It starts nothing.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rbee_supervisor::daemon::sibling;
use rbee_wire::view::InfoReply;
use serde::Serialize;
use serde_json::json;

use crate::connect::{self, HIVE, QUEEN, WORKER};
use crate::exit::{Exit, Failure, chain};
use crate::printer::{Outcome, Shown};
use crate::processes::listener_on;
use crate::render::{Table, age, bytes};
use crate::settings::{Address, Context};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One point.
#[derive(Debug, Serialize)]
struct Check {
    verdict: Verdict,
    check: String,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, check: check.into(), found: found.into(), hint: None }
    }

    fn warn(check: impl Into<String>, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, hint: Some(hint.into()), ..Self::ok(check, found) }
    }

    fn fail(check: impl Into<String>, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(check, found, hint) }
    }
}

pub(crate) async fn doctor(context: &Context) -> Result<Outcome, Failure> {
    let mut checks = Vec::new();
    let home = &context.home;
    for (name, folder) in [
        ("config", &home.config),
        ("data", &home.data),
        ("cache", &home.cache),
        ("state", &home.state),
        ("run", &home.run),
    ] {
        checks.push(folder_is_writable(name, folder));
    }
    for program in [QUEEN, HIVE, WORKER] {
        checks.push(program_is_there(program));
    }
    queen(context, &mut checks).await;
    hive(context, &mut checks).await;
    checks.extend(limits());
    Ok(report(checks).into())
}

fn report(checks: Vec<Check>) -> Shown {
    let mut table = Table::new(&["", "CHECK", "FOUND"]);
    for check in &checks {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        };
        table.row([verdict.into(), check.check.clone(), check.found.clone()]);
    }
    let mut text = String::new();
    // The heading says nothing that the lines do not; each line is followed by what to do.
    for (line, check) in table.text().lines().skip(1).zip(&checks) {
        text.push_str(line);
        text.push('\n');
        if let Some(hint) = &check.hint {
            text.push_str(&format!("      hint: {hint}\n"));
        }
    }
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    let exit = if failed { Exit::Failed } else { Exit::Done };
    Shown { exit, ..Shown::new(json!({ "ok": !failed, "checks": checks }), text) }
}

/// Where the folder is not there yet, the nearest one that is decides.
fn folder_is_writable(name: &str, folder: &Path) -> Check {
    let check = format!("folder {name}");
    let shown = folder.display().to_string();
    let Some(there) = folder.ancestors().find(|path| path.exists()) else {
        return Check::fail(check, format!("{shown} cannot be made"), "set RBEE_HOME to a folder of your own");
    };
    let probe = there.join(format!(".rbee-doctor-{}", std::process::id()));
    let written = fs::OpenOptions::new().write(true).create_new(true).open(&probe);
    let _ = fs::remove_file(&probe);
    match written {
        Ok(_) if there != folder => Check::ok(check, format!("{shown} (not made yet)")),
        Ok(_) => match fs::metadata(folder).map(|meta| meta.permissions().mode() & 0o077) {
            Ok(0) => Check::ok(check, shown),
            _ => Check::warn(check, format!("{shown} is open to other users"), format!("chmod 700 {shown}")),
        },
        Err(error) => {
            Check::fail(check, format!("{shown}: {error}"), "give yourself the right to write there, or set RBEE_HOME")
        }
    }
}

fn program_is_there(name: &str) -> Check {
    let check = format!("program {name}");
    let path = match sibling(name) {
        Ok(path) => path,
        Err(error) => return Check::fail(check, chain(&error), "install rbee again"),
    };
    match fs::metadata(&path) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => {
            Check::ok(check, path.display().to_string())
        }
        _ => Check::fail(
            check,
            format!("{} is not there or cannot be run", path.display()),
            "the four programs belong into one folder: install or build rbee again",
        ),
    }
}

/// A daemon's address: it answers and is ours, nobody is there, or somebody else is.
async fn port<F>(
    context: &Context,
    name: &str,
    at: &Address,
    variable: &str,
    info: F,
    checks: &mut Vec<Check>,
) -> Option<InfoReply>
where
    F: Future<Output = Result<InfoReply, rbee_client::ClientError>>,
{
    let check = format!("{name} at {}", at.url);
    match info.await {
        Ok(info) if connect::is_ours(context, &info) => {
            let found = format!("answers (pid {}, version {}, up {})", info.pid, info.version, age(info.uptime_ms));
            checks.push(Check::ok(check, found));
            Some(info)
        }
        Ok(info) => {
            let found = format!("a {} of another home or user answers (pid {})", info.program, info.pid);
            checks.push(Check::fail(check, found, format!("use another port: set {variable}")));
            None
        }
        Err(error) if error.refusal().is_some() => {
            checks.push(Check::fail(
                check,
                chain(&error),
                format!("pass its key, or use another port: set {variable}"),
            ));
            None
        }
        Err(error) => {
            let bindable = TcpListener::bind(SocketAddr::new(at.bind().ip(), at.port)).map(drop);
            checks.push(match bindable {
                Ok(()) => Check::ok(check, "not running; the port is free"),
                Err(_) if listener_on(at.port).is_none() => {
                    Check::ok(check, "not running; the port is just being freed")
                }
                Err(_) => {
                    let who = listener_on(at.port).unwrap_or_else(|| "something".into());
                    let found = format!("the port is taken by {who}: {}", chain(&error));
                    Check::fail(check, found, format!("stop it, or use another port: set {variable}"))
                }
            });
            None
        }
    }
}

fn build(program: &str, info: &InfoReply) -> Check {
    let check = format!("build of {program}");
    match connect::sibling_build(program) {
        Some(build) if build == info.build => Check::ok(check, "the one beside this rbee"),
        Some(_) => Check::warn(
            check,
            format!("pid {} runs another build than the one beside this rbee", info.pid),
            "`rbee down`, then start again",
        ),
        None => Check::warn(check, "cannot be compared", "install rbee again"),
    }
}

async fn queen(context: &Context, checks: &mut Vec<Check>) {
    let client = context.queen_client();
    if !context.queen.loopback {
        checks.push(match client.info().await {
            Ok(info) => Check::ok("queen", format!("{} answers (version {})", context.queen.url, info.version)),
            Err(error) => {
                Check::fail("queen", chain(&error), "check its address (--queen, RBEE_QUEEN_URL) and the network")
            }
        });
        return;
    }
    let info = port(context, "queen", &context.queen, "RBEE_QUEEN_BIND", client.info(), checks).await;
    if let Some(info) = info {
        checks.push(build(QUEEN, &info));
        checks.push(ready("queen is ready", client.ready().await));
    }
}

async fn hive(context: &Context, checks: &mut Vec<Check>) {
    let at = context.local_hive();
    let client = context.hive_client(&at.url);
    let info = port(context, "hive", &at, "RBEE_HIVE_BIND", client.info(), checks).await;
    if let Some(info) = info {
        checks.push(build(HIVE, &info));
        checks.push(ready("hive is ready", client.ready().await));
    }
}

fn ready(check: &str, reply: Result<rbee_wire::view::DaemonReady, rbee_client::ClientError>) -> Check {
    let hint = "wait a moment; its log says more (`rbee queen logs`, `rbee hive logs`)";
    match reply {
        Ok(reply) if reply.ready => Check::ok(check, "yes"),
        Ok(reply) => Check::warn(check, reply.reason.unwrap_or_else(|| "no".into()), hint),
        Err(error) => Check::warn(check, chain(&error), hint),
    }
}

/// Memory below which even a small model may be killed.
const LITTLE_MEMORY: u64 = 1 << 30;

/// Open files below which streams and workers run out of them.
const FEW_FILES: u64 = 1024;

fn limits() -> Vec<Check> {
    let mut checks = Vec::new();
    let read = |path: &str| fs::read_to_string(path).ok();
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let limit = cgroup_files(&groups).iter().filter_map(|path| read(path)?.trim().parse::<u64>().ok()).min();
    let total = read("/proc/meminfo").and_then(|text| meminfo(&text, "MemTotal")).unwrap_or(u64::MAX);
    checks.push(match limit.filter(|limit| *limit < total) {
        Some(limit) if limit < LITTLE_MEMORY => Check::warn(
            "memory limit",
            format!("this control group may use {}", bytes(limit)),
            "raise memory.max of the group, or load small models only",
        ),
        Some(limit) => Check::ok("memory limit", format!("this control group may use {}", bytes(limit))),
        None => Check::ok("memory limit", format!("none below the machine's {}", bytes(total))),
    });
    let files = read("/proc/self/limits").and_then(|text| open_files(&text));
    checks.push(match files {
        Some(files) if files < FEW_FILES => {
            Check::warn("open files", files.to_string(), format!("raise the limit: ulimit -n {}", FEW_FILES * 8))
        }
        Some(files) => Check::ok("open files", files.to_string()),
        None => Check::ok("open files", "unlimited"),
    });
    checks
}

/// Files that limit the memory of a process with this `/proc/self/cgroup`, of both versions, from its own
/// group up to the root; most do not exist.
fn cgroup_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(kinds), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, file) = if kinds.is_empty() {
            ("/sys/fs/cgroup", "memory.max")
        } else if kinds.split(',').any(|kind| kind == "memory") {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            continue;
        };
        files.extend(Path::new(path).ancestors().map(|group| {
            let group = group.to_string_lossy();
            format!("{root}{}/{file}", group.trim_end_matches('/'))
        }));
    }
    files
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The soft limit on open files from a text like `/proc/self/limits`.
fn open_files(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_fails_the_report_and_says_what_to_do() {
        let shown = report(vec![
            Check::ok("folder run", "/r/run"),
            Check::warn("open files", "256", "ulimit -n 8192"),
            Check::fail("queen at http://127.0.0.1:1", "the port is taken by process 7 (nc)", "set RBEE_QUEEN_BIND"),
        ]);
        insta::assert_snapshot!(shown.text, @r"
        ok    folder run                   /r/run
        warn  open files                   256
              hint: ulimit -n 8192
        fail  queen at http://127.0.0.1:1  the port is taken by process 7 (nc)
              hint: set RBEE_QUEEN_BIND
        ");
        assert_eq!(shown.exit, Exit::Failed);
        assert_eq!(report(vec![Check::warn("a", "b", "c")]).exit, Exit::Done);
    }

    #[test]
    fn limits_are_found_in_both_versions_of_control_groups() {
        assert_eq!(
            cgroup_files("0::/user/a\n"),
            ["/sys/fs/cgroup/user/a/memory.max", "/sys/fs/cgroup/user/memory.max", "/sys/fs/cgroup/memory.max"]
        );
        assert_eq!(cgroup_files("5:cpu:/x\n4:memory:/\n"), ["/sys/fs/cgroup/memory/memory.limit_in_bytes"]);
        let text = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 4096                 files\n";
        assert_eq!(open_files(text), Some(1024));
        assert_eq!(meminfo("MemFree: 1 kB\nMemTotal:       2 kB\n", "MemTotal"), Some(2048));
    }

    #[test]
    fn a_folder_that_cannot_be_made_fails() {
        let root = tempfile::tempdir().unwrap();
        let verdict = |path: &Path| folder_is_writable("x", path).verdict;
        assert_eq!(verdict(&root.path().join("not/yet")), Verdict::Ok);
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(verdict(root.path()), Verdict::Warn);
        fs::write(root.path().join("file"), "").unwrap();
        assert_eq!(verdict(&root.path().join("file/below")), Verdict::Fail);
    }
}
