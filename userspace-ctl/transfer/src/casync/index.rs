// SPDX-License-Identifier: GPL-2.0

//! The index of a casync image (`.caibx`): which chunks it is made of.
//!
//! The format is that of casync's `caformat.h`, which desync shares; all numbers are little-endian u64. A head of 48
//! bytes (size 48, type, feature flags, smallest, average and largest chunk), then a table: its size (all ones, as it
//! is written before that is known), its type, for each chunk the offset at which it ends and its id (32 bytes), and
//! at last 0, 0, the offset of the index (48), the size of the table, and a marker.

use pristine_image::ReadAt;

use crate::error::{Error, Result};

const INDEX: u64 = 0x9682_4d9c_7b12_9ff9;
const TABLE: u64 = 0xe75b_9e11_2f17_417d;
const TABLE_TAIL: u64 = 0x4b4f_050e_5549_ecd1;
/// The chunks' ids are SHA512/256; otherwise SHA256.
const SHA512_256: u64 = 0x2000_0000_0000_0000;
/// Flags that say which attributes of files an archive holds. One of whole disks has none of them.
const ARCHIVE_FLAGS: u64 = 0x0fff_ffff_ffff_ffff;

const HEAD_LEN: usize = 48;
const ITEM_LEN: usize = 40;
/// Size, type; and what follows the items.
const TABLE_HEAD: usize = 16;
const TAIL_LEN: usize = 40;

/// The largest chunk that makes sense; casync itself allows 128 MiB.
pub const MAX_CHUNK: u64 = 128 << 20;
/// The longest index: 16 TiB in chunks of 64 KiB would be ten times as much; it is read as a whole.
const MAX_INDEX: u64 = 1 << 30;

/// The digest by which chunks are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkDigest {
    /// SHA256.
    Sha256,
    /// SHA512/256.
    Sha512_256,
}

/// A chunk of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its id: the digest of its content.
    pub id: [u8; 32],
    /// Where it begins in the image, in bytes.
    pub start: u64,
    /// Where it ends, in bytes; at least one more.
    pub end: u64,
}

/// The index of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaibxIndex {
    digest: ChunkDigest,
    chunks: Vec<Chunk>,
}

impl CaibxIndex {
    /// Whether a file begins like an index of casync.
    pub fn detect(head: &[u8]) -> bool {
        u64_at(head, 0) == Some(HEAD_LEN as u64) && u64_at(head, 8) == Some(INDEX)
    }

    /// Reads an index; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is cut or inconsistent, [`Error::Unsupported`] for an index of an archive (`.caidx`),
    /// and those of `file`.
    pub fn read(file: &dyn ReadAt, name: &str) -> Result<Self> {
        if file.len() > MAX_INDEX {
            let why = format!("an index of more than {MAX_INDEX} bytes");
            return Err(Error::unsupported(name, why));
        }
        let mut bytes = vec![0; file.len() as usize];
        file.read_at(0, &mut bytes)
            .map_err(|error| Error::io(format!("read {name}"), error))?;
        Self::parse(&bytes, name)
    }

    /// Reads an index from memory.
    ///
    /// # Errors
    /// As [`CaibxIndex::read`].
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self> {
        let damaged = |why: &str| Error::damaged(name, format!("as an index of casync: {why}"));
        let field = |at: usize| u64_at(bytes, at).ok_or_else(|| damaged("it is cut"));
        if !Self::detect(bytes) {
            return Err(damaged("it does not begin like one"));
        }
        let flags = field(16)?;
        if flags & ARCHIVE_FLAGS != 0 {
            let why =
                "it is the index of a directory tree (.caidx), not of a disk image (.caibx); \
                       unpack it with casync extract, and give the tree";
            return Err(Error::unsupported(name, why));
        }
        let digest = match flags & SHA512_256 {
            0 => ChunkDigest::Sha256,
            _ => ChunkDigest::Sha512_256,
        };
        let (smallest, average, largest) = (field(24)?, field(32)?, field(40)?);
        if smallest == 0 || smallest > average || average > largest || largest > MAX_CHUNK {
            return Err(damaged("its chunk sizes make no sense"));
        }
        let table = bytes.get(HEAD_LEN..).unwrap_or_default();
        if u64_at(table, 0) != Some(u64::MAX) || u64_at(table, 8) != Some(TABLE) {
            return Err(damaged("its table does not begin where it must"));
        }
        let items = table
            .len()
            .checked_sub(TABLE_HEAD + TAIL_LEN)
            .filter(|len| len % ITEM_LEN == 0)
            .ok_or_else(|| damaged("it is cut"))?;
        let tail = table.get(TABLE_HEAD + items..).unwrap_or_default();
        let tail: Vec<_> = (0..5).filter_map(|field| u64_at(tail, field * 8)).collect();
        if tail != [0, 0, HEAD_LEN as u64, table.len() as u64, TABLE_TAIL] {
            return Err(damaged("it does not end like one; it is cut"));
        }
        let mut chunks = Vec::with_capacity(items / ITEM_LEN);
        let mut start = 0;
        for item in table[TABLE_HEAD..TABLE_HEAD + items].chunks_exact(ITEM_LEN) {
            let end = u64_at(item, 0).unwrap_or(0);
            let mut id = [0; 32];
            id.copy_from_slice(&item[8..]);
            let len = end.saturating_sub(start);
            if len == 0 || len > largest {
                return Err(damaged("it lists a chunk of an impossible size"));
            }
            chunks.push(Chunk { id, start, end });
            start = end;
        }
        if start > i64::MAX as u64 {
            return Err(damaged("it adds up to more bytes than there can be"));
        }
        Ok(CaibxIndex { digest, chunks })
    }

    /// How chunks are named.
    pub fn digest(&self) -> ChunkDigest {
        self.digest
    }

    /// The chunks, in order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The image's size in bytes.
    pub fn len(&self) -> u64 {
        self.chunks.last().map_or(0, |chunk| chunk.end)
    }

    /// Whether the image has no bytes.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The number of the chunk that holds byte `at` of the image.
    pub fn chunk_of(&self, at: u64) -> Option<usize> {
        let number = self.chunks.partition_point(|chunk| chunk.end <= at);
        (number < self.chunks.len()).then_some(number)
    }
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?.first_chunk()?;
    Some(u64::from_le_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |numbers: &[u64]| {
            for number in numbers {
                bytes.extend(number.to_le_bytes());
            }
        };
        put(&[48, INDEX, SHA512_256, 16, 64, 256, u64::MAX, TABLE]);
        put(&[100, 1, 1, 1, 1]);
        put(&[356, 2, 2, 2, 2]);
        put(&[0, 0, 48, 16 + 80 + 40, TABLE_TAIL]);
        bytes
    }

    #[test]
    fn an_index_is_read() {
        let index = CaibxIndex::parse(&sample(), "x").unwrap();
        assert_eq!(index.len(), 356);
        assert_eq!(index.digest(), ChunkDigest::Sha512_256);
        assert_eq!(index.chunk_of(99), Some(0));
        assert_eq!(index.chunk_of(100), Some(1));
        assert_eq!(index.chunk_of(356), None);
    }

    #[test]
    fn damage_is_refused() {
        let good = sample();
        for cut in 0..good.len() {
            assert!(
                CaibxIndex::parse(&good[..cut], "x").is_err(),
                "cut at {cut}"
            );
        }
        let mut long = good.clone();
        long.push(0);
        assert!(CaibxIndex::parse(&long, "x").is_err());
        // Chunks that go backwards, are empty, or larger than allowed.
        for end in [0u64, 100, 99, 357, u64::MAX] {
            let mut bad = good.clone();
            bad[64 + 40..64 + 48].copy_from_slice(&end.to_le_bytes());
            assert!(CaibxIndex::parse(&bad, "x").is_err(), "{end}");
        }
        let mut archive = good;
        archive[16] = 1;
        let refused = CaibxIndex::parse(&archive, "x");
        assert!(matches!(refused, Err(Error::Unsupported { .. })));
    }
}
