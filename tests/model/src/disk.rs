// SPDX-License-Identifier: GPL-2.0

//! A device in memory, and damage to it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use arbitrary::Arbitrary;
use pristine_metadata::Storage;
use pristine_shared::recovery::Source;
use pristine_shared::superblock::Uuid;
use pristine_shared::{Error, Page, PAGE_SECTORS, PAGE_SIZE};

/// Bytes that a disk writes wholly or not at all.
pub const SECTOR: usize = 512;

/// A device: the pages that were written, all others zero. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Disk {
    pages: u64,
    written: BTreeMap<u64, Arc<Page>>,
}

impl Disk {
    /// An empty device.
    pub fn new(pages: u64) -> Self {
        Self {
            pages,
            written: BTreeMap::new(),
        }
    }

    /// Its size in pages.
    pub fn len(&self) -> u64 {
        self.pages
    }

    /// Whether it has no room for anything.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// A page, if it lies on the device.
    pub fn page(&self, n: u64) -> Option<&Page> {
        const BLANK: &Page = &[0; PAGE_SIZE];
        (n < self.pages).then(|| self.written.get(&n).map_or(BLANK, |page| &**page))
    }

    /// A page to be changed.
    ///
    /// # Panics
    ///
    /// If it does not lie on the device.
    pub fn page_mut(&mut self, n: u64) -> &mut Page {
        assert!(n < self.pages, "page {n} of {}", self.pages);
        let page = self.written.entry(n);
        Arc::make_mut(page.or_insert_with(|| Arc::new([0; PAGE_SIZE])))
    }

    /// Writes those sectors of `page` whose bit in `sectors` is set, as a power cut in the middle of the write would
    /// leave it; all bits set is the whole write.
    pub fn write_sectors(&mut self, n: u64, page: &Page, sectors: u8) {
        let to = self.page_mut(n);
        for i in (0..8).filter(|i| sectors & (1 << i) != 0) {
            let bytes = i * SECTOR..(i + 1) * SECTOR;
            to[bytes.clone()].copy_from_slice(&page[bytes]);
        }
    }

    /// The numbers of the pages that were ever written.
    pub fn written(&self) -> impl Iterator<Item = u64> + '_ {
        self.written.keys().copied()
    }
}

impl Source for Disk {
    fn read(&mut self, page: u64, into: &mut Page) -> pristine_shared::Result {
        *into = *self.page(page).ok_or(Error::Io(page))?;
        Ok(())
    }
}

impl Storage for Disk {
    fn path(&self) -> &Path {
        Path::new("disk")
    }

    fn sectors(&self) -> u64 {
        self.pages * PAGE_SECTORS
    }

    fn writable(&self) -> bool {
        true
    }

    fn read(&mut self, page: u64, into: &mut Page) -> io::Result<()> {
        *into = *self.page(page).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(())
    }

    fn write(&mut self, page: u64, from: &Page) -> io::Result<()> {
        self.page(page).ok_or(io::ErrorKind::InvalidInput)?;
        *self.page_mut(page) = *from;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a page is, as far as its checksums go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A superblock copy or a label: CRC at byte 8 over all from byte 12.
    Root,
    /// An index or plane page: CRC at byte 4 over all from byte 8, seeded with the UUID.
    Checkpoint,
    /// A log record: a CRC for each sector at its byte 0 over the rest, seeded with the UUID.
    Log,
}

/// Makes the checksums of a page right, whatever else it holds. Blank sectors of a record stay blank.
pub fn fix_crc(page: &mut Page, kind: Kind, uuid: &Uuid) {
    let seed = crc32c::crc32c(uuid);
    match kind {
        Kind::Root => {
            let crc = crc32c::crc32c(&page[12..]);
            page[8..12].copy_from_slice(&crc.to_le_bytes());
        }
        Kind::Checkpoint => {
            let crc = crc32c::crc32c_append(seed, &page[8..]);
            page[4..8].copy_from_slice(&crc.to_le_bytes());
        }
        Kind::Log => {
            for sector in page.chunks_exact_mut(SECTOR) {
                if *sector != [0; SECTOR] {
                    let crc = crc32c::crc32c_append(seed, &sector[4..]);
                    sector[..4].copy_from_slice(&crc.to_le_bytes());
                }
            }
        }
    }
}

/// A change to a page.
#[derive(Arbitrary, Clone, Debug)]
pub enum Damage {
    /// A byte becomes another.
    Byte(u16, u8),
    /// A little-endian word becomes another; the place is counted in eight bytes.
    Word(u16, u64),
    /// A word grows by so much.
    Add(u16, i8),
    /// A bit flips.
    Flip(u16),
    /// These sectors become zero.
    Blank(u8),
    /// Some bytes become others.
    Bytes(u16, Vec<u8>),
}

impl Damage {
    /// Does it to `page`.
    pub fn apply(&self, page: &mut Page) {
        let word_at = |n: u16| usize::from(n) % (PAGE_SIZE / 8) * 8;
        match self {
            Self::Byte(at, to) => page[usize::from(*at) % PAGE_SIZE] = *to,
            Self::Word(at, to) => {
                page[word_at(*at)..][..8].copy_from_slice(&to.to_le_bytes());
            }
            Self::Add(at, by) => {
                let word = &mut page[word_at(*at)..][..8];
                let old = u64::from_le_bytes((&*word).try_into().unwrap());
                word.copy_from_slice(&old.wrapping_add_signed(i64::from(*by)).to_le_bytes());
            }
            Self::Flip(bit) => {
                page[usize::from(*bit) / 8 % PAGE_SIZE] ^= 1 << (bit % 8);
            }
            Self::Blank(sectors) => {
                for i in (0..8).filter(|i| sectors & (1 << i) != 0) {
                    page[i * SECTOR..(i + 1) * SECTOR].fill(0);
                }
            }
            Self::Bytes(at, bytes) => {
                let at = usize::from(*at) % PAGE_SIZE;
                for (to, from) in page[at..].iter_mut().zip(bytes) {
                    *to = *from;
                }
            }
        }
    }
}
