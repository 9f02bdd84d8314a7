//! What a fetch leaves, and how often it asks.

use std::path::Path;
use std::time::Duration;

use rbee_catalog::{CancellationToken, Error, Offline, Stage, Token};
use rbee_testkit::hub::{Access, HubRepo, Server, noise};
use rbee_testkit::{patience, wait_for};
use rbee_wire::ErrorCode;

use crate::kit::{Place, all_below, fetch, model, refused, runtime, told};

const MIB: usize = 1 << 20;

#[test]
fn a_model_lies_in_the_cache_as_the_hubs_tools_would_have_put_it() {
    let place = Place::new();
    let commit =
        place.hub.put("org/name", "main", HubRepo::new().model(1, 3 * MIB).file("1_Pooling/config.json", "{}"));
    let store = place.store();
    assert_eq!(store.local(&model("org/name")).unwrap(), None);
    let local = fetch(&store, "org/name").unwrap();
    assert_eq!(local.commit.as_ref().unwrap().as_str(), commit);
    assert_eq!(local.path, place.repo_folder().join("snapshots").join(&commit));
    let names: Vec<&str> = local.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(std::fs::read(local.path.join("model.safetensors")).unwrap(), noise(1, 3 * MIB));
    let link = |path: &str| std::fs::read_link(local.path.join(path)).unwrap();
    assert!(link("config.json").starts_with("../../blobs"));
    assert!(link("1_Pooling/config.json").starts_with("../../../blobs"));
    // `printf '{"model_type":"llama"}' | git hash-object --stdin`.
    assert_eq!(link("config.json").file_name().unwrap(), "0972e95c1405cc1507c19dcbe784f7a36c930907");
    assert_eq!(std::fs::read_to_string(place.repo_folder().join("refs/main")).unwrap(), commit);
    assert_eq!(store.local(&model("org/name")).unwrap(), Some(local));
    assert!(all_below(&place.repo_folder()).iter().all(|path| !path.contains("rbee-part") && !path.contains("new-")));
}

/// A pooling stands where `modules.json` says, whose number is its place; weights of other formats stay where they are.
#[test]
fn an_embedding_model_comes_with_what_it_declares() {
    let place = Place::new();
    let repo = HubRepo::new()
        .model(1, 1000)
        .file("modules.json", "[]")
        .file("sentence_bert_config.json", "{}")
        .file("config_sentence_transformers.json", "{}")
        .file("3_Pooling/config.json", "{}")
        .file("2_Normalize/config.json", "{}")
        .lfs("onnx/model.onnx", noise(2, 1000))
        .lfs("pytorch_model.bin", noise(3, 1000));
    place.hub.put("org/name", "main", repo);
    let local = fetch(&place.store(), "org/name").unwrap();
    let names: Vec<&str> = local.files.iter().map(|file| file.path.as_str()).collect();
    let settings = ["config_sentence_transformers.json", "model.safetensors", "modules.json"];
    let all =
        [&["3_Pooling/config.json", "config.json"], &settings[..], &["sentence_bert_config.json", "tokenizer.json"]];
    assert_eq!(names, all.concat());
    assert_eq!(place.store().local(&model("org/name")).unwrap(), Some(local));
}

#[test]
fn what_is_here_is_found_by_every_name_of_it_without_a_request() {
    let place = Place::new();
    let commit = place.hub.put("org/name", "v1", HubRepo::new().model(1, 1000));
    let store = place.store();
    let local = fetch(&store, "org/name@v1").unwrap();
    let asked = place.hub.requests();
    for name in ["org/name@v1".to_owned(), format!("org/name@{commit}"), format!("org/name@{}", &commit[..7])] {
        assert_eq!(fetch(&store, &name).unwrap().path, local.path);
    }
    assert_eq!(place.hub.requests(), asked);
    // A branch that was not asked for is not here.
    assert_eq!(store.local(&model("org/name")).unwrap(), None);
}

#[test]
fn a_sharded_model_has_the_shards_of_its_index_and_no_others() {
    let place = Place::new();
    let index = r#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    let repo = HubRepo::new()
        .file("config.json", "{}")
        .file("tokenizer.json", "{}")
        .file("model.safetensors.index.json", index)
        .lfs("model-00001-of-00002.safetensors", noise(1, 2 * MIB))
        .lfs("model-00002-of-00002.safetensors", noise(2, MIB))
        .lfs("consolidated.safetensors", noise(3, MIB));
    place.hub.put("org/name", "main", repo);
    place.hub.page(2);
    let store = place.store();
    let local = fetch(&store, "org/name").unwrap();
    assert_eq!(local.files.len(), 5, "{local:?}");
    assert!(!local.path.join("consolidated.safetensors").exists());
    // Without one shard it is not offered, and fetching brings that one alone.
    std::fs::remove_file(local.path.join("model-00002-of-00002.safetensors").canonicalize().unwrap()).unwrap();
    assert_eq!(store.local(&model("org/name")).unwrap(), None);
    place.hub.forget();
    assert_eq!(fetch(&store, "org/name").unwrap(), local);
    assert_eq!(place.hub.bytes(), MIB as u64);
}

#[test]
fn a_quantization_brings_its_file_and_is_ambiguous_only_where_it_is() {
    let place = Place::new();
    let repo = HubRepo::new()
        .lfs("m-Q4_K_M.gguf", noise(1, 1000))
        .lfs("m-Q8_0-00001-of-00002.gguf", noise(2, 1000))
        .lfs("m-Q8_0-00002-of-00002.gguf", noise(3, 1000));
    place.hub.put("org/name", "main", repo);
    let store = place.store();
    let error = refused(&store, "org/name");
    assert!(matches!(&*error, Error::Ambiguous { candidates, .. } if candidates == &["Q4_K_M", "Q8_0"]), "{error:?}");
    let error = refused(&store, "org/name:Q5_0");
    assert!(matches!(&*error, Error::NoSuchFile { candidates, .. } if candidates.len() == 2), "{error:?}");
    assert_eq!(place.hub.count(Server::Cdn).downloads, 0);
    let local = fetch(&store, "org/name:q4_k_m").unwrap();
    assert_eq!(local.model, model("org/name:m-Q4_K_M.gguf"));
    assert_eq!(local.path.file_name().unwrap(), "m-Q4_K_M.gguf");
    assert_eq!(store.local(&model("org/name:Q8_0")).unwrap(), None);
    let local = fetch(&store, "org/name:Q8_0").unwrap();
    assert_eq!((local.files.len(), local.bytes), (2, 2000));
    assert_eq!(place.hub.bytes(), 3000);
}

#[test]
fn a_model_whose_file_changed_its_size_is_not_offered_and_is_fetched_again() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, MIB));
    let store = place.store();
    let local = fetch(&store, "org/name").unwrap();
    let blob = local.path.join("model.safetensors").canonicalize().unwrap();
    std::fs::OpenOptions::new().write(true).open(&blob).unwrap().set_len(1000).unwrap();
    assert_eq!(store.local(&model("org/name")).unwrap(), None);
    assert_eq!(fetch(&store, "org/name").unwrap(), local);
    assert_eq!(std::fs::read(blob).unwrap(), noise(1, MIB));
}

#[test]
fn offline_makes_no_request() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 1000));
    let mut options = place.options();
    options.offline = Offline::Yes;
    let store = rbee_catalog::Store::new(options);
    let error = refused(&store, "org/name");
    assert!(matches!(*error, Error::Offline { .. }) && told(&error).contains("HF_HUB_OFFLINE"), "{error:?}");
    assert_eq!(place.hub.requests(), 0);
}

#[test]
fn gated_private_and_missing_are_told_apart() {
    let place = Place::new();
    let repo = |access| HubRepo::new().model(1, 1000).access(access);
    place.hub.put("org/gated", "main", repo(Access::Gated("good".into())));
    place.hub.put("org/private", "main", repo(Access::Private("good".into())));
    place.hub.put("org/public", "main", repo(Access::Public));
    let store = |token: Option<&str>| {
        let mut options = place.options();
        options.token = token.and_then(Token::new);
        rbee_catalog::Store::new(options)
    };
    for (token, name, want) in [
        (None, "org/gated", "accept the terms at "),
        (Some("bad"), "org/gated", "with the account of this token"),
        (None, "org/private", "needs a token: set HF_TOKEN"),
        (Some("bad"), "org/private", "valid token"),
        (None, "org/missing", "needs a token: set HF_TOKEN"),
        (Some("bad"), "org/missing", "check the name"),
        (None, "org/public@nope", "leave out @REVISION"),
    ] {
        let error = refused(&store(token), name);
        assert_eq!(error.code(), ErrorCode::ModelNotFound, "{error:?}");
        let hint = error.hint().unwrap_or_default();
        assert!(hint.contains(want), "{token:?} {name}: {} / {hint}", told(&error));
    }
    for name in ["org/gated", "org/private"] {
        fetch(&store(Some("good")), name).unwrap();
    }
}

#[test]
fn the_token_is_shown_to_the_hub_and_to_nobody_else() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 40 * MIB).access(Access::Private("canary".into())));
    let mut options = place.options();
    options.token = Token::new("canary");
    fetch(&rbee_catalog::Store::new(options), "org/name").unwrap();
    let shown = |server| place.hub.count(server).authorizations;
    assert!(shown(Server::Hub).iter().all(|shown| shown.as_deref() == Some("Bearer canary")));
    let cdn = shown(Server::Cdn);
    assert!(cdn.len() > 2 && cdn.iter().all(Option::is_none), "{cdn:?}");
    for path in all_below(place.folder.path()) {
        let bytes = std::fs::read(place.folder.path().join(path)).unwrap_or_default();
        assert!(!bytes.windows(6).any(|window| window == b"canary"));
    }
}

#[test]
fn many_askers_share_one_transfer_and_its_progress() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 8 * MIB));
    place.hub.limit(16 << 20);
    let store = place.store();
    runtime().block_on(async {
        let asked: Vec<_> = (0..20).map(|_| store.fetch(&model("org/name"))).collect();
        let mut progress = asked[0].progress();
        let all: Vec<_> = asked
            .into_iter()
            .enumerate()
            .map(|(n, fetch)| {
                tokio::spawn(async move {
                    // Half of them lose patience.
                    if n % 2 == 1 {
                        return tokio::time::timeout(Duration::from_millis(150), fetch.finished()).await.ok();
                    }
                    Some(fetch.finished().await)
                })
            })
            .collect();
        let mut seen = Vec::new();
        while progress.changed().await.is_ok() {
            seen.push(progress.borrow_and_update().clone());
        }
        for (n, task) in all.into_iter().enumerate() {
            let outcome = task.await.unwrap();
            assert_eq!(outcome.is_some_and(|outcome| outcome.is_ok()), n % 2 == 0);
        }
        assert!(seen.windows(2).all(|pair| pair[0].done <= pair[1].done), "{seen:#?}");
        assert!(
            seen.iter().any(|p| p.stage == Stage::Downloading && p.bytes_per_s > 0 && p.eta.is_some()),
            "{seen:#?}"
        );
        assert_eq!(seen.last().unwrap().stage, Stage::Done);
    });
    assert_eq!(place.hub.bytes(), 8 * MIB as u64 + "{\"model_type\":\"llama\"}{\"version\":\"1.0\"}".len() as u64);
}

#[test]
fn a_transfer_that_nobody_wants_stops_and_goes_on_later_where_it_was() {
    let place = Place::new();
    let bytes = 16 * MIB;
    place.hub.put("org/name", "main", HubRepo::new().model(1, bytes));
    place.hub.limit(16 << 20);
    let store = place.store();
    let runtime = runtime();
    for half in 0..2 {
        let outcome = runtime.block_on(async {
            let cancel = CancellationToken::new();
            let fetch = store.fetch(&model("org/name"));
            let mut progress = fetch.progress();
            let outcome = tokio::spawn({
                let cancel = cancel.clone();
                async move { fetch.finished_unless(&cancel).await }
            });
            progress.wait_for(|p| p.done > (half + 1) * 5 * MIB as u64).await.unwrap();
            cancel.cancel();
            outcome.await.unwrap()
        });
        assert!(matches!(&*outcome.unwrap_err(), Error::Cancelled));
        let lock = || rustix_lock_is_free(&place.cache());
        wait_for("the writing thread to leave", patience(Duration::from_secs(2)), lock);
        assert_eq!(store.local(&model("org/name")).unwrap(), None);
    }
    place.hub.limit(0);
    fetch(&store, "org/name").unwrap();
    let ratio = place.hub.bytes() as f64 / bytes as f64;
    assert!(ratio <= 1.05, "{ratio}");
}

fn rustix_lock_is_free(cache: &Path) -> Result<(), String> {
    for path in all_below(&cache.join(".locks")) {
        let path = cache.join(".locks").join(path);
        if path.is_file() {
            std::fs::File::open(&path).unwrap().try_lock().map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

#[test]
fn a_model_larger_than_the_budget_is_refused_before_its_first_byte() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 4 * MIB));
    let mut options = place.options();
    options.disk_budget = Some(2 * MIB as u64);
    let error = refused(&rbee_catalog::Store::new(options), "org/name");
    let Error::DiskFull { needed, free, .. } = &*error else { panic!("{error:?}") };
    assert!(*needed > 4 * MIB as u64 && *free <= 2 * MIB as u64);
    assert_eq!(place.hub.count(Server::Cdn).requests, 0);
    let mut options = place.options();
    options.reserve = u64::MAX;
    assert!(matches!(&*refused(&rbee_catalog::Store::new(options), "org/name"), Error::DiskFull { free: 0, .. }));
}
