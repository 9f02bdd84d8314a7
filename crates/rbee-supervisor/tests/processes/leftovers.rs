//! What is left of processes that have ended: nothing. What they get from their parent: stdio and the control pipe.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rbee_supervisor::Supervisor;
use rbee_wire::ErrorCode;
use rbee_wire::hive::ProcessState;
use rustix::process::Signal;

use crate::rig::{
    LONGEST_LIFE, Rig, alone, block_on, descriptors, numbers, own_children, own_program, role, role_args, runs, shell,
    signal, stat, until, until_some,
};

#[test]
fn a_hundred_lives_leave_no_descriptor_no_thread_and_no_zombie() {
    alone(&["hive of many lives"]);
}

/// Twenty workers that end at once, five times each: a crash loop is five exits.
pub fn hive_of_many_lives() {
    block_on(async {
        let rig = Rig::new();
        let live = async |count: usize| {
            let mut workers = Vec::new();
            for _ in 0..count {
                workers.push(rig.start(shell("echo a word; exit 3")).await.worker_id);
            }
            for worker in &workers {
                rig.exit(worker).await;
            }
            workers
        };
        let threads = || {
            let all = std::fs::read_dir("/proc/self/task").unwrap();
            all.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("comm")).ok()).collect::<Vec<_>>()
        };
        let captures = || threads().iter().filter(|name| *name == "capture\n").count();
        // What is made once is made by the first.
        live(1).await;
        until("no output to be captured any more", || captures() == 0).await;
        let before = (descriptors(std::process::id()), threads().len());
        let mut lives = 0;
        for _ in 0..5 {
            for worker in live(4).await {
                lives += 1 + rig.supervisor.get(&worker).unwrap().restarts;
            }
        }
        assert_eq!(lives, 100);
        until("the same descriptors", || descriptors(std::process::id()) == before.0).await;
        until("the same threads", || threads().len() == before.1).await;
        assert_eq!(own_children(), [0u32; 0]);
        let lives = rig.folder.path().join("lives");
        assert_eq!(std::fs::read_dir(lives).unwrap().count(), 0, "records of lives that are over");
    });
}

#[tokio::test]
async fn a_worker_inherits_its_stdio_and_its_control_pipe_alone() {
    let rig = Rig::new();
    // As a shell or a library may leave it: open to whatever is executed.
    let left_open = rustix::io::dup(std::fs::File::open("/dev/zero").unwrap()).unwrap();
    let first = rig.start(shell("exec sleep 30")).await;
    let second = rig.start(shell("exec sleep 30")).await;
    drop(left_open);
    for process in [&first, &second] {
        let environment = || std::fs::read_to_string(format!("/proc/{}/environ", process.pid)).ok();
        let control = || {
            let fd = environment()?.split('\0').find_map(|entry| entry.strip_prefix("RBEE_CONTROL_FD=")?.parse().ok());
            fd.map(|fd| (fd, "socket".to_owned()))
        };
        let stdio = [(0, "/dev/null".to_owned()), (1, "pipe".to_owned()), (2, "pipe".to_owned())];
        // Programs open files of their own as they begin, and close them.
        until("stdio and the control pipe alone", || {
            let open = descriptors(process.pid).into_iter();
            let kinds = open.map(|(fd, what)| (fd, what.split(':').next().unwrap_or_default().to_owned()));
            control().is_some_and(|control| kinds.eq(stdio.iter().cloned().chain([control])))
        })
        .await;
    }
    for process in [first, second] {
        rig.supervisor.kill(&process.worker_id);
        rig.exit(&process.worker_id).await;
    }
}

#[tokio::test]
async fn what_a_worker_forked_ends_with_it() {
    // The child that is left holds the output and the control pipe open, as children do.
    let check = async |end: &str| {
        let rig = Rig::new();
        let file = rig.folder.path().join("pids");
        let script = format!("sleep 30 & echo $! >> {}; {end}", file.display());
        let worker = rig.start(shell(&script)).await.worker_id;
        let forked = until_some("its child", || numbers(&file).first().copied()).await;
        if end == "wait" {
            assert!(runs(forked));
            assert!(rig.supervisor.kill(&worker));
        }
        until("the child's end", || !runs(forked)).await;
        rig.supervisor.kill(&worker);
        assert!(rig.supervisor.gone(&worker, crate::rig::LIMIT).await);
        until("the end of all children", || numbers(&file).iter().all(|&pid| !runs(pid))).await;
    };
    check("wait").await;
    check("exit 1").await;
}

/// Two lines of defence, each alone: the pipe's end, for one that no signal reaches; the signal, for one that does not
/// look at its pipe.
#[tokio::test]
async fn no_worker_outlives_a_hive_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    let path = file.to_str().unwrap();
    let mut hive = Command::new(own_program())
        .args(role_args(&["hive that dies", path]))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let workers = until_some("two workers", || Some(numbers(&file)).filter(|pids| pids.len() == 2)).await;
    assert!(workers.iter().all(|&pid| stat(pid).is_some_and(|(_, parent)| parent == hive.id())));
    hive.kill().unwrap();
    hive.wait().unwrap();
    for (pid, what) in workers.into_iter().zip(["of the deaf one", "of the one without a signal"]) {
        until(what, || !runs(pid)).await;
    }
}

pub fn hive_that_dies(file: &Path) {
    block_on(async {
        let rig = Rig::new();
        let deaf = rig.start(shell("exec sleep 30")).await;
        let listening = rig.start(role(&["worker without a death signal"])).await;
        rig.until_ready(&listening.worker_id).await;
        std::fs::write(file, format!("{}\n{}\n", deaf.pid, listening.pid)).unwrap();
        tokio::time::sleep(LONGEST_LIFE).await;
    });
}

#[tokio::test]
async fn a_worker_outlives_the_thread_that_asked_for_it() {
    let rig = Rig::new();
    let (supervisor, runtime) = (rig.supervisor.clone(), tokio::runtime::Handle::current());
    let asking = std::thread::spawn(move || runtime.block_on(supervisor.spawn(role(&["worker"]))).unwrap());
    until("asked", || asking.is_finished()).await;
    let worker = asking.join().unwrap().worker_id;
    rig.until_ready(&worker).await;
    rig.supervisor.drain(&worker, Duration::from_secs(5));
    let exit = rig.exit(&worker).await;
    assert_eq!((exit.code, exit.signal, exit.reason.as_str()), (Some(0), None, "retired"), "{}", rig.log(&worker));
    assert_eq!(rig.supervisor.get(&worker).unwrap().restarts, 0);
}

#[test]
fn a_spawn_that_nobody_waits_for_leaves_no_process() {
    alone(&["hive whose caller goes away"]);
}

pub fn hive_whose_caller_goes_away() {
    block_on(async {
        let rig = Rig::new();
        tokio::select! {
            biased;
            _ = rig.supervisor.spawn(shell("exec sleep 30")) => unreachable!("no process is made that fast"),
            () = std::future::ready(()) => {}
        }
        // Processes are started one after the other: the first was there before this one.
        let second = rig.start(shell("exec sleep 30")).await;
        assert_eq!(own_children(), [second.pid]);
        assert_eq!(rig.supervisor.list().len(), 1);
    });
}

#[tokio::test]
async fn a_new_hive_kills_what_a_former_one_left_and_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let (logs, lives) = (folder.path().join("logs"), folder.path().join("lives"));
    std::fs::create_dir(&lives).unwrap();
    let asleep = || Command::new("sleep").arg("30").process_group(0).spawn().unwrap();
    let (mut left, mut other) = (asleep(), asleep());
    let started = |pid: u32| -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap()
    };
    std::fs::write(lives.join("left"), format!("{} {}", left.id(), started(left.id()))).unwrap();
    // The number was another's when this was written.
    std::fs::write(lives.join("reused"), format!("{} {}", other.id(), started(other.id()) - 1)).unwrap();
    std::fs::write(lives.join("nonsense"), "-1 \0").unwrap();
    Supervisor::new(&logs, &lives).unwrap();
    until("the end of what was left", || left.try_wait().unwrap().is_some()).await;
    assert!(runs(other.id()));
    assert_eq!(std::fs::read_dir(&lives).unwrap().count(), 0);
    signal(other.id(), Signal::KILL);
    other.wait().unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_run_leaves_nothing() {
    let rig = Rig::new();
    let mut spec = shell("");
    spec.program = rig.folder.path().join("not there");
    let error = rig.supervisor.spawn(spec).await.unwrap_err().to_body();
    assert_eq!(error.code, ErrorCode::Internal);
    assert!(error.message.contains("not there"), "{}", error.message);
    assert_eq!(rig.supervisor.list(), []);
    let worker = rig.start(role(&["worker"])).await.worker_id;
    assert_eq!(rig.until_ready(&worker).await.state, ProcessState::Ready);
    rig.supervisor.kill(&worker);
    rig.exit(&worker).await;
}
