// SPDX-License-Identifier: GPL-2.0

//! Btrfs on one device: what no extent uses, and what no chunk was made of.
//!
//! The layout is that of the "On-disk Format" page of Btrfs's documentation and of Linux's
//! `include/uapi/linux/btrfs_tree.h`. Extents are read from the extent tree; those of each block group must add up to
//! what the group says it uses. Chunks of any profile but single and dup count as used.

mod trees;

use super::bytes::{has, read, Fields};
use super::{Contents, FsError, Kind, Ranges, Result};
use crate::ReadAt;
use trees::Reader;

const SUPERBLOCK_AT: u64 = 64 << 10;
const SUPERBLOCK_LEN: usize = 4096;
const MAGIC: &[u8; 8] = b"_BHRfS_M";
/// The superblock's copies; the first of them also guards what lies before it.
const COPIES: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
/// Nothing is allocated before this.
const RESERVED: u64 = 1 << 20;
/// mixed_backref, default_subvol, mixed_groups, lzo, zstd, big_metadata, extended_iref, skinny_metadata, no_holes,
/// metadata_uuid, simple_quota.
const INCOMPAT_KNOWN: u64 = 0x1_077f;
const INCOMPAT_METADATA_UUID: u64 = 0x400;
/// free_space_tree, free_space_tree_valid, verity, block_group_tree.
const RO_KNOWN: u64 = 0xf;
const RO_BLOCK_GROUP_TREE: u64 = 0x8;
/// Written, and the mark that relocation once ran.
const FLAGS_KNOWN: u64 = 0x3;

struct Super {
    root: u64,
    root_level: u8,
    chunk_root: u64,
    chunk_root_level: u8,
    generation: u64,
    chunk_generation: u64,
    size: u64,
    used: u64,
    node: u32,
    device: u64,
    groups_apart: bool,
    /// What is stamped on metadata.
    meta_uuid: [u8; 16],
    uuid: String,
    label: String,
    system_chunks: Vec<u8>,
}

pub(super) fn probe(disk: &dyn ReadAt) -> Result<bool> {
    has(disk, SUPERBLOCK_AT + 64, MAGIC)
}

pub(super) fn contents(disk: &dyn ReadAt) -> Result<Contents> {
    let sb = read_super(disk)?;
    let mut reader = Reader::new(disk, &sb)?;
    let chunks = reader.chunks(&sb)?;
    let extents = reader.extents(&sb)?;
    let groups = reader.block_groups(&sb)?;
    let damaged = |what: &str| FsError::refused(format!("{what} (run btrfs check on it)"));
    if extents.total() != sb.used {
        let why = "its extents do not add up to what the superblock says";
        return Err(damaged(why));
    }
    let copies = COPIES.map(|at| at..at + SUPERBLOCK_LEN as u64);
    let mut used: Vec<_> = std::iter::once(0..RESERVED).chain(copies).collect();
    let mut covered = 0;
    for chunk in &chunks {
        let range = chunk.logical..chunk.logical + chunk.len;
        let in_chunk: Vec<_> = extents.in_range(range.clone()).collect();
        let bytes: u64 = in_chunk
            .iter()
            .map(|extent| extent.end - extent.start)
            .sum();
        covered += bytes;
        let known = groups.get(&chunk.logical) == Some(&(chunk.len, bytes));
        if !known {
            let at = chunk.logical;
            let why = format!("the extents of its block group at {at} do not add up");
            return Err(damaged(&why));
        }
        for stripe in chunk.stripes_on(sb.device) {
            if chunk.is_plain() {
                let shift = |at: u64| at - chunk.logical + stripe;
                used.extend(in_chunk.iter().map(|e| shift(e.start)..shift(e.end)));
            } else {
                // Whatever the profile, a stripe takes no more than the chunk.
                used.push(stripe..stripe + chunk.len);
            }
        }
    }
    if covered != extents.total() {
        return Err(damaged("some of its extents lie in no chunk"));
    }
    // The last copy of the superblock may be beyond the end; nothing else may.
    let beyond = used
        .iter()
        .any(|range| range.end > sb.size && !COPIES.contains(&range.start));
    if beyond {
        return Err(damaged("its chunks reach beyond its end"));
    }
    Ok(Contents {
        kind: Kind::Btrfs,
        free: Ranges::of(used).complement(0..sb.size),
        uuid: Some(sb.uuid),
        label: Some(sb.label),
        size: sb.size,
        dead: Ranges::new(),
    })
}

fn read_super(disk: &dyn ReadAt) -> Result<Super> {
    let bytes = read(disk, SUPERBLOCK_AT, SUPERBLOCK_LEN)?;
    let f = Fields(&bytes);
    let refuse = |why: &str| Err(FsError::refused(why));
    if f.le16(196) != 0 {
        return refuse("its checksums are not CRC-32C");
    }
    if crc32c::crc32c(&bytes[32..]) != f.le32(0) || f.le64(48) != SUPERBLOCK_AT {
        return refuse("its superblock is damaged: the checksum is wrong");
    }
    let (ro_compat, incompat, flags) = (f.le64(180), f.le64(188), f.le64(56));
    let unknown = (
        incompat & !INCOMPAT_KNOWN,
        ro_compat & !RO_KNOWN,
        flags & !FLAGS_KNOWN,
    );
    if unknown != (0, 0, 0) {
        let (incompat, ro, flags) = unknown;
        let why = format!(
            "it has unknown features (incompat {incompat:#x}, ro_compat {ro:#x}, flags {flags:#x})"
        );
        return Err(FsError::refused(why));
    }
    if f.le64(96) != 0 {
        return refuse("its log must be replayed first (mount and unmount it)");
    }
    if f.le64(136) != 1 {
        return refuse("it spans several devices");
    }
    let node = f.le32(148);
    if !node.is_power_of_two() || !(4096..=65536).contains(&node) {
        return refuse("its superblock is damaged: an impossible node size");
    }
    let size = f.le64(209);
    if size > disk.len() || size < RESERVED || f.le64(112) != size {
        return refuse("its size is not that of what it lies on");
    }
    let system_len = f.le32(160) as usize;
    let Some(system_chunks) = bytes.get(811..811 + system_len.min(2048)) else {
        return refuse("its superblock is damaged: no system chunks");
    };
    Ok(Super {
        root: f.le64(80),
        root_level: f.u8(198),
        chunk_root: f.le64(88),
        chunk_root_level: f.u8(199),
        generation: f.le64(72),
        chunk_generation: f.le64(164),
        size,
        used: f.le64(120),
        node,
        device: f.le64(201),
        groups_apart: ro_compat & RO_BLOCK_GROUP_TREE != 0,
        meta_uuid: match incompat & INCOMPAT_METADATA_UUID {
            0 => f.array(32),
            _ => f.array(571),
        },
        uuid: f.uuid(32),
        label: f.text(299, 256),
        system_chunks: system_chunks.to_vec(),
    })
}

/// Whether a node's checksum is right.
fn has_node_checksum(node: &[u8]) -> bool {
    node.len() > 32 && crc32c::crc32c(&node[32..]) == Fields(node).le32(0)
}
