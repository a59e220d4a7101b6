// SPDX-License-Identifier: GPL-2.0

//! Blocks that packs of a store hold already: a build refers to them instead of storing them again.
//!
//! Each digest has one place, the one that was added first, so that the same images in the same order always give the
//! same manifest. A manifest lists only those frames of a known pack that it needs, in the pack's own order.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use crate::digest::{Digest, PackId};
use crate::error::FormatError;
use crate::manifest::{FrameTable, Manifest, Page};
use crate::MAX_FRAME_BLOCKS;

/// A block's place in known packs: its frame's number times [`MAX_FRAME_BLOCKS`], and its index there.
type Place = u64;

/// Marks a place among the slots of a manifest that is being made.
const PLACE: u64 = 1 << 48;

#[derive(Clone, Copy, Debug)]
struct KnownFrame {
    pack: u32,
    offset: u32,
    len: u32,
    blocks: u32,
}

/// Blocks that packs hold, by digest. About 50 bytes of memory for each.
#[derive(Clone, Debug, Default)]
pub struct Known {
    packs: Vec<(PackId, u64)>,
    pack_numbers: HashMap<PackId, u32>,
    frames: Vec<KnownFrame>,
    frame_numbers: HashMap<(u32, u32), u32>,
    places: HashMap<Digest, Place>,
    /// Pages that were seen: generations share most of theirs.
    pages: HashSet<Digest>,
}

impl Known {
    /// No blocks.
    pub fn new() -> Self {
        Known::default()
    }

    /// Whether it holds no block.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Distinct blocks.
    pub fn blocks(&self) -> u64 {
        self.places.len() as u64
    }

    /// Whether it holds a block.
    pub fn holds(&self, digest: &Digest) -> bool {
        self.places.contains_key(digest)
    }

    /// Adds the blocks of an image; `page` reads a page of its manifest, and `usable` says whether a pack of it is there.
    ///
    /// # Errors
    /// Those of `page`; the blocks of the pages before are added.
    pub fn add<E>(
        &mut self,
        manifest: &Manifest,
        usable: impl Fn(&PackId) -> bool,
        mut page: impl FnMut(u64) -> Result<Page, E>,
    ) -> Result<(), E> {
        let table = manifest.frames();
        // The number here of each frame there.
        let mut numbers = vec![None; table.frames() as usize];
        let mut any = false;
        for pack in table.packs().iter().filter(|pack| usable(&pack.id)) {
            any = true;
            let number = self.pack(pack.id, pack.len);
            for frame in pack.frames.clone().filter_map(|index| table.frame(index)) {
                let known = KnownFrame {
                    pack: number,
                    offset: frame.offset,
                    len: frame.len,
                    blocks: frame.blocks,
                };
                if let Some(place) = numbers.get_mut(frame.index as usize) {
                    *place = self.frame(known);
                }
            }
        }
        for number in 0..manifest.pages() {
            let unseen = manifest
                .page_hash(number)
                .is_none_or(|hash| !self.pages.contains(&hash));
            if !any || !unseen || manifest.page_range(number).is_empty() {
                continue;
            }
            let mut all = true;
            for block in page(number)?.blocks() {
                let Some(slot) = block.slot else { continue };
                let place = table.frame_of(slot).and_then(|frame| {
                    let number = (*numbers.get(frame.index as usize)?)?;
                    let index = slot - frame.first_slot;
                    Some(u64::from(number) * MAX_FRAME_BLOCKS as u64 + index)
                });
                match place {
                    Some(place) => {
                        self.places.entry(block.digest).or_insert(place);
                    }
                    None => all = false,
                }
            }
            if let Some(hash) = manifest.page_hash(number).filter(|_| all) {
                self.pages.insert(hash);
            }
        }
        Ok(())
    }

    fn pack(&mut self, id: PackId, len: u64) -> u32 {
        let next = self.packs.len() as u32;
        match self.pack_numbers.entry(id) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                self.packs.push((id, len));
                *entry.insert(next)
            }
        }
    }

    /// The number of a frame; `None` if two images contradict each other about it.
    fn frame(&mut self, frame: KnownFrame) -> Option<u32> {
        let next = self.frames.len() as u32;
        match self.frame_numbers.entry((frame.pack, frame.offset)) {
            Entry::Occupied(entry) => {
                let number = *entry.get();
                let known = self.frames.get(number as usize)?;
                (known.len == frame.len && known.blocks == frame.blocks).then_some(number)
            }
            Entry::Vacant(entry) => {
                self.frames.push(frame);
                Some(*entry.insert(next))
            }
        }
    }

    /// The slot that stands for a known block until [`Known::table`] gives it its own.
    pub(super) fn slot(&self, digest: &Digest) -> Option<u64> {
        self.places.get(digest).map(|place| PLACE + place)
    }

    /// The table of those known frames that `slots` lie in, followed by `new`; and the final slot of each provisional
    /// one, those of new blocks included.
    pub(super) fn table(
        &self,
        slots: impl Iterator<Item = u64>,
        new: &FrameTable,
    ) -> Result<(FrameTable, Slots), FormatError> {
        let mut used = vec![false; self.frames.len()];
        for slot in slots.filter(|slot| *slot >= PLACE) {
            let frame = (slot - PLACE) / MAX_FRAME_BLOCKS as u64;
            if let Some(used) = used.get_mut(frame as usize) {
                *used = true;
            }
        }
        let mut by_pack: Vec<Vec<u32>> = vec![Vec::new(); self.packs.len()];
        for (number, frame) in (0..).zip(&self.frames) {
            if used[number as usize] {
                by_pack[frame.pack as usize].push(number);
            }
        }
        let mut table = FrameTable::new();
        let mut first_slots = vec![0; self.frames.len()];
        for ((id, len), mut numbers) in self.packs.iter().zip(by_pack) {
            if numbers.is_empty() {
                continue;
            }
            numbers.sort_unstable_by_key(|&number| self.frames[number as usize].offset);
            for number in numbers {
                let frame = self.frames[number as usize];
                first_slots[number as usize] = table.slots();
                table.push_frame(frame.offset, frame.len, frame.blocks)?;
            }
            table.end_pack(*id, *len)?;
        }
        let shift = table.slots();
        table.append(new)?;
        Ok((table, Slots { first_slots, shift }))
    }
}

/// Final slots of provisional ones.
pub(super) struct Slots {
    /// By the number of a known frame.
    first_slots: Vec<u64>,
    /// What comes before the new blocks.
    shift: u64,
}

impl Slots {
    pub(super) fn get(&self, slot: u64) -> Option<u64> {
        let Some(place) = slot.checked_sub(PLACE) else {
            return slot.checked_add(self.shift);
        };
        let (frame, index) = (
            place / MAX_FRAME_BLOCKS as u64,
            place % MAX_FRAME_BLOCKS as u64,
        );
        Some(self.first_slots.get(frame as usize)? + index)
    }
}
