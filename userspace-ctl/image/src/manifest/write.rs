// SPDX-License-Identifier: GPL-2.0

//! Writing a manifest.

use std::mem::take;

use super::head::{kind, Head, Section, FIXED_LEN, FLAG_REQUIRED, FLAG_ZSTD, SECTION_LEN};
use super::page::{BlockRef, Page};
use super::{page_checksum, FrameTable, Info};
use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::wire::Reader;
use crate::{merkle, BLOCK_SIZE, DIGESTS_PER_PAGE, MAX_BLOCKS};

/// zstd's level for the page index and the frame table: small, and written once.
const LEVEL: i32 = 19;
/// Above this many bytes the level costs more time than it saves bytes.
const LEVEL_LARGE: (usize, i32) = (8 << 20, 6);

/// Bytes of a page's entry in the page index.
const ENTRY_LEN: usize = super::INDEX_ENTRY_LEN as usize;

/// Collects the blocks of an image in order, and ends as a manifest.
#[derive(Debug, Default)]
pub struct ManifestWriter {
    hashes: Vec<Digest>,
    index: Vec<u8>,
    pages: Vec<u8>,
    /// Blocks of the page that is not full.
    pending: Vec<BlockRef>,
    blocks: u64,
    /// The hash of a whole page of zero blocks, once it was needed.
    zero_page: Option<Digest>,
}

impl ManifestWriter {
    /// A manifest of no blocks.
    pub fn new() -> Self {
        ManifestWriter::default()
    }

    /// Appends a block.
    pub fn push(&mut self, block: BlockRef) {
        self.pending.push(block);
        self.blocks += 1;
        if self.pending.len() == DIGESTS_PER_PAGE {
            self.end_page();
        }
    }

    /// Appends `count` blocks of zeros; whole pages of them cost next to nothing.
    pub fn push_zeros(&mut self, mut count: u64) {
        while count > 0 {
            if self.pending.is_empty() && count >= DIGESTS_PER_PAGE as u64 {
                self.blocks += DIGESTS_PER_PAGE as u64;
                count -= DIGESTS_PER_PAGE as u64;
                let hash = *self
                    .zero_page
                    .get_or_insert_with(|| Page::zero(DIGESTS_PER_PAGE).hash());
                self.add_page(hash, &[]);
            } else {
                self.push(BlockRef::zero());
                count -= 1;
            }
        }
    }

    fn end_page(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let page = Page::new(&self.pending);
        self.pending.clear();
        let hash = page.hash();
        let bytes = if page.is_zero() {
            Vec::new()
        } else {
            page.encode()
        };
        self.add_page(hash, &bytes);
    }

    fn add_page(&mut self, hash: Digest, bytes: &[u8]) {
        self.index.extend(hash.as_bytes());
        self.index.extend((bytes.len() as u32).to_le_bytes());
        self.index.extend(page_checksum(bytes).to_le_bytes());
        self.hashes.push(hash);
        self.pages.extend(bytes);
    }

    /// Gives all blocks that are not zero another slot: for who knows them only in the end. The digests stay.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] if `map` has no slot for a block.
    pub fn map_slots(&mut self, map: &dyn Fn(u64) -> Option<u64>) -> Result<(), FormatError> {
        self.end_page();
        let (index, pages) = (take(&mut self.index), take(&mut self.pages));
        let mut rest = pages.as_slice();
        let mut left = self.blocks;
        for entry in index.chunks_exact(ENTRY_LEN) {
            let mut reader = Reader::new("the page index", entry);
            let hash = Digest::from_bytes(reader.array()?);
            let len = reader.u32()? as usize;
            let blocks = left.min(DIGESTS_PER_PAGE as u64);
            left -= blocks;
            let mut mapped = Vec::new();
            if len > 0 {
                let (page, after) = rest.split_at(len.min(rest.len()));
                rest = after;
                let page = Page::decode(page, blocks as usize, u64::MAX)?.with_slots(map);
                let missing = || FormatError::invalid("the image", "a block of it lies nowhere");
                mapped = page.ok_or_else(missing)?.encode();
            }
            self.index.extend(hash.as_bytes());
            self.index.extend((mapped.len() as u32).to_le_bytes());
            self.index.extend(page_checksum(&mapped).to_le_bytes());
            self.pages.extend(mapped);
        }
        Ok(())
    }

    /// Ends the manifest; returns the image's id and the manifest's bytes.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] for an image of no blocks or of more than [`MAX_BLOCKS`].
    pub fn finish(
        mut self,
        frames: &FrameTable,
        info: &Info,
    ) -> Result<(ImageId, Vec<u8>), FormatError> {
        self.end_page();
        if self.blocks == 0 || self.blocks > MAX_BLOCKS {
            let why = format!("it has {} blocks", self.blocks);
            return Err(FormatError::invalid("the image", why));
        }
        let size = self.blocks * BLOCK_SIZE as u64;
        let image = merkle::root(size, self.hashes.iter());
        let info = info.encode();
        let frames = frames.encode();
        let parts = [
            (kind::PAGE_INDEX, FLAG_REQUIRED | FLAG_ZSTD, &self.index),
            (kind::FRAMES, FLAG_REQUIRED | FLAG_ZSTD, &frames),
            (kind::INFO, 0, &info),
            (kind::PAGES, FLAG_REQUIRED, &self.pages),
        ];
        let mut offset = (FIXED_LEN + parts.len() * SECTION_LEN) as u64;
        let mut sections = Vec::new();
        let mut body = Vec::new();
        for (kind, flags, raw) in parts {
            let packed = if flags & FLAG_ZSTD != 0 {
                Some(compress(raw)?)
            } else {
                None
            };
            let stored = packed.as_ref().unwrap_or(raw);
            sections.push(Section::new(kind, flags, offset, stored, raw.len() as u64));
            offset += stored.len() as u64;
            body.extend_from_slice(stored);
        }
        let mut bytes = Head::new(image, size, sections).write();
        bytes.extend(body);
        Ok((image, bytes))
    }
}

fn compress(raw: &[u8]) -> Result<Vec<u8>, FormatError> {
    let level = if raw.len() > LEVEL_LARGE.0 {
        LEVEL_LARGE.1
    } else {
        LEVEL
    };
    zstd::bulk::compress(raw, level)
        .map_err(|error| FormatError::invalid("a section of the manifest", error.to_string()))
}
