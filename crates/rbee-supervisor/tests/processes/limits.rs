//! A machine without room: typed errors, nothing half made, and work again when there is room.

use std::fs::File;

use rbee_wire::ErrorCode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::rig::{Rig, alone, block_on, descriptors, own_children, shell, until};

/// Lowers a limit of this process; gives the one it had.
fn lower(resource: Resource, limit: u64) -> Rlimit {
    let before = getrlimit(resource);
    setrlimit(resource, Rlimit { current: Some(limit), ..before }).unwrap();
    before
}

/// Tries to start a worker; whether there was room. Without room nothing is left of the try.
async fn there_is_room(rig: &Rig, held: &mut Vec<File>) -> bool {
    let spawned = rig.supervisor.spawn(shell("exec sleep 30")).await;
    // What looks needs descriptors too.
    held.clear();
    match spawned {
        Ok(process) => {
            rig.supervisor.kill(&process.worker_id);
            rig.exit(&process.worker_id).await;
            true
        }
        Err(error) => {
            assert_eq!(error.to_body().code, ErrorCode::HiveExhausted, "{error:?}");
            assert_eq!(rig.supervisor.list(), []);
            assert_eq!(own_children(), [0u32; 0]);
            false
        }
    }
}

#[test]
fn without_descriptors_a_spawn_is_refused_and_leaves_nothing() {
    alone(&["hive without descriptors"]);
}

/// Leaves one more descriptor free at each try, so that each step of a spawn is once the one that fails.
pub fn hive_without_descriptors() {
    block_on(async {
        // What is made once is made by the first.
        let warm = Rig::new();
        let mut held = Vec::new();
        assert!(there_is_room(&warm, &mut held).await);
        let open = || descriptors(std::process::id()).len();
        let before = open();
        lower(Resource::Nofile, 64);
        let mut refused = 0;
        for free in 0.. {
            let rig = Rig::new();
            while let Ok(file) = File::open("/dev/null") {
                held.push(file);
            }
            held.truncate(held.len() - free);
            if there_is_room(&rig, &mut held).await {
                break;
            }
            refused += 1;
            assert!(there_is_room(&rig, &mut held).await, "room again, and still refused");
            drop(rig);
            // The first may still have been closing when it was counted.
            until("all closed again", || open() <= before).await;
        }
        // The control pipe alone has two ends, and the output four.
        assert!(refused >= 5, "only {refused} steps could fail");
    });
}

#[test]
fn without_room_for_its_own_thread_a_supervisor_recovers() {
    alone(&["hive without room for a thread"]);
}

pub fn hive_without_room_for_a_thread() {
    block_on(async {
        let rig = Rig::new();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
        let kib: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
        // Enough for what is allocated on the way, too little for a thread's stack.
        let before = lower(Resource::As, (kib << 10) + (1 << 20));
        assert!(!there_is_room(&rig, &mut Vec::new()).await);
        setrlimit(Resource::As, before).unwrap();
        assert!(there_is_room(&rig, &mut Vec::new()).await);
    });
}
