// SPDX-License-Identifier: GPL-2.0

//! Exports are the image byte for byte, and go on where they were cut.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use common::{noise_disk, watch, Lab};
use pristine_store::{
    CancelToken, DirStore, FetchOptions, ImageReader, ImageSelector, ObjectName, RetryPolicy, Store,
};
use pristine_testkit::TestStore;
use pristine_transfer::export::{to_device, to_file, to_qemu, to_stream, to_zstd, ExportOptions};
use pristine_transfer::Error;

fn image(store: &TestStore, disk: &[u8]) -> ImageReader {
    let id = store.add(disk, "stable").unwrap();
    let store: Arc<dyn Store> = Arc::new(DirStore::open(&store.root()).unwrap());
    let selector = ImageSelector::Id(id);
    ImageReader::open(store, &selector, RetryPolicy::once(), &CancelToken::new()).unwrap()
}

fn options() -> ExportOptions<'static> {
    ExportOptions {
        fetch: FetchOptions {
            retry: RetryPolicy::once(),
            ..FetchOptions::default()
        },
        replace: false,
        watch: watch(),
    }
}

fn partial_files(lab: &Lab) -> Vec<PathBuf> {
    let entries = fs::read_dir(lab.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.extension().is_some_and(|e| e == "part"))
        .collect()
}

#[test]
fn files_streams_and_formats() {
    let (lab, store) = (Lab::new(), TestStore::new().unwrap());
    let disk = noise_disk(9 << 20);
    let image = image(&store, &disk);
    let exported = to_file(&image, &lab.path("disk.img"), &options()).unwrap();
    assert_eq!(exported.bytes, 9 << 20);
    assert!(fs::read(lab.path("disk.img")).unwrap() == disk);
    let metadata = fs::metadata(lab.path("disk.img")).unwrap();
    assert!(metadata.blocks() * 512 < 8 << 20, "it is sparse");
    assert_eq!(metadata.mode() & 0o077 & !0o044, 0);
    assert!(partial_files(&lab).is_empty());
    // What is there is replaced only when that is asked for.
    let there = to_file(&image, &lab.path("disk.img"), &options());
    assert!(matches!(there, Err(Error::Exists { .. })));
    let replace = ExportOptions {
        replace: true,
        ..options()
    };
    to_file(&image, &lab.path("disk.img"), &replace).unwrap();

    let mut stream = Vec::new();
    to_stream(&image, &mut stream, &options()).unwrap();
    assert!(stream == disk);
    to_zstd(&image, &lab.path("disk.zst"), 3, &options()).unwrap();
    lab.sh("zstd -q -d disk.zst -o unpacked.img");
    lab.sh("cmp disk.img unpacked.img");
    to_qemu(&image, &lab.path("disk.qcow2"), "qcow2", &options()).unwrap();
    lab.sh("qemu-img check disk.qcow2");
    lab.sh("qemu-img compare disk.img disk.qcow2");
    assert!(matches!(
        to_qemu(&image, &lab.path("disk.qcow2"), "qcow2", &options()),
        Err(Error::Exists { .. })
    ));
    assert!(matches!(
        to_device(&image, &lab.path("disk.img"), &options()),
        Err(Error::Usage(_))
    ));
}

#[test]
fn a_cut_export_goes_on_and_believes_nothing() {
    let (lab, store) = (Lab::new(), TestStore::new().unwrap());
    let disk = noise_disk(9 << 20);
    let image = image(&store, &disk);
    // A pack is missing: part of the image is written, then it fails.
    let packs = image.manifest().frames().packs().to_vec();
    assert!(packs.len() > 2);
    let last = store.root().join(ObjectName::Pack(packs[2].id).path());
    let moved = lab.path("moved");
    fs::rename(&last, &moved).unwrap();
    let one = ExportOptions {
        fetch: FetchOptions {
            parallel: 1,
            ..options().fetch
        },
        ..options()
    };
    let output = lab.path("disk.img");
    assert!(to_file(&image, &output, &one).is_err());
    assert!(!output.exists());
    let partial = partial_files(&lab);
    assert_eq!(partial.len(), 1);
    // Somebody writes to what is there: blocks that must not be believed, zero or not, and a tail.
    let mut content = fs::read(&partial[0]).unwrap();
    content[4096 * 2 + 5] ^= 1;
    content[5 << 20] = 7;
    content.extend([9; 10_000]);
    fs::write(&partial[0], content).unwrap();
    fs::rename(&moved, &last).unwrap();
    let exported = to_file(&image, &output, &options()).unwrap();
    assert!(exported.kept_blocks > 100, "{exported:?}");
    assert!(exported.fetched_blocks < 1600, "{exported:?}");
    assert!(fs::read(&output).unwrap() == disk);
    assert!(partial_files(&lab).is_empty());
}

#[test]
fn two_exports_to_one_file_do_not_mix() {
    let (lab, store) = (Lab::new(), TestStore::new().unwrap());
    let disk = noise_disk(5 << 20);
    let image = image(&store, &disk);
    let output = lab.path("disk.img");
    let id: String = image.image().to_string().chars().take(12).collect();
    let held = fs::File::create(lab.path(&format!(".disk.img.{id}.part"))).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert!(matches!(
        to_file(&image, &output, &options()),
        Err(Error::Busy { .. })
    ));
    drop(held);
    to_file(&image, &output, &options()).unwrap();
    assert!(fs::read(&output).unwrap() == disk);
}
