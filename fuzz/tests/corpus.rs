//! The kept inputs, without a fuzzer.

use std::collections::BTreeSet;
use std::path::Path;

use rbee_fuzz::TARGETS;

#[test]
fn every_kept_input_passes_its_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in TARGETS {
        let folder = std::fs::read_dir(corpus.join(target.name)).unwrap();
        let files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        assert!(!files.is_empty(), "{} has no inputs", target.name);
        for file in files {
            // The last name printed is that of the input that failed.
            println!("{}", file.display());
            let bytes = std::fs::read(&file).unwrap();
            assert!(bytes.len() <= target.max_len, "it is longer than what is tried");
            (target.run)(&bytes);
        }
    }
}

#[test]
fn every_corpus_has_its_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let folders = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names = TARGETS.iter().map(|target| target.name.to_owned());
    assert_eq!(folders.collect::<BTreeSet<_>>(), names.collect::<BTreeSet<_>>());
}
