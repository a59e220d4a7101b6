// SPDX-License-Identifier: GPL-2.0

//! What goes over the wire between peers, see `PEERS.md`.
//!
//! A request has a header of [`REQUEST_LEN`] bytes and up to [`MAX_BLOCKS`] entries of [`ENTRY_LEN`] bytes; an answer has
//! a header of [`ANSWER_LEN`] bytes and what that says follows. All numbers are little-endian. One request after the other
//! goes over a connection.

use pristine_image::{Digest, ImageId};

/// How a request begins; the last byte is the protocol's version.
pub const REQUEST_MAGIC: [u8; 4] = *b"PPR\x01";
/// How an answer begins.
pub const ANSWER_MAGIC: [u8; 4] = *b"PPA\x01";
/// Bytes of a request's header.
pub const REQUEST_LEN: usize = 56;
/// Bytes of an entry.
pub const ENTRY_LEN: usize = 40;
/// Bytes of an answer's header.
pub const ANSWER_LEN: usize = 24;
/// The most blocks of a request.
pub const MAX_BLOCKS: usize = 64;
/// The most sections of a part of a map: 32 GiB of image, 1 KiB.
pub const MAX_SECTIONS: u32 = 8192;

const KIND_BLOCKS: u32 = 1;
const KIND_MAP: u32 = 2;

/// A block, by its number in the image and its digest. Who knows the digest may have the block: it is in the image's
/// manifest and, where access to that is limited, nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number, counted in blocks of 4 KiB.
    pub block: u64,
    /// What it must be.
    pub digest: Digest,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// So many blocks, whose entries follow: 1 to [`MAX_BLOCKS`].
    Blocks(u32),
    /// Which sections the peer has, of `count` from `first` on: 1 to [`MAX_SECTIONS`].
    Map {
        /// The first section.
        first: u64,
        /// How many.
        count: u32,
    },
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The image.
    pub image: ImageId,
    /// What is asked for.
    pub ask: Ask,
}

/// How a request was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// What the peer has of it follows.
    Ok,
    /// The peer has better things to do now.
    Busy,
    /// The peer serves another image, or none any more.
    OtherImage,
}

/// An answer's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it was taken; anything but [`Status::Ok`] has nothing following.
    pub status: Status,
    /// Bytes that follow: for blocks 4,096 for each bit in `mask`, for a map those of its bits.
    pub len: u32,
    /// For blocks: bit `n` says that entry `n` follows, in ascending order. For a map: sections of the whole device.
    pub mask: u64,
}

/// Why bytes are no request or answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It begins with something else.
    #[error("this is not the peers' protocol, or another version of it")]
    Magic,
    /// A number that cannot be.
    #[error("{0} cannot be {1}")]
    Number(&'static str, u64),
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    four.map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    eight.map_or(0, u64::from_le_bytes)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let some = bytes.get(at..at + N).and_then(|b| b.try_into().ok());
    some.unwrap_or([0; N])
}

impl Request {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let (kind, count, first) = match self.ask {
            Ask::Blocks(count) => (KIND_BLOCKS, count, 0),
            Ask::Map { first, count } => (KIND_MAP, count, first),
        };
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC);
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&count.to_le_bytes());
        bytes[16..24].copy_from_slice(&first.to_le_bytes());
        bytes[24..].copy_from_slice(self.image.as_bytes());
        bytes
    }

    /// Understands a header.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, WireError> {
        if bytes[..4] != REQUEST_MAGIC {
            return Err(WireError::Magic);
        }
        let (kind, count, first) = (u32_at(bytes, 4), u32_at(bytes, 8), u64_at(bytes, 16));
        let reserved = u32_at(bytes, 12);
        if reserved != 0 {
            return Err(WireError::Number("the reserved field", reserved.into()));
        }
        let ask = match kind {
            KIND_BLOCKS if (1..=MAX_BLOCKS as u32).contains(&count) && first == 0 => {
                Ask::Blocks(count)
            }
            KIND_MAP if (1..=MAX_SECTIONS).contains(&count) => Ask::Map { first, count },
            KIND_BLOCKS | KIND_MAP => {
                return Err(WireError::Number(
                    "the number of things wanted",
                    count.into(),
                ))
            }
            _ => return Err(WireError::Number("the kind of a request", kind.into())),
        };
        Ok(Request {
            image: ImageId::from_bytes(array(bytes, 24)),
            ask,
        })
    }
}

impl Entry {
    /// Its bytes.
    pub fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..8].copy_from_slice(&self.block.to_le_bytes());
        bytes[8..].copy_from_slice(self.digest.as_bytes());
        bytes
    }

    /// From its bytes: any are an entry.
    pub fn decode(bytes: &[u8; ENTRY_LEN]) -> Self {
        Entry {
            block: u64_at(bytes, 0),
            digest: Digest::from_bytes(array(bytes, 8)),
        }
    }
}

impl Answer {
    /// Only a status.
    pub fn only(status: Status) -> Self {
        Answer {
            status,
            len: 0,
            mask: 0,
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; ANSWER_LEN] {
        let status: u32 = match self.status {
            Status::Ok => 0,
            Status::Busy => 1,
            Status::OtherImage => 2,
        };
        let mut bytes = [0; ANSWER_LEN];
        bytes[..4].copy_from_slice(&ANSWER_MAGIC);
        bytes[4..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..].copy_from_slice(&self.mask.to_le_bytes());
        bytes
    }

    /// Understands the header of an answer to `ask`: what it announces is never more than was asked for.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8; ANSWER_LEN], ask: Ask) -> Result<Self, WireError> {
        if bytes[..4] != ANSWER_MAGIC {
            return Err(WireError::Magic);
        }
        let status = match u32_at(bytes, 4) {
            0 => Status::Ok,
            1 => Status::Busy,
            2 => Status::OtherImage,
            status => return Err(WireError::Number("a status", status.into())),
        };
        let (len, mask) = (u32_at(bytes, 8), u64_at(bytes, 16));
        let fits = match (status, ask) {
            (Status::Ok, Ask::Blocks(count)) => {
                let known = mask.checked_shr(count).unwrap_or(0) == 0;
                known && len == mask.count_ones() * pristine_image::BLOCK_SIZE as u32
            }
            (Status::Ok, Ask::Map { count, .. }) => len <= count.div_ceil(8),
            _ => len == 0,
        };
        if !fits {
            return Err(WireError::Number("the length of this answer", len.into()));
        }
        Ok(Answer { status, len, mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back() {
        let image = ImageId::from_bytes([7; 32]);
        for ask in [
            Ask::Blocks(1),
            Ask::Blocks(64),
            Ask::Map {
                first: 1 << 40,
                count: MAX_SECTIONS,
            },
        ] {
            let request = Request { image, ask };
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
        let entry = Entry {
            block: u64::MAX,
            digest: Digest::of(b"x"),
        };
        assert_eq!(Entry::decode(&entry.encode()), entry);
        let answer = Answer {
            status: Status::Ok,
            len: 8192,
            mask: 0b1001,
        };
        assert_eq!(Answer::decode(&answer.encode(), Ask::Blocks(4)), Ok(answer));
    }

    #[test]
    fn nonsense_is_refused() {
        let image = ImageId::from_bytes([7; 32]);
        let good = Request {
            image,
            ask: Ask::Blocks(3),
        }
        .encode();
        for (at, byte) in [
            (0, b'X'),
            (3, 2),
            (4, 9),
            (8, 0),
            (8, 65),
            (11, 1),
            (12, 1),
            (16, 1),
        ] {
            let mut bad = good;
            bad[at] = byte;
            assert!(Request::decode(&bad).is_err(), "{at}");
        }
        let answer = |status, len, mask| Answer { status, len, mask }.encode();
        let blocks = Ask::Blocks(4);
        // A block that was not asked for, fewer bytes than blocks, content of no answer.
        for bad in [
            answer(Status::Ok, 4096, 0b10000),
            answer(Status::Ok, 4096, 0b11),
            answer(Status::Busy, 4096, 1),
        ] {
            assert!(Answer::decode(&bad, blocks).is_err());
        }
        let all = answer(Status::Ok, 64 * 4096, u64::MAX);
        assert!(Answer::decode(&all, Ask::Blocks(64)).is_ok());
        let map = Ask::Map { first: 0, count: 9 };
        assert!(Answer::decode(&answer(Status::Ok, 2, 9), map).is_ok());
        assert!(Answer::decode(&answer(Status::Ok, 3, 9), map).is_err());
        let mut bad = answer(Status::Ok, 0, 0);
        bad[4] = 3;
        assert!(Answer::decode(&bad, blocks).is_err());
    }
}
