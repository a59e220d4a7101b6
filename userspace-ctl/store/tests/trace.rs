// SPDX-License-Identifier: GPL-2.0

//! Boot traces in stores: garbage is told, the next generation inherits, garbage collection removes.

// A single run of blocks is a trace, too.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::{open, publish_to, quick};
use pristine_store::{collect, put_trace, read_trace, Error, GcOptions, ObjectName, Put};
use pristine_testkit::{noise, TestStore};

#[test]
fn a_trace_is_put_once_and_garbage_is_told() {
    let (lab, image) = TestStore::with_image(&noise(1, 4 << 20)).unwrap();
    let store = lab.open().unwrap();
    assert_eq!(read_trace(store.as_ref(), image).unwrap(), None);
    let order = [700..710, 0..3];
    let put = |order: &[_]| put_trace(store.as_ref(), image, order).unwrap();
    assert_eq!(put(&order), Put::Created);
    assert_eq!(put(&[5..6]), Put::AlreadyThere);
    let read = read_trace(store.as_ref(), image).unwrap();
    assert_eq!(read.as_deref(), Some(&order[..]));
    let path = lab.root().join(ObjectName::Trace(image).path());
    std::fs::write(&path, b"pristine-trace 1\n0 99999999999\n").unwrap();
    let error = read_trace(store.as_ref(), image).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
    std::fs::write(&path, vec![b'x'; 5 << 20]).unwrap();
    let error = read_trace(store.as_ref(), image).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

#[test]
fn the_next_generation_inherits_the_order_and_gc_removes_it_with_its_image() {
    let mut content = noise(1, 6 << 20);
    let (lab, first) = TestStore::with_image(&content).unwrap();
    let store = lab.open().unwrap();
    put_trace(store.as_ref(), first, &[900..910, 20..24]).unwrap();
    // Blocks 20 to 21 go to 1400, 902 changes.
    content.copy_within(20 * 4096..22 * 4096, 1400 * 4096);
    content[20 * 4096..22 * 4096].fill(0);
    content[902 * 4096] ^= 1;
    let second = lab.add(&content, "stable").unwrap();
    let inherited = read_trace(store.as_ref(), second).unwrap().unwrap();
    assert_eq!(inherited, [900..910, 1400..1402, 22..24]);

    // One that is there already is left alone; one that is damaged is as good as none.
    content[0] ^= 1;
    std::fs::write(
        lab.root().join(ObjectName::Trace(second).path()),
        b"garbage",
    )
    .unwrap();
    let third = lab.add(&content, "stable").unwrap();
    assert_eq!(read_trace(store.as_ref(), third).unwrap(), None);
    put_trace(store.as_ref(), third, &[7..8]).unwrap();
    let reader = open(lab.open().unwrap(), "stable").unwrap();
    let published = publish_to(&reader, &store, "other");
    assert_eq!(published.unwrap().trace_runs, 0);

    let options = GcOptions {
        keep: 1,
        grace: Duration::ZERO,
        retry: quick(),
        ..GcOptions::default()
    };
    let collected = collect(&store, &options, &|_, _| ()).unwrap();
    assert_eq!(collected.removed_images.len(), 2);
    for gone in [first, second] {
        assert_eq!(store.size(&ObjectName::Trace(gone)).unwrap(), None);
    }
    let kept = read_trace(store.as_ref(), third).unwrap();
    assert_eq!(kept, Some(vec![7..8]));
}
