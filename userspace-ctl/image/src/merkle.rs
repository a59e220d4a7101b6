// SPDX-License-Identifier: GPL-2.0

//! The Merkle tree over an image's blocks, whose root is the image's id.
//!
//! Two levels: the digests of 1024 consecutive blocks make a *page*, and the root is taken over the hashes of all
//! pages together with the image's size. So a page can be verified alone, as soon as the list of page hashes
//! is verified against the id: 32 bytes for every 4 MiB of image. Both levels are hashed in domains of their own
//! (BLAKE3's key derivation mode), so that a page can never pass for a root or for a block.

use crate::digest::{Digest, ImageId};
use crate::{BLOCK_SIZE, DIGESTS_PER_PAGE};

const PAGE_DOMAIN: &str = "pristine 2026-11 image digest page";
const ROOT_DOMAIN: &str = "pristine 2026-11 image root";
const BLINDED_DOMAIN: &str = "pristine 2026-11 blinded image root";

/// The version of the tree's rules, part of every root.
const TREE_VERSION: u32 = 1;

/// The hash of a page of at most [`DIGESTS_PER_PAGE`] block digests.
pub fn page_hash<'a>(digests: impl IntoIterator<Item = &'a Digest>) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(PAGE_DOMAIN);
    let mut buffer = Vec::with_capacity(32 * DIGESTS_PER_PAGE);
    for digest in digests {
        buffer.extend_from_slice(digest.as_bytes());
    }
    hasher.update(&buffer);
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

/// The root over the hashes of an image's pages; `size` is the image's size in bytes.
pub fn root<'a>(size: u64, page_hashes: impl ExactSizeIterator<Item = &'a Digest>) -> ImageId {
    let mut hasher = blake3::Hasher::new_derive_key(ROOT_DOMAIN);
    hasher.update(&TREE_VERSION.to_le_bytes());
    hasher.update(&size.to_le_bytes());
    hasher.update(&(BLOCK_SIZE as u32).to_le_bytes());
    hasher.update(&(DIGESTS_PER_PAGE as u32).to_le_bytes());
    hasher.update(&(page_hashes.len() as u64).to_le_bytes());
    for hash in page_hashes {
        hasher.update(hash.as_bytes());
    }
    ImageId::from_bytes(*hasher.finalize().as_bytes())
}

/// The id of an encrypted image: its root together with a secret number, so that the id does not tell who guesses at the
/// content whether that is right. It vouches for the content no less: another root and another number with the same
/// id cannot be found.
pub fn blinded(root: &ImageId, blinding: &Blinding) -> ImageId {
    let mut hasher = blake3::Hasher::new_derive_key(BLINDED_DOMAIN);
    hasher.update(blinding).update(root.as_bytes());
    ImageId::from_bytes(*hasher.finalize().as_bytes())
}

/// What goes into the id of an encrypted image.
pub type Blinding = [u8; 32];

/// As [`root`], or [`blinded`] if there is a blinding.
pub(crate) fn image_id<'a>(
    size: u64,
    page_hashes: impl ExactSizeIterator<Item = &'a Digest>,
    blinding: Option<&Blinding>,
) -> ImageId {
    let root = root(size, page_hashes);
    match blinding {
        Some(blinding) => blinded(&root, blinding),
        None => root,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_do_not_mix() {
        let digest = Digest::of(b"x");
        let page = page_hash([&digest]);
        assert_ne!(page, Digest::of(digest.as_bytes()));
        assert_ne!(root(4096, [page].iter()).as_bytes(), page.as_bytes());
        assert_ne!(root(4096, [page].iter()), root(8192, [page].iter()));
        let plain = root(4096, [page].iter());
        assert_ne!(blinded(&plain, &[1; 32]), plain);
        assert_ne!(blinded(&plain, &[1; 32]), blinded(&plain, &[2; 32]));
        assert_eq!(
            image_id(4096, [page].iter(), Some(&[1; 32])),
            blinded(&plain, &[1; 32])
        );
    }
}
