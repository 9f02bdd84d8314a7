//! Several processes on one cache, and processes that are killed.
//!
//! The child is this very test program, told by its environment to fetch.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rbee_catalog::{Error, Options, Store, Url};
use rbee_testkit::hub::{HubRepo, noise};
use rbee_testkit::{patience, wait_for};

use crate::kit::{Place, all_below, fetch, model};

const MIB: usize = 1 << 20;

/// What the child prints when it has the model.
const FETCHED: &str = "the child has fetched it";

#[test]
fn a_child_process_fetches() {
    let Ok(hub) = std::env::var("CATALOG_CHILD_HUB") else { return };
    let variable = |name: &str| std::env::var(name).unwrap();
    let mut options = Options::new(hub, &variable("CATALOG_CHILD_ENDPOINT")).unwrap();
    options.trusted_origins = vec![Url::parse(&variable("CATALOG_CHILD_CDN")).unwrap()];
    options.reserve = 0;
    match fetch(&Store::new(options), "org/name") {
        Ok(_) => println!("{FETCHED}"),
        Err(error) => println!("{:?} {}", error.code(), error.body().message),
    }
}

fn command(place: &Place) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "processes::a_child_process_fetches", "--nocapture", "--test-threads=1"])
        .env("CATALOG_CHILD_HUB", place.cache())
        .env("CATALOG_CHILD_ENDPOINT", &place.hub.url)
        .env("CATALOG_CHILD_CDN", &place.hub.cdn)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

fn child(place: &Place) -> Child {
    command(place).spawn().unwrap()
}

fn has_fetched(child: Child) -> bool {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success() && said.contains(FETCHED)
}

/// The model is there with the right bytes, or it is not visible at all.
fn right_or_absent(place: &Place, seed: u64, bytes: usize) -> bool {
    let Some(local) = place.store().local(&model("org/name")).unwrap() else {
        let weights = all_below(&place.repo_folder()).into_iter().any(|path| path.starts_with("refs/"));
        assert!(!weights, "a name of what is not there");
        return false;
    };
    assert_eq!(std::fs::read(local.path.join("model.safetensors")).unwrap(), noise(seed, bytes));
    true
}

/// The weights' blob, wherever it is on the way to be one.
fn only_of_the_store(place: &Place) {
    for path in all_below(place.folder.path()) {
        let known = path == "hub" || path.starts_with("hub/.locks") || path.starts_with("hub/models--org--name");
        assert!(known, "{path}");
    }
}

#[test]
fn two_hundred_kills_leave_the_whole_model_or_a_part_to_go_on_with() {
    kill_until(&Place::in_memory(5), 170);
    // The same where syncs and renames take their time.
    kill_until(&Place::seeded(5), 30);
}

/// Kills fetching processes at random points of their lives, the renames at the end among them, until so many are dead.
fn kill_until(place: &Place, kills: u64) {
    let bytes = 24 * MIB;
    place.hub.put("org/name", "main", HubRepo::new().model(9, bytes));
    place.hub.limit(300 << 20);
    // How long one takes that is left alone.
    let began = Instant::now();
    assert!(has_fetched(child(place)));
    let whole = began.elapsed();
    let (mut killed, mut runs) = (0, 0);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    place.hub.forget();
    while killed < kills {
        std::fs::remove_dir_all(place.cache()).unwrap();
        runs += 1;
        loop {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let mut child = child(place);
            std::thread::sleep(whole.mul_f64((random % 1000) as f64 / 900.0));
            let _ = child.kill();
            let got = has_fetched(child);
            killed += u64::from(!got);
            only_of_the_store(place);
            let visible = right_or_absent(place, 9, bytes);
            assert!(visible || !got);
            if visible {
                break;
            }
        }
    }
    let ratio = place.hub.bytes() as f64 / (f64::from(runs) * bytes as f64);
    eprintln!("{killed} kills over {runs} models, {whole:?} each alone: {ratio:.4} of the bytes");
    assert!(ratio <= 1.05 * killed as f64 / f64::from(runs), "{ratio}");
}

#[test]
fn a_kill_costs_a_twentieth_of_the_bytes_at_most() {
    let bytes = 64 * MIB;
    let place = Place::seeded(6);
    place.hub.put("org/name", "main", HubRepo::new().model(10, bytes));
    place.hub.limit(100 << 20);
    let (mut fetched, after) = (0, [5, 20, 33, 50, 63]);
    for mib in after {
        place.hub.forget();
        let mut first = child(&place);
        wait_for("so many bytes", patience(Duration::from_secs(5)), || {
            if place.hub.bytes() > mib << 20 { Ok(()) } else { Err(format!("{} bytes", place.hub.bytes())) }
        });
        first.kill().unwrap();
        first.wait().unwrap();
        assert!(!right_or_absent(&place, 10, bytes));
        assert!(has_fetched(child(&place)));
        assert!(right_or_absent(&place, 10, bytes));
        fetched += place.hub.bytes();
        eprintln!("killed after {mib} MiB: {:.4} of the bytes", place.hub.bytes() as f64 / bytes as f64);
        std::fs::remove_dir_all(place.cache()).unwrap();
    }
    // One by one it depends on what the machine has in its socket buffers just then.
    let ratio = fetched as f64 / (after.len() * bytes) as f64;
    assert!(ratio <= 1.05, "{ratio}");
}

#[test]
fn four_processes_make_one_transfer_and_survive_the_one_that_makes_it() {
    let bytes = 32 * MIB;
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(3, bytes));
    place.hub.limit(32 << 20);
    let mut first = child(&place);
    wait_for("the first to have begun", patience(Duration::from_secs(2)), || {
        if place.hub.bytes() > 8 << 20 { Ok(()) } else { Err(format!("{} bytes", place.hub.bytes())) }
    });
    let others: Vec<Child> = (0..3).map(|_| child(&place)).collect();
    std::thread::sleep(Duration::from_millis(200));
    first.kill().unwrap();
    first.wait().unwrap();
    let (killed, before) = (Instant::now(), place.hub.bytes());
    wait_for("another to go on", patience(Duration::from_secs(1)), || {
        if place.hub.bytes() > before + (2 << 20) { Ok(()) } else { Err(format!("{} bytes", place.hub.bytes())) }
    });
    assert!(killed.elapsed() < Duration::from_secs(5));
    assert!(others.into_iter().all(has_fetched));
    assert!(right_or_absent(&place, 3, bytes));
    let ratio = place.hub.bytes() as f64 / bytes as f64;
    eprintln!("{ratio:.4} of the bytes for four");
    assert!(ratio <= 1.05, "{ratio}");
}

/// A file system of 32 MiB, if this user may make one.
struct Small(PathBuf);

impl Small {
    fn mount(path: &Path) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=32m", "tmpfs"])
            .arg(path)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        mounted.then(|| Self(path.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_said_with_what_is_needed_and_what_is_free() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(3, 24 * MIB));
    let Some(small) = Small::mount(&place.folder.path().join("small")) else {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "skipped: this user may not mount a small file system");
        return;
    };
    let mut options = place.options();
    options.hub = small.0.join("hub");
    // Full from the start.
    std::fs::write(small.0.join("ballast"), vec![1; 16 * MIB]).unwrap();
    let error = fetch(&Store::new(options.clone()), "org/name").unwrap_err();
    let Error::DiskFull { needed, free, .. } = &*error else { panic!("{error:?}") };
    assert!(*needed >= 24 * MIB as u64 && *free < 17 * MIB as u64, "{error:?}");
    assert_eq!(error.body().details.unwrap()["needed"], *needed);
    // Room enough for one.
    std::fs::remove_file(small.0.join("ballast")).unwrap();
    fetch(&Store::new(options.clone()), "org/name").unwrap();
    // And not for another beside it, until that is gone.
    place.hub.put("org/name", "two", HubRepo::new().model(4, 8 * MIB));
    let error = fetch(&Store::new(options.clone()), "org/name@two").unwrap_err();
    assert!(matches!(&*error, Error::DiskFull { .. }), "{error:?}");
    let store = Store::new(options);
    assert!(store.local(&model("org/name")).unwrap().is_some());
    store.delete(&model("org/name")).unwrap();
    fetch(&store, "org/name@two").unwrap();
}

#[test]
fn a_disk_that_fails_to_sync_has_no_model_and_keeps_no_part() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(3, 8 * MIB));
    let spoilt = |calls: &str| {
        let plain = command(&place);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e"]).arg(format!("trace={calls}"));
        strace.arg("-e").arg(format!("inject={calls}:error=EIO"));
        strace.arg(plain.get_program()).args(plain.get_args()).stdin(Stdio::null()).stderr(Stdio::null());
        strace.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        strace.output().ok().map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    if spoilt("fsync").is_none_or(|said| !said.contains("cannot sync")) {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "skipped: strace cannot be used here to let syncs fail");
        return;
    }
    let parts = || all_below(&place.repo_folder()).into_iter().filter(|path| path.contains("rbee-")).count();
    assert!(!right_or_absent(&place, 3, 8 * MIB));
    assert_eq!(parts(), 0);
    // The syncs while bytes still come are others than the last one.
    place.hub.limit(32 << 20);
    let said = spoilt("fdatasync").unwrap();
    assert!(said.contains("cannot sync") && said.contains("Input/output error"), "{said}");
    assert!(!right_or_absent(&place, 3, 8 * MIB));
    assert_eq!(parts(), 0);
    assert!(has_fetched(child(&place)));
    assert!(right_or_absent(&place, 3, 8 * MIB));
}

#[test]
fn a_folder_that_may_not_be_written_is_named() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(3, 1000));
    // A file where a folder has to be: also the administrator cannot write there.
    std::fs::create_dir_all(place.cache()).unwrap();
    File::create(place.repo_folder()).unwrap();
    std::fs::set_permissions(place.repo_folder(), std::fs::Permissions::from_mode(0o444)).unwrap();
    let error = fetch(&place.store(), "org/name").unwrap_err();
    assert!(matches!(&*error, Error::File { .. }) && error.to_string().contains("models--org--name"), "{error:?}");
}
