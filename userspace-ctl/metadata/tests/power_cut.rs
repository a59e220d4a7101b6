// SPDX-License-Identifier: GPL-2.0

//! A format and a commit that are cut leave the old state, or none, or the new: never a third.

#![allow(clippy::unwrap_used)]

mod common;

use common::{disks_of, open, stores, Content, Cut, Machine, Random};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::PAGE_SIZE;
use pristine_metadata::{
    format_on, BlockState, Changes, Class, FormatOptions, Image, Initial, Planes, Run, Select,
    Superblock,
};

/// Enough for two plane pages of each plane, so that checkpoints have parts.
const MANAGED: u64 = 40_000 * 4096;

const BOTH: [Placement; 2] = [Placement::Separate, Placement::Tail];

/// Blank disks for `managed` bytes; a blank one is not a zeroed one.
fn blank(placement: Placement, managed: u64) -> Machine {
    let pages = managed / PAGE_SIZE as u64;
    match placement {
        Placement::Tail => Machine::new(vec![Content::new(pages + 60, 0x5a)]),
        Placement::Separate => {
            Machine::new(vec![Content::new(pages + 1, 0x5a), Content::new(60, 0x5a)])
        }
    }
}

fn small(placement: Placement) -> (Machine, u64) {
    let managed = 300 * 4096;
    (blank(placement, managed), managed)
}

fn options(managed: u64, initial: Initial) -> FormatOptions {
    FormatOptions {
        managed_bytes: Some(managed),
        log_pages: Some(16),
        initial,
        force: true,
        ..FormatOptions::default()
    }
}

fn state(
    disks: Vec<Content>,
    placement: Placement,
) -> pristine_metadata::Result<(Superblock, Planes)> {
    let mut metadata = open(disks, placement)?;
    let (planes, _) = metadata.load()?;
    let mut superblock = *metadata.superblock();
    // Healing a copy is no change of state.
    superblock.sequence = 0;
    Ok((superblock, planes))
}

fn scatter(planes: &mut Planes, random: &mut Random) {
    for _ in 0..20 {
        let start = random.below(planes.blocks());
        let run = Run {
            start,
            end: start + 1 + random.below(9000),
        };
        let to = [BlockState::Clean, BlockState::Dirty, BlockState::Stale];
        planes.set(run, to[random.below(3) as usize]);
    }
}

#[test]
fn power_cut_in_a_commit_leaves_the_old_or_the_new_state() {
    let mut states = 0;
    for placement in BOTH {
        let first = blank(placement, MANAGED);
        let mut metadata =
            format_on(stores(&first, placement), &options(MANAGED, Initial::Stale)).unwrap();
        let mut random = Random::new(7);
        let (mut planes, _) = metadata.load().unwrap();
        for round in 0..4 {
            let old = state(disks_of(&mut metadata), placement).unwrap();
            let machine = Machine::new(disks_of(&mut metadata));
            metadata = pristine_metadata::Metadata::open_on(stores(&machine, placement)).unwrap();
            metadata.load().unwrap();
            scatter(&mut planes, &mut random);
            let changes = Changes {
                image: Some(Image {
                    id: [round; 32],
                    generation: round.into(),
                    bytes: MANAGED - 5,
                }),
                provisioning: Some(round % 2 == 0),
                needs_check: None,
                keep_undo: false,
            };
            metadata.commit(&planes, &changes).unwrap();
            let new = state(disks_of(&mut metadata), placement).unwrap();
            assert_ne!(old, new);
            assert_eq!(new.1, planes);
            let (mut olds, mut news) = (0, 0);
            states += machine.each_cut(
                30,
                &[Cut::None, Cut::All, Cut::Some, Cut::Garbled],
                |disks, name| {
                    let found = state(disks, placement).unwrap_or_else(|e| panic!("{name}: {e}"));
                    match found {
                        s if s == old => olds += 1,
                        s if s == new => news += 1,
                        s => panic!("{name}: {:?}", s.0),
                    }
                },
            );
            assert!(olds > 50 && news > 50, "{olds} old, {news} new");
        }
    }
    assert!(states > 1000, "{states} states");
}

#[test]
fn power_cut_after_power_cut_converges() {
    for placement in BOTH {
        let (machine, managed) = small(placement);
        let mut metadata = format_on(
            stores(&machine, placement),
            &options(managed, Initial::Stale),
        )
        .unwrap();
        let mut random = Random::new(11);
        let mut disks = disks_of(&mut metadata);
        for round in 0..150u64 {
            let old = state(disks.clone(), placement).unwrap();
            let machine = Machine::new(disks);
            let mut metadata =
                pristine_metadata::Metadata::open_on(stores(&machine, placement)).unwrap();
            let (mut planes, _) = metadata.load().unwrap();
            scatter(&mut planes, &mut random);
            metadata.commit(&planes, &Changes::default()).unwrap();
            let new = state(disks_of(&mut metadata), placement).unwrap();
            // The next round starts from what the cut left, superblock copies that differ and all.
            let at = random.below(machine.points() as u64) as usize;
            let how = [Cut::Some, Cut::All, Cut::Garbled][random.below(3) as usize];
            disks = machine.cut(at, how, &mut random);
            let found = state(disks.clone(), placement).unwrap();
            assert!(
                found == old || found == new,
                "{placement:?} round {round}, {how:?} at {at}"
            );
        }
    }
}

#[test]
fn power_cut_in_a_first_format_leaves_nothing_or_all() {
    for placement in BOTH {
        let (machine, managed) = small(placement);
        let mut metadata = format_on(
            stores(&machine, placement),
            &options(managed, Initial::Dirty),
        )
        .unwrap();
        let new = state(disks_of(&mut metadata), placement).unwrap();
        let states =
            machine.each_cut(
                20,
                &[Cut::None, Cut::All, Cut::Some],
                |disks, name| match state(disks, placement) {
                    Ok(found) => assert_eq!(found, new, "{name}"),
                    Err(e) => assert_eq!(e.class(), Class::NotFormatted, "{name}: {e}"),
                },
            );
        assert!(states > 500, "{states} states");
    }
}

#[test]
fn power_cut_in_a_second_format_leaves_the_old_or_nothing_or_the_new() {
    for placement in BOTH {
        let (machine, managed) = small(placement);
        let mut metadata = format_on(
            stores(&machine, placement),
            &options(managed, Initial::Dirty),
        )
        .unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        planes.set(Run { start: 3, end: 50 }, BlockState::Clean);
        metadata.commit(&planes, &Changes::default()).unwrap();
        let old = state(disks_of(&mut metadata), placement).unwrap();

        let machine = Machine::new(disks_of(&mut metadata));
        let mut metadata = format_on(
            stores(&machine, placement),
            &options(managed, Initial::Clean),
        )
        .unwrap();
        let new = state(disks_of(&mut metadata), placement).unwrap();
        let mut seen = [0; 3];
        machine.each_cut(
            20,
            &[Cut::None, Cut::All, Cut::Some, Cut::Garbled],
            |disks, name| match state(disks, placement) {
                Ok(found) if found == old => seen[0] += 1,
                Ok(found) => {
                    assert_eq!(found, new, "{name}");
                    seen[2] += 1;
                }
                Err(e) => {
                    // A sector that is neither old nor new is damage, and says so.
                    let fits = match e.class() {
                        Class::NotFormatted => true,
                        Class::Damaged => name.contains("Garbled"),
                        _ => false,
                    };
                    assert!(fits, "{name}: {e}");
                    seen[1] += 1;
                }
            },
        );
        assert!(seen.iter().all(|n| *n > 10), "{seen:?}");
    }
}

/// One damaged superblock copy never loses a change, also when the power went between the two copies.
#[test]
fn power_cut_then_a_damaged_copy_still_opens() {
    let placement = Placement::Separate;
    let (machine, managed) = small(placement);
    let mut metadata = format_on(
        stores(&machine, placement),
        &options(managed, Initial::Stale),
    )
    .unwrap();
    let machine = Machine::new(disks_of(&mut metadata));
    let mut metadata = pristine_metadata::Metadata::open_on(stores(&machine, placement)).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    planes.set(Run { start: 0, end: 10 }, BlockState::Clean);
    metadata.commit(&planes, &Changes::default()).unwrap();
    planes.set(Run { start: 10, end: 20 }, BlockState::Clean);
    metadata.commit(&planes, &Changes::default()).unwrap();
    machine.each_cut(20, &[Cut::None, Cut::All, Cut::Some], |disks, name| {
        for copy in [0, 15] {
            let mut disks = disks.clone();
            disks[1].page_mut(copy).unwrap()[100] ^= 1;
            state(disks, placement).unwrap_or_else(|e| panic!("{name}, copy at {copy}: {e}"));
        }
    });
}

/// A commit that fails at any of its steps leaves the old state or the new one, and may be tried again.
#[test]
fn power_cut_after_a_failed_commit_that_was_tried_again() {
    let placement = Placement::Separate;
    let (machine, managed) = small(placement);
    let mut first = format_on(
        stores(&machine, placement),
        &options(managed, Initial::Stale),
    )
    .unwrap();
    let disks = disks_of(&mut first);
    let old = state(disks.clone(), placement).unwrap();
    for step in 0.. {
        let machine = Machine::new(disks.clone());
        let mut metadata =
            pristine_metadata::Metadata::open_on(stores(&machine, placement)).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        planes.set(Run { start: 7, end: 99 }, BlockState::Dirty);
        metadata.stores_mut().meta.fails_after = Some(step);
        let failed = metadata.commit(&planes, &Changes::default());
        let untouched = metadata.stores_mut().meta.fails_after.take().is_some();
        metadata.commit(&planes, &Changes::default()).unwrap();
        let mut new = state(disks_of(&mut metadata), placement).unwrap();
        assert_eq!(new.1, planes);
        // A commit that failed late may have arrived: then the second is one more.
        new.0.root.seq = 0;
        machine.each_cut(
            10,
            &[Cut::None, Cut::All, Cut::Some, Cut::Garbled],
            |disks, name| {
                let (mut sb, planes) = state(disks, placement).unwrap();
                let seq = std::mem::take(&mut sb.root.seq);
                let is_new = planes == new.1 && (2..=3).contains(&seq);
                assert!(
                    is_new || (planes == old.1 && seq == 1),
                    "step {step}, {name}: checkpoint {seq}"
                );
            },
        );
        if untouched {
            assert!(failed.is_ok());
            break;
        }
        assert_eq!(failed.unwrap_err().class(), Class::Io);
    }
}

/// An instant revert: whatever is dirty becomes stale in one step, with the image that it is stale against.
#[test]
fn power_cut_in_an_instant_revert_leaves_all_dirty_or_all_stale() {
    for placement in BOTH {
        let first = blank(placement, MANAGED);
        let mut metadata =
            format_on(stores(&first, placement), &options(MANAGED, Initial::Clean)).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        let mut random = Random::new(23);
        scatter(&mut planes, &mut random);
        metadata.commit(&planes, &Changes::default()).unwrap();
        let dirty = planes.count(Select::Dirty);
        let before = planes.count(Select::Stale);
        assert!(dirty > 1000 && before > 1000);

        let machine = Machine::new(disks_of(&mut metadata));
        let mut metadata =
            pristine_metadata::Metadata::open_on(stores(&machine, placement)).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        assert_eq!(planes.make_stale(), dirty);
        let changes = Changes {
            image: Some(Image {
                id: [9; 32],
                generation: 9,
                bytes: MANAGED,
            }),
            ..Changes::default()
        };
        metadata.commit(&planes, &changes).unwrap();
        let mut seen = [0; 2];
        machine.each_cut(
            20,
            &[Cut::None, Cut::All, Cut::Some, Cut::Garbled],
            |disks, name| {
                let (sb, planes) = state(disks, placement).unwrap();
                let counts = (planes.count(Select::Dirty), planes.count(Select::Stale));
                let new = sb.generation == 9;
                seen[usize::from(new)] += 1;
                let expected = if new {
                    (0, before + dirty)
                } else {
                    (dirty, before)
                };
                assert_eq!(counts, expected, "{name}");
                assert_eq!(sb.image_id, [if new { 9 } else { 0 }; 32], "{name}");
            },
        );
        assert!(seen.iter().all(|n| *n > 50), "{seen:?}");
    }
}
