// SPDX-License-Identifier: GPL-2.0

//! The manifest: the digest of each block of an image, and where its content lies.
//!
//! A manifest is read in parts, so that one of a large image costs little:
//!
//! 1. [`Head::parse`] takes its first bytes, and tells where everything is.
//! 2. [`Manifest::load`] reads the page index and the frame table, and checks the page hashes against the
//!    image id: from here on, a page that fits its hash is as good as signed.
//! 3. [`Manifest::page_range`] and [`Manifest::decode_page`] yield one page (4 MiB of image) at a time.
//!
//! [`Manifest::parse`] does 1 and 2 on a manifest in memory.

mod blind;
mod frames;
mod head;
mod info;
mod page;
mod write;

use std::ops::Range;

pub use blind::blind;
pub use frames::{Frame, FrameTable, PackRef};
pub use head::{kind, Head, Section, FORMAT_VERSION};
pub use info::Info;
pub use page::{BlockRef, Page};
pub use write::ManifestWriter;

use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::merkle::{self, Blinding};
use crate::wire::Reader;
use crate::DIGESTS_PER_PAGE;

/// Bytes of a page's entry in the page index.
const INDEX_ENTRY_LEN: u64 = 32 + 4 + 8;

/// The most bytes that a page may take: each of 1024 blocks a run of its own, with a digest.
const MAX_PAGE_LEN: u32 = 64 << 10;

/// A page's entry in the page index.
#[derive(Clone, Debug)]
struct PageEntry {
    hash: Digest,
    /// Where it begins in the manifest, in bytes.
    offset: u64,
    /// Its stored length; 0 if all its blocks are zero.
    len: u32,
    checksum: u64,
}

/// A manifest whose page hashes are verified against its image id.
#[derive(Clone, Debug)]
pub struct Manifest {
    head: Head,
    pages: Vec<PageEntry>,
    frames: FrameTable,
    info: Info,
    blinding: Option<Blinding>,
}

impl Manifest {
    /// Loads the parts that are always needed; `read` returns the bytes of the manifest in a range.
    ///
    /// `expected` is the id of the image that is wanted; without one the manifest's own claim is verified, which
    /// protects against damage but not against a wrong image.
    ///
    /// # Errors
    /// Those of `read`, and [`FormatError`] for what is damaged, unknown or of another image.
    pub fn load<E: From<FormatError>>(
        head: Head,
        expected: Option<&ImageId>,
        mut read: impl FnMut(Range<u64>) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        if let Some(&expected) = expected.filter(|&&expected| expected != head.image()) {
            let found = head.image();
            return Err(FormatError::WrongImage { expected, found }.into());
        }
        let mut unpack = |section: &Section, limit: u64| -> Result<Vec<u8>, E> {
            section.check_claim(limit)?;
            Ok(section.unpack(&read(section.range())?, limit)?)
        };
        let index = head.required(kind::PAGE_INDEX)?;
        let raw = unpack(index, head.pages() * INDEX_ENTRY_LEN)?;
        let pages = parse_index(&raw, &head)?;
        drop(raw);
        let blinding = match head.section(kind::ENCRYPTION) {
            Some(section) => Some(blind::parse(&unpack(section, blind::LEN)?)?),
            None => None,
        };
        let hashes = pages.iter().map(|page| &page.hash);
        let found = merkle::image_id(head.size(), hashes, blinding.as_ref());
        if found != head.image() {
            let expected = head.image();
            return Err(FormatError::WrongImage { expected, found }.into());
        }
        let section = head.required(kind::FRAMES)?;
        let limit = FrameTable::max_encoded_len(head.blocks());
        let frames = FrameTable::decode(&unpack(section, limit)?)?;
        let info = match head.section(kind::INFO) {
            Some(section) => Info::decode(&unpack(section, info::MAX_LEN)?)?,
            None => Info::new(),
        };
        Ok(Manifest {
            head,
            pages,
            frames,
            info,
            blinding,
        })
    }

    /// Loads from a whole manifest in memory.
    ///
    /// Pages are checked one by one as they are decoded; [`Manifest::check_all`] checks them all at once.
    ///
    /// # Errors
    /// As [`Manifest::load`], and [`FormatError::Truncated`] or [`FormatError::Invalid`] for a wrong length.
    pub fn parse(bytes: &[u8], expected: Option<&ImageId>) -> Result<Self, FormatError> {
        let head = Head::parse(&bytes[..bytes.len().min(Head::MAX_LEN)])?;
        let have = bytes.len() as u64;
        if have < head.file_len() {
            return Err(FormatError::Truncated {
                what: "the manifest",
                needed: head.file_len() - have,
                have,
            });
        }
        if have > head.file_len() {
            let why = format!("{} bytes follow its end", have - head.file_len());
            return Err(FormatError::invalid("the manifest", why));
        }
        Manifest::load(head, expected, |range| {
            let range = range.start as usize..range.end as usize;
            // Sections lie within `file_len`, which is what there is.
            Ok(bytes.get(range).unwrap_or_default().to_vec())
        })
    }

    /// Checks every byte of a whole manifest in memory, also of sections that this library does not know.
    ///
    /// # Errors
    /// [`FormatError`] for the first thing that is wrong.
    pub fn check_all(&self, bytes: &[u8]) -> Result<(), FormatError> {
        let part = |range: Range<u64>| {
            let range = range.start as usize..range.end as usize;
            bytes.get(range).unwrap_or_default()
        };
        for section in self.head.sections() {
            section.check(part(section.range()))?;
        }
        for page in 0..self.pages() {
            self.decode_page(page, part(self.page_range(page)))?;
        }
        Ok(())
    }

    /// The image's id.
    pub fn image(&self) -> ImageId {
        self.head.image()
    }

    /// The image's size in bytes, a multiple of the block size.
    pub fn size(&self) -> u64 {
        self.head.size()
    }

    /// Blocks in the image.
    pub fn blocks(&self) -> u64 {
        self.head.blocks()
    }

    /// Pages in the manifest; page `n` covers the blocks from `n * DIGESTS_PER_PAGE`.
    pub fn pages(&self) -> u64 {
        self.head.pages()
    }

    /// The manifest's head.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Where the content of the blocks lies.
    pub fn frames(&self) -> &FrameTable {
        &self.frames
    }

    /// Whether the image is stored encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.blinding.is_some()
    }

    /// What the id is blinded with, if the image is an encrypted one; it must not be told.
    pub fn blinding(&self) -> Option<&Blinding> {
        self.blinding.as_ref()
    }

    /// Facts for people.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The blocks that a page covers.
    pub fn page_blocks(&self, page: u64) -> Range<u64> {
        let first = page
            .saturating_mul(DIGESTS_PER_PAGE as u64)
            .min(self.blocks());
        first..(first + DIGESTS_PER_PAGE as u64).min(self.blocks())
    }

    /// The hash of a page's digests, which the image id vouches for; `None` beyond the end.
    pub fn page_hash(&self, page: u64) -> Option<Digest> {
        let entry = self.pages.get(usize::try_from(page).ok()?);
        entry.map(|entry| entry.hash)
    }

    /// The bytes of the manifest that hold a page; empty for a page of zero blocks (and for one beyond the end).
    /// The ranges of consecutive pages are adjacent.
    pub fn page_range(&self, page: u64) -> Range<u64> {
        match usize::try_from(page)
            .ok()
            .and_then(|page| self.pages.get(page))
        {
            Some(entry) => entry.offset..entry.offset + u64::from(entry.len),
            None => 0..0,
        }
    }

    /// Decodes and verifies a page from its bytes in the manifest.
    ///
    /// # Errors
    /// [`FormatError`] if the bytes are damaged, or are not what the image id vouches for.
    pub fn decode_page(&self, page: u64, bytes: &[u8]) -> Result<Page, FormatError> {
        let name = || format!("page {page} of the manifest");
        let entry = usize::try_from(page)
            .ok()
            .and_then(|page| self.pages.get(page))
            .ok_or_else(|| FormatError::invalid(name(), "there is no such page"))?;
        let blocks = self.page_blocks(page);
        let blocks = (blocks.end - blocks.start) as usize;
        if bytes.len() != entry.len as usize {
            return Err(FormatError::Truncated {
                what: "a page of the manifest",
                needed: u64::from(entry.len).saturating_sub(bytes.len() as u64),
                have: bytes.len() as u64,
            });
        }
        if page_checksum(bytes) != entry.checksum {
            return Err(FormatError::Checksum(name()));
        }
        let decoded = if bytes.is_empty() {
            Page::zero(blocks)
        } else {
            Page::decode(bytes, blocks, self.frames.slots())?
        };
        if decoded.hash() != entry.hash {
            let why = "its digests are not those that the image id vouches for";
            return Err(FormatError::invalid(name(), why));
        }
        Ok(decoded)
    }
}

fn page_checksum(bytes: &[u8]) -> u64 {
    let digest = Digest::of(bytes);
    let mut first = [0; 8];
    first.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

fn parse_index(raw: &[u8], head: &Head) -> Result<Vec<PageEntry>, FormatError> {
    let mut reader = Reader::new("the manifest's page index", raw);
    let section = head.required(kind::PAGES)?.range();
    let mut offset = section.start;
    if raw.len() as u64 != head.pages() * INDEX_ENTRY_LEN {
        let why = format!("{} bytes for {} pages", raw.len(), head.pages());
        return Err(reader.invalid(why));
    }
    let mut pages = Vec::with_capacity(head.pages() as usize);
    for _ in 0..head.pages() {
        let hash = Digest::from_bytes(reader.array()?);
        let len = reader.u32()?;
        let checksum = reader.u64()?;
        if len > MAX_PAGE_LEN {
            return Err(reader.invalid(format!("a page of {len} bytes")));
        }
        pages.push(PageEntry {
            hash,
            offset,
            len,
            checksum,
        });
        // At most 2^22 pages of 2^32 bytes: no overflow.
        offset += u64::from(len);
    }
    if offset != section.end {
        return Err(reader.invalid("its pages do not add up to the page section"));
    }
    Ok(pages)
}
