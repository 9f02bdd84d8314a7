//! Models of a hub: fetched once, shown, used, and removed.

use std::path::PathBuf;
use std::time::Duration;

use rbee_testkit::hub::{Access, Hub, HubRepo, noise};
use rbee_testkit::{Cluster, Running, Setup, Signal, patience, wait_for};
use serde_json::{Value, json};

const ASK: [&str; 7] = ["-p", "What do bees make?", "--temperature", "0", "--max-tokens", "20", "-q"];

/// The folder of the built-in model.
fn tinybee() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tinybee/model")).canonicalize().unwrap()
}

fn tinybee_repo() -> HubRepo {
    let read = |name: &str| std::fs::read(tinybee().join(name)).unwrap();
    let small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    let repo = small.iter().fold(HubRepo::new(), |repo, name| repo.file(name, read(name)));
    repo.file("README.md", "bees").lfs("model.safetensors", read("model.safetensors"))
}

/// A home whose hub is this one.
fn home(hub: &Hub) -> Setup {
    Setup::real().env("HF_ENDPOINT", &hub.url).env("RBEE_HUB_MIRRORS", &hub.cdn)
}

fn cache(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("cache/huggingface/hub")
}

fn parts(cluster: &Cluster) -> Vec<String> {
    let blobs = std::fs::read_dir(cache(cluster).join("models--org--big/blobs"));
    let names = blobs.into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".rbee-part")).collect()
}

#[test]
fn a_model_that_is_named_is_fetched_once_answers_and_is_listed_shown_and_removed() {
    let hub = Hub::start();
    let commit = hub.put("org/bee", "main", tinybee_repo());
    let cluster = home(&hub).home();
    let answer = cluster.rbee(&[&["infer", "-m", "org/bee"], &ASK[..]].concat()).exits(0);
    assert_eq!(answer.stdout.trim(), "Bees make honey.");
    let fetched = hub.bytes();
    let list = cluster.rbee(&["model", "list", "--json"]).exits(0).json();
    assert_eq!(
        (&list[0]["id"], &list[0]["complete"], &list[0]["commit"]),
        (&json!("org/bee"), &json!(true), &json!(commit))
    );
    assert_eq!(list[0]["workers"].as_array().unwrap().len(), 1, "{list}");
    let shown = cluster.rbee(&["show", "org/bee", "--json"]).exits(0).json();
    let files: Vec<&str> =
        shown["files"].as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap()).collect();
    assert!(files.contains(&"model.safetensors") && !files.contains(&"README.md"), "{files:?}");
    let table = cluster.rbee(&["ls"]).exits(0).stdout;
    assert!(table.contains("org/bee") && table.contains("complete"), "{table}");

    let refused = cluster.rbee(&["rm", "org/bee"]).exits(1).stderr;
    assert!(refused.contains("is in use by worker-") && refused.contains("rbee model unload"), "{refused}");
    cluster.rbee(&["stop", "org/bee"]).exits(0);
    // Again, and by another way: from the disk.
    cluster.rbee(&["pull", "org/bee"]).exits(0);
    let spawned = cluster.rbee(&["worker", "spawn", "--model", "org/bee"]).exits(0);
    assert_eq!(hub.bytes(), fetched, "{}", spawned.stderr);
    cluster.rbee(&["stop", "org/bee"]).exits(0);
    cluster.rbee(&["rm", "org/bee"]).exits(0);
    assert!(!cache(&cluster).join("models--org--bee").exists());
    assert_eq!(cluster.rbee(&["model", "list", "--json"]).exits(0).json(), json!([]));
    cluster.rbee(&["show", "org/bee"]).exits(3);
    cluster.rbee(&["rm", "org/bee"]).exits(3);
}

#[test]
fn what_cannot_be_fetched_says_why_and_exits_with_3_or_1() {
    let hub = Hub::start();
    hub.put("org/secret", "main", tinybee_repo().access(Access::Gated("hf_right".into())));
    hub.put(
        "org/ggufs",
        "main",
        HubRepo::new().lfs("m-Q4_K_M.gguf", noise(1, 4000)).lfs("m-Q8_0.gguf", noise(2, 4000)),
    );
    let cluster = home(&hub).home();
    cluster.rbee(&["up"]).exits(0);
    cluster.rbee(&["plan", "org/secret"]).exits(3).says(&["is not in the store", "rbee model download"]);
    let missing = cluster.rbee(&["infer", "-m", "org/nothing", "-p", "x"]).exits(3).stderr;
    assert!(missing.contains("org/nothing"), "{missing}");
    let gated = cluster.rbee(&["pull", "org/secret"]);
    assert!(gated.code != 0 && gated.stderr.contains("HF_TOKEN"), "{gated:?}");
    let several = cluster.rbee(&["pull", "org/ggufs"]);
    assert!(several.code != 0 && several.stderr.contains("Q4_K_M") && several.stderr.contains("Q8_0"), "{several:?}");
    // A quantization is fetched by its name; that these bytes are none shows when a worker reads them.
    cluster.rbee(&["pull", "org/ggufs:Q8_0"]).exits(0);
    let refused = cluster.rbee(&["infer", "-m", "org/ggufs:Q8_0", "-p", "x"]).exits(1).stderr;
    assert!(refused.contains("MODEL_CORRUPT") && refused.contains("GGUF"), "{refused}");
    // The rest works.
    assert_eq!(cluster.rbee(&[&["infer"], &ASK[..]].concat()).exits(0).stdout.trim(), "Bees make honey.");

    let off = home(&hub).env("HF_HUB_OFFLINE", 1).home();
    let asked = hub.requests();
    let refused = off.rbee(&["infer", "-m", "org/secret", "-p", "x"]).exits(3).stderr;
    assert!(refused.contains("HF_HUB_OFFLINE"), "{refused}");
    assert_eq!(hub.requests(), asked);
}

#[test]
fn the_token_of_the_environment_opens_what_is_gated() {
    let hub = Hub::start();
    hub.put("org/secret", "main", tinybee_repo().access(Access::Gated("hf_right".into())));
    let cluster = home(&hub).env("HF_TOKEN", "hf_right").home();
    cluster.rbee(&["pull", "org/secret"]).exits(0);
    let seen = |server| hub.count(server).authorizations.into_iter().flatten().count();
    assert!(seen(rbee_testkit::hub::Server::Hub) > 0);
    assert_eq!(seen(rbee_testkit::hub::Server::Cdn), 0, "the token went to another host");
}

#[test]
fn a_key_for_inference_loads_what_is_in_the_store_and_neither_downloads_nor_pins() {
    let hub = Hub::start();
    hub.put("org/bee", "main", tinybee_repo());
    let cluster = home(&hub).env("RBEE_TOKEN", "s3cret").env("RBEE_API_KEY", "s3cret").home();
    cluster.rbee(&["up"]).exits(0);
    let secret = cluster.rbee(&["key", "create", "--name", "k", "--json"]).exits(0).json()["secret"].clone();
    let ask = |more: &[&str]| {
        let args = [&["infer", "-m", "org/bee", "--api-key", secret.as_str().unwrap()], &ASK[..], more].concat();
        cluster.rbee(&args)
    };
    let refused = ask(&[]).exits(3).stderr;
    assert!(refused.contains("no worker serves org/bee"), "{refused}");
    assert_eq!(hub.bytes(), 0);
    cluster.rbee(&["pull", "org/bee"]).exits(0);
    wait_for("the store to be told of", patience(Duration::from_secs(3)), || {
        let answer = ask(&[]);
        if answer.code == 0 { Ok(()) } else { Err(answer.stderr) }
    });
    let refused = ask(&["--keep-alive", "-1"]).exits(1).stderr;
    assert!(refused.contains("by an admin only"), "{refused}");
    ask(&["--keep-alive", "1h"]).exits(0);
}

fn big(hub: &Hub) -> u64 {
    let size = 24 << 20;
    hub.put("org/big", "main", HubRepo::new().model(7, size));
    size as u64
}

/// A home whose hub sends slowly, and a download there that is half done.
fn half_way(hub: &Hub, size: u64) -> (Cluster, Running) {
    hub.limit(6 << 20);
    let cluster = home(hub).home();
    cluster.rbee(&["up"]).exits(0);
    let pull = cluster.cmd(&["pull", "org/big"]).start();
    until_half(&cluster, size);
    (cluster, pull)
}

fn until_half(cluster: &Cluster, size: u64) {
    wait_for("half of the download", patience(Duration::from_secs(30)), || {
        let status = cluster.try_status()?;
        let done = status.hives.iter().flat_map(|hive| &hive.downloads).map(|download| download.done).max();
        if done.is_some_and(|done| done > size / 2) { Ok(()) } else { Err(format!("{done:?} of {size}")) }
    });
}

#[test]
fn ctrl_c_stops_a_download_and_the_next_one_goes_on_from_there() {
    let hub = Hub::start();
    let size = big(&hub);
    let (cluster, pull) = half_way(&hub, size);
    pull.signal(Signal::INT);
    assert_eq!(pull.finish(Duration::from_secs(20)).code, 130);
    wait_for("the transfer to stop", patience(Duration::from_secs(3)), || {
        let status = cluster.try_status()?;
        let going: Vec<_> = status.hives.iter().flat_map(|hive| &hive.downloads).collect();
        if going.is_empty() { Ok(()) } else { Err(format!("{going:?}")) }
    });
    assert_eq!(parts(&cluster).len(), 1);
    let list = cluster.rbee(&["model", "list", "--json"]).exits(0).json();
    assert_eq!((&list[0]["id"], &list[0]["complete"]), (&json!("org/big"), &json!(false)));
    hub.limit(0);
    let done = cluster.rbee(&["pull", "org/big"]).exits(0);
    assert_eq!(done.stdout, "org/big\n");
    assert!(hub.bytes() < size + size / 20 + 4096, "{} of {size}", hub.bytes());
    assert_eq!(parts(&cluster).len(), 0);
}

#[test]
fn a_hive_that_is_killed_in_the_middle_of_a_download_goes_on_from_there() {
    let hub = Hub::start();
    let size = big(&hub);
    let (cluster, pull) = half_way(&hub, size);
    for process in cluster.running("rbee-hive") {
        process.signal(Signal::KILL);
    }
    assert_ne!(pull.finish(Duration::from_secs(20)).code, 0);
    hub.limit(0);
    cluster.rbee(&["pull", "org/big"]).exits(0);
    assert!(hub.bytes() < size + size / 20 * 2 + 4096, "{} of {size}", hub.bytes());
}

#[test]
fn many_who_want_a_model_share_one_download_and_one_who_leaves_does_not_end_it() {
    let hub = Hub::start();
    let size = big(&hub);
    hub.limit(8 << 20);
    let cluster = home(&hub).home();
    cluster.rbee(&["up"]).exits(0);
    let leaver = cluster.cmd(&["pull", "org/big"]).start();
    let stayers: Vec<_> = (0..4).map(|_| cluster.cmd(&["pull", "org/big"]).start()).collect();
    until_half(&cluster, size);
    leaver.signal(Signal::INT);
    leaver.finish(Duration::from_secs(20));
    for stayer in stayers {
        let output = stayer.finish(Duration::from_secs(60));
        assert_eq!(output.code, 0, "{output:?}");
        assert!(output.stderr.contains("downloading") || output.stderr.is_empty(), "{output:?}");
    }
    assert!(hub.bytes() < size + 4096, "{} of {size}", hub.bytes());
}

#[test]
fn a_folder_is_taken_into_the_store_under_a_name() {
    let cluster = Setup::real().env("HF_HUB_OFFLINE", 1).home();
    let folder = tinybee().display().to_string();
    let id = cluster.rbee(&["model", "import", &folder, "--as", "me/bee"]).exits(0).stdout;
    assert_eq!(id, "me/bee\n");
    let answer = cluster.rbee(&[&["infer", "-m", "me/bee"], &ASK[..]].concat()).exits(0);
    assert_eq!(answer.stdout.trim(), "Bees make honey.");
    cluster.rbee(&["model", "import", &folder, "--as", "no slash"]).exits(2);
    cluster.rbee(&["model", "import", "/nowhere/at/all"]).exits(3);
    let known: Value = cluster.queen().get("/v1/models").json();
    let ids: Vec<&str> = known["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert!(ids.contains(&"me/bee"), "{ids:?}");
}
