// SPDX-License-Identifier: GPL-2.0

//! The free blocks of ext2, ext3 and ext4, from the block bitmaps.
//!
//! They are believed only if everything agrees: the superblock says clean, no journal is to be replayed, all checksums
//! are right, and each bitmap has as many free clusters as its group's descriptor says. Groups whose bitmap was never
//! written (`BLOCK_UNINIT`) are free but for what the layout itself puts there.

use std::ops::Range;

use super::{feature, Group, Layout};
use crate::fs::bytes::{crc32c_raw, read, Fields};
use crate::fs::{Contents, FsError, Ranges, Result};
use crate::ReadAt;

const STATE_VALID: u16 = 1;
const STATE_ERROR: u16 = 2;
const STATE_ORPHANS: u16 = 4;

/// The file system on `disk`.
pub(crate) fn contents(disk: &dyn ReadAt) -> Result<Contents> {
    let layout = Layout::read(disk)?;
    let fix = "run e2fsck on it";
    if layout.incompat & feature::INCOMPAT_RECOVER != 0 {
        let why = format!("its journal must be replayed first ({fix}, or mount and unmount it)");
        return Err(FsError::refused(why));
    }
    if layout.state & STATE_ERROR != 0 {
        return Err(FsError::refused(format!(
            "it is marked as having errors ({fix})"
        )));
    }
    if layout.state & STATE_VALID == 0 || layout.state & STATE_ORPHANS != 0 {
        return Err(FsError::refused(format!(
            "it was not unmounted cleanly ({fix})"
        )));
    }
    let free = layout.free(disk)?;
    let dead = layout.dead_journal(disk)?;
    let layout_blocks = layout.layout_blocks();
    let of_layout = |range: Range<u64>| {
        let size = layout.block_size;
        layout_blocks.touches(range.start / size..range.end / size)
    };
    if free.iter().any(|range| dead.touches(range)) || dead.iter().any(of_layout) {
        let why = format!("its journal lies where it cannot ({fix})");
        return Err(FsError::refused(why));
    }
    Ok(Contents {
        kind: layout.kind,
        uuid: Some(layout.uuid),
        label: Some(layout.label),
        size: layout.blocks * layout.block_size,
        free,
        dead,
    })
}

impl Layout {
    /// The journal's blocks but for its superblock, if that says that the journal is empty: what they hold is old
    /// metadata, names of deleted files and all. (`struct journal_superblock_s` of Linux's `include/linux/jbd2.h`.)
    fn dead_journal(&self, disk: &dyn ReadAt) -> Result<Ranges> {
        if self.compat & feature::COMPAT_HAS_JOURNAL == 0 {
            return Ok(Ranges::new());
        }
        let inode = self.inode(disk, super::JOURNAL)?;
        let extents = self.extents(disk, &inode)?;
        let Some(first) = extents.first().filter(|extent| extent.logical == 0) else {
            return Ok(Ranges::new());
        };
        let bytes = read(disk, first.physical * self.block_size, 1024)?;
        let f = Fields(&bytes);
        let (magic, kind, block_size) = (f.be32(0), f.be32(4), u64::from(f.be32(12)));
        let (start, errno) = (f.be32(28), f.be32(32));
        let empty = magic == 0xc03b_3998
            && (3..=4).contains(&kind)
            && block_size == self.block_size
            && (start, errno) == (0, 0);
        if !empty {
            return Err(FsError::refused(
                "its journal is damaged or not empty (run e2fsck on it)",
            ));
        }
        let first_used = u64::from(f.be32(20)).max(1);
        let dead = extents.iter().filter_map(|extent| {
            let skip = first_used.saturating_sub(extent.logical).min(extent.len);
            let (from, to) = (extent.physical + skip, extent.physical + extent.len);
            (from < to).then_some(from * self.block_size..to * self.block_size)
        });
        Ok(Ranges::of(dead.collect()))
    }

    /// All free blocks, as bytes.
    fn free(&self, disk: &dyn ReadAt) -> Result<Ranges> {
        let layout_blocks = self.layout_blocks();
        let mut free = Ranges::new();
        for (number, group) in self.groups.iter().enumerate() {
            let number = number as u64;
            let clusters = self.free_clusters(disk, number, group, &layout_blocks)?;
            let found: u64 = clusters.iter().map(|range| range.end - range.start).sum();
            if found != u64::from(group.free_clusters) {
                let why = format!(
                    "the bitmap of its block group {number} has {found} free clusters, the descriptor {}",
                    group.free_clusters
                );
                return Err(FsError::refused(why));
            }
            for range in clusters {
                let blocks = self.cluster_blocks(number, range);
                free.push(blocks.start * self.block_size..blocks.end * self.block_size);
            }
        }
        Ok(free)
    }

    /// The blocks of a group's clusters.
    fn cluster_blocks(&self, group: u64, clusters: Range<u64>) -> Range<u64> {
        let start = self.group_start(group);
        let end = (start + clusters.end * self.cluster).min(self.blocks);
        start + clusters.start * self.cluster..end
    }

    /// The free clusters of a group, numbered in it.
    fn free_clusters(
        &self,
        disk: &dyn ReadAt,
        number: u64,
        group: &Group,
        layout_blocks: &Ranges,
    ) -> Result<Vec<Range<u64>>> {
        let start = self.group_start(number);
        let blocks = (self.blocks - start).min(self.blocks_per_group);
        let clusters = blocks.div_ceil(self.cluster);
        let bitmap = match group.blocks_uninit {
            true => None,
            false => Some(self.bitmap(disk, number, group)?),
        };
        let mut free: Vec<Range<u64>> = Vec::new();
        let mut add = |range: Range<u64>| match free.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => free.push(range),
        };
        // What the layout puts into the group is never free, whatever the bitmap says; the counts tell then.
        let mut taken = layout_blocks.in_range(start..start + blocks).peekable();
        for cluster in 0..clusters {
            let first = start + cluster * self.cluster;
            while taken.next_if(|range| range.end <= first).is_some() {}
            let used = bitmap.as_ref().is_some_and(|bitmap| {
                let byte = bitmap.get((cluster / 8) as usize).copied().unwrap_or(0xff);
                byte >> (cluster % 8) & 1 != 0
            });
            let of_layout = taken
                .peek()
                .is_some_and(|range| range.start < first + self.cluster);
            if !used && !of_layout {
                add(cluster..cluster + 1);
            }
        }
        Ok(free)
    }

    fn bitmap(&self, disk: &dyn ReadAt, number: u64, group: &Group) -> Result<Vec<u8>> {
        let at = group.block_bitmap * self.block_size;
        let bitmap = read(disk, at, self.block_size as usize)?;
        if let Some(seed) = self.checksum_seed {
            let covered = (self.blocks_per_group / self.cluster / 8) as usize;
            let crc = crc32c_raw(seed, bitmap.get(..covered).unwrap_or(&bitmap));
            let mask = if self.desc_size >= 64 { !0 } else { 0xffff };
            if crc & mask != group.bitmap_checksum {
                let why = format!("the bitmap of its block group {number} has a wrong checksum");
                return Err(FsError::refused(why));
            }
        }
        Ok(bitmap)
    }

    /// The blocks that the layout itself takes: copies of the superblock and of the descriptors, bitmaps, inode
    /// tables. With flex_bg these lie in other groups than their own.
    pub(super) fn layout_blocks(&self) -> Ranges {
        let mut ranges = Vec::new();
        let desc_blocks = (self.groups.len() as u64).div_ceil(self.descs_per_block());
        let meta_bg = self.incompat & feature::INCOMPAT_META_BG != 0;
        for (number, group) in self.groups.iter().enumerate() {
            let number = number as u64;
            let start = self.group_start(number);
            let has_super = self.has_super(number);
            let shift = if number == 0 { self.super_shift() } else { 0 };
            if has_super {
                let descs = match meta_bg {
                    true => self.first_meta_bg.min(desc_blocks),
                    false => desc_blocks + self.reserved_gdt,
                };
                // Whether these descriptors are here depends on the group's own place; the counts tell.
                let here = match self.in_meta_bg(number / self.descs_per_block()) {
                    true => 0,
                    false => descs,
                };
                ranges.push(start..start + shift + 1 + here);
            }
            let desc_block = number / self.descs_per_block();
            let place = number % self.descs_per_block();
            let holds_descs = place <= 1 || place == self.descs_per_block() - 1;
            if self.in_meta_bg(desc_block) && holds_descs {
                let at = start + shift + u64::from(has_super);
                ranges.push(at..at + 1);
            }
            ranges.push(group.block_bitmap..group.block_bitmap + 1);
            ranges.push(group.inode_bitmap..group.inode_bitmap + 1);
            ranges.push(group.inode_table..group.inode_table + self.table_blocks());
        }
        Ranges::of(ranges)
    }
}
