// SPDX-License-Identifier: GPL-2.0

//! Encrypted images through a server, and through one that is a cache of it: who has the identity reads them as others, and
//! the servers learn nothing and can swap nothing.
// Whole images are single ranges of blocks.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{start, start_with, Running};
use pristine_server::{Channels, Options, Origin, Settings, TokenRule};
use pristine_store::sealed::{is_sealed, Identities, Keyring, SealedStore};
use pristine_store::{
    open_store_with, BlockSink, CancelToken, Error, ErrorKind, FetchOptions, HttpOptions,
    ImageReader, ImageSelector, Mirrors, RetryPolicy, Store, Token,
};
use pristine_testkit::{sample_image, TestStore, TEST_IDENTITY};

const CACHE: u64 = 64 << 20;

/// As a machine with the identity sees a store.
fn with_identity(store: Arc<dyn Store>) -> Arc<dyn Store> {
    let identities: Identities = TEST_IDENTITY.parse().unwrap();
    Arc::new(SealedStore::new(
        store,
        Arc::new(Keyring::new(identities.0)),
    ))
}

/// A server, as who has this token sees it.
fn client(server: &Running, token: &str) -> Arc<dyn Store> {
    let options = HttpOptions {
        token: Some(Token::new(token).unwrap()),
        ..HttpOptions::default()
    };
    open_store_with(&format!("http://{}", server.address), options).unwrap()
}

/// A cache of a server, which it reads with this token.
fn cache_of(server: &Running, token: &str, settings: Settings) -> Running {
    let options = Options {
        settings,
        cache: CACHE,
        ..Options::default()
    };
    start_with(Origin::Upstream(client(server, token)), options)
}

/// Compares what comes with the image.
struct Compare<'a>(&'a [u8], Mutex<u64>);

impl BlockSink for Compare<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let at = first as usize * 4096;
        assert!(self.0[at..at + data.len()] == *data, "block {first}");
        *self.1.lock().unwrap() += data.len() as u64;
        Ok(())
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        let (start, end) = (blocks.start as usize * 4096, blocks.end as usize * 4096);
        assert!(self.0[start..end].iter().all(|&byte| byte == 0));
        *self.1.lock().unwrap() += (end - start) as u64;
        Ok(())
    }
}

/// Reads all of what a channel is at. Whatever happens, nothing wrong is delivered.
fn read_all(store: &Arc<dyn Store>, channel: &str, image: &[u8]) -> Result<(), Error> {
    let selector = ImageSelector::Channel(channel.parse().unwrap());
    let retry = RetryPolicy {
        attempts: 2,
        first_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(1),
    };
    let reader = ImageReader::open(Arc::clone(store), &selector, retry, &CancelToken::new())?;
    let options = FetchOptions {
        retry,
        ..FetchOptions::default()
    };
    let sink = Compare(image, Mutex::new(0));
    reader.fetch([0..reader.blocks()], &options, &sink)?;
    assert_eq!(*sink.1.lock().unwrap(), image.len() as u64);
    Ok(())
}

/// The files of a store, by their paths in it.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => left.push(path),
                false => found.push(path.strip_prefix(root).unwrap().to_owned()),
            }
        }
    }
    found.sort();
    found
}

fn rules(store: &TestStore) -> Settings {
    let one = |channel: &str| Channels::Some([channel.parse().unwrap()].into());
    let rules = [
        TokenRule::new("machine", "machine", one("stable")),
        TokenRule::new("other", "other", one("other")),
        TokenRule::new("cache", "cache", Channels::All),
    ];
    let path = store.root().with_file_name("rules");
    fs::write(&path, rules.map(|rule| format!("{rule}\n")).concat()).unwrap();
    let mut settings = Settings::default();
    settings.access = Some(path);
    settings
}

#[test]
fn an_encrypted_image_comes_through_a_server_and_its_cache_which_learn_nothing() {
    let (image, mut next) = (sample_image(21, 8), sample_image(21, 8));
    // Little of each block, so that a delta is worth its place.
    for at in (1 << 20..2 << 20).step_by(4096) {
        next[at] ^= 0x5a;
    }
    let store = TestStore::new().unwrap();
    store.add_encrypted(&image, "stable").unwrap();
    store.add_encrypted(&next, "stable").unwrap();
    store.add(&sample_image(3, 4), "other").unwrap();
    let origin = start(&store.root(), rules(&store));
    let cache = cache_of(&origin, "cache", rules(&store));

    for server in [&origin, &cache] {
        read_all(&with_identity(client(server, "machine")), "stable", &next).unwrap();
        // A token is not enough, nor an identity without one.
        let error = read_all(&client(server, "machine"), "stable", &next).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoKey, "{error}");
        let stranger = with_identity(client(server, "stranger"));
        let error = read_all(&stranger, "stable", &next).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    }
    // What is in the cache is not asked for again, but for pointers.
    let fetched = cache.metric("upstream_bytes_total");
    read_all(&with_identity(client(&cache, "machine")), "stable", &next).unwrap();
    assert!(cache.metric("upstream_bytes_total") - fetched < 2000.0);

    // All that either of them sends, whole and in parts, is what the store has, and nothing of it is in the clear.
    let mut starts: HashSet<[u8; 16]> = HashSet::new();
    for block in image.chunks(4096).chain(next.chunks(4096)) {
        for at in [0, 1024, 2048, 3072] {
            let start: [u8; 16] = block[at..at + 16].try_into().unwrap();
            starts.extend((start != [0; 16]).then_some(start));
        }
    }
    let theirs = store.open().unwrap();
    let plain = theirs.images().unwrap().into_iter().filter(|image| {
        let path = store.root().join(format!("images/{image}.manifest"));
        !is_sealed(&fs::read(path).unwrap())
    });
    let plain: Vec<_> = plain.collect();
    assert_eq!(plain.len(), 1);
    let (mut packs, mut deltas) = (0, 0);
    for file in files(&store.root()) {
        let path = format!("/{}", file.display());
        let bytes = fs::read(store.root().join(&file)).unwrap();
        let is_other = path.contains(&plain[0].to_string()) || path.contains("/other");
        let token = "Authorization: Bearer machine\r\n";
        for server in [&origin, &cache] {
            let answer = server.get(&path, token);
            if is_other {
                assert_eq!(answer.status, 403, "{path}");
                continue;
            }
            // Packs of the other channel's image, and what no client is to see.
            if matches!(answer.status, 403 | 404) {
                continue;
            }
            assert_eq!(answer.status, 200, "{path}");
            assert!(answer.body == bytes, "{path}");
            assert!(
                !bytes.windows(16).any(|window| starts.contains(window)),
                "{path} shows content"
            );
            packs += usize::from(path.starts_with("/packs/"));
            deltas += usize::from(path.starts_with("/deltas/"));
            // Small texts are always sent whole.
            if !["/packs/", "/deltas/", "/images/"]
                .iter()
                .any(|part| path.starts_with(part))
            {
                continue;
            }
            let middle = bytes.len() / 2;
            let range = format!("{token}Range: bytes={}-{middle}\r\n", middle / 2);
            let part = server.get(&path, &range);
            assert!(part.status == 206 && part.body == bytes[middle / 2..=middle]);
            let denied = server.get(&path, "Authorization: Bearer other\r\n").status;
            // Wrapped keys are of use to their recipients alone.
            let is_open = path.starts_with("/keys/") || path == "/pristine-store";
            assert_eq!(denied, if is_open { 200 } else { 403 }, "{path}");
        }
    }
    assert!(packs >= 8 && deltas == 2, "{packs} {deltas}");
    // Who may read the other channel reads that.
    read_all(&client(&cache, "other"), "other", &sample_image(3, 4)).unwrap();
}

/// The files in a part of a store.
fn part(root: &Path, part: &str) -> Vec<PathBuf> {
    let all = files(root).into_iter();
    let some = all.filter(|path| path.starts_with(part));
    some.map(|path| root.join(path)).collect()
}

#[test]
fn a_server_and_its_cache_can_swap_nothing() {
    let (old, new) = (sample_image(31, 4), sample_image(32, 4));
    let store = TestStore::new().unwrap();
    store.add_encrypted(&old, "stable").unwrap();
    let manifest = |root: &Path| part(root, "images");
    let first = manifest(&store.root())[0].clone();
    let earlier = part(&store.root(), "packs");
    store.add_encrypted(&new, "stable").unwrap();
    let second = manifest(&store.root())
        .into_iter()
        .find(|path| *path != first)
        .unwrap();
    let mut packs = part(&store.root(), "packs");
    packs.retain(|path| !earlier.contains(path));
    let wrapped = part(&store.root(), "keys")[0].clone();
    let bytes = |path: &Path| fs::read(path).unwrap();
    let mut shuffled = bytes(&packs[0]);
    let (one, two) = shuffled.split_at_mut(4112);
    one.swap_with_slice(&mut two[..4112]);
    let right = bytes(&packs[1]);
    let mut flipped = right.clone();
    flipped[right.len() / 2] ^= 0x20;
    let mut key = bytes(&wrapped);
    let end = key.len() - 3;
    key[end] ^= 1;
    let swaps: [(&str, &Path, Vec<u8>); 7] = [
        ("the image's own other pack", &packs[0], bytes(&packs[1])),
        ("a pack of another image", &packs[0], bytes(&earlier[0])),
        ("chunks of a pack swapped", &packs[0], shuffled),
        ("a flipped bit", &packs[1], flipped),
        ("half a pack", &packs[1], right[..right.len() / 2].to_vec()),
        ("the image before", &second, bytes(&first)),
        ("another key", &wrapped, key),
    ];
    for (what, path, wrong) in swaps {
        let good = bytes(path);
        fs::write(path, wrong).unwrap();
        let origin = start(&store.root(), rules(&store));
        let cache = cache_of(&origin, "cache", rules(&store));
        for server in [&origin, &cache] {
            let seen = with_identity(client(server, "machine"));
            let error = read_all(&seen, "stable", &new).expect_err(what);
            let told = error.is_corruption()
                || matches!(error.kind(), ErrorKind::NoKey | ErrorKind::Denied);
            assert!(told, "{what}: {error}");
        }
        fs::write(path, good).unwrap();
        // The cache keeps what it has; a machine that knows another store goes there.
        if path.starts_with(store.root().join("packs")) {
            let honest = start(&store.root(), rules(&store));
            let stores = [&cache, &honest].map(|server| client(server, "machine"));
            let both: Arc<dyn Store> = Arc::new(Mirrors::new(
                stores.into(),
                Arc::new(|_: &str, _: &Error| ()),
            ));
            read_all(&with_identity(both), "stable", &new).expect(what);
        }
    }
}
