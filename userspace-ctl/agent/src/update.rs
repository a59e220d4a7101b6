// SPDX-License-Identifier: GPL-2.0

//! The disk as an update sees it: what is made right is written, flushed, and only then called clean, in batches as
//! [`crate::restore`] does it (rule 2 of the contract). A cut leaves blocks stale that are right already, never the
//! other way round.

use std::io;
use std::ops::Range;

use pristine_metadata::{BlockState, Changes, Metadata, Planes, Run, Select, Storage};
use pristine_store::update::Local;

use crate::failure::Failure;
use crate::restore::{disk_failure, Disk, Done, Pace, Progress, BLOCK};

/// A disk with stale blocks; see the module.
pub struct UpdateDisk<'a, 'p, S, D> {
    metadata: &'a mut Metadata<S>,
    planes: &'a mut Planes,
    disk: &'a mut D,
    pace: &'a mut Pace<'p>,
    /// Blocks of the image that were made right since the last commit.
    right: Vec<Range<u64>>,
    pending: u64,
    batch_blocks: u64,
    total: u64,
    done: Done,
    /// Why the update could not go on.
    failure: Option<Failure>,
}

impl<'a, 'p, S: Storage, D: Disk> UpdateDisk<'a, 'p, S, D> {
    /// Commits after each `batch_blocks` blocks of the image.
    pub fn new(
        metadata: &'a mut Metadata<S>,
        planes: &'a mut Planes,
        disk: &'a mut D,
        batch_blocks: u64,
        pace: &'a mut Pace<'p>,
    ) -> Self {
        let total = planes.count(Select::Stale);
        UpdateDisk {
            metadata,
            planes,
            disk,
            pace,
            right: Vec::new(),
            pending: 0,
            batch_blocks: batch_blocks.max(1),
            total,
            done: Done::default(),
            failure: None,
        }
    }

    /// Commits the rest; says what was done, or why it ended before.
    ///
    /// # Errors
    ///
    /// The first of the disk's or the metadata's.
    pub fn finish(mut self) -> Result<Done, Failure> {
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => self.commit().map(|()| self.done),
        }
    }

    fn per_block(&self) -> u64 {
        self.planes.geometry().block_size() / BLOCK
    }

    fn commit(&mut self) -> Result<(), Failure> {
        self.pending = 0;
        let right = std::mem::take(&mut self.right);
        let per_block = self.per_block();
        // Only tracking blocks of which all is right.
        let runs: Vec<Run> = joined(right)
            .into_iter()
            .map(|blocks| Run {
                start: blocks.start.div_ceil(per_block),
                end: blocks.end / per_block,
            })
            .filter(|run| run.start < run.end)
            .collect();
        if runs.is_empty() {
            return Ok(());
        }
        // The order of these two is rule 2 of the contract.
        self.disk
            .flush()
            .map_err(|e| disk_failure("flush", 0, &e))?;
        let before = self.planes.count(Select::Stale);
        for run in runs {
            self.planes.set(run, BlockState::Clean);
        }
        self.metadata.commit(self.planes, &Changes::default())?;
        self.done.commits += 1;
        self.done.blocks += before - self.planes.count(Select::Stale);
        self.pace.at(Progress {
            blocks: self.done.blocks,
            total: self.total,
        });
        Ok(())
    }

    /// Keeps the failure, and ends the update with it.
    fn keep<T>(&mut self, result: Result<T, Failure>) -> io::Result<T> {
        result.map_err(|failure| {
            let error = io::Error::other(failure.to_string());
            self.failure.get_or_insert(failure);
            error
        })
    }
}

/// Ranges, each once, joined where they meet.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

impl<S: Storage, D: Disk> Local for UpdateDisk<'_, '_, S, D> {
    fn read(&mut self, first: u64, into: &mut [u8]) -> io::Result<()> {
        let managed = self.planes.geometry().sectors().saturating_mul(512) / BLOCK;
        // The old image may have been longer than what is managed now.
        let here = managed
            .saturating_sub(first)
            .saturating_mul(BLOCK)
            .min(into.len() as u64);
        let (content, beyond) = into.split_at_mut(usize::try_from(here).unwrap_or(0));
        beyond.fill(0);
        let read = self.disk.read(first * BLOCK, content);
        let read = read.map_err(|e| disk_failure("read", first * BLOCK, &e));
        self.keep(read)
    }

    fn write(&mut self, first: u64, data: &[u8]) -> io::Result<()> {
        let written = self.disk.write(first * BLOCK, data);
        let written = written.map_err(|e| disk_failure("write", first * BLOCK, &e));
        self.done.updated += data.len() as u64 / BLOCK;
        self.keep(written)
    }

    fn zero(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let count = blocks.end - blocks.start;
        let zeroed = self.disk.zero(blocks.start * BLOCK, count * BLOCK);
        let zeroed = zeroed.map_err(|e| disk_failure("zero", blocks.start * BLOCK, &e));
        self.done.zeroed += count;
        self.keep(zeroed)
    }

    fn right(&mut self, blocks: Range<u64>) -> io::Result<()> {
        self.pending += blocks.end - blocks.start;
        self.right.push(blocks);
        if self.pending < self.batch_blocks {
            return Ok(());
        }
        let committed = self.commit();
        self.keep(committed)
    }

    fn is_right(&self, blocks: Range<u64>) -> bool {
        let per_block = self.per_block();
        let mut all = blocks.start / per_block..blocks.end.div_ceil(per_block);
        all.all(|block| self.planes.state(block) == BlockState::Clean)
    }
}
