//! What this program is when it is started again by one of its own tests.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::Duration;

use rbee_supervisor::control::WorkerEnd;
use rbee_supervisor::daemon;
use rbee_wire::worker::{ControlDown, ControlUp, WorkerMemory};
use rbee_wire::{ErrorBody, ErrorCode};

use crate::rig::{LONGEST_LIFE, own_program, role_args};
use crate::{leftovers, limits};

/// Does nothing unless this process was started to play a role.
#[test]
fn play() {
    let mut args = std::env::args().skip_while(|arg| arg != "--").skip(1);
    let Some(role) = args.next() else { return };
    let args: Vec<String> = args.collect();
    match role.as_str() {
        "worker" => worker(),
        "worker without a death signal" => {
            // The signal is set for a thread, and of those only the one that executes goes on.
            rustix::process::set_parent_process_death_signal(None).unwrap();
            let error = std::process::Command::new(own_program()).args(role_args(&["worker"])).exec();
            unreachable!("{error}");
        }
        "say" => say(&args[0], &args[1]),
        "daemon" => a_daemon(&args[0], Path::new(&args[1])),
        "hive of many lives" => leftovers::hive_of_many_lives(),
        "hive whose caller goes away" => leftovers::hive_whose_caller_goes_away(),
        "hive that dies" => leftovers::hive_that_dies(Path::new(&args[0])),
        "hive without descriptors" => limits::hive_without_descriptors(),
        "hive without room for a thread" => limits::hive_without_room_for_a_thread(),
        other => panic!("nobody plays {other}"),
    }
}

/// A worker as the protocol wants it: listens, is ready at once, beats, drains when asked, ends with its pipe.
fn worker() {
    let mut end = WorkerEnd::take_inherited().unwrap().unwrap();
    let charge = end.charge().unwrap();
    end.send(&ControlUp::Listening { port: 1, nonce: charge.nonce });
    end.send(&ControlUp::Ready { memory: WorkerMemory::default() });
    end.listen(
        |line| {
            if let ControlDown::Drain { .. } = line {
                eprintln!("drained");
                std::process::exit(0);
            }
        },
        || std::process::exit(0),
    );
    for steps in 0..600 {
        end.send(&ControlUp::Beat { steps, working: false });
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Says one line up the control pipe.
fn say(line: &str, then: &str) {
    let mut end = WorkerEnd::take_inherited().unwrap().unwrap();
    end.charge().unwrap();
    end.send(&serde_json::from_str(line).unwrap());
    match then {
        "and exit" => std::process::exit(1),
        "and stay" => std::thread::sleep(LONGEST_LIFE),
        other => unreachable!("{other}"),
    }
}

fn a_daemon(kind: &str, folder: &Path) {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("pids")).unwrap();
    writeln!(file, "{}", std::process::id()).unwrap();
    drop(file);
    let refusal = || ErrorBody::new(ErrorCode::DeviceUnavailable, "somebody else listens there");
    match kind {
        "listens" => daemon::announce_ready("http://127.0.0.1:1"),
        "listens and fails later" => {
            let number: i32 = std::env::var("RBEE_READY_FD").unwrap().parse().unwrap();
            daemon::announce_ready("http://127.0.0.1:1");
            // One of them gets the number that the readiness pipe had.
            let later = || std::fs::File::create(folder.join("later")).unwrap();
            let mut files = vec![later()];
            while files.iter().all(|file| file.as_raw_fd() != number) {
                files.push(later());
            }
            daemon::announce_failure(&refusal());
            std::fs::write(folder.join("failed"), "").unwrap();
        }
        "refuses" => {
            let _ = daemon::exit_code(Err(refusal()));
            std::process::exit(4);
        }
        "dies" => {
            eprintln!("no luck today");
            std::process::exit(3);
        }
        "hangs" => {}
        other => unreachable!("there is no daemon that {other}"),
    }
    // Nobody is left to end it if its test has failed.
    std::thread::sleep(LONGEST_LIFE);
}
