// SPDX-License-Identifier: GPL-2.0

//! Blocks that were loaded.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use pristine_image::{Digest, BLOCK_SIZE};

use crate::cache::Unpacked;

/// Loaded blocks, verified. Blocks that it does not hold are zero.
#[derive(Debug, Default)]
pub struct Loaded {
    pub(crate) blocks: HashMap<u64, (Arc<Unpacked>, u32, Digest)>,
    /// Of each frame that was used, one block: the image block, its index in the frame, and the frame's blocks.
    pub frames: Vec<(u64, u32, u32)>,
    /// Whether the source was asked for any of it.
    pub(crate) fetched: bool,
}

impl Loaded {
    /// Whether a run of image blocks is all zero.
    pub fn is_zero(&self, mut blocks: Range<u64>) -> bool {
        blocks.all(|b| !self.blocks.contains_key(&b))
    }

    /// The content of a run of image blocks.
    pub fn content(&self, blocks: Range<u64>) -> Vec<u8> {
        // CAST: callers ask for as much as one answer carries.
        let mut data = Vec::with_capacity((blocks.end - blocks.start) as usize * BLOCK_SIZE);
        for block in blocks {
            let found = self.blocks.get(&block);
            let content = found.and_then(|(f, i, digest)| f.block(*i, digest));
            data.extend_from_slice(content.unwrap_or(&[0; BLOCK_SIZE]));
        }
        data
    }
}
