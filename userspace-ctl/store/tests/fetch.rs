// SPDX-License-Identifier: GPL-2.0

//! Fetching from good and from bad servers.

// Whole images are single ranges of blocks.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{http, http_until, open, options, Memory};
use pristine_store::{BlockSink, Error, ErrorKind, FetchOptions, FormatError, Store};
use pristine_testkit::{sample_image, FaultyServer, TestStore};

struct Lab {
    image: Vec<u8>,
    store: TestStore,
    server: FaultyServer,
}

/// A store with an image of 16 MiB, on a server that obeys `rules`.
fn lab(rules: &str) -> Lab {
    let image = sample_image(1, 16);
    let (store, _) = TestStore::with_image(&image).unwrap();
    let server = FaultyServer::start(&store.root()).unwrap();
    server.set_rules(rules.parse().unwrap());
    Lab {
        image,
        store,
        server,
    }
}

impl Lab {
    fn http(&self) -> Arc<dyn Store> {
        http(&self.server.url())
    }

    /// Fetches everything; returns the report, after the content was checked.
    fn fetch_all(&self, options: &FetchOptions) -> Result<pristine_store::FetchReport, Error> {
        let reader = open(self.http(), "stable")?;
        let memory = Memory::new(&reader);
        let result = reader.fetch([0..reader.blocks()], options, &memory);
        match &result {
            Ok(_) => memory.check(&self.image, &[0..reader.blocks()]),
            // Whatever went wrong, nothing wrong was handed out.
            Err(_) => memory.check_prefix(&self.image),
        }
        result
    }
}

#[test]
fn a_whole_image_from_a_directory_and_from_a_server() {
    let lab = lab("");
    for store in [lab.store.open().unwrap(), lab.http()] {
        let reader = open(store, "stable").unwrap();
        let memory = Memory::new(&reader);
        let all = [0..reader.blocks()];
        let report = reader.fetch(all.clone(), &options(), &memory).unwrap();
        memory.check(&lab.image, &all);
        assert_eq!(report.blocks + report.zero_blocks, reader.blocks());
        assert!(report.zero_blocks >= 1024);
        assert_eq!((report.retries, report.corrupt), (0, 0));
        // Each frame once: no more bytes than there are, and far fewer requests than frames.
        let packs = reader.manifest().frames().packs();
        let stored: u64 = packs.iter().map(|pack| pack.len).sum();
        assert!(report.bytes <= stored, "{} of {stored}", report.bytes);
        assert!(
            report.requests <= packs.len() as u64 * 2,
            "{} requests",
            report.requests
        );
    }
}

#[test]
fn parts_of_an_image() {
    let lab = lab("");
    let reader = open(lab.http(), "stable").unwrap();
    let end = reader.blocks();
    let wanted: Vec<Range<u64>> = vec![0..1, 5..7, 100..101, 1020..1030, 2040..2060, end - 1..end];
    let memory = Memory::new(&reader);
    let report = reader.fetch(wanted.clone(), &options(), &memory).unwrap();
    memory.check(&lab.image, &wanted);
    assert!(report.bytes < 2 << 20, "{} bytes", report.bytes);
    // Beyond the end there is nothing to fetch.
    let memory = Memory::new(&reader);
    let report = reader
        .fetch([end..end + 5, 3..3], &options(), &memory)
        .unwrap();
    assert_eq!((report.blocks, report.requests), (0, 0));
}

#[test]
fn any_single_block_takes_one_request() {
    let lab = lab("");
    let reader = open(lab.http(), "stable").unwrap();
    for block in (0..reader.blocks()).step_by(97) {
        let memory = Memory::new(&reader);
        let wanted = [block..block + 1];
        let report = reader.fetch(wanted.clone(), &options(), &memory).unwrap();
        memory.check(&lab.image, &wanted);
        assert!(report.requests <= 1);
    }
}

#[test]
fn a_server_that_is_down() {
    let lab = lab("");
    let url = lab.server.url();
    drop(lab.server);
    let error = open(http(&url), "stable").unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(error.to_string().contains(&url), "{error}");
}

#[test]
fn a_server_that_goes_down_in_the_middle() {
    let lab = lab("packs/@4-:close");
    let error = lab.fetch_all(&options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
}

#[test]
fn errors_of_the_server_pass_or_are_told() {
    let lab = lab("packs/@1-2:status=500 packs/@5:status=503");
    let report = lab.fetch_all(&options()).unwrap();
    assert!(report.retries >= 3);
    lab.server.set_rules("packs/:status=500".parse().unwrap());
    let error = lab.fetch_all(&options()).unwrap_err();
    assert!(
        matches!(error, Error::Status { status: 500, .. }),
        "{error}"
    );
    lab.server.set_rules("packs/:status=403".parse().unwrap());
    let before = lab.server.requests();
    let error = lab
        .fetch_all(&FetchOptions {
            parallel: 1,
            ..options()
        })
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert_eq!(
        lab.server.requests() - before,
        2 + 1,
        "no use in trying that again"
    );
}

#[test]
fn a_body_that_ends_in_the_middle() {
    let lab = lab("packs/@1-2:cut=5000 packs/@4:cut=0");
    let report = lab.fetch_all(&options()).unwrap();
    assert!(report.retries >= 3);
    // Requests become smaller until they fit.
    lab.server.set_rules("packs/:cut=300000".parse().unwrap());
    assert!(lab.fetch_all(&options()).unwrap().retries >= 3);
    lab.server.set_rules("packs/:cut=5000".parse().unwrap());
    let error = lab.fetch_all(&options()).unwrap_err();
    assert!(matches!(error, Error::Cut { got: 5000, .. }), "{error}");
}

#[test]
fn wrong_content_is_fetched_again_and_never_handed_out() {
    let lab = lab("packs/@1:wrong packs/@4:wrong");
    let report = lab.fetch_all(&options()).unwrap();
    assert!(report.corrupt >= 2 && report.retries >= 2, "{report:?}");
    lab.server.set_rules("packs/:wrong".parse().unwrap());
    let error = lab.fetch_all(&options()).unwrap_err();
    assert!(
        matches!(error, Error::Content { attempts: 3, .. }),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Damaged);
}

#[test]
fn a_server_without_ranges() {
    let lab = lab(":ignore-range");
    let report = lab.fetch_all(&options()).unwrap();
    assert_eq!(report.retries, 0);
}

#[test]
fn a_server_that_sends_another_range() {
    let lab = lab("packs/@1:other-range");
    assert!(lab.fetch_all(&options()).unwrap().retries >= 1);
    lab.server.set_rules("packs/:other-range".parse().unwrap());
    let error = lab.fetch_all(&options()).unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
}

#[test]
fn a_server_that_hangs_or_trickles_is_given_up() {
    let lab = lab("packs/@1:hang");
    let begin = Instant::now();
    lab.fetch_all(&options()).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20));
    lab.server.set_rules(":hang".parse().unwrap());
    let error = open(lab.http(), "stable").unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn packs_that_are_short_or_missing() {
    let lab = lab("packs/:short=100000");
    let error = lab.fetch_all(&options()).unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Damaged);
    lab.server.set_rules("packs/:status=404".parse().unwrap());
    let error = lab.fetch_all(&options()).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[test]
fn a_bad_manifest_or_pointer_is_named() {
    let lab = lab("images/@1:wrong channels/@1:wrong");
    lab.fetch_all(&options()).unwrap();
    for (rules, text) in [
        ("images/:wrong", "manifest"),
        ("images/:short=1", "manifest"),
        ("images/:long=1", "manifest"),
        ("channels/:wrong", "release"),
        ("channels/:short=5", "release"),
    ] {
        lab.server.set_rules(rules.parse().unwrap());
        let error = open(lab.http(), "stable").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{rules}: {error}");
        assert!(error.to_string().contains(text), "{rules}: {error}");
    }
    lab.server.set_rules("".parse().unwrap());
    let error = open(lab.http(), "canary").unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    let error = open(lab.http(), &"ab".repeat(32)).unwrap_err();
    assert!(matches!(error, Error::NoImage { .. }), "{error}");
}

#[test]
fn the_manifest_of_another_image_is_refused() {
    let lab = lab("");
    let right = lab.store.open().unwrap().images().unwrap()[0];
    let other = lab.store.add(&sample_image(2, 4), "other").unwrap();
    let images = lab.store.root().join("images");
    let from = images.join(format!("{other}.manifest"));
    std::fs::copy(from, images.join(format!("{right}.manifest"))).unwrap();
    let error = open(lab.http(), "stable").unwrap_err();
    let Error::Format { error, .. } = error else {
        panic!("{error}");
    };
    assert!(matches!(error, FormatError::WrongImage { .. }), "{error}");
}

#[test]
fn a_fetch_can_be_cancelled() {
    let lab = lab("packs/:slow=4096");
    let options = options();
    let cancel = options.cancel.clone();
    let store = http_until(&lab.server.url(), cancel.clone());
    let reader = open(store, "stable").unwrap();
    let memory = Memory::new(&reader);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        cancel.cancel();
    });
    let begin = Instant::now();
    let error = reader
        .fetch([0..reader.blocks()], &options, &memory)
        .unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    // A piece of a body, or a timeout, may still have been on the way.
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_sink_that_fails_ends_the_fetch() {
    struct Full;
    impl BlockSink for Full {
        fn blocks(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn zeros(&self, _: Range<u64>) -> io::Result<()> {
            Ok(())
        }
    }
    let lab = lab("");
    let reader = open(lab.http(), "stable").unwrap();
    let error = reader
        .fetch([0..reader.blocks()], &options(), &Full)
        .unwrap_err();
    assert!(matches!(error, Error::Sink(_)), "{error}");
}
