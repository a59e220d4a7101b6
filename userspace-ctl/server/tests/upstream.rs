// SPDX-License-Identifier: GPL-2.0

//! A server that is a cache of another.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{pattern, put_pack, start_with, Running};
use pristine_server::{Options, Origin};
use pristine_store::{
    open_store, BlockSink, CancelToken, FetchOptions, ImageReader, ImageSelector, RetryPolicy,
};
use pristine_testkit::{sample_image, FaultyServer, TestStore};

const LEN: usize = 2_000_000;
/// As large as chunks are.
const CHUNK: usize = 256 << 10;

fn cache_of(server: &FaultyServer, memory: u64) -> Running {
    let options = Options {
        cache: memory,
        ..Options::default()
    };
    let upstream = open_store(&server.url()).unwrap();
    start_with(Origin::Upstream(upstream), options)
}

#[test]
fn what_many_ask_for_at_once_is_fetched_once() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(LEN);
    let path = put_pack(directory.path(), &bytes);
    let upstream = FaultyServer::start(directory.path()).unwrap();
    // Slow enough that all of them wait for the same.
    upstream.set_rules("packs/:delay=100".parse().unwrap());
    let running = cache_of(&upstream, 64 << 20);
    std::thread::scope(|scope| {
        for client in 0..40 {
            let (running, bytes, path) = (&running, &bytes, &path);
            scope.spawn(move || {
                let first = client * 1000;
                let answer = running.get(path, &format!("Range: bytes={first}-\r\n"));
                assert_eq!(answer.status, 206);
                assert!(answer.body == bytes[first..]);
            });
        }
    });
    let chunks = LEN.div_ceil(CHUNK) as u64;
    // One for the length, one for each chunk, and one more for the last, which is shorter.
    assert!(upstream.requests() <= chunks + 2, "{}", upstream.requests());
    assert_eq!(running.metric("upstream_bytes_total"), LEN as f64);
    assert!(running.metric("cache_hits_total") > 100.0);
}

#[test]
fn memory_is_bounded_and_what_is_not_cached_is_fetched_again() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(16 << 20);
    let path = put_pack(directory.path(), &bytes);
    let upstream = FaultyServer::start(directory.path()).unwrap();
    // The least that it takes: 4 MiB.
    let running = cache_of(&upstream, 1);
    for _ in 0..2 {
        assert!(running.get(&path, "").body == bytes);
    }
    let fetched = running.metric("upstream_bytes_total");
    assert!(fetched > 24e6, "{fetched}");
}

#[test]
fn an_image_comes_whole_through_it_and_failures_are_told() {
    let image = sample_image(7, 8);
    let (store, id) = TestStore::with_image(&image).unwrap();
    let upstream = FaultyServer::start(&store.root()).unwrap();
    let running = cache_of(&upstream, 64 << 20);
    let through = open_store(&format!("http://{}", running.address)).unwrap();

    struct Compare<'a>(&'a [u8]);
    impl BlockSink for Compare<'_> {
        fn blocks(&self, first: u64, data: &[u8]) -> std::io::Result<()> {
            let at = first as usize * 4096;
            assert!(self.0[at..at + data.len()] == *data);
            Ok(())
        }
        fn zeros(&self, blocks: std::ops::Range<u64>) -> std::io::Result<()> {
            let (start, end) = (blocks.start as usize * 4096, blocks.end as usize * 4096);
            assert!(self.0[start..end].iter().all(|&byte| byte == 0));
            Ok(())
        }
    }
    let selector = ImageSelector::Channel("stable".parse().unwrap());
    let (retry, cancel) = (RetryPolicy::once(), CancelToken::new());
    let reader = ImageReader::open(through.clone(), &selector, retry, &cancel).unwrap();
    assert_eq!(reader.image(), id);
    let all = std::iter::once(0..reader.blocks());
    let options = FetchOptions::default();
    reader
        .fetch(all.clone(), &options, &Compare(&image))
        .unwrap();
    // The second time nothing is asked of the other.
    let before = upstream.requests();
    reader.fetch(all, &options, &Compare(&image)).unwrap();
    assert_eq!(upstream.requests(), before);

    assert_eq!(running.get("/channels/none", "").status, 404);
    assert_eq!(
        running
            .get(&format!("/images/{}.manifest", "0".repeat(64)), "")
            .status,
        404
    );
    // What the pointer is, byte by byte.
    let pointer = running.get("/channels/stable", "").body;
    assert!(pointer == std::fs::read(store.root().join("channels/stable")).unwrap());
    let manifest = format!("/images/{id}.manifest");
    upstream.set_rules("images/:status=500".parse().unwrap());
    // It is there already; asked for anew, the other's failure is told.
    assert_eq!(running.get(&manifest, "").status, 200);
    let fresh = "Cache-Control: no-cache\r\n";
    let mut told = 200;
    while told == 200 {
        // What is younger than a second is not fetched again.
        told = running.get(&manifest, fresh).status;
        std::thread::yield_now();
    }
    assert_eq!(told, 502);
}
