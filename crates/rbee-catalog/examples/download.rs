//! Downloads 1 GiB from a hub on loopback, next to `curl | tee | sha256sum` of the same bytes, in turns.
//!
//! `cargo run --release -p rbee-catalog --example download [RUNS] [FOLDER]` prints each run's wall and CPU time (user and
//! system, of the client's processes only) and the ratios of the medians. The files go below FOLDER, a temporary one if
//! none is named.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a measurement that cannot be made ends")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rbee_catalog::{Options, Store, Url};
use rbee_testkit::hub::{Hub, HubRepo, noise};

const BYTES: usize = 1 << 30;

fn main() {
    if let Ok(cache) = std::env::var("DOWNLOAD_CACHE") {
        return fetch(&cache);
    }
    let mut args = std::env::args().skip(1);
    let runs: usize = args.next().map_or(5, |text| text.parse().unwrap());
    let folder = args.next().map_or_else(std::env::temp_dir, Into::into);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let hub = Hub::start();
    let repo = HubRepo::new().file("config.json", "{}").lfs("model.safetensors", noise(1, BYTES));
    let commit = hub.put("org/name", "main", repo);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..runs {
        let cache = folder.path().join("hub");
        let seen = measured(
            Command::new(std::env::current_exe().unwrap())
                .env("DOWNLOAD_CACHE", &cache)
                .env("DOWNLOAD_HUB", &hub.url)
                .env("DOWNLOAD_CDN", &hub.cdn),
        );
        std::fs::remove_dir_all(&cache).unwrap();
        let file = folder.path().join("file");
        let url = format!("{}/org/name/resolve/{commit}/model.safetensors", hub.url);
        let script = "curl -sNL \"$1\" | tee \"$2\" | sha256sum; sync -d \"$2\"";
        let pipe = measured(Command::new("bash").args(["-c", script, "bash", &url]).arg(&file));
        std::fs::remove_file(&file).unwrap();
        println!("run {run}: rbee {seen:.2?}, curl|tee|sha256sum+sync {pipe:.2?} (wall, cpu)");
        ours.push(seen);
        theirs.push(pipe);
    }
    let median = |of: &[(Duration, Duration)], part: fn(&(Duration, Duration)) -> Duration| {
        let mut all: Vec<f64> = of.iter().map(|run| part(run).as_secs_f64()).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    println!(
        "medians: speed {:.2} of theirs, CPU {:.2} of theirs",
        median(&theirs, |run| run.0) / median(&ours, |run| run.0),
        median(&ours, |run| run.1) / median(&theirs, |run| run.1),
    );
}

fn fetch(cache: &str) {
    let mut options = Options::new(Path::new(cache), &std::env::var("DOWNLOAD_HUB").unwrap()).unwrap();
    options.trusted_origins = vec![Url::parse(&std::env::var("DOWNLOAD_CDN").unwrap()).unwrap()];
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let store = Store::new(options);
    let fetched = runtime.block_on(async { store.fetch(&"org/name".parse().unwrap()).finished().await });
    if let Err(error) = fetched {
        panic!("{error:?}");
    }
}

/// Wall time, and user and system time of a process and its children.
fn measured(command: &mut Command) -> (Duration, Duration) {
    let before = children();
    let began = Instant::now();
    assert!(command.stdout(Stdio::null()).status().unwrap().success());
    (began.elapsed(), children() - before)
}

/// CPU time of all children that have ended, from `/proc/self/stat`.
fn children() -> Duration {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let columns: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = columns[13..15].iter().map(|text| text.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}
