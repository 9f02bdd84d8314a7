//! The rules of the repository that no compiler checks. Each is a function from facts to violations, so that a planted
//! violation turns its test red.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Which workspace crates a crate may depend on: the one table of the layers.
const EDGES: &[(&str, &[&str])] = &[
    ("rbee-wire", &[]),
    ("rbee-openai", &["rbee-wire"]),
    ("rbee-config", &["rbee-wire"]),
    ("rbee-catalog", &["rbee-wire"]),
    ("rbee-client", &["rbee-wire"]),
    ("rbee-weights", &[]),
    ("rbee-tokenizer", &[]),
    ("rbee-engine", &[]),
    ("rbee-kernels", &[]),
    ("rbee-cuda", &[]),
    ("rbee-models", &["rbee-cuda", "rbee-engine", "rbee-kernels", "rbee-weights"]),
    ("rbee-scheduler", &["rbee-wire"]),
    ("rbee-supervisor", &["rbee-wire"]),
    ("rbee-service", &["rbee-wire"]),
    // The simulated fleet runs the real scheduler, which is pure.
    ("rbee-testkit", &["rbee-wire", "rbee-client", "rbee-config", "rbee-engine", "rbee-scheduler"]),
    ("rbee-keeper", &["rbee-wire", "rbee-client", "rbee-config", "rbee-supervisor"]),
    (
        "queen-rbee",
        &[
            "rbee-wire",
            "rbee-openai",
            "rbee-client",
            "rbee-config",
            "rbee-scheduler",
            "rbee-service",
            "rbee-supervisor",
        ],
    ),
    ("rbee-hive", &["rbee-wire", "rbee-catalog", "rbee-client", "rbee-config", "rbee-service", "rbee-supervisor"]),
    (
        "llm-worker-rbee",
        &[
            "rbee-wire",
            "rbee-client",
            "rbee-engine",
            "rbee-models",
            "rbee-service",
            "rbee-supervisor",
            "rbee-tokenizer",
        ],
    ),
    ("rbee-e2e", &["rbee-wire", "rbee-openai", "rbee-client", "rbee-config", "rbee-engine", "rbee-testkit"]),
    ("rbee-fuzz", &["rbee-wire", "rbee-openai", "rbee-tokenizer", "rbee-weights"]),
    (
        "xtask",
        &[
            "rbee-wire",
            "rbee-openai",
            "rbee-client",
            "rbee-config",
            "rbee-keeper",
            // Its benches and simulations run the real one, which is pure.
            "rbee-scheduler",
            "rbee-testkit",
            "rbee-weights",
        ],
    ),
];

/// Which crates may use a kind of external crate, by the start of its name.
const RESERVED: &[(&str, &[&str])] = &[
    ("axum", &["rbee-service", "queen-rbee", "rbee-hive", "llm-worker-rbee"]),
    ("reqwest", &["rbee-catalog", "rbee-client"]),
    ("rustls", &["rbee-catalog", "rbee-client"]),
    ("candle", &["rbee-kernels"]),
    ("cudarc", &["rbee-cuda"]),
    ("rustyline", &["rbee-keeper"]),
];

/// Crates that do no IO and read no clock.
const PURE: &[&str] = &["rbee-wire", "rbee-openai", "rbee-weights", "rbee-tokenizer", "rbee-engine", "rbee-scheduler"];

/// Where child processes may be started.
const SPAWNS: &[&str] = &[
    "crates/rbee-supervisor/",
    "crates/rbee-testkit/",
    "tests/",
    "xtask/",
    "crates/rbee-cuda/build.rs",
    "crates/rbee-catalog/examples/",
    // Workers that inspect a model are run to their end by rbee-supervisor.
    "bin/rbee-hive/src/rooms.rs",
];

/// Longest Rust file, in lines.
const MAX_LINES: usize = 900;

/// A member of the workspace.
#[derive(Debug, Default)]
struct Member {
    name: String,
    folder: String,
    manifest: String,
    clippy: Option<String>,
    /// Name and kind (`normal`, `dev`, `build`).
    dependencies: Vec<(String, String)>,
}

/// Checks everything and prints what is wrong.
///
/// # Errors
/// When a rule is broken, or the workspace cannot be read.
pub fn run(root: &Path) -> Result<()> {
    let members = members(root)?;
    let files = tracked(root)?;
    let mut found: Vec<String> = members.iter().flat_map(member_rules).collect();
    for file in files {
        let Ok(text) = std::fs::read_to_string(root.join(&file)) else { continue };
        found.extend(file_rules(&file, &text));
    }
    for line in &found {
        eprintln!("tidy: {line}");
    }
    if !found.is_empty() {
        bail!("{} rules of the repository are broken", found.len());
    }
    eprintln!("tidy: {} crates in order", members.len());
    Ok(())
}

fn members(root: &Path) -> Result<Vec<Member>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata's answer")?;
    let packages = metadata["packages"].as_array().context("packages")?;
    packages
        .iter()
        .map(|package| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let manifest_path = PathBuf::from(text(&package["manifest_path"]));
            let folder = manifest_path.parent().context("a manifest lies in a folder")?;
            let dependencies = package["dependencies"].as_array().into_iter().flatten();
            Ok(Member {
                name: text(&package["name"]),
                folder: folder.strip_prefix(root)?.display().to_string(),
                manifest: std::fs::read_to_string(&manifest_path)?,
                clippy: std::fs::read_to_string(folder.join("clippy.toml")).ok(),
                dependencies: dependencies
                    .map(|dependency| {
                        let kind = dependency["kind"].as_str().unwrap_or("normal").to_owned();
                        (text(&dependency["name"]), kind)
                    })
                    .collect(),
            })
        })
        .collect()
}

fn tracked(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git").args(["ls-files"]).current_dir(root).output().context("git ls-files")?;
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// What is wrong with a member's manifest and dependencies.
fn member_rules(member: &Member) -> Vec<String> {
    let name = &member.name;
    let mut found = Vec::new();
    let mut wrong = |text: String| found.push(format!("{name}: {text}"));
    let last = member.folder.rsplit('/').next().unwrap_or_default();
    if last != name && !matches!(name.as_str(), "rbee-e2e" | "rbee-fuzz") {
        wrong(format!("lies in {}, a folder of another name", member.folder));
    }
    let sections = |wanted: &str| member.manifest.split("\n[").any(|part| part.starts_with(wanted));
    if !sections("lints]\nworkspace = true") {
        wrong("does not opt in to the workspace's lints".into());
    }
    let mut section = "";
    for line in member.manifest.lines() {
        if line.starts_with('[') {
            section = line;
        } else if section.contains("dependencies") && line.contains('=') && !line.contains("workspace = true") {
            wrong(format!("`{}` does not take its version from the workspace", line.trim()));
        }
    }
    let Some((_, allowed)) = EDGES.iter().find(|(known, _)| known == name) else {
        wrong("is not in the table of layers".into());
        return found;
    };
    for (dependency, kind) in &member.dependencies {
        let ours = EDGES.iter().any(|(known, _)| known == dependency);
        if ours && kind != "dev" && !allowed.contains(&dependency.as_str()) {
            wrong(format!("depends on {dependency}, which its layer does not allow"));
        }
        if dependency == "rbee-testkit" && kind != "dev" && !matches!(name.as_str(), "xtask" | "rbee-e2e") {
            wrong("uses rbee-testkit outside its tests".into());
        }
        for (start, users) in RESERVED {
            if dependency.starts_with(start) && kind != "dev" && !users.contains(&name.as_str()) {
                wrong(format!("depends on {dependency}, which only {} may", users.join(", ")));
            }
        }
    }
    if PURE.contains(&name.as_str()) {
        let bans = member.clippy.as_deref().unwrap_or_default();
        for ban in ["Instant::now", "SystemTime::now", "env::var", "fs::", "net::", "thread::spawn"] {
            if !bans.contains(ban) {
                wrong(format!("is pure, and its clippy.toml does not ban {ban}"));
            }
        }
    }
    found
}

/// What is wrong with a tracked file.
fn file_rules(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut wrong = |what: String| found.push(format!("{path}: {what}"));
    let lines = text.lines().count();
    if path == "README.md" && lines > 100 {
        wrong(format!("has {lines} lines; one screen and the way on is the aim"));
    }
    let file = path.rsplit('/').next().unwrap_or_default().to_lowercase();
    let kinds = ["plan", "status", "todo", "summary", "handoff", "notes", "progress"];
    if file.ends_with(".md") && kinds.iter().any(|kind| file.starts_with(kind)) {
        wrong("plans and reports do not live in the tree".into());
    }
    if !path.ends_with(".rs") || path == "xtask/src/tidy.rs" {
        return found;
    }
    if lines > MAX_LINES {
        wrong(format!("has {lines} lines; does it hold one idea?"));
    }
    for stub in ["todo!(", "unimplemented!(", "#[ignore"] {
        if text.contains(stub) {
            wrong(format!("has `{stub}`"));
        }
    }
    let spawns = text.contains("process::Command") || text.contains("Command::new(");
    let tests = path.contains("/tests/")
        || text.split("#[cfg(test)]").next().is_some_and(|code| !code.contains("Command::new("));
    if spawns && !tests && !SPAWNS.iter().any(|start| path.starts_with(start)) {
        wrong("starts a process; only rbee-supervisor does".into());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, dependencies: &[(&str, &str)]) -> Member {
        Member {
            name: name.into(),
            folder: format!("crates/{name}"),
            manifest: "[package]\n\n[lints]\nworkspace = true\n\n[dependencies]\nserde.workspace = true\n".into(),
            clippy: std::fs::read_to_string(crate::root().join("contracts/rbee-wire/clippy.toml")).ok(),
            dependencies: dependencies.iter().map(|(name, kind)| ((*name).to_owned(), (*kind).to_owned())).collect(),
        }
    }

    #[test]
    fn planted_violations_of_a_crate_are_found() {
        assert_eq!(member_rules(&member("rbee-scheduler", &[("rbee-wire", "normal"), ("proptest", "dev")])), [""; 0]);
        let found = |member: &Member, want: &str| {
            let all = member_rules(member);
            assert!(all.iter().any(|line| line.contains(want)), "{want}: {all:?}");
        };
        found(&member("rbee-engine", &[("rbee-wire", "normal")]), "depends on rbee-wire");
        found(&member("rbee-hive", &[("queen-rbee", "normal")]), "depends on queen-rbee");
        found(&member("rbee-client", &[("axum", "normal")]), "depends on axum");
        found(&member("queen-rbee", &[("reqwest", "normal")]), "depends on reqwest");
        found(&member("rbee-hive", &[("candle-core", "normal")]), "depends on candle-core");
        found(&member("rbee-client", &[("rustyline", "normal")]), "depends on rustyline");
        found(&member("rbee-keeper", &[("rbee-testkit", "normal")]), "outside its tests");
        found(&member("rbee-new", &[]), "not in the table");
        found(&Member { clippy: None, ..member("rbee-wire", &[]) }, "does not ban Instant::now");
        found(&Member { folder: "crates/other".into(), ..member("rbee-wire", &[]) }, "folder of another name");
        let manifest = "[dependencies]\nserde = \"1\"\n".to_owned();
        found(&Member { manifest: manifest.clone(), ..member("rbee-wire", &[]) }, "opt in to the workspace's lints");
        found(&Member { manifest, ..member("rbee-wire", &[]) }, "does not take its version");
    }

    #[test]
    fn planted_violations_of_a_file_are_found() {
        assert!(file_rules("crates/x/src/lib.rs", "fn main() {}\n").is_empty());
        for (path, text, want) in [
            ("crates/x/src/lib.rs", "\n".repeat(901), "has 901 lines"),
            ("crates/x/src/lib.rs", "fn f() { todo!() }".into(), "todo!("),
            ("crates/x/src/lib.rs", "#[test]\n#[ignore]\nfn f() {}".into(), "#[ignore"),
            ("bin/x/src/lib.rs", "std::process::Command::new(\"x\")".into(), "starts a process"),
            ("docs/PLAN.md", String::new(), "do not live in the tree"),
            ("README.md", "\n".repeat(101), "101 lines"),
        ] {
            let found = file_rules(path, &text);
            assert!(found.iter().any(|line| line.contains(want)), "{want}: {found:?}");
        }
    }

    #[test]
    fn the_repository_itself_is_in_order() {
        run(&crate::root()).unwrap();
    }
}
