// SPDX-License-Identifier: GPL-2.0

//! The frame table: which packs an image needs, and which frames of them hold which slots.
//!
//! A *slot* is the place of a distinct block: slots count through the frames in the table's order. A block that
//! occurs many times in an image has one slot.

use std::ops::Range;

use crate::digest::PackId;
use crate::error::FormatError;
use crate::pack::max_frame_len;
use crate::wire::Reader;
use crate::{MAX_BLOCKS, MAX_FRAME_BLOCKS, MAX_PACK_LEN};

/// A pack that an image needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackRef {
    /// Its name.
    pub id: PackId,
    /// Its length in bytes.
    pub len: u64,
    /// The frames of the table that lie in it.
    pub frames: Range<u32>,
}

/// A frame, by index in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its index in the table.
    pub index: u32,
    /// The index of its pack in [`FrameTable::packs`].
    pub pack: u32,
    /// Where it begins in the pack, in bytes.
    pub offset: u32,
    /// Its length in bytes.
    pub len: u32,
    /// The first of its slots.
    pub first_slot: u64,
    /// Blocks in it.
    pub blocks: u32,
}

/// 16 bytes for each frame: 13 MiB for an image of 100 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    pack: u32,
    offset: u32,
    len: u32,
    /// Slots are fewer than 2^32.
    first_slot: u32,
}

/// The frame table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameTable {
    packs: Vec<PackRef>,
    records: Vec<Record>,
    slots: u64,
}

impl FrameTable {
    /// An empty table, to be filled with [`FrameTable::push_frame`] and [`FrameTable::end_pack`].
    pub fn new() -> Self {
        FrameTable::default()
    }

    /// Adds a frame of the pack that is being listed.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] for more blocks than a frame or an image may have.
    pub fn push_frame(&mut self, offset: u32, len: u32, blocks: u32) -> Result<(), FormatError> {
        let what = "the manifest's frame table";
        if blocks == 0 || blocks as usize > MAX_FRAME_BLOCKS {
            return Err(FormatError::invalid(
                what,
                format!("a frame of {blocks} blocks"),
            ));
        }
        if len == 0 || u64::from(len) > max_frame_len(blocks as usize) {
            let why = format!("a frame of {len} bytes for {blocks} blocks");
            return Err(FormatError::invalid(what, why));
        }
        if self.slots + u64::from(blocks) > MAX_BLOCKS || self.records.len() >= u32::MAX as usize {
            return Err(FormatError::invalid(
                what,
                "more slots than an image has blocks",
            ));
        }
        self.records.push(Record {
            pack: self.packs.len() as u32,
            offset,
            len,
            first_slot: self.slots as u32,
        });
        self.slots += u64::from(blocks);
        Ok(())
    }

    /// Ends the list of a pack's frames.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] if a frame lies outside of the pack, or the pack is too large.
    pub fn end_pack(&mut self, id: PackId, len: u64) -> Result<(), FormatError> {
        let what = "the manifest's frame table";
        let first = self.packs.last().map_or(0, |pack| pack.frames.end);
        let frames = first..self.records.len() as u32;
        if len > MAX_PACK_LEN {
            return Err(FormatError::invalid(what, format!("a pack of {len} bytes")));
        }
        let mut end = 0;
        for record in &self.records[first as usize..] {
            if u64::from(record.offset) < end {
                return Err(FormatError::invalid(what, "frames of a pack overlap"));
            }
            end = u64::from(record.offset) + u64::from(record.len);
        }
        if end > len || frames.is_empty() {
            let why = format!("frames of pack {id} end at {end} of {len} bytes");
            return Err(FormatError::invalid(what, why));
        }
        self.packs.push(PackRef { id, len, frames });
        Ok(())
    }

    /// Appends the packs and frames of another table.
    ///
    /// # Errors
    /// As [`FrameTable::push_frame`].
    pub fn append(&mut self, other: &FrameTable) -> Result<(), FormatError> {
        for pack in &other.packs {
            for frame in pack.frames.clone().filter_map(|index| other.frame(index)) {
                self.push_frame(frame.offset, frame.len, frame.blocks)?;
            }
            self.end_pack(pack.id, pack.len)?;
        }
        Ok(())
    }

    /// The packs, in the table's order.
    pub fn packs(&self) -> &[PackRef] {
        &self.packs
    }

    /// The number of frames.
    pub fn frames(&self) -> u32 {
        self.records.len() as u32
    }

    /// The number of slots.
    pub fn slots(&self) -> u64 {
        self.slots
    }

    /// A frame by its index.
    pub fn frame(&self, index: u32) -> Option<Frame> {
        let record = self.records.get(index as usize)?;
        let next = self.records.get(index as usize + 1);
        let end = next.map_or(self.slots, |next| u64::from(next.first_slot));
        let first_slot = u64::from(record.first_slot);
        Some(Frame {
            index,
            pack: record.pack,
            offset: record.offset,
            len: record.len,
            first_slot,
            blocks: (end - first_slot) as u32,
        })
    }

    /// The frame that holds a slot.
    pub fn frame_of(&self, slot: u64) -> Option<Frame> {
        if slot >= self.slots {
            return None;
        }
        let after = self
            .records
            .partition_point(|record| u64::from(record.first_slot) <= slot);
        self.frame(after.checked_sub(1)? as u32)
    }

    /// The most bytes that the table of an image of `blocks` blocks may take when it is encoded.
    pub(super) fn max_encoded_len(blocks: u64) -> u64 {
        // At worst each block has a frame and a pack of its own.
        16 + blocks.saturating_mul(44 + 9)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend((self.packs.len() as u32).to_le_bytes());
        out.extend((self.records.len() as u32).to_le_bytes());
        out.extend(self.slots.to_le_bytes());
        for pack in &self.packs {
            out.extend(pack.id.as_bytes());
            out.extend(pack.len.to_le_bytes());
            out.extend((pack.frames.len() as u32).to_le_bytes());
        }
        // By column, which compresses to little.
        let frames = || (0..self.frames()).filter_map(|index| self.frame(index));
        let mut end = (0, 0);
        for frame in frames() {
            let expected = if end.0 == frame.pack { end.1 } else { 0 };
            out.extend((frame.offset - expected).to_le_bytes());
            end = (frame.pack, frame.offset + frame.len);
        }
        for frame in frames() {
            out.extend(frame.len.to_le_bytes());
        }
        for frame in frames() {
            out.push((frame.blocks - 1) as u8);
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("the manifest's frame table", bytes);
        let packs = reader.u32()? as usize;
        let frames = reader.u32()? as usize;
        let slots = reader.u64()?;
        let needed = packs as u64 * 44 + frames as u64 * 9;
        if needed != reader.remaining() as u64 {
            let why = format!("{packs} packs and {frames} frames do not fit its length");
            return Err(reader.invalid(why));
        }
        let mut pack_records = Reader::new("the manifest's frame table", reader.take(packs * 44)?);
        let mut gaps = Reader::new("the manifest's frame table", reader.take(frames * 4)?);
        let mut lens = Reader::new("the manifest's frame table", reader.take(frames * 4)?);
        let mut blocks = Reader::new("the manifest's frame table", reader.take(frames)?);
        reader.end()?;
        let mut table = FrameTable {
            packs: Vec::with_capacity(packs),
            records: Vec::with_capacity(frames),
            slots: 0,
        };
        for _ in 0..packs {
            let id = PackId::from_bytes(pack_records.array()?);
            let len = pack_records.u64()?;
            let mut end = 0u32;
            for _ in 0..pack_records.u32()? {
                let frame_len = lens.u32()?;
                let offset = end.checked_add(gaps.u32()?);
                let next = offset.and_then(|offset| offset.checked_add(frame_len));
                let (Some(offset), Some(next)) = (offset, next) else {
                    return Err(reader.invalid("a frame lies beyond any pack"));
                };
                let [blocks] = blocks.array()?;
                table.push_frame(offset, frame_len, u32::from(blocks) + 1)?;
                end = next;
            }
            table.end_pack(id, len)?;
        }
        if table.records.len() != frames || table.slots != slots {
            return Err(reader.invalid("its counts contradict each other"));
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;

    fn table() -> FrameTable {
        let mut table = FrameTable::new();
        table.push_frame(0, 1000, 32).unwrap();
        table.push_frame(1000, 700, 32).unwrap();
        // A frame that this image does not need lies between.
        table.push_frame(2000, 50, 1).unwrap();
        table.end_pack(PackId::new(Digest::of(b"a")), 3000).unwrap();
        table.push_frame(0, 9, 256).unwrap();
        table.end_pack(PackId::new(Digest::of(b"b")), 9).unwrap();
        table
    }

    #[test]
    fn round_trip() {
        let table = table();
        let bytes = table.encode();
        assert_eq!(FrameTable::decode(&bytes).unwrap(), table);
        for cut in 0..bytes.len() {
            assert!(FrameTable::decode(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn slots_are_found() {
        let table = table();
        assert_eq!(table.slots(), 32 + 32 + 1 + 256);
        for (slot, frame) in [
            (0, 0),
            (31, 0),
            (32, 1),
            (63, 1),
            (64, 2),
            (65, 3),
            (320, 3),
        ] {
            assert_eq!(table.frame_of(slot).unwrap().index, frame, "slot {slot}");
        }
        assert!(table.frame_of(321).is_none());
        assert_eq!(table.frame(3).unwrap().blocks, 256);
        assert!(table.frame(4).is_none());
    }

    #[test]
    fn any_bytes_decode_or_are_refused() {
        let good = table().encode();
        let mut state = 7u64;
        for round in 0..100_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(round);
            let mut bytes = good.clone();
            for change in 0..state % 4 + 1 {
                let at = (state >> (8 + 7 * change)) as usize % bytes.len();
                bytes[at] = (state >> (3 * change)) as u8;
            }
            let Ok(table) = FrameTable::decode(&bytes) else {
                continue;
            };
            for frame in (0..table.frames()).filter_map(|index| table.frame(index)) {
                let pack = &table.packs()[frame.pack as usize];
                assert!(u64::from(frame.offset) + u64::from(frame.len) <= pack.len);
                assert_eq!(table.frame_of(frame.first_slot), Some(frame));
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let mut table = FrameTable::new();
        assert!(table.push_frame(0, 10, 0).is_err());
        assert!(table.push_frame(0, 10, 257).is_err());
        assert!(table.push_frame(0, u32::MAX, 1).is_err());
        assert!(table.end_pack(PackId::new(Digest::of(b"")), 10).is_err());
        table.push_frame(100, 10, 1).unwrap();
        assert!(table.end_pack(PackId::new(Digest::of(b"")), 109).is_err());
        table.push_frame(105, 10, 1).unwrap();
        assert!(table.end_pack(PackId::new(Digest::of(b"")), 200).is_err());
    }
}
