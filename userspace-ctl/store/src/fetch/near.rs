// SPDX-License-Identifier: GPL-2.0

//! What neighbours have of a request to the store need not be asked of that.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use pristine_image::{BLOCK_SIZE, DIGESTS_PER_PAGE};

use super::plan::{FrameJob, Piece};
use super::Fetch;
use crate::error::{Error, Result};
use crate::peers::{Neighbours, Patience, Wanted};

impl Fetch<'_> {
    /// Delivers those frames of which neighbours have all that is wanted; `jobs` keeps the others. Neighbours verify what
    /// they take from each other.
    pub(super) fn ask_neighbours(
        &self,
        neighbours: &Neighbours,
        jobs: &mut Vec<FrameJob>,
    ) -> Result<()> {
        let mut wanted = Vec::new();
        for block in jobs.iter().flat_map(|job| &job.pieces).flat_map(blocks) {
            let page = self.reader.page(block / DIGESTS_PER_PAGE as u64)?;
            // CAST: below DIGESTS_PER_PAGE.
            if let Some(found) = page.block((block % DIGESTS_PER_PAGE as u64) as usize) {
                let digest = found.digest;
                wanted.push(Wanted { block, digest });
            }
        }
        wanted.sort_unstable_by_key(|wanted| wanted.block);
        let batches = neighbours.fetch(&wanted, &Patience::BACKGROUND);
        let mut came: HashMap<u64, &[u8]> = HashMap::new();
        for batch in &batches {
            let content = batch.data.chunks_exact(BLOCK_SIZE);
            came.extend(batch.blocks.iter().map(|wanted| wanted.block).zip(content));
        }
        let mut left = Vec::new();
        for job in jobs.drain(..) {
            let content = |piece: &Piece| {
                let all: Option<Vec<&[u8]>> =
                    blocks(piece).map(|b| came.get(&b).copied()).collect();
                all.map(|all| (piece.block, u64::from(piece.count), all.concat()))
            };
            let contents: Option<Vec<_>> = job.pieces.iter().map(content).collect();
            let Some(contents) = contents else {
                left.push(job);
                continue;
            };
            for (first, count, content) in contents {
                self.options.cancel.check()?;
                self.sink.blocks(first, &content).map_err(Error::Sink)?;
                self.blocks.fetch_add(count, Ordering::Relaxed);
            }
        }
        *jobs = left;
        Ok(())
    }
}

/// The blocks of a piece.
fn blocks(piece: &Piece) -> std::ops::Range<u64> {
    piece.block..piece.block + u64::from(piece.count)
}
