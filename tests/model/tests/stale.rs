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

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;

use pristine_model::memory::{Array, Number, Plain};
use pristine_shared::flights::{Flight, Flights, Refused, Way};
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::log::Entry;
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
}

fn master(half: usize) -> u64 {
    1000 + half as u64
}

fn block_of(half: usize) -> u64 {
    FIRST + half as u64 / 2
}

fn halves_of(run: Run) -> Range<usize> {
    let half = |block: u64| (block - FIRST) as usize * 2;
    half(run.start)..half(run.end)
}

/// A write that the data device was given.
struct Pending {
    token: u64,
    half: usize,
    value: u64,
    /// When it was answered, and can be read.
    landed: Option<u64>,
}

/// The data device.
struct Device {
    durable: Vec<u64>,
    /// What a read returns.
    cache: Vec<u64>,
    pending: Vec<Pending>,
    tokens: u64,
    clock: u64,
}

impl Device {
    fn issue(&mut self, halves: Range<usize>, value: impl Fn(usize) -> u64) -> u64 {
        self.tokens += 1;
        let token = self.tokens;
        let writes = halves.map(|half| Pending {
            token,
            half,
            value: value(half),
            landed: None,
        });
        self.pending.extend(writes);
        token
    }

    fn land(&mut self, token: u64) {
        self.clock += 1;
        for write in self.pending.iter_mut().filter(|w| w.token == token) {
            write.landed = Some(self.clock);
            self.cache[write.half] = write.value;
        }
    }

    /// A write with FUA lands.
    fn land_durable(&mut self, token: u64) {
        self.land(token);
        let halves: Vec<_> = self.pending.iter().filter(|w| w.token == token).collect();
        let halves: Vec<_> = halves.iter().map(|w| w.half).collect();
        self.settle(|w| w.landed.is_some() && halves.contains(&w.half));
    }

    /// Makes what was answered by `point` durable.
    fn flush(&mut self, point: u64) {
        self.settle(|w| w.landed.is_some_and(|landed| landed <= point));
    }

    fn settle(&mut self, arrives: impl Fn(&Pending) -> bool) {
        for write in self.pending.iter().filter(|w| arrives(w)) {
            self.durable[write.half] = write.value;
        }
        self.pending.retain(|w| !arrives(w));
    }

    /// What a half may hold after a power cut.
    fn possible(&self, half: usize) -> impl Iterator<Item = u64> + '_ {
        let pending = self.pending.iter().filter(move |w| w.half == half);
        pending
            .map(|w| w.value)
            .chain(std::iter::once(self.durable[half]))
    }
}

/// What a half must be.
struct Truth {
    /// What it was and became, as far as that can be read.
    history: Vec<u64>,
    /// From which of them on it survives a power cut.
    promised: usize,
    /// The last one that was acknowledged.
    acknowledged: usize,
    /// A write that is on its way.
    flying: Option<u64>,
}

impl Truth {
    fn new(value: u64) -> Self {
        Self {
            history: vec![value],
            promised: 0,
            acknowledged: 0,
            flying: None,
        }
    }

    fn now(&self) -> u64 {
        *self.history.last().unwrap()
    }

    fn may_be(&self, value: u64) -> bool {
        self.history[self.promised..].contains(&value) || self.flying == Some(value)
    }
}

/// The metadata that are durable.
#[derive(Default)]
struct Metadata {
    /// The stale planes of both areas.
    areas: [BTreeSet<u64>; 2],
    area: usize,
    dirty: BTreeSet<u64>,
    log: Vec<Entry>,
    /// The first entry that is replayed.
    needed: usize,
}

impl Metadata {
    fn used(&self) -> usize {
        self.log.len() - self.needed
    }

    /// The stale and the dirty blocks that recovery finds.
    fn recover(&self) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let (mut stale, mut dirty) = (self.areas[self.area].clone(), self.dirty.clone());
        for entry in &self.log[self.needed..] {
            match entry {
                Entry::Intent(extents) => {
                    dirty.extend(extents.start * EXTENT_BLOCKS..extents.end * EXTENT_BLOCKS);
                }
                Entry::Valid(run) => stale.retain(|b| !(run.start..run.end).contains(b)),
                other => panic!("nobody writes {other:?}"),
            }
        }
        dirty.retain(|block| !stale.contains(block));
        (stale, dirty)
    }
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
    /// What the helper took, and what those before it did.
    held: Vec<(u64, Run)>,
    lost: Vec<(u64, u64, Run)>,

    now: u64,
    bios: u64,
    /// Bios that were not answered yet.
    open: BTreeSet<u64>,
}

impl Model {
    /// A device of which the blocks of these masks are stale, and dirty.
    fn new(without: Without, stale: u16, dirty: u16) -> Self {
        let blocks = |mask: u16| -> BTreeSet<u64> {
            let set = (0..HALVES / 2).filter(|i| mask & 1 << i != 0);
            set.map(|i| FIRST + i as u64).collect()
        };
        let (stale, dirty) = (blocks(stale), blocks(dirty & !stale));
        let content = |half| match block_of(half) {
            // What the last session left there.
            block if stale.contains(&block) => 500 + half as u64,
            block if dirty.contains(&block) => 700 + half as u64,
            _ => master(half),
        };
        let content: Vec<_> = (0..HALVES).map(content).collect();
        let device = Device {
            durable: content.clone(),
            cache: content,
            pending: Vec::new(),
            tokens: 0,
            clock: 0,
        };
        Self::load(without, device, stale, dirty)
    }

    /// A device that is activated.
    fn load(without: Without, device: Device, stale: BTreeSet<u64>, dirty: BTreeSet<u64>) -> Self {
        let geometry = Geometry::new(BLOCKS * 8, 12, 14).unwrap();
        let words = |n| Ok::<_, ()>(Array::new(n));
        let map = StaleMap::with(geometry, Number::default, words).unwrap();
        for block in &stale {
            map.recover(Run {
                start: *block,
                end: block + 1,
            });
        }
        map.mark_all_changed(0);
        map.mark_all_changed(1);
        let truth = |half: usize| {
            Truth::new(if stale.contains(&block_of(half)) {
                master(half)
            } else {
                device.durable[half]
            })
        };
        let none = Run { start: 0, end: 0 };
        Self {
            without,
            truth: (0..HALVES).map(truth).collect(),
            device,
            meta: Metadata {
                areas: [stale, BTreeSet::new()],
                dirty: dirty.clone(),
                ..Metadata::default()
            },
            map,
            flights: Flights::new((0..SLOTS).map(|_| None).collect()),
            notes: Notes::new(vec![none; NOTES], SLOTS),
            crowd: Vec::new(),
            advanced: false,
            dirty,
            hot: BTreeSet::new(),
            deferred: Vec::new(),
            io: Vec::new(),
            ended: Vec::new(),
            job: None,
            checkpoint: None,
            begun: 0,
            done: 0,
            wanted: false,
            helper: 1,
            held: Vec::new(),
            lost: Vec::new(),
            now: 0,
            bios: 0,
            open: BTreeSet::new(),
        }
    }

    // Bios come.

    fn begin(&mut self, op: Op, halves: Range<usize>, fua: bool) {
        if op == Op::Write
            && self.truth[halves.clone()]
                .iter()
                .any(|t| t.flying.is_some())
        {
            // What two writes at once leave is nobody's business.
            return;
        }
        self.bios += 1;
        let bio = Bio {
            id: self.bios,
            op,
            halves,
            fua,
            tag: Tag::None,
            promise: self.truth.iter().map(|t| t.acknowledged).collect(),
        };
        self.open.insert(bio.id);
        match op {
            Op::Flush => return self.map_flush(bio),
            Op::Write => {
                for half in bio.halves.clone() {
                    self.truth[half].flying = Some(value_of(&bio));
                }
            }
            Op::Read => {}
        }
        let (run, _) = bio.span();
        let (first, last, is_change) = (run.start, run.end - 1, op == Op::Write);
        let plain = !self.map.any_stale(first, last)
            && (!is_change || !self.map.any_unsettled(first, last));
        assert!(plain || !self.map.is_plain(first, last, is_change));
        match plain {
            true if is_change => self.admit_or_defer(bio, run),
            true => self.io.push(Io::Read(bio)),
            false => self.route(bio),
        }
    }

    fn map_flush(&mut self, mut bio: Bio) {
        if !self.notes.is_empty() {
            let end = match self.without {
                Without::Seal => self.notes.end(),
                _ => self.notes.seal(),
            };
            bio.tag = Tag::Flush(end);
            if self.without == Without::Record {
                let runs = self.notes.until(end).iter();
                self.meta.log.extend(runs.map(|run| Entry::Valid(*run)));
            }
        }
        let point = self.device.clock;
        self.io.push(Io::Flush { bio, point });
    }

    fn route(&mut self, mut bio: Bio) {
        let (run, mut whole) = bio.span();
        if self.without == Without::Edges {
            whole = run;
        }
        let is_change = bio.op == Op::Write;
        let next = |run| self.map.next(run);
        let way = if is_change {
            self.flights.write(run, whole, next, self.now)
        } else {
            self.flights.read(run, next, MOST, false, self.now)
        };
        match way {
            Way::Wait(slot) => return self.flights.waiters(slot).unwrap().push(bio),
            Way::Full => return self.crowd.push(bio),
            Way::Write(id) => {
                if self.notes.len() + SLOTS >= NOTES && self.without != Without::Room {
                    self.flights.end(id);
                    self.crowd.push(bio);
                    self.wanted = true;
                    return;
                }
                bio.tag = Tag::Write(id);
            }
            Way::Free if is_change => {
                let noted = self.map.any_unsettled(run.start, run.end - 1);
                if noted && self.without != Without::Note {
                    if !self.notes.add(run) {
                        self.crowd.push(bio);
                        self.wanted = true;
                        return;
                    }
                    if bio.fua {
                        bio.tag = Tag::Fua;
                    }
                }
            }
            Way::Free => return self.io.push(Io::Read(bio)),
        }
        self.admit_or_defer(bio, run);
    }

    fn route_all(&mut self, bios: Vec<Bio>) {
        for bio in bios {
            self.route(bio);
        }
    }

    fn route_crowd(&mut self) {
        let crowd = std::mem::take(&mut self.crowd);
        self.route_all(crowd);
    }

    // Write-ahead, the simple way: `tests/model/tests/tracker.rs` has it in full.

    fn admit_or_defer(&mut self, bio: Bio, run: Run) {
        if self.cold(run).is_empty() {
            self.dirty.extend(run.start..run.end);
            self.submit(bio);
        } else {
            self.deferred.push(bio);
        }
    }

    fn cold(&self, run: Run) -> BTreeSet<u64> {
        let clean = (run.start..run.end).filter(|b| !self.dirty.contains(b));
        let cold = clean.map(|b| b / EXTENT_BLOCKS);
        cold.filter(|e| !self.hot.contains(e)).collect()
    }

    fn announce(&mut self, extents: impl IntoIterator<Item = u64>) {
        for start in extents {
            let end = start + 1;
            self.meta.log.push(Entry::Intent(Run { start, end }));
            self.hot.insert(start);
        }
    }

    fn commit(&mut self) {
        for bio in std::mem::take(&mut self.deferred) {
            let (run, _) = bio.span();
            let cold = self.cold(run);
            if self.meta.used() + cold.len() + 4 > LOG_ENTRIES {
                self.wanted = true;
                self.deferred.push(bio);
                continue;
            }
            self.announce(cold);
            self.admit_or_defer(bio, run);
        }
    }

    fn submit(&mut self, bio: Bio) {
        let value = value_of(&bio);
        let token = self.device.issue(bio.halves.clone(), |_| value);
        self.io.push(Io::Write { bio, token });
    }

    // The data device answers.

    fn complete_io(&mut self, i: usize) {
        if self.io.is_empty() {
            return;
        }
        match self.io.remove(i % self.io.len()) {
            Io::Read(bio) => self.answer_read(bio, false),
            Io::Write { bio, token } => {
                if bio.fua {
                    self.device.land_durable(token);
                } else {
                    self.device.land(token);
                }
                for half in bio.halves.clone() {
                    let truth = &mut self.truth[half];
                    truth.history.push(value_of(&bio));
                    truth.flying = None;
                }
                self.come_back(bio);
            }
            Io::Flush { bio, point } => {
                self.device.flush(point);
                self.come_back(bio);
            }
            Io::Store { id, token } => {
                self.device.land(token);
                self.end_store(id, true);
            }
        }
    }

    fn come_back(&mut self, bio: Bio) {
        if bio.tag == Tag::None {
            self.answer(bio);
        } else {
            self.ended.push(bio);
        }
    }

    /// A store, or a write to blocks that are all stale, fails. Anything may be there now.
    fn fail_io(&mut self, i: usize) {
        if self.io.is_empty() {
            return;
        }
        let i = i % self.io.len();
        match &self.io[i] {
            Io::Store { id, token } => {
                let (id, token) = (*id, *token);
                self.device.land(token);
                self.io.remove(i);
                self.end_store(id, false);
            }
            Io::Write { bio, token } => {
                let (run, whole) = bio.span();
                let Tag::Write(id) = bio.tag else { return };
                if run != whole || self.map.next(run) != Some((true, run)) {
                    return;
                }
                self.device.land(*token);
                let Io::Write { bio, .. } = self.io.remove(i) else {
                    unreachable!()
                };
                self.refuse(bio);
                self.end_write(id, false);
            }
            _ => {}
        }
    }

    fn answer_read(&mut self, bio: Bio, is_served: bool) {
        for half in bio.halves.clone() {
            let value = if is_served {
                master(half)
            } else {
                self.device.cache[half]
            };
            assert_eq!(
                value,
                self.truth[half].now(),
                "a read returns the wrong content"
            );
        }
        self.answer(bio);
    }

    fn answer(&mut self, bio: Bio) {
        assert!(self.open.remove(&bio.id), "a bio is answered twice");
        if bio.op == Op::Flush {
            for (truth, promise) in self.truth.iter_mut().zip(&bio.promise) {
                truth.promised = truth.promised.max(*promise);
            }
        }
        if bio.op == Op::Write {
            let value = value_of(&bio);
            for half in bio.halves {
                let truth = &mut self.truth[half];
                let at = truth.history.iter().position(|v| *v == value).unwrap();
                truth.acknowledged = truth.acknowledged.max(at);
                if bio.fua {
                    truth.promised = truth.promised.max(at);
                }
            }
        }
    }

    /// Answers with an error.
    fn refuse(&mut self, bio: Bio) {
        assert!(self.open.remove(&bio.id), "a bio is answered twice");
        if bio.op == Op::Write {
            for half in bio.halves {
                self.truth[half].flying = None;
            }
        }
    }

    // Flights end.

    fn end_write(&mut self, id: u64, good: bool) {
        let flight = self.flights.end(id).unwrap();
        if good {
            self.map.validate(flight.run);
            self.advanced = true;
            let _ = self.notes.add_promised(flight.run);
        }
        let crowd = std::mem::take(&mut self.crowd);
        self.wanted |= self.notes.is_filling_up();
        self.route_all(flight.waiters);
        self.route_all(crowd);
    }

    fn end_store(&mut self, id: u64, good: bool) {
        let flight = self.flights.end(id).unwrap();
        if good {
            self.map.validate(flight.run);
            self.advanced = true;
            self.route_all(flight.waiters);
        } else {
            self.fail_waiters(flight);
        }
        self.route_crowd();
    }

    fn fail_waiters(&mut self, flight: Flight<Vec<Bio>>) {
        for bio in flight.waiters {
            let (run, whole) = bio.span();
            let needed = Run {
                start: flight.run.start.max(run.start),
                end: flight.run.end.min(run.end),
            };
            let covered = whole.start <= needed.start && needed.end <= whole.end;
            if bio.op == Op::Write && covered {
                self.route(bio);
            } else {
                self.refuse(bio);
            }
        }
    }

    // The helper.

    fn take(&mut self) {
        if let Some(flight) = self.flights.take(self.helper) {
            assert!(flight.run.len() <= MOST);
            self.held.push((flight.id, flight.run));
        }
    }

    /// Takes one of the requests that the helper has out of its hands.
    fn pick(&mut self, i: usize) -> Option<(u64, Run)> {
        let i = i.checked_rem(self.held.len())?;
        Some(self.held.remove(i))
    }

    fn answer_data(&mut self, i: usize) {
        let Some((id, run)) = self.pick(i) else {
            return;
        };
        match self.flights.answer(id, self.helper, run.len()) {
            Ok(found) => assert_eq!(found, run),
            // It took too long.
            Err(e) => return assert_eq!((e, self.flights.find_run(id)), (Refused::Unknown, None)),
        }
        let waiters = std::mem::take(self.flights.waiters_of(id).unwrap());
        let halves = halves_of(run);
        for bio in waiters {
            let within = halves.start <= bio.halves.start && bio.halves.end <= halves.end;
            if bio.op == Op::Read && within {
                self.answer_read(bio, true);
            } else {
                self.flights.waiters_of(id).unwrap().push(bio);
            }
        }
        self.store(id, run);
    }

    fn store(&mut self, id: u64, run: Run) {
        let token = self.device.issue(halves_of(run), master);
        self.io.push(Io::Store { id, token });
        if self.without == Without::Store {
            self.map.validate(run);
            self.advanced = true;
        }
    }

    fn answer_wrongly(&mut self, i: usize, blocks: u64) {
        let Some((id, run)) = i.checked_rem(self.held.len()).map(|i| self.held[i]) else {
            return;
        };
        if self.flights.is_taken(id, self.helper) && run.len() != blocks {
            let refused = self.flights.answer(id, self.helper, blocks);
            assert_eq!(refused, Err(Refused::Length(run.len())));
        }
    }

    fn answer_error(&mut self, i: usize) {
        let Some((id, _)) = self.pick(i) else { return };
        if self.flights.is_taken(id, self.helper) {
            let flight = self.flights.end(id).unwrap();
            self.fail_waiters(flight);
            self.route_crowd();
        }
    }

    fn die(&mut self) {
        self.flights.give_back(Some(self.helper));
        let held = std::mem::take(&mut self.held);
        let lost = held.iter().map(|(id, run)| (self.helper, *id, *run));
        self.lost.extend(lost);
        self.helper += 1;
    }

    /// A helper that is none any more answers.
    fn answer_late(&mut self, i: usize) {
        if let Some(i) = i.checked_rem(self.lost.len()) {
            let (helper, id, run) = self.lost[i];
            let refused = self.flights.answer(id, helper, run.len());
            assert_eq!(refused, Err(Refused::Unknown));
        }
    }

    fn offer(&mut self, run: Run) {
        let next = |run| self.map.next(run);
        if let Ok(Some((id, part))) = self.flights.offer(run, next, self.now) {
            self.store(id, part);
        }
    }

    fn expire(&mut self) {
        while let Some(flight) = self.flights.expire(self.now.saturating_sub(40)) {
            self.fail_waiters(flight);
            self.route_crowd();
        }
    }

    // The job for bios that have come back.

    fn run_job(&mut self) {
        let Some(mut job) = self.job.take() else {
            return self.start_job();
        };
        job.stage = match job.stage {
            JobStage::Flush => {
                job.end = self.notes.seal();
                match self.without {
                    Without::FuaFlush => JobStage::Copy,
                    _ => JobStage::Flushing(self.device.clock),
                }
            }
            JobStage::Flushing(point) => {
                self.device.flush(point);
                JobStage::Copy
            }
            JobStage::Copy => {
                let runs = self.notes.until(job.end).to_vec();
                if runs.is_empty() {
                    JobStage::Answer
                } else if self.meta.used() + runs.len() > LOG_ENTRIES {
                    self.wanted = true;
                    JobStage::Checkpoint(self.begun + 1)
                } else {
                    JobStage::Record(runs)
                }
            }
            JobStage::Record(runs) => {
                self.meta.log.extend(runs.into_iter().map(Entry::Valid));
                JobStage::Drop
            }
            JobStage::Drop => {
                self.notes.drop_until(job.end);
                self.route_crowd();
                JobStage::Answer
            }
            JobStage::Checkpoint(number) if self.done < number => {
                self.wanted = true;
                JobStage::Checkpoint(number)
            }
            JobStage::Checkpoint(_) => JobStage::Answer,
            JobStage::Answer => {
                for bio in job.promised {
                    self.answer(bio);
                }
                return;
            }
        };
        self.job = Some(job);
    }

    fn start_job(&mut self) {
        let mut job = Job {
            promised: Vec::new(),
            end: 0,
            stage: JobStage::Copy,
        };
        for bio in std::mem::take(&mut self.ended) {
            match bio.tag {
                Tag::Write(id) => self.end_write(id, true),
                Tag::Flush(end) => job.end = job.end.max(end),
                Tag::Fua | Tag::None => {}
            }
            if bio.op == Op::Write && !bio.fua {
                self.answer(bio);
                continue;
            }
            if bio.op == Op::Write {
                job.stage = JobStage::Flush;
            }
            if self.without == Without::Answer {
                self.answer(bio);
            } else {
                job.promised.push(bio);
            }
        }
        if !job.promised.is_empty() || job.end != 0 {
            self.job = Some(job);
        }
    }

    // Checkpoints.

    fn run_checkpoint(&mut self, all_cold: bool) {
        let Some(mut cp) = self.checkpoint.take() else {
            self.begun += 1;
            self.wanted = false;
            self.checkpoint = Some(Checkpoint {
                number: self.begun,
                stage: Stage::Retire,
                area: 1 - self.meta.area,
                needed: 0,
                dirty: BTreeSet::new(),
                noted: 0,
                must_flush: false,
                is_changed: false,
            });
            return;
        };
        cp.stage = match cp.stage {
            Stage::Retire => {
                cp.needed = self.meta.log.len();
                let hot = std::mem::take(&mut self.hot);
                if !all_cold && self.meta.used() + hot.len() < LOG_ENTRIES {
                    self.announce(hot);
                }
                Stage::Begin
            }
            Stage::Begin => {
                self.map.begin();
                cp.is_changed = self.map.take_changed(cp.area as u8, 0) & 1 != 0;
                cp.noted = self.notes.seal();
                cp.must_flush = std::mem::take(&mut self.advanced);
                if self.without == Without::Settle {
                    self.map.settle();
                }
                Stage::Dirty
            }
            Stage::Dirty => {
                cp.dirty = self.dirty.clone();
                Stage::Stale
            }
            Stage::Stale => {
                if cp.is_changed {
                    self.meta.areas[cp.area] = self.copy();
                }
                // What became valid meanwhile may be in the copy.
                cp.must_flush |= self.advanced && self.without != Without::SecondLook;
                cp.must_flush &= self.without != Without::DataFlush;
                Stage::Flush
            }
            Stage::Flush if cp.must_flush => Stage::Flushing(self.device.clock),
            Stage::Flush => Stage::Superblock,
            Stage::Flushing(point) => {
                self.device.flush(point);
                Stage::Superblock
            }
            Stage::Superblock => {
                self.meta.area = cp.area;
                self.meta.dirty = std::mem::take(&mut cp.dirty);
                self.meta.needed = cp.needed;
                Stage::Settle
            }
            Stage::Settle => {
                self.map.settle();
                Stage::Drop
            }
            Stage::Drop => {
                self.notes.drop_until(cp.noted);
                self.done = cp.number;
                return self.route_crowd();
            }
        };
        self.checkpoint = Some(cp);
    }

    fn copy(&self) -> BTreeSet<u64> {
        let mut bytes = [0; 16];
        self.map.copy_to(0, &mut bytes);
        let word = |i: usize| u64::from_le_bytes(bytes[i * 8..][..8].try_into().unwrap());
        (0..BLOCKS)
            .filter(|b| word((b / 64) as usize) >> (b % 64) & 1 == 1)
            .collect()
    }

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
                    truth.may_be(master(half)),
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
                    dirty.contains(&block) || value == master(half),
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
        }
        self
    }

    /// Nothing new comes and nothing goes wrong: everybody is answered, and in the end nothing is stale.
    fn rest(mut self) {
        for round in 0.. {
            let quiet = self.io.is_empty()
                && self.ended.is_empty()
                && self.job.is_none()
                && self.checkpoint.is_none()
                && self.open.is_empty();
            if quiet && self.map.count() == 0 {
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
            self.complete_io(0);
            self.commit();
            self.run_job();
            if self.wanted || self.checkpoint.is_some() {
                self.run_checkpoint(false);
            }
            self.check();
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
    AnswerError(u8),
    AnswerLate(u8),
    Die,
    Offer(u8, u8),
    Expire,
    Commit,
    Job,
    Checkpoint(bool),
    Crash(u64),
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
    let step = prop_oneof![150 => step(), 1 => any::<u64>().prop_map(Step::Crash)];
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

/// Plays lives, always the same ones, until the model panics.
fn notices(without: Without) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..200 {
        play(without, &life().new_tree(&mut runner).unwrap().current());
    }
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_without_a_flush_of_the_data_before_the_superblock() {
    notices(Without::DataFlush);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_what_becomes_valid_before_the_copy_is_not_flushed() {
    notices(Without::SecondLook);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_a_note_grows_after_the_flush_began() {
    notices(Without::Seal);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_a_flush_is_answered_before_the_record() {
    notices(Without::Answer);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_the_record_comes_before_the_content() {
    notices(Without::Record);
}

#[test]
#[should_panic(expected = "is valid and does not hold its content")]
fn fails_if_blocks_are_valid_before_they_are_stored() {
    notices(Without::Store);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_blocks_are_settled_before_the_superblock() {
    notices(Without::Settle);
}

/// Stale blocks are overwritten one after another, none beside the one before, and flushed; no checkpoint comes between.
fn overwrite_apart(without: Without) {
    let mut steps = Vec::new();
    for block in [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11] {
        let write = Step::Write(block * 2, 2, false);
        steps.extend([write, Step::Commit, Step::Io(0), Step::Job]);
    }
    steps.extend([Step::Flush, Step::Io(0)]);
    steps.extend([Step::Job, Step::Job, Step::Job, Step::Job, Step::Job]);
    play(without, &(0xfff, 0, steps));
}

#[test]
fn writes_that_find_no_room_for_their_note_wait() {
    overwrite_apart(Without::Nothing);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_there_is_no_room_for_the_note_of_a_write() {
    overwrite_apart(Without::Room);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_writes_to_fetched_blocks_are_not_noted() {
    notices(Without::Note);
}

#[test]
#[should_panic(expected = "does not hold its content")]
fn fails_if_the_edges_of_a_write_are_not_fetched() {
    notices(Without::Edges);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_a_fua_write_flushes_only_itself() {
    notices(Without::FuaFlush);
}
