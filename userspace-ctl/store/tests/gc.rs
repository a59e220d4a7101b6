// SPDX-License-Identifier: GPL-2.0

//! Garbage collection, pins and promotion, on a directory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::{open, quick};
use pristine_store::{
    collect, pin, pin_name, pins, promote, publish, unpin, verify, CancelToken, ChannelName,
    Collected, Error, ErrorKind, GcOptions, ImageId, ImageSelector, Lease, LeaseOptions, NoteKind,
    NoteName, Pin, PublishOptions, Result, Store,
};
use pristine_testkit::{sample_image, TestStore};

fn channel(name: &str) -> ChannelName {
    name.parse().unwrap()
}

fn options(keep: u64) -> GcOptions {
    GcOptions {
        keep,
        grace: Duration::ZERO,
        retry: quick(),
        ..GcOptions::default()
    }
}

fn gc(store: &Arc<dyn Store>, options: &GcOptions) -> Result<Collected> {
    collect(store, options, &|_, _| ())
}

/// A store with images on `stable`, one generation each.
fn generations(count: u64) -> (TestStore, Arc<dyn Store>, Vec<ImageId>) {
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    let images = (0..count)
        .map(|seed| {
            let (source, id) = TestStore::with_image(&sample_image(seed * 10, 4)).unwrap();
            let reader = open(source.open().unwrap(), "stable").unwrap();
            let options = PublishOptions::default();
            publish(&reader, &store, &channel("stable"), &options, &|_, _| ()).unwrap();
            id
        })
        .collect();
    (target, store, images)
}

fn files(store: &TestStore) -> Vec<(PathBuf, u64)> {
    let list = |path: PathBuf| fs::read_dir(path).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<PathBuf> = list(store.root().join("images")).collect();
    files.extend(list(store.root().join("packs")).flat_map(list));
    let len = |path: PathBuf| (path.clone(), path.metadata().unwrap().len());
    let mut files: Vec<_> = files.into_iter().map(len).collect();
    files.sort();
    files
}

fn bytes(files: &[(PathBuf, u64)]) -> u64 {
    files.iter().map(|(_, len)| len).sum()
}

#[test]
fn just_what_is_not_needed_goes_and_a_dry_run_says_so() {
    let (target, store, images) = generations(4);
    let before = files(&target);
    let planned = gc(
        &store,
        &GcOptions {
            dry_run: true,
            ..options(2)
        },
    )
    .unwrap();
    assert_eq!(files(&target), before);
    let collected = gc(&store, &options(2)).unwrap();
    assert_eq!(collected.removed, planned.removed);
    assert_eq!(collected.removed_images.len(), 2);
    let after = files(&target);
    assert_eq!(bytes(&before) - bytes(&after), collected.removed.bytes);
    assert_eq!(bytes(&after), collected.kept.bytes);
    assert_eq!(
        (before.len() - after.len()) as u64,
        collected.removed.objects
    );
    for (number, image) in images.iter().enumerate() {
        match open(Arc::clone(&store), &image.to_string()) {
            Ok(reader) => {
                assert!(number >= 2);
                let verified = verify(&reader, &CancelToken::new(), &|_, _| ()).unwrap();
                assert!(verified.is_ok(), "{verified:?}");
            }
            Err(error) => assert!(number < 2, "{error}"),
        }
    }
    // Nothing is left of the work itself, and nothing more to do.
    assert_eq!(store.notes(NoteKind::Lease).unwrap(), vec![]);
    assert_eq!(gc(&store, &options(2)).unwrap().removed.objects, 0);
}

#[test]
fn what_is_young_stays() {
    let (_target, store, _) = generations(3);
    let collected = gc(
        &store,
        &GcOptions {
            grace: Duration::from_secs(3600),
            ..options(1)
        },
    )
    .unwrap();
    assert_eq!(collected.removed.objects, 0);
    assert!(collected.young.objects > 0 && collected.young.bytes > 0);
}

#[test]
fn pins_keep_images_up_to_their_end() {
    let (_target, store, images) = generations(3);
    let (lease, cancel) = (LeaseOptions::default(), CancelToken::new());
    let until = |until| Pin {
        image: images[0],
        until,
        by: "me".to_owned(),
    };
    let name = pin_name("release").unwrap();
    pin(&store, &name, &until(None), &lease, &cancel).unwrap();
    // The name is taken for another image; the same one may get another time.
    let other = Pin {
        image: images[1],
        ..until(None)
    };
    let error = pin(&store, &name, &other, &lease, &cancel).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    pin(&store, &name, &until(Some(u64::MAX)), &lease, &cancel).unwrap();
    let collected = gc(&store, &options(1)).unwrap();
    assert_eq!(collected.removed_images, [images[1]]);
    assert_eq!(pins(store.as_ref()).unwrap().len(), 1);
    // What is not there cannot be pinned.
    let error = pin(&store, &pin_name("late").unwrap(), &other, &lease, &cancel).unwrap_err();
    assert!(matches!(error, Error::NoImage { .. }), "{error}");
    pin(&store, &name, &until(Some(1)), &lease, &cancel).unwrap();
    let collected = gc(&store, &options(1)).unwrap();
    assert_eq!(collected.removed_images, [images[0]]);
    assert_eq!(collected.ended_pins, ["release"]);
    assert!(!unpin(store.as_ref(), &name).unwrap());
}

#[test]
fn promotion_copies_nothing() {
    let (target, store, images) = generations(2);
    let before = files(&target);
    let from: ImageSelector = "stable".parse().unwrap();
    let options = PublishOptions::default();
    let promoted = promote(&store, &from, &channel("live"), &options).unwrap();
    assert_eq!(promoted.sent_objects, 0);
    assert_eq!(promoted.release.release().image, images[1]);
    assert_eq!(files(&target), before);
    let from = ImageSelector::Id(images[0]);
    let promoted = promote(&store, &from, &channel("live"), &options).unwrap();
    let release = promoted.release.release();
    assert_eq!((release.generation, release.parent), (2, Some(images[1])));
    // An image that lacks a pack is not promoted.
    let pack = files(&target).pop().unwrap().0;
    fs::remove_file(pack).unwrap();
    let both = [images[0], images[1]].map(ImageSelector::Id);
    let results = both.map(|from| promote(&store, &from, &channel("new"), &options));
    let missing = |result: &Result<_>| matches!(result, Err(Error::NotFound { .. }));
    assert!(results.iter().any(missing), "{results:?}");
}

#[test]
fn collectors_and_writers_keep_apart() {
    let (_target, store, _) = generations(2);
    let writer = Lease::write(
        &store,
        "publish",
        &LeaseOptions::default(),
        &CancelToken::new(),
        &|_| (),
    )
    .unwrap();
    let error = gc(&store, &options(1)).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    assert!(error.to_string().contains("publish by process"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    drop(writer);
    // A writer waits for a collector; this one gives up.
    let collector = Lease::collect(&store, &LeaseOptions::default()).unwrap();
    let cancel = CancelToken::new();
    let waiting = |who: &str| {
        assert!(who.contains("gc by process"), "{who}");
        cancel.cancel();
    };
    let error = Lease::write(
        &store,
        "publish",
        &LeaseOptions::default(),
        &cancel,
        &waiting,
    )
    .unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let error = gc(&store, &options(1)).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    drop(collector);
    assert_eq!(store.notes(NoteKind::Lease).unwrap(), vec![]);
    gc(&store, &options(1)).unwrap();
}

#[test]
fn leases_of_the_dead_do_not_count_for_long() {
    let (target, store, _) = generations(2);
    let name = NoteName::new(NoteKind::Lease, "write-dead").unwrap();
    store.write_note(&name, b"pristine-lease 1\n").unwrap();
    assert!(gc(&store, &options(1)).is_err());
    let file = fs::File::options()
        .write(true)
        .open(target.root().join(name.path()))
        .unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(400);
    file.set_modified(old).unwrap();
    gc(&store, &options(1)).unwrap();
    assert_eq!(store.notes(NoteKind::Lease).unwrap(), vec![]);
}

#[test]
fn nothing_goes_while_it_cannot_be_told_what_is_needed() {
    let (target, store, images) = generations(3);
    let damage = |path: PathBuf| {
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 3] ^= 1;
        fs::write(&path, bad).unwrap();
        let before = files(&target);
        let error = gc(&store, &options(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        assert_eq!(files(&target), before);
        fs::write(&path, good).unwrap();
    };
    damage(target.root().join("channels/stable"));
    // Anywhere in what is always read of it: its head.
    let manifest = target.root().join(format!("images/{}.manifest", images[2]));
    let good = fs::read(&manifest).unwrap();
    fs::write(&manifest, &good[..100]).unwrap();
    let error = gc(&store, &options(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    fs::remove_file(&manifest).unwrap();
    let error = gc(&store, &options(1)).unwrap_err();
    assert!(matches!(error, Error::NoImage { .. }), "{error}");
    fs::write(&manifest, &good).unwrap();
    let pin = NoteName::new(NoteKind::Pin, "odd").unwrap();
    store
        .write_note(&pin, b"pristine-pin 1\nimage x\n")
        .unwrap();
    let error = gc(&store, &options(1)).unwrap_err();
    assert!(error.to_string().contains("pin odd"), "{error}");
    store.remove_note(&pin).unwrap();
    assert_eq!(gc(&store, &options(1)).unwrap().removed_images.len(), 2);
}
