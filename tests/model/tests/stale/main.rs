// SPDX-License-Identifier: GPL-2.0

//! Stale blocks from the first read to the power cut: the table of what is under way, the notes and the map of the shared
//! core, driven as `rust/target/{route,channel,notes,checkpointer}.rs` do it, but one step at a time and in any
//! order: a bio begins or comes back, a helper takes, answers, offers, dies; a checkpoint or the job behind a flush goes one
//! step on; the power fails.
//!
//! After each step it is asked what a power cut at this moment would leave: the metadata are what they are, and of what
//! was written to the data device and not flushed any part may have arrived. Whatever it is, what a flush promised
//! must be there, no block may count as valid whose content never came, and what counts as clean must be the master's
//! (rules 2, 3 and 4 of the contract). While it runs, a block that is not stale holds its content, reads return it,
//! and nobody waits for ever.
//!
//! The tests that should panic take one of the rules away each, to show that the model would notice.

#![allow(clippy::unwrap_used, clippy::panic)]

mod bios;
#[path = "../common/mod.rs"]
mod common;
mod disk;
mod helper;
mod jobs;
mod rules;

use std::collections::BTreeSet;
use std::ops::Range;

use disk::{block_of, first_master, Device, Metadata, Truth};
use pristine_model::memory::Plain;
use pristine_shared::flights::{Flight, Flights};
use pristine_shared::geometry::Run;
use pristine_shared::notes::Notes;
use pristine_shared::stale::StaleMap;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// Blocks of the device. Those from `FIRST` on are used, which lie in two words of the plane.
const BLOCKS: u64 = 72;
const FIRST: u64 = 60;
/// Halves of the blocks that are used: what a write writes wholly or not at all.
const HALVES: usize = 24;
const EXTENT_BLOCKS: u64 = 4;
/// Few of everything, so that it gets scarce.
const SLOTS: usize = 4;
const NOTES: usize = 8;
const LOG_ENTRIES: usize = 24;
/// Most blocks of a fetch.
const MOST: u64 = 3;

/// What is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The flush of the data device before a checkpoint becomes current.
    DataFlush,
    /// The second look at whether it is needed, after the stale bits were copied.
    SecondLook,
    /// The seal that keeps later notes apart from those that a flush records.
    Seal,
    /// The order of record and answer: a flush is answered first.
    Answer,
    /// The order of data and record: what a flush is to promise is recorded when it begins.
    Record,
    /// The order of data and bit: an answer's blocks are valid when it comes, not when it is stored.
    Store,
    /// The wait for the superblock before blocks count as settled.
    Settle,
    /// The room that is kept for the notes of writes under way.
    Room,
    /// The notes of writes to blocks that became valid by a fetch.
    Note,
    /// The fetch of what a write covers in part.
    Edges,
    /// The flush of the data device before blocks are recorded for a FUA write.
    FuaFlush,
    /// The look at what a write covers of the fetch that failed, and not of the whole fetch.
    Cover,
    /// The number of a helper's session, by which answers of an earlier table's are known.
    Session,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tag {
    None,
    Write(u64),
    Fua,
    Flush(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    Flush,
}

#[derive(Debug)]
struct Bio {
    id: u64,
    op: Op,
    halves: Range<usize>,
    fua: bool,
    tag: Tag,
    /// For a flush: the last write to each half that was acknowledged when it began.
    promise: Vec<usize>,
}

impl Bio {
    /// The blocks, and those that are covered as a whole.
    fn span(&self) -> (Run, Run) {
        let run = Run {
            start: block_of(self.halves.start),
            end: block_of(self.halves.end - 1) + 1,
        };
        let start = FIRST + self.halves.start.div_ceil(2) as u64;
        let end = FIRST + self.halves.end as u64 / 2;
        let whole = Run {
            start,
            end: end.max(start),
        };
        (run, whole)
    }
}

/// What the data device has not answered yet.
enum Io {
    Read(Bio),
    Write { bio: Bio, token: u64 },
    Flush { bio: Bio, point: u64 },
    Store { id: u64, token: u64 },
}

/// How far the job for bios that have come back is.
enum JobStage {
    Flush,
    Flushing(u64),
    Copy,
    Record(Vec<Run>),
    Drop,
    /// A checkpoint with this number, or a later one, does it.
    Checkpoint(u64),
    Answer,
}

struct Job {
    promised: Vec<Bio>,
    end: u64,
    stage: JobStage,
}

enum Stage {
    Retire,
    Begin,
    Dirty,
    Stale,
    Flush,
    Flushing(u64),
    Superblock,
    Settle,
    Drop,
}

struct Checkpoint {
    number: u64,
    stage: Stage,
    area: usize,
    needed: usize,
    dirty: BTreeSet<u64>,
    noted: u64,
    must_flush: bool,
    is_changed: bool,
}

struct Model {
    without: Without,
    device: Device,
    meta: Metadata,
    truth: Vec<Truth>,

    map: StaleMap<Plain>,
    flights: Flights<Vec<Option<Flight<Vec<Bio>>>>>,
    notes: Notes<Vec<Run>>,
    crowd: Vec<Bio>,
    /// Blocks became valid since the last checkpoint began.
    advanced: bool,

    dirty: BTreeSet<u64>,
    hot: BTreeSet<u64>,
    /// Writes that wait for their intent.
    deferred: Vec<Bio>,

    io: Vec<Io>,
    ended: Vec<Bio>,
    job: Option<Job>,
    checkpoint: Option<Checkpoint>,
    /// Number of the last checkpoint that began, and of the last that is done.
    begun: u64,
    done: u64,
    /// Somebody waits for a checkpoint.
    wanted: bool,

    helper: u64,
    /// What the helper took, and what those before it did, with what the master held then.
    held: Vec<(u64, Run)>,
    lost: Vec<(u64, u64, Run, Vec<u64>)>,

    now: u64,
    bios: u64,
    /// Bios that were not answered yet.
    open: BTreeSet<u64>,
}

impl Model {
    // What must hold.

    fn check(&self) {
        let (stale, dirty) = self.meta.recover();
        for (half, truth) in self.truth.iter().enumerate() {
            let block = block_of(half);
            assert!(
                self.map.any_stale(block, block) || self.device.cache[half] == truth.now(),
                "block {block} is valid and does not hold its content"
            );
            if stale.contains(&block) {
                assert!(
                    truth.may_be(self.device.master[half]),
                    "a power cut makes block {block} stale, which was promised"
                );
                continue;
            }
            for value in self.device.possible(half) {
                assert!(
                    truth.may_be(value),
                    "a power cut makes block {block} valid, with content {value}"
                );
                assert!(
                    dirty.contains(&block) || value == self.device.master[half],
                    "a power cut makes block {block} clean, with content {value}"
                );
            }
        }
    }

    /// The power fails, and comes back; `luck` says what arrives.
    fn crash(mut self, luck: u64) -> Self {
        let lucky = |token: u64| luck.rotate_right(token as u32) & 1 != 0;
        let pending = std::mem::take(&mut self.device.pending);
        for write in pending
            .iter()
            .filter(|w| lucky(w.token * 7 + w.half as u64))
        {
            self.device.durable[write.half] = write.value;
        }
        self.device.cache.clone_from(&self.device.durable);
        let (stale, dirty) = self.meta.recover();
        self.die();
        let mut model = Self::load(self.without, self.device, stale, dirty);
        (model.helper, model.lost) = (self.helper, self.lost);
        // Values are never used twice.
        model.bios = self.bios;
        model
    }

    /// The device is suspended, as nobody has it open; it goes over to a generation that changes these blocks, which takes
    /// back what was changed; its table is loaded anew. What the helper has in hand is of the old generation.
    fn change_generation(mut self, changed: u16) -> Self {
        for round in 0.. {
            if self.is_quiet() {
                break;
            }
            assert!(round < 300, "it cannot be suspended: {:?}", self.open);
            // Who waits for a helper is told that there is none.
            self.now += 100;
            self.expire();
            self.go_on();
        }
        // The checkpoint of a suspend.
        while self.checkpoint.is_some() {
            self.run_checkpoint(true);
        }
        let clock = self.device.clock;
        self.device.flush(clock);
        self.check();
        let (mut stale, dirty) = self.meta.recover();
        stale.extend(dirty);
        // What it has in hand is the old generation's.
        self.die_with_table();
        for half in (0..HALVES).filter(|half| changed & 1 << (half / 2) != 0) {
            self.device.master[half] += 100_000;
            stale.insert(block_of(half));
        }
        let mut model = Self::load(self.without, self.device, stale, BTreeSet::new());
        (model.helper, model.lost, model.bios) = (self.helper, self.lost, self.bios);
        model
    }

    fn die_with_table(&mut self) {
        let helper = self.helper;
        self.die();
        if self.without == Without::Session {
            self.helper = helper;
        }
    }

    fn is_quiet(&self) -> bool {
        self.io.is_empty()
            && self.ended.is_empty()
            && self.job.is_none()
            && self.checkpoint.is_none()
            && self.open.is_empty()
    }

    /// Everybody but the helper does what there is to do.
    fn go_on(&mut self) {
        self.complete_io(0);
        self.commit();
        self.run_job();
        if self.wanted || self.checkpoint.is_some() {
            self.run_checkpoint(false);
        }
        self.check();
    }

    fn step(mut self, step: &Step) -> Self {
        self.now += 1;
        match *step {
            Step::Read(at, len) => self.begin(Op::Read, halves(at, len), false),
            Step::Write(at, len, fua) => self.begin(Op::Write, halves(at, len), fua),
            Step::Flush => self.begin(Op::Flush, 0..0, false),
            Step::Io(i) => self.complete_io(i.into()),
            Step::Fail(i) => self.fail_io(i.into()),
            Step::Take => self.take(),
            Step::Answer(i) => self.answer_data(i.into()),
            Step::AnswerWrongly(i, blocks) => self.answer_wrongly(i.into(), blocks.into()),
            Step::AnswerUnreadably(i) => self.answer_unreadably(i.into()),
            Step::AnswerError(i) => self.answer_error(i.into()),
            Step::AnswerLate(i) => self.answer_late(i.into()),
            Step::Die => self.die(),
            Step::Offer(at, len) => {
                let start = FIRST + u64::from(at);
                let end = (start + u64::from(len)).min(BLOCKS);
                self.offer(Run { start, end });
            }
            Step::Expire => self.expire(),
            Step::Commit => self.commit(),
            Step::Job => self.run_job(),
            Step::Checkpoint(all_cold) => self.run_checkpoint(all_cold),
            Step::Crash(luck) => return self.crash(luck),
            Step::Generation(changed) => return self.change_generation(changed),
        }
        self
    }

    /// Nothing new comes and nothing goes wrong: everybody is answered, and in the end nothing is stale.
    fn rest(mut self) {
        for round in 0.. {
            if self.is_quiet() && self.map.count() == 0 {
                break;
            }
            assert!(round < 300, "somebody waits for ever: {:?}", self.open);
            self.take();
            self.answer_data(0);
            if self.open.is_empty() {
                self.offer(Run {
                    start: FIRST,
                    end: BLOCKS,
                });
            }
            self.go_on();
        }
        while self.done == 0 || self.checkpoint.is_some() {
            self.run_checkpoint(true);
            self.check();
        }
    }
}

/// What a write leaves in each half.
fn value_of(bio: &Bio) -> u64 {
    10_000 + bio.id
}

fn halves(at: u8, len: u8) -> Range<usize> {
    let start = usize::from(at) % HALVES;
    start..(start + usize::from(len)).min(HALVES)
}

#[derive(Clone, Debug)]
enum Step {
    Read(u8, u8),
    Write(u8, u8, bool),
    Flush,
    /// The data device answers.
    Io(u8),
    /// The same, with an error.
    Fail(u8),
    Take,
    Answer(u8),
    AnswerWrongly(u8, u8),
    AnswerUnreadably(u8),
    AnswerError(u8),
    AnswerLate(u8),
    Die,
    Offer(u8, u8),
    Expire,
    Commit,
    Job,
    Checkpoint(bool),
    Crash(u64),
    /// The blocks that it changes, one bit each.
    Generation(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..HALVES as u8;
    let len = prop_oneof![4 => 1..5u8, 1 => 1..13u8];
    prop_oneof![
        3 => (at.clone(), len.clone()).prop_map(|(at, len)| Step::Read(at, len)),
        6 => (at, len, prop::bool::weighted(0.1)).prop_map(|(at, len, fua)| Step::Write(at, len, fua)),
        2 => Just(Step::Flush),
        12 => (0..20u8).prop_map(Step::Io),
        1 => (0..20u8).prop_map(Step::Fail),
        4 => Just(Step::Take),
        4 => (0..6u8).prop_map(Step::Answer),
        2 => prop_oneof![
            ((0..6u8), (0..5u8)).prop_map(|(i, n)| Step::AnswerWrongly(i, n)),
            (0..6u8).prop_map(Step::AnswerUnreadably),
            (0..6u8).prop_map(Step::AnswerError),
            (0..6u8).prop_map(Step::AnswerLate),
            Just(Step::Die),
            Just(Step::Expire),
        ],
        2 => (0..12u8, 1..6u8).prop_map(|(at, len)| Step::Offer(at, len)),
        5 => Just(Step::Commit),
        7 => Just(Step::Job),
        7 => any::<bool>().prop_map(Step::Checkpoint),
    ]
}

/// The stale blocks, the dirty ones, and what happens.
type Life = (u16, u16, Vec<Step>);

fn life() -> impl Strategy<Value = Life> {
    let stale = prop_oneof![1 => Just(0xfff), 2 => 0..0x1000u16];
    let step = prop_oneof![
        150 => step(),
        1 => any::<u64>().prop_map(Step::Crash),
        1 => (0..0x1000u16).prop_map(Step::Generation)
    ];
    (stale, 0..0x1000u16, vec(step, 1..400))
}

fn play(without: Without, (stale, dirty, steps): &Life) {
    let mut model = Model::new(without, *stale, *dirty);
    model.check();
    for step in steps {
        model = model.step(step);
        model.check();
    }
    model.rest();
}

proptest! {
    #![proptest_config(common::cases(150))]

    #[test]
    fn what_was_promised_is_there_and_what_never_came_is_not(life in life()) {
        play(Without::Nothing, &life);
    }
}

/// For so many minutes as TEST_MINUTES says; without it, as many lives as take a second.
#[test]
fn for_a_set_time() {
    let minutes = std::env::var("TEST_MINUTES").map_or(0, |m| m.parse().unwrap());
    let seconds = std::cmp::max(minutes * 60, 1);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let mut runner = TestRunner::default();
    let mut lives = 0;
    while std::time::Instant::now() < end {
        let life = life().new_tree(&mut runner).unwrap().current();
        // Shown if it fails.
        println!("{life:?}");
        play(Without::Nothing, &life);
        lives += 1;
    }
    eprintln!("{lives} lives");
}
