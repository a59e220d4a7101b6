// SPDX-License-Identifier: GPL-2.0

//! Publishing, racing, resuming and verifying.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use common::{http, open};
use pristine_store::{
    history, publish, read_release, verify, CancelToken, ChannelName, DeltaOptions, DirStore,
    Error, ErrorKind, ImageId, ImageReader, ObjectName, PublishOptions, Published, Put, Release,
    ReleaseName, Result, SignedRelease, Store,
};
use pristine_testkit::{sample_image, FaultyServer, TestStore};

fn channel() -> ChannelName {
    "stable".parse().unwrap()
}

fn source(seed: u64) -> (TestStore, ImageReader) {
    let (store, _) = TestStore::with_image(&sample_image(seed, 16)).unwrap();
    let reader = open(store.open().unwrap(), "stable").unwrap();
    (store, reader)
}

fn publish_to(reader: &ImageReader, target: &Arc<dyn Store>) -> Result<Published> {
    common::publish_to(reader, target, "stable")
}

#[test]
fn generations_count_and_objects_are_sent_once() {
    let (_one, first) = source(1);
    let (_two, second) = source(100);
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    let options = PublishOptions {
        dry_run: true,
        ..PublishOptions::default()
    };
    let planned = publish(&first, &store, &channel(), &options, &|_, _| ()).unwrap();
    assert_eq!(store.read_pointer(&channel()).unwrap(), None);
    let published = publish_to(&first, &store).unwrap();
    assert_eq!(planned.sent_bytes, published.sent_bytes);
    assert_eq!(published.release.release().generation, 1);
    // Exactly the bytes that were announced are there.
    assert_eq!(published.sent_bytes, object_bytes(&target));
    let again = publish_to(&first, &store).unwrap();
    assert!(again.unchanged && again.sent_objects == 0);
    assert_eq!(again.present_bytes, published.sent_bytes);
    assert_eq!(
        publish_to(&second, &store)
            .unwrap()
            .release
            .release()
            .generation,
        2
    );
    let back = publish_to(&first, &store).unwrap();
    assert_eq!(
        (back.release.release().generation, back.sent_objects),
        (3, 0)
    );
    assert_eq!(store.images().unwrap().len(), 2);
    let reader = open(store, "stable").unwrap();
    assert_eq!(reader.image(), first.image());
    assert!(verify(&reader, &CancelToken::new(), &|_, _| ())
        .unwrap()
        .is_ok());
}

#[test]
fn a_delta_that_saves_little_is_left_out() {
    let (_one, first) = source(1);
    let (_two, second) = source(100);
    // The third has other bytes in each block, and no others than the second but for these.
    let mut content = sample_image(100, 16);
    for block in content.chunks_mut(4096) {
        block[7] ^= 1;
    }
    let (three, _) = TestStore::with_image(&content).unwrap();
    let third = open(three.open().unwrap(), "stable").unwrap();
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    let delta = |new: &ImageReader, old: &ImageReader| {
        let (new, old) = (new.image(), old.image());
        store.size(&ObjectName::Delta { new, old }).unwrap()
    };
    let options = PublishOptions {
        deltas: DeltaOptions {
            count: 1,
            ..DeltaOptions::default()
        },
        ..PublishOptions::default()
    };
    let publish = |image| publish(image, &store, &channel(), &options, &|_, _| ()).unwrap();
    publish(&first);
    let published = publish(&second);
    assert!(published.delta_left_out > 0);
    assert_eq!((published.delta_bytes, delta(&second, &first)), (0, None));
    let published = publish(&third);
    assert!(published.delta_bytes > 0);
    assert_eq!(delta(&third, &second), Some(published.delta_bytes));
}

fn object_bytes(store: &TestStore) -> u64 {
    files(store)
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum()
}

/// Manifests and packs of a store.
fn files(store: &TestStore) -> Vec<PathBuf> {
    let list = |path: PathBuf| {
        fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path())
    };
    let mut files: Vec<PathBuf> = list(store.root().join("images")).collect();
    files.extend(list(store.root().join("packs")).flat_map(list));
    files.sort();
    files
}

/// A store that fails after some objects, as one whose disk is full.
#[derive(Debug)]
struct Failing {
    inner: DirStore,
    puts_left: AtomicU32,
}

impl Store for Failing {
    fn delegate(&self) -> Option<&dyn Store> {
        Some(&self.inner)
    }

    fn put(&self, object: &ObjectName, bytes: &[u8]) -> Result<Put> {
        let left = self.puts_left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(Error::Io {
                what: "no space".to_owned(),
                error: std::io::ErrorKind::StorageFull.into(),
            });
        }
        self.puts_left.store(left - 1, Ordering::Relaxed);
        self.inner.put(object, bytes)
    }
}

#[test]
fn a_publish_that_was_cut_goes_on_where_it_stopped() {
    let (_source, reader) = source(3);
    let target = TestStore::new().unwrap();
    let packs = reader.manifest().frames().packs().len() as u32;
    let mut sent_before = 0;
    // Cut after each object; the last one is the manifest.
    for puts in [0, 1, 3, packs] {
        let failing: Arc<dyn Store> = Arc::new(Failing {
            inner: DirStore::open(&target.root()).unwrap(),
            puts_left: AtomicU32::new(puts - sent_before),
        });
        let error = publish_to(&reader, &failing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        sent_before = puts;
        // Nobody sees a part of it.
        let store = target.open().unwrap();
        assert_eq!(store.images().unwrap(), vec![]);
        assert_eq!(store.read_pointer(&channel()).unwrap(), None);
    }
    let store = target.open().unwrap();
    let published = publish_to(&reader, &store).unwrap();
    assert_eq!(published.present_objects, u64::from(packs));
    assert_eq!(published.sent_objects, 1, "only the manifest was missing");
    assert_eq!(files(&target).len() as u32, packs + 1);
}

#[test]
fn of_two_publishers_one_loses_cleanly() {
    let (_one, first) = source(4);
    let (_two, second) = source(5);
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    publish_to(&first, &store).unwrap();
    let (pointer, revision) = store.read_pointer(&channel()).unwrap().unwrap();
    // Somebody else publishes between reading and moving the pointer.
    publish_to(&second, &store).unwrap();
    let mine = SignedRelease::unsigned(Release {
        generation: pointer.release().generation + 1,
        ..pointer.release().clone()
    });
    let error = store.swap_pointer(Some(&revision), &mine).unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    assert!(error.to_string().contains("generation 2"), "{error}");
    let error = store.swap_pointer(None, &mine).unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    let (now, _) = store.read_pointer(&channel()).unwrap().unwrap();
    assert_eq!(now.release().image, second.image());
}

#[test]
fn many_publishers_at_once_never_share_a_generation() {
    let target = TestStore::new().unwrap();
    let images: Vec<ImageId> = (0..4)
        .map(|seed| {
            target
                .add(&sample_image(seed, 4), &format!("c{seed}"))
                .unwrap()
        })
        .collect();
    let won = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for (index, image) in images.iter().enumerate() {
            let (target, won) = (&target, &won);
            scope.spawn(move || {
                let store = target.open().unwrap();
                let reader = open(store.clone(), &image.to_string()).unwrap();
                for _ in 0..10 {
                    match publish_to(&reader, &store) {
                        Ok(published) if !published.unchanged => {
                            let generation = published.release.release().generation;
                            won.lock().unwrap().push(generation);
                        }
                        Ok(_) | Err(Error::Conflict { .. }) => (),
                        Err(error) => panic!("publisher {index}: {error}"),
                    }
                }
            });
        }
    });
    // Each win is one generation: none was lost, none was given twice, and the last one is what is there.
    let mut won = won.into_inner().unwrap();
    won.sort_unstable();
    let count = won.len();
    won.dedup();
    assert_eq!(won.len(), count);
    let store = target.open().unwrap();
    let releases = history(store.as_ref(), &channel()).unwrap();
    let all: Vec<u64> = releases.iter().map(|(generation, _)| *generation).collect();
    assert!(won.iter().all(|generation| all.contains(generation)));
    assert_eq!(won.last(), all.last());
    assert!(releases.iter().all(|(_, release)| release.is_ok()));
}

#[test]
fn the_history_has_each_generation() {
    let (_one, first) = source(11);
    let (_two, second) = source(12);
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    assert!(history(store.as_ref(), &channel()).unwrap().is_empty());
    for image in [&first, &second, &first] {
        publish_to(image, &store).unwrap();
    }
    let releases = history(store.as_ref(), &channel()).unwrap();
    let images: Vec<ImageId> = releases
        .iter()
        .map(|(_, release)| release.as_ref().unwrap().release().image)
        .collect();
    assert_eq!(images, [first.image(), second.image(), first.image()]);
    let third = read_release(store.as_ref(), &channel(), 3).unwrap();
    assert_eq!(third.release().parent, Some(second.image()));
    let (pointer, _) = store.read_pointer(&channel()).unwrap().unwrap();
    assert_eq!(third, pointer);
    // An entry in another's place is no entry.
    let path = |generation| target.root().join(format!("releases/stable/{generation}"));
    fs::copy(path(1), path(2)).unwrap();
    let error = read_release(store.as_ref(), &channel(), 2).unwrap_err();
    assert!(error.to_string().contains("in the place of"), "{error}");
    assert!(history(store.as_ref(), &channel()).unwrap()[1].1.is_err());
}

#[test]
fn a_channel_from_before_there_was_a_history_gets_one() {
    let (_one, first) = source(13);
    let (_two, second) = source(14);
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    publish_to(&first, &store).unwrap();
    fs::remove_dir_all(target.root().join("releases")).unwrap();
    assert_eq!(history(store.as_ref(), &channel()).unwrap().len(), 1);
    publish_to(&second, &store).unwrap();
    assert_eq!(store.releases(&channel()).unwrap(), [1, 2]);
}

#[test]
fn a_publisher_that_died_before_the_pointer_moved_is_passed_over() {
    let (_one, first) = source(15);
    let (_two, second) = source(16);
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    publish_to(&first, &store).unwrap();
    let dead = SignedRelease::unsigned(Release {
        channel: channel(),
        generation: 2,
        image: first.image(),
        size: first.size(),
        published: 1,
        expires: None,
        oldest: None,
        parent: None,
    });
    let name = ObjectName::Release(ReleaseName::new(&channel(), 2));
    store.put(&name, dead.encode().as_bytes()).unwrap();
    assert_eq!(history(store.as_ref(), &channel()).unwrap().len(), 1);
    let published = publish_to(&second, &store).unwrap();
    assert_eq!(published.release.release().generation, 3);
    assert_eq!(read_release(store.as_ref(), &channel(), 2).unwrap(), dead);
}

#[test]
fn a_source_that_lies_is_not_published() {
    let (source, _) = source(6);
    let server = FaultyServer::start(&source.root()).unwrap();
    let reader = open(http(&server.url()), "stable").unwrap();
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    server.set_rules("packs/@2-:wrong".parse().unwrap());
    let error = publish_to(&reader, &store).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    assert_eq!(store.read_pointer(&channel()).unwrap(), None);
    server.set_rules("packs/@1:wrong packs/@3:cut=10".parse().unwrap());
    publish_to(&reader, &store).unwrap();
    let reader = open(store, "stable").unwrap();
    assert!(verify(&reader, &CancelToken::new(), &|_, _| ())
        .unwrap()
        .is_ok());
}

#[test]
fn a_web_server_is_read_only() {
    let (source, reader) = source(7);
    let server = FaultyServer::start(&source.root()).unwrap();
    server.set_rules("channels/:status=404".parse().unwrap());
    let store = http(&server.url());
    let error = publish_to(&reader, &store).unwrap_err();
    assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
}

#[test]
fn verify_finds_any_damage() {
    let (source, reader) = source(8);
    let check = || verify(&reader, &CancelToken::new(), &|_, _| ()).unwrap();
    let good = check();
    assert!(good.is_ok());
    let slots = reader.manifest().frames().slots();
    assert_eq!((good.blocks, good.bad_blocks), (slots, 0));
    for path in files(&source) {
        let bytes = fs::read(&path).unwrap();
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).unwrap();
            let found = check();
            assert!(!found.is_ok(), "{} at {at}", path.display());
            assert!(
                path.ends_with(&found.problems[0].object),
                "{:?}",
                found.problems
            );
        }
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(!check().is_ok());
        if path.extension().unwrap() == "zst" {
            fs::remove_file(&path).unwrap();
            assert!(check().bad_blocks > 0);
        }
        fs::write(&path, &bytes).unwrap();
    }
    assert!(check().is_ok());
}
