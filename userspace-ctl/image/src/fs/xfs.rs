// SPDX-License-Identifier: GPL-2.0

//! XFS, version 5: the free space B+trees and free lists of all allocation groups.
//!
//! The layout is that of the "XFS Algorithms & Data Structures" document and of Linux's `fs/xfs/libxfs/xfs_format.h`
//! and `xfs_log_format.h`; integers are big-endian, checksums little-endian. The log must be clean: its last record
//! must be that of an unmount. Each tree's free blocks must add up to what its group's header says.

use std::ops::Range;

use super::bytes::{crc32c_without, has, read, Fields};
use super::{Contents, FsError, Kind, Ranges, Result};
use crate::ReadAt;

const MAGIC: &[u8; 4] = b"XFSB";
/// Sector size of the log.
const BASIC_BLOCK: usize = 512;
/// finobt, rmapbt, reflink, inobtcount.
const RO_COMPAT_KNOWN: u32 = 0xf;
/// ftype, sparse inodes, meta_uuid, bigtime, nrext64, exchange-range, parent pointers.
const INCOMPAT_KNOWN: u32 = 0xef;
const INCOMPAT_META_UUID: u32 = 0x4;
const INCOMPAT_NEEDS_REPAIR: u32 = 0x10;
const BTREE_HEADER: usize = 56;
const MAX_LEVELS: u32 = 9;

struct Super {
    block: u64,
    sector: u64,
    blocks: u64,
    ag_blocks: u64,
    ag_count: u64,
    ag_block_log: u32,
    log_start: u64,
    log_blocks: u64,
    uuid: String,
    /// What is stamped on metadata.
    meta_uuid: [u8; 16],
    label: String,
}

pub(super) fn probe(disk: &dyn ReadAt) -> Result<bool> {
    has(disk, 0, MAGIC)
}

pub(super) fn contents(disk: &dyn ReadAt) -> Result<Contents> {
    let sb = read_super(disk)?;
    let log = check_log(disk, &sb)?;
    let mut free = Vec::new();
    for ag in 0..sb.ag_count {
        Group::read(disk, &sb, ag)?.free(&mut free)?;
    }
    let total: u64 = free.iter().map(|range| range.end - range.start).sum();
    let free = Ranges::of(free);
    if free.total() != total || free.touches(log) {
        return Err(FsError::refused(
            "its free space overlaps (run xfs_repair on it)",
        ));
    }
    Ok(Contents {
        kind: Kind::Xfs,
        uuid: Some(sb.uuid),
        label: Some(sb.label),
        size: sb.blocks * sb.block,
        free,
        dead: Ranges::new(),
    })
}

fn read_super(disk: &dyn ReadAt) -> Result<Super> {
    let damaged = |why: &str| FsError::refused(format!("its superblock is damaged: {why}"));
    let start = read(disk, 0, 512)?;
    let f = Fields(&start);
    let (block, sector) = (u64::from(f.be32(4)), u64::from(f.be16(102)));
    if f.be16(100) & 0xf != 5 {
        return Err(FsError::refused(
            "it is XFS before version 5, which has no checksums",
        ));
    }
    if !sector.is_power_of_two() || !(512..=32768).contains(&sector) {
        return Err(damaged("an impossible sector size"));
    }
    let bytes = read(disk, 0, sector as usize)?;
    let f = Fields(&bytes);
    if crc32c_without(&bytes, 224) != f.le32(224) {
        return Err(damaged("its checksum is wrong"));
    }
    let (ro_compat, incompat) = (f.be32(212), f.be32(216));
    if incompat & INCOMPAT_NEEDS_REPAIR != 0 || f.u8(126) != 0 {
        return Err(FsError::refused(
            "it is marked as damaged (run xfs_repair on it)",
        ));
    }
    let unknown = (incompat & !INCOMPAT_KNOWN, ro_compat & !RO_COMPAT_KNOWN);
    if unknown != (0, 0) {
        let (incompat, ro) = unknown;
        let why = format!("it has unknown features (incompat {incompat:#x}, ro_compat {ro:#x})");
        return Err(FsError::refused(why));
    }
    let sb = Super {
        block,
        sector,
        blocks: f.be64(8),
        ag_blocks: u64::from(f.be32(84)),
        ag_count: u64::from(f.be32(88)),
        ag_block_log: u32::from(f.u8(124)),
        log_start: f.be64(48),
        log_blocks: u64::from(f.be32(96)),
        uuid: f.uuid(32),
        meta_uuid: match incompat & INCOMPAT_META_UUID {
            0 => f.array(32),
            _ => f.array(248),
        },
        label: f.text(108, 12),
    };
    let size = sb.blocks.checked_mul(block);
    if !block.is_power_of_two() || !(512..=65536).contains(&block) || block < sector {
        return Err(damaged("an impossible block size"));
    }
    if size.is_none_or(|size| size > disk.len()) {
        return Err(FsError::refused("it is larger than what it lies on"));
    }
    if sb.ag_blocks == 0
        || sb.ag_block_log > 31
        || sb.ag_blocks > 1 << sb.ag_block_log
        || sb.ag_count != sb.blocks.div_ceil(sb.ag_blocks)
    {
        return Err(damaged("its allocation groups do not add up"));
    }
    Ok(sb)
}

/// Whether the log's last record is that of an unmount. Records are stamped with a cycle and a block, which
/// only grow; no data block can look like a header, for each begins with its cycle's number.
///
/// Returns where the log lies.
fn check_log(disk: &dyn ReadAt, sb: &Super) -> Result<Range<u64>> {
    if sb.log_start == 0 {
        return Err(FsError::refused(
            "its log lies on another device, and may not be clean",
        ));
    }
    let dirty = || FsError::refused("its log must be replayed first (mount and unmount it)");
    let (ag, in_ag) = (
        sb.log_start >> sb.ag_block_log,
        sb.log_start & ((1 << sb.ag_block_log) - 1),
    );
    let first = ag.checked_mul(sb.ag_blocks).map(|start| start + in_ag);
    let at = first.and_then(|first| first.checked_mul(sb.block));
    let at = at.ok_or_else(|| FsError::refused("its log lies nowhere"))?;
    let len = sb.log_blocks * sb.block;
    if at.checked_add(len).is_none_or(|end| end > disk.len()) {
        return Err(FsError::refused("its log lies beyond its end"));
    }
    // The newest header: its LSN and its place.
    let mut newest: Option<(u64, u64)> = None;
    let mut done = 0;
    while done < len {
        let step = (len - done).min(1 << 20);
        if disk.is_hole(at + done..at + done + step) {
            done += step;
            continue;
        }
        let bytes = read(disk, at + done, step as usize)?;
        for (index, header) in (0..).zip(bytes.chunks_exact(BASIC_BLOCK)) {
            let f = Fields(header);
            if f.be32(0) != 0xfeed_babe {
                continue;
            }
            let lsn = f.be64(16);
            if newest.is_none_or(|(known, _)| lsn > known) {
                newest = Some((lsn, done + index * BASIC_BLOCK as u64));
            }
        }
        done += step;
    }
    let Some((_, place)) = newest else {
        return Err(dirty());
    };
    let header = read(disk, at + place, BASIC_BLOCK)?;
    let f = Fields(&header);
    // Large log buffers have more than one header block.
    let headers = match f.be32(8) & 2 {
        0 => 1,
        _ => u64::from(f.be32(320)).div_ceil(32768).max(1),
    };
    let operation = (place + headers * BASIC_BLOCK as u64) % len.max(1);
    let operation = read(disk, at + operation, BASIC_BLOCK)?;
    let o = Fields(&operation);
    // An operation: transaction (whose place the cycle takes here), length, client, flags; flag 32 is an unmount.
    let unmount = f.be32(40) == 1 && o.u8(9) & 0x20 != 0;
    if unmount {
        Ok(at..at + len)
    } else {
        Err(dirty())
    }
}

/// An allocation group's free space.
struct Group<'a> {
    disk: &'a dyn ReadAt,
    sb: &'a Super,
    number: u64,
    /// Blocks in it.
    len: u64,
    header: Vec<u8>,
}

impl<'a> Group<'a> {
    fn read(disk: &'a dyn ReadAt, sb: &'a Super, number: u64) -> Result<Self> {
        let start = number * sb.ag_blocks * sb.block;
        let header = read(disk, start + sb.sector, sb.sector as usize)?;
        let len = (sb.blocks - number * sb.ag_blocks).min(sb.ag_blocks);
        let f = Fields(&header);
        let good = f.array(0) == *b"XAGF"
            && u64::from(f.be32(8)) == number
            && u64::from(f.be32(12)) == len
            && f.array(64) == sb.meta_uuid
            && crc32c_without(&header, 216) == f.le32(216);
        let group = Group {
            disk,
            sb,
            number,
            len,
            header,
        };
        if good {
            Ok(group)
        } else {
            Err(group.damaged("header"))
        }
    }

    fn damaged(&self, what: &str) -> FsError {
        let number = self.number;
        FsError::refused(format!(
            "the {what} of its allocation group {number} is damaged (run xfs_repair on it)"
        ))
    }

    /// Where a block of the group lies, in bytes.
    fn at(&self, block: u64) -> u64 {
        (self.number * self.sb.ag_blocks + block) * self.sb.block
    }

    /// Adds what is free in the group.
    fn free(&self, free: &mut Vec<Range<u64>>) -> Result<()> {
        let f = Fields(&self.header);
        let first = free.len();
        self.tree(f.be32(16), f.be32(28), free)?;
        let found: u64 = free[first..]
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        if found / self.sb.block != u64::from(f.be32(52)) {
            return Err(self.damaged("free space"));
        }
        self.free_list(free)
    }

    /// A block of the tree of free space, checked.
    fn tree_block(&self, block: u64, level: u32) -> Result<Vec<u8>> {
        if block >= self.len {
            return Err(self.damaged("free space tree"));
        }
        let bytes = read(self.disk, self.at(block), self.sb.block as usize)?;
        let f = Fields(&bytes);
        let good = f.array(0) == *b"AB3B"
            && u32::from(f.be16(4)) == level
            && f.be64(16) == self.at(block) / BASIC_BLOCK as u64
            && f.array(32) == self.sb.meta_uuid
            && u64::from(f.be32(48)) == self.number
            && crc32c_without(&bytes, 52) == f.le32(52);
        if good {
            Ok(bytes)
        } else {
            Err(self.damaged("free space tree"))
        }
    }

    /// Adds the records of the tree: down its left edge, then along the leaves.
    fn tree(&self, root: u32, levels: u32, free: &mut Vec<Range<u64>>) -> Result<()> {
        if !(1..=MAX_LEVELS).contains(&levels) {
            return Err(self.damaged("free space tree"));
        }
        let records = (self.sb.block as usize - BTREE_HEADER) / 8;
        let keys = (self.sb.block as usize - BTREE_HEADER) / 12;
        let mut block = u64::from(root);
        for level in (1..levels).rev() {
            let bytes = self.tree_block(block, level)?;
            block = u64::from(Fields(&bytes).be32(BTREE_HEADER + 8 * keys));
        }
        // The four headers of the group are never free.
        let mut end = (4 * self.sb.sector).div_ceil(self.sb.block);
        // Each leaf is a block of the group: this ends, whatever the links say.
        for _ in 0..self.len {
            let bytes = self.tree_block(block, 0)?;
            let f = Fields(&bytes);
            let count = usize::from(f.be16(6));
            if count > records {
                return Err(self.damaged("free space tree"));
            }
            for record in 0..count {
                let at = BTREE_HEADER + 8 * record;
                let (start, len) = (u64::from(f.be32(at)), u64::from(f.be32(at + 4)));
                if start < end || len == 0 || start + len > self.len {
                    return Err(self.damaged("free space tree"));
                }
                end = start + len;
                free.push(self.at(start)..self.at(start) + len * self.sb.block);
            }
            match f.be32(12) {
                u32::MAX => return Ok(()),
                next => block = u64::from(next),
            }
        }
        Err(self.damaged("free space tree"))
    }

    /// Adds the blocks that are set aside for the trees themselves to grow.
    fn free_list(&self, free: &mut Vec<Range<u64>>) -> Result<()> {
        let f = Fields(&self.header);
        let (first, last, count) = (f.be32(40), f.be32(44), f.be32(48));
        let at = self.at(0) + 3 * self.sb.sector;
        let bytes = read(self.disk, at, self.sb.sector as usize)?;
        let list = Fields(&bytes);
        let places = (self.sb.sector as u32 - 36) / 4;
        let good = list.array(0) == *b"XAFL"
            && u64::from(list.be32(4)) == self.number
            && list.array(8) == self.sb.meta_uuid
            && crc32c_without(&bytes, 32) == list.le32(32)
            && first < places
            && last < places
            && count <= places;
        if !good {
            return Err(self.damaged("free list"));
        }
        for index in 0..count {
            let place = ((first + index) % places) as usize;
            let block = u64::from(list.be32(36 + 4 * place));
            if block >= self.len || block * self.sb.block < 4 * self.sb.sector {
                return Err(self.damaged("free list"));
            }
            free.push(self.at(block)..self.at(block + 1));
        }
        Ok(())
    }
}
