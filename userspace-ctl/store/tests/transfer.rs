// SPDX-License-Identifier: GPL-2.0

//! Transfers over HTTP that break off, objects that change, servers without ranges; and nginx, as it is installed,
//! over HTTP and HTTPS.

// Whole images are single ranges of blocks.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use common::{http, open, options, Memory};
use pristine_store::{Error, HttpOptions, HttpStore, ImageReader, ObjectName, Store};
use pristine_testkit::{authority, sample_image, FaultyServer, Nginx, Options, Rules, TestStore};

/// A store with an image of 16 MiB on a server with tags, and its largest pack.
fn tagged() -> (TestStore, FaultyServer, ObjectName, Vec<u8>) {
    let (store, _) = TestStore::with_image(&sample_image(1, 16)).unwrap();
    let tags = Options {
        tags: true,
        ..Options::default()
    };
    let server = FaultyServer::start_with(&store.root(), tags, Rules::default()).unwrap();
    let reader = open(store.open().unwrap(), "stable").unwrap();
    let packs = reader.manifest().frames().packs();
    let pack = packs.iter().max_by_key(|pack| pack.len).unwrap();
    let object = ObjectName::Pack(pack.id);
    let bytes = reader.store().get(&object, pack.len).unwrap();
    (store, server, object, bytes)
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_stopped() {
    let (_store, server, object, bytes) = tagged();
    let len = bytes.len() as u64;
    server.set_rules("packs/@1-3:cut=100000".parse().unwrap());
    let store = http(&server.url());
    assert!(store.get(&object, len).unwrap() == bytes);
    // Each byte once.
    assert_eq!(store.traffic().bytes, len);
    assert_eq!(store.traffic().requests, 4);
    server.set_rules("packs/@1-2:cut=3000".parse().unwrap());
    let store = http(&server.url());
    let range = store.get_range(&object, 5000..25_000).unwrap();
    assert!(range == bytes[5000..25_000]);
    assert_eq!(
        (store.traffic().bytes, store.traffic().requests),
        (20_000, 3)
    );
    // Not for ever.
    server.set_rules("packs/:cut=10".parse().unwrap());
    let error = http(&server.url()).get(&object, len).unwrap_err();
    assert!(matches!(error, Error::Cut { got: 90, .. }), "{error}");
    // A server that only sends whole objects can still be gone on with.
    server.set_rules("packs/@1:cut=100000 packs/@2:ignore-range".parse().unwrap());
    assert!(http(&server.url()).get(&object, len).unwrap() == bytes);
}

#[test]
fn an_object_that_changes_under_the_reader_is_noticed() {
    let (_store, server, object, bytes) = tagged();
    server.set_rules("packs/@1:cut=100000 packs/@2-:long=7".parse().unwrap());
    // What comes is one of both, never a part of each.
    let mut changed = bytes.clone();
    changed.resize(bytes.len() + 7, 0);
    let store = http(&server.url());
    assert!(store.get(&object, 64 << 20).unwrap() == changed);
    server.set_rules("packs/@1:cut=100000 packs/@2-:long=7".parse().unwrap());
    let error = http(&server.url()).get(&object, bytes.len() as u64);
    assert!(matches!(error, Err(Error::TooLarge { .. })));
}

#[test]
fn packs_of_a_server_without_ranges_are_taken_once() {
    let (_store, server, _, _) = tagged();
    server.set_rules(":ignore-range".parse().unwrap());
    let (bytes, stored) = fetch_all(http(&server.url()), &sample_image(1, 16));
    // The first request of each worker may come before it is known.
    assert!(bytes < 3 * stored, "{bytes} of {stored}");
}

/// Fetches everything; gives the bytes that came, and those of the packs.
fn fetch_all(store: Arc<dyn Store>, image: &[u8]) -> (u64, u64) {
    let reader: ImageReader = open(Arc::clone(&store), "stable").unwrap();
    let memory = Memory::new(&reader);
    let all = [0..reader.blocks()];
    reader.fetch(all.clone(), &options(), &memory).unwrap();
    memory.check(image, &all);
    let packs = reader.manifest().frames().packs().iter();
    (store.traffic().bytes, packs.map(|pack| pack.len).sum())
}

#[test]
fn nginx_serves_a_store() {
    let image = sample_image(2, 16);
    let (store, _) = TestStore::with_image(&image).unwrap();
    let nginx = Nginx::start(&store.root(), "", "").unwrap();
    let url = format!("http://127.0.0.1:{}", nginx.port());
    let (bytes, stored) = fetch_all(http(&url), &image);
    assert!(bytes < stored + (1 << 20), "{bytes} of {stored}");
    let log = nginx.log().unwrap();
    assert!(log.iter().any(|line| line.contains(" 206 ")), "{log:?}");
    // Connections are used again: there are at most as many as workers, and one more to open the image.
    let connections: BTreeSet<&str> = log
        .iter()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let workers = options().parallel;
    assert!(
        connections.len() <= workers + 1 && log.len() > connections.len(),
        "{log:?}"
    );
}

#[test]
fn nginx_without_ranges() {
    let image = sample_image(3, 16);
    let (store, _) = TestStore::with_image(&image).unwrap();
    let nginx = Nginx::start(&store.root(), "", "max_ranges 0;").unwrap();
    let url = format!("http://127.0.0.1:{}", nginx.port());
    let (bytes, stored) = fetch_all(http(&url), &image);
    assert!(bytes < 3 * stored, "{bytes} of {stored}");
    assert!(!nginx
        .log()
        .unwrap()
        .iter()
        .any(|line| line.contains(" 206 ")));
}

#[test]
fn nginx_with_a_certificate_of_an_own_authority() {
    let image = sample_image(4, 4);
    let (store, _) = TestStore::with_image(&image).unwrap();
    let authority = authority().unwrap();
    let file = |name: &str| -> PathBuf { authority.path().join(name) };
    let server = format!(
        "ssl_certificate {};\nssl_certificate_key {};",
        file("server.pem").display(),
        file("server.key").display()
    );
    let nginx = Nginx::start(&store.root(), " ssl", &server).unwrap();
    let url = format!("https://127.0.0.1:{}", nginx.port());
    let with = |ca_file: Option<PathBuf>| {
        let options = HttpOptions {
            ca_file,
            ..HttpOptions::default()
        };
        HttpStore::open(&url, options)
    };
    fetch_all(Arc::new(with(Some(file("ca.pem"))).unwrap()), &image);
    // An authority that the system does not know is nobody.
    let error = open(Arc::new(with(None).unwrap()), "stable").unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().to_lowercase().contains("cert"), "{error}");
    for bad in ["server.key", "missing.pem"] {
        let error = with(Some(file(bad))).unwrap_err();
        assert!(error.to_string().contains(bad), "{error}");
    }
}
