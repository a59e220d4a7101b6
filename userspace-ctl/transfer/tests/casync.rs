// SPDX-License-Identifier: GPL-2.0

//! Images that casync itself made.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{noise_disk, open, read_disk, run, try_read, Lab};
use pristine_testkit::FaultyServer;
use pristine_transfer::Error;

/// Makes an index and a store with casync.
fn make(lab: &Lab, disk: &[u8], args: &[&str]) {
    lab.write("disk.img", disk);
    let chunks = [
        "--chunk-size=4096:16384:65536",
        "make",
        "disk.caibx",
        "disk.img",
    ];
    run(&lab.path(""), &[&["casync"], args, &chunks[..]].concat());
}

/// All chunks of a store.
fn chunks(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(chunks(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

#[test]
fn what_casync_makes_is_read() {
    let disk = noise_disk(1 << 20);
    for args in [
        &[][..],
        &["--digest=sha256"],
        &["--compression=xz"],
        &["--compression=gzip"],
    ] {
        let lab = Lab::new();
        make(&lab, &disk, args);
        let opened = lab.open("disk.caibx").unwrap();
        assert!(
            opened.formats[0].starts_with("casync, "),
            "{:?}",
            opened.formats
        );
        assert!(lab.content(opened) == disk, "{args:?}");
    }
}

#[test]
fn it_is_read_over_http_and_from_another_store() {
    let lab = Lab::new();
    let disk = noise_disk(1 << 20);
    make(&lab, &disk, &[]);
    let server = FaultyServer::start(&lab.path("")).unwrap();
    let url = format!("{}/disk.caibx", server.url());
    assert!(read_disk(open(&lab, &url, |_| ()).unwrap()).unwrap() == disk);
    fs::rename(lab.path("default.castr"), lab.path("other")).unwrap();
    let lost = lab.open("disk.caibx").unwrap_err();
    assert!(matches!(lost, Error::NotFound { .. }), "{lost}");
    assert!(lost.to_string().contains("--chunk-store"));
    for store in [
        lab.path("other").display().to_string(),
        format!("{}/other", server.url()),
    ] {
        let opened = open(&lab, "disk.caibx", |options| {
            options.chunk_store = Some(store)
        })
        .unwrap();
        assert!(read_disk(opened).unwrap() == disk);
    }
}

#[test]
fn wrong_chunks_are_told() {
    let lab = Lab::new();
    make(&lab, &noise_disk(256 << 10), &[]);
    let files = chunks(&lab.path("default.castr"));
    assert!(files.len() > 4);
    let original = fs::read(&files[0]).unwrap();
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let other = fs::read(&files[1]).unwrap();
    for bad in [
        &original[..original.len() / 2],
        b"",
        b"garbage",
        &bomb,
        &other,
    ] {
        fs::write(&files[0], bad).unwrap();
        let error = try_read(&lab, "disk.caibx").unwrap_err();
        assert!(error.contains("chunk"), "{error}");
    }
    fs::remove_file(&files[0]).unwrap();
    let error = try_read(&lab, "disk.caibx").unwrap_err();
    assert!(error.contains("incomplete"), "{error}");
    // desync can store chunks as they are.
    let content = zstd::stream::decode_all(original.as_slice()).unwrap();
    fs::write(files[0].with_extension(""), content).unwrap();
    assert!(try_read(&lab, "disk.caibx").is_ok());
}

#[test]
fn an_archive_of_casync_is_refused() {
    let lab = Lab::new();
    fs::create_dir(lab.path("tree")).unwrap();
    lab.write("tree/file", b"content");
    lab.sh("casync make tree.caidx tree");
    let refused = lab.open("tree.caidx").unwrap_err();
    assert!(refused.to_string().contains("casync extract"), "{refused}");
}
