// SPDX-License-Identifier: GPL-2.0

//! The fast path, the committer and the checkpointer at the same time, under loom: `rust/shared/tracker.rs` itself, on
//! loom's atomics and a model of RCU, through every interleaving and every value that a relaxed load may see.
//!
//! What is checked is rule 1 of the contract as recovery would see it: a block whose write was let through is dirty in
//! the durable checkpoint or in an extent that a record announces which recovery replays (see [`Device::recovers`]).
//!
//! The tests that should panic take away one of the things on which that rests, to show that the model would notice.

#![allow(clippy::unwrap_used)]

#[path = "common/atomics.rs"]
mod atomics;

use std::cell::Cell;

use atomics::{Array, Number};
use loom::sync::atomic::{fence, AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::tracker::{Memory, Tracker};

/// What is taken away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The writers' read-side section.
    Section,
    /// The wait for a grace period.
    Grace,
    /// The memory barriers of the grace period and of the sections: a mere wait for the readers.
    Barriers,
    /// The order of cooling and copying: the bits are copied first.
    Order,
    /// The record before the hot bit.
    Record,
    /// The second look at what is hot before an extent is settled.
    SecondLook,
    /// The log's lock while blocks that a record tells become dirty.
    Lock,
}

/// An RCU in which a grace period waits for the sections that were open when it began, and for no other.
///
/// Each reader has a counter, odd in a section. The fences are what the kernel documents: whatever a section that
/// began before the end of the grace period did is visible after it, and what was done before the grace period is
/// visible to any section that it did not wait for.
struct Rcu {
    readers: [AtomicU64; 2],
    without: Without,
}

loom::thread_local! {
    /// Which reader this thread is.
    static READER: Cell<usize> = Cell::new(0);
}

impl Rcu {
    fn barrier(&self) {
        if self.without != Without::Barriers {
            fence(Ordering::SeqCst);
        }
    }

    fn grace_period(&self) {
        if self.without == Without::Grace {
            return;
        }
        self.barrier();
        for reader in &self.readers {
            let seen = reader.load(Ordering::Relaxed);
            if seen % 2 == 1 {
                while reader.load(Ordering::Relaxed) == seen {
                    thread::yield_now();
                }
            }
        }
        self.barrier();
    }
}

/// An open section.
struct Section<'a>(Option<(&'a Rcu, usize)>);

impl Drop for Section<'_> {
    fn drop(&mut self) {
        if let Some((rcu, reader)) = self.0 {
            rcu.barrier();
            rcu.readers[reader].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The RCU that all threads of a model share.
struct Shared(Arc<Rcu>);

impl Memory for Shared {
    type Words = Array;
    type Count = Number;
    type Section<'a> = Section<'a>;

    fn section(&self) -> Section<'_> {
        let rcu = &self.0;
        if rcu.without == Without::Section {
            return Section(None);
        }
        let reader = READER.with(Cell::get);
        rcu.readers[reader].fetch_add(1, Ordering::Relaxed);
        rcu.barrier();
        Section(Some((rcu, reader)))
    }
}

const EXTENT_BLOCKS: u64 = 2;

/// What a record says.
#[derive(Clone, Copy)]
enum Record {
    /// The extent may change.
    Intent(u64),
    /// These blocks, of word 0 of the plane, are dirty.
    Dirty(u64),
    /// The extent's dirty blocks are these, of word 0 of the plane, and no others.
    Settled(u64, u64),
}

/// The log, and what is durable.
#[derive(Default)]
struct Log {
    records: Vec<Record>,
    /// The first record that recovery replays.
    needed: usize,
    /// What each checkpoint area holds: word 0 of the dirty plane.
    areas: [u64; 2],
    /// The current one.
    area: usize,
    hot: Vec<u64>,
}

/// Two extents of two blocks.
struct Device {
    tracker: Tracker<Shared>,
    rcu: Arc<Rcu>,
    log: Mutex<Log>,
    without: Without,
}

impl Device {
    fn new(without: Without) -> Arc<Self> {
        let rcu = Arc::new(Rcu {
            readers: [AtomicU64::new(0), AtomicU64::new(0)],
            without,
        });
        let geometry = Geometry::new(4 * 8, 12, 13).unwrap();
        let allocate = |words| Ok::<_, ()>(Array::new(words));
        Arc::new(Self {
            tracker: Tracker::with(Shared(rcu.clone()), geometry, Number, allocate).unwrap(),
            rcu,
            log: Mutex::new(Log::default()),
            without,
        })
    }

    /// The committer: makes an extent hot unless it is.
    fn announce(&self, extent: u64) {
        let mut log = self.log.lock().unwrap();
        if !self.tracker.is_hot(extent) {
            if self.without != Without::Record {
                log.records.push(Record::Intent(extent));
            }
            self.tracker.heat(extent);
            log.hot.push(extent);
        }
    }

    /// A write of `run`, which may wait for the committer a few times; whether it was let through.
    fn write(&self, reader: usize, run: Run) -> bool {
        READER.with(|r| r.set(reader));
        for _ in 0..2 {
            if self.tracker.admit(run) {
                return true;
            }
            for extent in run.start / EXTENT_BLOCKS..run.end.div_ceil(EXTENT_BLOCKS) {
                self.announce(extent);
            }
        }
        self.tracker.admit(run)
    }

    /// A write to a cold extent whose very blocks the committer tells.
    fn write_told(&self, run: Run) -> bool {
        {
            let mut log = self.log.lock().unwrap();
            if self.without != Without::Record {
                let mask = ((1 << (run.end - run.start)) - 1) << run.start;
                log.records.push(Record::Dirty(mask));
            }
            if self.without != Without::Lock {
                self.tracker.tell(run);
            }
        }
        if self.without == Without::Lock {
            self.tracker.tell(run);
        }
        self.tracker.admit(run)
    }

    /// The checkpointer, step by step as in `rust/target/checkpointer.rs`; all extents are made cold.
    fn checkpoint(&self) {
        let early = self.tracker.dirty_word(0);
        let (area, needed, changed) = {
            let mut log = self.log.lock().unwrap();
            let area = 1 - log.area;
            for extent in core::mem::take(&mut log.hot) {
                self.tracker.take_used(extent);
                self.tracker.cool(extent);
            }
            let changed = self.tracker.take_changed(area as u8, 0) & 1 != 0;
            (area, log.records.len(), changed)
        };
        self.rcu.grace_period();
        let bits = match self.without {
            Without::Order => early,
            _ => self.copy(),
        };
        let mut log = self.log.lock().unwrap();
        if changed {
            log.areas[area] = bits;
        }
        // From here on the superblock names this checkpoint, and the records before it are given up.
        log.area = area;
        log.needed = needed;
    }

    /// Word 0 of the dirty plane.
    fn copy(&self) -> u64 {
        let mut bytes = [0; 8];
        self.tracker.copy_dirty(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// The hot set made empty by way of the log, step by step as in `rust/target/retirer.rs`.
    fn retire_by_log(&self) {
        let early = self.tracker.dirty_word(0);
        let cooled = {
            let mut log = self.log.lock().unwrap();
            let cooled = core::mem::take(&mut log.hot);
            for extent in &cooled {
                self.tracker.cool(*extent);
            }
            cooled
        };
        self.rcu.grace_period();
        let mut log = self.log.lock().unwrap();
        for extent in cooled {
            if self.without != Without::SecondLook && self.tracker.is_hot(extent) {
                continue;
            }
            let bits = match self.without {
                Without::Order => early,
                _ => self.copy(),
            };
            let mask = ((1 << EXTENT_BLOCKS) - 1) << (extent * EXTENT_BLOCKS);
            log.records.push(Record::Settled(extent, bits & mask));
        }
    }

    /// Whether recovery finds all blocks of `run` dirty.
    fn recovers(&self, run: Run) -> bool {
        let log = self.log.lock().unwrap();
        let mut bits = log.areas[log.area];
        let mut announced = [false; 2];
        for record in &log.records[log.needed..] {
            match *record {
                Record::Intent(extent) => announced[extent as usize] = true,
                Record::Dirty(told) => bits |= told,
                Record::Settled(extent, told) => {
                    bits |= told;
                    announced[extent as usize] = false;
                }
            }
        }
        (run.start..run.end)
            .all(|block| bits & (1 << block) != 0 || announced[(block / EXTENT_BLOCKS) as usize])
    }
}

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let long = std::env::var_os("TEST_LONG").is_some();
    builder.preemption_bound = Some(preemptions + usize::from(long));
    builder.check(model);
}

/// Two writers and a checkpoint of an extent that is hot when they begin.
fn hot_extent(without: Without) {
    explore(2, move || {
        let device = Device::new(without);
        device.announce(0);
        let runs = [Run { start: 0, end: 1 }, Run { start: 0, end: 2 }];
        let writers = [0, 1].map(|n| {
            let device = device.clone();
            thread::spawn(move || {
                READER.with(|r| r.set(n));
                // No committer here: a write that finds the extent cold is not let through.
                device.tracker.admit(runs[n])
            })
        });
        device.checkpoint();
        for (n, writer) in writers.into_iter().enumerate() {
            if writer.join().unwrap() {
                assert!(device.recovers(runs[n]), "a write is lost");
            }
        }
    });
}

/// A writer with the committer at its side, against two checkpoints, so that both areas are written.
fn committer(without: Without) {
    explore(2, move || {
        let device = Device::new(without);
        device.announce(0);
        let run = Run { start: 1, end: 3 };
        let writer = {
            let device = device.clone();
            thread::spawn(move || {
                let admitted = device.write(0, run);
                // At this moment the write is on its way.
                assert!(
                    !admitted || device.recovers(run),
                    "a write goes ahead of its record"
                );
                admitted
            })
        };
        device.checkpoint();
        device.checkpoint();
        if writer.join().unwrap() {
            assert!(device.recovers(run), "a write is lost");
        }
    });
}

/// A writer with the committer at its side, against a round of giving up by way of the log.
fn retirer(without: Without) {
    explore(2, move || {
        let device = Device::new(without);
        device.announce(0);
        let run = Run { start: 1, end: 3 };
        let writer = {
            let device = device.clone();
            thread::spawn(move || {
                let admitted = device.write(0, run);
                assert!(!admitted || device.recovers(run), "a write is lost");
                admitted
            })
        };
        device.retire_by_log();
        if writer.join().unwrap() {
            assert!(device.recovers(run), "a write is lost");
        }
    });
}

/// A writer whose blocks are told, against `other`, while another block of its extent is hot.
fn teller(without: Without, other: fn(&Device)) {
    explore(2, move || {
        let device = Device::new(without);
        device.announce(0);
        let run = Run { start: 1, end: 3 };
        let writer = {
            let device = device.clone();
            thread::spawn(move || {
                let admitted = device.write_told(run);
                // At this moment the write is on its way.
                assert!(
                    !admitted || device.recovers(run),
                    "a write goes ahead of its record"
                );
                admitted
            })
        };
        other(&device);
        other(&device);
        let admitted = writer.join().unwrap();
        assert!(admitted && device.recovers(run), "a write is lost");
    });
}

#[test]
fn a_write_whose_blocks_are_told_is_in_the_log_or_the_checkpoint() {
    teller(Without::Nothing, Device::checkpoint);
    teller(Without::Nothing, Device::retire_by_log);
}

#[test]
#[should_panic(expected = "a write goes ahead of its record")]
fn fails_if_blocks_become_dirty_before_they_are_told() {
    teller(Without::Record, Device::checkpoint);
}

#[test]
#[should_panic(expected = "a write")]
fn fails_if_blocks_become_dirty_after_the_log_is_unlocked() {
    teller(Without::Lock, Device::checkpoint);
}

#[test]
fn a_write_to_an_extent_given_up_is_told_or_announced_again() {
    retirer(Without::Nothing);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn fails_if_the_log_tells_bits_without_the_grace_period() {
    retirer(Without::Grace);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn fails_if_an_extent_announced_again_is_settled() {
    retirer(Without::SecondLook);
}

#[test]
fn a_write_to_a_hot_extent_is_in_the_checkpoint() {
    hot_extent(Without::Nothing);
}

#[test]
fn a_write_that_waited_is_in_the_log_or_the_checkpoint() {
    committer(Without::Nothing);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn fails_without_the_grace_period() {
    hot_extent(Without::Grace);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn fails_without_the_read_side_section() {
    hot_extent(Without::Section);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn fails_without_the_barriers_of_rcu() {
    hot_extent(Without::Barriers);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn fails_if_the_bits_are_copied_too_early() {
    hot_extent(Without::Order);
}

#[test]
#[should_panic(expected = "a write goes ahead of its record")]
fn fails_without_the_record() {
    committer(Without::Record);
}
