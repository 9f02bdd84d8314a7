//! A hub, or somebody between it and us, that wants to reach what is not its own.

use rbee_catalog::{Error, Options, Store};
use rbee_testkit::hub::{Fault, HubRepo, Server, TREE};
use rbee_wire::ErrorCode;

use crate::kit::{Place, all_below, fetch, model, refused, told};

const WEIGHTS: &str = "model.safetensors";

/// Nothing outside the cache's own folder, and nothing in it that is not of the repository.
fn stays_inside(place: &Place) {
    let top: Vec<String> =
        all_below(place.folder.path()).into_iter().filter(|path| path.split('/').count() <= 2).collect();
    for path in top {
        assert!(["hub", "hub/.locks", "hub/models--org--name"].contains(&path.as_str()), "{path}");
    }
}

#[test]
fn headers_of_a_download_name_nothing() {
    let repo = || HubRepo::new().model(1, 1000);
    for text in ["../../../../../escaped", "/tmp/rbee-escaped", "..", "a/b", ""] {
        let place = Place::new();
        let commit = place.hub.put("org/name", "main", repo());
        for path in ["config.json", WEIGHTS] {
            place.hub.fault("org/name", path, Fault::ETag(text.into()));
            place.hub.fault("org/name", path, Fault::CommitHeader(text.into()));
        }
        let local = fetch(&place.store(), "org/name").unwrap();
        assert!(local.path.ends_with(&commit));
        stays_inside(&place);
    }
}

#[test]
fn a_listing_with_a_name_that_leads_elsewhere_is_refused() {
    for name in ["../x", "a/../../x", "/etc/x", "a//x", "a\\\\x", "a\\u0000x", "a\\nx.json", "\\u001b[2Jx", ".", ""] {
        let place = Place::new();
        place.hub.put("org/name", "main", HubRepo::new().model(1, 1000));
        let oid = "0".repeat(40);
        let body = format!(
            r#"[{{"type":"file","path":"config.json","size":1,"oid":"{oid}"}},
                {{"type":"file","path":"{name}","size":1,"oid":"{oid}"}}]"#
        );
        place.hub.fault("org/name", TREE, Fault::Body(body));
        let error = refused(&place.store(), "org/name");
        assert!(matches!(&*error, Error::BadAnswer { .. }), "{name}: {error:?}");
        assert!(!told(&error).chars().any(char::is_control), "{name}");
        assert_eq!(place.hub.count(Server::Cdn).requests, 0);
        stays_inside(&place);
    }
}

#[test]
fn an_index_that_names_files_elsewhere_is_refused() {
    for file in ["../../../../etc/passwd", "/etc/passwd", "sub/x.safetensors", "missing.safetensors"] {
        let place = Place::new();
        let index = format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#);
        let repo = HubRepo::new().file("config.json", "{}").file("model.safetensors.index.json", index);
        place.hub.put("org/name", "main", repo);
        let error = refused(&place.store(), "org/name");
        assert!(matches!(&*error, Error::BadAnswer { .. }), "{file}: {error:?}");
        stays_inside(&place);
    }
}

#[test]
fn redirects_lead_only_where_they_may() {
    let victim = rbee_testkit::hub::Hub::start();
    let port = victim.url.rsplit(':').next().unwrap().to_owned();
    for target in [
        victim.url.clone(),
        format!("http://localhost:{port}/x"),
        format!("https://localhost:{port}/x"),
        format!("http://2130706433:{port}/x"),
        format!("https://0x7f000001:{port}/x"),
        format!("https://[::ffff:127.0.0.1]:{port}/x"),
        "http://169.254.169.254/latest/meta-data".to_owned(),
        "https://169.254.169.254/latest/meta-data".to_owned(),
        "https://10.0.0.1/x".to_owned(),
        "http://example.com/x".to_owned(),
        "file:///etc/passwd".to_owned(),
        "ftp://example.com/x".to_owned(),
        "//169.254.169.254/x".to_owned(),
    ] {
        for path in ["config.json", WEIGHTS] {
            let place = Place::new();
            place.hub.put("org/name", "main", HubRepo::new().model(1, 1000));
            place.hub.fault("org/name", path, Fault::Redirect(target.clone()));
            let error = refused(&place.store(), "org/name");
            assert!(matches!(&*error, Error::RefusedTarget { .. }), "{target}: {error:?}");
            assert_eq!(error.code(), ErrorCode::DownloadFailed);
            assert_eq!(place.store().local(&model("org/name")).unwrap(), None);
        }
    }
    assert_eq!(victim.requests(), 0);
}

#[test]
fn the_large_files_server_of_a_private_network_has_to_be_listed() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 1000));
    let options = Options { trusted_origins: Vec::new(), ..place.options() };
    let error = refused(&Store::new(options), "org/name");
    assert!(matches!(&*error, Error::RefusedTarget { .. }), "{error:?}");
    assert!(!told(&error).contains("Signature"), "{}", told(&error));
    assert_eq!(place.hub.count(Server::Cdn).requests, 0);
}

#[test]
fn a_redirect_loop_ends_after_five_hops() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 1000));
    place.hub.fault("org/name", "config.json", Fault::RedirectLoop);
    let error = refused(&place.store(), "org/name");
    assert!(matches!(&*error, Error::RefusedTarget { .. }), "{error:?}");
    let asked = place.hub.count(Server::Hub).paths;
    assert_eq!(asked.iter().filter(|path| path.ends_with("config.json")).count(), 6);
}

#[test]
fn a_proxy_takes_what_is_not_loopback_and_nothing_of_loopback() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 1000));
    // It answers no request of a proxy's kind, and counts those that it gets.
    let proxy = rbee_testkit::hub::Hub::start();
    let mut options = place.options();
    options.proxies.http = Some(proxy.url.parse().unwrap());
    options.proxies.https = Some(proxy.url.parse().unwrap());
    fetch(&Store::new(options.clone()), "org/name").unwrap();
    assert_eq!(proxy.requests(), 0);
    options.endpoint = "http://hub.invalid".parse().unwrap();
    refused(&Store::new(options.clone()), "org/other");
    let asked = proxy.requests();
    assert!(asked > 0);
    options.proxies.none_for = Some("hub.invalid".into());
    refused(&Store::new(options), "org/other");
    assert_eq!(proxy.requests(), asked);
}
