// SPDX-License-Identifier: GPL-2.0

//! Packs: sequences of independent zstd frames, ended by a seek table.
//!
//! Each frame holds up to 32 blocks by default. The seek table is the one of zstd's "seekable format" (a skippable
//! frame, which `zstd -d` ignores), so a pack can be checked and reused without any manifest. A pack's name is the
//! digest of its bytes, seek table included.

use std::cell::RefCell;
use std::io;

use zstd::bulk::Decompressor;

use crate::digest::PackId;
use crate::error::FormatError;
use crate::wire::Reader;
use crate::{Digest, BLOCK_SIZE, MAX_FRAME_BLOCKS, MAX_PACK_LEN};

const SKIPPABLE_MAGIC: u32 = 0x184d_2a5e;
const SEEKABLE_MAGIC: u32 = 0x8f92_eab1;
/// Skippable header, and the seek table's footer.
const TABLE_HEADER_LEN: usize = 8;
const TABLE_FOOTER_LEN: usize = 9;

/// The most bytes that a frame of `blocks` blocks may take: zstd's own bound, rounded up.
pub fn max_frame_len(blocks: usize) -> u64 {
    let raw = (blocks * BLOCK_SIZE) as u64;
    raw + raw / 128 + 512
}

thread_local! {
    /// A context of zstd: making one takes as long as decompressing a small frame.
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn decompress(frame: &[u8], len: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let decompressor = match kept {
            Some(decompressor) => decompressor,
            None => kept.insert(Decompressor::new()?),
        };
        decompressor.decompress(frame, len)
    })
}

/// Decompresses a frame that must hold exactly `blocks` blocks.
///
/// A frame that claims or yields more is refused before it costs memory.
///
/// # Errors
/// [`FormatError::Invalid`] if the frame is not a zstd frame of that many blocks.
pub fn decode_frame(frame: &[u8], blocks: usize) -> Result<Vec<u8>, FormatError> {
    let what = "a frame of a pack";
    if blocks == 0 || blocks > MAX_FRAME_BLOCKS {
        let why = format!("it would hold {blocks} blocks");
        return Err(FormatError::invalid(what, why));
    }
    let len = blocks * BLOCK_SIZE;
    let data = decompress(frame, len)
        .map_err(|error| FormatError::invalid(what, format!("zstd says: {error}")))?;
    if data.len() != len {
        let why = format!("it holds {} bytes, not {len}", data.len());
        return Err(FormatError::invalid(what, why));
    }
    Ok(data)
}

/// One entry of a pack's own seek table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeekEntry {
    /// Where the frame begins in the pack, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Blocks in it.
    pub blocks: u32,
}

/// Reads the seek table of a whole pack.
///
/// # Errors
/// [`FormatError`] if there is no table or it does not describe the pack.
pub fn seek_table(pack: &[u8]) -> Result<Vec<SeekEntry>, FormatError> {
    let what = "the seek table of a pack";
    let invalid = |why: &str| FormatError::invalid(what, why);
    let footer_at = pack
        .len()
        .checked_sub(TABLE_FOOTER_LEN)
        .ok_or_else(|| invalid("the pack is too short"))?;
    let mut footer = Reader::new(what, &pack[footer_at..]);
    let frames = footer.u32()? as usize;
    let [descriptor] = footer.array()?;
    if footer.u32()? != SEEKABLE_MAGIC || descriptor != 0 {
        return Err(invalid("the pack does not end with one"));
    }
    let table_len = frames
        .checked_mul(8)
        .and_then(|len| len.checked_add(TABLE_HEADER_LEN + TABLE_FOOTER_LEN))
        .filter(|&len| len <= pack.len())
        .ok_or_else(|| invalid("it claims more frames than fit"))?;
    let table_at = pack.len() - table_len;
    let mut table = Reader::new(what, &pack[table_at..]);
    let magic = table.u32()?;
    let size = table.u32()? as usize;
    if magic != SKIPPABLE_MAGIC || size != table_len - TABLE_HEADER_LEN {
        return Err(invalid("its header does not fit its footer"));
    }
    let mut entries = Vec::with_capacity(frames);
    let mut offset = 0;
    for _ in 0..frames {
        let len = table.u32()?;
        let raw = table.u32()? as usize;
        if raw == 0 || raw % BLOCK_SIZE != 0 || raw > MAX_FRAME_BLOCKS * BLOCK_SIZE {
            return Err(invalid("a frame's size is not one of blocks"));
        }
        let blocks = (raw / BLOCK_SIZE) as u32;
        entries.push(SeekEntry {
            offset,
            len,
            blocks,
        });
        offset += u64::from(len);
    }
    if offset != table_at as u64 {
        return Err(invalid("its frames do not add up to the pack"));
    }
    Ok(entries)
}

/// A pack in the making.
#[derive(Debug, Default)]
pub struct PackWriter {
    bytes: Vec<u8>,
    /// Length and number of blocks of each frame.
    frames: Vec<(u32, u32)>,
}

impl PackWriter {
    /// An empty pack.
    pub fn new() -> Self {
        PackWriter::default()
    }

    /// Whether no frame is in it.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes that the finished pack would have now.
    pub fn len(&self) -> u64 {
        (self.bytes.len() + TABLE_HEADER_LEN + 8 * self.frames.len() + TABLE_FOOTER_LEN) as u64
    }

    /// Appends a zstd frame of `blocks` blocks; returns its offset in the pack.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] if the pack would exceed [`MAX_PACK_LEN`].
    pub fn push(&mut self, frame: &[u8], blocks: u32) -> Result<u32, FormatError> {
        if self.len() + frame.len() as u64 + 8 > MAX_PACK_LEN {
            return Err(FormatError::invalid("a pack", "it would be too large"));
        }
        let offset = self.bytes.len() as u32;
        self.bytes.extend_from_slice(frame);
        self.frames.push((frame.len() as u32, blocks));
        Ok(offset)
    }

    /// Ends the pack; returns its name and its bytes.
    pub fn finish(mut self) -> (PackId, Vec<u8>) {
        let table_len = 8 * self.frames.len() + TABLE_FOOTER_LEN;
        self.bytes.extend(SKIPPABLE_MAGIC.to_le_bytes());
        self.bytes.extend((table_len as u32).to_le_bytes());
        for (len, blocks) in &self.frames {
            self.bytes.extend(len.to_le_bytes());
            self.bytes
                .extend((blocks * BLOCK_SIZE as u32).to_le_bytes());
        }
        self.bytes.extend((self.frames.len() as u32).to_le_bytes());
        self.bytes.push(0);
        self.bytes.extend(SEEKABLE_MAGIC.to_le_bytes());
        (PackId::new(Digest::of(&self.bytes)), self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(fill: u8, blocks: usize) -> Vec<u8> {
        zstd::bulk::compress(&vec![fill; blocks * BLOCK_SIZE], 3).unwrap()
    }

    #[test]
    fn frames_and_table_round_trip() {
        let mut writer = PackWriter::new();
        let (a, b) = (frame(1, 32), frame(2, 3));
        assert_eq!(writer.push(&a, 32).unwrap(), 0);
        assert_eq!(writer.push(&b, 3).unwrap() as usize, a.len());
        let predicted = writer.len();
        let (id, bytes) = writer.finish();
        assert_eq!(predicted, bytes.len() as u64);
        assert_eq!(id.as_bytes(), Digest::of(&bytes).as_bytes());
        let table = seek_table(&bytes).unwrap();
        assert_eq!(table.len(), 2);
        assert_eq!((table[1].offset as usize, table[1].blocks), (a.len(), 3));
        let data = decode_frame(&bytes[a.len()..a.len() + b.len()], 3).unwrap();
        assert!(data.iter().all(|&byte| byte == 2));
    }

    #[test]
    fn a_frame_of_another_size_is_refused() {
        let frame = frame(7, 4);
        assert!(decode_frame(&frame, 3).is_err());
        assert!(decode_frame(&frame, 5).is_err());
        assert!(decode_frame(&frame[..frame.len() - 1], 4).is_err());
        assert!(decode_frame(b"garbage", 4).is_err());
        assert!(decode_frame(&frame, 0).is_err());
        assert!(decode_frame(&frame, usize::MAX).is_err());
    }

    #[test]
    fn a_bomb_costs_no_memory() {
        // 1 GiB of zeros in a small frame.
        let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
        for _ in 0..1024 {
            std::io::Write::write_all(&mut encoder, &[0; 1 << 20]).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        assert!(decode_frame(&bomb, 32).is_err());
    }

    #[test]
    fn a_damaged_table_is_refused() {
        let mut writer = PackWriter::new();
        writer.push(&frame(1, 32), 32).unwrap();
        let (_, bytes) = writer.finish();
        let table = bytes.len() - 25;
        for at in table..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                // The name would tell; the table alone must at least never panic, nor claim another layout
                // for the same bytes.
                if let Ok(entries) = seek_table(&bad) {
                    assert_eq!(entries[0].len as usize, table);
                }
            }
            assert!(seek_table(&bytes[..at]).is_err());
        }
    }
}
