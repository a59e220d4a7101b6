// SPDX-License-Identifier: GPL-2.0

//! What the workload did, as it knows it itself: the operations in the order in which they were acknowledged.
//!
//! A line of its log is `<value> write|clear <first sector> <sectors>`. A write stamps each sector with its block,
//! its value and its place; a clear (discard or write-zeroes) leaves zeros. Values grow, and a block has one
//! writer only, so the operations on a block happened in the order of their values.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::disk::{BLOCK, SECTOR};

const STAMP: &[u8; 8] = b"ENITSIRP";
/// Sectors of a block.
const SECTORS: u64 = 8;

#[derive(Clone, Copy)]
struct Operation {
    /// Its place in the order of acknowledgement.
    place: usize,
    value: u64,
    clear: bool,
    /// The sectors of the block that it changes, one bit each.
    sectors: u8,
}

#[derive(Default)]
struct Block {
    operations: Vec<Operation>,
    /// For each sector, one past the last of the operations on it that is known to be durable; 0 if none is.
    known: [usize; SECTORS as usize],
}

/// The operations on each block, and what is known to be durable of them.
pub struct Model {
    blocks: HashMap<u64, Block>,
    /// The sectors of each operation.
    order: Vec<Range<u64>>,
    /// So many operations were acknowledged before a flush that is done.
    flushed: usize,
}

/// The blocks of some sectors.
fn blocks_of(sectors: &Range<u64>) -> Range<u64> {
    sectors.start / SECTORS..sectors.end.div_ceil(SECTORS)
}

/// The part of some sectors that lies in a block, one bit each.
fn sectors_in(sectors: &Range<u64>, block: u64) -> u8 {
    let first = block * SECTORS;
    (0..SECTORS)
        .filter(|n| sectors.contains(&(first + n)))
        .fold(0, |mask, n| mask | 1 << n)
}

impl Model {
    /// Reads the workload's own log.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let mut blocks: HashMap<u64, Block> = HashMap::new();
        let mut order = Vec::new();
        for line in text.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let [value, kind, first, count] = words[..] else {
                return Err(format!("not an operation: {line}"));
            };
            let number = |word: &str| word.parse::<u64>().map_err(|e| format!("{line}: {e}"));
            let (value, first, count) = (number(value)?, number(first)?, number(count)?);
            let sectors = first..first + count;
            for block in blocks_of(&sectors) {
                blocks.entry(block).or_default().operations.push(Operation {
                    place: order.len(),
                    value,
                    clear: kind == "clear",
                    sectors: sectors_in(&sectors, block),
                });
            }
            order.push(sectors);
        }
        Ok(Self {
            blocks,
            order,
            flushed: 0,
        })
    }

    /// How many operations there are.
    pub fn operations(&self) -> usize {
        self.order.len()
    }

    /// The blocks that any operation touched.
    pub fn touched(&self) -> Vec<u64> {
        self.blocks.keys().copied().collect()
    }

    /// The operation at `place` is durable by itself; returns its blocks.
    pub fn durable(&mut self, place: usize) -> Range<u64> {
        let blocks = self.order.get(place).map_or(0..0, blocks_of);
        for block in blocks.clone() {
            let Some(block) = self.blocks.get_mut(&block) else {
                continue;
            };
            let at = block.operations.partition_point(|o| o.place < place);
            let sectors = block.operations.get(at).map_or(0, |o| o.sectors);
            for (n, known) in block.known.iter_mut().enumerate() {
                if sectors >> n & 1 == 1 {
                    *known = (at + 1).max(*known);
                }
            }
        }
        blocks
    }

    /// The first `count` operations are durable; returns the blocks of those that were not known to be.
    pub fn flushed(&mut self, count: usize) -> Vec<u64> {
        let mut blocks = Vec::new();
        while self.flushed < count.min(self.order.len()) {
            blocks.extend(self.durable(self.flushed));
            self.flushed += 1;
        }
        blocks
    }

    /// Checks that each sector of a block holds what the last of its operations that are durable left, or something later
    /// (rule 3 of the contract). One without such operations may also hold what it did at the start.
    pub fn fits(&self, block: u64, content: &[u8], start: &[u8]) -> bool {
        let Some(history) = self.blocks.get(&block) else {
            return content == start;
        };
        let sectors = content
            .chunks_exact(SECTOR)
            .zip(start.chunks_exact(SECTOR))
            .zip(history.known);
        sectors.enumerate().all(|(n, ((sector, start), known))| {
            let candidates = history.operations.get(known.saturating_sub(1)..);
            let mut candidates =
                (candidates.unwrap_or(&[]).iter()).filter(|o| o.sectors >> n & 1 == 1);
            (known == 0 && sector == start) || holds(sector, block, n as u64, &mut candidates)
        })
    }

    /// Why a block does not fit, for people.
    pub fn complain(&self, block: u64) -> String {
        let last = self.blocks.get(&block).and_then(|b| {
            let known = b.known.iter().max()?;
            b.operations.get(known.checked_sub(1)?)
        });
        match last {
            Some(o) => format!(
                "flush: block {block} has lost operation {} that was durable, or an older one",
                o.value
            ),
            None => format!("block {block} holds what nobody wrote there"),
        }
    }
}

/// Whether a sector holds what one of the operations left.
fn holds<'a>(
    sector: &[u8],
    block: u64,
    place: u64,
    operations: &mut impl Iterator<Item = &'a Operation>,
) -> bool {
    if sector.iter().all(|b| *b == 0) {
        return operations.any(|o| o.clear);
    }
    let number = |at: usize| {
        let bytes = sector.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    number(0) == block
        && number(16) == place
        && sector.get(24..32) == Some(STAMP)
        && operations.any(|o| !o.clear && o.value == number(8))
}

// A block is 8 sectors; what is checked above relies on it.
const _: () = assert!(BLOCK == SECTORS as usize * SECTOR);
