// SPDX-License-Identifier: GPL-2.0

//! A change of the image by a delta: it costs the delta, and can be cut at any instant (rules 2 and 7 of the contract).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use pristine_agent::config::{ImageSpec, Revert, StoreSpec};
use pristine_agent::flow::{prepare, Fetch, Mode};
use pristine_agent::master::Master;
use pristine_agent::restore::Done;
use pristine_agent::store_master::{Access, StoreMaster};
use pristine_image::delta::make::MakeOptions;
use pristine_image::ImageId;
use pristine_metadata::{BlockState, Changes, Metadata, Run, Select};
use pristine_store::{
    put_delta, CancelToken, ImageReader, ImageSelector, ObjectName, RetryPolicy, TrustPolicy,
};
use pristine_testkit::TestStore;

const BATCH: u64 = 600;

struct Lab {
    store: TestStore,
    old: (ImageId, Vec<u8>),
    new: (ImageId, Vec<u8>),
}

/// Two generations: blocks that changed a little, moved, went and came.
fn lab() -> Lab {
    let old = Image::new(7, 2300).content;
    let mut new = old.clone();
    for at in (0..200 * BLOCK).step_by(997) {
        new[at] ^= 1;
    }
    new[1000 * BLOCK..1300 * BLOCK].copy_from_slice(&old[400 * BLOCK..700 * BLOCK]);
    new[2000 * BLOCK..2020 * BLOCK].fill(0);
    new[2100 * BLOCK..2110 * BLOCK].copy_from_slice(&Image::new(8, 10).content);
    let store = TestStore::new().unwrap();
    let ids = [&old, &new].map(|image| store.add(image, "stable").unwrap());
    let open = |id| {
        let selector = ImageSelector::Id(id);
        let retry = RetryPolicy::once();
        ImageReader::open(store.open().unwrap(), &selector, retry, &CancelToken::new()).unwrap()
    };
    let options = MakeOptions {
        level: 3,
        ..MakeOptions::default()
    };
    let target = store.open().unwrap();
    let [old_reader, new_reader] = ids.map(open);
    let cancel = CancelToken::new();
    put_delta(
        &old_reader,
        &new_reader,
        target.as_ref(),
        &options,
        &|_, _| (),
        &cancel,
    )
    .unwrap();
    Lab {
        store,
        old: (ids[0], old),
        new: (ids[1], new),
    }
}

impl Lab {
    fn master(&self, image: &ImageSpec) -> StoreMaster {
        let store: StoreSpec = self.store.root().to_str().unwrap().parse().unwrap();
        let trust = TrustPolicy::default();
        StoreMaster::open(&store.into(), &Access::default(), image, &trust, 2, 2).unwrap()
    }

    /// What the agent does with a disk.
    fn agent(&self, platters: &Platters, image: &ImageSpec) -> (Shared, Mode, Done, u64) {
        let world = platters.world();
        let mut master = self.master(image);
        let (prepared, done) = eager_agent(platters, &world, &mut master, BATCH).unwrap();
        (world, prepared.mode, done, master.traffic().bytes)
    }

    fn new_spec(&self) -> ImageSpec {
        ImageSpec::Channel("stable".into())
    }

    fn provisioned(&self) -> Platters {
        let image = Image::new(7, 2300);
        let empty = Platters::new(&image, true);
        let (world, ..) = self.agent(&empty, &ImageSpec::Id(*self.old.0.as_bytes()));
        let platters = now(&world, true);
        assert!(platters.data[..self.old.1.len()] == self.old.1);
        platters
    }

    fn check(&self, world: &Shared, platters: &Platters) {
        assert!(world.borrow().data[..self.new.1.len()] == self.new.1);
        let mut metadata = Metadata::open_on(platters.stores(world)).unwrap();
        let (planes, _) = metadata.load().unwrap();
        assert_eq!(planes.count(Select::NotClean), 0);
        assert_eq!(metadata.superblock().image_id, *self.new.0.as_bytes());
    }

    /// What is called clean is the new image's.
    fn check_clean_blocks(&self, platters: &Platters) {
        let world = platters.world();
        let mut metadata = Metadata::open_on(platters.stores(&world)).unwrap();
        let (planes, _) = metadata.load().unwrap();
        let image = match metadata.superblock().image_id {
            id if id == *self.new.0.as_bytes() => &self.new.1,
            _ => &self.old.1,
        };
        for n in 0..image.len() / BLOCK {
            let range = n * BLOCK..(n + 1) * BLOCK;
            if planes.state(n as u64) == BlockState::Clean {
                assert!(platters.data[range.clone()] == image[range], "block {n}");
            }
        }
    }
}

#[test]
fn a_new_generation_costs_its_delta() {
    let lab = lab();
    let platters = lab.provisioned();
    let store = lab.store.open().unwrap();
    let object = ObjectName::Delta {
        new: lab.new.0,
        old: lab.old.0,
    };
    let delta = store.size(&object).unwrap().unwrap();
    let (world, mode, done, bytes) = lab.agent(&platters, &lab.new_spec());
    lab.check(&world, &platters);
    assert_eq!((mode, done.fetched), (Mode::Update, 0));
    assert!(done.updated >= 300);
    // The delta and the channel's pointer, and no manifest at all.
    assert!(
        bytes >= delta && bytes < delta + 2048,
        "{bytes} bytes, the delta has {delta}"
    );
}

#[test]
fn a_disk_with_changes_goes_over_as_well() {
    let lab = lab();
    let mut platters = lab.provisioned();
    // Somebody wrote to blocks that the delta needs and to others, and the target has noted it.
    let world = platters.world();
    let mut metadata = Metadata::open_on(platters.stores(&world)).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    for block in [3u64, 450, 451, 1500, 2299] {
        world.borrow_mut().data[block as usize * BLOCK + 5] ^= 0xff;
        planes.set(
            Run {
                start: block,
                end: block + 1,
            },
            BlockState::Dirty,
        );
    }
    metadata.commit(&planes, &Changes::default()).unwrap();
    drop(metadata);
    platters = now(&world, true);
    let (world, mode, done, _) = lab.agent(&platters, &lab.new_spec());
    lab.check(&world, &platters);
    assert_eq!(mode, Mode::Update);
    assert!(done.fetched > 0 && done.updated > 0);
}

#[test]
fn a_change_by_a_delta_can_be_cut_anywhere() {
    let lab = lab();
    let start = lab.provisioned();
    let (whole, ..) = lab.agent(&start, &lab.new_spec());
    let ops = whole.borrow().ops.clone();
    let mut dice = Dice(4711);
    let step = (ops.len() / 16).max(1);
    for cut in (0..=ops.len()).step_by(step) {
        let platters = start.after(&ops, cut, &mut dice);
        lab.check_clean_blocks(&platters);
        let (second, ..) = lab.agent(&platters, &lab.new_spec());
        lab.check(&second, &platters);
    }
}

/// What goes stale at an instant change of the image is proved by both images' ids, whatever a delta says.
#[test]
fn an_instant_change_does_not_believe_the_delta() {
    let lab = lab();
    let platters = lab.provisioned();
    // Deltas that are cut, garbage, and right: it makes no difference.
    let object = ObjectName::Delta {
        new: lab.new.0,
        old: lab.old.0,
    };
    let path = lab.store.root().join(object.path());
    let good = std::fs::read(&path).unwrap();
    let mut empty = good.clone();
    empty.truncate(good.len() / 2);
    for lie in [empty, vec![0; 1000], good] {
        std::fs::write(&path, lie).unwrap();
        let world = platters.world();
        let mut master = lab.master(&lab.new_spec());
        let mut metadata = Metadata::open_on(platters.stores(&world)).unwrap();
        let (planes, _) = metadata.load().unwrap();
        let prepared =
            prepare(metadata, planes, &mut master, Revert::Instant, Fetch::While).unwrap();
        assert_eq!(prepared.mode, Mode::Update);
        let (old, new) = (&lab.old.1, &lab.new.1);
        for n in 0..new.len() / BLOCK {
            let range = n * BLOCK..(n + 1) * BLOCK;
            let differs = old[range.clone()] != new[range];
            let stale = prepared.planes.state(n as u64) == BlockState::Stale;
            assert_eq!(differs, stale, "block {n}");
        }
    }
}
