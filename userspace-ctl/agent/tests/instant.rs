// SPDX-License-Identifier: GPL-2.0

//! Rule 7 of the contract for instant reverts, updates and provisioning: one commit to the metadata, which can be cut at
//! any instant and run again. What the managed device would show is what it showed before, changes and all, or the
//! master whole; never a third, and never is anything fetched.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::*;
use pristine_agent::config::Revert;
use pristine_agent::failure::Failure;
use pristine_agent::flow::{prepare, revert_instantly, Fetch, Mode};
use pristine_agent::master::Master;
use pristine_agent::restore::Pace;
use pristine_metadata::{BlockState, Changes, Class, Metadata, Planes, Run, Select, Superblock};

fn load(platters: &Platters) -> Result<(Superblock, Planes), Class> {
    let mut metadata =
        Metadata::open_on(platters.stores(&platters.world())).map_err(|e| e.class())?;
    let (planes, _) = metadata.load().map_err(|e| e.class())?;
    Ok((*metadata.superblock(), planes))
}

/// What the managed device shows once it is active, with a helper that serves.
fn shown(platters: &Platters, images: &[&Image]) -> Vec<u8> {
    let (sb, planes) = load(platters).unwrap();
    let image = images.iter().find(|i| i.id() == sb.image_id).unwrap();
    let mut shown = Vec::new();
    for n in 0..planes.blocks() {
        let local = &platters.data[n as usize * BLOCK..(n as usize + 1) * BLOCK];
        let stale = planes.state(n) == BlockState::Stale;
        shown.extend_from_slice(if stale { image.block(n) } else { local });
    }
    shown
}

/// What the agent does before an instant boot, when its image is `master` now.
fn agent(platters: &Platters, master: &mut Image) -> Result<(Shared, Mode), Failure> {
    let world = platters.world();
    let fetch = Fetch::While;
    let prepared = opened(
        platters,
        &world,
        master,
        fetch,
        |metadata, planes, master| {
            if metadata.superblock().image_id == master.id() {
                revert_instantly(metadata, planes, Revert::Instant)
            } else {
                prepare(metadata, planes, master, Revert::Instant, fetch)
            }
        },
    )?;
    assert_eq!(master.traffic.bytes, 0, "something was fetched");
    Ok((world, prepared.mode))
}

/// A disk in use for a while: blocks changed, and others stale, as the helper had not come to them.
fn used(image: &Image, separate: bool) -> Platters {
    let start = Platters::new(image, separate);
    let (world, mode) = agent(&start, &mut image.clone()).unwrap();
    assert_eq!(mode, Mode::Provision);
    let mut metadata = Metadata::open_on(start.stores(&world)).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    assert_eq!(planes.count(Select::Stale), planes.blocks());
    assert!(!metadata.superblock().provisioning);
    let mut set = |start, end, state, change: bool| {
        for n in start..end {
            let at = n as usize * BLOCK;
            let data = &mut world.borrow_mut().data;
            data[at..at + BLOCK].copy_from_slice(image.block(n));
            if change {
                data[at + 100..at + 150].fill(0xee);
            }
        }
        planes.set(Run { start, end }, state);
    };
    set(0, 50, BlockState::Clean, false);
    set(3, 9, BlockState::Dirty, true);
    set(40, 41, BlockState::Dirty, true);
    set(60, 80, BlockState::Dirty, true);
    metadata.commit(&planes, &Changes::default()).unwrap();
    now(&world, separate)
}

/// Cuts the agent's work on `start` at every instant; it runs again on what that leaves.
fn cut_everywhere(start: &Platters, master: &Image, images: &[&Image]) {
    let old = shown(start, images);
    let (whole, _) = agent(start, &mut master.clone()).unwrap();
    let ops = whole.borrow().ops.clone();
    assert!(ops.iter().all(|op| match op {
        Op::Write(Side::Data, ..) => !start.separate,
        _ => true,
    }));
    let mut dice = Dice(4711);
    let (mut olds, mut news) = (0, 0);
    for cut in 0..=ops.len() {
        for _ in 0..20 {
            let platters = start.after(&ops, cut, &mut dice);
            match shown(&platters, images) {
                s if s == master.content => news += 1,
                s if s == old => olds += 1,
                _ => panic!("cut {cut} of {}: neither old nor new", ops.len()),
            }
            let (again, _) = agent(&platters, &mut master.clone()).unwrap();
            let after = now(&again, start.separate);
            assert!(shown(&after, images) == master.content, "cut {cut}");
            let (sb, planes) = load(&after).unwrap();
            assert_eq!(planes.count(Select::Dirty), 0);
            assert_eq!((sb.image_id, sb.generation), (master.id(), 1));
        }
    }
    assert!(olds > 10 && news > 10, "{olds} old, {news} new");
}

#[test]
fn convergence_of_an_instant_revert() {
    let image = Image::new(2, 100);
    for separate in [true, false] {
        cut_everywhere(&used(&image, separate), &image, &[&image]);
    }
}

#[test]
fn convergence_of_an_instant_change_of_image() {
    let old = Image::new(3, 100);
    let mut new = old.successor(5);
    for separate in [true, false] {
        let start = used(&old, separate);
        new.known.clear();
        cut_everywhere(&start, &new, &[&old, &new]);
        new.known.push(old.content.clone());
        cut_everywhere(&start, &new, &[&old, &new]);
        // What both images have stays where it is.
        let (world, mode) = agent(&start, &mut new.clone()).unwrap();
        assert_eq!(mode, Mode::Update);
        let (_, planes) = load(&now(&world, separate)).unwrap();
        assert!((0..50).any(|n| planes.state(n) == BlockState::Clean));
    }
}

#[test]
fn convergence_of_instant_provisioning() {
    let image = Image::new(1, 150);
    for separate in [true, false] {
        let start = Platters::new(&image, separate);
        let (whole, _) = agent(&start, &mut image.clone()).unwrap();
        let ops = whole.borrow().ops.clone();
        let mut dice = Dice(11);
        for cut in 0..=ops.len() {
            let platters = start.after(&ops, cut, &mut dice);
            match load(&platters) {
                Ok(_) => assert!(shown(&platters, &[&image]) == image.content),
                Err(class) => assert_eq!(class, Class::NotFormatted),
            }
            let (again, _) = agent(&platters, &mut image.clone()).unwrap();
            assert!(shown(&now(&again, separate), &[&image]) == image.content);
        }
    }
}

/// Whoever prefers a whole disk before the boot gets it from what an instant revert left.
#[test]
fn convergence_of_eager_after_instant() {
    let image = Image::new(2, 100);
    for separate in [true, false] {
        let start = used(&image, separate);
        let (world, _) = agent(&start, &mut image.clone()).unwrap();
        let mut metadata = Metadata::open_on(start.stores(&world)).unwrap();
        let (planes, _) = metadata.load().unwrap();
        let mut master = image.clone();
        let mut prepared =
            prepare(metadata, planes, &mut master, Revert::Eager, Fetch::Before).unwrap();
        let mut quiet = |_| {};
        let mut disk = Device(world.clone(), Side::Data);
        prepared
            .finish(
                &mut disk,
                &mut master,
                24,
                &mut Pace::new(Duration::ZERO, &mut quiet),
            )
            .unwrap();
        assert!(world.borrow().data[..image.content.len()] == image.content[..]);
        let (_, planes) = load(&now(&world, separate)).unwrap();
        assert_eq!(planes.count(Select::NotClean), 0);
    }
}

#[test]
fn nothing_is_written_when_nothing_is_dirty() {
    let image = Image::new(2, 100);
    let start = used(&image, true);
    let (world, mode) = agent(&start, &mut image.clone()).unwrap();
    assert_eq!(mode, Mode::Revert);
    let after = now(&world, true);
    let (world, mode) = agent(&after, &mut image.clone()).unwrap();
    assert_eq!(mode, Mode::Serve);
    assert!(world.borrow().ops.is_empty());
}
