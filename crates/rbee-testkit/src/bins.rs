//! Where the real programs are.

use std::fs;
use std::path::{Path, PathBuf};

/// The four programs.
pub const PROGRAMS: [&str; 4] = ["rbee", "queen-rbee", "rbee-hive", "llm-worker-rbee"];

/// The folder of the programs under test: `RBEE_TEST_BINS`, else the one above the test program's.
///
/// # Panics
/// When a program is not there.
pub fn built() -> PathBuf {
    let folder = std::env::var_os("RBEE_TEST_BINS").map_or_else(
        || {
            let test = std::env::current_exe().expect("a program knows its own path");
            let beside = test.parent().expect("a program lies in a folder");
            let deps = beside.file_name().is_some_and(|name| name == "deps" || name == "examples");
            if deps { beside.parent().expect("`deps` lies in a folder").to_owned() } else { beside.to_owned() }
        },
        PathBuf::from,
    );
    for program in PROGRAMS {
        assert!(
            folder.join(program).is_file(),
            "{} is not there: build the programs first with `cargo build --release --workspace --bins`",
            folder.join(program).display()
        );
    }
    folder
}

/// A copy of the programs in a folder of its own: another build of them, since a build is told by size and time.
///
/// # Panics
/// When they cannot be copied.
pub fn another_build(into: &Path) -> PathBuf {
    fs::create_dir_all(into).expect("a folder in the test's own home");
    for program in PROGRAMS {
        fs::copy(built().join(program), into.join(program)).expect("the programs can be copied");
    }
    into.to_owned()
}
