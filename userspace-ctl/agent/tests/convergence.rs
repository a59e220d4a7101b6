// SPDX-License-Identifier: GPL-2.0

//! Rules 2 and 7 of the contract: provisioning, revert and a change of image can be cut at any instant and run again,
//! and end at the same bytes; and at no instant does the metadata call a block clean that is not the master's.
//!
//! Both devices are in memory and record what is done to them. For every prefix of that record, what was not
//! flushed is lost in part (at random, by sector), the agent's steps run again on what is left, and so on.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use pristine_agent::failure::Failure;
use pristine_agent::master::Master;
use pristine_metadata::{BlockState, Class, Metadata, Run, Select};

const BATCH: u64 = 24;

/// What the agent does with a disk; returns the platters' world afterwards.
fn agent(platters: &Platters, master: &mut Image, lying: bool) -> Result<Shared, Failure> {
    let world = platters.world();
    world.borrow_mut().lying = lying;
    eager_agent(platters, &world, master, BATCH)?;
    Ok(world)
}

/// Rule 2, and the superset: what the metadata calls clean is the master's (of the image that it names).
fn check_nothing_is_called_clean_too_early(
    platters: &Platters,
    images: &[&Image],
) -> Result<(), String> {
    let world = platters.world();
    let mut metadata = match Metadata::open_on(platters.stores(&world)) {
        Ok(metadata) => metadata,
        // A format that was cut.
        Err(e) if e.class() == Class::NotFormatted => return Ok(()),
        Err(e) => return Err(format!("the metadata after a cut: {e}")),
    };
    let (planes, _) = metadata
        .load()
        .map_err(|e| format!("the log after a cut: {e}"))?;
    let id = metadata.superblock().image_id;
    let image = images
        .iter()
        .find(|i| i.id() == id)
        .ok_or("an unknown image")?;
    for n in 0..planes.blocks() {
        let local = &platters.data[n as usize * BLOCK..(n as usize + 1) * BLOCK];
        if planes.state(n) == BlockState::Clean && local != image.block(n) {
            return Err(format!("block {n} is called clean and is not the master's"));
        }
    }
    Ok(())
}

fn check_is_master(world: &Shared, platters: &Platters, master: &Image) {
    let world_now = world.borrow();
    assert!(
        world_now.data[..master.content.len()] == master.content[..],
        "the disk is not the master"
    );
    drop(world_now);
    let mut metadata = Metadata::open_on(platters.stores(world)).unwrap();
    let (planes, _) = metadata.load().unwrap();
    assert_eq!(planes.count(Select::NotClean), 0);
    assert!(!metadata.superblock().provisioning);
    assert_eq!(metadata.superblock().image_id, master.id());
}

/// Cuts the agent's work on `start` at every instant; at every fifth, cuts the second run too.
fn cut_everywhere(start: &Platters, master: &Image, others: &[&Image]) {
    let mut images = vec![master];
    images.extend(others);
    let whole = agent(start, &mut master.clone(), false).unwrap();
    check_is_master(&whole, start, master);
    let ops = whole.borrow().ops.clone();
    let mut dice = Dice(4711);
    for cut in 0..=ops.len() {
        for again in 0..2 {
            let platters = start.after(&ops, cut, &mut dice);
            check_nothing_is_called_clean_too_early(&platters, &images)
                .unwrap_or_else(|e| panic!("cut {cut} of {}: {e}", ops.len()));
            let second = agent(&platters, &mut master.clone(), false)
                .unwrap_or_else(|e| panic!("cut {cut} of {}: {e}", ops.len()));
            check_is_master(&second, &platters, master);
            let second_ops = second.borrow().ops.clone();
            if again == 0 && cut % 5 == 0 && !second_ops.is_empty() {
                let cut = dice.roll(second_ops.len() as u64) as usize;
                let platters = platters.after(&second_ops, cut, &mut dice);
                check_nothing_is_called_clean_too_early(&platters, &images).unwrap();
                let third = agent(&platters, &mut master.clone(), false).unwrap();
                check_is_master(&third, &platters, master);
            }
        }
    }
}

/// A provisioned disk on which a session changed some blocks; their extent is dirty too, as after a cut.
fn used(image: &Image, separate: bool) -> Platters {
    let start = Platters::new(image, separate);
    let world = agent(&start, &mut image.clone(), false).unwrap();
    let runs = [
        Run { start: 3, end: 9 },
        Run { start: 40, end: 41 },
        Run { start: 60, end: 95 },
    ];
    change(&world, &start, &runs);
    now(&world, separate)
}

#[test]
fn convergence_of_provisioning() {
    let image = Image::new(1, 150);
    for separate in [true, false] {
        cut_everywhere(&Platters::new(&image, separate), &image, &[]);
    }
}

#[test]
fn convergence_of_revert() {
    let image = Image::new(2, 100);
    for separate in [true, false] {
        cut_everywhere(&used(&image, separate), &image, &[]);
    }
}

#[test]
fn convergence_of_a_change_of_image() {
    let old = Image::new(3, 100);
    let mut new = old.successor(5);
    for separate in [true, false] {
        let start = used(&old, separate);
        // The old image is gone from the store; then it is still there.
        new.known.clear();
        cut_everywhere(&start, &new, &[&old]);
        new.known.push(old.content.clone());
        cut_everywhere(&start, &new, &[&old]);
    }
}

#[test]
fn revert_fetches_only_what_changed() {
    let image = Image::new(2, 100);
    let start = used(&image, true);
    let mut master = image.clone();
    agent(&start, &mut master, false).unwrap();
    let changed = (0..100)
        .filter(|&n| {
            start.data[n * BLOCK..(n + 1) * BLOCK] != image.content[n * BLOCK..(n + 1) * BLOCK]
        })
        .filter(|&n| image.block(n as u64).iter().any(|b| *b != 0))
        .count() as u64;
    assert!(changed > 5);
    assert_eq!(master.traffic.bytes, changed * BLOCK as u64);
}

#[test]
fn a_change_of_image_fetches_only_what_differs() {
    let old = Image::new(3, 100);
    let start = Platters::new(&old, true);
    let world = agent(&start, &mut old.clone(), false).unwrap();
    let start = now(&world, true);
    let mut new = old.successor(5);
    let differ = (0..100u64)
        .filter(|&n| old.block(n) != new.block(n) && new.block(n).iter().any(|b| *b != 0))
        .count() as u64;
    for known in [false, true] {
        if known {
            new.known.push(old.content.clone());
        }
        let mut master = new.clone();
        agent(&start, &mut master, false).unwrap();
        assert_eq!(
            master.traffic.bytes,
            differ * BLOCK as u64,
            "known: {known}"
        );
    }
}

/// The tests above are worth something: without the flush before the commit they fail.
#[test]
fn rule_2_fails_without_the_flush_before_the_commit() {
    let image = Image::new(1, 150);
    let start = Platters::new(&image, true);
    let whole = agent(&start, &mut image.clone(), true).unwrap();
    let ops = whole.borrow().ops.clone();
    let mut dice = Dice(1);
    let caught = (0..=ops.len()).any(|cut| {
        let platters = start.after(&ops, cut, &mut dice);
        check_nothing_is_called_clean_too_early(&platters, &[&image]).is_err()
    });
    assert!(caught);
}
