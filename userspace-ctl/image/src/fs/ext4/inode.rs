// SPDX-License-Identifier: GPL-2.0

//! Inodes, and where their blocks lie: extent trees, and the indirect blocks of ext2 and ext3.

use super::Layout;
use crate::fs::bytes::{read, Fields};
use crate::fs::{FsError, Result};
use crate::ReadAt;

const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE: u32 = 0x1000_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const MAX_DEPTH: u16 = 5;
/// Blocks that a file may have: as many as 32 bits number.
const MAX_LOGICAL: u64 = 1 << 32;

/// An inode, as far as it matters here.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub(super) mode: u16,
    pub(super) size: u64,
    flags: u32,
    /// The root of the extent tree, block numbers, or inline content.
    pub(super) map: [u8; 60],
}

impl Inode {
    /// Whether its content is in the inode itself.
    pub(super) fn is_inline(&self) -> bool {
        self.flags & FLAG_INLINE != 0
    }
}

/// Consecutive blocks of a file; numbers are blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) logical: u64,
    pub(super) physical: u64,
    pub(super) len: u64,
    /// Allocated, and reads as zeros.
    pub(super) unwritten: bool,
}

impl Layout {
    /// An inode by its number.
    pub(super) fn inode(&self, disk: &dyn ReadAt, number: u32) -> Result<Inode> {
        let index = u64::from(number).wrapping_sub(1);
        let group = self.groups.get((index / self.inodes_per_group) as usize);
        let Some(group) = group.filter(|_| number > 0) else {
            return Err(FsError::refused(format!("there is no inode {number}")));
        };
        let at =
            group.inode_table * self.block_size + index % self.inodes_per_group * self.inode_size;
        let bytes = read(disk, at, 128)?;
        let f = Fields(&bytes);
        let mode = f.le16(0);
        // The upper half of the size means something else in old directories, which are small.
        let high = u64::from(f.le32(108));
        Ok(Inode {
            mode,
            size: u64::from(f.le32(4)) | high << 32,
            flags: f.le32(32),
            map: f.array(40),
        })
    }

    /// Where the content of an inode lies, ascending.
    pub(super) fn extents(&self, disk: &dyn ReadAt, inode: &Inode) -> Result<Vec<Extent>> {
        self.mapped(disk, inode, &mut Vec::new())
    }

    /// As [`Layout::extents`]; adds the blocks that say so to `maps`.
    pub(super) fn mapped(
        &self,
        disk: &dyn ReadAt,
        inode: &Inode,
        maps: &mut Vec<u64>,
    ) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        if inode.flags & FLAG_EXTENTS != 0 {
            let depth = Fields(&inode.map).le16(6);
            self.extent_node(disk, &inode.map, depth, &mut extents, maps)?;
        } else {
            self.block_map(disk, inode, &mut extents, maps)?;
        }
        Ok(extents)
    }

    /// Adds an extent that lies after those before it, within the file system.
    fn add(&self, extents: &mut Vec<Extent>, extent: Extent) -> Result<()> {
        let end = extents.last().map_or(0, |last| last.logical + last.len);
        let physical_end = extent.physical.checked_add(extent.len);
        let good = extent.logical >= end
            && extent.logical + extent.len <= MAX_LOGICAL
            && physical_end.is_some_and(|end| end <= self.blocks)
            && extent.physical >= self.first_data_block;
        if !good {
            return Err(FsError::refused("an inode's list of blocks is damaged"));
        }
        match extents.last_mut() {
            Some(last)
                if last.logical + last.len == extent.logical
                    && last.physical + last.len == extent.physical
                    && last.unwritten == extent.unwritten =>
            {
                last.len += extent.len;
            }
            _ => extents.push(extent),
        }
        Ok(())
    }

    fn extent_node(
        &self,
        disk: &dyn ReadAt,
        node: &[u8],
        depth: u16,
        extents: &mut Vec<Extent>,
        maps: &mut Vec<u64>,
    ) -> Result<()> {
        let f = Fields(node);
        let count = usize::from(f.le16(2));
        let good = f.le16(0) == EXTENT_MAGIC
            && f.le16(6) == depth
            && depth <= MAX_DEPTH
            && 12 + 12 * count <= node.len();
        if !good {
            return Err(FsError::refused("a node of an extent tree is damaged"));
        }
        for index in 0..count {
            let entry = f.from(12 + 12 * index);
            if depth > 0 {
                let block = u64::from(entry.le32(4)) | u64::from(entry.le16(8)) << 32;
                let bytes = self.map_block(disk, block, maps)?;
                self.extent_node(disk, &bytes, depth - 1, extents, maps)?;
                continue;
            }
            let len = u64::from(entry.le16(4));
            let unwritten = len > 32768;
            self.add(
                extents,
                Extent {
                    logical: u64::from(entry.le32(0)),
                    physical: u64::from(entry.le32(8)) | u64::from(entry.le16(6)) << 32,
                    len: if unwritten { len - 32768 } else { len },
                    unwritten,
                },
            )?;
        }
        Ok(())
    }

    /// A block of a map. No file has more of them than the file system has blocks, and none comes twice: what a file
    /// has after it must lie further on.
    fn map_block(&self, disk: &dyn ReadAt, block: u64, maps: &mut Vec<u64>) -> Result<Vec<u8>> {
        if block < self.first_data_block || block >= self.blocks || maps.len() as u64 >= self.blocks
        {
            return Err(FsError::refused("an inode's list of blocks is damaged"));
        }
        maps.push(block);
        read(disk, block * self.block_size, self.block_size as usize)
    }

    fn block_map(
        &self,
        disk: &dyn ReadAt,
        inode: &Inode,
        extents: &mut Vec<Extent>,
        maps: &mut Vec<u64>,
    ) -> Result<()> {
        let f = Fields(&inode.map);
        let end = inode.size.div_ceil(self.block_size);
        let mut logical = 0;
        for index in 0..15usize {
            let levels = index.saturating_sub(11) as u32;
            self.mapped_block(
                disk,
                f.le32(4 * index),
                levels,
                end,
                &mut logical,
                extents,
                maps,
            )?;
        }
        Ok(())
    }

    /// Adds a block (of content at level 0, else of block numbers) and steps over what it covers.
    #[allow(clippy::too_many_arguments)] // A recursion over one file's state.
    fn mapped_block(
        &self,
        disk: &dyn ReadAt,
        block: u32,
        level: u32,
        end: u64,
        logical: &mut u64,
        extents: &mut Vec<Extent>,
        maps: &mut Vec<u64>,
    ) -> Result<()> {
        let per_block = self.block_size / 4;
        if *logical >= end || block == 0 {
            *logical += per_block.pow(level);
            return Ok(());
        }
        if level == 0 {
            let extent = Extent {
                logical: *logical,
                physical: u64::from(block),
                len: 1,
                unwritten: false,
            };
            *logical += 1;
            return self.add(extents, extent);
        }
        let bytes = self.map_block(disk, u64::from(block), maps)?;
        for index in 0..per_block as usize {
            let next = Fields(&bytes).le32(4 * index);
            self.mapped_block(disk, next, level - 1, end, logical, extents, maps)?;
        }
        Ok(())
    }
}
