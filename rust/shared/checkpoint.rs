// SPDX-License-Identifier: GPL-2.0

//! Checkpoint areas: index pages, then the pages of the dirty plane, then those of the stale plane.
//!
//! A plane has one bit for each block. A plane page holds [`BITS_PER_PAGE`] of them behind a header of 32 bytes;
//! plane pages are counted through both planes (the stale plane's follow the dirty plane's). The index says of
//! each plane page in two bits whether it is all zero, all one, or stored; pages of the first two kinds are
//! neither written nor read, so that an empty or a full plane costs one page for each 2 TiB of 4 KiB blocks.
//!
//! The two areas are written in turn. An area keeps the plane pages that did not change since it was last
//! written; hence a stored plane page carries the sequence of the checkpoint that wrote it, which is at most
//! the current one, while index pages are all written each time and carry exactly the current one.

use super::bits;
use super::crc::crc32c;
use super::error::{Error, Result, Structure};
use super::geometry::{Geometry, Run};
use super::superblock::Uuid;
use super::{Page, PAGE_SIZE};

const HEADER: usize = 32;
const INDEX_MAGIC: u32 = u32::from_le_bytes(*b"PIDX");
const PLANE_MAGIC: u32 = u32::from_le_bytes(*b"PPLN");

/// Words of payload in a page.
pub const PAGE_WORDS: usize = (PAGE_SIZE - HEADER) / 8;
/// Blocks that one plane page tells of.
pub const BITS_PER_PAGE: u64 = PAGE_WORDS as u64 * bits::WORD_BITS; // CAST: 508 fits.
/// Plane pages that one word of the index tells of.
const STATES_PER_WORD: u64 = 32;
/// Plane pages that one index page tells of.
pub const ENTRIES_PER_INDEX: u64 = PAGE_WORDS as u64 * STATES_PER_WORD; // CAST: 508 fits.

/// The planes, in their order on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// Changed here since the master was written.
    Dirty,
    /// Local content worthless.
    Stale,
}

/// What the index says of a plane page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// All bits zero; nothing stored.
    Zero,
    /// All bits one; nothing stored.
    Ones,
    /// Stored in its place.
    Stored,
}

impl PageState {
    /// The two bits that the index has for it.
    pub fn bits(self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Ones => 1,
            Self::Stored => 2,
        }
    }
}

/// Pages of one plane.
pub fn plane_pages(geometry: &Geometry) -> u64 {
    geometry.blocks().div_ceil(BITS_PER_PAGE)
}

/// Index pages of an area.
pub fn index_pages(geometry: &Geometry) -> u64 {
    (plane_pages(geometry) * 2).div_ceil(ENTRIES_PER_INDEX)
}

/// Pages of one area.
pub fn area_pages(geometry: &Geometry) -> u64 {
    index_pages(geometry) + plane_pages(geometry) * 2
}

/// The number, counted through both planes, of page `page` of `plane`.
pub fn plane_index(geometry: &Geometry, plane: Plane, page: u64) -> u64 {
    match plane {
        Plane::Dirty => page,
        Plane::Stale => plane_pages(geometry) + page,
    }
}

/// The pages of a plane that tell of the blocks of `run`.
pub fn pages_of(run: Run) -> Run {
    if run.is_empty() {
        return Run { start: 0, end: 0 };
    }
    Run {
        start: run.start / BITS_PER_PAGE,
        end: (run.end - 1) / BITS_PER_PAGE + 1,
    }
}

/// The blocks that page `page` of a plane tells of, cut at the end of the device.
pub fn blocks_in_page(geometry: &Geometry, page: u64) -> Run {
    let start = page.saturating_mul(BITS_PER_PAGE).min(geometry.blocks());
    Run {
        start,
        end: (start + BITS_PER_PAGE).min(geometry.blocks()),
    }
}

/// What binds a page to its metadata and its place.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The metadata's UUID; it seeds the checksum, so that pages of an earlier format never pass.
    pub meta_uuid: &'a Uuid,
    /// The area, 0 or 1; only for errors.
    pub area: u8,
    /// The sequence of the checkpoint.
    pub seq: u64,
    /// Number of the index page, or of the plane page counted through both planes.
    pub index: u32,
}

fn get_u32(page: &Page, at: usize) -> u32 {
    page.get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn get_u64(page: &Page, at: usize) -> u64 {
    page.get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

fn put(page: &mut Page, at: usize, bytes: &[u8]) {
    if let Some(to) = page.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// Word `i` of a page's payload.
pub fn word(page: &Page, i: usize) -> u64 {
    get_u64(page, HEADER.saturating_add(i.saturating_mul(8)))
}

fn page_crc(page: &Page, place: &Place<'_>) -> u32 {
    crc32c(crc32c(0, place.meta_uuid), page.get(8..).unwrap_or(&[]))
}

/// Writes a page whose payload (4064 bytes) is written by `fill`.
fn encode(page: &mut Page, magic: u32, place: &Place<'_>, fill: impl FnOnce(&mut [u8])) {
    if let Some(header) = page.get_mut(..HEADER) {
        header.fill(0);
    }
    put(page, 0, &magic.to_le_bytes());
    put(page, 8, &place.seq.to_le_bytes());
    put(page, 16, &place.index.to_le_bytes());
    if let Some(payload) = page.get_mut(HEADER..) {
        fill(payload);
    }
    let crc = page_crc(page, place);
    put(page, 4, &crc.to_le_bytes());
}

/// Fills a payload word by word.
fn fill_words(payload: &mut [u8], mut words: impl FnMut(usize) -> u64) {
    for (i, to) in payload.chunks_exact_mut(8).enumerate() {
        to.copy_from_slice(&words(i).to_le_bytes());
    }
}

fn verify(page: &Page, magic: u32, place: &Place<'_>, me: Structure) -> Result<u64> {
    if get_u32(page, 0) != magic {
        return Err(Error::BadMagic(me));
    }
    if get_u32(page, 4) != page_crc(page, place) {
        return Err(Error::BadChecksum(me));
    }
    if get_u32(page, 16) != place.index {
        return Err(Error::Mismatched(me));
    }
    Ok(get_u64(page, 8))
}

/// Writes a plane page; `words(i)` gives word `i` of its bits.
pub fn encode_plane(page: &mut Page, place: &Place<'_>, words: impl FnMut(usize) -> u64) {
    encode_plane_with(page, place, |payload| fill_words(payload, words));
}

/// Writes a plane page; `fill` writes all of its payload, [`PAGE_WORDS`] little-endian words.
pub fn encode_plane_with(page: &mut Page, place: &Place<'_>, fill: impl FnOnce(&mut [u8])) {
    encode(page, PLANE_MAGIC, place, fill);
}

/// Checks a plane page against its place; its bits are then read with [`word`].
pub fn verify_plane(page: &Page, place: &Place<'_>) -> Result {
    let me = Structure::Plane(place.area, place.index);
    let seq = verify(page, PLANE_MAGIC, place, me)?;
    if seq == 0 || seq > place.seq {
        return Err(Error::Mismatched(me));
    }
    Ok(())
}

/// Where the index keeps the state of plane page `n`, counted through both planes: the word, counted through all
/// index pages, and the shift of its two bits in it.
pub fn index_slot(n: u64) -> (u64, u32) {
    // CAST: Less than 64.
    (n / STATES_PER_WORD, (n % STATES_PER_WORD * 2) as u32)
}

/// Words of all index pages together that are in use.
pub fn index_words(geometry: &Geometry) -> u64 {
    (plane_pages(geometry) * 2).div_ceil(STATES_PER_WORD)
}

/// Writes an index page; `state(n)` is the state of plane page `n`, counted through both planes.
pub fn encode_index(page: &mut Page, place: &Place<'_>, state: impl Fn(u64) -> PageState) {
    encode_index_words(page, place, |word| {
        (0..STATES_PER_WORD).fold(0, |bits, i| {
            let n = word * STATES_PER_WORD + i;
            bits | (state(n).bits() << index_slot(n).1)
        })
    });
}

/// Writes an index page; `words(i)` is word `i`, counted through all index pages.
pub fn encode_index_words(page: &mut Page, place: &Place<'_>, words: impl Fn(u64) -> u64) {
    let first = u64::from(place.index) * PAGE_WORDS as u64; // CAST: 508 fits.
    encode(page, INDEX_MAGIC, place, |payload| {
        // CAST: 508 fits.
        fill_words(payload, |i| words(first + i as u64));
    });
}

/// Checks an index page against its place; its entries are then read with [`index_state`].
pub fn verify_index(page: &Page, place: &Place<'_>) -> Result {
    let me = Structure::Index(place.area, place.index);
    if verify(page, INDEX_MAGIC, place, me)? != place.seq {
        return Err(Error::Mismatched(me));
    }
    Ok(())
}

/// The state of plane page `n` (counted through both planes) in the index page that tells of it.
pub fn index_state(page: &Page, place: &Place<'_>, n: u64) -> Result<PageState> {
    let me = Structure::Index(place.area, place.index);
    let entry = n % ENTRIES_PER_INDEX;
    let i = usize::try_from(entry / 32).map_err(|_| Error::BadField(me, "entry"))?;
    match (word(page, i) >> (entry % 32 * 2)) & 3 {
        0 => Ok(PageState::Zero),
        1 => Ok(PageState::Ones),
        2 => Ok(PageState::Stored),
        _ => Err(Error::BadField(me, "entry")),
    }
}

/// The mask of the bits of word `i` of plane page `page` that are blocks of the device.
pub fn valid_mask(geometry: &Geometry, page: u64, i: usize) -> u64 {
    let run = blocks_in_page(geometry, page);
    let first = run.start + i as u64 * bits::WORD_BITS; // CAST: usize is 64 bits or less everywhere we run.
    match run.end.saturating_sub(first) {
        0 => 0,
        n if n >= bits::WORD_BITS => u64::MAX,
        n => u64::MAX >> (bits::WORD_BITS - n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(uuid: &Uuid, seq: u64, index: u32) -> Place<'_> {
        Place {
            meta_uuid: uuid,
            area: 0,
            seq,
            index,
        }
    }

    #[test]
    fn plane_page_is_bound_to_its_place() {
        let uuid = [7; 16];
        let mut page = [0; PAGE_SIZE];
        encode_plane(&mut page, &place(&uuid, 5, 3), |i| i as u64);
        assert_eq!(verify_plane(&page, &place(&uuid, 5, 3)), Ok(()));
        assert_eq!(verify_plane(&page, &place(&uuid, 9, 3)), Ok(()));
        assert!(verify_plane(&page, &place(&uuid, 4, 3)).is_err());
        assert!(verify_plane(&page, &place(&uuid, 5, 4)).is_err());
        assert!(verify_plane(&page, &place(&[8; 16], 5, 3)).is_err());
        assert_eq!(word(&page, 507), 507);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let uuid = [7; 16];
        let mut page = [0; PAGE_SIZE];
        let at = place(&uuid, 5, 0);
        encode_index(&mut page, &at, |n| {
            if n % 3 == 0 {
                PageState::Stored
            } else {
                PageState::Ones
            }
        });
        assert_eq!(verify_index(&page, &at), Ok(()));
        assert_eq!(index_state(&page, &at, 300), Ok(PageState::Stored));
        assert_eq!(index_state(&page, &at, 301), Ok(PageState::Ones));
        for bit in 0..PAGE_SIZE * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(verify_index(&page, &at).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn masks_end_with_the_device() {
        let g = Geometry::new((BITS_PER_PAGE + 70) * 8, 12, 20).unwrap();
        assert_eq!(plane_pages(&g), 2);
        assert_eq!(valid_mask(&g, 0, 507), u64::MAX);
        assert_eq!(valid_mask(&g, 1, 0), u64::MAX);
        assert_eq!(valid_mask(&g, 1, 1), 0x3f);
        assert_eq!(valid_mask(&g, 1, 2), 0);
        assert_eq!(
            pages_of(Run {
                start: BITS_PER_PAGE - 1,
                end: BITS_PER_PAGE + 1
            }),
            Run { start: 0, end: 2 }
        );
    }
}
