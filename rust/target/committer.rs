// SPDX-License-Identifier: GPL-2.0

//! The slow path: writes to cold extents wait here until their intent is durable.
//!
//! `map` queues such bios; one job takes all that wait, announces their extents in one record, writes it with
//! FUA, makes the extents hot and sends the bios through the fast path again. Bios that come meanwhile make up
//! the next record.
//!
//! When half of the hot set is taken, an extent that is written to for the first time since the last checkpoint is not
//! made hot: the record tells the very blocks, which are dirty from then on. If writes go all over a large device, each to
//! another extent, that is all there ever is to tell; to make the extents hot, and others cold again for their room, cost
//! twice as much (`make bench-cost`, `randwrite_4k_cold_qd32`). An extent that is written to again is made hot.

use kernel::alloc::{flags::GFP_KERNEL, KVec};
use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::fetch::tag;
use super::tracker::bit;
use super::undo::Undo;
use super::{job, Pristine};
use crate::dm::{sort, trace, AtomicWords, BioList, Buffer, MapBio, Mapped, Status, WriteFlags};
use crate::shared::geometry::{Geometry, Run};
use crate::shared::log::{Entry, Writer, RECORD_ENTRIES};

/// Pages of the ring that ordinary commits leave to checkpoints, for the intents that they carry over.
pub(super) const RESERVED_PAGES: u64 = 2;

/// The log and the hot set. Guarded by `Pristine::log`; after it only `Pristine::pending` may be taken.
pub(super) struct Log {
    /// Number of the next record.
    pub(super) next_seq: u64,
    /// First record that recovery needs with the durable superblock.
    pub(super) needed_seq: u64,
    /// The hot extents, those that became hot first in front.
    pub(super) hot: KVec<u64>,
    /// Extents announced in the record that is being made.
    fresh: KVec<u64>,
    /// The same as bits, one for each extent.
    announced: AtomicWords,
    /// Blocks told in the record that is being made.
    pub(super) exact: KVec<Run>,
    /// The record that is being made. Only a [`Writer`] changes it.
    pub(super) buffer: Buffer,
    /// The undo area, if there is one.
    pub(super) undo: Option<Undo>,
}

impl Log {
    /// A log without records. There is memory for `hot_extents` extents from the start, so that writes need none; only
    /// one that alone takes more extents than are free asks for it.
    pub(super) fn new(geometry: &Geometry, hot_extents: u32, undo_pages: u64) -> Result<Self> {
        let words = usize::try_from(crate::shared::bits::words_for(geometry.extents()))?;
        let extents = usize::try_from(hot_extents)?;
        Ok(Self {
            next_seq: 1,
            needed_seq: 1,
            hot: KVec::with_capacity(extents, GFP_KERNEL)?,
            fresh: KVec::with_capacity(extents, GFP_KERNEL)?,
            announced: AtomicWords::new(words)?,
            exact: KVec::with_capacity(RECORD_ENTRIES, GFP_KERNEL)?,
            buffer: Buffer::new(1)?,
            undo: match undo_pages {
                0 => None,
                pages => Some(Undo::new(pages)?),
            },
        })
    }

    /// Bytes of memory that grow with the device, or that an undo area takes.
    pub(super) fn bytes(&self) -> usize {
        self.announced.bytes() + self.undo.as_ref().map_or(0, Undo::bytes)
    }

    /// Records that recovery would replay.
    pub(super) fn used(&self) -> u64 {
        self.next_seq.saturating_sub(self.needed_seq)
    }
}

/// Bios whose record is durable.
struct Ready {
    bios: BioList,
    /// All their blocks were told and are dirty: they need not go through the fast path again.
    told: bool,
}

/// The runs of equal neighbours in a sorted list.
fn runs(sorted: &[u64]) -> impl Iterator<Item = Run> + '_ {
    let mut rest = sorted;
    core::iter::from_fn(move || {
        let first = *rest.first()?;
        let mut run = Run {
            start: first,
            end: first + 1,
        };
        rest = rest.get(1..)?;
        while rest.first() == Some(&run.end) {
            run.end += 1;
            rest = rest.get(1..).unwrap_or(&[]);
        }
        Some(run)
    })
}

impl Pristine {
    /// `map` of a bio that is not the common case: sends it on if it may be sent now, else lets it wait for its
    /// intent. Never inlined, so that the common case saves no registers for it.
    #[inline(never)]
    pub(super) fn map_change(&self, bio: MapBio) -> Mapped {
        if !self.is_writable() {
            self.refuse_one();
            return bio.complete(Err(Status::IoError));
        }
        let blocks = self.geometry.blocks_of(bio.sector(), bio.sectors());
        if self.tracker.admit(blocks) {
            return bio.remap(self.meta.data());
        }
        if bio.is_nowait() {
            return bio.complete(Err(Status::Again));
        }
        let (bio, mapped) = bio.defer();
        if let Some(fetcher) = &self.fetcher {
            fetcher.hooks.set_tag(&bio, tag::NONE);
        }
        self.defer(bio);
        mapped
    }

    /// The commit job: until no bio waits.
    pub(super) fn commit(&self) {
        loop {
            let mut waiting = self.take_pending();
            if waiting.is_empty() {
                break;
            }
            if !self.is_writable() {
                self.refuse(waiting);
                continue;
            }
            let ready = match self.announce(&mut waiting) {
                Ok(Some(ready)) => ready,
                // The log or the hot set is full: make room, then go on with the same bios.
                Ok(None) => {
                    self.put_back(waiting);
                    if self.make_room_now().is_err() {
                        // The device is read-only now; the next round refuses the bios.
                        self.fail("checkpoint failed");
                    }
                    continue;
                }
                Err(ready) => {
                    self.refuse(ready);
                    self.put_back(waiting);
                    continue;
                }
            };
            self.put_back(waiting);
            self.release(ready);
        }
        self.plan_checkpoint();
    }

    fn refuse(&self, mut bios: BioList) {
        while let Some(bio) = bios.pop() {
            self.refuse_one();
            self.drop_change(bio, Status::IoError);
        }
    }

    /// Sends bios whose extents were just made hot through the fast path again.
    fn release(&self, mut ready: Ready) {
        let mut again = BioList::new();
        while let Some(bio) = ready.bios.pop() {
            let blocks = || self.geometry.blocks_of(bio.sector(), bio.sectors());
            if ready.told || self.tracker.admit(blocks()) {
                self.submit(bio);
            } else {
                // A checkpoint took the extent back already.
                again.push(bio);
            }
        }
        self.put_back(again);
    }

    /// Announces the extents of bios from the front of `waiting` in one durable record and makes them hot.
    ///
    /// `Ok(None)`: a checkpoint must make room first. `Err`: the record could not be written; the bios that
    /// depended on it.
    fn announce(&self, waiting: &mut BioList) -> Result<Option<Ready>, BioList> {
        let mut guard = self.log.lock();
        let log = &mut *guard;
        let pages = self.layout.log_pages;
        // CAST: A u32 fits a usize on 64-bit machines, which the geometry's sizes need anyway.
        let limit = self.features.hot_extents as usize;
        if log.used() + RESERVED_PAGES >= pages || log.hot.len() >= limit {
            return Ok(None);
        }
        if let Some(undo) = log.undo.as_mut().filter(|undo| undo.is_open()) {
            if undo.close_if_full(&self.geometry) {
                self.publish_log(log);
                drop(guard);
                self.say_undo_closed();
                // The same bios come again.
                return Ok(Some(Ready {
                    bios: BioList::new(),
                    told: false,
                }));
            }
            return self
                .keep_and_tell(guard, waiting)
                .map(|bios| Some(Ready { bios, told: false }));
        }

        let mut ready = BioList::new();
        let mut all_told = true;
        let mut full = false;
        let seq = log.next_seq;
        {
            let Ok(page) = log.buffer.first() else {
                return Err(ready);
            };
            let mut writer = Writer::again(page);
            // The limit holds but for the last bio, which must have all its extents hot at once.
            while log.hot.len() + log.fresh.len() < limit || ready.is_empty() {
                let Some(bio) = waiting.pop() else { break };
                let blocks = self.geometry.blocks_of(bio.sector(), bio.sectors());
                let extents = self.geometry.extents_of(blocks);
                // Only one that touches few extents: the others would have to be looked at one by one.
                if log.hot.len() + log.fresh.len() >= limit / 2
                    && extents.len() <= 2
                    && log.exact.len() < RECORD_ENTRIES
                    && self.tracker.touch(extents)
                    && writer.push(Entry::Dirty(blocks))
                {
                    // There is room for as many as a record holds.
                    let _ = log.exact.push_within_capacity(blocks);
                    ready.push(bio);
                    continue;
                }
                all_told = false;
                let cold = |extent: u64, announced: &AtomicWords| {
                    !self.tracker.is_hot(extent) && !is_marked(announced, extent)
                };
                let mut at = extents.start;
                while at < extents.end {
                    if !cold(at, &log.announced) {
                        at += 1;
                        continue;
                    }
                    let mut run = Run {
                        start: at,
                        end: at + 1,
                    };
                    while run.end < extents.end && cold(run.end, &log.announced) {
                        run.end += 1;
                    }
                    let count = usize::try_from(run.len()).unwrap_or(usize::MAX);
                    let room = log
                        .fresh
                        .reserve(count, GFP_KERNEL)
                        .and_then(|()| log.hot.reserve(log.fresh.len() + count, GFP_KERNEL));
                    full = room.is_err() || writer.room() == 0;
                    if full {
                        break;
                    }
                    let rest = writer.push_run(run);
                    for extent in run.start..rest.start {
                        mark(&log.announced, extent);
                        // The memory was reserved above.
                        let _ = log.fresh.push_within_capacity(extent);
                    }
                    full = !rest.is_empty();
                    if full {
                        break;
                    }
                    at = run.end;
                }
                if full && ready.is_empty() && log.fresh.is_empty() {
                    // No memory for even one bio.
                    self.drop_change(bio, Status::Resource);
                    full = false;
                    continue;
                }
                // When the record is full, this bio goes round again for the rest of its extents.
                ready.push(bio);
                if full {
                    break;
                }
            }
            writer.finish(&self.meta_uuid, seq);
        }

        let told = log.fresh.len() + log.exact.len();
        let result = if told == 0 {
            Ok(())
        } else {
            self.write_record(log, WriteFlags::FUA)
        };
        for extent in &log.fresh {
            unmark(&log.announced, *extent);
        }
        if result.is_err() {
            log.fresh.clear();
            log.exact.clear();
            drop(guard);
            self.fail("writing the log failed");
            return Err(ready);
        }
        if told != 0 {
            self.stats.intents.add(told as u64, Relaxed); // CAST: usize to u64.
            trace::commit(|| self.last_number(), seq, told);
        }
        // Under the log's lock: a checkpoint that does without the record takes the lock before it copies the bits.
        for blocks in &log.exact {
            self.tracker.tell(*blocks);
        }
        log.exact.clear();
        for extent in &log.fresh {
            self.tracker.heat(*extent);
            // The memory was reserved above.
            let _ = log.hot.push_within_capacity(*extent);
        }
        log.fresh.clear();
        self.publish_log(log);
        Ok(Some(Ready {
            bios: ready,
            told: all_told,
        }))
    }

    /// Announces the hot extents again, in records after all that a checkpoint makes superfluous. The caller holds
    /// the log's lock and has sorted nothing; the order of `log.hot` is kept.
    ///
    /// `Ok(false)`: there is no room in the ring for all of them; nothing was written.
    pub(super) fn carry_over(&self, log: &mut Log) -> Result<bool> {
        if log.hot.is_empty() {
            return Ok(true);
        }
        log.fresh.clear();
        if log.fresh.extend_from_slice(&log.hot, GFP_KERNEL).is_err() {
            // Without memory they are made cold, which is as right and costs their next writers a record.
            log.fresh.clear();
            return Ok(false);
        }
        sort(&mut log.fresh);
        let entries = runs(&log.fresh).count();
        let records = u64::try_from(entries.div_ceil(RECORD_ENTRIES))?;
        if log.used() + records >= self.layout.log_pages {
            log.fresh.clear();
            return Ok(false);
        }
        let fresh = core::mem::take(&mut log.fresh);
        let written = self.put_all(log, records, runs(&fresh), Entry::Intent);
        log.fresh = fresh;
        log.fresh.clear();
        written.map(|()| true)
    }

    /// Makes the numbers of the log visible to status and statistics, which must not wait for its lock.
    pub(super) fn publish_log(&self, log: &Log) {
        self.stats.hot.store(log.hot.len() as u64, Relaxed); // CAST: usize to u64.
        self.stats.log_used.store(log.used(), Relaxed);
        if let Some(undo) = &log.undo {
            self.stats.undo_used.store(undo.root.used, Relaxed);
            self.stats.undo_kept.store(undo.root.kept, Relaxed);
            self.stats.undo_state.store(undo.state_code(), Relaxed);
        }
    }

    /// Whether the hot set or the log is so full that a checkpoint should make room before writes wait for it.
    pub(super) fn is_room_scarce(&self) -> bool {
        self.stats.hot.load(Relaxed) > u64::from(self.features.hot_extents) / 4 * 3
            || self.stats.log_used.load(Relaxed) > self.layout.log_pages / 2
    }

    /// Sees to it that a checkpoint comes, soon if room gets scarce.
    pub(super) fn plan_checkpoint(&self) {
        let settled = self.stats.hot.load(Relaxed) == 0 && self.stats.log_used.load(Relaxed) == 0;
        if !self.is_writable() || settled {
            return;
        }
        if self.is_room_scarce() {
            self.jobs.now(job::MAKE_ROOM);
        } else if self.features.checkpoint_ms != 0 {
            self.jobs.within(job::SETTLE, self.features.checkpoint_ms);
        }
    }
}

fn is_marked(words: &AtomicWords, extent: u64) -> bool {
    let (i, mask) = bit(extent);
    words.get(i) & mask != 0
}

fn mark(words: &AtomicWords, extent: u64) {
    let (i, mask) = bit(extent);
    words.set(i, mask);
}

fn unmark(words: &AtomicWords, extent: u64) {
    let (i, mask) = bit(extent);
    words.clear(i, mask);
}
