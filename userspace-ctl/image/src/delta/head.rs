// SPDX-License-Identifier: GPL-2.0

//! The head of a delta: between which images it leads, and where its map lies.

use std::ops::Range;

use super::MAX_MAP_LEN;
use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::wire::Reader;
use crate::{BLOCK_SIZE, MAX_BLOCKS};

const MAGIC: [u8; 8] = *b"\x89PRISTD\n";
const VERSION: u32 = 1;
/// The digest covers the bytes up to here, and the stored map.
const CHECKSUM_AT: usize = 128;
/// The feature of deltas of encrypted images.
const BLINDED: u32 = 1;

/// The head of a delta. What it says is a claim until [`super::Delta::parse`] has proved it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaHead {
    /// The image that it leads from.
    pub old: ImageId,
    /// The image that it leads to.
    pub new: ImageId,
    /// The old image's size in bytes.
    pub old_size: u64,
    /// The new image's size in bytes.
    pub new_size: u64,
    /// Bytes of the delta.
    pub file_len: u64,
    pub(super) map_stored: u64,
    pub(super) map_len: u64,
    /// The ids of encrypted images are blinded, and the map says with what.
    pub(super) blinded: bool,
    checksum: Digest,
}

impl DeltaHead {
    /// Bytes in a head.
    pub const LEN: usize = 160;

    /// A head for a map that is stored as `map` and has `map_len` bytes, with `frames_len` bytes of frames after it.
    pub(super) fn new(
        (old, old_size): (ImageId, u64),
        (new, new_size): (ImageId, u64),
        map: &[u8],
        map_len: u64,
        frames_len: u64,
        blinded: bool,
    ) -> Self {
        let mut head = DeltaHead {
            old,
            new,
            old_size,
            new_size,
            file_len: (Self::LEN + map.len()) as u64 + frames_len,
            map_stored: map.len() as u64,
            map_len,
            blinded,
            checksum: Digest::zero_block(),
        };
        head.checksum = head.checksum_with(map);
        head
    }

    /// Parses the first [`DeltaHead::LEN`] bytes of a delta.
    ///
    /// # Errors
    /// [`FormatError`]: not a delta, newer, truncated, or sizes that make no sense.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("the delta's head", bytes);
        if reader.take(MAGIC.len())? != MAGIC {
            return Err(reader.invalid("it does not begin as a delta does"));
        }
        let version = reader.u32()?;
        if version > VERSION {
            return Err(FormatError::NewerVersion {
                found: version,
                supported: VERSION,
            });
        }
        let features = reader.u32()?;
        if features & !BLINDED != 0 {
            return Err(FormatError::UnknownFeatures(u64::from(features & !BLINDED)));
        }
        let old_size = reader.u64()?;
        let new_size = reader.u64()?;
        let old = ImageId::from_bytes(reader.array()?);
        let new = ImageId::from_bytes(reader.array()?);
        let map_stored = reader.u64()?;
        let map_len = reader.u64()?;
        let file_len = reader.u64()?;
        let reserved = reader.u64()?;
        let checksum = Digest::from_bytes(reader.array()?);
        for size in [old_size, new_size] {
            if size == 0 || size % BLOCK_SIZE as u64 != 0 || size / BLOCK_SIZE as u64 > MAX_BLOCKS {
                return Err(reader.invalid(format!("an image of {size} bytes")));
            }
        }
        if map_len > MAX_MAP_LEN || map_stored > MAX_MAP_LEN + MAX_MAP_LEN / 128 + 512 {
            return Err(reader.invalid(format!("a map of {map_len} bytes")));
        }
        if version == 0 || reserved != 0 || file_len < Self::LEN as u64 + map_stored {
            return Err(reader.invalid("its lengths contradict each other"));
        }
        Ok(DeltaHead {
            old,
            new,
            old_size,
            new_size,
            file_len,
            map_stored,
            map_len,
            blinded: features & BLINDED != 0,
            checksum,
        })
    }

    /// The bytes of the delta that hold the map; frames follow to the end.
    pub fn map_range(&self) -> Range<u64> {
        Self::LEN as u64..Self::LEN as u64 + self.map_stored
    }

    /// Checks the stored map and the head, and unpacks the map.
    pub(super) fn unpack_map(&self, stored: &[u8]) -> Result<Vec<u8>, FormatError> {
        if stored.len() as u64 != self.map_stored {
            return Err(FormatError::Truncated {
                what: "the delta's map",
                needed: self.map_stored.saturating_sub(stored.len() as u64),
                have: stored.len() as u64,
            });
        }
        if self.checksum_with(stored) != self.checksum {
            return Err(FormatError::Checksum("the delta's map".to_owned()));
        }
        let what = "the delta's map";
        let raw = zstd::bulk::decompress(stored, self.map_len as usize)
            .map_err(|error| FormatError::invalid(what, format!("zstd says: {error}")))?;
        if raw.len() as u64 != self.map_len {
            let why = format!("it holds {} bytes, not {}", raw.len(), self.map_len);
            return Err(FormatError::invalid(what, why));
        }
        Ok(raw)
    }

    fn checksum_with(&self, map: &[u8]) -> Digest {
        let mut bytes = self.fields();
        bytes.extend_from_slice(map);
        Digest::of(&bytes)
    }

    fn fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::LEN);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        let features = if self.blinded { BLINDED } else { 0 };
        out.extend(features.to_le_bytes());
        out.extend(self.old_size.to_le_bytes());
        out.extend(self.new_size.to_le_bytes());
        out.extend(self.old.as_bytes());
        out.extend(self.new.as_bytes());
        out.extend(self.map_stored.to_le_bytes());
        out.extend(self.map_len.to_le_bytes());
        out.extend(self.file_len.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        debug_assert_eq!(out.len(), CHECKSUM_AT);
        out
    }

    /// The head's bytes.
    #[cfg(feature = "build")]
    pub(super) fn write(&self) -> Vec<u8> {
        let mut out = self.fields();
        out.extend(self.checksum.as_bytes());
        out
    }
}
