// SPDX-License-Identifier: GPL-2.0

//! The log: a ring of record pages that say which extents may change, and what did change in those that are given up.
//!
//! Record `seq` (1, 2, 3 …, never reused) is one page at ring position `seq % pages`. A record's page is written
//! with FUA before any write that it announces is sent to the data device, and the next record is not sent
//! before this one is durable; so at most the last record can be incomplete after a crash.
//!
//! Each 512-byte sector of a record stands for itself:
//!
//! ```text
//!  0  crc32c, seeded with the metadata's UUID, over bytes 4..512
//!  4  magic "PL"     6  entries in this sector, 0..=62     7  number of this sector, 0..=7
//!  8  sequence       16 … 62 entries of 8 bytes, unused ones zero
//! ```
//!
//! so that of a page whose sectors differ in age it is known that a power cut tore it (the end of the log), and
//! of a sector whose CRC is wrong that it is damaged, which is never taken for the end of the log.
//!
//! Entries fill the sectors in order, and the first sector without any ends the record: what lies behind it in the page
//! is zero when written, and is never looked at. Most records have few entries, and sealing eight sectors for each cost
//! more than all else that a commit computes. The empty one is there so that the sequence is known even if one sector is
//! damaged.

//! An extent is given up in two ways: a checkpoint holds its exact bits, or the log does. For the latter there are the
//! entries [`Entry::Dirty`] and [`Entry::Settled`]: the blocks that are dirty in some extents, then that no other
//! block of these extents is, for all that was announced of them before. Entries count in their order, and a record
//! that a power cut tore counts for nothing; so an extent is settled only if all its dirty blocks were told.
//!
//! Blocks that a checkpoint calls stale and that got content since are told with [`Entry::Valid`], behind a flush of the
//! data device and before the flush is answered that promises the content (rules 2 and 3 of the contract).

use super::crc::crc32c;
use super::error::{Error, Result, Structure};
use super::geometry::{Geometry, Run};
use super::superblock::Uuid;
use super::Page;

const SECTOR: usize = 512;
const SECTORS: usize = 8;
const HEADER: usize = 16;
const MAGIC: [u8; 2] = *b"PL";
/// Entries of one sector.
const SECTOR_ENTRIES: usize = (SECTOR - HEADER) / 8;
/// Entries of one record.
pub const RECORD_ENTRIES: usize = SECTOR_ENTRIES * SECTORS;

const START_BITS: u32 = 44;
const LEN_BITS: u32 = 16;
/// Most units of one entry.
pub const MAX_RUN: u64 = 1 << LEN_BITS;

/// One entry of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The blocks of these extents may become dirty.
    Intent(Run),
    /// These blocks are dirty.
    Dirty(Run),
    /// Of these extents all dirty blocks were told; what was announced of them before is void.
    Settled(Run),
    /// These blocks are not stale any more: what is on the data device is durable there.
    Valid(Run),
}

impl Entry {
    /// The entry's eight bytes, or `None` if the run is empty, too long or too far out.
    pub fn encode(self) -> Option<u64> {
        let (kind, run) = match self {
            Self::Intent(run) => (1, run),
            Self::Dirty(run) => (2, run),
            Self::Settled(run) => (3, run),
            Self::Valid(run) => (4, run),
        };
        let len = run.len();
        if len == 0 || len > MAX_RUN || run.start >> START_BITS != 0 {
            return None;
        }
        Some((kind << 60) | ((len - 1) << START_BITS) | run.start)
    }

    /// Whether it names only what a device has.
    pub fn fits(self, geometry: &Geometry) -> bool {
        match self {
            Self::Intent(run) | Self::Settled(run) => run.end <= geometry.extents(),
            Self::Dirty(run) | Self::Valid(run) => run.end <= geometry.blocks(),
        }
    }

    fn decode(word: u64) -> Option<Self> {
        let start = word & ((1 << START_BITS) - 1);
        let len = ((word >> START_BITS) & (MAX_RUN - 1)) + 1;
        let run = Run {
            start,
            end: start + len,
        };
        match word >> 60 {
            1 => Some(Self::Intent(run)),
            2 => Some(Self::Dirty(run)),
            3 => Some(Self::Settled(run)),
            4 => Some(Self::Valid(run)),
            _ => None,
        }
    }
}

fn sector_crc(uuid: &Uuid, sector: &[u8]) -> u32 {
    crc32c(crc32c(0, uuid), sector.get(4..).unwrap_or(&[]))
}

/// Fills a record page entry by entry.
pub struct Writer<'a> {
    page: &'a mut Page,
    count: usize,
}

impl<'a> Writer<'a> {
    /// A record without entries in `page`.
    pub fn new(page: &'a mut Page) -> Self {
        page.fill(0);
        Self { page, count: 0 }
    }

    /// As [`Writer::new`], for a page that is zero or was filled by a writer, and by nothing else: only what that used is
    /// made zero. Most records use little of their page, and making all of it zero cost as much as sealing it.
    pub fn again(page: &'a mut Page) -> Self {
        for sector in page.chunks_exact_mut(SECTOR) {
            // A header or, in one that was given up, an entry; neither is ever zero. Sectors are used in their order.
            let (head, rest) = sector.split_at_mut(HEADER + 8);
            if head.iter().fold(0, |any, b| any | b) == 0 {
                break;
            }
            head.fill(0);
            rest.fill(0);
        }
        debug_assert!(page.iter().all(|b| *b == 0));
        Self { page, count: 0 }
    }

    /// Goes on with a record that has `count` entries in `page`.
    pub fn resume(page: &'a mut Page, count: usize) -> Self {
        Self {
            page,
            count: count.min(RECORD_ENTRIES),
        }
    }

    /// Entries so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Entries that still fit.
    pub fn room(&self) -> usize {
        RECORD_ENTRIES - self.count
    }

    /// Adds an entry; `false`, and nothing changed, if it does not fit.
    #[must_use]
    pub fn push(&mut self, entry: Entry) -> bool {
        let Some(word) = entry.encode() else {
            return false;
        };
        let (sector, slot) = (self.count / SECTOR_ENTRIES, self.count % SECTOR_ENTRIES);
        let at = sector * SECTOR + HEADER + slot * 8;
        let Some(to) = self.page.get_mut(at..at + 8) else {
            return false;
        };
        to.copy_from_slice(&word.to_le_bytes());
        self.count += 1;
        true
    }

    /// Adds the extents of `run` as as many entries as it takes; returns the part that did not fit.
    pub fn push_run(&mut self, run: Run) -> Run {
        self.push_parts(run, Entry::Intent)
    }

    /// Adds `run` as as many entries of a kind as it takes; returns the part that did not fit.
    pub fn push_parts(&mut self, run: Run, kind: impl Fn(Run) -> Entry) -> Run {
        let mut rest = run;
        while !rest.is_empty() {
            let part = Run {
                start: rest.start,
                end: rest.end.min(rest.start + MAX_RUN),
            };
            if !self.push(kind(part)) {
                break;
            }
            rest.start = part.end;
        }
        rest
    }

    /// Seals the record as number `seq`.
    pub fn finish(self, uuid: &Uuid, seq: u64) {
        let mut left = self.count;
        // The last one is empty, unless all have entries.
        let sealed = self.count.div_ceil(SECTOR_ENTRIES) + 1;
        for (i, sector) in self.page.chunks_exact_mut(SECTOR).take(sealed).enumerate() {
            let here = left.min(SECTOR_ENTRIES);
            left -= here;
            let mut head = [0; HEADER - 4];
            let (magic, rest) = head.split_at_mut(2);
            magic.copy_from_slice(&MAGIC);
            // CAST: at most 62, and at most 7.
            if let [count, number, _, _, ..] = rest {
                *count = here as u8;
                *number = i as u8;
            }
            if let Some(seq_at) = head.get_mut(4..12) {
                seq_at.copy_from_slice(&seq.to_le_bytes());
            }
            if let Some(to) = sector.get_mut(4..HEADER) {
                to.copy_from_slice(&head);
            }
            let crc = sector_crc(uuid, sector);
            if let Some(to) = sector.get_mut(..4) {
                to.copy_from_slice(&crc.to_le_bytes());
            }
        }
    }
}

/// What one sector is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SectorKind {
    Blank,
    Written { seq: u64, count: usize },
    Damaged,
}

fn sector_kind(uuid: &Uuid, sector: &[u8], number: usize) -> SectorKind {
    // Without an early end the compiler makes it words at a time.
    if sector.iter().fold(0, |any, b| any | b) == 0 {
        return SectorKind::Blank;
    }
    let stored = sector
        .get(..4)
        .and_then(|b| b.try_into().ok())
        .map(u32::from_le_bytes);
    if stored != Some(sector_crc(uuid, sector)) {
        return SectorKind::Damaged;
    }
    match (
        sector.get(4..8),
        sector.get(8..16).and_then(|b| b.try_into().ok()),
    ) {
        (Some(&[m0, m1, count, place]), Some(seq))
            if [m0, m1] == MAGIC
                && usize::from(place) == number
                && usize::from(count) <= SECTOR_ENTRIES =>
        {
            SectorKind::Written {
                seq: u64::from_le_bytes(seq),
                count: usize::from(count),
            }
        }
        _ => SectorKind::Damaged,
    }
}

/// What a page of the ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// Never written.
    Blank,
    /// A whole record.
    Whole(u64),
    /// Sectors of different age: a write that a power cut tore. The newest sequence seen up to the record's end.
    Torn(u64),
    /// A sector, up to the record's end, is neither blank nor good.
    Damaged,
}

/// Tells what `page` of the ring is.
pub fn classify(uuid: &Uuid, page: &Page) -> RecordKind {
    let mut newest = 0;
    let mut first = None;
    let mut same = true;
    for (i, sector) in page.chunks_exact(SECTOR).enumerate() {
        let (seq, ends) = match sector_kind(uuid, sector, i) {
            SectorKind::Damaged => return RecordKind::Damaged,
            SectorKind::Blank => (0, false),
            SectorKind::Written { seq, count } => (seq, count == 0),
        };
        newest = seq.max(newest);
        same &= *first.get_or_insert(seq) == seq;
        // In a torn page it may be the end of an older record, and newer sectors may follow: no matter, it is torn.
        if ends {
            break;
        }
    }
    match (same, newest) {
        (true, 0) => RecordKind::Blank,
        (true, seq) => RecordKind::Whole(seq),
        (false, seq) => RecordKind::Torn(seq),
    }
}

/// What a damaged page of the ring still says of the record that belongs there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remains {
    /// The record was never written in full: a good sector is older than it. Nothing that it announced had begun.
    Unfinished,
    /// All of its entries are in good sectors.
    Entries,
    /// It may have announced more than the good sectors say.
    Lost,
}

/// Tells what is left of record `seq` in `page`, and the newest sequence that any good sector carries.
pub fn salvage(uuid: &Uuid, page: &Page, seq: u64) -> (Remains, u64) {
    let mut newest = 0;
    let mut older = false;
    // All entries were seen; and the end too.
    let (mut complete, mut ended) = (false, false);
    let (mut damaged, mut lost) = (false, false);
    for (i, sector) in page.chunks_exact(SECTOR).enumerate() {
        match sector_kind(uuid, sector, i) {
            SectorKind::Damaged => {
                damaged |= !ended;
                lost |= !complete;
            }
            // Behind a damaged sector, which may have been the record's end, it proves nothing. The first is never the
            // end of a record that announces anything.
            SectorKind::Blank => older |= !ended && (!damaged || i == 1),
            SectorKind::Written { seq: found, count } => {
                newest = found.max(newest);
                // A record overwrites its whole page, so nothing older is left anywhere once it is durable.
                older |= !ended && found < seq;
                complete |= found == seq && count < SECTOR_ENTRIES;
                ended |= found == seq && count == 0;
            }
        }
    }
    let remains = if newest > seq {
        Remains::Lost
    } else if older {
        Remains::Unfinished
    } else if lost {
        Remains::Lost
    } else {
        Remains::Entries
    };
    (remains, newest)
}

/// Gives the entries of a record that [`classify`] called whole.
///
/// # Errors
///
/// An entry of a kind that is not known: it was written by software newer than this.
pub fn entries(uuid: &Uuid, page: &Page, mut each: impl FnMut(Entry) -> Result) -> Result {
    for (i, sector) in page.chunks_exact(SECTOR).enumerate() {
        let SectorKind::Written { seq, count } = sector_kind(uuid, sector, i) else {
            continue;
        };
        let payload = sector.get(HEADER..).unwrap_or(&[]);
        for bytes in payload.chunks_exact(8).take(count) {
            let word = bytes.try_into().map_or(0, u64::from_le_bytes);
            each(Entry::decode(word).ok_or(Error::BadField(Structure::Log(seq), "entry"))?)?;
        }
        if count == 0 {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;
    extern crate std;
    use std::vec::Vec;

    const UUID: Uuid = [3; 16];

    fn record(seq: u64, runs: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        let mut w = Writer::new(&mut page);
        for i in 0..runs {
            assert!(w.push(Entry::Intent(Run {
                start: i * 10,
                end: i * 10 + 1 + i % 5
            })));
        }
        w.finish(&UUID, seq);
        page
    }

    #[test]
    fn a_page_used_again_holds_the_new_record_alone() {
        let mut page = [0; PAGE_SIZE];
        for (before, sealed) in [
            (RECORD_ENTRIES, true),
            (SECTOR_ENTRIES, true),
            (70, false),
            (1, false),
            (0, true),
        ] {
            let mut old = Writer::again(&mut page);
            for at in 0..before as u64 {
                assert!(old.push(Entry::Dirty(Run {
                    start: at,
                    end: at + 1
                })));
            }
            if sealed {
                old.finish(&UUID, 6);
            }
            let mut fresh = [0; PAGE_SIZE];
            for mut new in [Writer::again(&mut page), Writer::new(&mut fresh)] {
                assert!(new.push(Entry::Intent(Run { start: 3, end: 9 })));
                new.finish(&UUID, 7);
            }
            assert!(page == fresh, "after {before} entries");
        }
    }

    #[test]
    fn round_trip() {
        for n in [0, 1, 61, 62, 63, 496] {
            let page = record(9, n);
            assert_eq!(classify(&UUID, &page), RecordKind::Whole(9));
            let mut got = Vec::new();
            entries(&UUID, &page, |e| {
                got.push(e);
                Ok(())
            })
            .unwrap();
            assert_eq!(got.len() as u64, n);
            assert_eq!(
                got.last().copied(),
                n.checked_sub(1).map(|i| {
                    Entry::Intent(Run {
                        start: i * 10,
                        end: i * 10 + 1 + i % 5,
                    })
                })
            );
        }
        let mut page = [0; PAGE_SIZE];
        let mut w = Writer::new(&mut page);
        let rest = w.push_run(Run {
            start: 0,
            end: MAX_RUN * 500,
        });
        assert_eq!(
            rest,
            Run {
                start: MAX_RUN * 496,
                end: MAX_RUN * 500
            }
        );
        assert!(!w.push(Entry::Intent(Run { start: 0, end: 1 })));
    }

    #[test]
    fn a_record_is_resumed_where_it_was_left() {
        let run = |start, end| Run { start, end };
        let all = [
            Entry::Intent(run(7, 9)),
            Entry::Dirty(run(1 << 40, (1 << 40) + MAX_RUN)),
            Entry::Settled(run(7, 8)),
        ];
        let mut page = [0; PAGE_SIZE];
        let mut count = 0;
        for entry in all {
            let mut w = Writer::resume(&mut page, count);
            assert!(w.push(entry));
            count = w.count();
        }
        Writer::resume(&mut page, count).finish(&UUID, 4);
        let mut got = Vec::new();
        entries(&UUID, &page, |e| {
            got.push(e);
            Ok(())
        })
        .unwrap();
        assert_eq!(got, all);
    }

    #[test]
    fn torn_is_not_damaged() {
        let old = record(5, 450);
        let new = record(21, 450);
        for cut in 1..8 {
            let mut page = old;
            page[..cut * 512].copy_from_slice(&new[..cut * 512]);
            assert_eq!(classify(&UUID, &page), RecordKind::Torn(21));
            let mut page = [0; PAGE_SIZE];
            page[cut * 512..].copy_from_slice(&new[cut * 512..]);
            assert_eq!(classify(&UUID, &page), RecordKind::Torn(21));
        }
        assert_eq!(classify(&UUID, &[0; PAGE_SIZE]), RecordKind::Blank);
        assert_eq!(classify(&[4; 16], &new), RecordKind::Damaged);
    }

    /// What a torn write leaves of two records, for each set of sectors that made it to the disk.
    fn mixes(old: &Page, new: &Page, mut each: impl FnMut(u32, &Page)) {
        for set in 0..256u32 {
            let mut page = *old;
            for i in (0..8).filter(|i| (set >> i) & 1 == 1) {
                page[i * 512..(i + 1) * 512].copy_from_slice(&new[i * 512..(i + 1) * 512]);
            }
            each(set, &page);
        }
    }

    fn told(page: &Page) -> Vec<Entry> {
        let mut got = Vec::new();
        entries(&UUID, page, |e| {
            got.push(e);
            Ok(())
        })
        .unwrap();
        got
    }

    #[test]
    fn a_torn_record_counts_only_if_all_its_entries_are_there() {
        for (before, after) in [
            (0, 3),
            (3, 0),
            (450, 3),
            (3, 450),
            (62, 62),
            (450, 70),
            (496, 496),
        ] {
            let mut old = [0; PAGE_SIZE];
            if before != 0 {
                old = record(5, before);
            }
            let new = record(21, after);
            // Sectors that the new record's entries, and their end, lie in.
            let needed = (1u32 << (after.div_ceil(62) + 1).min(8)) - 1;
            mixes(&old, &new, |set, page| match classify(&UUID, page) {
                RecordKind::Whole(21) => {
                    assert_eq!(set & needed, needed, "{before} {after} {set:b}");
                    assert_eq!(told(page), told(&new));
                }
                kind => {
                    assert_ne!(set & needed, needed, "{before} {after} {set:b} {kind:?}");
                    assert_ne!(kind, RecordKind::Damaged);
                    assert_eq!(salvage(&UUID, page, 21).0, Remains::Unfinished);
                }
            });
        }
    }

    #[test]
    fn a_damaged_sector_is_never_taken_for_an_unfinished_record() {
        for count in [1, 3, 62, 70, 496] {
            let new = record(21, count);
            for sector in 0..(count as usize).div_ceil(62) {
                let mut page = new;
                page[sector * 512 + 300] ^= 4;
                assert_eq!(classify(&UUID, &page), RecordKind::Damaged);
                assert_eq!(
                    salvage(&UUID, &page, 21).0,
                    Remains::Lost,
                    "{count} {sector}"
                );
            }
        }
    }

    #[test]
    fn what_remains_of_a_damaged_record_is_told() {
        // Entries in the first two sectors, the second not full.
        let new = record(21, 70);
        let flip = |page: &Page, sector: usize| {
            let mut page = *page;
            page[sector * 512 + 40] ^= 1;
            page
        };
        for sector in 0..3 {
            let page = flip(&new, sector);
            assert_eq!(classify(&UUID, &page), RecordKind::Damaged);
            // The third is empty.
            let want = if sector < 2 {
                Remains::Lost
            } else {
                Remains::Entries
            };
            assert_eq!(salvage(&UUID, &page, 21).0, want, "sector {sector}");
            // Torn and damaged: something older is left.
            let mut torn = page;
            let other = if sector == 0 { 1 } else { 0 };
            torn[other * 512..(other + 1) * 512]
                .copy_from_slice(&record(5, 100)[other * 512..(other + 1) * 512]);
            assert_eq!(salvage(&UUID, &torn, 21).0, Remains::Unfinished);
        }
        // In the place of a newer record: it was never written. In the place of an older one: that is lost.
        assert_eq!(
            salvage(&UUID, &flip(&new, 0), 37),
            (Remains::Unfinished, 21)
        );
        assert_eq!(salvage(&UUID, &flip(&new, 0), 5), (Remains::Lost, 21));
        // Nothing is said behind the end.
        for sector in 3..8 {
            let page = flip(&new, sector);
            assert_eq!(classify(&UUID, &page), RecordKind::Whole(21));
            assert_eq!(salvage(&UUID, &page, 21).0, Remains::Entries);
        }
        assert_eq!(salvage(&UUID, &new, 21), (Remains::Entries, 21));
        assert_eq!(salvage(&UUID, &[0xff; PAGE_SIZE], 21), (Remains::Lost, 0));
        // A full record: nothing behind a damaged sector is known to be empty, nor before it.
        let full = record(21, 496);
        assert_eq!(salvage(&UUID, &flip(&full, 7), 21).0, Remains::Lost);
    }

    #[test]
    fn every_flipped_bit_is_damage() {
        let mut page = record(21, 450);
        for bit in 0..PAGE_SIZE * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(classify(&UUID, &page), RecordKind::Damaged, "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
