// SPDX-License-Identifier: GPL-2.0

//! The image format of Pristine.
//!
//! An image is a sequence of blocks of 4 KiB, known by its Merkle root ([`merkle`]). It is stored as a *manifest*
//! ([`manifest`]: the digest of each block, and where the block's content lies) and as *packs* ([`pack`]: sequences
//! of zstd frames of up to 32 blocks). `FORMAT.md` beside this crate describes both to the byte.
//!
//! The readers do no I/O: they say which bytes of an object they need and take them as slices, so that the same
//! code serves files, HTTP ranges and tests. Nothing read is believed before it is verified, down to the image
//! id. Making images ([`build`]) is the feature `build`, which a reader does without.

#[cfg(feature = "build")]
pub mod builder;
pub mod delta;
pub mod digest;
pub mod error;
#[cfg(feature = "build")]
pub mod ext4;
#[cfg(feature = "build")]
pub mod fs;
mod hashing;
pub mod manifest;
pub mod merkle;
pub mod pack;
pub mod trace;
mod wire;

#[cfg(feature = "build")]
pub use builder::{
    build, BuildError, BuildOptions, Built, Known, PackSink, RawFile, ReadAt, Source,
};
pub use digest::{is_zero, Digest, ImageId, PackId, ParseDigestError};
pub use error::FormatError;
pub use manifest::{Frame, Head, Info, Manifest, Page};

/// Bytes in a block, the unit of everything: digests, dirty bits, reads.
pub const BLOCK_SIZE: usize = 4096;

/// Block digests in a page of the manifest: a page covers 4 MiB of image.
pub const DIGESTS_PER_PAGE: usize = 1024;

/// The largest image, in blocks: 16 TiB.
pub const MAX_BLOCKS: u64 = 1 << 32;

/// The most blocks that a frame may hold (32 is the default): what one block can cost to read is bounded.
pub const MAX_FRAME_BLOCKS: usize = 256;

/// The largest pack, in bytes; builders stay below 64 MiB.
pub const MAX_PACK_LEN: u64 = 256 << 20;
