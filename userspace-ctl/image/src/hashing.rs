// SPDX-License-Identifier: GPL-2.0

//! Many blocks hashed at once.
//!
//! BLAKE3 splits what it hashes into chunks of 1 KiB that a processor's vector instructions take side by side, 8 with AVX2 and
//! 16 with AVX-512. A block has only 4 of them, so hashed alone it leaves half of the lanes or more unused. Here the same chunk of
//! as many blocks as there are lanes goes through together, then the nodes above: twice as fast, and the digests are the same.
//!
//! The crate's vectorised functions are public without being documented; Cargo.lock holds its version, and the test below
//! compares with the documented function.

use blake3::platform::Platform;
use blake3::IncrementCounter;

use crate::digest::{is_zero, Digest, DIGEST_LEN};
use crate::BLOCK_SIZE;

/// Bytes of a chunk.
const CHUNK: usize = 1024;
/// Chunks of a block.
const CHUNKS: usize = BLOCK_SIZE / CHUNK;
/// Bytes of a node of the tree: two digests.
const NODE: usize = 2 * DIGEST_LEN;
/// Most blocks at once: no processor has more lanes.
const LANES: usize = 16;

// From the specification of BLAKE3: the initial chaining value, which is the key of unkeyed hashing, and flags.
const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;

impl Digest {
    /// The digests of blocks, each of [`BLOCK_SIZE`] bytes: as [`Digest::of`] each of them, in half of the time.
    pub fn of_blocks<'a>(blocks: impl IntoIterator<Item = &'a [u8; BLOCK_SIZE]>) -> Vec<Digest> {
        let platform = Platform::detect();
        let mut blocks = blocks.into_iter();
        let mut digests = Vec::with_capacity(blocks.size_hint().0);
        let mut group: [&[u8; BLOCK_SIZE]; LANES] = [&[0; BLOCK_SIZE]; LANES];
        loop {
            let mut count = 0;
            for (place, block) in group.iter_mut().zip(&mut blocks) {
                *place = block;
                count += 1;
            }
            match &group[..count] {
                [] => return digests,
                [block] => digests.push(Digest::of(*block)),
                group => hash_group(platform, group, &mut digests),
            }
        }
    }

    /// As [`Digest::of_blocks`], of blocks that lie one after the other; those that are zero are not hashed at all. What is no
    /// whole block at the end is left out.
    pub fn of_each_block(data: &[u8]) -> Vec<Digest> {
        let blocks = data.chunks_exact(BLOCK_SIZE);
        let is_content: Vec<bool> = blocks.clone().map(|block| !is_zero(block)).collect();
        let content = blocks
            .zip(&is_content)
            .filter(|(_, is_content)| **is_content);
        // Each is as long as it says.
        let content = content.filter_map(|(block, _)| block.first_chunk());
        let mut digests = Self::of_blocks(content).into_iter();
        let next = |is_content| match is_content {
            true => digests.next().unwrap_or_else(Digest::zero_block),
            false => Digest::zero_block(),
        };
        is_content.into_iter().map(next).collect()
    }
}

/// Hashes up to [`LANES`] blocks.
fn hash_group(platform: Platform, blocks: &[&[u8; BLOCK_SIZE]], digests: &mut Vec<Digest>) {
    let count = blocks.len();
    // Of each block, its chunks' values in a row: the nodes above them.
    let mut leaves = [[[0; NODE]; CHUNKS / 2]; LANES];
    for chunk in 0..CHUNKS {
        let mut inputs: [&[u8; CHUNK]; LANES] = [&[0; CHUNK]; LANES];
        for (input, block) in inputs.iter_mut().zip(blocks) {
            // A block is long enough for each of its chunks.
            if let Some(bytes) = block[chunk * CHUNK..].first_chunk() {
                *input = bytes;
            }
        }
        let mut values = [0; LANES * DIGEST_LEN];
        platform.hash_many(
            &inputs[..count],
            &IV,
            chunk as u64,
            IncrementCounter::No,
            0,
            CHUNK_START,
            CHUNK_END,
            &mut values,
        );
        let at = chunk % 2 * DIGEST_LEN;
        for (leaf, value) in leaves.iter_mut().zip(values.chunks_exact(DIGEST_LEN)) {
            leaf[chunk / 2][at..at + DIGEST_LEN].copy_from_slice(value);
        }
    }
    let mut roots = [[0; NODE]; LANES];
    for side in 0..CHUNKS / 2 {
        let mut nodes: [&[u8; NODE]; LANES] = [&[0; NODE]; LANES];
        for (node, leaves) in nodes.iter_mut().zip(&leaves) {
            *node = &leaves[side];
        }
        let values = parents(platform, &nodes[..count], PARENT);
        let at = side * DIGEST_LEN;
        for (root, value) in roots.iter_mut().zip(values.chunks_exact(DIGEST_LEN)) {
            root[at..at + DIGEST_LEN].copy_from_slice(value);
        }
    }
    let mut nodes: [&[u8; NODE]; LANES] = [&[0; NODE]; LANES];
    for (node, root) in nodes.iter_mut().zip(&roots) {
        *node = root;
    }
    let values = parents(platform, &nodes[..count], PARENT | ROOT);
    let values = values.chunks_exact(DIGEST_LEN).take(count);
    digests.extend(values.filter_map(|value| value.first_chunk().copied().map(Digest::from_bytes)));
}

/// The values of nodes.
fn parents(platform: Platform, nodes: &[&[u8; NODE]], flags: u8) -> [u8; LANES * DIGEST_LEN] {
    let mut values = [0; LANES * DIGEST_LEN];
    platform.hash_many(
        nodes,
        &IV,
        0,
        IncrementCounter::No,
        flags,
        0,
        0,
        &mut values,
    );
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_at_once_have_the_digests_that_they_have_alone() {
        for count in (0..=2 * LANES + 3).chain([100]) {
            let len = count * BLOCK_SIZE + count % 7;
            let byte = |at: usize| match at / BLOCK_SIZE % 5 {
                3 => 0,
                block => (at * at / 37 + block) as u8,
            };
            let data: Vec<u8> = (0..len).map(byte).collect();
            let alone: Vec<Digest> = data.chunks_exact(BLOCK_SIZE).map(Digest::of).collect();
            assert_eq!(Digest::of_each_block(&data), alone, "{count}");
        }
    }
}
