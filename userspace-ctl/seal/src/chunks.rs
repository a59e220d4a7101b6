// SPDX-License-Identifier: GPL-2.0

//! Chunks: content in pieces of 4 KiB, each encrypted and authenticated by itself.
//!
//! The content is followed by zeros and its length in 8 bytes, up to a multiple of [`CHUNK`]. Each chunk is encrypted with
//! ChaCha20-Poly1305 under the object's own key, with its number as the nonce. Keys are derived from the content, so that
//! no key and nonce are used for two contents.

use std::ops::Range;

use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use pristine_image::FormatError;

/// Bytes of content in a chunk.
pub const CHUNK: u64 = 4096;
/// Bytes that authenticate a chunk.
const TAG: u64 = 16;
/// Bytes of a chunk as it is stored.
pub const SEALED_CHUNK: u64 = CHUNK + TAG;
/// Bytes of the content's length at the end of the last chunk.
const LEN_BYTES: u64 = 8;

/// Bytes that the chunks of so much content take.
pub fn sealed_len(len: u64) -> u64 {
    count(len).saturating_mul(SEALED_CHUNK)
}

/// How many chunks so much content takes.
fn count(len: u64) -> u64 {
    len.saturating_add(LEN_BYTES).div_ceil(CHUNK)
}

/// The chunks that hold a range of the content, as a range of stored bytes, from 0 for the first chunk.
pub fn sealed_range(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    let (first, end) = (range.start / CHUNK, range.end.div_ceil(CHUNK));
    first.saturating_mul(SEALED_CHUNK)..end.saturating_mul(SEALED_CHUNK)
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    nonce
}

fn failed(what: &str) -> FormatError {
    FormatError::Checksum(format!("{what}, which is encrypted,"))
}

/// Encrypts content. A key must not be used for any other content.
///
/// # Errors
/// None that can happen: the cipher takes far longer chunks.
pub fn seal(key: &[u8; 32], content: &[u8]) -> Result<Vec<u8>, FormatError> {
    let len = content.len() as u64;
    let mut out = Vec::with_capacity(sealed_len(len) as usize);
    let cipher = ChaCha20Poly1305::new(key.into());
    for number in 0..count(len) {
        let start = out.len();
        let rest = content.get((number * CHUNK) as usize..).unwrap_or_default();
        out.extend_from_slice(&rest[..rest.len().min(CHUNK as usize)]);
        out.resize(start + CHUNK as usize, 0);
        if number + 1 == count(len) {
            let at = out.len() - LEN_BYTES as usize;
            out[at..].copy_from_slice(&len.to_le_bytes());
        }
        let tag = cipher
            .encrypt_inout_detached(&nonce(number), &[], (&mut out[start..]).into())
            .map_err(|_| failed("a chunk"))?;
        out.extend_from_slice(&tag);
    }
    Ok(out)
}

/// Decrypts whole chunks, the first of which is number `first`. `what` is what they are of, for the error.
///
/// # Errors
/// [`FormatError::Checksum`] for a chunk that is not what was encrypted as this number of this object.
pub fn open(key: &[u8; 32], first: u64, chunks: &[u8], what: &str) -> Result<Vec<u8>, FormatError> {
    let cipher = ChaCha20Poly1305::new(key.into());
    let mut out = Vec::with_capacity(chunks.len());
    for (number, chunk) in (first..).zip(chunks.chunks(SEALED_CHUNK as usize)) {
        let Some((content, tag)) = chunk.split_at_checked(CHUNK as usize) else {
            return Err(failed(what));
        };
        let tag = tag.try_into().map_err(|_| failed(what))?;
        let start = out.len();
        out.extend_from_slice(content);
        cipher
            .decrypt_inout_detached(&nonce(number), &[], (&mut out[start..]).into(), tag)
            .map_err(|_| failed(what))?;
    }
    Ok(out)
}

/// The content's length, from the decrypted last chunk; `chunks` is how many there are.
///
/// # Errors
/// [`FormatError::Invalid`] if it contradicts that.
pub fn content_len(last: &[u8], chunks: u64, what: &str) -> Result<u64, FormatError> {
    let bytes = last.last_chunk::<8>().copied().unwrap_or_default();
    let len = u64::from_le_bytes(bytes);
    match count(len) == chunks {
        true => Ok(len),
        false => Err(FormatError::invalid(
            what,
            format!("it claims {len} bytes in {chunks} chunks"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_at_the_edges_round_trip() {
        let key = [3; 32];
        for len in [0, 1, 4087, 4088, 4089, 4096, 8184, 8185, 100_000] {
            let content: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
            let sealed = seal(&key, &content).unwrap();
            assert_eq!(sealed.len() as u64, sealed_len(len));
            let opened = open(&key, 0, &sealed, "it").unwrap();
            assert_eq!(&opened[..len as usize], content);
            let chunks = opened.len() as u64 / CHUNK;
            assert_eq!(content_len(&opened, chunks, "it").unwrap(), len);
            assert!(content_len(&opened, chunks + 1, "it").is_err());
        }
    }

    #[test]
    fn ranges_are_whole_chunks() {
        assert_eq!(sealed_range(&(0..1)), 0..4112);
        assert_eq!(sealed_range(&(4095..4097)), 0..8224);
        assert_eq!(sealed_range(&(8192..12288)), 8224..12336);
        assert_eq!(sealed_range(&(5..5)), 0..0);
    }

    #[test]
    fn no_chunk_passes_for_another() {
        let key = [3; 32];
        let content: Vec<u8> = (0..20_000).map(|n| (n % 253) as u8).collect();
        let sealed = seal(&key, &content).unwrap();
        let part = |n: usize| &sealed[n * 4112..(n + 1) * 4112];
        assert_eq!(open(&key, 2, part(2), "it").unwrap(), content[8192..12288]);
        assert!(open(&key, 1, part(2), "it").is_err());
        assert!(open(&[4; 32], 2, part(2), "it").is_err());
        assert!(open(&key, 2, &part(2)[..4111], "it").is_err());
        assert!(open(&key, 2, &part(2)[..10], "it").is_err());
        for bit in [0, 8 * 2000, 8 * 4095, 8 * 4096, 8 * 4111 + 7] {
            let mut bad = part(2).to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&key, 2, &bad, "it").is_err(), "bit {bit}");
        }
    }
}
