// SPDX-License-Identifier: GPL-2.0

//! Packs that are not stored, because their content can be read from another file at any time.
//!
//! Such a pack holds consecutive blocks of a disk, all of them and in the disk's order, in zstd frames that do not
//! compress (one raw block each). So each byte of the pack follows from its place alone and from the disk's content:
//! any range of it is made from the same range of the disk, and its name, the digest of all of it, is as good as that
//! of any pack.

use std::io;
use std::ops::Range;

use pristine_image::{Digest, PackId, ReadAt, BLOCK_SIZE};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks in a frame: 128 KiB, which is the most that a raw block of zstd can have.
pub(crate) const FRAME_BLOCKS: u64 = 32;
/// Blocks in a pack: 64 MiB.
pub(crate) const PACK_BLOCKS: u64 = 16384;

/// A frame's header, its content size, and the header of its only block.
const FRAME_HEAD: u64 = 12;
/// Of zstd's seekable format, see `pristine_image::pack`.
const TABLE_HEAD: u64 = 8;
const TABLE_FOOT: u64 = 9;

/// A pack of consecutive blocks of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VirtualPack {
    /// Where its first block begins on the disk, in bytes.
    pub(crate) start: u64,
    /// Blocks in it, at most [`PACK_BLOCKS`].
    pub(crate) blocks: u64,
}

impl VirtualPack {
    pub(crate) fn frames(&self) -> u64 {
        self.blocks.div_ceil(FRAME_BLOCKS)
    }

    /// Blocks in a frame.
    pub(crate) fn frame_blocks(&self, frame: u64) -> u64 {
        (self.blocks - frame * FRAME_BLOCKS).min(FRAME_BLOCKS)
    }

    /// Where a frame is in the pack, in bytes.
    pub(crate) fn frame_range(&self, frame: u64) -> Range<u64> {
        let start = frame * (FRAME_HEAD + FRAME_BLOCKS * BLOCK);
        start..start + FRAME_HEAD + self.frame_blocks(frame) * BLOCK
    }

    fn table_at(&self) -> u64 {
        self.frames() * FRAME_HEAD + self.blocks * BLOCK
    }

    /// The pack's length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.table_at() + TABLE_HEAD + 8 * self.frames() + TABLE_FOOT
    }

    /// The seek table at its end.
    fn table(&self) -> Vec<u8> {
        let len = 8 * self.frames() + TABLE_FOOT;
        let mut table = 0x184d_2a5e_u32.to_le_bytes().to_vec();
        table.extend((len as u32).to_le_bytes());
        for frame in 0..self.frames() {
            let range = self.frame_range(frame);
            table.extend(((range.end - range.start) as u32).to_le_bytes());
            table.extend(((self.frame_blocks(frame) * BLOCK) as u32).to_le_bytes());
        }
        table.extend((self.frames() as u32).to_le_bytes());
        table.push(0);
        table.extend(0x8f92_eab1_u32.to_le_bytes());
        table
    }

    /// Bytes of the pack; `range` must lie in it.
    ///
    /// # Errors
    /// Those of the disk; [`io::ErrorKind::UnexpectedEof`] for a range that is not in the pack.
    pub(crate) fn read(&self, disk: &dyn ReadAt, range: Range<u64>) -> io::Result<Vec<u8>> {
        if range.start > range.end || range.end > self.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut out = Vec::with_capacity((range.end - range.start) as usize);
        let first = range.start / (FRAME_HEAD + FRAME_BLOCKS * BLOCK);
        for frame in first..self.frames() {
            let place = self.frame_range(frame);
            if place.start >= range.end {
                break;
            }
            let len = (place.end - place.start - FRAME_HEAD) as usize;
            let head = frame_head(len as u32);
            let head_part = clip(&range, place.start, FRAME_HEAD);
            out.extend_from_slice(&head[head_part]);
            let content = clip(&range, place.start + FRAME_HEAD, len as u64);
            let (at, wanted) = (out.len(), content.end - content.start);
            out.resize(at + wanted, 0);
            let on_disk = self.start + frame * FRAME_BLOCKS * BLOCK + content.start as u64;
            read_padded(disk, on_disk, &mut out[at..])?;
        }
        let table = self.table();
        let part = clip(&range, self.table_at(), table.len() as u64);
        out.extend_from_slice(&table[part]);
        Ok(out)
    }

    /// Its name, from its content.
    ///
    /// # Errors
    /// As [`VirtualPack::read`].
    pub(crate) fn name(&self, disk: &dyn ReadAt) -> io::Result<PackId> {
        Ok(PackId::new(Digest::of(&self.read(disk, 0..self.len())?)))
    }
}

/// The part of `at..at + len` that lies in `range`, counted from `at`.
fn clip(range: &Range<u64>, at: u64, len: u64) -> Range<usize> {
    let start = range.start.clamp(at, at + len) - at;
    let end = range.end.clamp(at, at + len) - at;
    start as usize..end as usize
}

/// The disk may end before a whole block does.
fn read_padded(disk: &dyn ReadAt, at: u64, buffer: &mut [u8]) -> io::Result<()> {
    let there = disk.len().saturating_sub(at).min(buffer.len() as u64) as usize;
    match there {
        0 => Ok(()),
        there => disk.read_at(at, &mut buffer[..there]),
    }
}

/// The beginning of a zstd frame whose content follows as it is: magic, a descriptor (single segment, size in 4
/// bytes), the size, and the header of a raw block that is the last.
fn frame_head(len: u32) -> [u8; FRAME_HEAD as usize] {
    let mut head = [0; FRAME_HEAD as usize];
    head[..4].copy_from_slice(&0xfd2f_b528_u32.to_le_bytes());
    head[4] = 2 << 6 | 1 << 5;
    head[5..9].copy_from_slice(&len.to_le_bytes());
    head[9..].copy_from_slice(&(len << 3 | 1).to_le_bytes()[..3]);
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Bytes;
    use pristine_image::pack::{decode_frame, seek_table};

    #[test]
    fn it_is_a_pack_like_any_other() {
        let disk: Vec<u8> = (0..70 * BLOCK_SIZE as u32)
            .map(|at| (at / 1000) as u8)
            .collect();
        let pack = VirtualPack {
            start: 2 * BLOCK,
            blocks: 67,
        };
        let bytes = Bytes(disk.clone());
        let whole = pack.read(&bytes, 0..pack.len()).unwrap();
        let table = seek_table(&whole).unwrap();
        assert_eq!(table.len(), 3);
        let mut content = Vec::new();
        for (number, frame) in table.iter().enumerate() {
            let range = pack.frame_range(number as u64);
            assert_eq!(
                (frame.offset, u64::from(frame.len)),
                (range.start, range.end - range.start)
            );
            let stored = &whole[range.start as usize..range.end as usize];
            content.extend(decode_frame(stored, frame.blocks as usize).unwrap());
        }
        assert_eq!(content, disk[2 * BLOCK_SIZE..69 * BLOCK_SIZE]);
        // zstd itself unpacks it, the table included.
        assert_eq!(zstd::stream::decode_all(whole.as_slice()).unwrap(), content);
        assert_eq!(
            pack.name(&bytes).unwrap().as_bytes(),
            Digest::of(&whole).as_bytes()
        );
        // Any range is the same part of the whole.
        let len = pack.len();
        for start in (0..len).step_by(4093).chain(len - 40..len) {
            for end in [start, start + 1, start + 30, start + 140_000, len] {
                let end = end.min(len);
                let part = pack.read(&bytes, start..end).unwrap();
                assert_eq!(part, whole[start as usize..end as usize]);
            }
        }
        assert!(pack.read(&bytes, 0..len + 1).is_err());
    }
}
