// SPDX-License-Identifier: GPL-2.0

//! A page of the manifest: digest and slot of up to 1024 consecutive blocks.

use std::collections::HashMap;

use crate::digest::Digest;
use crate::error::FormatError;
use crate::merkle;
use crate::wire::{put_signed_varint, put_varint, Reader};
use crate::DIGESTS_PER_PAGE;

/// Run of zero blocks: count.
const OP_ZERO: u64 = 0;
/// Run of blocks with digests, in consecutive slots: count, distance from the slot after the last run's.
const OP_DATA: u64 = 1;
/// Run that repeats what this page says a number of blocks before: count, distance in blocks.
const OP_REPEAT: u64 = 2;
const OP_BITS: u32 = 2;

/// The slot of a zero block: none.
const NO_SLOT: u64 = u64::MAX;

/// What a manifest says about one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    /// The digest of its content.
    pub digest: Digest,
    /// Where the content lies; `None` for a block of zeros.
    pub slot: Option<u64>,
}

impl BlockRef {
    /// A block of zeros.
    pub fn zero() -> Self {
        BlockRef {
            digest: Digest::zero_block(),
            slot: None,
        }
    }
}

/// A decoded page; its digests are verified against the page's hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    digests: Vec<Digest>,
    slots: Vec<u64>,
}

impl Page {
    /// A page of blocks, at most [`DIGESTS_PER_PAGE`] of them.
    pub fn new(blocks: &[BlockRef]) -> Self {
        Page {
            digests: blocks.iter().map(|block| block.digest).collect(),
            slots: blocks
                .iter()
                .map(|block| block.slot.unwrap_or(NO_SLOT))
                .collect(),
        }
    }

    pub(super) fn zero(blocks: usize) -> Self {
        Page {
            digests: vec![Digest::zero_block(); blocks],
            slots: vec![NO_SLOT; blocks],
        }
    }

    /// The number of blocks in it.
    pub fn len(&self) -> usize {
        self.digests.len()
    }

    /// Whether it lists nothing, which no page of a manifest does.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// The block at an index in the page.
    pub fn block(&self, index: usize) -> Option<BlockRef> {
        let slot = *self.slots.get(index)?;
        Some(BlockRef {
            digest: *self.digests.get(index)?,
            slot: (slot != NO_SLOT).then_some(slot),
        })
    }

    /// All blocks, in order.
    pub fn blocks(&self) -> impl Iterator<Item = BlockRef> + '_ {
        (0..self.len()).filter_map(|index| self.block(index))
    }

    /// Whether all blocks are zeros.
    pub fn is_zero(&self) -> bool {
        self.slots.iter().all(|&slot| slot == NO_SLOT)
    }

    /// The hash of the digests, a leaf of the Merkle tree.
    pub fn hash(&self) -> Digest {
        merkle::page_hash(&self.digests)
    }

    /// Gives all blocks that are not zero another slot; `None` if there is none for one of them.
    pub(super) fn with_slots(mut self, map: &dyn Fn(u64) -> Option<u64>) -> Option<Self> {
        for slot in self.slots.iter_mut().filter(|slot| **slot != NO_SLOT) {
            *slot = map(*slot)?;
        }
        Some(self)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut digests = Vec::new();
        // Where in this page a slot was seen last.
        let mut seen: HashMap<u64, usize> = HashMap::new();
        let mut expected_slot = 0u64;
        let mut at = 0;
        while let Some(&slot) = self.slots.get(at) {
            let run = |matches: &dyn Fn(usize) -> bool| {
                (at..self.len()).take_while(|&index| matches(index)).count()
            };
            let put = |out: &mut Vec<u8>, op: u64, count: usize| {
                put_varint(out, ((count as u64) << OP_BITS) | op);
            };
            let count = if slot == NO_SLOT {
                let count = run(&|index| self.slots[index] == NO_SLOT);
                put(&mut out, OP_ZERO, count);
                count
            } else if let Some(&before) = seen.get(&slot) {
                let distance = at - before;
                let count = run(&|index| self.slots[index] == self.slots[index - distance]);
                put(&mut out, OP_REPEAT, count);
                put_varint(&mut out, distance as u64);
                count
            } else {
                let count = run(&|index| {
                    let next = slot + (index - at) as u64;
                    self.slots[index] == next && !seen.contains_key(&next)
                });
                put(&mut out, OP_DATA, count);
                put_signed_varint(&mut out, slot.wrapping_sub(expected_slot) as i64);
                for digest in &self.digests[at..at + count] {
                    digests.extend_from_slice(digest.as_bytes());
                }
                expected_slot = slot + count as u64;
                count
            };
            for index in at..at + count {
                seen.insert(self.slots[index], index);
            }
            at += count;
        }
        out.extend(digests);
        out
    }

    /// Decodes a page of `blocks` blocks whose slots lie below `slots`. Whether the digests are the right ones
    /// is for the caller to check.
    pub(super) fn decode(bytes: &[u8], blocks: usize, slots: u64) -> Result<Self, FormatError> {
        debug_assert!(blocks <= DIGESTS_PER_PAGE);
        let mut reader = Reader::new("a page of the manifest", bytes);
        let mut page = Page {
            digests: Vec::with_capacity(blocks),
            slots: Vec::with_capacity(blocks),
        };
        let zero = Digest::zero_block();
        // Digests follow all runs; their places are remembered until then.
        let mut data_runs: Vec<(usize, usize)> = Vec::new();
        let mut repeats: Vec<(usize, usize, usize)> = Vec::new();
        let mut expected_slot = 0u64;
        while page.len() < blocks {
            let header = reader.varint()?;
            let op = header & ((1 << OP_BITS) - 1);
            let at = page.len();
            let count = usize::try_from(header >> OP_BITS)
                .ok()
                .filter(|&count| count > 0 && count <= blocks - at)
                .ok_or_else(|| reader.invalid("a run has an impossible length"))?;
            match op {
                OP_ZERO => page.slots.resize(at + count, NO_SLOT),
                OP_DATA => {
                    let first = expected_slot.wrapping_add_signed(reader.signed_varint()?);
                    let end = first.checked_add(count as u64);
                    let end = end
                        .filter(|&end| end <= slots)
                        .ok_or_else(|| reader.invalid("a block lies in no frame"))?;
                    page.slots.extend(first..end);
                    data_runs.push((at, count));
                    expected_slot = end;
                }
                OP_REPEAT => {
                    let distance = reader.varint()? as usize;
                    if distance == 0 || distance > at {
                        return Err(reader.invalid("a run repeats what is not in the page"));
                    }
                    for index in at..at + count {
                        page.slots.push(page.slots[index - distance]);
                    }
                    repeats.push((at, count, distance));
                }
                _ => return Err(reader.invalid("a run of unknown kind")),
            }
            page.digests.resize(at + count, zero);
        }
        for (at, count) in data_runs {
            for digest in &mut page.digests[at..at + count] {
                *digest = Digest::from_bytes(reader.array()?);
            }
        }
        reader.end()?;
        for (at, count, distance) in repeats {
            for index in at..at + count {
                page.digests[index] = page.digests[index - distance];
            }
        }
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(slot: u64) -> Digest {
        Digest::of(&slot.to_le_bytes())
    }

    fn page(slots: &[Option<u64>]) -> Page {
        let blocks: Vec<BlockRef> = slots
            .iter()
            .map(|slot| match slot {
                Some(slot) => BlockRef {
                    digest: digest(*slot),
                    slot: Some(*slot),
                },
                None => BlockRef::zero(),
            })
            .collect();
        Page::new(&blocks)
    }

    fn round_trip(slots: &[Option<u64>]) -> usize {
        let page = page(slots);
        let bytes = page.encode();
        let back = Page::decode(&bytes, slots.len(), 1 << 32).unwrap();
        assert_eq!(back, page);
        bytes.len()
    }

    #[test]
    fn runs_are_small() {
        assert_eq!(round_trip(&vec![None; 1024]), 2);
        let data: Vec<_> = (7000..8024).map(Some).collect();
        assert_eq!(round_trip(&data), 2 + 2 + 32 * 1024);
        // One block over and over.
        assert_eq!(round_trip(&[Some(9); 1024]), (1 + 1 + 32) + (2 + 1));
        // The same file twice.
        let mut twice: Vec<_> = (100..200).map(Some).collect();
        twice.extend_from_within(..);
        assert!(round_trip(&twice) < 100 * 32 + 10);
    }

    #[test]
    fn mixtures_round_trip() {
        // A small generator of awkward sequences; the seed decides, so failures repeat.
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for _ in 0..200 {
            let mut slots: Vec<Option<u64>> = Vec::new();
            while slots.len() < 300 {
                let count = random(20) as usize;
                match random(4) {
                    0 => slots.extend(std::iter::repeat_n(None, count)),
                    1 => {
                        let first = random(1000);
                        slots.extend((first..first + count as u64).map(Some));
                    }
                    2 => slots.extend(std::iter::repeat_n(Some(random(50)), count)),
                    _ => {
                        let from = random(slots.len() as u64 + 1) as usize;
                        let to = (from + count).min(slots.len());
                        slots.extend_from_within(from..to);
                    }
                }
            }
            round_trip(&slots);
        }
    }

    #[test]
    fn any_bytes_decode_or_are_refused() {
        let good = page(&[Some(1), Some(2), None, Some(1), Some(2), Some(90)]).encode();
        let mut state = 7u64;
        for round in 0..100_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(round);
            let mut bytes = good.clone();
            for change in 0..state % 4 + 1 {
                let at = (state >> (8 + 7 * change)) as usize % bytes.len().min(20);
                bytes[at] = (state >> (3 * change)) as u8;
            }
            if let Ok(page) = Page::decode(&bytes, 6, 100) {
                assert_eq!(page.len(), 6);
                assert!(page
                    .blocks()
                    .all(|block| block.slot.is_none_or(|slot| slot < 100)));
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let bytes = page(&[Some(1), Some(2), None, Some(1), Some(2)]).encode();
        for cut in 0..bytes.len() {
            assert!(Page::decode(&bytes[..cut], 5, 100).is_err());
        }
        assert!(Page::decode(&bytes, 4, 100).is_err());
        assert!(Page::decode(&bytes, 6, 100).is_err());
        assert!(Page::decode(&bytes, 5, 2).is_err(), "slot 2 of 2");
        // Op 3, a repeat of nothing, a run of length 0.
        assert!(Page::decode(&[(1 << 2) | 3], 1, 100).is_err());
        assert!(Page::decode(&[(1 << 2) | 2, 1], 1, 100).is_err());
        assert!(Page::decode(&[0], 1, 100).is_err());
    }
}
