// SPDX-License-Identifier: GPL-2.0

//! The undo area: the originals of blocks that changed, so that they can be put back without the master.
//!
//! It is an option of the metadata, made when a device is formatted. Whoever makes a clean block dirty first puts its content
//! into the area, and the record of the log that calls the block dirty is written behind a flush of that. So there is an
//! original for each dirty block, whatever a crash cuts, until the area is full; from then on writes go on
//! without, and what has no original comes from the master when it is reverted.
//!
//! Chunks follow each other from the area's first page on. A chunk is a header page and the data pages that belong to it:
//!
//! ```text
//!  0  crc32c, seeded with the metadata's UUID and the image id, over bytes 4..4096
//!  4  magic "PUND"    8  epoch    16  page of the area at which this header lies
//! 24  entries, 1..=256           28  data pages that follow, at most as many
//! 32  entries of 12 bytes: page of the data device (bit 63: it is zero, and there is no data page), crc32c of its content
//! ```
//!
//! What an entry tells, if header and content pass their checksums, is the page of the master image, always: only blocks are put
//! there that are clean, and neither epoch nor image id outlive a change of the image. So it does not matter how many
//! chunks are found, in which order, or whether the block got dirty after all; one that is damaged or missing is
//! only a block without an original. The superblock tells how far chunks reached at the last checkpoint; those
//! written since are found one by one, up to the first page that is no header of its place and epoch.
//!
//! The area is emptied by a new epoch in the superblock, in the same write that makes the originals superfluous.
//!
//! The checksum tells torn and rotten pages from good ones. It is no digest of the manifest: a disk that lies on purpose could
//! do so of clean blocks as well, which nobody compares either.

use super::crc::crc32c;
use super::geometry::{Geometry, Run};
use super::recovery::Source;
use super::superblock::{ImageId, Superblock, Uuid};
use super::{Page, PAGE_SIZE};

/// Most entries of a chunk. It holds a block of the largest size.
pub const MAX_ENTRIES: usize = 256;
/// Most pages of a chunk.
pub const CHUNK_PAGES: usize = MAX_ENTRIES + 1;
/// Fewest pages of an area.
pub const MIN_PAGES: u64 = 16;
/// Most pages of an area (16 TiB).
pub const MAX_PAGES: u64 = 1 << 32;

const MAGIC: [u8; 4] = *b"PUND";
const HEADER: usize = 32;
const ENTRY: usize = 12;
const ZERO: u64 = 1 << 63;

/// What the superblock says of the area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undo {
    /// New each time the area is emptied, from 1 on; 0 if there is no area.
    pub epoch: u64,
    /// Pages used at the last checkpoint; there may be more chunks behind them.
    pub used: u64,
    /// Dirty blocks whose originals lie in these pages.
    pub kept: u64,
}

impl Undo {
    /// A new area with nothing in it.
    pub fn opened(self) -> Self {
        Self {
            epoch: self.epoch.saturating_add(1),
            used: 0,
            kept: 0,
        }
    }

    /// The same area with nothing in it.
    pub fn emptied(self) -> Self {
        match self.epoch {
            0 => self,
            _ => self.opened(),
        }
    }
}

/// Whether an area takes more originals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does.
    Open,
    /// It has no room left.
    Full,
    /// It could not be written.
    Failed,
}

impl State {
    /// The word for it in the status line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Full => "full",
            Self::Failed => "failed",
        }
    }

    /// The state that `word` names.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Open, Self::Full, Self::Failed]
            .into_iter()
            .find(|s| s.word() == word)
    }
}

/// What binds a chunk to its metadata, image, epoch and place.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The metadata's UUID.
    pub meta_uuid: &'a Uuid,
    /// The image whose blocks the originals are.
    pub image_id: &'a ImageId,
    /// The area's epoch.
    pub epoch: u64,
    /// The page of the area at which the chunk begins.
    pub at: u64,
}

impl<'a> Place<'a> {
    /// Page `at` of the area of `sb`.
    pub fn new(sb: &'a Superblock, at: u64) -> Self {
        Self {
            meta_uuid: &sb.meta_uuid,
            image_id: &sb.image_id,
            epoch: sb.undo.epoch,
            at,
        }
    }
}

fn header_crc(place: &Place<'_>, page: &Page) -> u32 {
    let seed = crc32c(crc32c(0, place.meta_uuid), place.image_id);
    crc32c(seed, page.get(4..).unwrap_or(&[]))
}

fn put(page: &mut Page, at: usize, bytes: &[u8]) {
    if let Some(to) = page.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

fn get<const N: usize>(page: &Page, at: usize) -> [u8; N] {
    page.get(at..at + N)
        .and_then(|b| b.try_into().ok())
        .unwrap_or([0; N])
}

/// log2 of the pages that a block takes.
pub fn page_bits(geometry: &Geometry) -> u32 {
    geometry
        .block_shift()
        .saturating_sub(PAGE_SIZE.trailing_zeros())
}

/// The pages of the blocks of `run`, which are whole.
pub fn pages_of(geometry: &Geometry, run: Run) -> Run {
    let bits = page_bits(geometry);
    Run {
        start: run.start.wrapping_shl(bits),
        end: run.end.wrapping_shl(bits),
    }
}

/// The whole blocks that so many pages are.
pub fn blocks_in(geometry: &Geometry, pages: u64) -> u64 {
    pages.wrapping_shr(page_bits(geometry))
}

/// Whether all of a page is zero.
pub fn is_zero(page: &Page) -> bool {
    // Without an early end in the inner loop the compiler makes it many bytes at a time.
    page.chunks_exact(512)
        .all(|part| part.iter().fold(0, |any, b| any | b) == 0)
}

/// Fills the header of a chunk.
pub struct Writer {
    entries: usize,
    data: usize,
}

impl Writer {
    /// A chunk without entries.
    pub fn new(header: &mut Page) -> Self {
        header.fill(0);
        Self {
            entries: 0,
            data: 0,
        }
    }

    /// Entries so far.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Data pages so far.
    pub fn data(&self) -> usize {
        self.data
    }

    /// Adds page `page` of the data device, which holds `content`. Whether its content is to follow as the next data page; a
    /// zero one is not.
    ///
    /// A chunk that is full takes no more: the caller sees to it that there are at most [`MAX_ENTRIES`].
    pub fn push(&mut self, header: &mut Page, page: u64, content: &Page) -> bool {
        if self.entries >= MAX_ENTRIES {
            return false;
        }
        let is_data = !is_zero(content);
        let at = HEADER + self.entries * ENTRY;
        let word = if is_data { page } else { page | ZERO };
        put(header, at, &word.to_le_bytes());
        let crc = if is_data { crc32c(0, content) } else { 0 };
        put(header, at + 8, &crc.to_le_bytes());
        self.entries += 1;
        self.data += usize::from(is_data);
        is_data
    }

    /// Seals the header.
    pub fn finish(self, header: &mut Page, place: &Place<'_>) {
        put(header, 4, &MAGIC);
        put(header, 8, &place.epoch.to_le_bytes());
        put(header, 16, &place.at.to_le_bytes());
        // CAST: At most 256.
        put(header, 24, &(self.entries as u32).to_le_bytes());
        put(header, 28, &(self.data as u32).to_le_bytes());
        let crc = header_crc(place, header);
        put(header, 0, &crc.to_le_bytes());
    }
}

/// A chunk that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The page of the area at which its header lies.
    pub at: u64,
    /// Its entries.
    pub entries: usize,
    /// Data pages behind the header.
    pub data: u64,
}

impl Chunk {
    /// One past its last page.
    pub fn end(&self) -> u64 {
        self.at.saturating_add(1).saturating_add(self.data)
    }
}

/// One page that a chunk tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The page of the data device.
    pub page: u64,
    /// The page of the area that has its content; `None` if it is zero.
    pub at: Option<u64>,
    /// The checksum of the content.
    pub crc: u32,
}

impl Entry {
    /// Whether `content` is what the entry tells of.
    pub fn verify(&self, content: &Page) -> bool {
        match self.at {
            Some(_) => crc32c(0, content) == self.crc,
            None => is_zero(content),
        }
    }
}

/// The chunk whose header `page` is, if it is one of this place, in an area of `pages` pages.
pub fn decode(page: &Page, place: &Place<'_>, pages: u64) -> Option<Chunk> {
    if get::<4>(page, 4) != MAGIC
        || u64::from_le_bytes(get(page, 8)) != place.epoch
        || u64::from_le_bytes(get(page, 16)) != place.at
        || u32::from_le_bytes(get(page, 0)) != header_crc(place, page)
    {
        return None;
    }
    let entries = usize::try_from(u32::from_le_bytes(get(page, 24))).ok()?;
    let chunk = Chunk {
        at: place.at,
        entries,
        data: u32::from_le_bytes(get(page, 28)).into(),
    };
    let zero = entries_of(page, &chunk).filter(|e| e.at.is_none()).count();
    // CAST: At most 256.
    let fits = (1..=MAX_ENTRIES).contains(&entries)
        && chunk.data + zero as u64 == entries as u64
        && chunk.end() <= pages;
    fits.then_some(chunk)
}

/// The entries of a chunk, from its header.
pub fn entries_of<'a>(page: &'a Page, chunk: &Chunk) -> impl Iterator<Item = Entry> + 'a {
    let mut next = chunk.at.saturating_add(1);
    (0..chunk.entries.min(MAX_ENTRIES)).map(move |i| {
        let at = HEADER + i * ENTRY;
        let word = u64::from_le_bytes(get(page, at));
        let has_data = word & ZERO == 0;
        let entry = Entry {
            page: word & !ZERO,
            at: has_data.then_some(next),
            crc: u32::from_le_bytes(get(page, at + 8)),
        };
        next = next.saturating_add(u64::from(has_data));
        entry
    })
}

/// What a walk through the area found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// One past the last page of the last chunk.
    pub end: u64,
    /// Headers that the superblock vouches for and that are damaged or cannot be read; how many chunks they hid is not known.
    pub damaged: u64,
}

/// Goes through the chunks of the area from page `from` on, and gives each with its header.
///
/// Up to where the superblock says that there are chunks, a damaged header is skipped, with all pages up to the next good
/// one. Behind it the first page that is no header ends the walk: there a crash may have cut.
pub fn walk(
    source: &mut impl Source,
    sb: &Superblock,
    from: u64,
    buffer: &mut Page,
    mut each: impl FnMut(&Chunk, &Page),
) -> Found {
    let pages = sb.layout.undo_pages;
    let known = sb.undo.used.min(pages);
    let mut found = Found {
        end: from,
        damaged: 0,
    };
    let mut at = from;
    let mut lost = false;
    while at < pages {
        let read = source.read(sb.layout.undo_start.saturating_add(at), buffer);
        let chunk = match read {
            Ok(()) => decode(buffer, &Place::new(sb, at), pages),
            Err(_) => None,
        };
        match chunk {
            Some(chunk) => {
                each(&chunk, buffer);
                at = chunk.end();
                found.end = at;
                lost = false;
            }
            None if at < known => {
                // Its data pages are not headers either, and count as one.
                found.damaged += u64::from(!lost);
                lost = true;
                at += 1;
                found.end = at;
            }
            None => break,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Result};
    use crate::layout::{Layout, Placement};
    use crate::superblock::Root;
    extern crate std;
    use std::vec;
    use std::vec::Vec;

    struct Disk(Vec<Page>);

    impl Source for Disk {
        fn read(&mut self, page: u64, into: &mut Page) -> Result {
            *into = *self.0.get(page as usize).ok_or(Error::Io(page))?;
            Ok(())
        }
    }

    fn superblock(undo_pages: u64) -> Superblock {
        let geometry = Geometry::new(8 * 1000, 12, 20).unwrap();
        let pages = Layout::total_pages(&geometry, 16) + undo_pages;
        Superblock {
            sequence: 1,
            meta_uuid: [1; 16],
            data_uuid: [2; 16],
            data_sectors: 8 * 1001,
            image_bytes: 0,
            geometry,
            layout: Layout::with_undo(Placement::Separate, &geometry, pages, 16, undo_pages)
                .unwrap(),
            clean: true,
            needs_check: false,
            provisioning: false,
            root: Root {
                area: 0,
                seq: 1,
                log_seq: 1,
                previous_log_seq: 0,
                dirty_blocks: 0,
                stale_blocks: 0,
            },
            generation: 0,
            image_id: [3; 32],
            undo: Undo {
                epoch: 1,
                used: 0,
                kept: 0,
            },
        }
    }

    /// Appends a chunk of these pages, each full of a byte; returns the page behind it.
    fn append(disk: &mut Disk, sb: &Superblock, at: u64, pages: &[(u64, u8)]) -> u64 {
        let mut header = [0; PAGE_SIZE];
        let mut writer = Writer::new(&mut header);
        let start = (sb.layout.undo_start + at) as usize;
        let mut next = start + 1;
        for (page, fill) in pages {
            if writer.push(&mut header, *page, &[*fill; PAGE_SIZE]) {
                disk.0[next] = [*fill; PAGE_SIZE];
                next += 1;
            }
        }
        writer.finish(&mut header, &Place::new(sb, at));
        disk.0[start] = header;
        (next as u64) - sb.layout.undo_start
    }

    fn disk(sb: &Superblock) -> Disk {
        Disk(vec![
            [0; PAGE_SIZE];
            (sb.layout.undo_start + sb.layout.undo_pages) as usize
        ])
    }

    fn pages_found(disk: &mut Disk, sb: &Superblock) -> (Vec<u64>, Found) {
        let mut got = Vec::new();
        let found = walk(disk, sb, 0, &mut [0; PAGE_SIZE], |chunk, page| {
            got.extend(entries_of(page, chunk).map(|e| e.page));
        });
        (got, found)
    }

    #[test]
    fn chunks_are_found_one_after_the_other() {
        let sb = superblock(64);
        let mut disk = disk(&sb);
        let end = append(&mut disk, &sb, 0, &[(5, 1), (6, 0), (7, 2)]);
        assert_eq!(end, 3, "a zero page takes no room");
        let end = append(&mut disk, &sb, end, &[(999, 0)]);
        assert_eq!(end, 4);
        let (got, found) = pages_found(&mut disk, &sb);
        assert_eq!(got, [5, 6, 7, 999]);
        assert_eq!(found, Found { end: 4, damaged: 0 });

        let mut page = disk.0[sb.layout.undo_start as usize];
        let chunk = decode(&page, &Place::new(&sb, 0), 64).unwrap();
        let all: Vec<_> = entries_of(&page, &chunk).collect();
        assert_eq!([all[0].at, all[1].at, all[2].at], [Some(1), None, Some(2)]);
        assert!(all[0].verify(&[1; PAGE_SIZE]) && !all[0].verify(&[2; PAGE_SIZE]));
        assert!(all[1].verify(&[0; PAGE_SIZE]) && !all[1].verify(&[2; PAGE_SIZE]));
        // Any bit that flips makes it none.
        for bit in 0..PAGE_SIZE * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&page, &Place::new(&sb, 0), 64), None, "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(decode(&page, &Place::new(&sb, 0), 2), None, "past the end");
    }

    #[test]
    fn nothing_of_another_epoch_image_or_place_counts() {
        let sb = superblock(64);
        let mut disk = disk(&sb);
        append(&mut disk, &sb, 0, &[(5, 1)]);
        let emptied = Superblock {
            undo: sb.undo.emptied(),
            ..sb
        };
        let other_image = Superblock {
            image_id: [4; 32],
            ..sb
        };
        let other_uuid = Superblock {
            meta_uuid: [4; 16],
            ..sb
        };
        for other in [emptied, other_image, other_uuid] {
            assert_eq!(pages_found(&mut disk, &other).0, []);
        }
        // A header in the place of another.
        disk.0.swap(
            sb.layout.undo_start as usize,
            sb.layout.undo_start as usize + 2,
        );
        assert_eq!(pages_found(&mut disk, &sb).0, []);
        assert_eq!(Undo::default().emptied(), Undo::default());
    }

    #[test]
    fn damage_hides_no_more_than_its_chunk() {
        let mut sb = superblock(64);
        let mut disk = disk(&sb);
        let mut at = 0;
        for n in 0..5 {
            at = append(&mut disk, &sb, at, &[(n * 2, 1), (n * 2 + 1, 7)]);
        }
        sb.undo.used = 9;
        // The second header; the fourth and fifth lie behind what the superblock knows.
        disk.0[sb.layout.undo_start as usize + 3][40] ^= 1;
        let (got, found) = pages_found(&mut disk, &sb);
        assert_eq!(got, [0, 1, 4, 5, 6, 7, 8, 9]);
        assert_eq!(
            found,
            Found {
                end: 15,
                damaged: 1
            }
        );
        disk.0[sb.layout.undo_start as usize + 9][40] ^= 1;
        let (got, found) = pages_found(&mut disk, &sb);
        assert_eq!(got, [0, 1, 4, 5], "a cut hides all that follows");
        assert_eq!(found, Found { end: 9, damaged: 1 });
    }

    #[test]
    fn any_bytes_are_no_chunk() {
        let sb = superblock(64);
        let mut disk = disk(&sb);
        let mut seed = 1u64;
        for page in &mut disk.0 {
            for byte in page.iter_mut() {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                *byte = (seed >> 56) as u8;
            }
        }
        assert_eq!(pages_found(&mut disk, &sb).0, []);
    }
}
