// SPDX-License-Identifier: GPL-2.0

//! Recovery once more, written from the description of the format in `rust/shared` and from nothing else of it:
//! offsets are spelled out, planes are bytes, and what is wrong is not told apart.

use pristine_shared::superblock::Superblock;
use pristine_shared::{Page, PAGE_SIZE};

use crate::disk::{Disk, SECTOR};

/// Something on the device is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong;

/// What the log adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// What the records say: kind (1 announced, 2 dirty, 3 settled), first unit, one past the last.
    pub entries: Vec<(u64, u64, u64)>,
    /// Records in it.
    pub records: u64,
    /// Whether the last one was torn.
    pub torn: bool,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// A sector of a record page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sector {
    Blank,
    Damaged,
    /// Its sequence number, and whether it ends the record: it has no entries.
    Good(u64, bool),
}

fn sectors(page: &Page, uuid: &[u8]) -> Vec<Sector> {
    let kind = |(i, sector): (usize, &[u8])| {
        if *sector == [0; SECTOR] {
            return Sector::Blank;
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(uuid), &sector[4..]);
        let good = u32_at(sector, 0) == crc
            && &sector[4..6] == b"PL"
            && sector[6] <= 62
            && usize::from(sector[7]) == i;
        match good {
            true => Sector::Good(u64_at(sector, 8), sector[6] == 0),
            false => Sector::Damaged,
        }
    };
    page.chunks(SECTOR).enumerate().map(kind).collect()
}

/// The sequence numbers of the sectors of a record page up to the one that ends it, 0 for a blank one; `None` if one of
/// these is damaged.
fn sequences(sectors: &[Sector]) -> Option<Vec<u64>> {
    let mut all = Vec::new();
    for sector in sectors {
        match sector {
            Sector::Blank => all.push(0),
            Sector::Damaged => return None,
            Sector::Good(seq, ends) => {
                all.push(*seq);
                if *ends {
                    break;
                }
            }
        }
    }
    Some(all)
}

/// The newest sequence number that a page shows.
fn newest(sectors: &[Sector]) -> u64 {
    let good = sectors.iter().filter_map(|sector| match sector {
        Sector::Good(seq, _) => Some(*seq),
        _ => None,
    });
    let shown = sequences(sectors).map(|all| all.into_iter().max());
    shown.unwrap_or_else(|| good.max()).unwrap_or(0)
}

/// Whether a damaged page shows that record `seq` was never written there in full: a sector up to the record's end is
/// older, or blank where the record, whatever the damaged sectors were, had one.
fn is_unfinished(sectors: &[Sector], seq: u64) -> bool {
    let end = sectors.iter().position(|s| *s == Sector::Good(seq, true));
    let damaged = sectors.iter().position(|s| *s == Sector::Damaged);
    sectors
        .iter()
        .take(end.unwrap_or(sectors.len()))
        .enumerate()
        .any(|(i, sector)| match sector {
            Sector::Good(older, _) => *older < seq,
            Sector::Blank => i == 1 || damaged.is_none_or(|damaged| i < damaged),
            Sector::Damaged => false,
        })
}

/// The log from the root's first record on.
///
/// # Errors
///
/// A record that is damaged, nonsense, or missing before a later one.
pub fn log(disk: &Disk, sb: &Superblock) -> Result<Log, Wrong> {
    let ring: Vec<_> = (0..sb.layout.log_pages)
        .map(|n| disk.page(sb.layout.log_start + n))
        .collect::<Option<_>>()
        .ok_or(Wrong)?;
    let ring_sectors: Vec<_> = ring
        .iter()
        .map(|page| sectors(page, &sb.meta_uuid))
        .collect();
    let mut log = Log {
        entries: Vec::new(),
        records: 0,
        torn: false,
    };
    let pages = ring.len() as u64;
    let mut seq = sb.root.log_seq;
    for _ in 0..pages {
        let at = (seq % pages) as usize;
        let Some(found) = sequences(&ring_sectors[at]) else {
            // It may have been the record, unless the page, or the stop in order, says that it was not.
            let newest = newest(&ring_sectors[at]);
            let stopped = sb.clean && seq == sb.root.log_seq && newest < seq;
            if !stopped && !is_unfinished(&ring_sectors[at], seq) {
                return Err(Wrong);
            }
            log.torn = newest == seq;
            break;
        };
        if found.iter().any(|s| *s != seq) {
            log.torn = found.contains(&seq);
            break;
        }
        for sector in ring[at].chunks(SECTOR).take(found.len()) {
            for i in 0..usize::from(sector[6]) {
                let word = u64_at(sector, 16 + i * 8);
                let start = word & 0xfff_ffff_ffff;
                let len = ((word >> 44) & 0xffff) + 1;
                let limit = match word >> 60 {
                    1 | 3 => sb.geometry.extents(),
                    2 | 4 => sb.geometry.blocks(),
                    _ => return Err(Wrong),
                };
                if start + len > limit {
                    return Err(Wrong);
                }
                log.entries.push((word >> 60, start, start + len));
            }
        }
        log.records += 1;
        seq += 1;
    }
    if ring_sectors.iter().any(|page| newest(page) > seq) {
        return Err(Wrong);
    }
    Ok(log)
}

/// One bit for each block, eight to a byte: dirty, and stale.
pub type Planes = [Vec<u8>; 2];

/// The planes of `blocks` blocks, of which none is in any.
pub fn no_planes(blocks: u64) -> Planes {
    let bytes = blocks.div_ceil(8) as usize;
    [vec![0; bytes], vec![0; bytes]]
}

fn fill(plane: &mut [u8], first: u64, end: u64) {
    for block in first..end {
        match (
            block % 8,
            plane.get_mut((block / 8) as usize..(end / 8) as usize),
        ) {
            // Whole bytes at once.
            (0, Some(bytes)) if !bytes.is_empty() => {
                bytes.fill(0xff);
                return fill(plane, end - end % 8, end);
            }
            _ => plane[(block / 8) as usize] |= 1 << (block % 8),
        }
    }
}

/// The planes of the root's checkpoint.
///
/// # Errors
///
/// Any page that is damaged, out of place or too new, and counts that are not the root's.
pub fn planes(disk: &Disk, sb: &Superblock) -> Result<Planes, Wrong> {
    let planes = uncounted_planes(disk, sb)?;
    let good = counts(&planes) == [sb.root.dirty_blocks, sb.root.stale_blocks];
    good.then_some(planes).ok_or(Wrong)
}

/// How many blocks are dirty, and stale.
pub fn counts(planes: &Planes) -> [u64; 2] {
    planes
        .each_ref()
        .map(|plane| plane.iter().map(|byte| u64::from(byte.count_ones())).sum())
}

/// As [`planes`], whatever the root counts.
///
/// # Errors
///
/// As [`planes`].
pub fn uncounted_planes(disk: &Disk, sb: &Superblock) -> Result<Planes, Wrong> {
    const HEADER: usize = 32;
    const BITS: usize = (PAGE_SIZE - HEADER) * 8;
    const ENTRIES: usize = (PAGE_SIZE - HEADER) * 4;
    let blocks = sb.geometry.blocks() as usize;
    let bytes = blocks.div_ceil(8);
    let per_plane = blocks.div_ceil(BITS);
    let index_pages = (per_plane * 2).div_ceil(ENTRIES);
    let start = sb.layout.area_start[usize::from(sb.root.area)];

    let page = |n: usize, magic: &[u8; 4], number: usize| -> Result<&Page, Wrong> {
        let page = disk.page(start + n as u64).ok_or(Wrong)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&sb.meta_uuid), &page[8..]);
        let good =
            page[..4] == *magic && u32_at(page, 4) == crc && u32_at(page, 16) as usize == number;
        good.then_some(page).ok_or(Wrong)
    };

    let mut planes = no_planes(blocks as u64);
    for (which, plane) in planes.iter_mut().enumerate() {
        for n in 0..per_plane {
            let number = which * per_plane + n;
            let index = page(number / ENTRIES, b"PIDX", number / ENTRIES)?;
            if u64_at(index, 8) != sb.root.seq {
                return Err(Wrong);
            }
            let entry = number % ENTRIES;
            let state = (index[HEADER + entry / 4] >> (entry % 4 * 2)) & 3;
            let first = n * BITS;
            match state {
                0 => {}
                1 => fill(plane, first as u64, (first + BITS).min(blocks) as u64),
                2 => {
                    let stored = page(index_pages + number, b"PPLN", number)?;
                    let seq = u64_at(stored, 8);
                    if seq == 0 || seq > sb.root.seq {
                        return Err(Wrong);
                    }
                    let to = &mut plane[first / 8..bytes.min(first / 8 + BITS / 8)];
                    let (real, past) = stored[HEADER..].split_at(to.len());
                    to.copy_from_slice(real);
                    if past.iter().any(|byte| *byte != 0) {
                        return Err(Wrong);
                    }
                }
                _ => return Err(Wrong),
            }
        }
        if blocks % 8 != 0 && plane[bytes - 1] >> (blocks % 8) != 0 {
            return Err(Wrong);
        }
    }
    Ok(planes)
}

/// Marks the blocks that the log calls dirty, and those of the extents that it announced and did not settle after.
pub fn add(planes: &mut Planes, sb: &Superblock, log: &Log) {
    let per_extent = 1 << (sb.geometry.extent_shift() - sb.geometry.block_shift());
    let mut announced = vec![false; sb.geometry.extents() as usize];
    for (kind, first, end) in &log.entries {
        match kind {
            2 => fill(&mut planes[0], *first, *end),
            4 => (*first..*end).for_each(|b| planes[1][b as usize / 8] &= !(1 << (b % 8))),
            _ => announced[*first as usize..*end as usize].fill(*kind == 1),
        }
    }
    for (extent, _) in announced.iter().enumerate().filter(|(_, a)| **a) {
        let first = extent as u64 * per_extent;
        let end = (first + per_extent).min(sb.geometry.blocks());
        fill(&mut planes[0], first, end);
    }
}
