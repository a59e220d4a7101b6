// SPDX-License-Identifier: GPL-2.0

//! What the workload did, as it knows it itself: the operations in the order in which they were acknowledged.
//!
//! A line of its log is `<value> write|clear <first block> <blocks>`. A write stamps each sector with its block,
//! its value and its place; a clear (discard or write-zeroes) leaves zeros. Values grow, and a block has one
//! writer only, so the operations on a block happened in the order of their values.

use std::collections::HashMap;
use std::path::Path;

use crate::disk::{BLOCK, SECTOR};

const STAMP: &[u8; 8] = b"ENITSIRP";

#[derive(Clone, Copy)]
struct Operation {
    value: u64,
    clear: bool,
}

/// The operations on each block, and how many of them had been acknowledged when.
pub struct Model {
    /// For each block its operations: (position in the order of acknowledgement, operation).
    blocks: HashMap<u64, Vec<(usize, Operation)>>,
    /// How many operations there are.
    pub operations: usize,
}

impl Model {
    /// Reads the workload's own log.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let mut blocks: HashMap<u64, Vec<(usize, Operation)>> = HashMap::new();
        let mut operations = 0;
        for line in text.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let [value, kind, first, count] = words[..] else {
                return Err(format!("not an operation: {line}"));
            };
            let number = |word: &str| word.parse::<u64>().map_err(|e| format!("{line}: {e}"));
            let (value, first, count) = (number(value)?, number(first)?, number(count)?);
            for block in first..first + count {
                let operation = Operation {
                    value,
                    clear: kind == "clear",
                };
                blocks
                    .entry(block)
                    .or_default()
                    .push((operations, operation));
            }
            operations += 1;
        }
        Ok(Self { blocks, operations })
    }

    /// Whether any operation touched the block.
    pub fn touched(&self, block: u64) -> bool {
        self.blocks.contains_key(&block)
    }

    /// Blocks that any operation touched.
    pub fn touched_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Checks that what the first `acknowledged` operations left is there, or something later (rule 3 of the
    /// contract). `data` is the data device.
    pub fn check(&self, data: &[u8], acknowledged: usize) -> Result<(), String> {
        for (block, operations) in &self.blocks {
            let known = operations.partition_point(|(at, _)| *at < acknowledged);
            let Some((_, last)) = known.checked_sub(1).and_then(|n| operations.get(n)) else {
                continue;
            };
            let start = usize::try_from(*block).map_err(|e| e.to_string())? * BLOCK;
            let content = data.get(start..start + BLOCK).ok_or("block past the end")?;
            for (n, sector) in content.chunks_exact(SECTOR).enumerate() {
                if !fits(
                    sector,
                    *block,
                    n as u64,
                    *last,
                    operations.get(known..).unwrap_or(&[]),
                ) {
                    return Err(format!(
                        "sector {n} of block {block} has lost operation {} that a flush had made durable",
                        last.value
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Whether a sector holds what `last` or one of the operations after it left.
fn fits(
    sector: &[u8],
    block: u64,
    place: u64,
    last: Operation,
    later: &[(usize, Operation)],
) -> bool {
    let mut all = later.iter().map(|(_, o)| *o).chain([last]);
    if sector.iter().all(|b| *b == 0) {
        return all.any(|o| o.clear);
    }
    let number = |at: usize| {
        let bytes = sector.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    number(0) == block
        && number(16) == place
        && sector.get(24..32) == Some(STAMP)
        && all.any(|o| !o.clear && o.value == number(8))
}
