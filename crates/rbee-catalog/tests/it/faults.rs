//! Networks and servers that fail, and what a fetch makes of it: the right bytes, or a typed error in bounded time.

use std::time::{Duration, Instant};

use rbee_catalog::{Error, Store};
use rbee_testkit::hub::{Fault, HubRepo, REVISION, Server, TREE, noise};
use rbee_testkit::patience;
use rbee_wire::ErrorCode;

use crate::kit::{Place, all_below, fetch, model, refused, told};

const MIB: usize = 1 << 20;
const WEIGHTS: &str = "model.safetensors";

fn put(place: &Place, bytes: usize) {
    place.hub.put("org/name", "main", HubRepo::new().model(7, bytes));
}

/// Options under which a stall shows soon.
fn hasty(place: &Place) -> Store {
    let mut options = place.options();
    options.stall_timeout = Duration::from_secs(1);
    Store::new(options)
}

fn is_right(place: &Place, bytes: usize) {
    let local = place.store().local(&model("org/name")).unwrap().unwrap();
    assert_eq!(std::fs::read(local.path.join(WEIGHTS)).unwrap(), noise(7, bytes));
}

/// Nothing that could be loaded, and no blob of the weights.
fn nothing_is_visible(place: &Place) {
    assert_eq!(place.store().local(&model("org/name")).unwrap(), None);
    let all = all_below(&place.repo_folder());
    assert!(!all.iter().any(|path| path.starts_with("refs/") || path.ends_with(WEIGHTS)), "{all:?}");
}

#[test]
fn a_hundred_broken_connections_cost_no_byte_twice() {
    let place = Place::seeded(11);
    let bytes = 64 * MIB;
    put(&place, bytes);
    place.hub.fault("org/name", WEIGHTS, Fault::CutSomewhere { within: 1 << 20, times: 100 });
    fetch(&place.store(), "org/name").unwrap();
    is_right(&place, bytes);
    let count = place.hub.count(Server::Cdn);
    assert!(count.downloads > 100, "{}", count.downloads);
    let ratio = count.bytes as f64 / bytes as f64;
    eprintln!("{} downloads, {ratio:.4} of the bytes", count.downloads);
    assert!(ratio <= 1.05, "{ratio}");
}

#[test]
fn a_server_without_ranges_is_read_over_one_connection() {
    let place = Place::new();
    put(&place, 20 * MIB);
    place.hub.fault("org/name", WEIGHTS, Fault::IgnoreRange);
    fetch(&place.store(), "org/name").unwrap();
    is_right(&place, 20 * MIB);
    // One that showed it, one for the file.
    assert_eq!(place.hub.count(Server::Cdn).downloads, 2);
}

#[test]
fn a_server_without_ranges_that_breaks_off_is_read_from_the_beginning() {
    let place = Place::new();
    put(&place, 20 * MIB);
    place.hub.fault("org/name", WEIGHTS, Fault::IgnoreRange);
    place.hub.fault("org/name", WEIGHTS, Fault::Cut { after: 15 << 20, times: 3 });
    fetch(&place.store(), "org/name").unwrap();
    is_right(&place, 20 * MIB);
}

#[test]
fn signed_addresses_that_expire_are_asked_for_again() {
    let place = Place::new();
    put(&place, 70 * MIB);
    place.hub.fault("org/name", WEIGHTS, Fault::Expire { uses: 2 });
    fetch(&place.store(), "org/name").unwrap();
    is_right(&place, 70 * MIB);
}

#[test]
fn wrong_bytes_of_the_right_number_are_fetched_once_more_and_never_visible() {
    let place = Place::new();
    put(&place, MIB);
    place.hub.fault("org/name", WEIGHTS, Fault::WrongBytes { times: u32::MAX });
    let error = refused(&place.store(), "org/name");
    assert!(matches!(&*error, Error::Checksum { .. }), "{error:?}");
    assert_eq!(error.code(), ErrorCode::ChecksumMismatch);
    nothing_is_visible(&place);
    assert_eq!(place.hub.count(Server::Cdn).downloads, 2);
    place.hub.heal();
    place.hub.fault("org/name", WEIGHTS, Fault::WrongBytes { times: 1 });
    fetch(&place.store(), "org/name").unwrap();
    is_right(&place, MIB);
}

#[test]
fn wrong_bytes_in_a_part_that_is_gone_on_with_are_found() {
    let place = Place::new();
    put(&place, 8 * MIB);
    place.hub.fault("org/name", WEIGHTS, Fault::Stall { after: 3000 });
    refused(&hasty(&place), "org/name");
    place.hub.heal();
    let blobs = place.repo_folder().join("blobs");
    let part = all_below(&blobs).into_iter().find(|path| path.ends_with(".rbee-part")).unwrap();
    // The disk lost what it said it had.
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::OpenOptions::new().write(true).open(blobs.join(part)).unwrap(),
        &[0; 100],
        1000,
    )
    .unwrap();
    fetch(&place.store(), "org/name").unwrap();
    is_right(&place, 8 * MIB);
}

#[test]
fn bodies_that_end_early_in_order_are_gone_on_with_or_given_up() {
    let place = Place::new();
    put(&place, 4 * MIB);
    place.hub.fault("org/name", WEIGHTS, Fault::Short);
    // Half of what is left each time, until it is next to nothing.
    let outcome = fetch(&place.store(), "org/name");
    match outcome {
        Ok(_) => is_right(&place, 4 * MIB),
        Err(error) => assert!(matches!(&*error, Error::Short { .. }), "{error:?}"),
    }
    assert!(place.hub.count(Server::Cdn).downloads < 40);
}

#[test]
fn silence_and_a_trickle_are_stalls() {
    for fault in [Fault::Stall { after: 0 }, Fault::Stall { after: 3000 }, Fault::Drip] {
        let place = Place::new();
        put(&place, 4 * MIB);
        place.hub.fault("org/name", WEIGHTS, fault.clone());
        let began = Instant::now();
        let error = refused(&hasty(&place), "org/name");
        assert_eq!(error.code(), ErrorCode::DownloadStalled, "{fault:?}: {error:?}");
        assert!(began.elapsed() < patience(Duration::from_secs(2)), "{fault:?}: {:?}", began.elapsed());
        nothing_is_visible(&place);
    }
}

#[test]
fn a_busy_server_is_given_the_time_that_it_asks_for() {
    let place = Place::new();
    put(&place, MIB);
    let busy = Fault::Status { status: 429, retry_after: Some(1), times: 1 };
    place.hub.fault("org/name", REVISION, busy.clone());
    place.hub.fault("org/name", WEIGHTS, busy);
    let began = Instant::now();
    fetch(&place.store(), "org/name").unwrap();
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
}

#[test]
fn errors_are_tried_again_five_times_and_refusals_never() {
    let place = Place::new();
    put(&place, MIB);
    let fault = |status, times| Fault::Status { status, retry_after: None, times };
    for path in [REVISION, TREE, "config.json"] {
        place.hub.heal();
        place.hub.fault("org/name", path, fault(503, 4));
        fetch(&place.store(), "org/name").unwrap();
        std::fs::remove_dir_all(place.cache()).unwrap();
        for (status, tries) in [(500, 5), (418, 1)] {
            place.hub.heal();
            place.hub.forget();
            place.hub.fault("org/name", path, fault(status, u32::MAX));
            let error = refused(&place.store(), "org/name");
            assert!(matches!(&*error, Error::Status { status: s, .. } if *s == status), "{error:?}");
            let asked = place.hub.count(Server::Hub).paths;
            let what = path.trim_start_matches('@');
            assert_eq!(asked.iter().filter(|asked| asked.contains(what)).count(), tries, "{status} {asked:?}");
        }
        let _ = std::fs::remove_dir_all(place.cache());
    }
}

#[test]
fn a_hub_that_is_not_there_is_named() {
    let place = Place::new();
    let mut options = place.options();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    options.endpoint = format!("http://127.0.0.1:{port}").parse().unwrap();
    let error = refused(&Store::new(options), "org/name");
    assert_eq!(error.code(), ErrorCode::ModelNotFound);
    assert!(
        told(&error).contains(&format!("127.0.0.1:{port}")) && told(&error).contains("refused"),
        "{}",
        told(&error)
    );
}

#[test]
fn answers_larger_than_any_honest_one_are_refused() {
    for (path, fault) in [
        (REVISION, Fault::GzipBomb),
        (TREE, Fault::GzipBomb),
        (TREE, Fault::ManyFiles(1_000_000)),
        (TREE, Fault::Body("[".repeat(1_000_000))),
        (REVISION, Fault::Body("{\"sha\":\"../../../../etc\"}".into())),
        (REVISION, Fault::Body("null".into())),
        (TREE, Fault::Body("{}".into())),
        (TREE, Fault::Body(r#"[{"type":"file","path":"config.json","size":1,"oid":"../../x"}]"#.into())),
        (TREE, Fault::Body(r#"[{"type":"file","path":"config.json","size":-1,"oid":"00"}]"#.into())),
    ] {
        let place = Place::new();
        put(&place, 1000);
        place.hub.page(10_000_000);
        place.hub.fault("org/name", path, fault.clone());
        let error = refused(&place.store(), "org/name");
        assert!(matches!(&*error, Error::BadAnswer { .. }), "{error:?}");
        assert!(!place.cache().join("models--org--name/snapshots").exists());
    }
    // The same in pages of an honest size.
    let place = Place::new();
    put(&place, 1000);
    place.hub.page(1000);
    place.hub.fault("org/name", TREE, Fault::ManyFiles(1_000_000));
    assert!(matches!(&*refused(&place.store(), "org/name"), Error::BadAnswer { .. }));
}
