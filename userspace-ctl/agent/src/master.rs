// SPDX-License-Identifier: GPL-2.0

//! The master image as the agent sees it: digests of blocks, and their content once verified.

use pristine_metadata::Run;
use pristine_store::update::Local;

use crate::failure::Failure;

/// A BLAKE3 digest of a block.
pub type BlockDigest = [u8; 32];

/// What fetching cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Requests to the store.
    pub requests: u64,
    /// Bytes that came over the network, manifest included.
    pub bytes: u64,
}

/// Takes blocks as they arrive: number of the first block, then the content of one or more whole blocks.
pub type Sink<'a> = dyn FnMut(u64, &[u8]) -> Result<(), Failure> + 'a;

/// An image that can be read by blocks of 4 KiB. What it hands out is verified against the image's id.
pub trait Master {
    /// The image's id.
    fn id(&self) -> [u8; 32];
    /// Its generation on the channel it was found by, 0 if it was asked for by id.
    fn generation(&self) -> u64;
    /// Its size in bytes, a multiple of 4 KiB.
    fn bytes(&self) -> u64;
    /// The digests of a run of blocks within the image.
    ///
    /// # Errors
    ///
    /// The store does not serve, or not what was published.
    fn digests(&mut self, run: Run) -> Result<Vec<BlockDigest>, Failure>;
    /// Fetches blocks, in any order, in parallel, in bounded memory.
    ///
    /// # Errors
    ///
    /// As [`Master::digests`], after trying again; or the first error of `sink`.
    fn fetch(&mut self, runs: &[Run], sink: &mut Sink<'_>) -> Result<(), Failure>;
    /// The blocks whose content differs from that of another image, or `None` if that is not known any more. Blocks
    /// beyond the end of either image differ.
    ///
    /// # Errors
    ///
    /// The store does not serve.
    fn differing_from(&mut self, other: &[u8; 32]) -> Result<Option<Vec<Run>>, Failure>;
    /// Finds the cheapest way here from another image, for [`Master::update`], and the blocks that may differ: others are
    /// known not to. `None` if the other image is not known any more.
    ///
    /// # Errors
    ///
    /// The store does not serve.
    fn plan_update(&mut self, other: &[u8; 32]) -> Result<Option<Vec<Run>>, Failure> {
        self.differing_from(other)
    }
    /// Goes the way that was found, as far as a delta and what the disk holds lead: blocks that it has made right, it has
    /// said so. The rest is to be fetched.
    ///
    /// # Errors
    ///
    /// The store does not serve; `disk` knows about its own.
    fn update(&mut self, disk: &mut dyn Local) -> Result<(), Failure> {
        let _ = disk;
        Ok(())
    }
    /// What it cost so far.
    fn traffic(&self) -> Traffic;
}
