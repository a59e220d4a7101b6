// SPDX-License-Identifier: GPL-2.0

//! Partition tables: GPT (UEFI specification, chapter 5) and the MBR's with its chain of logical partitions.
//!
//! A table is believed only if all of it makes sense: right checksums, partitions that lie on the disk and do not
//! overlap. What lies between partitions is nobody's, and is kept.

use std::ops::Range;

use super::bytes::{crc32, has, Fields};
use super::{vfat, FsError, Result};
use crate::ReadAt;

/// The most logical partitions that are followed, and the most entries of a GPT.
const MAX_PARTITIONS: u32 = 1024;
const SECTOR: u64 = 512;

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, as Linux counts.
    pub number: u32,
    /// Its bytes.
    pub range: Range<u64>,
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// `gpt` or `dos`.
    pub kind: &'static str,
    /// Its partitions.
    pub partitions: Vec<Partition>,
}

/// The table of a disk; `None` if it has none.
///
/// # Errors
/// [`FsError::Refused`] if it has one that cannot be believed.
pub fn read(disk: &dyn ReadAt) -> Result<Option<Table>> {
    let entries = mbr_entries(disk, 0)?;
    for sector in [SECTOR, 4096] {
        if has(disk, sector, b"EFI PART")? {
            let protective = entries.iter().any(|entry| entry.kind == 0xee);
            let others = entries.iter().any(|entry| entry.kind != 0xee);
            if !protective || others {
                let why =
                    "it has a GPT, and an MBR that says something else (sgdisk or gdisk mend it)";
                return Err(FsError::refused(why));
            }
            return checked(gpt(disk, sector)?, disk.len()).map(Some);
        }
    }
    if entries.iter().any(|entry| entry.kind == 0xee) {
        let why = "its GPT is damaged or cut off (sgdisk or gdisk restore it from its copy)";
        return Err(FsError::refused(why));
    }
    // A FAT has the same signature, and may have anything where an MBR has its table.
    let possible = entries
        .iter()
        .all(|e| e.active & 0x7f == 0 && e.sectors > 0 && e.first > 0);
    if entries.is_empty() || (vfat::probe(disk)? && !possible) {
        return Ok(None);
    }
    if !possible {
        return Err(FsError::refused("its partition table makes no sense"));
    }
    checked(mbr(disk, &entries)?, disk.len()).map(Some)
}

fn checked(mut table: Table, len: u64) -> Result<Table> {
    let mut ranges: Vec<_> = table.partitions.iter().map(|p| p.range.clone()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let overlap = ranges.windows(2).any(|pair| pair[0].end > pair[1].start);
    if overlap || ranges.last().is_some_and(|range| range.end > len) {
        let why = "its partitions overlap each other or reach beyond its end";
        return Err(FsError::refused(why));
    }
    table
        .partitions
        .sort_by_key(|partition| partition.range.start);
    Ok(table)
}

/// An entry of an MBR that is in use.
struct Entry {
    /// Its place in the table, from 0.
    place: u32,
    active: u8,
    kind: u8,
    first: u64,
    sectors: u64,
}

impl Entry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn range(&self, base: u64) -> Range<u64> {
        let start = (base + self.first) * SECTOR;
        start..start + self.sectors * SECTOR
    }
}

/// The entries of the (extended) boot record in a sector; none if it is none.
fn mbr_entries(disk: &dyn ReadAt, sector: u64) -> Result<Vec<Entry>> {
    let at = sector * SECTOR;
    if !has(disk, at + 510, &[0x55, 0xaa])? {
        return Ok(Vec::new());
    }
    let bytes = super::bytes::read(disk, at, SECTOR as usize)?;
    let entries = (0..4).map(|place| {
        let f = Fields(&bytes).from(446 + 16 * place);
        Entry {
            place: place as u32,
            active: f.u8(0),
            kind: f.u8(4),
            first: u64::from(f.le32(8)),
            sectors: u64::from(f.le32(12)),
        }
    });
    Ok(entries.filter(|entry| entry.kind != 0).collect())
}

fn mbr(disk: &dyn ReadAt, entries: &[Entry]) -> Result<Table> {
    let mut partitions = Vec::new();
    let mut logical = 5;
    for entry in entries {
        if !entry.is_extended() {
            partitions.push(Partition {
                number: entry.place + 1,
                range: entry.range(0),
            });
            continue;
        }
        // A chain of records, each with a partition and the way to the next record.
        let base = entry.first;
        let mut record = base;
        loop {
            let links = mbr_entries(disk, record)?;
            for link in links.iter().filter(|link| !link.is_extended()) {
                if link.first == 0 {
                    return Err(FsError::refused(
                        "a logical partition lies over its own table",
                    ));
                }
                partitions.push(Partition {
                    number: logical,
                    range: link.range(record),
                });
                logical += 1;
            }
            let next = links.iter().find(|link| link.is_extended());
            let Some(next) = next.map(|link| base + link.first) else {
                break;
            };
            if next <= record || logical > MAX_PARTITIONS {
                return Err(FsError::refused(
                    "its logical partitions go round in a circle",
                ));
            }
            record = next;
        }
    }
    Ok(Table {
        kind: "dos",
        partitions,
    })
}

fn gpt(disk: &dyn ReadAt, sector: u64) -> Result<Table> {
    let damaged = |why: &str| FsError::refused(format!("its GPT is damaged: {why}"));
    let mut header = super::bytes::read(disk, sector, SECTOR as usize)?;
    let f = Fields(&header);
    let (len, stored) = (f.le32(12) as usize, f.le32(16));
    let (entries_at, count, size) = (f.le64(72), f.le32(80), f.le32(84) as usize);
    let (entries_crc, own) = (f.le32(88), f.le64(24));
    let usable = f.le64(40)..f.le64(48).saturating_add(1);
    if !(92..=512).contains(&len) || own != 1 {
        return Err(damaged("an impossible header"));
    }
    header[16..20].fill(0);
    if crc32(&header[..len]) != stored {
        return Err(damaged("the header's checksum is wrong"));
    }
    if count > MAX_PARTITIONS || !(128..=4096).contains(&size) {
        return Err(damaged("an impossible number of entries"));
    }
    let at = entries_at.checked_mul(sector);
    let at = at.ok_or_else(|| damaged("its entries lie nowhere"))?;
    let entries = super::bytes::read(disk, at, count as usize * size)?;
    let table_end = at + entries.len() as u64;
    if usable
        .start
        .checked_mul(sector)
        .is_none_or(|start| start < table_end.max(2 * sector))
    {
        return Err(damaged("partitions may lie over the table"));
    }
    if crc32(&entries) != entries_crc {
        return Err(damaged("the checksum of its entries is wrong"));
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(size)) {
        let f = Fields(entry);
        if f.array::<16>(0) == [0; 16] {
            continue;
        }
        // The table itself lies outside of what is usable.
        let (start, end) = (f.le64(32), f.le64(40).saturating_add(1));
        let inside = start >= usable.start && end <= usable.end && start < end;
        let bytes = start.checked_mul(sector).zip(end.checked_mul(sector));
        let range = bytes.map(|(start, end)| start..end).filter(|_| inside);
        partitions.push(Partition {
            number,
            range: range.ok_or_else(|| damaged("a partition that is nowhere"))?,
        });
    }
    Ok(Table {
        kind: "gpt",
        partitions,
    })
}
