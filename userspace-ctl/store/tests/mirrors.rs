// SPDX-License-Identifier: GPL-2.0

//! Several stores as one: dead, lying, trickling and late ones, and ones that come back.

// Whole images are single ranges of blocks.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{open, options, Memory};
use pristine_store::{open_store_with, Error, HttpOptions, Mirrors, RetryPolicy, Store};
use pristine_testkit::{sample_image, FaultyServer, TestStore};

type Heard = Arc<Mutex<Vec<String>>>;

fn mirrors(urls: &[String], delay: Duration) -> (Arc<dyn Store>, Heard) {
    let heard = Heard::default();
    let hears = Arc::clone(&heard);
    let stores = urls.iter().map(|url| {
        let options = HttpOptions {
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_millis(300),
            ..HttpOptions::default()
        };
        open_store_with(url, options).unwrap()
    });
    let told = move |location: &str, error: &Error| {
        hears.lock().unwrap().push(format!("{location}: {error}"));
    };
    let mirrors = Mirrors::new(stores.collect(), Arc::new(told)).with_backoff(RetryPolicy {
        attempts: u32::MAX,
        first_delay: delay,
        max_delay: delay,
    });
    (Arc::new(mirrors), heard)
}

const LONG: Duration = Duration::from_secs(600);

fn read_all(store: &Arc<dyn Store>, image: &[u8]) {
    let reader = open(Arc::clone(store), "stable").unwrap();
    let memory = Memory::new(&reader);
    let all = 0..reader.blocks();
    reader
        .fetch(std::iter::once(all.clone()), &options(), &memory)
        .unwrap();
    memory.check(image, &[all]);
}

#[test]
fn what_one_does_not_serve_the_next_one_does() {
    let image = sample_image(3, 8);
    let (lab, _) = TestStore::with_image(&image).unwrap();
    for faults in [
        ":close",
        ":hang",
        ":slow=1024",
        ":status=503",
        ":status=403",
        ":wrong",
        "packs/:wrong",
        "packs/:slow=1024",
        "packs/@2-:close",
        "packs/:status=404",
        "images/:status=404",
        "channels/:status=404",
    ] {
        let bad = FaultyServer::start(&lab.root()).unwrap();
        bad.set_rules(faults.parse().unwrap());
        let good = FaultyServer::start(&lab.root()).unwrap();
        let (store, heard) = mirrors(&[bad.url(), good.url()], LONG);
        read_all(&store, &image);
        let heard = heard.lock().unwrap();
        let missing = faults.ends_with("404");
        assert_eq!(heard.is_empty(), missing, "{faults}: {heard:?}");
        // It is left alone then, and nobody blames the other one.
        assert!(heard.len() <= 4, "{faults}: {heard:?}");
        assert!(
            heard.iter().all(|text| text.starts_with(&bad.url())),
            "{faults}: {heard:?}"
        );
        assert!(good.requests() > 0, "{faults}");
    }
}

#[test]
fn one_that_is_better_again_is_asked_again() {
    let image = sample_image(3, 4);
    let (lab, _) = TestStore::with_image(&image).unwrap();
    let first = FaultyServer::start(&lab.root()).unwrap();
    first.set_rules(":status=500".parse().unwrap());
    let second = FaultyServer::start(&lab.root()).unwrap();
    let (store, heard) = mirrors(&[first.url(), second.url()], Duration::ZERO);
    read_all(&store, &image);
    assert!(!heard.lock().unwrap().is_empty());
    first.set_rules("".parse().unwrap());
    let before = second.requests();
    read_all(&store, &image);
    assert_eq!(second.requests(), before, "the first one is preferred");
}

#[test]
fn all_are_down_and_it_says_so() {
    let (lab, _) = TestStore::with_image(&sample_image(3, 4)).unwrap();
    let urls: Vec<String> = (0..2)
        .map(|_| FaultyServer::start(&lab.root()).unwrap().url())
        .collect();
    let (store, heard) = mirrors(&urls, LONG);
    let error = store.read_pointer(&"stable".parse().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert_eq!(heard.lock().unwrap().len(), 2);
    // What none of them has is not there.
    let live = FaultyServer::start(&lab.root()).unwrap();
    let (store, _) = mirrors(&[live.url(), live.url()], LONG);
    assert!(store
        .read_pointer(&"no".parse().unwrap())
        .unwrap()
        .is_none());
}
