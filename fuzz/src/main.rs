//! libFuzzer around one target: `RBEE_FUZZ_TARGET` names it, or is `list`. `cargo xtask fuzz` builds and runs it.

#![no_main]

use std::backtrace::Backtrace;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{PanicHookInfo, catch_unwind};
use std::process::{abort, exit};
use std::sync::{Mutex, OnceLock};

use libfuzzer_sys::fuzz_target;
use rbee_fuzz::{TARGETS, Target, target};

fuzz_target!(init: begin(), |bytes: &[u8]| -> () { one(bytes) });

struct Harness {
    target: &'static Target,
    /// Where each input is written before it runs: a stack that overflows leaves libFuzzer no room to save it.
    last: Option<File>,
}

static HARNESS: OnceLock<Harness> = OnceLock::new();
static PANIC: Mutex<Option<(String, Backtrace)>> = Mutex::new(None);

fn begin() {
    let wanted = std::env::var("RBEE_FUZZ_TARGET").unwrap_or_default();
    let Some(target) = target(&wanted) else {
        for target in TARGETS {
            println!("{} {}", target.name, target.max_len);
        }
        exit(if wanted == "list" { 0 } else { 2 });
    };
    // Readers may catch panics of the crates below them: only one that leaves the target is a bug. libfuzzer-sys would end
    // at any.
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        if let Ok(mut panic) = PANIC.lock() {
            *panic = Some((info.to_string(), Backtrace::force_capture()));
        }
    }));
    let last =
        std::env::var_os("RBEE_FUZZ_LAST").map(|path| File::create(path).expect("RBEE_FUZZ_LAST can be written"));
    let _ = HARNESS.set(Harness { target, last });
}

fn one(bytes: &[u8]) {
    let Harness { target, last } = HARNESS.get().expect("libFuzzer begins before it runs");
    if let Some(file) = last {
        let kept = file.set_len(0).and_then(|()| file.write_all_at(bytes, 0));
        kept.expect("RBEE_FUZZ_LAST can be written");
    }
    if catch_unwind(|| (target.run)(bytes)).is_err() {
        if let Ok(Some((what, at))) = PANIC.lock().as_deref() {
            eprintln!("{at}\n{what}");
        }
        abort();
    }
}
