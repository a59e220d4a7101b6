// SPDX-License-Identifier: GPL-2.0

//! Making an image from a raw image file or a block device.
//!
//! The source is read in batches of pages (4 MiB of image each). For each batch, all cores read and hash it while
//! they compress the new blocks of the batch before; in between, one thread decides in image order which blocks are
//! new, so that the same source always gives the same packs and manifest, whatever the number of cores. Packs are
//! hashed and handed to the [`PackSink`] by a thread of their own. Memory: about four batches, and 56 bytes for each
//! distinct block.

mod known;
mod packer;
mod source;

use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::Arc;

use rayon::prelude::*;
use zstd::bulk::Compressor;

pub use known::Known;
use packer::FrameBytes;
pub use packer::PackSink;
pub use source::{RawFile, ReadAt, Source};

use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::fs::FsError;
use crate::manifest::{BlockRef, Info, ManifestWriter};
use crate::{BLOCK_SIZE, DIGESTS_PER_PAGE, MAX_BLOCKS, MAX_FRAME_BLOCKS};

/// Pages in a batch.
const BATCH_PAGES: u64 = 8;
const PAGE_BYTES: usize = DIGESTS_PER_PAGE * BLOCK_SIZE;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The source cannot be opened.
    #[error("cannot open {path}: {error}", path = path.display())]
    Open {
        /// The source.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The block device is mounted or otherwise held.
    #[error("{} is in use (mounted?), its content would change while it is read", .0.display())]
    InUse(PathBuf),
    /// The source is neither a file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    NotASource(PathBuf),
    /// Reading failed.
    #[error("cannot read {path} at byte {offset}: {error}", path = path.display())]
    Read {
        /// The source.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// Why.
        error: io::Error,
    },
    /// The file systems on the source cannot be looked at.
    #[error("cannot look for free blocks in {path}: {error}", path = path.display())]
    Survey {
        /// The source.
        path: PathBuf,
        /// Why.
        error: FsError,
    },
    /// The file was written to while it was read.
    #[error("{} was changed while it was read", .0.display())]
    Changed(PathBuf),
    /// The source's size cannot be an image's.
    #[error("{path} has {len} bytes, an image has a multiple of {BLOCK_SIZE} and at most 16 TiB", path = path.display())]
    Size {
        /// The source.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
    },
    /// An option has an impossible value.
    #[error("{0}")]
    Option(String),
    /// Where the packs go refused one.
    #[error("cannot store a pack: {0}")]
    Sink(io::Error),
    /// Compression failed.
    #[error("cannot compress: {0}")]
    Compress(io::Error),
    /// The image does not fit the format.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// A thread of the build died.
    #[error("a worker thread of the build died: {0}")]
    Worker(String),
}

/// How to make an image.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// zstd's level, 1 to 19. Default 9.
    pub level: i32,
    /// Blocks in a frame, 1 to 256. Default 32: 128 KiB.
    pub frame_blocks: usize,
    /// A pack is ended when it has this many bytes, up to 64 MiB. Default 32 MiB.
    pub pack_target: u64,
    /// Append zeros to a source that does not end with a whole block. Default false.
    pub pad: bool,
    /// Facts for the manifest.
    pub info: Info,
    /// Threads to use; `None` for one for each core.
    pub threads: Option<usize>,
    /// Blocks that packs hold already, which are not stored again. Default: none.
    pub known: Arc<Known>,
}

impl Default for BuildOptions {
    fn default() -> Self {
        BuildOptions {
            level: 9,
            frame_blocks: 32,
            pack_target: 32 << 20,
            pad: false,
            info: Info::new(),
            threads: None,
            known: Arc::default(),
        }
    }
}

impl BuildOptions {
    fn check(&self) -> Result<(), BuildError> {
        let error = |text: &str| Err(BuildError::Option(text.to_owned()));
        if !(1..=19).contains(&self.level) {
            return error("the compression level must be 1 to 19");
        }
        if !(1..=MAX_FRAME_BLOCKS).contains(&self.frame_blocks) {
            return error("a frame must have 1 to 256 blocks");
        }
        if !(4096..=64 << 20).contains(&self.pack_target) {
            return error("the size of packs must be 4 KiB to 64 MiB");
        }
        Ok(())
    }
}

/// A finished image; its packs are where the [`PackSink`] put them.
#[derive(Clone, Debug)]
pub struct Built {
    /// The image's id.
    pub image: ImageId,
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// Blocks in the image.
    pub blocks: u64,
    /// Blocks of zeros among them, which cost nothing.
    pub zero_blocks: u64,
    /// Distinct blocks that are not zero; the rest are duplicates.
    pub unique_blocks: u64,
    /// Those of the distinct blocks that packs held already ([`BuildOptions::known`]).
    pub shared_blocks: u64,
    /// Packs that hold these, of which the image needs a part at least.
    pub shared_packs: u64,
    /// Packs made.
    pub packs: u64,
    /// Bytes in all packs.
    pub pack_bytes: u64,
}

/// Makes an image of `source`, gives its packs to `sink` and returns the manifest. `progress` gets the bytes of the
/// source that are done; setting `cancel` ends the build with [`BuildError::Cancelled`].
///
/// # Errors
/// [`BuildError`]; packs that went to the sink before remain there.
pub fn build(
    source: &Source,
    options: &BuildOptions,
    sink: &mut dyn PackSink,
    progress: &(dyn Fn(u64) + Sync),
    cancel: &AtomicBool,
) -> Result<Built, BuildError> {
    options.check()?;
    let blocks = source.len().div_ceil(BLOCK_SIZE as u64);
    if (source.padding() != 0 && !options.pad) || blocks == 0 || blocks > MAX_BLOCKS {
        return Err(BuildError::Size {
            path: source.path().to_owned(),
            len: source.len(),
        });
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads.unwrap_or(0))
        .build()
        .map_err(|error| BuildError::Worker(error.to_string()))?;
    let (frames, packer_input) = sync_channel::<Vec<FrameBytes>>(2);
    std::thread::scope(|scope| {
        let packer = scope.spawn(move || packer::run(packer_input, options.pack_target, sink));
        let indexed = pool.install(|| {
            let mut indexer = Indexer::new(options, blocks);
            let result = indexer.run(source, progress, cancel, |batch| frames.send(batch).is_ok());
            // The packer ends when the channel does.
            drop(frames);
            result.map(|()| indexer)
        });
        let packed = packer
            .join()
            .map_err(|_| BuildError::Worker("the packer".to_owned()))?;
        // If the packer failed, the indexer only saw its channel close: the packer knows why.
        let packed = packed?;
        let indexer = indexed?;
        source.check_unchanged()?;
        let new_packs = packed.table.packs().len();
        let mut writer = indexer.manifest;
        let mut table = packed.table;
        if indexer.shared > 0 {
            let slots;
            (table, slots) = options
                .known
                .table(indexer.slots.values().copied(), &table)?;
            writer.map_slots(&|slot| slots.get(slot))?;
        }
        let (image, manifest) = writer.finish(&table, &options.info)?;
        Ok(Built {
            image,
            manifest,
            blocks,
            zero_blocks: indexer.zero_blocks,
            unique_blocks: indexer.slots.len() as u64,
            shared_blocks: indexer.shared,
            shared_packs: (table.packs().len() - new_packs) as u64,
            packs: new_packs as u64,
            pack_bytes: packed.bytes,
        })
    })
}

/// A page of the source, read and hashed.
enum ReadPage {
    /// A hole of so many blocks.
    Hole(u64),
    /// Content, and the digest of each block that is not zero.
    Data(Vec<u8>, Vec<Option<Digest>>),
}

/// Decides which blocks are new.
struct Indexer<'a> {
    options: &'a BuildOptions,
    blocks: u64,
    manifest: ManifestWriter,
    /// The slot of each distinct block; of known blocks a provisional one.
    slots: HashMap<Digest, u64>,
    /// Known blocks among them.
    shared: u64,
    zero_blocks: u64,
    /// New blocks that do not fill a frame yet.
    pending: Vec<u8>,
}

impl<'a> Indexer<'a> {
    fn new(options: &'a BuildOptions, blocks: u64) -> Self {
        Indexer {
            options,
            blocks,
            manifest: ManifestWriter::new(),
            slots: HashMap::new(),
            shared: 0,
            zero_blocks: 0,
            pending: Vec::new(),
        }
    }

    fn run(
        &mut self,
        source: &Source,
        progress: &(dyn Fn(u64) + Sync),
        cancel: &AtomicBool,
        send: impl Fn(Vec<FrameBytes>) -> bool,
    ) -> Result<(), BuildError> {
        let pages = self.blocks.div_ceil(DIGESTS_PER_PAGE as u64);
        let read = |first: u64| read_batch(source, first, pages, self.blocks);
        let mut batch = read(0)?;
        let mut first = 0;
        while !batch.is_empty() {
            if cancel.load(Ordering::Relaxed) {
                return Err(BuildError::Cancelled);
            }
            first += batch.len() as u64;
            let frames = self.index(&batch, first == pages);
            drop(batch);
            let level = self.options.level;
            let (blocks, next) = (self.blocks, first);
            let (packed, read) = rayon::join(
                || compress(frames, level),
                || read_batch(source, next, pages, blocks),
            );
            if !send(packed?) {
                // The packer has failed, and reports why.
                return Ok(());
            }
            batch = read?;
            progress((first * PAGE_BYTES as u64).min(source.len()));
        }
        Ok(())
    }

    /// Adds a batch's blocks to the manifest; returns the frames that became full (with `last`, all).
    fn index(&mut self, batch: &[ReadPage], last: bool) -> Vec<Vec<u8>> {
        let frame_bytes = self.options.frame_blocks * BLOCK_SIZE;
        let mut frames = Vec::new();
        for page in batch {
            let (data, digests) = match page {
                ReadPage::Data(data, digests) => (data, digests),
                ReadPage::Hole(blocks) => {
                    self.zero_blocks += blocks;
                    self.manifest.push_zeros(*blocks);
                    continue;
                }
            };
            for (index, digest) in digests.iter().enumerate() {
                let Some(digest) = *digest else {
                    self.zero_blocks += 1;
                    self.manifest.push(BlockRef::zero());
                    continue;
                };
                let new_slot = self.slots.len() as u64 - self.shared;
                let slot = match self.slots.entry(digest) {
                    Entry::Occupied(entry) => *entry.get(),
                    Entry::Vacant(entry) => match self.options.known.slot(&digest) {
                        Some(slot) => {
                            self.shared += 1;
                            *entry.insert(slot)
                        }
                        None => {
                            let at = index * BLOCK_SIZE;
                            self.pending.extend_from_slice(&data[at..at + BLOCK_SIZE]);
                            if self.pending.len() == frame_bytes {
                                let next = Vec::with_capacity(frame_bytes);
                                frames.push(std::mem::replace(&mut self.pending, next));
                            }
                            *entry.insert(new_slot)
                        }
                    },
                };
                self.manifest.push(BlockRef {
                    digest,
                    slot: Some(slot),
                });
            }
        }
        if last && !self.pending.is_empty() {
            frames.push(std::mem::take(&mut self.pending));
        }
        frames
    }
}

fn read_batch(
    source: &Source,
    first: u64,
    pages: u64,
    blocks: u64,
) -> Result<Vec<ReadPage>, BuildError> {
    (first..(first + BATCH_PAGES).min(pages))
        .into_par_iter()
        .map(|page| {
            let first_block = page * DIGESTS_PER_PAGE as u64;
            let count = (blocks - first_block).min(DIGESTS_PER_PAGE as u64) as usize;
            read_page(source, first_block * BLOCK_SIZE as u64, count)
        })
        .collect()
}

fn read_page(source: &Source, offset: u64, blocks: usize) -> Result<ReadPage, BuildError> {
    let len = blocks * BLOCK_SIZE;
    if source.is_hole(offset, offset + len as u64) {
        return Ok(ReadPage::Hole(blocks as u64));
    }
    let mut data = vec![0; len];
    source.read(offset, &mut data)?;
    let zero = Digest::zero_block();
    let digests = Digest::of_each_block(&data).into_iter();
    let digests = digests
        .map(|digest| (digest != zero).then_some(digest))
        .collect();
    Ok(ReadPage::Data(data, digests))
}

thread_local! {
    /// A context of zstd for the level: making one takes longer than compressing a frame at a low level.
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
}

fn compress(frames: Vec<Vec<u8>>, level: i32) -> Result<Vec<FrameBytes>, BuildError> {
    frames
        .into_par_iter()
        .map(|frame| {
            let bytes = COMPRESSOR.with_borrow_mut(|kept| {
                let compressor = match kept {
                    Some((of, compressor)) if *of == level => compressor,
                    _ => &mut kept.insert((level, Compressor::new(level)?)).1,
                };
                compressor.compress(&frame)
            });
            Ok(FrameBytes {
                bytes: bytes.map_err(BuildError::Compress)?,
                blocks: (frame.len() / BLOCK_SIZE) as u32,
            })
        })
        .collect()
}
