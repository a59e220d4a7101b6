// SPDX-License-Identifier: GPL-2.0

//! Digests of what is compared: of an image in a store, and of a disk.

use std::io;

use pristine_image::delta::{DigestList, ImageDigests};
use pristine_image::merkle::Blinding;
use pristine_image::{Digest, FormatError, ImageId, BLOCK_SIZE, DIGESTS_PER_PAGE};

use super::Local;
use crate::reader::{ImageReader, LoadError};

/// The digests of an image in a store, page by page from its manifest.
pub(crate) struct ReaderDigests<'a>(pub(crate) &'a ImageReader);

impl ImageDigests<LoadError> for ReaderDigests<'_> {
    fn image(&self) -> ImageId {
        self.0.image()
    }

    fn blinding(&self) -> Option<Blinding> {
        self.0.manifest().blinding().copied()
    }

    fn blocks(&self) -> u64 {
        self.0.blocks()
    }

    fn page_hash(&self, page: u64) -> Result<Digest, LoadError> {
        let hash = self.0.manifest().page_hash(page);
        hash.ok_or_else(|| {
            FormatError::invalid("a manifest", format!("it has no page {page}")).into()
        })
    }

    fn digests(&self, page: u64) -> Result<Vec<Digest>, LoadError> {
        let page = self.0.page(page).map_err(LoadError::Store)?;
        Ok(page.blocks().map(|block| block.digest).collect())
    }
}

/// Reads `blocks` blocks of a disk and hashes them with all cores: 32 bytes of memory for each. `progress` gets the
/// blocks that are done.
///
/// # Errors
/// The disk's.
pub fn digests_of_disk(
    local: &mut dyn Local,
    blocks: u64,
    progress: &mut dyn FnMut(u64),
) -> io::Result<DigestList> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
    let mut digests = vec![Digest::zero_block(); blocks as usize];
    let mut buffer = vec![0; threads * DIGESTS_PER_PAGE * BLOCK_SIZE];
    let mut first = 0;
    for part in digests.chunks_mut(threads * DIGESTS_PER_PAGE) {
        let content = &mut buffer[..part.len() * BLOCK_SIZE];
        local.read(first, content)?;
        std::thread::scope(|scope| {
            let pages = part.chunks_mut(DIGESTS_PER_PAGE);
            for (digests, content) in pages.zip(content.chunks(DIGESTS_PER_PAGE * BLOCK_SIZE)) {
                scope.spawn(move || {
                    digests.copy_from_slice(&Digest::of_each_block(content));
                });
            }
        });
        first += part.len() as u64;
        progress(first);
    }
    Ok(DigestList::new(digests))
}
