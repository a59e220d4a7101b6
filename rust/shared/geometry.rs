// SPDX-License-Identifier: GPL-2.0

//! Sectors, blocks and extents of a managed device.

use super::error::{Error, Result};

/// log2 of the default block size in bytes (4 KiB).
pub const DEFAULT_BLOCK_SHIFT: u32 = 12;
/// log2 of the default extent size in bytes (1 MiB).
pub const DEFAULT_EXTENT_SHIFT: u32 = 20;
/// log2 of the largest block size in bytes (1 MiB).
pub const MAX_BLOCK_SHIFT: u32 = 20;
/// log2 of the largest extent size in bytes (64 MiB).
pub const MAX_EXTENT_SHIFT: u32 = 26;
/// Most blocks of one device. It keeps plane pages countable in 32 bits, and is 4 PiB at the default block size.
pub const MAX_BLOCKS: u64 = 1 << 40;

const SECTOR_SHIFT: u32 = 9;

/// A run of blocks or extents: `start..end`, never empty when it comes from [`Geometry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First unit.
    pub start: u64,
    /// One past the last unit.
    pub end: u64,
}

impl Run {
    /// Units in the run.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no unit in it.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// How a managed device divides into blocks (the unit of tracking) and extents (the unit of write intent).
///
/// # Invariants
///
/// `12 <= block_shift <= MAX_BLOCK_SHIFT`, `block_shift <= extent_shift <= MAX_EXTENT_SHIFT`,
/// `0 < sectors` and `blocks() <= MAX_BLOCKS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    sectors: u64,
    block_shift: u32,
    extent_shift: u32,
    /// log2 of sectors per block.
    sector_bits: u32,
    /// log2 of blocks per extent.
    block_bits: u32,
}

impl Geometry {
    /// A geometry for a managed device of `sectors` 512-byte sectors; shifts are log2 of bytes.
    ///
    /// # Errors
    ///
    /// [`Error::BadGeometry`] names the parameter that is out of range.
    pub fn new(sectors: u64, block_shift: u32, extent_shift: u32) -> Result<Self> {
        if !(DEFAULT_BLOCK_SHIFT..=MAX_BLOCK_SHIFT).contains(&block_shift) {
            return Err(Error::BadGeometry("block size"));
        }
        if extent_shift < block_shift || extent_shift > MAX_EXTENT_SHIFT {
            return Err(Error::BadGeometry("extent size"));
        }
        let sector_bits = block_shift - SECTOR_SHIFT;
        if sectors == 0 || sectors.wrapping_shr(sector_bits) >= MAX_BLOCKS {
            return Err(Error::BadGeometry("managed size"));
        }
        // INVARIANT: All of it was checked above.
        Ok(Self {
            sectors,
            block_shift,
            extent_shift,
            sector_bits,
            block_bits: extent_shift - block_shift,
        })
    }

    // All shifts below are `wrapping_*`: by the type invariant the distance is far below 64, so they never wrap, and
    // the compiler adds no check that could panic.

    /// Sectors of the managed device.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// log2 of the block size in bytes.
    pub fn block_shift(&self) -> u32 {
        self.block_shift
    }

    /// log2 of the extent size in bytes.
    pub fn extent_shift(&self) -> u32 {
        self.extent_shift
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> u64 {
        1u64.wrapping_shl(self.block_shift)
    }

    /// Bytes in an extent.
    pub fn extent_size(&self) -> u64 {
        1u64.wrapping_shl(self.extent_shift)
    }

    /// Blocks of the device; the last may reach past its end.
    pub fn blocks(&self) -> u64 {
        self.sectors
            .saturating_sub(1)
            .wrapping_shr(self.sector_bits)
            + 1
    }

    /// Blocks that lie wholly within the device: all, or all but the last.
    pub fn whole_blocks(&self) -> u64 {
        self.sectors.wrapping_shr(self.sector_bits)
    }

    /// Extents of the device; the last may reach past its end.
    pub fn extents(&self) -> u64 {
        (self.blocks() - 1).wrapping_shr(self.block_bits) + 1
    }

    /// Blocks in a whole extent.
    pub fn blocks_per_extent(&self) -> u64 {
        1u64.wrapping_shl(self.block_bits)
    }

    /// The blocks that `count` sectors from `sector` touch, wholly or in part; empty for `count` 0. What lies past
    /// the end of the device is left out.
    #[inline]
    pub fn blocks_of(&self, sector: u64, count: u64) -> Run {
        let end = sector.saturating_add(count).min(self.sectors);
        Run {
            start: sector.wrapping_shr(self.sector_bits),
            end: match end.checked_sub(1) {
                Some(last) if last >= sector => last.wrapping_shr(self.sector_bits).wrapping_add(1),
                _ => 0,
            },
        }
    }

    /// First and last block that `count` sectors (not 0) from `sector` touch, not cut at the end of the device.
    #[inline]
    pub fn block_span(&self, sector: u64, count: u64) -> (u64, u64) {
        let last = sector.wrapping_add(count).wrapping_sub(1);
        (
            sector.wrapping_shr(self.sector_bits),
            last.wrapping_shr(self.sector_bits),
        )
    }

    /// The extents that hold the blocks of `run`.
    #[inline]
    pub fn extents_of(&self, run: Run) -> Run {
        Run {
            start: run.start.wrapping_shr(self.block_bits),
            end: match run.end.checked_sub(1) {
                Some(last) if last >= run.start => {
                    last.wrapping_shr(self.block_bits).wrapping_add(1)
                }
                _ => 0,
            },
        }
    }

    /// The blocks of the extents of `run`, cut at the end of the device.
    #[inline]
    pub fn blocks_in(&self, run: Run) -> Run {
        Run {
            start: run
                .start
                .saturating_mul(self.blocks_per_extent())
                .min(self.blocks()),
            end: run
                .end
                .saturating_mul(self.blocks_per_extent())
                .min(self.blocks()),
        }
    }

    /// The blocks of extent `extent`, cut at the end of the device.
    #[inline]
    pub fn blocks_of_extent(&self, extent: u64) -> Run {
        self.blocks_in(Run {
            start: extent,
            end: extent.saturating_add(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_partial_blocks() {
        let g = Geometry::new(8 * 1000 + 3, 12, 20).unwrap();
        assert_eq!(g.blocks(), 1001);
        assert_eq!(g.whole_blocks(), 1000);
        assert_eq!(g.extents(), 4);
        assert_eq!(g.blocks_of(7, 2), Run { start: 0, end: 2 });
        assert_eq!(g.blocks_of(8, 8), Run { start: 1, end: 2 });
        assert_eq!(g.blocks_of(8, 0).len(), 0);
        assert_eq!(
            g.blocks_of(8000, u64::MAX),
            Run {
                start: 1000,
                end: 1001
            }
        );
        assert_eq!(
            g.extents_of(Run {
                start: 255,
                end: 257
            }),
            Run { start: 0, end: 2 }
        );
        assert_eq!(
            g.blocks_in(Run { start: 3, end: 4 }),
            Run {
                start: 768,
                end: 1001
            }
        );
    }

    #[test]
    fn bad_parameters_are_refused() {
        assert!(Geometry::new(0, 12, 20).is_err());
        assert!(Geometry::new(8, 11, 20).is_err());
        assert!(Geometry::new(8, 16, 15).is_err());
        assert!(Geometry::new(u64::MAX, 12, 20).is_err());
        assert!(Geometry::new(8, 12, 27).is_err());
    }
}
