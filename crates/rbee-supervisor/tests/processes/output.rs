//! What workers write: kept within bounds, and never able to command a terminal.

use std::os::unix::fs::MetadataExt;

use crate::rig::{Rig, shell};

/// The tail that is reported of a worker that wrote this and failed.
async fn tail(script: &str) -> String {
    let rig = Rig::new();
    let worker = rig.start(shell(&format!("{script}; exit 1"))).await.worker_id;
    let tail = rig.exit(&worker).await.stderr_tail;
    assert!(tail.len() <= 4096, "{} bytes", tail.len());
    assert!(tail.chars().all(|c| !c.is_control() || c == '\n' || c == '\t'), "{tail:?}");
    for max in [0, 1, 100, 64 << 10] {
        let log = rig.supervisor.log_tail(&worker, max).unwrap().unwrap();
        assert!(log.chars().all(|c| !c.is_control() || c == '\n' || c == '\t'), "{log:?}");
    }
    tail
}

#[tokio::test]
async fn the_reported_end_of_the_output_is_short_and_harmless() {
    let said = tail(r"printf '\033[31mred\007 \302\233 \377\000\tend\r\n' >&2").await;
    let line = "\\u{1b}[31mred\\u{7} \\u{9b} \u{fffd}\\u{0}\tend\\r\n";
    assert_eq!(said, line.repeat(5));
    // Much of it, the last words last, though the pipe was full when the worker ended.
    let much = tail("yes many words | head -c 55000 >&2; echo the last word >&2").await;
    assert!(much.ends_with("many words\nthe last word\n"), "{much}");
    // Escaped, each of these bytes is several.
    assert!(tail("head -c 8192 /dev/zero >&2").await.ends_with("\\u{0}\\u{0}"));
    assert!(tail("head -c 8192 /dev/zero | tr '\\0' '\\377' >&2").await.ends_with('\u{fffd}'));
}

#[tokio::test]
async fn a_log_is_bounded_on_disk_and_private() {
    let rig = Rig::new();
    let script = "yes a line of many | head -c 3000000; echo the last line; exec sleep 30";
    let worker = rig.start(shell(script)).await.worker_id;
    rig.until_logged(&worker, "the last line").await;
    let logs = rig.folder.path().join("logs");
    let files: Vec<_> = std::fs::read_dir(logs).unwrap().map(|entry| entry.unwrap().metadata().unwrap()).collect();
    assert_eq!(files.len(), 2, "the current one and the one before");
    for file in files {
        assert_eq!(file.mode() & 0o777, 0o600);
        assert!(file.len() <= (1 << 20) + 8192, "{} bytes", file.len());
    }
    rig.supervisor.kill(&worker);
    rig.exit(&worker).await;
}
