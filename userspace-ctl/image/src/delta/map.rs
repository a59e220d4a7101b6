// SPDX-License-Identifier: GPL-2.0

//! The map of a delta: what became of each page, where each block comes from, and which frames there are.
//!
//! Runs are kept as they are encoded and decoded once more when they are wanted: [`Delta::parse`] has checked them all.

use std::ops::Range;

use super::{Comparison, DeltaHead, MAX_CONTENT_BLOCKS, MAX_REFERENCE_BLOCKS, MAX_RUNS};
use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::merkle::{self, Blinding};
use crate::wire::{put_signed_varint, put_varint, Reader};
use crate::{BLOCK_SIZE, DIGESTS_PER_PAGE};

const WHAT: &str = "the delta's map";
const PAGE: u64 = DIGESTS_PER_PAGE as u64;

/// In the low half of a page's byte: what it is in the new image.
pub(super) const NEW_NONE: u8 = 0;
pub(super) const NEW_ZERO: u8 = 1;
pub(super) const NEW_SAME: u8 = 2;
pub(super) const NEW_CHANGED: u8 = 3;
/// In the high half: what it is in the old image.
pub(super) const OLD_NONE: u8 = 0 << 4;
pub(super) const OLD_ZERO: u8 = 1 << 4;
pub(super) const OLD_HASH: u8 = 2 << 4;

const OP_SAME: u64 = 0;
const OP_ZERO: u64 = 1;
const OP_NEW: u64 = 2;
const OP_MOVE: u64 = 3;
const OP_AGAIN: u64 = 4;
const OP_BITS: u32 = 3;

/// Where the blocks of a run come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// They are what the old image has in the same place.
    Same,
    /// They are zero.
    Zero,
    /// They are in the delta's frames, from this slot on.
    New(u64),
    /// The old image has them from this block on.
    Move(u64),
    /// The new image has them already, from this earlier block on.
    Again(u64),
}

/// Consecutive blocks that come from consecutive places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first block of the new image.
    pub block: u64,
    /// Blocks; not 0.
    pub count: u64,
    /// Where they come from.
    pub step: Step,
}

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageChange {
    /// Nothing: this is its hash in both.
    Same(Digest),
    /// All blocks are zero, and were not all zero before.
    Zero,
    /// It has this hash now.
    Changed(Digest),
}

/// A frame of a delta.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaFrame {
    /// Where it begins in the delta, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u32,
    /// The first of its slots.
    pub first_slot: u64,
    /// Blocks in it.
    pub blocks: u64,
    references: Range<u32>,
}

/// What the decoder of runs knows at the beginning of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// Where the page's runs begin.
    at: u32,
    /// The next slot.
    slot: u64,
    /// The block of the old image after the last one that was moved.
    source: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    change: PageChange,
    state: State,
}

/// Writes runs.
#[derive(Debug, Default)]
pub(super) struct RunWriter {
    pub(super) bytes: Vec<u8>,
    pub(super) state: State,
    pub(super) runs: usize,
}

impl RunWriter {
    pub(super) fn push(&mut self, run: &Run) {
        let op = match run.step {
            Step::Same => OP_SAME,
            Step::Zero => OP_ZERO,
            Step::New(_) => OP_NEW,
            Step::Move(_) => OP_MOVE,
            Step::Again(_) => OP_AGAIN,
        };
        put_varint(&mut self.bytes, run.count << OP_BITS | op);
        match run.step {
            Step::Move(from) => {
                put_signed_varint(&mut self.bytes, from.wrapping_sub(self.state.source) as i64);
                self.state.source = from + run.count;
            }
            Step::Again(from) => put_varint(&mut self.bytes, run.block - from),
            Step::New(_) => self.state.slot += run.count,
            Step::Same | Step::Zero => (),
        }
        self.runs += 1;
    }
}

/// The runs of a page.
pub struct Steps<'a> {
    reader: Reader<'a>,
    state: State,
    old_blocks: u64,
    block: u64,
    end: u64,
    failed: bool,
}

impl Steps<'_> {
    fn read(&mut self) -> Result<Run, FormatError> {
        let header = self.reader.varint()?;
        let count = header >> OP_BITS;
        if count == 0 || count > self.end - self.block {
            return Err(self.reader.invalid("a run has an impossible length"));
        }
        let in_old = |from: u64| {
            from.checked_add(count)
                .is_some_and(|end| end <= self.old_blocks)
        };
        let step = match header & ((1 << OP_BITS) - 1) {
            OP_SAME if in_old(self.block) => Step::Same,
            OP_ZERO => Step::Zero,
            OP_NEW => {
                let slot = self.state.slot;
                self.state.slot += count;
                Step::New(slot)
            }
            OP_MOVE => {
                let from = self
                    .state
                    .source
                    .wrapping_add_signed(self.reader.signed_varint()?);
                if !in_old(from) {
                    return Err(self
                        .reader
                        .invalid("a block comes from beyond the old image"));
                }
                self.state.source = from + count;
                Step::Move(from)
            }
            OP_AGAIN => {
                let distance = self.reader.varint()?;
                if distance < count || distance > self.block {
                    return Err(self.reader.invalid("a run repeats what is not there yet"));
                }
                Step::Again(self.block - distance)
            }
            _ => {
                return Err(self
                    .reader
                    .invalid("a run of unknown kind, or beyond the old image"))
            }
        };
        let block = self.block;
        self.block += count;
        Ok(Run { block, count, step })
    }
}

impl Iterator for Steps<'_> {
    type Item = Result<Run, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.block == self.end {
            return None;
        }
        let run = self.read();
        self.failed = run.is_err();
        Some(run)
    }
}

/// The map of a delta, proved: its page hashes are those of the two images.
#[derive(Clone, Debug)]
pub struct Delta {
    head: DeltaHead,
    pages: Vec<Entry>,
    ops: Vec<u8>,
    frames: Vec<DeltaFrame>,
    references: Vec<(u64, u32)>,
    slots: u64,
}

impl Delta {
    /// Parses the map of a delta, which is `stored` in it, and proves it.
    ///
    /// # Errors
    /// [`FormatError`] for anything that is damaged or impossible, [`FormatError::WrongImage`] if the hashes in it
    /// are not those of the images that it claims.
    pub fn parse(head: DeltaHead, stored: &[u8]) -> Result<Self, FormatError> {
        let map = head.unpack_map(stored)?;
        Delta::decode(head, &map)
    }

    /// The steps of a comparison without frames: all new blocks are to be fetched elsewhere.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] if the images differ in more ways than a delta may have.
    pub fn without_frames(comparison: &Comparison) -> Result<Self, FormatError> {
        let map = comparison.encode(&[0]);
        let (old, new) = (comparison.old, comparison.new);
        let (len, blinded) = (map.len() as u64, comparison.is_blinded());
        Delta::decode(DeltaHead::new(old, new, &[], len, 0, blinded), &map)
    }

    fn decode(head: DeltaHead, map: &[u8]) -> Result<Self, FormatError> {
        let blocks = |size: u64| size / BLOCK_SIZE as u64;
        let (old_blocks, new_blocks) = (blocks(head.old_size), blocks(head.new_size));
        let pages = old_blocks.max(new_blocks).div_ceil(PAGE) as usize;
        let mut reader = Reader::new(WHAT, map);
        let blindings = match head.blinded {
            true => [read_blinding(&mut reader)?, read_blinding(&mut reader)?],
            false => [None; 2],
        };
        let kinds = reader.take(pages)?;
        let changes = prove(&head, &blindings, kinds, &mut reader)?;
        let ops_len = reader.varint()? as usize;
        let ops = reader.take(ops_len)?.to_vec();
        let mut delta = Delta {
            head,
            pages: Vec::with_capacity(changes.len()),
            ops,
            frames: Vec::new(),
            references: Vec::new(),
            slots: 0,
        };
        let mut state = State::default();
        let mut runs = 0;
        for (page, change) in changes.into_iter().enumerate() {
            delta.pages.push(Entry { change, state });
            let mut steps = delta.steps(page as u64);
            for run in steps.by_ref() {
                run?;
                runs += 1;
            }
            state = State {
                at: (delta.ops.len() - steps.reader.remaining()) as u32,
                ..steps.state
            };
            if runs > MAX_RUNS {
                return Err(reader.invalid("it has too many runs"));
            }
        }
        if state.at as usize != delta.ops.len() {
            return Err(reader.invalid("more runs than pages need"));
        }
        delta.slots = state.slot;
        delta.read_frames(&mut reader, old_blocks)?;
        reader.end()?;
        Ok(delta)
    }

    fn read_frames(&mut self, reader: &mut Reader<'_>, old_blocks: u64) -> Result<(), FormatError> {
        let mut offset = self.head.map_range().end;
        let mut slot = 0u64;
        for _ in 0..reader.varint()? {
            let len = reader.varint()?;
            let blocks = reader.varint()?;
            let ranges = reader.varint()?;
            if blocks == 0 || blocks > MAX_CONTENT_BLOCKS || len > super::frame_bound(blocks) {
                return Err(reader.invalid(format!("a frame of {len} bytes for {blocks} blocks")));
            }
            let first = self.references.len() as u32;
            let (mut total, mut expected) = (0u64, 0u64);
            for _ in 0..ranges {
                let start = expected.wrapping_add_signed(reader.signed_varint()?);
                let count = reader.varint()?;
                let end = start
                    .checked_add(count)
                    .filter(|&end| end <= old_blocks && count > 0);
                expected = end.ok_or_else(|| reader.invalid("a reference beyond the old image"))?;
                total = total.saturating_add(count);
                if total > MAX_REFERENCE_BLOCKS || self.references.len() >= MAX_RUNS {
                    return Err(reader.invalid("too many references"));
                }
                self.references.push((start, count as u32));
            }
            self.frames.push(DeltaFrame {
                offset,
                len: len as u32,
                first_slot: slot,
                blocks,
                references: first..self.references.len() as u32,
            });
            // Both are bounded by the checks above and the number of bytes in the map.
            offset += len;
            slot += blocks;
        }
        let all = self.frames.is_empty() || slot == self.slots;
        if !all || offset != self.head.file_len {
            return Err(reader.invalid("its frames do not hold what the runs need"));
        }
        Ok(())
    }

    /// The head.
    pub fn head(&self) -> &DeltaHead {
        &self.head
    }

    /// Blocks in the new image.
    pub fn blocks(&self) -> u64 {
        self.head.new_size / BLOCK_SIZE as u64
    }

    /// Pages of the new image.
    pub fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// The blocks of a page of the new image.
    pub fn page_blocks(&self, page: u64) -> Range<u64> {
        let first = page.saturating_mul(PAGE).min(self.blocks());
        first..(first + PAGE).min(self.blocks())
    }

    /// What became of a page of the new image; `None` beyond its end.
    pub fn change(&self, page: u64) -> Option<PageChange> {
        self.entry(page).map(|entry| entry.change)
    }

    /// The runs of a page; none if it is unchanged or zero.
    pub fn steps(&self, page: u64) -> Steps<'_> {
        let blocks = self.page_blocks(page);
        let (state, end) = match self.entry(page) {
            Some(Entry {
                change: PageChange::Changed(_),
                state,
            }) => (*state, blocks.end),
            Some(entry) => (entry.state, blocks.start),
            None => (State::default(), blocks.start),
        };
        Steps {
            reader: Reader::new(WHAT, self.ops.get(state.at as usize..).unwrap_or_default()),
            state,
            old_blocks: self.head.old_size / BLOCK_SIZE as u64,
            block: blocks.start,
            end,
            failed: false,
        }
    }

    fn entry(&self, page: u64) -> Option<&Entry> {
        self.pages.get(usize::try_from(page).ok()?)
    }

    /// Blocks that the old image does not have.
    pub fn slots(&self) -> u64 {
        self.slots
    }

    /// The frames, in the order of their slots; none in a delta that only compares.
    pub fn frames(&self) -> &[DeltaFrame] {
        &self.frames
    }

    /// The index of the frame that holds a slot.
    pub fn frame_of(&self, slot: u64) -> Option<usize> {
        let after = self
            .frames
            .partition_point(|frame| frame.first_slot <= slot);
        let index = after.checked_sub(1)?;
        let frame = &self.frames[index];
        (slot < frame.first_slot + frame.blocks).then_some(index)
    }

    /// The blocks of the old image that a frame is unpacked against, in this order.
    pub fn references(&self, frame: &DeltaFrame) -> impl Iterator<Item = Range<u64>> + '_ {
        let range = frame.references.start as usize..frame.references.end as usize;
        let references = self.references.get(range).unwrap_or_default();
        references
            .iter()
            .map(|&(start, count)| start..start + u64::from(count))
    }
}

/// Reads what an image's id is blinded with; zeros are for one that is not encrypted.
fn read_blinding(reader: &mut Reader<'_>) -> Result<Option<Blinding>, FormatError> {
    let blinding: Blinding = reader.array()?;
    Ok(Some(blinding).filter(|blinding| *blinding != [0; 32]))
}

/// Reads the page hashes, and checks them against both images.
fn prove(
    head: &DeltaHead,
    [old_blinding, new_blinding]: &[Option<Blinding>; 2],
    kinds: &[u8],
    reader: &mut Reader<'_>,
) -> Result<Vec<PageChange>, FormatError> {
    let blocks_of = |size: u64, page: usize| {
        let blocks = size / BLOCK_SIZE as u64;
        let first = page as u64 * PAGE;
        blocks.saturating_sub(first).min(PAGE) as usize
    };
    let mut zero = ZeroPages::default();
    let (mut old, mut new, mut changes) = (Vec::new(), Vec::new(), Vec::new());
    for (page, &kind) in kinds.iter().enumerate() {
        let old_blocks = blocks_of(head.old_size, page);
        let new_blocks = blocks_of(head.new_size, page);
        let before = match kind & 0xf0 {
            OLD_NONE => None,
            OLD_ZERO => Some(zero.hash(old_blocks)),
            OLD_HASH => Some(Digest::from_bytes(reader.array()?)),
            _ => return Err(reader.invalid("a page of unknown kind")),
        };
        let after = match kind & 0x0f {
            NEW_NONE => None,
            NEW_ZERO => Some((zero.hash(new_blocks), PageChange::Zero)),
            NEW_SAME if old_blocks == new_blocks => {
                before.map(|hash| (hash, PageChange::Same(hash)))
            }
            NEW_CHANGED => {
                let hash = Digest::from_bytes(reader.array()?);
                Some((hash, PageChange::Changed(hash)))
            }
            _ => return Err(reader.invalid("a page of unknown kind")),
        };
        if before.is_some() != (old_blocks > 0) || after.is_some() != (new_blocks > 0) {
            return Err(reader.invalid("its pages are not those of images of these sizes"));
        }
        old.extend(before);
        if let Some((hash, change)) = after {
            new.push(hash);
            changes.push(change);
        }
    }
    let check = |expected: ImageId, size, hashes: &[Digest], blinding: &Option<Blinding>| {
        let found = merkle::image_id(size, hashes.iter(), blinding.as_ref());
        match found == expected {
            true => Ok(()),
            false => Err(FormatError::WrongImage { expected, found }),
        }
    };
    check(head.old, head.old_size, &old, old_blinding)?;
    check(head.new, head.new_size, &new, new_blinding)?;
    Ok(changes)
}

/// The hashes of pages of zero blocks: of a whole page, and of a last one.
#[derive(Default)]
pub(super) struct ZeroPages(Vec<(usize, Digest)>);

impl ZeroPages {
    pub(super) fn hash(&mut self, blocks: usize) -> Digest {
        if let Some((_, hash)) = self.0.iter().find(|(known, _)| *known == blocks) {
            return *hash;
        }
        let hash = merkle::page_hash(&vec![Digest::zero_block(); blocks]);
        self.0.push((blocks, hash));
        hash
    }
}
