// SPDX-License-Identifier: GPL-2.0

//! Encrypted images: a disk is filled, put back and taken to the next generation from them, with the machine's identity.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;

use common::*;
use pristine_agent::config::{ImageSpec, StoreList, StoreSpec};
use pristine_agent::failure::Kind;
use pristine_agent::master::Master;
use pristine_agent::store_master::{Access, StoreMaster};
use pristine_metadata::{Metadata, Run, Select};
use pristine_store::TrustPolicy;
use pristine_testkit::{TestStore, TEST_IDENTITY};

const BATCH: u64 = 600;

fn agent(platters: &Platters, master: &mut StoreMaster) -> Shared {
    let world = platters.world();
    eager_agent(platters, &world, master, BATCH).unwrap();
    world
}

fn check(world: &Shared, platters: &Platters, image: &[u8], id: &[u8; 32]) {
    assert!(world.borrow().data[..image.len()] == *image);
    let mut metadata = Metadata::open_on(platters.stores(world)).unwrap();
    let (planes, _) = metadata.load().unwrap();
    assert_eq!(planes.count(Select::NotClean), 0);
    assert_eq!(metadata.superblock().image_id, *id);
}

#[test]
fn a_disk_is_filled_put_back_and_updated_from_an_encrypted_store() {
    let old = Image::new(7, 2300);
    let mut new = old.content.clone();
    new[1000 * BLOCK..1300 * BLOCK].copy_from_slice(&old.content[400 * BLOCK..700 * BLOCK]);
    new[2100 * BLOCK..2110 * BLOCK].copy_from_slice(&Image::new(8, 10).content);
    let store = TestStore::new().unwrap();
    let first = store.add_encrypted(&old.content, "stable").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let identity = directory.path().join("identity");
    fs::write(&identity, TEST_IDENTITY).unwrap();
    let spec: StoreSpec = store.root().to_str().unwrap().parse().unwrap();
    let spec: StoreList = spec.into();
    let channel = ImageSpec::Channel("stable".into());
    let trust = TrustPolicy::default();
    let open = |access: &Access| {
        let opened = StoreMaster::open(&spec, access, &channel, &trust, 2, 2);
        opened.and_then(|mut master| {
            // The manifest is read when something is asked of it.
            master.digests(Run { start: 0, end: 1 })?;
            Ok(master)
        })
    };
    let access = Access {
        identity: Some(identity),
        ..Access::default()
    };
    // Provisioning.
    let empty = Platters::new(&old, true);
    let world = agent(&empty, &mut open(&access).unwrap());
    check(&world, &empty, &old.content, first.as_bytes());
    // The next generation, by its delta.
    let second = store.add_encrypted(&new, "stable").unwrap();
    let platters = now(&world, true);
    let mut master = open(&access).unwrap();
    let before = master.traffic().bytes;
    let world = agent(&platters, &mut master);
    check(&world, &platters, &new, second.as_bytes());
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
