// SPDX-License-Identifier: GPL-2.0

//! Which blocks of the old image look like given new ones, by their content alone.
//!
//! A new version of a file holds most byte sequences of the old one, at other places. So short sequences are sampled by
//! their own hash (the same sequence is sampled wherever it occurs), and the old blocks that share most samples with the new
//! ones are the reference that these compress best against. This knows no file system, and finds what was renamed,
//! linked into something else or moved into an archive as well.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::BLOCK_SIZE;

/// Samples kept of the old image at most: 8 bytes each, 256 MiB.
const MAX_SAMPLES: u64 = 32 << 20;
/// Of 4096 sequences in a block, one in 2^5 is sampled where the image is small enough.
const LEAST_BITS: u32 = 5;
/// A sequence that is in more old blocks than this says nothing.
const COMMON: usize = 24;
/// Unlike blocks between two like ones that are taken along: what changed a lot lies within what changed little.
const GAP: u64 = 4;

/// Random numbers for bytes, from a linear congruential generator.
const GEAR: [u32; 256] = {
    let mut table = [0; 256];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut at = 0;
    while at < 256 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        table[at] = (state >> 32) as u32;
        at += 1;
    }
    table
};

/// Calls `each` with the hash of every sampled sequence of 16 bytes.
fn samples(content: &[u8], bits: u32, mut each: impl FnMut(u32)) {
    let mut hash = 0u32;
    let mut last = 0;
    for (at, &byte) in content.iter().enumerate() {
        // Two bits a step: after 16 bytes the oldest is out.
        hash = (hash << 2).wrapping_add(GEAR[usize::from(byte)]);
        if hash >> (32 - bits) == 0 && at >= 15 && hash != last {
            last = hash;
            each(hash);
        }
    }
}

/// The samples of the old image, in the making.
pub(super) struct SampleCollector {
    bits: u32,
    samples: Mutex<Vec<u64>>,
}

impl SampleCollector {
    /// For an image with `blocks` blocks of content.
    pub(super) fn new(blocks: u64) -> Self {
        let mut bits = LEAST_BITS;
        while (blocks * BLOCK_SIZE as u64) >> bits > MAX_SAMPLES {
            bits += 1;
        }
        SampleCollector {
            bits,
            samples: Mutex::new(Vec::new()),
        }
    }

    /// Takes old blocks, in any order, from any thread.
    pub(super) fn add(&self, first: u64, content: &[u8]) {
        let mut found = Vec::with_capacity(content.len() >> (self.bits - 1));
        for (block, content) in (first..).zip(content.chunks(BLOCK_SIZE)) {
            // Block numbers have at most 32 bits.
            samples(content, self.bits, |hash| {
                found.push(u64::from(hash) << 32 | block)
            });
        }
        let mut all = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        all.append(&mut found);
    }

    /// No more blocks.
    pub(super) fn finish(self) -> Samples {
        let mut samples = self
            .samples
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        samples.sort_unstable();
        samples.dedup();
        Samples {
            bits: self.bits,
            samples,
        }
    }
}

/// The samples of the old image: hash and block, sorted.
pub(super) struct Samples {
    bits: u32,
    samples: Vec<u64>,
}

impl Samples {
    /// At most `limit` old blocks, in ascending ranges, that look most like `content`.
    pub(super) fn like(&self, content: &[u8], limit: u64) -> Vec<Range<u64>> {
        let mut votes: HashMap<u32, u32> = HashMap::new();
        for content in content.chunks(BLOCK_SIZE) {
            samples(content, self.bits, |hash| {
                let first = self
                    .samples
                    .partition_point(|&sample| sample >> 32 < u64::from(hash));
                let rest = &self.samples[first..];
                let count = rest
                    .iter()
                    .take(COMMON + 1)
                    .take_while(|&&sample| sample >> 32 == u64::from(hash))
                    .count();
                if count <= COMMON {
                    for sample in &rest[..count] {
                        // The fewer have it, the more it says.
                        *votes.entry(*sample as u32).or_default() += (2 * COMMON / count) as u32;
                    }
                }
            });
        }
        let mut best: Vec<(u32, u32)> = votes
            .into_iter()
            .map(|(block, votes)| (votes, block))
            .collect();
        best.sort_unstable_by(|a, b| b.cmp(a));
        best.truncate(limit as usize);
        let mut blocks: Vec<u64> = best
            .into_iter()
            .map(|(_, block)| u64::from(block))
            .collect();
        blocks.sort_unstable();
        join(&blocks, limit)
    }
}

/// Sorted blocks as ranges, with small gaps between them filled as far as `limit` allows.
fn join(blocks: &[u64], limit: u64) -> Vec<Range<u64>> {
    let mut spare = limit - blocks.len() as u64;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for &block in blocks {
        match ranges.last_mut() {
            Some(last) if block - last.end <= GAP.min(spare) => {
                spare -= block - last.end;
                last.end = block + 1;
            }
            _ => ranges.push(block..block + 1),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed;
        let mut byte = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as u8
        };
        (0..len).map(|_| byte()).collect()
    }

    #[test]
    fn shifted_content_is_found() {
        let old = noise(1, 64 * BLOCK_SIZE);
        let collector = SampleCollector::new(64);
        collector.add(100, &old);
        let samples = collector.finish();
        // Four blocks from the middle, shifted by some bytes, lie in five old ones.
        let new = &old[10 * BLOCK_SIZE + 77..14 * BLOCK_SIZE + 77];
        let found = samples.like(new, 64);
        assert!(
            matches!(
                found[..],
                [Range {
                    start: 110,
                    end: 115
                }]
            ),
            "{found:?}"
        );
        assert!(samples.like(&noise(2, 4 * BLOCK_SIZE), 64).is_empty());
        // Never more than asked for.
        let few: u64 = samples.like(&old, 7).iter().map(|r| r.end - r.start).sum();
        assert!(few <= 7);
    }

    #[test]
    fn what_all_blocks_have_says_nothing() {
        let collector = SampleCollector::new(64);
        let same = noise(3, BLOCK_SIZE);
        for block in 0..64 {
            collector.add(block, &same);
        }
        assert!(collector.finish().like(&same, 64).is_empty());
    }

    #[test]
    fn gaps_are_filled_within_the_limit() {
        assert_eq!(join(&[1, 2, 5, 20], 6), [1..6, 20..21]);
        assert_eq!(join(&[1, 2, 5, 20], 5), [1..3, 5..6, 20..21]);
    }
}
