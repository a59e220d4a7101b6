// SPDX-License-Identifier: GPL-2.0

//! Encrypted images: a disk is filled, put back and taken to the next generation from them, with the machine's identity.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;

use common::*;
use pristine_agent::config::{ImageSpec, StoreSpec};
use pristine_agent::failure::Kind;
use pristine_agent::master::Master;
use pristine_agent::store_master::{Access, StoreMaster};
use pristine_metadata::Run;
use pristine_store::TrustPolicy;
use pristine_testkit::{TestStore, TEST_IDENTITY};

const BATCH: u64 = 600;

fn open(
    store: &TestStore,
    access: &Access,
) -> Result<StoreMaster, pristine_agent::failure::Failure> {
    let spec: StoreSpec = store.root().to_str().unwrap().parse().unwrap();
    let channel = ImageSpec::Channel("stable".into());
    let trust = TrustPolicy::default();
    let mut master = StoreMaster::open(&spec.into(), access, &channel, &trust, 2, 2)?;
    // The manifest is read when something is asked of it.
    master.digests(Run { start: 0, end: 1 })?;
    Ok(master)
}

/// A machine's identity in a file, which goes with the directory.
fn with_identity() -> (tempfile::TempDir, Access) {
    let directory = tempfile::tempdir().unwrap();
    let identity = directory.path().join("identity");
    fs::write(&identity, TEST_IDENTITY).unwrap();
    let access = Access {
        identity: Some(identity),
        ..Access::default()
    };
    (directory, access)
}

#[test]
fn a_disk_is_filled_put_back_and_updated_from_an_encrypted_store() {
    let old = Image::new(7, 2300);
    let mut new = old.content.clone();
    new[1000 * BLOCK..1300 * BLOCK].copy_from_slice(&old.content[400 * BLOCK..700 * BLOCK]);
    new[2100 * BLOCK..2110 * BLOCK].copy_from_slice(&Image::new(8, 10).content);
    let store = TestStore::new().unwrap();
    let first = store.add_encrypted(&old.content, "stable").unwrap();
    let (_directory, access) = with_identity();
    let open = |access: &Access| open(&store, access);
    // Provisioning.
    let empty = Platters::new(&old, true);
    let world = run_agent(&empty, &mut open(&access).unwrap(), BATCH);
    check_holds(&world, &empty, &old.content, first.as_bytes());
    // The next generation, by its delta.
    let second = store.add_encrypted(&new, "stable").unwrap();
    let platters = now(&world, true);
    let mut master = open(&access).unwrap();
    let before = master.traffic().bytes;
    let world = run_agent(&platters, &mut master, BATCH);
    check_holds(&world, &platters, &new, second.as_bytes());
    assert!(master.traffic().bytes - before < 200 * BLOCK as u64);
    // Without the identity, or with one that cannot be used.
    let failure = open(&Access::default()).err().unwrap();
    assert_eq!(failure.kind, Kind::Store);
    assert!(
        failure.what.contains("age1") && failure.advice.contains("rewrap"),
        "{failure}"
    );
    let missing = Access {
        identity: Some("/nonexistent/identity".into()),
        ..Access::default()
    };
    assert_eq!(open(&missing).err().unwrap().kind, Kind::Config);
}

#[test]
fn eager_revert_from_an_encrypted_store_converges_wherever_it_is_cut() {
    let image = Image::new(9, 300);
    let store = TestStore::new().unwrap();
    let id = store.add_encrypted(&image.content, "stable").unwrap();
    let (_directory, access) = with_identity();
    for separate in [true, false] {
        let empty = Platters::new(&image, separate);
        let world = run_agent(&empty, &mut open(&store, &access).unwrap(), 24);
        check_holds(&world, &empty, &image.content, id.as_bytes());
        let runs = [
            Run { start: 7, end: 9 },
            Run {
                start: 90,
                end: 170,
            },
        ];
        change(&world, &now(&world, separate), &runs);
        let start = now(&world, separate);
        assert!(start.data[..image.content.len()] != image.content[..]);

        let mut master = open(&store, &access).unwrap();
        let before = master.traffic().bytes;
        let world = run_agent(&start, &mut master, 24);
        check_holds(&world, &start, &image.content, id.as_bytes());
        // What changed, in whole frames, and not the image.
        let fetched = master.traffic().bytes - before;
        assert!(fetched > 0 && fetched < 300 * BLOCK as u64, "{fetched}");

        let ops = world.borrow().ops.clone();
        let mut dice = Dice(42);
        for cut in (0..=ops.len()).step_by(ops.len().div_ceil(12)) {
            let platters = start.after(&ops, cut, &mut dice);
            let world = run_agent(&platters, &mut open(&store, &access).unwrap(), 24);
            check_holds(&world, &platters, &image.content, id.as_bytes());
        }
    }
}
