// SPDX-License-Identifier: GPL-2.0

//! Blocks that were loaded.

use std::ops::Range;
use std::sync::Arc;

use pristine_image::{Digest, BLOCK_SIZE};

use crate::cache::Unpacked;

/// A verified block, and where it is.
#[derive(Debug)]
struct Found {
    /// The image block.
    block: u64,
    frame: Arc<Unpacked>,
    /// Its index in the frame.
    index: u32,
    digest: Digest,
}

/// Loaded blocks, verified. Blocks that it does not hold are zero.
#[derive(Debug, Default)]
pub struct Loaded {
    /// In their order, each once.
    blocks: Vec<Found>,
    /// The image blocks of the frames that were used, each once.
    pub(crate) frames: Vec<Range<u64>>,
    /// Whether the source was asked for any of it.
    pub(crate) fetched: bool,
}

impl Loaded {
    /// Adds a block, the one at `index` of a frame, which must be what `digest` says to be given out.
    pub(crate) fn push(&mut self, block: u64, frame: &Arc<Unpacked>, index: u32, digest: Digest) {
        let in_order = self.blocks.last().is_none_or(|last| last.block < block);
        let found = Found {
            block,
            frame: Arc::clone(frame),
            index,
            digest,
        };
        match in_order {
            true => self.blocks.push(found),
            // Rarely: requests that are answered together are seldom out of order, or for the same block.
            false if self.holds(block) => {}
            false => {
                let at = self.at(block);
                self.blocks.insert(at, found);
            }
        }
    }

    /// Adds what another holds.
    pub(crate) fn extend(&mut self, other: Loaded) {
        self.blocks.extend(other.blocks);
        self.blocks.sort_by_key(|found| found.block);
        self.blocks.dedup_by_key(|found| found.block);
    }

    /// Whether it holds no block.
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether it holds a block.
    pub(crate) fn holds(&self, block: u64) -> bool {
        self.run(&(block..block + 1)).len() == 1
    }

    fn at(&self, block: u64) -> usize {
        self.blocks.partition_point(|found| found.block < block)
    }

    fn run(&self, blocks: &Range<u64>) -> &[Found] {
        self.blocks
            .get(self.at(blocks.start)..self.at(blocks.end))
            .unwrap_or_default()
    }

    /// The image blocks of the frames of which `wanted` is only a part. Who wants as much as a frame in a row wants the rest
    /// of the last one in a moment, and asks for it.
    pub fn frames_beyond(&self, wanted: &[Range<u64>]) -> Vec<Range<u64>> {
        let is_part = |frame: &&Range<u64>| {
            let reads_on = |run: &Range<u64>| {
                let overlap = run.start < frame.end && frame.start < run.end;
                overlap && run.end - run.start >= frame.end - frame.start
            };
            !wanted.iter().any(reads_on)
        };
        self.frames.iter().filter(is_part).cloned().collect()
    }

    /// Whether a run of image blocks is all zero.
    pub fn is_zero(&self, blocks: Range<u64>) -> bool {
        self.run(&blocks).is_empty()
    }

    /// The content of a run of image blocks.
    pub fn content(&self, blocks: Range<u64>) -> Vec<u8> {
        // CAST: callers ask for as much as one answer carries.
        let mut data = Vec::with_capacity((blocks.end - blocks.start) as usize * BLOCK_SIZE);
        let mut held = self.run(&blocks).iter();
        let mut next = held.next();
        for block in blocks {
            let found = next.filter(|found| found.block == block);
            if found.is_some() {
                next = held.next();
            }
            let content = found.and_then(|f| f.frame.block(f.index, &f.digest));
            data.extend_from_slice(content.unwrap_or(&[0; BLOCK_SIZE]));
        }
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_however_they_came() {
        let data: Vec<u8> = (0..8).flat_map(|n| [n + 1; BLOCK_SIZE]).collect();
        let digests = Digest::of_each_block(&data);
        let frame = Arc::new(Unpacked::verified(data, digests.clone(), 0));
        let of = |blocks: &[u64]| {
            let mut loaded = Loaded::default();
            for block in blocks {
                // Block 10 is the first of the frame.
                let index = (block - 10) as u32;
                loaded.push(*block, &frame, index, digests[index as usize]);
            }
            loaded
        };
        let firsts = |loaded: &Loaded, run: Range<u64>| {
            let content = loaded.content(run);
            let firsts: Vec<u8> = content.chunks(BLOCK_SIZE).map(|block| block[0]).collect();
            firsts
        };
        // Requests that overlap, one behind another, and before another.
        let mut loaded = of(&[14, 15, 15, 16, 10, 11, 10]);
        assert_eq!(firsts(&loaded, 9..18), [0, 1, 2, 0, 0, 5, 6, 7, 0]);
        assert_eq!(firsts(&loaded, 15..17), [6, 7]);
        loaded.extend(of(&[13, 15, 17]));
        assert_eq!(firsts(&loaded, 9..19), [0, 1, 2, 0, 4, 5, 6, 7, 8, 0]);
        assert!(loaded.holds(13) && !loaded.holds(12) && loaded.is_zero(12..13));
    }
}
