// SPDX-License-Identifier: GPL-2.0

//! Rule 4 of the contract: what a recovery calls clean is the master's, wherever the power went.

#![allow(clippy::unwrap_used)]

mod common;

use common::kernel::{Kernel, MASTER};
use common::{disks_of, open, stores, Content, Cut, Machine, Random};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::PAGE_SIZE;
use pristine_metadata::{
    format_on, BlockState, Changes, FormatOptions, Initial, Metadata, Run, Select, Storage,
};

const BLOCKS: u64 = 5000;
const ALL: [Cut; 3] = [Cut::None, Cut::All, Cut::Some];

/// A formatted device whose data device holds the master.
fn formatted(initial: Initial, placement: Placement) -> Machine {
    let disks = match placement {
        Placement::Separate => vec![Content::new(BLOCKS + 1, MASTER), Content::new(60, 0)],
        Placement::Tail => vec![Content::new(BLOCKS + 60, MASTER)],
    };
    let options = FormatOptions {
        managed_bytes: Some(BLOCKS * 4096),
        log_pages: Some(16),
        initial,
        ..FormatOptions::default()
    };
    let machine = Machine::new(disks);
    let mut metadata = format_on(stores(&machine, placement), &options).unwrap();
    Machine::new(disks_of(&mut metadata))
}

/// The blocks that differ from the master and are recovered as clean: there must be none.
fn forgotten(disks: Vec<Content>) -> Vec<u64> {
    let data = disks[0].clone();
    let mut metadata = open(disks, Placement::Separate).unwrap();
    let (planes, _) = metadata.load().unwrap();
    data.written()
        .filter(|(block, page)| *block < BLOCKS && **page != [MASTER; PAGE_SIZE])
        .map(|(block, _)| block)
        .filter(|block| planes.state(*block) == BlockState::Clean)
        .collect()
}

fn session(kernel: &mut Kernel, random: &mut Random) {
    for step in 0..60 {
        match random.below(10) {
            0 => kernel.flush(),
            1 => kernel.checkpoint(),
            2..=3 => {
                let blocks: Vec<u64> = (0..5).map(|_| random.below(BLOCKS)).collect();
                kernel.write_many(&blocks, step);
            }
            _ => kernel.write(random.below(BLOCKS), step),
        }
    }
}

#[test]
fn superset_holds_at_every_power_cut() {
    let mut states = 0;
    for seed in 0..4 {
        let machine = formatted(Initial::Clean, Placement::Separate);
        let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
        session(&mut kernel, &mut Random::new(seed));
        states += machine.each_cut(6, &ALL, |disks, name| {
            assert_eq!(forgotten(disks), [], "seed {seed}: {name}");
        });
    }
    assert!(states > 2000, "{states} states");
}

#[test]
fn superset_test_notices_a_record_that_comes_after_its_write() {
    let machine = formatted(Initial::Clean, Placement::Separate);
    let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
    kernel.write_ahead = false;
    session(&mut kernel, &mut Random::new(1));
    let mut found = 0;
    machine.each_cut(6, &ALL, |disks, _| {
        found += u64::from(!forgotten(disks).is_empty())
    });
    assert!(found > 0, "a missing write-ahead went unnoticed");
}

#[test]
fn superset_holds_across_power_cut_after_power_cut() {
    let mut disks = {
        let machine = formatted(Initial::Clean, Placement::Separate);
        machine.cut(0, Cut::All, &mut Random::new(0))
    };
    let mut random = Random::new(5);
    for round in 0..40 {
        let machine = Machine::new(disks);
        let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
        session(&mut kernel, &mut random);
        let at = random.below(machine.points() as u64) as usize;
        disks = machine.cut(at, ALL[random.below(3) as usize], &mut random);
        assert_eq!(forgotten(disks.clone()), [], "round {round}, cut at {at}");
    }
}

/// Marking too much is allowed, and bounded by the extents of the records since the checkpoint.
#[test]
fn superset_is_exact_after_a_checkpoint_and_bounded_before() {
    let machine = formatted(Initial::Clean, Placement::Separate);
    let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
    kernel.write(5, 1);
    kernel.write(700, 1);
    let at = machine.points() - 1;
    let recovered = |machine: &Machine, at| {
        let disks = machine.cut(at, Cut::All, &mut Random::new(1));
        let (planes, end) = open(disks, Placement::Separate).unwrap().load().unwrap();
        let runs: Vec<_> = planes
            .runs(Select::Dirty)
            .map(|r| (r.start, r.end))
            .collect();
        (runs, end.records)
    };
    assert_eq!(recovered(&machine, at), (vec![(0, 256), (512, 768)], 2));
    kernel.flush();
    kernel.checkpoint();
    let at = machine.points() - 1;
    assert_eq!(recovered(&machine, at), (vec![(5, 6), (700, 701)], 0));
}

#[test]
fn superset_survives_a_full_log() {
    let machine = formatted(Initial::Clean, Placement::Separate);
    let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
    // 12 extents in turn, far more records than the ring has pages; hot extents are forgotten each time.
    for round in 0..60u64 {
        kernel.write(round % 12 * 256 + round, 1);
        if round % 5 == 4 {
            kernel.checkpoint();
        }
    }
    // And once past the very end of the ring.
    for extent in 0..19 {
        kernel.write(extent * 256 + 200, 2);
    }
    machine.each_cut(3, &ALL, |disks, name| {
        assert_eq!(forgotten(disks), [], "{name}")
    });
}

/// The agent's order: write, flush, and only then clear the bits. `flush` off shows that the test notices.
fn revert(placement: Placement, flush: bool) -> u64 {
    // Everything is stale, and the data device holds something else than the master.
    let machine = formatted(Initial::Stale, placement);
    let mut metadata = Metadata::open_on(stores(&machine, placement)).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    for (n, start) in (0..BLOCKS).step_by(1000).enumerate() {
        let run = Run {
            start,
            end: (start + 1000).min(BLOCKS),
        };
        let stores = metadata.stores_mut();
        let data = stores.data.as_mut().unwrap_or(&mut stores.meta);
        // A few blocks of each run stand for all.
        for block in (run.start..run.end).step_by(37) {
            data.write(block, &[0xee; PAGE_SIZE]).unwrap();
        }
        if flush {
            data.sync().unwrap();
        }
        planes.set(run, BlockState::Clean);
        let changes = Changes {
            provisioning: (n == 4).then_some(false),
            ..Changes::default()
        };
        metadata.commit(&planes, &changes).unwrap();
    }
    let mut wrong = 0;
    machine.each_cut(8, &ALL, |disks, _| {
        let data = disks[0].clone();
        let (planes, _) = open(disks, placement).unwrap().load().unwrap();
        for start in (0..BLOCKS).step_by(1000) {
            for block in (start..(start + 1000).min(BLOCKS)).step_by(37) {
                let written = data.page(block).unwrap() == [0xee; PAGE_SIZE];
                wrong += u64::from(!written && planes.state(block) == BlockState::Clean);
            }
        }
    });
    wrong
}

#[test]
fn superset_holds_while_stale_blocks_are_fetched() {
    assert_eq!(revert(Placement::Separate, true), 0);
    assert_eq!(revert(Placement::Tail, true), 0);
}

#[test]
fn superset_test_notices_bits_that_are_cleared_before_the_flush() {
    assert!(revert(Placement::Separate, false) > 0);
}
