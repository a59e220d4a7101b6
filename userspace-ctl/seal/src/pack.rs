// SPDX-License-Identifier: GPL-2.0

//! Sealed packs: chunks, and the digest of them all, so that damage shows to who has no key.

use std::ops::Range;

use pristine_image::{Digest, FormatError, PackId, MAX_PACK_LEN};

use crate::chunks::{self, SEALED_CHUNK};
use crate::key::StoreKey;

/// Bytes of the digest at the end of each sealed object.
pub const DIGEST_LEN: u64 = 32;

const WHAT: &str = "a pack";

/// Bytes that a pack of `len` bytes takes when it is sealed.
pub fn sealed_len(len: u64) -> u64 {
    chunks::sealed_len(len) + DIGEST_LEN
}

/// The longest pack, when it is sealed.
pub fn max_sealed_len() -> u64 {
    sealed_len(MAX_PACK_LEN)
}

/// The name and the bytes of a pack as it is stored.
///
/// # Errors
/// [`FormatError::Checksum`] if the content does not fit the pack's name.
pub fn seal(key: &StoreKey, pack: &PackId, content: &[u8]) -> Result<Vec<u8>, FormatError> {
    if Digest::of(content).as_bytes() != pack.as_bytes() {
        return Err(FormatError::Checksum("a pack's content".to_owned()));
    }
    let mut bytes = chunks::seal(&key.pack_key(pack.as_bytes()), content)?;
    let digest = Digest::of(&bytes);
    bytes.extend(digest.as_bytes());
    Ok(bytes)
}

/// The name of a pack as it is stored.
pub fn name(key: &StoreKey, pack: &PackId) -> PackId {
    PackId::from_bytes(key.pack_name(pack.as_bytes()))
}

/// Decrypts a whole pack.
///
/// # Errors
/// [`FormatError`] for what was not sealed as this pack.
pub fn open(key: &StoreKey, pack: &PackId, sealed: &[u8]) -> Result<Vec<u8>, FormatError> {
    check(sealed, WHAT)?;
    let all = &sealed[..sealed.len() - DIGEST_LEN as usize];
    let mut content = chunks::open(&key.pack_key(pack.as_bytes()), 0, all, WHAT)?;
    let chunks = all.len() as u64 / SEALED_CHUNK;
    content.truncate(chunks::content_len(&content, chunks, WHAT)? as usize);
    Ok(content)
}

/// Decrypts the chunks that hold `range`, which are those of [`chunks::sealed_range`]. What is behind the pack's end is not
/// told from it: who reads knows where that is.
///
/// # Errors
/// As [`open`].
pub fn open_range(
    key: &StoreKey,
    pack: &PackId,
    range: &Range<u64>,
    sealed: &[u8],
) -> Result<Vec<u8>, FormatError> {
    if range.is_empty() {
        return Ok(Vec::new());
    }
    let first = range.start / chunks::CHUNK;
    let mut content = chunks::open(&key.pack_key(pack.as_bytes()), first, sealed, WHAT)?;
    let skip = (range.start - first * chunks::CHUNK) as usize;
    let len = range.end.saturating_sub(range.start) as usize;
    if content.len() < skip + len {
        return Err(FormatError::Checksum("a pack, which is cut,".to_owned()));
    }
    content.drain(..skip);
    content.truncate(len);
    Ok(content)
}

/// Where the last chunk of a sealed pack of `len` bytes is, and how many chunks there are.
///
/// # Errors
/// [`FormatError::Invalid`] for a length that no sealed pack has.
pub fn last_chunk(len: u64) -> Result<(Range<u64>, u64), FormatError> {
    let chunks = len.saturating_sub(DIGEST_LEN);
    if chunks == 0 || chunks % SEALED_CHUNK != 0 || len > max_sealed_len() {
        let why = format!("no encrypted pack has {len} bytes");
        return Err(FormatError::invalid(WHAT, why));
    }
    Ok((chunks - SEALED_CHUNK..chunks, chunks / SEALED_CHUNK))
}

/// The pack's length, from the last of its `count` chunks.
///
/// # Errors
/// As [`open`].
pub fn content_len(
    key: &StoreKey,
    pack: &PackId,
    count: u64,
    last: &[u8],
) -> Result<u64, FormatError> {
    let opened = chunks::open(&key.pack_key(pack.as_bytes()), count - 1, last, WHAT)?;
    chunks::content_len(&opened, count, WHAT)
}

/// Checks the digest at the end of a sealed object, for which no key is needed: it finds damage, and proves nothing.
///
/// # Errors
/// [`FormatError::Checksum`].
pub fn check(sealed: &[u8], what: &str) -> Result<(), FormatError> {
    let split = sealed.len().checked_sub(DIGEST_LEN as usize);
    let parts = split.and_then(|at| sealed.split_at_checked(at));
    match parts {
        Some((all, digest)) if Digest::of(all).as_bytes() == digest => Ok(()),
        _ => Err(FormatError::Checksum(format!("{what}, as it is stored,"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_round_trip_whole_and_in_part() {
        let key = StoreKey::from_bytes([9; 32]);
        let content: Vec<u8> = (0..30_001).map(|n| (n % 241) as u8).collect();
        let id = PackId::new(Digest::of(&content));
        let sealed = seal(&key, &id, &content).unwrap();
        assert_eq!(sealed.len() as u64, sealed_len(30_001));
        assert_eq!(open(&key, &id, &sealed).unwrap(), content);
        let range = 5_000..13_000;
        let at = chunks::sealed_range(&range);
        let part = &sealed[at.start as usize..at.end as usize];
        assert_eq!(
            open_range(&key, &id, &range, part).unwrap(),
            content[5_000..13_000]
        );
        assert!(open_range(&key, &id, &(9_000..13_000), part).is_err());
        let (last, count) = last_chunk(sealed.len() as u64).unwrap();
        let last = &sealed[last.start as usize..last.end as usize];
        assert_eq!(content_len(&key, &id, count, last).unwrap(), 30_001);
        // Another pack's name, and another key.
        let other = PackId::from_bytes([1; 32]);
        assert!(open(&key, &other, &sealed).is_err());
        assert!(open(&StoreKey::from_bytes([8; 32]), &id, &sealed).is_err());
        assert!(seal(&key, &other, &content).is_err());
        assert!(last_chunk(32).is_err() && last_chunk(5000).is_err());
    }
}
