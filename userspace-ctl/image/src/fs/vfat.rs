// SPDX-License-Identifier: GPL-2.0

//! FAT12, FAT16 and FAT32: the clusters that the file allocation table calls free.
//!
//! The layout is that of Microsoft's "FAT: General Overview of On-Disk Format". All copies of the table must be the
//! same, the volume must be marked as clean, and no chain may lead into a free cluster.

use super::bytes::{has, read, Fields};
use super::{Contents, FsError, Kind, Ranges, Result};
use crate::ReadAt;

/// The boot sector's numbers.
struct Geometry {
    sector: u64,
    cluster: u64,
    reserved: u64,
    fats: u64,
    /// Sectors of one table.
    fat_sectors: u64,
    /// The first sector of cluster 2.
    data: u64,
    sectors: u64,
    /// Clusters, numbered from 2.
    clusters: u64,
    /// Bits of an entry: 12, 16 or 32 (of which 28 count).
    bits: u32,
}

impl Geometry {
    fn parse(boot: &[u8]) -> Option<Self> {
        let f = Fields(boot);
        let jump = matches!((f.u8(0), f.u8(2)), (0xeb, 0x90) | (0xe9, _));
        let (sector, cluster) = (u64::from(f.le16(11)), u64::from(f.u8(13)));
        let (reserved, fats) = (u64::from(f.le16(14)), u64::from(f.u8(16)));
        let media = f.u8(21);
        let good = jump
            && sector.is_power_of_two()
            && (512..=4096).contains(&sector)
            && cluster.is_power_of_two()
            && (1..=2).contains(&fats)
            && reserved > 0
            && (media == 0xf0 || media >= 0xf8);
        if !good {
            return None;
        }
        let or = |short: u16, long: u32| match short {
            0 => u64::from(long),
            short => u64::from(short),
        };
        let sectors = or(f.le16(19), f.le32(32));
        let fat_sectors = or(f.le16(22), f.le32(36));
        let root = (u64::from(f.le16(17)) * 32).div_ceil(sector);
        let data = reserved + fats * fat_sectors + root;
        let clusters = sectors.checked_sub(data)? / cluster;
        let bits = match clusters {
            _ if f.le16(22) == 0 => 32,
            0..4085 => 12,
            _ => 16,
        };
        let entries = fat_sectors * sector * 8 / u64::from(bits);
        (clusters > 0 && entries >= clusters + 2).then_some(Geometry {
            sector,
            cluster,
            reserved,
            fats,
            fat_sectors,
            data,
            sectors,
            clusters,
            bits,
        })
    }
}

pub(super) fn probe(disk: &dyn ReadAt) -> Result<bool> {
    if !has(disk, 510, &[0x55, 0xaa])? {
        return Ok(false);
    }
    Ok(Geometry::parse(&read(disk, 0, 512)?).is_some())
}

pub(super) fn contents(disk: &dyn ReadAt) -> Result<Contents> {
    let boot = read(disk, 0, 512)?;
    let Some(geometry) = Geometry::parse(&boot) else {
        return Err(FsError::refused("its boot sector is damaged"));
    };
    if geometry.sectors * geometry.sector > disk.len() {
        return Err(FsError::refused("it is larger than what it lies on"));
    }
    let f = Fields(&boot);
    let extended = if geometry.bits == 32 { 64 } else { 36 };
    // Bit 0 of the byte after the drive number: Linux and Windows set it while the volume is in use.
    if f.u8(extended + 1) & 1 != 0 {
        return Err(FsError::refused(
            "it was not unmounted cleanly (run fsck.fat on it)",
        ));
    }
    let free = free_clusters(disk, &geometry)?;
    let id = f.le32(extended + 3);
    let label = match f.u8(extended + 2) {
        0x29 => f.text(extended + 7, 11),
        _ => String::new(),
    };
    Ok(Contents {
        kind: Kind::Vfat,
        uuid: Some(format!("{:04X}-{:04X}", id >> 16, id & 0xffff)),
        label: Some(label).filter(|label| label != "NO NAME"),
        size: geometry.sectors * geometry.sector,
        free,
        dead: Ranges::new(),
    })
}

fn free_clusters(disk: &dyn ReadAt, geometry: &Geometry) -> Result<Ranges> {
    let len = geometry.fat_sectors * geometry.sector;
    let at = geometry.reserved * geometry.sector;
    let table = read(disk, at, len as usize)?;
    for copy in 1..geometry.fats {
        if read(disk, at + copy * len, len as usize)? != table {
            let why = "its two allocation tables differ (run fsck.fat on it)";
            return Err(FsError::refused(why));
        }
    }
    let entry = |cluster: u64| entry(&table, geometry.bits, cluster);
    // Two bits of entry 1 say that it was unmounted, and that no error was met.
    let (clean, mask) = match geometry.bits {
        16 => (entry(1), 0xc000),
        32 => (entry(1), 0x0c00_0000),
        _ => (0, 0),
    };
    if clean & mask != mask {
        return Err(FsError::refused(
            "it was not unmounted cleanly (run fsck.fat on it)",
        ));
    }
    let mut free = Ranges::new();
    let bytes = geometry.cluster * geometry.sector;
    for cluster in 2..geometry.clusters + 2 {
        let next = u64::from(entry(cluster));
        if next == 0 {
            let start = geometry.data * geometry.sector + (cluster - 2) * bytes;
            free.push(start..start + bytes);
        } else if (2..geometry.clusters + 2).contains(&next) && entry(next) == 0 {
            let why =
                format!("cluster {cluster} leads to cluster {next}, which is free (run fsck.fat)");
            return Err(FsError::refused(why));
        }
    }
    Ok(free)
}

fn entry(table: &[u8], bits: u32, cluster: u64) -> u32 {
    let f = Fields(table);
    let cluster = cluster as usize;
    match bits {
        12 => {
            let pair = u32::from(f.le16(cluster + cluster / 2));
            if cluster % 2 == 0 {
                pair & 0xfff
            } else {
                pair >> 4
            }
        }
        16 => u32::from(f.le16(cluster * 2)),
        _ => f.le32(cluster * 4) & 0x0fff_ffff,
    }
}
