// SPDX-License-Identifier: GPL-2.0

//! Deltas: what turns one image into another.
//!
//! A delta holds the hashes of the pages of both images, which prove each other by the image ids, says for each page that
//! changed where each of its blocks is found (in the same place, elsewhere on the old image, in the delta, or nowhere: it
//! is zero), and holds the content of the blocks that the old image does not have, as zstd frames that are compressed
//! against named blocks of the old image. No digests of blocks are in it: who has put a page together hashes its blocks,
//! and the hash of the page says whether all of them are right. So a delta needs no signature, and whatever is wrong with
//! it or with the old blocks on a machine shows before anything is written.
//!
//! [`compare()`] finds the steps from two lists of digests, [`DeltaHead::parse`] and [`Delta::parse`] read a delta,
//! [`decode_frame`] unpacks a frame. Making frames ([`make`]) is the feature `build`.

mod compare;
mod frame;
mod head;
#[cfg(feature = "build")]
pub mod make;
mod map;
#[cfg(feature = "build")]
mod similar;

pub use compare::{compare, Comparison, DigestList, ImageDigests};
pub use frame::decode_frame;
pub use head::DeltaHead;
pub use map::{Delta, DeltaFrame, PageChange, Run, Step, Steps};

/// The most blocks that a frame of a delta may hold: 16 MiB.
pub const MAX_CONTENT_BLOCKS: u64 = 4096;

/// The most blocks of the old image that a frame may refer to: 32 MiB.
pub const MAX_REFERENCE_BLOCKS: u64 = 8192;

/// The most bytes that the map of a delta may take once it is unpacked.
pub const MAX_MAP_LEN: u64 = 64 << 20;

/// The most runs in a delta, of blocks and of references: what a machine keeps about each is bounded.
pub const MAX_RUNS: usize = 2 << 20;

/// The most bytes that a frame of `blocks` blocks may take: zstd's own bound, rounded up.
fn frame_bound(blocks: u64) -> u64 {
    crate::pack::max_frame_len(blocks as usize)
}
