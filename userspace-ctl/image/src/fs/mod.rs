// SPDX-License-Identifier: GPL-2.0

//! Which bytes of a disk its file systems count as free, so that an image has zeros there: nothing deleted leaks into
//! it, every byte of it is defined, and it gets small.
//!
//! [`survey`] looks at a whole disk or at a single file system and returns what it found, and [`Zeroed`] shows the same
//! disk with zeros in all that is free; nothing is ever written. The readers here are pure code over [`ReadAt`], take
//! any bytes, and are bounded by the size of the disk. They are careful in one direction: what they do not know, what
//! needs a journal replayed, and what contradicts itself counts as used as a whole, and is kept byte for byte.
//! [`Volume::kept`] says why.
//!
//! Byte orders and offsets are those of each format's own documentation, named in its module.

pub mod btrfs;
mod bytes;
pub mod ext4;
pub mod partitions;
mod ranges;
pub mod swap;
pub mod vfat;
pub mod xfs;
mod zeroed;

use std::fmt;
use std::ops::Range;

pub use ranges::Ranges;
pub use zeroed::{Window, Zeroed};

use crate::{Info, ReadAt, BLOCK_SIZE};

/// Why a file system cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// Reading failed.
    #[error("cannot read: {0}")]
    Io(#[from] std::io::Error),
    /// It is unknown, unclean or damaged: what, in words that follow "because".
    #[error("{0}")]
    Refused(String),
}

impl FsError {
    pub(crate) fn refused(why: impl Into<String>) -> Self {
        FsError::Refused(why.into())
    }
}

/// What the readers return.
pub type Result<T> = std::result::Result<T, FsError>;

/// A kind of file system, or of another thing that a disk or a partition may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Kind {
    /// ext2: no journal.
    Ext2,
    /// ext3: a journal, and none of what ext4 added.
    Ext3,
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// FAT12, FAT16 or FAT32.
    Vfat,
    /// Swap space.
    Swap,
    /// A physical volume of LVM.
    Lvm,
    /// LUKS.
    Luks,
    /// A member of an md array.
    Raid,
    /// Several signatures at once, or none that is known.
    Unknown,
}

impl Kind {
    /// Its name as blkid has it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext2 => "ext2",
            Kind::Ext3 => "ext3",
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
            Kind::Vfat => "vfat",
            Kind::Swap => "swap",
            Kind::Lvm => "LVM2_member",
            Kind::Luks => "crypto_LUKS",
            Kind::Raid => "linux_raid_member",
            Kind::Unknown => "unknown",
        }
    }

    /// Whether it is read by [`ext4`].
    pub fn is_ext(self) -> bool {
        matches!(self, Kind::Ext2 | Kind::Ext3 | Kind::Ext4)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a file system's own reader says about it; positions are bytes from its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Contents {
    pub(crate) kind: Kind,
    pub(crate) uuid: Option<String>,
    pub(crate) label: Option<String>,
    /// Bytes that it manages, which may be fewer than its partition has.
    pub(crate) size: u64,
    pub(crate) free: Ranges,
    /// What a journal holds that was played back long ago: never read again, and zero in an image as well.
    pub(crate) dead: Ranges,
}

/// A file system on a disk, or a partition that holds something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The partition's number; `None` if the disk has no partitions.
    pub partition: Option<u32>,
    /// The bytes of the disk that it lies in.
    pub range: Range<u64>,
    /// What it is.
    pub kind: Kind,
    /// Its UUID, as blkid writes it.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// Bytes that it counts as free; they become zeros.
    pub free: u64,
    /// Bytes of its journal that nobody will read again; they become zeros too.
    pub dead: u64,
    /// Why all of it is kept as it is, if it is.
    pub kept: Option<String>,
}

impl Volume {
    /// What it is called in messages.
    pub fn name(&self) -> String {
        match self.partition {
            Some(number) => format!("partition {number} ({})", self.kind),
            None => format!("the disk ({})", self.kind),
        }
    }
}

/// What is on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The partition table, if there is one that can be used: `gpt` or `dos`.
    pub table: Option<&'static str>,
    /// File systems and the like, by where they begin.
    pub volumes: Vec<Volume>,
    /// Why the disk is kept as a whole, if it is.
    pub kept: Option<String>,
    /// The free (and dead) bytes of all volumes.
    pub free: Ranges,
}

impl Survey {
    /// What is kept though it might hold free space, and why: sentences for people.
    pub fn warnings(&self) -> Vec<String> {
        let disk = self.kept.iter().map(|why| format!("the disk: {why}"));
        let volumes = self.volumes.iter().filter_map(|volume| {
            let why = volume.kept.as_ref()?;
            Some(format!("{}: {why}", volume.name()))
        });
        disk.chain(volumes).collect()
    }

    /// Notes what was found: `fs.type`, `fs.uuid`, `fs.label`, `fs.used` and `fs.free` (blocks of 4 KiB); of the
    /// partitions of a disk, the same with `fs.N.` before it, and `fs.type` is that of the table.
    pub fn note(&self, info: &mut Info) {
        if let Some(table) = self.table {
            info.set("fs.type", table);
        }
        for volume in &self.volumes {
            let prefix = match volume.partition {
                Some(number) => format!("fs.{number}."),
                None => "fs.".to_owned(),
            };
            let mut set = |key: &str, value: &str| info.set(&format!("{prefix}{key}"), value);
            if volume.kind == Kind::Unknown {
                continue;
            }
            set("type", volume.kind.name());
            if let Some(uuid) = &volume.uuid {
                set("uuid", uuid);
            }
            if let Some(label) = volume.label.as_ref().filter(|label| !label.is_empty()) {
                set("label", label);
            }
            if volume.kept.is_none() {
                let blocks = |bytes: u64| (bytes / BLOCK_SIZE as u64).to_string();
                let size = volume.range.end - volume.range.start;
                set("used", &blocks(size - volume.free));
                set("free", &blocks(volume.free));
            }
        }
    }
}

/// Looks at a disk: at its partitions, or at the file system that fills it.
///
/// # Errors
/// [`FsError::Io`] alone; what is not understood is in the result, as kept.
pub fn survey(disk: &dyn ReadAt) -> Result<Survey> {
    let whole = 0..disk.len();
    let table = match partitions::read(disk) {
        Ok(table) => table,
        Err(FsError::Refused(why)) => {
            return Ok(Survey {
                kept: Some(why),
                ..Survey::default()
            });
        }
        Err(error) => return Err(error),
    };
    let mut survey = Survey::default();
    let parts = match table {
        None => vec![(None, whole)],
        Some(table) => {
            // A file system over the whole disk and a partition table cannot both be true.
            if let Some(kind) = signatures(disk)?.first() {
                let why = format!(
                    "it has a partition table and the signature of {kind}, and only one can be true \
                     (wipefs shows them)"
                );
                survey.kept = Some(why);
                return Ok(survey);
            }
            survey.table = Some(table.kind);
            let numbered = table.partitions.into_iter();
            numbered.map(|p| (Some(p.number), p.range)).collect()
        }
    };
    let mut free = Vec::new();
    for (partition, range) in parts {
        let window = Window::new(disk, range.clone());
        let (volume, ranges) = look_at(&window, partition, range)?;
        free.extend(ranges);
        survey.volumes.push(volume);
    }
    free.sort_by_key(|range| range.start);
    survey.free = free.into_iter().collect();
    Ok(survey)
}

/// What the bytes of `window` are, and which of them are free (in bytes of the disk).
fn look_at(
    window: &Window<'_>,
    partition: Option<u32>,
    range: Range<u64>,
) -> Result<(Volume, Vec<Range<u64>>)> {
    let mut volume = Volume {
        partition,
        range,
        kind: Kind::Unknown,
        uuid: None,
        label: None,
        free: 0,
        dead: 0,
        kept: None,
    };
    let found = signatures(window)?;
    let kind = match found.as_slice() {
        [] => {
            volume.kept = Some("no file system that is known here; all of it is kept".to_owned());
            return Ok((volume, Vec::new()));
        }
        [kind] => *kind,
        several => {
            let names: Vec<_> = several.iter().map(|kind| kind.name()).collect();
            let names = names.join(" and ");
            volume.kept = Some(format!(
                "it has the signatures of {names}; all of it is kept"
            ));
            return Ok((volume, Vec::new()));
        }
    };
    volume.kind = kind;
    let contents = match kind {
        Kind::Ext2 | Kind::Ext3 | Kind::Ext4 => ext4::contents(window),
        Kind::Xfs => xfs::contents(window),
        Kind::Btrfs => btrfs::contents(window),
        Kind::Vfat => vfat::contents(window),
        Kind::Swap => swap::contents(window),
        _ => Err(FsError::refused("its content is not known")),
    };
    match contents {
        Ok(contents) => {
            volume.kind = contents.kind;
            volume.uuid = contents.uuid;
            volume.label = contents.label;
            volume.free = contents.free.total();
            volume.dead = contents.dead.total();
            let start = volume.range.start;
            let free = contents.free.iter().chain(contents.dead.iter());
            let free = free.map(|r| start + r.start..start + r.end).collect();
            debug_assert!(contents.free.end() <= contents.size.min(window.len()));
            Ok((volume, free))
        }
        Err(FsError::Refused(why)) => {
            volume.kept = Some(format!("{why}; all of it is kept"));
            Ok((volume, Vec::new()))
        }
        Err(error) => Err(error),
    }
}

/// Everything that the bytes claim to be, in no particular order.
fn signatures(disk: &dyn ReadAt) -> Result<Vec<Kind>> {
    let mut found = Vec::new();
    if let Some(kind) = ext4::probe(disk)? {
        found.push(kind);
    }
    if xfs::probe(disk)? {
        found.push(Kind::Xfs);
    }
    if btrfs::probe(disk)? {
        found.push(Kind::Btrfs);
    }
    if vfat::probe(disk)? {
        found.push(Kind::Vfat);
    }
    if swap::probe(disk)? {
        found.push(Kind::Swap);
    }
    let has = |at: u64, magic: &[u8]| bytes::has(disk, at, magic);
    for sector in 0..4 {
        if has(sector * 512, b"LABELONE")? {
            found.push(Kind::Lvm);
            break;
        }
    }
    if has(0, b"LUKS\xba\xbe")? {
        found.push(Kind::Luks);
    }
    // Versions 1.1 and 1.2; those with their superblock at the end are plain file systems from here.
    let md = 0xa92b_4efc_u32.to_le_bytes();
    if has(0, &md)? || has(4096, &md)? {
        found.push(Kind::Raid);
    }
    Ok(found)
}
