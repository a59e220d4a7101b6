// SPDX-License-Identifier: GPL-2.0

//! What the workload did, as it knows it itself: the operations in the order in which they were acknowledged.
//!
//! A line of its log is `<value> write|clear <first block> <blocks>`. A write stamps each sector with its block,
//! its value and its place; a clear (discard or write-zeroes) leaves zeros. Values grow, and a block has one
//! writer only, so the operations on a block happened in the order of their values.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::disk::{BLOCK, SECTOR};

const STAMP: &[u8; 8] = b"ENITSIRP";

#[derive(Clone, Copy)]
struct Operation {
    /// Its place in the order of acknowledgement.
    place: usize,
    value: u64,
    clear: bool,
}

#[derive(Default)]
struct Block {
    operations: Vec<Operation>,
    /// How many of them are known to be durable, the first ones.
    known: usize,
}

/// The operations on each block, and what is known to be durable of them.
pub struct Model {
    blocks: HashMap<u64, Block>,
    /// The blocks of each operation.
    order: Vec<Range<u64>>,
    /// So many operations were acknowledged before a flush that is done.
    flushed: usize,
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
            for block in first..first + count {
                blocks.entry(block).or_default().operations.push(Operation {
                    place: order.len(),
                    value,
                    clear: kind == "clear",
                });
            }
            order.push(first..first + count);
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
    pub fn touched(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }

    /// The operation at `place` is durable by itself; returns its blocks.
    pub fn durable(&mut self, place: usize) -> Range<u64> {
        let range = self.order.get(place).cloned().unwrap_or(0..0);
        for block in range.clone() {
            if let Some(block) = self.blocks.get_mut(&block) {
                let known = block.operations.partition_point(|o| o.place <= place);
                block.known = block.known.max(known);
            }
        }
        range
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

    /// Checks that a block holds what the last of its operations that are durable left, or something later (rule 3
    /// of the contract). A block without such operations may also hold what it did at the start.
    pub fn fits(&self, block: u64, content: &[u8], start: &[u8]) -> bool {
        let Some(known) = self.blocks.get(&block) else {
            return content == start;
        };
        let candidates = known
            .operations
            .get(known.known.saturating_sub(1)..)
            .unwrap_or(&[]);
        let mut sectors = content
            .chunks_exact(SECTOR)
            .zip(start.chunks_exact(SECTOR))
            .enumerate();
        sectors.all(|(n, (sector, start))| {
            (known.known == 0 && sector == start) || holds(sector, block, n as u64, candidates)
        })
    }

    /// Why a block does not fit, for people.
    pub fn complain(&self, block: u64) -> String {
        let last = self
            .blocks
            .get(&block)
            .and_then(|b| b.operations.get(b.known.checked_sub(1)?));
        match last {
            Some(o) => format!(
                "flush: block {block} has lost operation {} that was durable",
                o.value
            ),
            None => format!("block {block} holds what nobody wrote there"),
        }
    }
}

/// Whether a sector holds what one of the operations left.
fn holds(sector: &[u8], block: u64, place: u64, operations: &[Operation]) -> bool {
    if sector.iter().all(|b| *b == 0) {
        return operations.iter().any(|o| o.clear);
    }
    let number = |at: usize| {
        let bytes = sector.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    number(0) == block
        && number(16) == place
        && sector.get(24..32) == Some(STAMP)
        && operations.iter().any(|o| !o.clear && o.value == number(8))
}

// A block is 8 sectors; what is checked above relies on it.
const _: () = assert!(BLOCK == 8 * SECTOR);
