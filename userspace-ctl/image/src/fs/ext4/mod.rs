// SPDX-License-Identifier: GPL-2.0

//! ext2, ext3 and ext4: the superblock and the group descriptors (this module), free blocks ([`contents`]), and
//! which blocks belong to which file ([`files`]).
//!
//! The layout is the one of Linux's `Documentation/filesystems/ext4/`. The crate `ext4-view` reads files as well, but
//! tells nobody where their blocks lie, and that is what is wanted here.

pub mod files;
mod free;
mod inode;

pub use files::{File, FileKind, Files};
pub(crate) use free::contents;

use files::JOURNAL;

use super::bytes::{crc16, crc32c_raw, has, read, Fields};
use super::{FsError, Kind, Result};
use crate::ReadAt;

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_LEN: usize = 1024;
const MAGIC: u16 = 0xef53;

/// Features, by the words that hold them.
mod feature {
    pub const COMPAT_HAS_JOURNAL: u32 = 0x4;
    pub const COMPAT_SPARSE_SUPER2: u32 = 0x200;

    pub const INCOMPAT_RECOVER: u32 = 0x4;
    pub const INCOMPAT_META_BG: u32 = 0x10;
    pub const INCOMPAT_64BIT: u32 = 0x80;
    pub const INCOMPAT_CSUM_SEED: u32 = 0x2000;
    /// filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data,
    /// encrypt, casefold.
    pub const INCOMPAT_KNOWN: u32 = 0x3_e7d6;
    /// What ext2 and ext3 have: filetype, recover, meta_bg.
    pub const INCOMPAT_OLD: u32 = 0x16;

    pub const RO_SPARSE_SUPER: u32 = 0x1;
    pub const RO_GDT_CSUM: u32 = 0x10;
    pub const RO_BIGALLOC: u32 = 0x200;
    pub const RO_METADATA_CSUM: u32 = 0x400;
    /// sparse_super, large_file, btree_dir, huge_file, gdt_csum, dir_nlink, extra_isize, quota, bigalloc,
    /// metadata_csum, readonly, project, verity, orphan_present.
    pub const RO_KNOWN: u32 = 0x1_b77f;
    /// What ext2 and ext3 have.
    pub const RO_OLD: u32 = 0x7;
}

/// Whether there is the magic number of ext2, ext3 and ext4, and which it is by its features.
pub(super) fn probe(disk: &dyn ReadAt) -> Result<Option<Kind>> {
    if !has(disk, SUPERBLOCK_AT + 56, &MAGIC.to_le_bytes())? {
        return Ok(None);
    }
    // Two bytes are soon there by chance: the block size and the counts must be possible too.
    let Ok(bytes) = read(disk, SUPERBLOCK_AT, SUPERBLOCK_LEN) else {
        return Ok(None);
    };
    let f = Fields(&bytes);
    let possible = f.le32(24) <= 6 && f.le32(32) != 0 && f.le32(40) != 0 && f.le32(4) != 0;
    Ok(possible.then(|| kind_of(f.le32(92), f.le32(96), f.le32(100))))
}

fn kind_of(compat: u32, incompat: u32, ro_compat: u32) -> Kind {
    if incompat & !feature::INCOMPAT_OLD != 0 || ro_compat & !feature::RO_OLD != 0 {
        Kind::Ext4
    } else if compat & feature::COMPAT_HAS_JOURNAL != 0 {
        Kind::Ext3
    } else {
        Kind::Ext2
    }
}

/// A block group.
#[derive(Clone, Copy, Debug)]
struct Group {
    block_bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free_clusters: u32,
    /// Inodes at the table's end that were never used.
    unused_inodes: u32,
    inodes_uninit: bool,
    blocks_uninit: bool,
    /// Checksum of the block bitmap; 16 bits in small descriptors.
    bitmap_checksum: u32,
}

/// A superblock that makes sense, and the group descriptors.
#[derive(Debug)]
pub struct Layout {
    kind: Kind,
    uuid: String,
    label: String,
    block_size: u64,
    blocks: u64,
    first_data_block: u64,
    blocks_per_group: u64,
    /// Blocks in a cluster, the unit of the bitmaps: 1 but for bigalloc.
    cluster: u64,
    inodes_per_group: u64,
    inode_size: u64,
    desc_size: usize,
    compat: u32,
    incompat: u32,
    ro_compat: u32,
    state: u16,
    reserved_gdt: u64,
    first_meta_bg: u64,
    backup_groups: [u32; 2],
    /// With metadata_csum.
    checksum_seed: Option<u32>,
    groups: Vec<Group>,
}

impl Layout {
    /// Reads superblock and group descriptors, and checks their checksums.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn read(disk: &dyn ReadAt) -> Result<Self> {
        let bytes = read(disk, SUPERBLOCK_AT, SUPERBLOCK_LEN)?;
        let mut layout = Layout::parse(&bytes, disk.len())?;
        let f = Fields(&bytes);
        layout.groups = layout.read_groups(disk, f.array(104))?;
        Ok(layout)
    }

    fn parse(bytes: &[u8], len: u64) -> Result<Self> {
        let f = Fields(bytes);
        let refuse = |why: &str| {
            Err(FsError::refused(format!(
                "its superblock is damaged: {why}"
            )))
        };
        let (compat, incompat, ro_compat) = (f.le32(92), f.le32(96), f.le32(100));
        if f.le16(56) != MAGIC || f.le32(24) > 6 {
            return refuse("no magic number, or an impossible block size");
        }
        let unknown = (
            incompat & !feature::INCOMPAT_KNOWN,
            ro_compat & !feature::RO_KNOWN,
        );
        if unknown != (0, 0) {
            let (incompat, ro) = unknown;
            let why =
                format!("it has unknown features (incompat {incompat:#x}, ro_compat {ro:#x})");
            return Err(FsError::refused(why));
        }
        let metadata_csum = ro_compat & feature::RO_METADATA_CSUM != 0;
        if metadata_csum && crc32c_raw(!0, &bytes[..0x3fc]) != f.le32(0x3fc) {
            return refuse("its checksum is wrong");
        }
        let wide = incompat & feature::INCOMPAT_64BIT != 0;
        let high = if wide { u64::from(f.le32(0x150)) } else { 0 };
        let block_size = 1024u64 << f.le32(24);
        let cluster = match ro_compat & feature::RO_BIGALLOC {
            0 => 1,
            _ if (f.le32(24)..=20).contains(&f.le32(28)) => 1 << (f.le32(28) - f.le32(24)),
            _ => return refuse("an impossible cluster size"),
        };
        let seed = match incompat & feature::INCOMPAT_CSUM_SEED {
            0 => crc32c_raw(!0, &f.array::<16>(104)),
            _ => f.le32(0x270),
        };
        let old_revision = f.le32(76) == 0;
        let layout = Layout {
            kind: kind_of(compat, incompat, ro_compat),
            uuid: f.uuid(104),
            label: f.text(120, 16),
            block_size,
            blocks: u64::from(f.le32(4)) | high << 32,
            first_data_block: u64::from(f.le32(20)),
            blocks_per_group: u64::from(f.le32(32)),
            cluster,
            inodes_per_group: u64::from(f.le32(40)),
            inode_size: if old_revision {
                128
            } else {
                u64::from(f.le16(88))
            },
            desc_size: if wide { usize::from(f.le16(0xfe)) } else { 32 },
            compat,
            incompat,
            ro_compat,
            state: f.le16(58),
            reserved_gdt: u64::from(f.le16(0xce)),
            first_meta_bg: u64::from(f.le32(0x104)),
            backup_groups: [f.le32(0x24c), f.le32(0x250)],
            checksum_seed: metadata_csum.then_some(seed),
            groups: Vec::new(),
        };
        layout.check(u64::from(f.le32(0)), len)?;
        Ok(layout)
    }

    /// Whether the numbers can be, so that no sum of them overflows and no list gets longer than the disk.
    fn check(&self, inodes: u64, len: u64) -> Result<()> {
        let bits = self.block_size * 8;
        let size = self.blocks.checked_mul(self.block_size);
        let wrong = if size.is_none_or(|size| size > len) {
            "it is larger than what it lies on"
        } else if self.blocks <= self.first_data_block || self.first_data_block > 1 {
            "an impossible number of blocks"
        } else if self.blocks_per_group == 0
            || self.blocks_per_group % self.cluster != 0
            || self.blocks_per_group / self.cluster > bits
        {
            "an impossible size of block groups"
        } else if self.inodes_per_group == 0 || self.inodes_per_group > bits {
            "an impossible number of inodes"
        } else if !self.inode_size.is_power_of_two()
            || !(128..=self.block_size).contains(&self.inode_size)
        {
            "an impossible inode size"
        } else if !self.desc_size.is_power_of_two() || !(32..=1024).contains(&self.desc_size) {
            "an impossible descriptor size"
        } else if self.group_count() * self.inodes_per_group != inodes {
            "its inodes do not fit its groups"
        } else {
            return Ok(());
        };
        Err(FsError::refused(format!(
            "its superblock is damaged: {wrong}"
        )))
    }

    fn group_count(&self) -> u64 {
        (self.blocks - self.first_data_block).div_ceil(self.blocks_per_group)
    }

    fn has_checksums(&self) -> bool {
        self.checksum_seed.is_some() || self.ro_compat & feature::RO_GDT_CSUM != 0
    }

    /// The first block of a group.
    fn group_start(&self, group: u64) -> u64 {
        self.first_data_block + group * self.blocks_per_group
    }

    /// Blocks of a group's inode table.
    fn table_blocks(&self) -> u64 {
        (self.inodes_per_group * self.inode_size).div_ceil(self.block_size)
    }

    fn descs_per_block(&self) -> u64 {
        self.block_size / self.desc_size as u64
    }

    /// The block that the first group's superblock lies in, if that is not the group's first: blocks of 1 KiB begin
    /// with group 0 at block 1, but for bigalloc.
    fn super_shift(&self) -> u64 {
        u64::from(self.block_size == 1024 && self.first_data_block == 0)
    }

    /// Whether the descriptors of a block of them lie in their own meta block group.
    fn in_meta_bg(&self, desc_block: u64) -> bool {
        self.incompat & feature::INCOMPAT_META_BG != 0 && desc_block >= self.first_meta_bg
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_super(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & feature::COMPAT_SPARSE_SUPER2 != 0 {
            return self.backup_groups.iter().any(|&g| u64::from(g) == group);
        }
        if group == 1 || self.ro_compat & feature::RO_SPARSE_SUPER == 0 {
            return true;
        }
        [3, 5, 7].iter().any(|base| {
            let mut power = *base;
            while power < group {
                power *= base;
            }
            power == group
        })
    }

    fn read_groups(&self, disk: &dyn ReadAt, uuid: [u8; 16]) -> Result<Vec<Group>> {
        let count = self.group_count();
        let per_block = self.descs_per_block();
        let mut groups = Vec::new();
        for desc_block in 0..count.div_ceil(per_block) {
            let block = if self.in_meta_bg(desc_block) {
                let group = desc_block * per_block;
                let shift = if group == 0 { self.super_shift() } else { 0 };
                self.group_start(group) + u64::from(self.has_super(group)) + shift
            } else {
                self.first_data_block + 1 + self.super_shift() + desc_block
            };
            let at = block.checked_mul(self.block_size);
            let at = at.ok_or_else(|| FsError::refused("its group descriptors lie nowhere"))?;
            let bytes = read(disk, at, self.block_size as usize)?;
            let descs = bytes.chunks_exact(self.desc_size);
            for desc in descs.take((count - groups.len() as u64) as usize) {
                let number = groups.len() as u64;
                self.check_desc(desc, number, &uuid)?;
                groups.push(self.group(desc, number)?);
            }
        }
        Ok(groups)
    }

    fn check_desc(&self, desc: &[u8], number: u64, uuid: &[u8; 16]) -> Result<()> {
        let stored = Fields(desc).le16(30);
        let group = (number as u32).to_le_bytes();
        let rest = desc.get(32..).unwrap_or_default();
        let found = if let Some(seed) = self.checksum_seed {
            let crc = crc32c_raw(crc32c_raw(seed, &group), &desc[..30]);
            (crc32c_raw(crc32c_raw(crc, &[0; 2]), rest) & 0xffff) as u16
        } else if self.has_checksums() {
            let crc = crc16(crc16(crc16(!0, uuid), &group), &desc[..30]);
            crc16(crc, rest)
        } else {
            stored
        };
        if found != stored {
            let why = format!("the descriptor of its block group {number} has a wrong checksum");
            return Err(FsError::refused(why));
        }
        Ok(())
    }

    fn group(&self, desc: &[u8], number: u64) -> Result<Group> {
        let f = Fields(desc);
        let flags = if self.has_checksums() { f.le16(18) } else { 0 };
        // Small descriptors have no upper halves: these read as zero.
        let wide = |low: usize, high: usize| u64::from(f.le32(low)) | u64::from(f.le32(high)) << 32;
        let group = Group {
            block_bitmap: wide(0, 32),
            inode_bitmap: wide(4, 36),
            inode_table: wide(8, 40),
            free_clusters: u32::from(f.le16(12)) | u32::from(f.le16(44)) << 16,
            unused_inodes: u32::from(f.le16(28)) | u32::from(f.le16(50)) << 16,
            inodes_uninit: flags & 1 != 0,
            blocks_uninit: flags & 2 != 0,
            bitmap_checksum: u32::from(f.le16(24)) | u32::from(f.le16(56)) << 16,
        };
        let table_end = group.inode_table.checked_add(self.table_blocks());
        let inside = [group.block_bitmap, group.inode_bitmap, group.inode_table]
            .iter()
            .all(|&block| block >= self.first_data_block && block < self.blocks)
            && table_end.is_some_and(|end| end <= self.blocks);
        if !inside {
            let why = format!("the descriptor of its block group {number} points outside");
            return Err(FsError::refused(why));
        }
        Ok(group)
    }
}
