//! The cache is shared with the hub's own Python package, both ways. `cargo xtask test` installs it; without it that is
//! said and nothing is tested.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use rbee_testkit::hub::{HubRepo, noise};

use crate::kit::{Place, fetch, model};

const MIB: usize = 1 << 20;

const FILES: &str = "['*.json', '*.safetensors']";

fn python() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/sdk/hub");
    let program = folder.join("bin/python");
    if folder.join("made").is_file() && program.is_file() {
        return Some(program);
    }
    let _ = writeln!(std::io::stderr(), "skipped: huggingface_hub is not in target/sdk");
    None
}

/// Runs a script against the hub and the cache, and gives what it prints.
fn run(python: &Path, place: &Place, script: &str) -> String {
    let output = Command::new(python)
        .args(["-c", script])
        .env_clear()
        .env("HOME", place.folder.path())
        .env("HF_ENDPOINT", &place.hub.url)
        .env("HF_HUB_CACHE", place.cache())
        .env("HF_HUB_DISABLE_XET", "1")
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn python_finds_what_is_fetched_here_and_here_is_found_what_python_fetched() {
    let Some(python) = python() else { return };
    let repo = HubRepo::new().model(1, 12 * MIB);

    let ours = Place::new();
    let commit = ours.hub.put("org/name", "main", repo.clone());
    let local = fetch(&ours.store(), "org/name").unwrap();
    ours.hub.forget();
    let offline = format!(
        "import huggingface_hub as h; print(h.snapshot_download('org/name', local_files_only=True, allow_patterns={FILES}))"
    );
    assert_eq!(Path::new(&run(&python, &ours, &offline)), local.path);
    assert_eq!(ours.hub.requests(), 0);
    // Also when it may ask: every file is there under the name that it expects.
    let online = format!("import huggingface_hub as h; print(h.snapshot_download('org/name', allow_patterns={FILES}))");
    assert_eq!(Path::new(&run(&python, &ours, &online)), local.path);
    assert_eq!(ours.hub.bytes(), 0);
    let scan = "import huggingface_hub as h; i = h.scan_cache_dir(); \
                print([(r.repo_id, r.nb_files, [x.commit_hash for x in r.revisions]) for r in i.repos], len(i.warnings))";
    assert_eq!(run(&python, &ours, scan), format!("[('org/name', 3, ['{commit}'])] 0"));

    let theirs = Place::new();
    theirs.hub.put("org/name", "main", repo);
    let path = run(&python, &theirs, &online);
    theirs.hub.forget();
    let local = theirs.store().local(&model("org/name")).unwrap().unwrap();
    assert_eq!(local.path, Path::new(&path));
    assert_eq!(std::fs::read(local.path.join("model.safetensors")).unwrap(), noise(1, 12 * MIB));
    assert_eq!(fetch(&theirs.store(), "org/name").unwrap(), local);
    assert_eq!(theirs.hub.requests(), 0);
    // Begun by Python, completed here: what it has is not fetched again.
    let half = Place::new();
    half.hub.put("org/name", "main", HubRepo::new().model(1, 12 * MIB));
    run(&python, &half, "import huggingface_hub as h; h.hf_hub_download('org/name', 'model.safetensors')");
    half.hub.forget();
    assert_eq!(half.store().local(&model("org/name")).unwrap(), None);
    fetch(&half.store(), "org/name").unwrap();
    assert!(half.hub.bytes() < 1000, "{}", half.hub.bytes());
}
