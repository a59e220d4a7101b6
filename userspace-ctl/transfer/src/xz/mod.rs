// SPDX-License-Identifier: GPL-2.0

//! Disk images in .xz files, read by range without unpacking the whole.
//!
//! `xz -T` and `xz --block-size` write files of many blocks, each compressed alone, as cloud images are published.
//! [`XzIndex`] finds the blocks; [`XzImage`] unpacks those that are wanted, with liblzma.

mod index;

use std::io;
use std::sync::Arc;

use liblzma::stream::{Action, Status, Stream};
use pristine_image::ReadAt;

pub use index::{XzBlock, XzIndex};

use crate::cache::PieceCache;
use crate::error::{Error, Result};

/// The first bytes of an .xz file.
pub const MAGIC: &[u8] = b"\xfd7zXZ\0";

/// Blocks of more than this are not unpacked for a few bytes: `xz -T -9` makes blocks of 192 MiB.
pub const MAX_BLOCK: u64 = 256 << 20;

/// Memory that the decoder may use besides: the largest dictionary of `xz -9 --extreme` is 64 MiB, some use 1 GiB.
pub(crate) const MEMORY_LIMIT: u64 = (1 << 30) + (64 << 20);

/// Unpacked blocks that are kept, in bytes.
const KEEP: u64 = 192 << 20;

/// The content of an .xz file that has many blocks.
#[derive(Debug)]
pub struct XzImage {
    name: String,
    file: Arc<dyn ReadAt>,
    index: XzIndex,
    unpacked: PieceCache,
}

impl XzImage {
    /// An .xz file whose index is read.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a block is too large to be unpacked for a few bytes of it.
    pub fn new(file: Arc<dyn ReadAt>, index: XzIndex, name: &str) -> Result<Self> {
        if index.largest() > MAX_BLOCK {
            let why = format!(
                "it has a block of {} bytes, which must be unpacked for any byte of it; up to {MAX_BLOCK} make sense. \
                 Recompress it with xz --block-size=16MiB",
                index.largest()
            );
            return Err(Error::unsupported(name, why));
        }
        Ok(XzImage {
            name: name.to_owned(),
            file,
            index,
            unpacked: PieceCache::new(KEEP),
        })
    }

    /// Its blocks.
    pub fn index(&self) -> &XzIndex {
        &self.index
    }

    /// The unpacked content of a block; one range of the file is read for it.
    fn block(&self, number: usize) -> io::Result<Arc<Vec<u8>>> {
        let block = self.index.blocks().get(number).copied();
        let block = block.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.unpacked.get(number as u64, || {
            let mut stored = vec![0; block.stored_len() as usize];
            self.file.read_at(block.offset, &mut stored)?;
            Ok(decode_block(&block, &stored, &self.name)?)
        })
    }
}

impl ReadAt for XzImage {
    fn len(&self) -> u64 {
        self.index.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut buffer = buffer;
        while !buffer.is_empty() {
            let number = self
                .index
                .block_of(at)
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            let content = self.block(number)?;
            let start = self
                .index
                .blocks()
                .get(number)
                .map_or(0, |block| block.start);
            let there = content.get((at - start) as usize..).unwrap_or_default();
            let len = there.len().min(buffer.len());
            let (part, rest) = buffer.split_at_mut(len);
            part.copy_from_slice(&there[..len]);
            at += len as u64;
            buffer = rest;
        }
        Ok(())
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.file.is_unchanged()
    }
}

/// Unpacks a block from its bytes in the file, and verifies its check.
///
/// The decoder is given a stream that has just this block, with an index and a footer made for it: so liblzma itself
/// checks that the sizes of the block are those of the file's index.
///
/// # Errors
/// [`Error::Damaged`] if it does not unpack to just the bytes that the index says, [`Error::Unsupported`] for filters
/// and checks that liblzma does not know, or a dictionary beyond reason.
pub fn decode_block(block: &XzBlock, stored: &[u8], name: &str) -> Result<Vec<u8>> {
    let what = || format!("the block at byte {} of {name}", block.offset);
    let fail = |error: liblzma::stream::Error| lzma_error(what(), &error);
    let mut decoder = Stream::new_stream_decoder(MEMORY_LIMIT, 0).map_err(fail)?;
    let mut content = vec![0; block.len as usize];
    let (header, end) = (index::stream_header(block.flags), index::stream_end(block));
    for part in [header.as_slice(), stored, end.as_slice()] {
        let mut input = part;
        while !input.is_empty() {
            let (consumed, produced) = (decoder.total_in(), decoder.total_out());
            let room = content.get_mut(produced as usize..).unwrap_or_default();
            let status = decoder.process(input, room, Action::Run).map_err(fail)?;
            let (taken, given) = (
                decoder.total_in() - consumed,
                decoder.total_out() - produced,
            );
            input = input.get(taken as usize..).unwrap_or_default();
            if status == Status::StreamEnd {
                if decoder.total_out() == block.len {
                    return Ok(content);
                }
                break;
            }
            if taken == 0 && given == 0 {
                break;
            }
        }
    }
    let why = "it does not unpack to the number of bytes that the index gives";
    Err(Error::damaged(what(), why))
}

/// What liblzma says, in words.
pub(crate) fn lzma_error(what: String, error: &liblzma::stream::Error) -> Error {
    use liblzma::stream::Error as Lzma;
    match error {
        Lzma::MemLimit => {
            let why = format!("unpacking it takes more than {MEMORY_LIMIT} bytes of memory");
            Error::unsupported(what, why)
        }
        Lzma::Options | Lzma::UnsupportedCheck => Error::unsupported(
            what,
            "it uses a filter or a check that liblzma does not know",
        ),
        error => Error::damaged(what, format!("liblzma says: {error}")),
    }
}
