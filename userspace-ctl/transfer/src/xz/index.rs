// SPDX-License-Identifier: GPL-2.0

//! Where the blocks of an .xz file are: the headers, footers and indexes of its streams.
//!
//! The format is that of "The .xz File Format", version 1.2.1. A file is one or more streams, each followed by
//! padding (zeros, a multiple of 4 bytes). A stream is a header (12 bytes), blocks, an index with the sizes of all
//! blocks, and a footer (12 bytes) that says how long the index is; so a file is understood from its end, stream by
//! stream, without reading the blocks. All that is read here is protected by CRC32; the blocks have a check of their
//! own, which unpacking verifies.

use pristine_image::ReadAt;

use crate::error::{Error, Result};

/// Bytes of a stream's header, and of its footer.
pub const HEADER_LEN: u64 = 12;
const HEADER_MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const FOOTER_MAGIC: [u8; 2] = *b"YZ";

/// The most bytes of all indexes: some ten million blocks.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// The most streams; each costs reads at places of its own.
const MAX_STREAMS: u32 = 100_000;
/// The smallest block that the format allows.
const MIN_UNPADDED: u64 = 5;
/// The most padding before and between streams.
const MAX_PADDING: u64 = 16 << 20;
/// Bytes that are read at once; a file behind HTTP is asked for these.
const CHUNK: u64 = 64 << 10;

/// A block of an .xz file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XzBlock {
    /// Where its header begins in the file, in bytes.
    pub offset: u64,
    /// Its length in the file without its padding, in bytes: header, compressed data and check.
    pub unpadded: u64,
    /// Where its content begins in what the file unpacks to, in bytes.
    pub start: u64,
    /// Bytes that it unpacks to, at least 1.
    pub len: u64,
    /// The flags of its stream: the kind of its check.
    pub flags: u8,
}

impl XzBlock {
    /// Its length in the file with its padding, in bytes.
    pub fn stored_len(&self) -> u64 {
        self.unpadded.next_multiple_of(4)
    }
}

/// The blocks of an .xz file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XzIndex {
    blocks: Vec<XzBlock>,
    streams: u32,
    len: u64,
}

impl XzIndex {
    /// Reads the structure of an .xz file; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is cut or inconsistent, [`Error::Unsupported`] for flags of a newer version or an
    /// index beyond any reason, and those of `file`.
    pub fn read(file: &dyn ReadAt, name: &str) -> Result<Self> {
        let mut input = Input {
            file,
            name,
            chunk: (u64::MAX, Vec::new()),
        };
        let mut streams = Vec::new();
        let mut end = file.len();
        let (mut index_bytes, mut padding) = (0, 0);
        while end > 0 {
            let (footer_end, footer) = find_footer(&mut input, end)?;
            index_bytes += footer.index_len;
            padding += end - footer_end;
            if index_bytes > MAX_INDEX_BYTES
                || padding > MAX_PADDING
                || streams.len() as u32 >= MAX_STREAMS
            {
                let why = format!(
                    "it has indexes of more than {MAX_INDEX_BYTES} bytes, more than {MAX_STREAMS} streams, or more \
                     than {MAX_PADDING} bytes of padding"
                );
                return Err(Error::unsupported(name, why));
            }
            let stream = read_stream(&mut input, footer_end, &footer)?;
            end = stream.start;
            streams.push(stream);
        }
        if streams.is_empty() {
            return Err(Error::damaged(name, "it is empty"));
        }
        streams.reverse();
        let mut index = XzIndex {
            blocks: Vec::with_capacity(streams.iter().map(|stream| stream.records.len()).sum()),
            streams: streams.len() as u32,
            len: 0,
        };
        for stream in streams {
            index.add(&stream).ok_or_else(|| {
                Error::damaged(name, "its index adds up to more bytes than there can be")
            })?;
        }
        Ok(index)
    }

    fn add(&mut self, stream: &Stream) -> Option<()> {
        let mut offset = stream.start + HEADER_LEN;
        for &(unpadded, len) in &stream.records {
            if len > 0 {
                self.blocks.push(XzBlock {
                    offset,
                    unpadded,
                    start: self.len,
                    len,
                    flags: stream.flags,
                });
            }
            offset += unpadded.next_multiple_of(4);
            self.len = self.len.checked_add(len)?;
        }
        // What `std` can seek to.
        (self.len <= i64::MAX as u64).then_some(())
    }

    /// The blocks that have content, in order.
    pub fn blocks(&self) -> &[XzBlock] {
        &self.blocks
    }

    /// Streams in the file.
    pub fn streams(&self) -> u32 {
        self.streams
    }

    /// Bytes that the whole file unpacks to.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it unpacks to nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of the block that holds byte `at` of what the file unpacks to.
    pub fn block_of(&self, at: u64) -> Option<usize> {
        if at >= self.len {
            return None;
        }
        let after = self.blocks.partition_point(|block| block.start <= at);
        after.checked_sub(1)
    }

    /// The largest block: bytes that it unpacks to, and bytes in the file.
    pub fn largest(&self) -> u64 {
        let size = |block: &XzBlock| block.len.max(block.stored_len());
        self.blocks.iter().map(size).max().unwrap_or(0)
    }
}

struct Footer {
    index_len: u64,
    flags: u8,
}

struct Stream {
    start: u64,
    flags: u8,
    /// Unpadded length and length of the content of each block.
    records: Vec<(u64, u64)>,
}

/// The file, read in chunks.
struct Input<'a> {
    file: &'a dyn ReadAt,
    name: &'a str,
    /// The chunk that was read last, by number.
    chunk: (u64, Vec<u8>),
}

impl Input<'_> {
    /// Bytes of the file; what is asked for must lie in it.
    fn read(&mut self, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len as usize);
        while (bytes.len() as u64) < len {
            let next = at + bytes.len() as u64;
            let number = next / CHUNK;
            if self.chunk.0 != number {
                let start = number * CHUNK;
                let mut chunk = vec![0; self.file.len().saturating_sub(start).min(CHUNK) as usize];
                self.file.read_at(start, &mut chunk).map_err(|error| {
                    Error::io(format!("read {} at byte {start}", self.name), error)
                })?;
                self.chunk = (number, chunk);
            }
            let there = self.chunk.1.get((next % CHUNK) as usize..);
            let there = there
                .filter(|there| !there.is_empty())
                .ok_or_else(|| Error::damaged(self.name, format!("it ends before byte {next}")))?;
            let left = (len - bytes.len() as u64).min(there.len() as u64);
            bytes.extend_from_slice(&there[..left as usize]);
        }
        Ok(bytes)
    }
}

/// Skips padding before `end`, and reads the footer that ends there.
fn find_footer(input: &mut Input<'_>, end: u64) -> Result<(u64, Footer)> {
    let name = input.name;
    let damaged = |why: String| Error::damaged(name, why);
    if end % 4 != 0 || end < 2 * HEADER_LEN {
        let why = format!("no .xz stream can end at byte {end}; it is cut, or not an .xz file");
        return Err(damaged(why));
    }
    let first = end;
    let mut end = end;
    loop {
        if first - end > MAX_PADDING {
            let why = format!("it has more than {MAX_PADDING} bytes of padding");
            return Err(Error::unsupported(name, why));
        }
        let bytes = input.read(end - HEADER_LEN, HEADER_LEN)?;
        let padding = bytes.iter().rev().take_while(|&&byte| byte == 0).count() as u64 / 4 * 4;
        if padding > 0 {
            end -= padding;
            if end < 2 * HEADER_LEN {
                return Err(damaged(
                    "it has padding, but no stream before it".to_owned(),
                ));
            }
            continue;
        }
        let (crc, rest) = bytes.split_at(4);
        let (fields, magic) = rest.split_at(6);
        if magic != FOOTER_MAGIC {
            let why = format!("no .xz stream ends at byte {end}; it is cut, or not an .xz file");
            return Err(damaged(why));
        }
        if crc != crc32fast::hash(fields).to_le_bytes() {
            return Err(damaged(format!(
                "the checksum of the stream footer before byte {end} is wrong"
            )));
        }
        let flags = stream_flags(name, fields[4], fields[5])?;
        let backward = u32::from_le_bytes([fields[0], fields[1], fields[2], fields[3]]);
        let index_len = (u64::from(backward) + 1) * 4;
        return Ok((end, Footer { index_len, flags }));
    }
}

fn stream_flags(name: &str, first: u8, second: u8) -> Result<u8> {
    if first != 0 || second > 0x0f {
        let why = "it has stream flags of a newer .xz version";
        return Err(Error::unsupported(name, why));
    }
    Ok(second)
}

/// Reads the index before a footer, and the header before the blocks that it lists.
fn read_stream(input: &mut Input<'_>, footer_end: u64, footer: &Footer) -> Result<Stream> {
    let name = input.name;
    let damaged = |why: &str| {
        Error::damaged(
            name,
            format!("{why}, in the stream that ends at byte {footer_end}"),
        )
    };
    let index_at = (footer_end - HEADER_LEN)
        .checked_sub(footer.index_len)
        .filter(|&at| at >= HEADER_LEN)
        .ok_or_else(|| damaged("the index would begin before the file does"))?;
    let bytes = input.read(index_at, footer.index_len)?;
    let records = parse_index(&bytes).map_err(damaged)?;
    let mut start = index_at;
    for &(unpadded, _) in records.iter().rev() {
        start = unpadded
            .checked_next_multiple_of(4)
            .and_then(|len| start.checked_sub(len))
            .ok_or_else(|| damaged("the index lists blocks that do not fit before it"))?;
    }
    let start = start
        .checked_sub(HEADER_LEN)
        .ok_or_else(|| damaged("the index lists blocks that do not fit before it"))?;
    let header = input.read(start, HEADER_LEN)?;
    let (magic, rest) = header.split_at(6);
    let (flags, crc) = rest.split_at(2);
    if magic != HEADER_MAGIC || crc != crc32fast::hash(flags).to_le_bytes() {
        return Err(damaged("there is no stream header where the index says"));
    }
    if stream_flags(name, flags[0], flags[1])? != footer.flags {
        return Err(damaged("header and footer have different flags"));
    }
    Ok(Stream {
        start,
        flags: footer.flags,
        records,
    })
}

/// Reads an index: 0, the number of records, (unpadded, content) for each, padding to 4 bytes, CRC32.
fn parse_index(bytes: &[u8]) -> std::result::Result<Vec<(u64, u64)>, &'static str> {
    let (body, crc) = bytes
        .len()
        .checked_sub(4)
        .and_then(|at| bytes.split_at_checked(at))
        .ok_or("the index is too short")?;
    if crc != crc32fast::hash(body).to_le_bytes() {
        return Err("the checksum of the index is wrong");
    }
    let mut rest = match body.split_first() {
        Some((0, rest)) => rest,
        _ => return Err("there is no index where the footer says"),
    };
    let count = number(&mut rest)?;
    // Two bytes at least for each.
    if count > rest.len() as u64 / 2 {
        return Err("the index claims more blocks than it lists");
    }
    let mut records = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let unpadded = number(&mut rest)?;
        let len = number(&mut rest)?;
        if unpadded < MIN_UNPADDED {
            return Err("the index lists a block that is too short");
        }
        records.push((unpadded, len));
    }
    if rest.len() >= 4 || rest.iter().any(|&byte| byte != 0) {
        return Err("bytes follow the last record of the index");
    }
    Ok(records)
}

/// A number of up to 63 bits, 7 in each byte, the lowest first; a last byte of zero is not allowed.
fn number(bytes: &mut &[u8]) -> std::result::Result<u64, &'static str> {
    let mut value = 0;
    for position in 0..9 {
        let (&byte, rest) = bytes.split_first().ok_or("the index is cut")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << (7 * position);
        if byte & 0x80 == 0 {
            if byte == 0 && position > 0 {
                return Err("the index has a number in the wrong form");
            }
            return Ok(value);
        }
    }
    Err("the index has a number that is too large")
}

/// A number in the form that [`number`] reads.
fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The header of a stream that has these flags.
pub(super) fn stream_header(flags: u8) -> Vec<u8> {
    let mut out = HEADER_MAGIC.to_vec();
    out.extend([0, flags]);
    out.extend(crc32fast::hash(&[0, flags]).to_le_bytes());
    out
}

/// Index and footer of a stream that has just this block.
pub(super) fn stream_end(block: &XzBlock) -> Vec<u8> {
    let mut out = vec![0];
    put_number(&mut out, 1);
    put_number(&mut out, block.unpadded);
    put_number(&mut out, block.len);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(crc32fast::hash(&out).to_le_bytes());
    let backward = (out.len() / 4 - 1) as u32;
    let mut fields = backward.to_le_bytes().to_vec();
    fields.extend([0, block.flags]);
    out.extend(crc32fast::hash(&fields).to_le_bytes());
    out.extend(fields);
    out.extend(FOOTER_MAGIC);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for value in [0, 1, 127, 128, 300, 1 << 40, (1 << 63) - 1] {
            let mut bytes = Vec::new();
            put_number(&mut bytes, value);
            assert_eq!(number(&mut bytes.as_slice()), Ok(value));
        }
        assert!(number(&mut [0x80, 0].as_slice()).is_err());
        assert!(number(&mut [0xff; 10].as_slice()).is_err());
        assert!(number(&mut [0x80].as_slice()).is_err());
    }

    #[test]
    fn an_index_that_claims_much_costs_nothing() {
        let mut body = vec![0];
        put_number(&mut body, (1 << 63) - 1);
        body.resize(body.len().next_multiple_of(4), 0);
        body.extend(crc32fast::hash(&body).to_le_bytes());
        assert!(parse_index(&body).is_err());
    }
}
