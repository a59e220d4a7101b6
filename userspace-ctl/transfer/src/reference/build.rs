// SPDX-License-Identifier: GPL-2.0

//! Making an image whose packs stay where the disk is.

use std::collections::HashMap;
use std::io;

use pristine_image::manifest::{BlockRef, FrameTable, Info, ManifestWriter};
use pristine_image::{
    is_zero, BuildError, Digest, ImageId, PackId, ReadAt, BLOCK_SIZE, MAX_BLOCKS,
};
use rayon::prelude::*;

use super::pack::{VirtualPack, FRAME_BLOCKS, PACK_BLOCKS};
use super::Reference;
use crate::error::{Error, Result};
use crate::open::Watch;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks that are read at once, by each core.
const READ_BLOCKS: usize = 256;

/// An image of which only the manifest is made.
#[derive(Clone, Debug)]
pub struct Referenced {
    /// The image's id.
    pub image: ImageId,
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// Blocks in the image.
    pub blocks: u64,
    /// Blocks of zeros among them.
    pub zero_blocks: u64,
    /// Distinct blocks that are not zero.
    pub unique_blocks: u64,
    /// The packs that the manifest needs, with their first byte on the disk and their blocks.
    pub packs: Vec<(PackId, u64, u64)>,
}

impl Referenced {
    /// What a store must have in place of each pack, for a disk of `size` bytes at `source`.
    pub fn references(&self, source: &str, size: u64) -> Vec<(PackId, Reference)> {
        let packs = self.packs.iter();
        packs
            .map(|&(pack, start, blocks)| {
                let reference = Reference {
                    source: source.to_owned(),
                    size,
                    start,
                    blocks,
                };
                (pack, reference)
            })
            .collect()
    }
}

/// Makes the manifest of a disk whose blocks are to be read from it later. `view` is the disk as the image shall have
/// it: of the disk's own blocks, some may be zero there. It is read once.
///
/// # Errors
/// Those of the disk, [`Error::Cancelled`], and [`Error::Build`] for a size that no image has.
pub fn build_reference(
    disk: &dyn ReadAt,
    view: &dyn ReadAt,
    name: &str,
    pad: bool,
    info: &Info,
    watch: &Watch<'_>,
) -> Result<Referenced> {
    let blocks = disk.len().div_ceil(BLOCK);
    if blocks == 0 || blocks > MAX_BLOCKS || (disk.len() % BLOCK != 0 && !pad) {
        return Err(Error::Build(BuildError::Size {
            path: name.into(),
            len: disk.len(),
        }));
    }
    let mut indexer = Indexer::default();
    let mut first = 0;
    while first < blocks {
        watch.check()?;
        let pack = VirtualPack {
            start: first * BLOCK,
            blocks: (blocks - first).min(PACK_BLOCKS),
        };
        let read = |error| Error::io(format!("read {name} at byte {}", pack.start), error);
        let content = read_blocks(disk, view, &pack).map_err(read)?;
        indexer.add(&pack, &content)?;
        first += pack.blocks;
        watch.step("building", first * BLOCK, Some(blocks * BLOCK));
    }
    if !disk
        .is_unchanged()
        .map_err(|error| Error::io(format!("look at {name}"), error))?
    {
        return Err(Error::Build(BuildError::Changed(name.into())));
    }
    let format = |error| Error::Build(BuildError::Format(error));
    let (image, manifest) = indexer
        .manifest
        .finish(&indexer.table, info)
        .map_err(format)?;
    Ok(Referenced {
        image,
        manifest,
        blocks,
        zero_blocks: indexer.zero_blocks,
        unique_blocks: indexer.slots.len() as u64,
        packs: indexer.packs,
    })
}

/// The content of a pack's blocks, and the digest of each that is not zero.
struct Content {
    bytes: Vec<u8>,
    digests: Vec<Option<Digest>>,
}

fn read_blocks(disk: &dyn ReadAt, view: &dyn ReadAt, pack: &VirtualPack) -> io::Result<Content> {
    let mut bytes = vec![0; (pack.blocks * BLOCK) as usize];
    let mut digests = vec![None; pack.blocks as usize];
    let parts = bytes
        .par_chunks_mut(READ_BLOCKS * BLOCK_SIZE)
        .zip(digests.par_chunks_mut(READ_BLOCKS))
        .enumerate();
    parts.try_for_each(|(number, (bytes, digests))| {
        let at = pack.start + (number * READ_BLOCKS * BLOCK_SIZE) as u64;
        let there = disk.len().saturating_sub(at).min(bytes.len() as u64);
        let there_len = there as usize;
        if disk.is_hole(at..at + there) {
            return Ok(());
        }
        disk.read_at(at, &mut bytes[..there_len])?;
        if view.is_hole(at..at + there) {
            return Ok(());
        }
        let mut seen = vec![0; bytes.len()];
        view.read_at(at, &mut seen[..there_len])?;
        for (block, digest) in seen.chunks_exact(BLOCK_SIZE).zip(digests) {
            *digest = (!is_zero(block)).then(|| Digest::of(block));
        }
        Ok::<(), io::Error>(())
    })?;
    Ok(Content { bytes, digests })
}

#[derive(Default)]
struct Indexer {
    manifest: ManifestWriter,
    table: FrameTable,
    /// The slot of each distinct block.
    slots: HashMap<Digest, u64>,
    zero_blocks: u64,
    packs: Vec<(PackId, u64, u64)>,
}

impl Indexer {
    /// Adds a pack's blocks. Only frames that have new blocks are listed, and only packs that have such frames.
    fn add(&mut self, pack: &VirtualPack, content: &Content) -> Result<()> {
        let format = |error| Error::Build(BuildError::Format(error));
        let mut used = false;
        for (frame, digests) in content.digests.chunks(FRAME_BLOCKS as usize).enumerate() {
            let first_slot = self.table.slots();
            let mut new = false;
            for (index, digest) in digests.iter().enumerate() {
                let Some(digest) = *digest else {
                    self.zero_blocks += 1;
                    self.manifest.push(BlockRef::zero());
                    continue;
                };
                let slot = *self.slots.entry(digest).or_insert_with(|| {
                    new = true;
                    first_slot + index as u64
                });
                let slot = Some(slot);
                self.manifest.push(BlockRef { digest, slot });
            }
            if new {
                let range = pack.frame_range(frame as u64);
                let len = (range.end - range.start) as u32;
                let blocks = digests.len() as u32;
                let pushed = self.table.push_frame(range.start as u32, len, blocks);
                pushed.map_err(format)?;
                used = true;
            }
        }
        if used {
            let moved = Moved {
                start: pack.start,
                bytes: &content.bytes,
            };
            let name = pack
                .name(&moved)
                .map_err(|error| Error::io("make a pack", error))?;
            self.table.end_pack(name, pack.len()).map_err(format)?;
            self.packs.push((name, pack.start, pack.blocks));
        }
        Ok(())
    }
}

/// A part of a disk in memory, at its place.
#[derive(Debug)]
struct Moved<'a> {
    start: u64,
    bytes: &'a [u8],
}

impl ReadAt for Moved<'_> {
    fn len(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let there = offset
            .checked_sub(self.start)
            .and_then(|at| self.bytes.get(at as usize..at as usize + buffer.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(there);
        Ok(())
    }
}
