//! What lies in a cache or a folder, whoever put it there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use rbee_catalog::Error;
use rbee_testkit::hub::{HubRepo, noise};

use crate::kit::{Place, all_below, fetch, model};

fn filled() -> (Place, std::path::PathBuf) {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 5000));
    let path = fetch(&place.store(), "org/name").unwrap().path;
    (place, path)
}

#[test]
fn links_lead_into_the_own_blobs_and_nowhere_else() {
    let (place, path) = filled();
    let outside = place.folder.path().join("outside");
    fs::write(&outside, noise(1, 5000)).unwrap();
    fs::create_dir_all(place.cache().join("models--org--other/blobs")).unwrap();
    fs::write(place.cache().join("models--org--other/blobs/aa"), "x").unwrap();
    let weights = path.join("model.safetensors");
    for target in [
        outside.to_str().unwrap(),
        "../../../../outside",
        "../../../models--org--other/blobs/aa",
        "../../blobs/../refs/main",
        "../../blobs",
        "../../blobs/.",
        "/dev/zero",
        "config.json",
    ] {
        fs::remove_file(&weights).unwrap();
        symlink(target, &weights).unwrap();
        let found = place.store().local(&model("org/name"));
        assert!(matches!(found, Err(Error::RefusedFile { .. })), "{target}: {found:?}");
    }
    // A blob that is a link itself could lead anywhere.
    fs::remove_file(&weights).unwrap();
    symlink(&outside, place.repo_folder().join("blobs/bb")).unwrap();
    symlink("../../blobs/bb", &weights).unwrap();
    assert!(matches!(place.store().local(&model("org/name")), Err(Error::RefusedFile { .. })));
    // One that leads to nothing is a file that is missing.
    fs::remove_file(&weights).unwrap();
    symlink("../../blobs/cc", &weights).unwrap();
    assert_eq!(place.store().local(&model("org/name")).unwrap(), None);
}

#[test]
fn pipes_devices_and_folders_are_no_files_and_block_nobody() {
    for name in ["model.safetensors", "config.json"] {
        let (place, path) = filled();
        let file = path.join(name);
        fs::remove_file(&file).unwrap();
        assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
        assert!(matches!(place.store().local(&model("org/name")), Err(Error::RefusedFile { .. })), "{name}");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert_eq!(place.store().local(&model("org/name")).unwrap(), None);
    }
    let (place, _) = filled();
    let main = place.repo_folder().join("refs/main");
    fs::remove_file(&main).unwrap();
    assert!(Command::new("mkfifo").arg(&main).status().unwrap().success());
    assert!(matches!(place.store().local(&model("org/name")), Err(Error::RefusedFile { .. })));
}

#[test]
fn refs_that_name_no_commit_name_nothing() {
    let (place, _) = filled();
    for text in ["", "../../x", "main", "/etc", "zz"] {
        fs::write(place.repo_folder().join("refs/main"), text).unwrap();
        assert_eq!(place.store().local(&model("org/name")).unwrap(), None, "{text}");
    }
}

#[test]
fn local_folders_and_files_are_models_by_their_path() {
    let place = Place::new();
    let store = place.store();
    let folder = place.folder.path().join("plain");
    let at = |path: &Path| store.local(&model(path.to_str().unwrap()));
    fs::create_dir(&folder).unwrap();
    assert!(matches!(at(&folder), Err(Error::NoSuchFile { .. })));
    assert!(matches!(at(&folder.join("missing")), Err(Error::NoModelHere { .. })));
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("model.safetensors"), "weights").unwrap();
    let local = at(&folder).unwrap().unwrap();
    assert_eq!((local.bytes, local.commit, local.path.as_path()), (9, None, folder.as_path()));
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    fs::write(place.folder.path().join("elsewhere"), "weights").unwrap();
    symlink("../elsewhere", folder.join("model.safetensors")).unwrap();
    assert!(matches!(at(&folder), Err(Error::RefusedFile { .. })));
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("real"), "weights").unwrap();
    symlink("real", folder.join("model.safetensors")).unwrap();
    assert_eq!(at(&folder).unwrap().unwrap().bytes, 9);
    for name in ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "one.gguf"] {
        fs::write(folder.join(name), "gguf").unwrap();
    }
    assert_eq!(at(&folder.join("one.gguf")).unwrap().unwrap().bytes, 4);
    let local = at(&folder.join("m-00001-of-00002.gguf")).unwrap().unwrap();
    assert_eq!((local.bytes, local.files.len()), (8, 2));
    assert!(matches!(at(&folder.join("config.json")), Err(Error::NoModelHere { .. })));
    assert!(matches!(at(Path::new("/dev/zero")), Err(Error::RefusedFile { .. })));
    assert!(matches!(store.local(&model("tinybee")), Err(Error::NotStored { .. })));
}

#[test]
fn what_is_listed_is_what_is_there() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 300_000));
    place.hub.put("org/name", "v1", HubRepo::new().model(2, 300_000));
    place.hub.put(
        "org/gguf",
        "main",
        HubRepo::new().lfs("m-Q4_0.gguf", noise(1, 1000)).lfs("m-Q8_0.gguf", noise(2, 1000)),
    );
    let store = place.store();
    assert_eq!(store.list().unwrap(), []);
    for name in ["org/name", "org/name@v1", "org/gguf:Q4_0", "org/gguf:Q8_0"] {
        fetch(&store, name).unwrap();
    }
    fs::create_dir_all(place.cache().join("models--org--begun/blobs")).unwrap();
    fs::write(place.cache().join("models--org--begun/blobs/aa.incomplete"), noise(1, 9000)).unwrap();
    let list = store.list().unwrap();
    let names: Vec<(&str, bool)> = list.iter().map(|stored| (stored.repo.as_str(), stored.is_complete())).collect();
    assert_eq!(names, [("org/begun", false), ("org/gguf", true), ("org/name", true)]);
    assert!(list[0].partial >= 9000 && list[1].partial == 0);
    let models: Vec<String> =
        list.iter().flat_map(|s| &s.commits).flat_map(|c| &c.models).map(|m| m.model.to_string()).collect();
    assert_eq!(models.len(), 4, "{models:?}");
    for name in ["org/name", "org/name@v1", "org/gguf:m-Q4_0.gguf", "org/gguf:m-Q8_0.gguf"] {
        assert!(models.iter().any(|model| model == name), "{name} {models:?}");
    }
    assert_eq!(list[2].refs.len(), 2);
    assert!(list[2].commits.iter().all(|commit| commit.last_used.is_some()));
    let sum: u64 = list.iter().map(|stored| stored.bytes).sum();
    assert_eq!(store.used_bytes().unwrap(), sum);
    assert!((600_000..700_000).contains(&list[2].bytes), "{}", list[2].bytes);
}

#[test]
fn what_is_deleted_frees_what_nothing_else_refers_to() {
    let place = Place::new();
    place.hub.put("org/name", "main", HubRepo::new().model(1, 300_000));
    // The same weights under another commit.
    place.hub.put("org/name", "v1", HubRepo::new().model(1, 300_000).file("vocab.json", "{}"));
    let store = place.store();
    fetch(&store, "org/name").unwrap();
    let local = fetch(&store, "org/name@v1").unwrap();
    let freed = store.delete(&model("org/name")).unwrap();
    assert!(freed < 100_000, "{freed}");
    assert_eq!(store.local(&model("org/name")).unwrap(), None);
    assert_eq!(store.local(&model("org/name@v1")).unwrap(), Some(local));
    let freed = store.delete(&model("org/name@v1")).unwrap();
    assert!(freed >= 300_000, "{freed}");
    assert!(!place.repo_folder().exists());
    assert!(matches!(store.delete(&model("org/name")), Err(Error::NoModelHere { .. })));
    assert_eq!(store.used_bytes().unwrap(), 0);
}

#[test]
fn one_file_of_a_repository_is_deleted_by_its_name() {
    let place = Place::new();
    place.hub.put(
        "org/gguf",
        "main",
        HubRepo::new().lfs("m-Q4_0.gguf", noise(1, 9000)).lfs("m-Q8_0.gguf", noise(2, 9000)),
    );
    let store = place.store();
    fetch(&store, "org/gguf:Q4_0").unwrap();
    fetch(&store, "org/gguf:Q8_0").unwrap();
    assert!(store.delete(&model("org/gguf:Q4_0")).unwrap() >= 9000);
    assert_eq!(store.local(&model("org/gguf:Q4_0")).unwrap(), None);
    assert!(store.local(&model("org/gguf:Q8_0")).unwrap().is_some());
    store.delete(&model("org/gguf:Q8_0")).unwrap();
    assert!(!place.cache().join("models--org--gguf").exists());
}

#[test]
fn an_imported_model_is_one_of_the_cache() {
    let place = Place::new();
    let store = place.store();
    let folder = place.folder.path().join("plain");
    fs::create_dir(&folder).unwrap();
    for (name, bytes) in [("config.json", 100), ("tokenizer.json", 200), ("model.safetensors", 12 << 20), ("notes", 5)]
    {
        fs::write(folder.join(name), noise(4, bytes)).unwrap();
    }
    let local = store.import(&folder, "me/mine").unwrap();
    assert_eq!(local, store.local(&model("me/mine")).unwrap().unwrap());
    assert_eq!(local.files.len(), 3);
    assert_eq!(fs::read(local.path.join("model.safetensors")).unwrap(), noise(4, 12 << 20));
    assert_eq!(store.import(&folder, "me/mine").unwrap(), local);
    fs::write(folder.join("m-Q4_0.gguf"), "gguf").unwrap();
    let local = store.import(&folder.join("m-Q4_0.gguf"), "me/gguf").unwrap();
    assert_eq!(local.model, model("me/gguf:m-Q4_0.gguf"));
    assert!(store.local(&model("me/gguf:Q4_0")).unwrap().is_some());
    assert!(store.import(&folder, "../x").is_err());
    assert!(all_below(&place.cache()).iter().all(|path| !path.contains("rbee-part")));
    assert_eq!(place.hub.requests(), 0);
}
