// SPDX-License-Identifier: GPL-2.0

//! Checkpoints: the exact dirty bits, written beside the current ones and made current by the superblock.
//!
//! The order is what makes it crash-safe:
//!
//! 1. Under the log's lock: decide which extents stay hot, make the others cold, announce those that stay again.
//!    The new checkpoint's `log_seq` is the first of these records, so none of them is superfluous with it.
//! 2. If an extent was made cold, wait for an RCU grace period: every write that saw it hot has set its dirty bits
//!    (see `tracker`). Those of extents that stay hot may be missed, as their records are replayed.
//! 3. Copy the dirty bits of the pages that changed since the other area was last written into that area.
//!    The same for the stale bits; as these only get cleared, after the content has come, the data device is flushed
//!    after the copy and before step 4 (rule 2 of the contract).
//! 4. Write both superblock copies, the first behind a flush. The checkpoint is current now.
//! 5. Only now are the records before `log_seq` given up.
//!
//! A crash before 4 finds the old checkpoint and the whole log. Writes go on all the while; those that need a
//! record wait for step 1 alone.

use kernel::alloc::{flags::GFP_KERNEL, KVVec, KVec};
use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::area::Area;
use super::committer::Log;
use super::Pristine;
use crate::dm::{grace_period, trace, Buffer, WriteFlags};
use crate::shared::bits;
use crate::shared::checkpoint::{self, PageState, Place, Plane};
use crate::shared::geometry::Geometry;
use crate::shared::superblock::{Root, Superblock};
use crate::shared::undo::Undo;
use crate::shared::PAGE_SIZE;

/// Pages that are written with one request.
pub(super) const BATCH: usize = 16;

/// Which extents a checkpoint makes cold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Retire {
    /// Those that were not written to since this was last asked: time has passed.
    Unused,
    /// As many as it takes to have half of the hot set free, unused ones first: room is scarce. When it is the log
    /// that is full and not the hot set, that is none; their intents move to the front of the log.
    Surplus,
    /// All, so that the checkpoint is exact.
    All,
}

/// What is durable, and what it takes to write the next. Guarded by `Pristine::checkpoint`, which is taken before
/// the log's lock.
pub(super) struct Checkpointer {
    /// The durable superblock; `None` before the first activation.
    pub(super) sb: Option<Superblock>,
    areas: [Area; 2],
    /// The pages to be written, one bit each.
    todo: KVVec<u64>,
    /// The same of the stale plane.
    todo_stale: KVVec<u64>,
    /// Extents that were just made cold, with room for the whole hot set.
    cooled: KVec<u64>,
    buffer: Buffer,
}

impl Checkpointer {
    pub(super) fn new(geometry: &Geometry, hot_extents: u32) -> Result<Self> {
        let words = usize::try_from(bits::words_for(checkpoint::plane_pages(geometry)))?;
        Ok(Self {
            sb: None,
            areas: [Area::new(geometry)?, Area::new(geometry)?],
            todo: KVVec::from_elem(0, words, GFP_KERNEL)?,
            todo_stale: KVVec::from_elem(0, words, GFP_KERNEL)?,
            cooled: KVec::with_capacity(usize::try_from(hot_extents)?, GFP_KERNEL)?,
            buffer: Buffer::new(BATCH)?,
        })
    }

    /// Scratch for recovery and superblocks.
    pub(super) fn buffer(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    /// Scratch for extents that are made cold; it has room for the whole hot set.
    pub(super) fn cooled(&mut self) -> &mut KVec<u64> {
        &mut self.cooled
    }

    /// Forgets what the areas hold.
    pub(super) fn reset_areas(&mut self) {
        for area in &mut self.areas {
            area.reset();
        }
    }

    /// What is known of `area` (0 or 1).
    pub(super) fn area(&mut self, area: u8) -> Option<&mut Area> {
        self.areas.get_mut(usize::from(area))
    }

    /// Bytes of memory that grow with the device.
    pub(super) fn bytes(&self) -> usize {
        let areas: usize = self.areas.iter().map(Area::bytes).sum();
        areas + (self.todo.len() + self.todo_stale.len()) * 8
    }
}

impl Pristine {
    /// The job that makes room in the hot set and in the log.
    pub(super) fn make_room(&self) {
        // The committer may have been faster.
        if self.is_room_scarce() && self.make_room_now().is_ok() {
            self.plan_checkpoint();
        }
    }

    /// Makes room in the hot set by way of the log or, if the log is filling up, in both with a checkpoint.
    pub(super) fn make_room_now(&self) -> Result {
        if !self.retire_by_log()? {
            self.checkpoint(Retire::Surplus)?;
        }
        Ok(())
    }

    /// The job that runs when changes have waited long enough for a checkpoint.
    pub(super) fn settle(&self) {
        let retire = if self.leaving.load(Relaxed) {
            Retire::All
        } else {
            Retire::Unused
        };
        if self.checkpoint(retire).is_ok() {
            self.plan_checkpoint();
        }
    }

    /// Writes a checkpoint and returns its sequence number when it is durable.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device is not active, `EROFS` if it is read-only. Any other means that the metadata
    /// device failed; the device is read-only from here on.
    pub(super) fn checkpoint(&self, retire: Retire) -> Result<u64> {
        let mut cp = self.checkpoint.lock();
        if !self.is_active() {
            return Err(ENODEV);
        }
        self.checkpoint_locked(&mut cp, retire, false)
    }

    /// As [`Pristine::checkpoint`], for those who hold the lock; `clean` says that no write will follow.
    pub(super) fn checkpoint_locked(
        &self,
        cp: &mut Checkpointer,
        retire: Retire,
        clean: bool,
    ) -> Result<u64> {
        if !self.is_writable() {
            return Err(EROFS);
        }
        trace::checkpoint_begin(
            || self.last_number(),
            self.stats.hot.load(Relaxed),
            self.stats.log_used.load(Relaxed),
        );
        let result = self.write_checkpoint(cp, retire, clean);
        trace::checkpoint_end(|| self.last_number(), &result);
        if result.is_err() {
            self.fail("writing a checkpoint failed");
        }
        result
    }

    /// As [`Pristine::checkpoint_locked`], but what a failure means is the caller's to say.
    pub(super) fn write_checkpoint(
        &self,
        cp: &mut Checkpointer,
        retire: Retire,
        clean: bool,
    ) -> Result<u64> {
        let Some(old) = cp.sb else { return Err(ENODEV) };
        let area = 1 - old.root.area;

        let (log_seq, cooled, undo) = self.retire(cp, retire, area)?;
        if cooled {
            // A write or a task may be waiting, unless it is only time that has passed.
            grace_period(retire != Retire::Unused);
        }
        let root = Root {
            area,
            seq: old.root.seq + 1,
            log_seq,
            previous_log_seq: old.root.log_seq,
            ..old.root
        };
        let noted = self.begin_stale(cp, area);
        self.write_planes(cp, &root, Plane::Dirty)?;
        self.write_planes(cp, &root, Plane::Stale)?;
        self.write_index(cp, &root)?;
        // Looked at again: what became valid before its page was copied is in the checkpoint too.
        if let (Some((_, advanced)), Some(fetcher)) = (noted, &self.fetcher) {
            if advanced || fetcher.advanced.load(Relaxed) {
                self.meta.flush_data()?;
            }
        }
        let written = cp.areas.get(usize::from(area)).ok_or(EINVAL)?;
        let sb = Superblock {
            sequence: old.sequence + 1,
            root: Root {
                dirty_blocks: written.dirty(),
                stale_blocks: written.stale(),
                ..root
            },
            clean,
            undo: undo.unwrap_or(old.undo),
            ..old
        };
        self.meta.write_superblock(&sb, &mut cp.buffer)?;
        cp.sb = Some(sb);
        self.count_meta(2);
        self.end_stale(noted);

        self.stats.checkpoints.add(1, Relaxed);
        self.stats.checkpoint_seq.store(root.seq, Relaxed);
        let mut log = self.log.lock();
        log.needed_seq = log_seq;
        self.publish_log(&log);
        Ok(root.seq)
    }

    /// Before the planes are copied: one past the number of the last note that the checkpoint makes superfluous, and
    /// whether blocks became valid since the last one.
    fn begin_stale(&self, cp: &mut Checkpointer, area: u8) -> Option<(u64, bool)> {
        let fetcher = self.fetcher.as_ref()?;
        let mut desk = fetcher.desk.lock();
        fetcher.map.begin();
        for (i, word) in cp.todo_stale.iter_mut().enumerate() {
            *word = fetcher.map.take_changed(area, i);
        }
        let noted = desk.notes.seal();
        Some((noted, fetcher.advanced.xchg(false, Relaxed)))
    }

    /// The checkpoint is durable.
    fn end_stale(&self, noted: Option<(u64, bool)>) {
        let (Some(fetcher), Some((noted, _))) = (&self.fetcher, noted) else {
            return;
        };
        {
            let _desk = fetcher.desk.lock();
            fetcher.map.settle();
        }
        let crowd = fetcher.drop_notes(noted);
        self.route_all(fetcher, crowd);
    }

    pub(super) fn count_meta(&self, pages: usize) {
        self.stats
            .meta_bytes
            .add((pages * PAGE_SIZE) as u64, Relaxed); // CAST: usize to u64.
    }

    /// Step 1: returns the first record that must be replayed over the new checkpoint, whether any extent was
    /// made cold, and how much the undo area holds.
    fn retire(
        &self,
        cp: &mut Checkpointer,
        retire: Retire,
        area: u8,
    ) -> Result<(u64, bool, Option<Undo>)> {
        let mut guard = self.log.lock();
        let log = &mut *guard;
        let count = log.hot.len();
        self.cool_some(log, retire, |_| ());
        self.tracker.forget_used();

        let log_seq = log.next_seq;
        if !self.carry_over(log)? {
            for extent in &log.hot {
                self.tracker.cool(*extent);
            }
            log.hot.clear();
        }
        let cooled = log.hot.len() < count;
        // From here on an extent that is hot, or gets hot, counts as changed for the checkpoint after this one.
        for (i, word) in cp.todo.iter_mut().enumerate() {
            *word = self.tracker.take_changed(area, i);
        }
        for extent in &log.hot {
            self.tracker.mark_changed(*extent);
        }
        self.publish_log(log);
        let undo = log.undo.as_ref().map(|undo| undo.root);
        Ok((log_seq, cooled, undo))
    }

    /// Makes extents cold and takes them out of the hot set; `each` gets every one of them.
    pub(super) fn cool_some(&self, log: &mut Log, retire: Retire, mut each: impl FnMut(u64)) {
        // CAST: A u32 fits a usize on 64-bit machines.
        let half = self.features.hot_extents as usize / 2;
        let count = log.hot.len();
        let used = log.hot.iter().filter(|e| self.tracker.is_used(**e)).count();
        // How many of the used ones and of the others go, those that became hot first in front.
        let (mut used_surplus, mut unused_surplus) = match retire {
            Retire::All => (used, count - used),
            Retire::Unused => (used.saturating_sub(half), count - used),
            Retire::Surplus => {
                let surplus = count.saturating_sub(half);
                let unused = surplus.min(count - used);
                (surplus - unused, unused)
            }
        };
        log.hot.retain(|extent| {
            let surplus = if self.tracker.take_used(*extent) {
                &mut used_surplus
            } else {
                &mut unused_surplus
            };
            if *surplus == 0 {
                return true;
            }
            *surplus -= 1;
            self.tracker.cool(*extent);
            each(*extent);
            false
        });
    }

    /// Writes the first `pages` pages of the buffer at page `at`; the superblock's flush makes them durable.
    fn write_pages(&self, at: u64, buffer: &mut Buffer, pages: usize) -> Result {
        self.meta.write(at, buffer, pages, WriteFlags::default())?;
        self.count_meta(pages);
        Ok(())
    }

    /// Step 3.
    fn write_planes(&self, cp: &mut Checkpointer, root: &Root, plane: Plane) -> Result {
        let before = checkpoint::plane_index(&self.geometry, plane, 0);
        let start = self.area_start(root.area)? + checkpoint::index_pages(&self.geometry) + before;
        let area = cp.areas.get_mut(usize::from(root.area)).ok_or(EINVAL)?;
        let todo = match plane {
            Plane::Dirty => &cp.todo,
            Plane::Stale => &cp.todo_stale,
        };
        // Pages `first..first + filled` of the plane are in the buffer.
        let mut first = 0;
        let mut filled = 0;
        for (i, todo) in todo.iter().enumerate() {
            let mut left = *todo;
            while left != 0 {
                // CAST: usize to u64.
                let page = i as u64 * bits::WORD_BITS + u64::from(left.trailing_zeros());
                left &= left - 1;
                if filled != 0 && (filled == BATCH || first + filled as u64 != page) {
                    self.write_pages(start + first, &mut cp.buffer, filled)?;
                    filled = 0;
                }
                let n = usize::try_from(page)?;
                let mut count = 0;
                let to = cp.buffer.page(filled).ok_or(EINVAL)?;
                let first_word = n * checkpoint::PAGE_WORDS;
                let place = self.place(root, n + usize::try_from(before)?)?;
                checkpoint::encode_plane_with(to, &place, |payload| {
                    count = match (plane, &self.fetcher) {
                        (Plane::Dirty, _) => self.tracker.copy_dirty(first_word, payload),
                        (Plane::Stale, Some(fetcher)) => {
                            let _desk = fetcher.desk.lock();
                            fetcher.map.copy_to(first_word, payload)
                        }
                        // Nothing to do is marked then.
                        (Plane::Stale, None) => 0,
                    };
                });
                // CAST: A page has 32512 blocks.
                if area.set(plane, page, count as u16) == PageState::Stored {
                    if filled == 0 {
                        first = page;
                    }
                    filled += 1;
                }
            }
        }
        if filled != 0 {
            self.write_pages(start + first, &mut cp.buffer, filled)?;
        }
        Ok(())
    }

    /// Writes the index of the area.
    fn write_index(&self, cp: &mut Checkpointer, root: &Root) -> Result {
        let start = self.area_start(root.area)?;
        let area = cp.areas.get(usize::from(root.area)).ok_or(EINVAL)?;
        for n in 0..checkpoint::index_pages(&self.geometry) {
            let place = self.place(root, usize::try_from(n)?)?;
            checkpoint::encode_index_words(cp.buffer.first()?, &place, |i| area.index_word(i));
            self.write_pages(start + n, &mut cp.buffer, 1)?;
        }
        Ok(())
    }

    fn area_start(&self, area: u8) -> Result<u64> {
        self.layout
            .area_start
            .get(usize::from(area))
            .copied()
            .ok_or(EINVAL)
    }

    fn place(&self, root: &Root, index: usize) -> Result<Place<'_>> {
        Ok(Place {
            meta_uuid: &self.meta_uuid,
            area: root.area,
            seq: root.seq,
            index: u32::try_from(index)?,
        })
    }

    /// Writes the superblock with the clean flag as given, and nothing else changed.
    pub(super) fn mark(&self, cp: &mut Checkpointer, clean: bool) -> Result {
        let Some(old) = cp.sb else { return Err(ENODEV) };
        let sb = Superblock {
            sequence: old.sequence + 1,
            clean,
            ..old
        };
        self.meta.write_superblock(&sb, &mut cp.buffer)?;
        self.count_meta(2);
        cp.sb = Some(sb);
        Ok(())
    }
}
