// SPDX-License-Identifier: GPL-2.0

//! An image in a store as a disk that can be read at any place: what is read is fetched, and verified, then.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pristine_image::{ReadAt, BLOCK_SIZE, DIGESTS_PER_PAGE};

use crate::error::Error;
use crate::fetch::{BlockSink, FetchOptions};
use crate::reader::ImageReader;

/// Blocks kept at most: 256 MiB of them.
const KEPT: usize = 64 << 10;
/// Reads of up to this many blocks are answered from what is kept, and keep what they fetch.
const SMALL: u64 = 64;

/// An image as a disk.
#[derive(Debug)]
pub struct ImageBlocks {
    image: Arc<ImageReader>,
    options: FetchOptions,
    kept: Mutex<HashMap<u64, Box<[u8]>>>,
}

impl ImageBlocks {
    /// The blocks of `image`.
    pub fn new(image: Arc<ImageReader>) -> Self {
        ImageBlocks {
            image,
            options: FetchOptions::default(),
            kept: Mutex::default(),
        }
    }

    fn fetch(
        &self,
        wanted: Vec<Range<u64>>,
        parallel: usize,
        sink: &dyn BlockSink,
    ) -> io::Result<()> {
        let options = FetchOptions {
            parallel,
            ..self.options.clone()
        };
        match self.image.fetch(wanted, &options, sink) {
            Ok(_) => Ok(()),
            Err(Error::Sink(error) | Error::Io { error, .. }) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Fetches what of `wanted` is not kept, and keeps it.
    fn keep(&self, wanted: impl Iterator<Item = u64>, parallel: usize) -> io::Result<()> {
        let mut missing: Vec<Range<u64>> = Vec::new();
        {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            for block in wanted.filter(|block| !kept.contains_key(block)) {
                match missing.last_mut() {
                    Some(last) if last.end == block => last.end += 1,
                    _ => missing.push(block..block + 1),
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        self.fetch(missing, parallel, &Keep(&self.kept))
    }
}

/// The blocks that a range of bytes touches.
fn blocks_of(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_SIZE as u64..range.end.div_ceil(BLOCK_SIZE as u64)
}

impl ReadAt for ImageBlocks {
    fn len(&self) -> u64 {
        self.image.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        let Some(end) = end.filter(|&end| end <= self.len()) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let blocks = blocks_of(&(offset..end));
        let whole = offset % BLOCK_SIZE as u64 == 0 && end % BLOCK_SIZE as u64 == 0;
        if whole && blocks.end - blocks.start > SMALL {
            let sink = Fill(blocks.start, Mutex::new(buffer));
            return self.fetch(vec![blocks], 1, &sink);
        }
        for block in blocks {
            let start = block * BLOCK_SIZE as u64;
            let within = offset.max(start)..end.min(start + BLOCK_SIZE as u64);
            let part =
                &mut buffer[(within.start - offset) as usize..(within.end - offset) as usize];
            let in_block = (within.start - start) as usize..(within.end - start) as usize;
            // What others fetch meanwhile may push it out again.
            loop {
                self.keep(std::iter::once(block), 1)?;
                let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(content) = kept.get(&block) {
                    part.copy_from_slice(&content[in_block]);
                    break;
                }
            }
        }
        Ok(())
    }

    fn is_hole(&self, range: Range<u64>) -> bool {
        let blocks = blocks_of(&range);
        let pages =
            blocks.start / DIGESTS_PER_PAGE as u64..blocks.end.div_ceil(DIGESTS_PER_PAGE as u64);
        let zero = |page| self.image.manifest().page_range(page).is_empty();
        range.end <= self.len() && pages.into_iter().all(zero)
    }

    fn prefetch(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        let blocks = ranges.iter().flat_map(blocks_of);
        let end = self.image.blocks();
        let blocks = blocks.filter(|&block| block < end).take(KEPT / 2);
        self.keep(blocks, self.options.parallel)
    }
}

/// Keeps what is fetched.
struct Keep<'a>(&'a Mutex<HashMap<u64, Box<[u8]>>>);

impl BlockSink for Keep<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (block, content) in (first..).zip(data.chunks_exact(BLOCK_SIZE)) {
            if kept.len() >= KEPT {
                kept.clear();
            }
            kept.insert(block, content.into());
        }
        Ok(())
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        for block in blocks {
            self.blocks(block, &[0; BLOCK_SIZE])?;
        }
        Ok(())
    }
}

/// Puts blocks from the one given on into a buffer.
struct Fill<'a>(u64, Mutex<&'a mut [u8]>);

impl BlockSink for Fill<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let at = (first - self.0) as usize * BLOCK_SIZE;
        let mut buffer = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        buffer[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        let range = (blocks.start - self.0) as usize..(blocks.end - self.0) as usize;
        let mut buffer = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        buffer[range.start * BLOCK_SIZE..range.end * BLOCK_SIZE].fill(0);
        Ok(())
    }
}
