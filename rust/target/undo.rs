// SPDX-License-Identifier: GPL-2.0

//! Originals into the undo area, before their blocks change; see [`crate::shared::undo`] for what lies there.
//!
//! While the area is open no extent is made hot: the committer takes the blocks of the writes that wait, reads the content of those
//! that are clean from the data device, and writes it to the area as one chunk; then the record that calls these very
//! blocks dirty, behind a flush that makes the chunk durable, too. Only then the writes are sent. So
//!
//! - the area gets just what changes, and a few megabytes of it serve a system that writes here and there; copying
//!   whole extents, as their intent covers them, took up to 256 times as much;
//! - no crash makes a block dirty whose original is not there, as the record is exact;
//! - each first write to a block waits for its copy. That is the price, and `make bench-cost` (`pristine_undo`) shows it.
//!
//! What needs no copy: blocks that are dirty, which have theirs, and stale ones, whose local content is not the master's. A
//! page that is zero takes no room but its entry, as on most of an image's free space.
//!
//! When the area is full, or cannot be written, it is closed, which the status line, the kernel log and a uevent say; from then
//! on the device works as one without an area. It opens again when it was emptied, which is done while the device is not
//! active.
//!
//! A block becomes stale to clean only when its content is on the data device, and a bio that waits here was routed after
//! that; a block in flight belongs to one writer, which covers it as a whole. So what is not stale here is the
//! master's.

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;
use kernel::sync::MutexGuard;

use super::checkpointer::Checkpointer;
use super::committer::Log;
use super::Pristine;
use crate::dm::{may_print, trace, BioList, Buffer, WriteFlags};
use crate::shared::bits;
use crate::shared::geometry::{Geometry, Run};
use crate::shared::log::{Entry, Writer, MAX_RUN, RECORD_ENTRIES};
use crate::shared::status::UndoStatus;
use crate::shared::undo::{self, Place, State, CHUNK_PAGES, MAX_ENTRIES};
use crate::shared::{Page, PAGE_SIZE};

/// The undo area of an active device. Guarded by `Pristine::log`.
pub(super) struct Undo {
    /// What it holds; the superblock may say less.
    pub(super) root: undo::Undo,
    state: State,
    pages: u64,
    /// A header and its data pages.
    buffer: Buffer,
}

impl Undo {
    /// An area of `pages` pages, of which nothing is known yet.
    pub(super) fn new(pages: u64) -> Result<Self> {
        Ok(Self {
            root: undo::Undo::default(),
            state: State::Open,
            pages,
            buffer: Buffer::new(CHUNK_PAGES)?,
        })
    }

    /// Bytes of memory that it takes.
    pub(super) fn bytes(&self) -> usize {
        CHUNK_PAGES * PAGE_SIZE
    }

    /// Whether it takes more originals.
    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// A number for the state; see [`state_of`].
    pub(super) fn state_code(&self) -> u64 {
        match self.state {
            State::Open => 0,
            State::Full => 1,
            State::Failed => 2,
        }
    }

    /// Blocks that one more chunk can take for certain, also if none of them is zero.
    fn room(&self, geometry: &Geometry) -> u64 {
        let left = self.pages.saturating_sub(self.root.used).saturating_sub(1);
        // CAST: 256.
        undo::blocks_in(geometry, left.min(MAX_ENTRIES as u64))
    }

    /// Closes it if it has no room for a block; whether it was open until now and has none.
    pub(super) fn close_if_full(&mut self, geometry: &Geometry) -> bool {
        let is_full = self.is_open() && self.room(geometry) == 0;
        if is_full {
            self.state = State::Full;
        }
        is_full
    }
}

/// The state that [`Undo::state_code`] made a number of.
fn state_of(code: u64) -> State {
    match code {
        0 => State::Open,
        1 => State::Full,
        _ => State::Failed,
    }
}

/// A chunk under way.
struct Draft {
    writer: undo::Writer,
    /// Blocks that it still takes.
    room: u64,
    /// Blocks in it.
    blocks: u64,
    /// Blocks whose original could not be read.
    unread: u64,
}

impl Pristine {
    /// What the status line says of the area.
    pub(super) fn undo_status(&self) -> Option<UndoStatus> {
        (self.layout.undo_pages != 0).then(|| UndoStatus {
            state: state_of(self.stats.undo_state.load(Relaxed)),
            used: self.stats.undo_used.load(Relaxed),
            pages: self.layout.undo_pages,
            missing: self
                .tracker
                .dirty_count()
                .saturating_sub(self.stats.undo_kept.load(Relaxed)),
        })
    }

    /// Finds the end of the chunks that were written since the last checkpoint.
    pub(super) fn load_undo(&self, cp: &mut Checkpointer, scratch: &mut Buffer) -> Result {
        let Some(sb) = cp.sb else { return Err(ENODEV) };
        let mut log = self.log.lock();
        let Some(undo) = &mut log.undo else {
            return Ok(());
        };
        undo.root = sb.undo;
        let root = &mut undo.root;
        let found = undo::walk(
            &mut self.meta.source(),
            &sb,
            sb.undo.used,
            scratch.first()?,
            |chunk, _| {
                // CAST: At most 256.
                let blocks = undo::blocks_in(&self.geometry, chunk.entries as u64);
                root.kept = root.kept.saturating_add(blocks);
            },
        );
        root.used = found.end;
        // A chunk whose record was cut tells of blocks that are not dirty.
        root.kept = root.kept.min(self.tracker.dirty_count());
        undo.state = State::Open;
        undo.close_if_full(&self.geometry);
        self.publish_log(&log);
        Ok(())
    }

    /// Says that the area takes no more.
    pub(super) fn say_undo_closed(&self) {
        let state = state_of(self.stats.undo_state.load(Relaxed));
        pr_warn!(
            "{}: the undo area {}; what changes from now on is taken back from the master\n",
            self.meta.data().name(),
            match state {
                State::Failed => "cannot be written",
                _ => "is full",
            }
        );
        if let Some(notifier) = &*self.notifier.lock() {
            notifier.event(match state {
                State::Failed => c"PRISTINE_UNDO=failed",
                _ => c"PRISTINE_UNDO=full",
            });
        }
    }

    /// Keeps the originals of the blocks that bios from the front of `waiting` write to, and calls these blocks dirty in one
    /// durable record. A bio for which there was no room as a whole is among those returned, too, and goes round again.
    ///
    /// # Errors
    ///
    /// The record could not be written; the bios that depended on it. The device is read-only from here on.
    pub(super) fn keep_and_tell(
        &self,
        mut guard: MutexGuard<'_, Log>,
        waiting: &mut BioList,
    ) -> Result<BioList, BioList> {
        let log = &mut *guard;
        let mut ready = BioList::new();
        let kept = match self.gather(log, waiting, &mut ready) {
            Ok(kept) => kept,
            Err(_) => return Err(ready),
        };
        let told = log.exact.len();
        if told == 0 {
            return Ok(ready);
        }
        let seq = log.next_seq;
        let (flags, failed) = match kept {
            Kept::Chunk(..) => (WriteFlags::FLUSH_FUA, false),
            Kept::Nothing => (WriteFlags::FUA, false),
            Kept::Failed => (WriteFlags::FUA, true),
        };
        if self.write_record(log, flags).is_err() {
            log.exact.clear();
            drop(guard);
            self.fail("writing the log failed");
            return Err(ready);
        }
        self.stats.intents.add(told as u64, Relaxed); // CAST: usize to u64.
        trace::commit(|| self.last_number(), seq, told);
        // Under the log's lock: a checkpoint that does without the record takes the lock before it copies the bits.
        for blocks in &log.exact {
            self.tracker.tell(*blocks);
        }
        log.exact.clear();
        if let Some(undo) = &mut log.undo {
            match kept {
                Kept::Chunk(pages, blocks) => {
                    undo.root.used += pages;
                    undo.root.kept += blocks;
                    self.stats.undo_copied.add(blocks, Relaxed);
                }
                Kept::Nothing => {}
                Kept::Failed => undo.state = State::Failed,
            }
        }
        self.publish_log(log);
        drop(guard);
        if failed {
            self.say_undo_closed();
        }
        Ok(ready)
    }

    /// Makes the record in the log's buffer, and writes the chunk that goes with it.
    fn gather(&self, log: &mut Log, waiting: &mut BioList, ready: &mut BioList) -> Result<Kept> {
        let seq = log.next_seq;
        let Log {
            exact,
            undo: Some(undo),
            buffer,
            ..
        } = log
        else {
            return Err(EINVAL);
        };
        exact.clear();
        let mut record = Writer::again(buffer.first()?);
        let mut draft = Draft {
            room: undo.room(&self.geometry),
            writer: undo::Writer::new(undo.buffer.first()?),
            blocks: 0,
            unread: 0,
        };
        let mut full = false;
        while !full {
            let Some(bio) = waiting.pop() else { break };
            let blocks = self.geometry.blocks_of(bio.sector(), bio.sectors());
            // What another bio of this record writes to is dirty when this one comes round again.
            let is_told = exact
                .iter()
                .any(|told| told.start < blocks.end && blocks.start < told.end);
            let mut at = blocks.start;
            while at < blocks.end && !is_told && !full {
                let Some((is_dirty, run)) =
                    bits::next_run(|i| self.tracker.dirty_word(i), at, blocks.end)
                else {
                    break;
                };
                if is_dirty {
                    at = run.end;
                    continue;
                }
                full = record.room() == 0 || exact.len() >= RECORD_ENTRIES;
                let part = if full {
                    None
                } else {
                    self.keep(undo, &mut draft, run)
                };
                let Some(part) = part.filter(|part| record.push(Entry::Dirty(*part))) else {
                    full = true;
                    break;
                };
                // There is room for as many as a record holds.
                let _ = exact.push_within_capacity(part);
                at = part.end;
            }
            ready.push(bio);
        }
        record.finish(&self.meta_uuid, seq);
        if draft.unread != 0 {
            self.stats.undo_unread.add(draft.unread, Relaxed);
            if may_print() {
                pr_warn!(
                    "{}: {} blocks could not be read before they were written to; their originals are not kept\n",
                    self.meta.data().name(),
                    draft.unread
                );
            }
        }
        if draft.writer.entries() == 0 {
            return Ok(Kept::Nothing);
        }
        let pages = draft.writer.data() + 1;
        let place = Place {
            meta_uuid: &self.meta_uuid,
            image_id: &self.image_id,
            epoch: undo.root.epoch,
            at: undo.root.used,
        };
        draft.writer.finish(undo.buffer.first()?, &place);
        let at = self.layout.undo_start + undo.root.used;
        let written = self
            .meta
            .write(at, &mut undo.buffer, pages, WriteFlags::default());
        if written.is_err() {
            return Ok(Kept::Failed);
        }
        self.count_meta(pages);
        Ok(Kept::Chunk(pages as u64, draft.blocks)) // CAST: At most 257.
    }

    /// Keeps the originals of blocks from the start of `run` on, which are not dirty; returns those that may be called dirty
    /// now, `None` if there is no room for any.
    fn keep(&self, undo: &mut Undo, draft: &mut Draft, run: Run) -> Option<Run> {
        let word = |i| self.fetcher.as_ref().map_or(0, |f| f.map.word(i));
        let limit = run.end.min(run.start.saturating_add(MAX_RUN));
        let (is_stale, mut part) = bits::next_run(word, run.start, limit)?;
        // The content of a stale block is not the master's, and that of one which the device does not have as a whole ends
        // elsewhere.
        if is_stale || part.start >= self.geometry.whole_blocks() {
            return Some(part);
        }
        if draft.room == 0 {
            return None;
        }
        part.end = part
            .end
            .min(part.start.saturating_add(draft.room))
            .min(self.geometry.whole_blocks());
        match self.copy(undo, draft, part) {
            Ok(()) => {
                draft.room -= part.len();
                draft.blocks += part.len();
            }
            Err(_) => draft.unread += part.len(),
        }
        Some(part)
    }

    /// Copies the blocks of `part`, for which there is room, into the chunk's buffer; nothing if they cannot be read.
    fn copy(&self, undo: &mut Undo, draft: &mut Draft, part: Run) -> Result {
        let pages = undo::pages_of(&self.geometry, part);
        let first = pages.start;
        let count = usize::try_from(pages.len())?;
        let (header, data) = undo.buffer.pages().split_first_mut().ok_or(EINVAL)?;
        // Read to where they may stay; what is behind a zero page moves up.
        let (_, free) = data
            .split_at_mut_checked(draft.writer.data())
            .ok_or(EINVAL)?;
        let read: &mut [Page] = free.get_mut(..count).ok_or(EINVAL)?;
        self.meta.read_data(first, read)?;
        let mut to = 0;
        for from in 0..count {
            let content = read.get(from).ok_or(EINVAL)?;
            // CAST: usize to u64.
            if draft.writer.push(header, first + from as u64, content) {
                if to != from {
                    read.copy_within(from..from + 1, to);
                }
                to += 1;
            }
        }
        Ok(())
    }
}

/// What became of originals.
#[derive(Clone, Copy)]
enum Kept {
    /// They are in a chunk of so many pages, with so many blocks.
    Chunk(u64, u64),
    /// There were none.
    Nothing,
    /// The chunk could not be written.
    Failed,
}
