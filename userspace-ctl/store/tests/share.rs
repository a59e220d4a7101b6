// SPDX-License-Identifier: GPL-2.0

//! Each block is stored once, and two images are compared by block, by file and by package.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use common::open;
use pristine_image::{build, BuildOptions, Built, Known, ReadAt, Source};
use pristine_store::compare::{compare, compare_files, FileStatus};
use pristine_store::{
    check_packs, known_blocks, publish, repack, verify, CancelToken, FetchOptions, ImageBlocks,
    ImageReader, ImageSelector, ObjectName, PublishOptions, RetryPolicy, Store, StorePacks,
};
use pristine_testkit::{noise, sample_image, TestStore};

fn build_into(store: &Arc<dyn Store>, path: &Path, known: Arc<Known>) -> Built {
    let options = BuildOptions {
        level: 1,
        pack_target: 1 << 20,
        known,
        ..BuildOptions::default()
    };
    let source = Source::open(path).unwrap();
    let mut packs = StorePacks(store.as_ref());
    let built = build(
        &source,
        &options,
        &mut packs,
        &|_| (),
        &AtomicBool::new(false),
    )
    .unwrap();
    store
        .put(&ObjectName::Manifest(built.image), &built.manifest)
        .unwrap();
    built
}

fn reader(store: &Arc<dyn Store>, built: &Built) -> ImageReader {
    let selector = ImageSelector::Id(built.image);
    let retry = RetryPolicy::once();
    ImageReader::open(Arc::clone(store), &selector, retry, &CancelToken::new()).unwrap()
}

fn known(store: &Arc<dyn Store>) -> Arc<Known> {
    let found = known_blocks(store, None, &CancelToken::new(), &|_, _| ()).unwrap();
    assert!(found.skipped.is_empty(), "{:?}", found.skipped);
    found.known
}

fn pack_bytes(store: &TestStore) -> u64 {
    let packs = fs::read_dir(store.root().join("packs")).unwrap();
    let packs = packs.flat_map(|directory| fs::read_dir(directory.unwrap().path()).unwrap());
    packs
        .map(|pack| pack.unwrap().metadata().unwrap().len())
        .sum()
}

/// Two images that have most in common, in another order.
fn two() -> (Vec<u8>, Vec<u8>) {
    let first = sample_image(1, 16);
    let mut second = noise(77, 1 << 20);
    second.extend_from_slice(&first[2 << 20..]);
    second.extend_from_slice(&first[..1 << 20]);
    (first, second)
}

#[test]
fn a_store_holds_each_block_once() {
    let lab = tempfile::tempdir().unwrap();
    let (first, second) = two();
    let (one, two) = (lab.path().join("one"), lab.path().join("two"));
    fs::write(&one, &first).unwrap();
    fs::write(&two, &second).unwrap();
    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    build_into(&store, &one, Arc::default());
    let before = pack_bytes(&target);
    let built = build_into(&store, &two, known(&store));
    assert_eq!(built.unique_blocks - built.shared_blocks, 256);
    assert!(pack_bytes(&target) < before + (1 << 20) + 65536);
    let image = reader(&store, &built);
    check_packs(store.as_ref(), image.manifest()).unwrap();
    let verified = verify(&image, &CancelToken::new(), &|_, _| ()).unwrap();
    assert!(verified.is_ok(), "{:?}", verified.problems);
    // One request for any block, also of frames in packs of another image.
    struct Nowhere;
    impl pristine_store::BlockSink for Nowhere {
        fn blocks(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            Ok(())
        }
        fn zeros(&self, _: std::ops::Range<u64>) -> std::io::Result<()> {
            Ok(())
        }
    }
    for block in (0..image.blocks()).step_by(37) {
        let report = image
            .fetch(
                std::iter::once(block..block + 1),
                &FetchOptions::default(),
                &Nowhere,
            )
            .unwrap();
        assert!(report.requests <= 1, "block {block}: {report:?}");
    }
    // Any place of it reads back, in large parts and in small ones.
    let blocks = ImageBlocks::new(Arc::new(image));
    let mut content = vec![1; second.len()];
    blocks.read_at(0, &mut content).unwrap();
    assert!(content == second);
    let mut part = vec![0; 10_000];
    blocks.read_at((1 << 20) - 5000, &mut part).unwrap();
    assert!(part == second[(1 << 20) - 5000..][..10_000]);
    assert!(blocks.read_at(second.len() as u64 - 1, &mut part).is_err());

    // Once more the same: nothing is stored.
    let before = pack_bytes(&target);
    let again = build_into(&store, &two, known(&store));
    assert_eq!((again.packs, pack_bytes(&target)), (0, before));
    // A pack that is gone is noticed before anybody relies on it.
    let image = reader(&store, &again);
    let pack = image.manifest().frames().packs()[0].id;
    fs::remove_file(target.root().join(ObjectName::Pack(pack).path())).unwrap();
    assert!(check_packs(store.as_ref(), image.manifest()).is_err());
    let without = build_into(&store, &one, known(&store));
    assert!(without.packs > 0);
    check_packs(store.as_ref(), reader(&store, &without).manifest()).unwrap();
}

#[test]
fn what_was_built_elsewhere_is_published_in_new_packs() {
    let lab = tempfile::tempdir().unwrap();
    let (first, second) = two();
    let (target, _) = TestStore::with_image(&first).unwrap();
    let (_elsewhere, other) = {
        let elsewhere = TestStore::new().unwrap();
        elsewhere.add(&second, "made").unwrap();
        let reader = open(elsewhere.open().unwrap(), "made").unwrap();
        (elsewhere, reader)
    };
    let store = target.open().unwrap();
    let room = TestStore::new().unwrap();
    let scratch = || Ok(room.open().unwrap());
    let cancel = CancelToken::new();
    let repacked = repack(&other, &store, &scratch, &cancel, &|_| ())
        .unwrap()
        .unwrap();
    assert_eq!(repacked.image(), other.image());
    let before = pack_bytes(&target);
    let options = PublishOptions {
        dry_run: true,
        ..PublishOptions::default()
    };
    let channel = "stable".parse().unwrap();
    let planned = publish(&repacked, &store, &channel, &options, &|_, _| ()).unwrap();
    let options = PublishOptions::default();
    let published = publish(&repacked, &store, &channel, &options, &|_, _| ()).unwrap();
    assert_eq!(planned.sent_bytes, published.sent_bytes);
    assert!(pack_bytes(&target) < before + (1 << 20) + 65536);
    let image = open(Arc::clone(&store), "stable").unwrap();
    assert_eq!(image.image(), other.image());
    let verified = verify(&image, &cancel, &|_, _| ()).unwrap();
    assert!(verified.is_ok(), "{:?}", verified.problems);
    // Nothing is to be saved now, nor where nothing is shared.
    let scratch = || panic!("no room is needed");
    assert!(repack(&other, &store, &scratch, &cancel, &|_| ())
        .unwrap()
        .is_none());
    let (_third, _) = TestStore::with_image(&noise(5, 1 << 20)).unwrap();
    let third = _third.open().unwrap();
    assert!(repack(&other, &third, &scratch, &cancel, &|_| ())
        .unwrap()
        .is_none());
    drop(lab);
}

fn shell(directory: &Path, line: &str) {
    let output = Command::new("/bin/bash")
        .args(["-ec", line])
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn images_are_compared_by_file_and_by_package() {
    let lab = tempfile::tempdir().unwrap();
    let path = |name: &str| lab.path().join(name);
    fs::create_dir_all(path("tree/var/lib/dpkg/info")).unwrap();
    fs::create_dir_all(path("tree/usr/bin")).unwrap();
    let status = |versions: &[(&str, &str)]| {
        let paragraphs = versions.iter().map(|(name, version)| {
            format!("Package: {name}\nStatus: install ok installed\nVersion: {version}\n")
        });
        paragraphs.collect::<Vec<_>>().join("\n")
    };
    let write = |name: &str, content: &[u8]| fs::write(path("tree").join(name), content).unwrap();
    write(
        "var/lib/dpkg/status",
        status(&[("tool", "1.0"), ("same", "1"), ("old", "3")]).as_bytes(),
    );
    write(
        "var/lib/dpkg/info/tool:amd64.list",
        b"/.\n/bin\n/bin/tool\n",
    );
    write("var/lib/dpkg/info/same.list", b"/.\n/usr/bin/same\n");
    write("var/lib/dpkg/info/old.list", b"/.\n/usr/bin/old\n");
    write("usr/bin/tool", &noise(1, 300_000));
    write("usr/bin/same", &noise(2, 200_000));
    write("usr/bin/old", &noise(3, 50_000));
    write("root-file", &noise(4, 9000));
    shell(
        lab.path(),
        "truncate -s 40M one && mke2fs -q -F -t ext4 -b 4096 -d tree one",
    );
    // The next one is made anew in another order, so that what is the same lies elsewhere.
    write(
        "var/lib/dpkg/status",
        status(&[("tool", "2.0"), ("same", "1"), ("fresh", "7")]).as_bytes(),
    );
    fs::rename(
        path("tree/var/lib/dpkg/info/old.list"),
        path("tree/var/lib/dpkg/info/fresh.list"),
    )
    .unwrap();
    write("var/lib/dpkg/info/fresh.list", b"/.\n/usr/bin/fresh\n");
    fs::remove_file(path("tree/usr/bin/old")).unwrap();
    write("usr/bin/fresh", &noise(5, 100_000));
    let mut tool = noise(1, 300_000);
    tool[150_000] ^= 1;
    write("usr/bin/tool", &tool);
    write("a-first", &noise(6, 70_000));
    shell(
        lab.path(),
        "truncate -s 40M two && mke2fs -q -F -t ext4 -b 4096 -d tree two",
    );

    let target = TestStore::new().unwrap();
    let store = target.open().unwrap();
    let one = build_into(&store, &path("one"), Arc::default());
    let two = build_into(&store, &path("two"), known(&store));
    let (one, two) = (
        Arc::new(reader(&store, &one)),
        Arc::new(reader(&store, &two)),
    );
    let comparison = compare(&one, &two, &CancelToken::new()).unwrap();
    assert_eq!(
        comparison.changed,
        comparison.zero + comparison.moved + comparison.new
    );
    let result = compare_files(&one, &two, &comparison).unwrap();
    assert_eq!(result.unknown, None);
    let file = |path: &str| {
        let file = result.files.iter().find(|file| file.path == path);
        file.map(|file| (file.status, file.new, file.package.as_deref()))
    };
    assert_eq!(
        file("/usr/bin/tool"),
        Some((FileStatus::Changed, 1, Some("tool")))
    );
    assert_eq!(
        file("/usr/bin/fresh"),
        Some((FileStatus::Added, 25, Some("fresh")))
    );
    assert_eq!(
        file("/usr/bin/old"),
        Some((FileStatus::Removed, 0, Some("old")))
    );
    assert_eq!(file("/a-first"), Some((FileStatus::Added, 18, None)));
    let same = file("/usr/bin/same").map(|(status, new, _)| (status, new));
    assert!(
        same.is_none_or(|same| same == (FileStatus::Moved, 0)),
        "{same:?}"
    );
    let packages = result.packages.unwrap();
    let of = |name: &str| {
        let package = packages
            .iter()
            .find(|package| package.package == name)
            .unwrap();
        (
            package.old.as_deref(),
            package.new.as_deref(),
            package.files,
            package.new_blocks,
        )
    };
    assert_eq!(of("tool"), (Some("1.0"), Some("2.0"), 1, 1));
    assert_eq!(of("fresh"), (None, Some("7"), 1, 25));
    assert_eq!(of("old"), (Some("3"), None, 1, 0));
    assert_eq!(
        packages.len(),
        3,
        "what is the same is not told: {packages:?}"
    );

    // The same images: nothing differs. Other file systems: blocks alone.
    let nothing = compare(&one, &one, &CancelToken::new()).unwrap();
    assert!(nothing.changes.is_empty());
    assert!(compare_files(&one, &one, &nothing)
        .unwrap()
        .files
        .is_empty());
    let id = target.add(&noise(1, 1 << 20), "noise").unwrap();
    let raw = Arc::new(open(store, "noise").unwrap());
    assert_eq!(raw.image(), id);
    let comparison = compare(&one, &raw, &CancelToken::new()).unwrap();
    let unknown = compare_files(&one, &raw, &comparison)
        .unwrap()
        .unknown
        .unwrap();
    assert!(unknown.contains("ext4"), "{unknown}");
}
