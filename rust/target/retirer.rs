// SPDX-License-Identifier: GPL-2.0

//! Makes room in the hot set without a checkpoint: the exact bits of extents go into the log.
//!
//! A checkpoint writes a whole page of the plane for each extent, if extents are written to all over a large device;
//! the log takes 16 bytes for an extent with one dirty run, and neither the index nor the superblocks need to be
//! written. With it, a write to a cold extent far from all others costs a sixth of what it did
//! (`make bench-cost`, `randwrite_4k_cold_qd32`), and 4 KiB less of metadata.
//!
//! The order is what makes it crash-safe:
//!
//! 1. Under the log's lock: make the extents cold.
//! 2. Wait for an RCU grace period: every write that saw them hot has set its dirty bits (see `tracker`).
//! 3. Under the log's lock: leave out extents that were announced again meanwhile, as what is told of them now must
//!    not void that. Of the others, tell the dirty blocks, then that these are all.
//!
//! Until the record of step 3 is durable, recovery finds the intents; from then on it finds the exact bits. Records
//! are given up by checkpoints alone.

use kernel::alloc::KVec;
use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::checkpointer::Retire;
use super::committer::Log;
use super::Pristine;
use crate::dm::{grace_period, sort, WriteFlags};
use crate::shared::bits;
use crate::shared::geometry::Run;
use crate::shared::log::{Entry, Writer, MAX_RUN, RECORD_ENTRIES};
use crate::shared::PAGE_SIZE;

/// Most records that one round may take. Extents that are dirty in so many pieces that it takes more are better off
/// in a checkpoint.
const MAX_RECORDS: u64 = 4;

/// Records under way.
struct Draft {
    /// Entries in the log's buffer.
    entries: usize,
    /// Records that may still be written.
    left: u64,
}

impl Draft {
    /// Nothing so far; `records` may be written.
    fn new(records: u64) -> Self {
        Self {
            entries: 0,
            left: records,
        }
    }
}

impl Pristine {
    /// Makes half of the hot set free. `Ok(false)`: the log has no room for it, or it would take too many records; a
    /// checkpoint must do it.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is not active, `EROFS` if it is read-only. Any other means that the metadata device
    /// failed; the device is read-only from here on.
    pub(super) fn retire_by_log(&self) -> Result<bool> {
        let mut cp = self.checkpoint.lock();
        if !self.is_active() {
            return Err(ENODEV);
        }
        if !self.is_writable() {
            return Err(EROFS);
        }
        let cooled = cp.cooled();
        cooled.clear();
        {
            let mut log = self.log.lock();
            if log.used() + MAX_RECORDS > self.layout.log_pages / 2 {
                return Ok(false);
            }
            self.cool_some(&mut log, Retire::Surplus, |extent| {
                // There is room for a full hot set. If one write made it larger, the others' intents stand.
                let _ = cooled.push_within_capacity(extent);
            });
            self.publish_log(&log);
        }
        if cooled.is_empty() {
            return Ok(true);
        }
        grace_period(true);
        sort(cooled);
        let mut log = self.log.lock();
        let told = self.tell(&mut log, cooled);
        self.publish_log(&log);
        drop(log);
        if told.is_err() {
            self.fail("writing the log failed");
        }
        told
    }

    /// Step 3, for sorted extents; `Ok(false)` if not all of them could be told.
    fn tell(&self, log: &mut Log, cooled: &KVec<u64>) -> Result<bool> {
        let mut draft = Draft::new(MAX_RECORDS);
        let mut cold = cooled
            .iter()
            .copied()
            .filter(|extent| !self.tracker.is_hot(*extent))
            .peekable();
        while let Some(start) = cold.next() {
            let mut extents = Run {
                start,
                end: start + 1,
            };
            while cold.next_if_eq(&extents.end).is_some() {
                extents.end += 1;
            }
            let blocks = self.geometry.blocks_in(extents);
            let mut at = blocks.start;
            while let Some((is_dirty, run)) =
                bits::next_run(|i| self.tracker.dirty_word(i), at, blocks.end)
            {
                if is_dirty && !self.put(log, &mut draft, run, Entry::Dirty)? {
                    return Ok(false);
                }
                at = run.end;
            }
            if !self.put(log, &mut draft, extents, Entry::Settled)? {
                return Ok(false);
            }
        }
        self.send(log, &mut draft)?;
        Ok(true)
    }

    /// Adds entries for `run`, writing records as they fill; `false` if they are too many.
    fn put(
        &self,
        log: &mut Log,
        draft: &mut Draft,
        run: Run,
        kind: fn(Run) -> Entry,
    ) -> Result<bool> {
        let mut rest = run;
        while !rest.is_empty() {
            if draft.entries == RECORD_ENTRIES {
                // The last record is left for those who come after.
                if draft.left <= 1 {
                    return Ok(false);
                }
                self.send(log, draft)?;
            }
            let page = log.buffer.first()?;
            let mut writer = match draft.entries {
                0 => Writer::again(page),
                n => Writer::resume(page, n),
            };
            let part = Run {
                start: rest.start,
                end: rest.end.min(rest.start.saturating_add(MAX_RUN)),
            };
            if !writer.push(kind(part)) {
                return Err(EINVAL);
            }
            draft.entries = writer.count();
            rest.start = part.end;
        }
        Ok(true)
    }

    /// Writes all of `runs` as entries of a kind; `records` have room for them, and are counted by the caller.
    pub(super) fn put_all(
        &self,
        log: &mut Log,
        records: u64,
        mut runs: impl Iterator<Item = Run>,
        kind: fn(Run) -> Entry,
    ) -> Result {
        let mut draft = Draft::new(records);
        runs.try_for_each(|run| match self.put(log, &mut draft, run, kind)? {
            true => Ok(()),
            // There are more than the caller counted.
            false => Err(EINVAL),
        })?;
        self.send(log, &mut draft)
    }

    /// Writes the record that is under way, if it has entries.
    fn send(&self, log: &mut Log, draft: &mut Draft) -> Result {
        if draft.entries == 0 {
            return Ok(());
        }
        let seq = log.next_seq;
        Writer::resume(log.buffer.first()?, draft.entries).finish(&self.meta_uuid, seq);
        draft.entries = 0;
        draft.left -= 1;
        self.write_record(log, WriteFlags::FUA)
    }

    /// Writes the record in the log's buffer, which has the number `next_seq`, and counts it.
    pub(super) fn write_record(&self, log: &mut Log, flags: WriteFlags) -> Result {
        let at = self.layout.log_page(log.next_seq);
        self.meta.write(at, &mut log.buffer, 1, flags)?;
        log.next_seq += 1;
        self.stats.records.add(1, Relaxed);
        self.stats.meta_bytes.add(PAGE_SIZE as u64, Relaxed); // CAST: 4096.
        Ok(())
    }
}
