//! A word that stands in the prompts of tests and must stand in no log.

use std::fs;
use std::path::Path;

/// Put it into prompts; every [`crate::Cluster`] looks for it at its end.
pub const CANARY: &str = "quetzalcoatlus";

/// Lines of files below a folder that have the canary.
pub fn sightings(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(sightings(&path));
        // Tests leave pipes, and links to devices, that never end.
        } else if entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(bytes) = fs::read(&path)
        {
            let text = String::from_utf8_lossy(&bytes).to_lowercase();
            found.extend(text.lines().filter(|line| line.contains(CANARY)).map(|line| format!("{path:?}: {line}")));
        }
    }
    found
}
