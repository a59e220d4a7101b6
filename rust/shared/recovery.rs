// SPDX-License-Identifier: GPL-2.0

//! From what lies on disk to the state that a device starts with (rule 4 of the contract, the superset).
//!
//! One code serves the kernel, the agent and `pristine device check`. The steps, in order:
//!
//! 1. [`load_superblock`]: both anchors are read, the newer good one is the root.
//! 2. [`load_planes`]: the root's checkpoint gives the exact dirty and stale planes as of some moment.
//! 3. [`replay`]: the records from the root's `log_seq` on add every extent that may have changed since, but of those
//!    that they settle only the blocks that did; and they take from the stale plane what became valid.
//!
//! Any damage on the way is an error, never a shorter answer: a device is not used on the strength of a log that
//! ends early. A damaged page of the ring that holds none of the log is no damage to the log; see [`ends_at`] for what shows
//! that. Whoever goes on after an unclean stop must commit a new checkpoint whose `log_seq` is
//! [`LogEnd::next_seq`] before writing any record, because the number of a torn record is never used again.

use super::checkpoint::{self, PageState, Place, Plane};
use super::error::{Error, Result, Structure};
use super::geometry::{Geometry, Run};
use super::layout::Placement;
use super::log::{self, Entry, RecordKind, Remains};
use super::superblock::{self, Superblock};
use super::Page;

/// Where metadata pages are read from.
pub trait Source {
    /// Reads page `page`, counted from the start of the device.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] with the page's number.
    fn read(&mut self, page: u64, into: &mut Page) -> Result;
}

/// What receives the recovered planes. It starts with all bits zero.
pub trait Sink {
    /// Ors `bits` into word `word` of a plane.
    fn or_word(&mut self, plane: Plane, word: u64, bits: u64);
    /// Sets all blocks of `run` in a plane.
    fn set(&mut self, plane: Plane, run: Run);
    /// Notes that any block of these extents may be dirty.
    fn intend(&mut self, extents: Run);
    /// Forgets what was noted of these extents: all their dirty blocks were set.
    fn settle(&mut self, extents: Run);
    /// Clears all blocks of `run` in the stale plane.
    fn validate(&mut self, run: Run);
    /// Sets the blocks of all extents that are noted still: there are no more records.
    fn conclude(&mut self, geometry: &Geometry);
}

/// Reads both superblock copies and chooses; `pages` is the size of the device in whole pages.
pub fn load_superblock(
    source: &mut impl Source,
    placement: Placement,
    pages: u64,
    buffer: &mut Page,
) -> Result<Superblock> {
    let mut copy = |n| {
        let at = placement.anchor(n, pages)?;
        source.read(at, buffer)?;
        Superblock::decode(buffer, n, pages)
    };
    let first = copy(0);
    let second = copy(1);
    let chosen = superblock::choose(first, second)?;
    if chosen.layout.placement != placement {
        return Err(Error::BadField(Structure::Superblock(0), "placement"));
    }
    Ok(chosen)
}

/// Loads the planes of the root's checkpoint; `index` and `buffer` are scratch pages.
///
/// # Errors
///
/// The first damage found, also when the planes do not hold as many blocks as the root says.
pub fn load_planes(
    source: &mut impl Source,
    sb: &Superblock,
    index: &mut Page,
    buffer: &mut Page,
    sink: &mut impl Sink,
) -> Result {
    let geometry = &sb.geometry;
    let per_plane = checkpoint::plane_pages(geometry);
    let area = sb.root.area;
    let start = *sb
        .layout
        .area_start
        .get(usize::from(area))
        .ok_or(Error::BadGeometry("area"))?;
    let number = |n: u64| u32::try_from(n).map_err(|_| Error::BadGeometry("plane pages"));
    let place = |index| Place {
        meta_uuid: &sb.meta_uuid,
        area,
        seq: sb.root.seq,
        index,
    };
    let mut counts = [0u64; 2];

    for n in 0..per_plane * 2 {
        let index_page = n / checkpoint::ENTRIES_PER_INDEX;
        let index_place = place(number(index_page)?);
        if n % checkpoint::ENTRIES_PER_INDEX == 0 {
            source.read(start + index_page, index)?;
            checkpoint::verify_index(index, &index_place)?;
        }
        let (plane, page, count) = match counts.split_at_mut(1) {
            ([dirty], _) if n < per_plane => (Plane::Dirty, n, dirty),
            (_, [stale]) => (Plane::Stale, n - per_plane, stale),
            _ => return Err(Error::BadGeometry("planes")),
        };
        match checkpoint::index_state(index, &index_place, n)? {
            PageState::Zero => {}
            PageState::Ones => {
                let run = checkpoint::blocks_in_page(geometry, page);
                *count += run.len();
                sink.set(plane, run);
            }
            PageState::Stored => {
                let at = place(number(n)?);
                source.read(start + checkpoint::index_pages(geometry) + n, buffer)?;
                checkpoint::verify_plane(buffer, &at)?;
                for i in 0..checkpoint::PAGE_WORDS {
                    let bits = checkpoint::word(buffer, i);
                    if bits & !checkpoint::valid_mask(geometry, page, i) != 0 {
                        return Err(Error::BadField(
                            Structure::Plane(area, at.index),
                            "bits past the end",
                        ));
                    }
                    if bits != 0 {
                        *count += u64::from(bits.count_ones());
                        // CAST: 508 words fit.
                        sink.or_word(plane, page * checkpoint::PAGE_WORDS as u64 + i as u64, bits);
                    }
                }
            }
        }
    }
    if counts != [sb.root.dirty_blocks, sb.root.stale_blocks] {
        return Err(Error::Mismatched(Structure::Index(area, 0)));
    }
    Ok(())
}

/// Where the log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEnd {
    /// Records that were replayed.
    pub records: u64,
    /// The number that the next record may have.
    pub next_seq: u64,
    /// The last record was torn by a crash; nothing that it announced was sent to the data device.
    pub torn: bool,
    /// Pages of the ring that are damaged or cannot be read, and are not needed. They are to be written anew before
    /// the log grows up to them: what is left of a record there could not be told from them.
    pub damaged: u64,
}

/// Whether the log ends before record `seq`, though its page is damaged (or cannot be read, `None`).
///
/// It does if a good sector of the page is older than the record, or blank: the record was then never written in full, and
/// nothing that it announced had begun, which is what a torn page says, too. It does as well behind a stop in
/// order, after which there are no records, unless one shows. In all other cases the page may have been a record, and
/// damage is not taken for the end of the log.
pub fn ends_at(sb: &Superblock, seq: u64, page: Option<&Page>) -> bool {
    let stopped = sb.clean && seq == sb.root.log_seq;
    match page.map(|page| log::salvage(&sb.meta_uuid, page, seq)) {
        None => stopped,
        Some((Remains::Unfinished, _)) => true,
        Some((_, newest)) => stopped && newest < seq,
    }
}

/// Replays the log over the planes of the checkpoint.
///
/// # Errors
///
/// A damaged record, a record that is missing before later ones, or one that was overwritten too early. A page that cannot
/// be read, or is damaged, is none if it is no record of the log.
pub fn replay(
    source: &mut impl Source,
    sb: &Superblock,
    buffer: &mut Page,
    sink: &mut impl Sink,
) -> Result<LogEnd> {
    let first = sb.root.log_seq;
    let last = first.saturating_add(sb.layout.log_pages);
    let mut seq = first;
    let mut torn = false;

    while seq < last {
        match source.read(sb.layout.log_page(seq), buffer) {
            Err(_) if ends_at(sb, seq, None) => break,
            read => read?,
        }
        match log::classify(&sb.meta_uuid, buffer) {
            RecordKind::Whole(found) if found == seq => {}
            RecordKind::Whole(found) | RecordKind::Torn(found) if found > seq => {
                return Err(Error::LogOverwritten(seq));
            }
            RecordKind::Damaged if ends_at(sb, seq, Some(buffer)) => {
                torn = log::salvage(&sb.meta_uuid, buffer, seq).1 == seq;
                break;
            }
            RecordKind::Damaged => return Err(Error::BadChecksum(Structure::Log(seq))),
            RecordKind::Torn(found) => {
                torn = found == seq;
                break;
            }
            RecordKind::Whole(_) | RecordKind::Blank => break,
        }
        log::entries(&sb.meta_uuid, buffer, |entry| {
            if !entry.fits(&sb.geometry) {
                return Err(Error::BadField(Structure::Log(seq), "past the end"));
            }
            match entry {
                Entry::Intent(run) => sink.intend(run),
                Entry::Dirty(run) => sink.set(Plane::Dirty, run),
                Entry::Settled(run) => sink.settle(run),
                Entry::Valid(run) => sink.validate(run),
            }
            Ok(())
        })?;
        seq += 1;
    }

    // A record that was lost or never finished is the last one. If a later one is there, this was no crash.
    let ring = sb.layout.log_pages;
    let mut damaged = 0;
    for at in 0..ring {
        let is_needed = (at + ring - first % ring) % ring < seq - first;
        let newest = match source.read(sb.layout.log_start + at, buffer) {
            Err(_) if !is_needed => {
                damaged += 1;
                continue;
            }
            read => read.map(|()| log::classify(&sb.meta_uuid, buffer))?,
        };
        let newest = match newest {
            RecordKind::Whole(found) | RecordKind::Torn(found) => found,
            RecordKind::Blank => 0,
            RecordKind::Damaged => {
                damaged += 1;
                log::salvage(&sb.meta_uuid, buffer, seq).1
            }
        };
        if newest > seq {
            return Err(Error::LogGap(seq));
        }
    }
    sink.conclude(&sb.geometry);
    Ok(LogEnd {
        records: seq - first,
        next_seq: seq + 1,
        torn,
        damaged,
    })
}
