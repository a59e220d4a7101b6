// SPDX-License-Identifier: GPL-2.0

//! What inputs are read through: files, URLs, parts of another input, and a reader from the first byte to the last.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use pristine_image::ReadAt;

use crate::cache::PieceCache;
use crate::error::{Error, Result};

/// Bytes that [`Sequential`] reads at once.
const READ_AHEAD: usize = 1 << 20;

/// An open input and its name in messages.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) name: String,
    pub(crate) bytes: Arc<dyn ReadAt>,
}

impl Input {
    /// Its first bytes, at most `len`.
    pub(crate) fn head(&self, len: u64) -> Result<Vec<u8>> {
        let mut head = vec![0; self.bytes.len().min(len) as usize];
        self.bytes
            .read_at(0, &mut head)
            .map_err(|error| Error::io(format!("read {}", self.name), error))?;
        Ok(head)
    }

    /// It, read from the first byte to the last.
    pub(crate) fn sequential(&self) -> Sequential {
        Sequential::new(Arc::clone(&self.bytes))
    }
}

/// Reads an input from the first byte to the last; seeking in it costs nothing.
#[derive(Debug)]
pub(crate) struct Sequential {
    bytes: Arc<dyn ReadAt>,
    at: u64,
    buffer: Vec<u8>,
    /// Where the buffer begins in the input.
    buffer_at: u64,
    /// Bytes read at once.
    ahead: usize,
}

impl Sequential {
    pub(crate) fn new(bytes: Arc<dyn ReadAt>) -> Self {
        Sequential {
            bytes,
            at: 0,
            buffer: Vec::new(),
            buffer_at: 0,
            ahead: READ_AHEAD,
        }
    }
}

impl Read for Sequential {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let end = self.buffer_at + self.buffer.len() as u64;
        if !(self.buffer_at..end).contains(&self.at) {
            let left = self.bytes.len().saturating_sub(self.at);
            if left == 0 {
                return Ok(0);
            }
            self.buffer.resize(left.min(self.ahead as u64) as usize, 0);
            self.buffer_at = self.at;
            if let Err(error) = self.bytes.read_at(self.at, &mut self.buffer) {
                self.buffer.clear();
                return Err(error);
            }
        }
        let there = self
            .buffer
            .get((self.at - self.buffer_at) as usize..)
            .unwrap_or_default();
        let len = there.len().min(out.len());
        out[..len].copy_from_slice(&there[..len]);
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Sequential {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, delta) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::Current(delta) => (self.at, delta),
            SeekFrom::End(delta) => (self.bytes.len(), delta),
        };
        self.at = base
            .checked_add_signed(delta)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// A part of another input.
#[derive(Debug)]
pub(crate) struct Part {
    bytes: Arc<dyn ReadAt>,
    range: Range<u64>,
}

impl Part {
    /// The bytes in `range`, which must lie in `bytes`.
    pub(crate) fn new(bytes: Arc<dyn ReadAt>, range: Range<u64>) -> io::Result<Self> {
        if range.start > range.end || range.end > bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Part { bytes, range })
    }
}

impl ReadAt for Part {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.read_at(self.range.start + offset, buffer)
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.bytes.is_unchanged()
    }
}

/// An input that is far away, read in chunks of which the latest are kept.
#[derive(Debug)]
pub(crate) struct Cached {
    bytes: Arc<dyn ReadAt>,
    chunks: PieceCache,
}

impl Cached {
    pub(crate) fn new(bytes: Arc<dyn ReadAt>) -> Self {
        let chunks = PieceCache::new(64 * READ_AHEAD as u64);
        Cached { bytes, chunks }
    }
}

impl ReadAt for Cached {
    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut buffer = buffer;
        while !buffer.is_empty() {
            let chunk_len = READ_AHEAD as u64;
            let number = at / chunk_len;
            let start = number * chunk_len;
            let chunk = self.chunks.get(number, || {
                let len = self.len().saturating_sub(start).min(chunk_len);
                let mut chunk = vec![0; len as usize];
                self.bytes.read_at(start, &mut chunk)?;
                Ok(chunk)
            })?;
            let there = chunk.get((at - start) as usize..).unwrap_or_default();
            let len = there.len().min(buffer.len());
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (part, rest) = buffer.split_at_mut(len);
            part.copy_from_slice(&there[..len]);
            at += len as u64;
            buffer = rest;
        }
        Ok(())
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.bytes.is_unchanged()
    }
}

/// Bytes in memory.
#[derive(Clone, Debug, Default)]
pub struct Bytes(pub Vec<u8>);

impl ReadAt for Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let there = start
            .checked_add(buffer.len())
            .and_then(|end| self.0.get(start..end))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(there);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_reads_and_seeks() {
        let content: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let mut reader = Sequential::new(Arc::new(Bytes(content.clone())));
        reader.ahead = 1000;
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, content);
        reader.seek(SeekFrom::End(-5)).unwrap();
        all.clear();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, content[content.len() - 5..]);
        assert!(reader.seek(SeekFrom::Current(-1 << 40)).is_err());
        reader.seek(SeekFrom::Start(1 << 40)).unwrap();
        assert_eq!(reader.read(&mut [0; 4]).unwrap(), 0);
    }

    #[test]
    fn a_part_has_bounds() {
        let bytes: Arc<dyn ReadAt> = Arc::new(Bytes((0..100).collect()));
        let part = Part::new(Arc::clone(&bytes), 10..20).unwrap();
        let mut buffer = [0; 4];
        part.read_at(6, &mut buffer).unwrap();
        assert_eq!(buffer, [16, 17, 18, 19]);
        assert!(part.read_at(7, &mut buffer).is_err());
        assert!(part.read_at(u64::MAX, &mut buffer).is_err());
        assert!(Part::new(bytes, 90..101).is_err());
    }
}
