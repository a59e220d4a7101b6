// SPDX-License-Identifier: GPL-2.0

//! The corpus that fuzzing found, once more through the fuzz targets, and some random inputs beside it.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use pristine_model::fuzz::TARGETS;

#[test]
fn every_input_of_the_corpus_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in TARGETS {
        let mut count = 0;
        for entry in fs::read_dir(corpus.join(name)).unwrap() {
            let path = entry.unwrap().path();
            // A panic's message does not name the input.
            println!("{}", path.display());
            target(&fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count >= 5, "the corpus of {name} has {count} inputs");
    }
}

/// Every target of the library has a program for libFuzzer, and the other way round.
#[test]
fn every_target_is_linked() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/fuzz_targets");
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    files.sort();
    let mut names = TARGETS.map(|(name, _)| name.to_owned());
    names.sort();
    assert_eq!(files, names);
}
