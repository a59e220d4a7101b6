// SPDX-License-Identifier: GPL-2.0

//! Making stale blocks the master's again: fetch, write, flush, clear. Provisioning, revert and a change of
//! the image are all this one routine.
//!
//! It works in batches. A batch's blocks are written to the data device, the data device is flushed, and only
//! then does a commit to the metadata call them clean (rule 2 of the contract, write-behind). A cut at any instant
//! leaves blocks stale that are right already, never the other way round, and the next run goes on from
//! there (rule 7, convergence). Memory is bounded by the reader's and one read buffer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use pristine_metadata::{BlockState, Changes, Metadata, Planes, Run, Select, Storage};

use crate::failure::{Failure, Kind};
use crate::master::{BlockDigest, Master};

/// Bytes in a block of an image.
pub const BLOCK: u64 = 4096;

/// The data device.
pub trait Disk {
    /// Reads at a byte offset.
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes at a byte offset; durable after [`Disk::flush`].
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()>;
    /// Makes `len` bytes zero; durable after [`Disk::flush`].
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes everything written durable.
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn flush(&mut self) -> io::Result<()>;
}

impl Disk for File {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.write_all_at(from, offset)
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        pristine_device::block::zero(self, offset, len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// How to go about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Blocks of content (not zeros) in a batch.
    pub batch_blocks: u64,
    /// Read what is on the disk first, and leave alone what is right already.
    pub compare: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            batch_blocks: (64 << 20) / BLOCK,
            compare: false,
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Blocks that were stale.
    pub blocks: u64,
    /// Of those, fetched from the store and written.
    pub fetched: u64,
    /// Made zero.
    pub zeroed: u64,
    /// Found right on the disk already (only with [`Options::compare`]).
    pub kept: u64,
    /// Written by an update, from a delta or from elsewhere on the disk.
    pub updated: u64,
    /// Commits to the metadata.
    pub commits: u64,
}

/// How far it has come; `total` are the stale blocks at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Blocks that are right.
    pub blocks: u64,
    /// All that have to become so.
    pub total: u64,
}

/// Says how far it has come, but not too often.
pub struct Pace<'a> {
    every: Duration,
    last: Option<Instant>,
    say: &'a mut dyn FnMut(Progress),
}

impl<'a> Pace<'a> {
    /// Calls `say` at most once in `every`.
    pub fn new(every: Duration, say: &'a mut dyn FnMut(Progress)) -> Self {
        Self {
            every,
            last: None,
            say,
        }
    }

    /// Says it, if the last time is long enough ago.
    pub(crate) fn at(&mut self, progress: Progress) {
        if self.last.is_none_or(|l| l.elapsed() >= self.every) {
            self.last = Some(Instant::now());
            (self.say)(progress);
        }
    }
}

/// One step: blocks to make zero, and blocks to fetch. `all` are the tracking blocks that are clean afterwards.
#[derive(Default)]
struct Batch {
    all: Vec<Run>,
    zero: Vec<Run>,
    fetch: Vec<Run>,
    kept: u64,
}

impl Batch {
    fn content(&self) -> u64 {
        self.fetch.iter().map(Run::len).sum()
    }
}

fn push(runs: &mut Vec<Run>, block: u64) {
    match runs.last_mut() {
        Some(last) if last.end == block => last.end += 1,
        _ => runs.push(Run {
            start: block,
            end: block + 1,
        }),
    }
}

pub(crate) fn disk_failure(action: &str, at: u64, error: &io::Error) -> Failure {
    Failure::new(
        Kind::Device,
        format!("cannot {action} the data device at byte {at}: {error}"),
    )
    .advise("check the disk; what was restored so far is kept")
}

/// Makes all stale blocks of the device the master's.
///
/// Nothing else may change the device meanwhile. The caller has made those blocks stale, durably, that are to
/// be overwritten: from the first write on a dirty block is neither the machine's nor the master's.
///
/// # Errors
///
/// The store's, the disk's or the metadata's first. What was committed until then is kept.
pub fn restore<S: Storage>(
    metadata: &mut Metadata<S>,
    planes: &mut Planes,
    disk: &mut impl Disk,
    master: &mut impl Master,
    options: &Options,
    pace: &mut Pace<'_>,
) -> Result<Done, Failure> {
    let stale: Vec<Run> = planes.runs(Select::Stale).collect();
    let total: u64 = stale.iter().map(Run::len).sum();
    let per_block = planes.geometry().block_size() / BLOCK;
    let managed = planes.geometry().sectors().saturating_mul(512) / BLOCK;
    let mut done = Done::default();
    let mut batch = Batch::default();
    // A step of the manifest; digests of so many blocks are in memory at a time.
    let step = (1024 / per_block).max(1);

    for run in stale {
        let mut at = run.start;
        while at < run.end {
            let part = Run {
                start: at,
                end: run.end.min(at + step),
            };
            at = part.end;
            let units = Run {
                start: part.start * per_block,
                end: (part.end * per_block).min(managed),
            };
            plan(&mut batch, units, disk, master, options)?;
            batch.all.push(part);
            if batch.content() >= options.batch_blocks {
                let batch = std::mem::take(&mut batch);
                apply(
                    batch, metadata, planes, disk, master, &mut done, total, pace,
                )?;
            }
        }
    }
    if !batch.all.is_empty() {
        apply(
            batch, metadata, planes, disk, master, &mut done, total, pace,
        )?;
    }
    Ok(done)
}

/// Decides what has to happen to the image blocks of `units`.
fn plan(
    batch: &mut Batch,
    units: Run,
    disk: &mut impl Disk,
    master: &mut impl Master,
    options: &Options,
) -> Result<(), Failure> {
    let zero = *pristine_image::Digest::zero_block().as_bytes();
    let inside = Run {
        start: units.start,
        end: units.end.min(master.bytes() / BLOCK).max(units.start),
    };
    let digests = if inside.is_empty() {
        Vec::new()
    } else {
        master.digests(inside)?
    };
    if digests.len() as u64 != inside.len() {
        return Err(Failure::new(
            Kind::Internal,
            "the manifest has too few digests",
        ));
    }
    let local = if options.compare {
        let bytes = usize::try_from(units.len() * BLOCK).unwrap_or(0);
        let mut buffer = vec![0; bytes];
        disk.read(units.start * BLOCK, &mut buffer)
            .map_err(|e| disk_failure("read", units.start * BLOCK, &e))?;
        digests_of(&buffer)
    } else {
        Vec::new()
    };
    let mut local = local.iter();
    // Past the image's end the device is zero.
    let mut digests = digests.into_iter().chain(std::iter::repeat(zero));
    for block in units.start..units.end {
        let digest = digests.next().unwrap_or(zero);
        let right = local.next().is_some_and(|l| *l == digest);
        if right {
            batch.kept += 1;
        } else if digest == zero {
            push(&mut batch.zero, block);
        } else {
            push(&mut batch.fetch, block);
        }
    }
    Ok(())
}

/// The digests of blocks. It is what a revert over a fast network spends its time with, so all processors take part.
fn digests_of(blocks: &[u8]) -> Vec<BlockDigest> {
    let block = 4096;
    let digests = |part: &[u8]| -> Vec<BlockDigest> {
        let digests = pristine_image::Digest::of_each_block(part);
        digests.iter().map(|d| *d.as_bytes()).collect()
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    // Below some blocks the threads would cost more than they take over.
    let share = (blocks.len() / block).div_ceil(threads).max(64) * block;
    let mut parts = blocks.chunks(share);
    let first = parts.next().unwrap_or(&[]);
    std::thread::scope(|scope| {
        let others: Vec<_> = parts
            .map(|part| (part, scope.spawn(move || digests(part))))
            .collect();
        let mut all = digests(first);
        for (part, other) in others {
            // A thread that died leaves its share to this one.
            all.extend(other.join().unwrap_or_else(|_| digests(part)));
        }
        all
    })
}

#[allow(clippy::too_many_arguments)]
fn apply<S: Storage>(
    batch: Batch,
    metadata: &mut Metadata<S>,
    planes: &mut Planes,
    disk: &mut impl Disk,
    master: &mut impl Master,
    done: &mut Done,
    total: u64,
    pace: &mut Pace<'_>,
) -> Result<(), Failure> {
    let before = done.blocks;
    let in_batch: u64 = batch.all.iter().map(Run::len).sum();
    let content = batch.content().max(1);
    for run in &batch.zero {
        disk.zero(run.start * BLOCK, run.len() * BLOCK)
            .map_err(|e| disk_failure("zero", run.start * BLOCK, &e))?;
        done.zeroed += run.len();
    }
    let mut fetched = 0;
    if !batch.fetch.is_empty() {
        master.fetch(&batch.fetch, &mut |block, bytes| {
            disk.write(block * BLOCK, bytes)
                .map_err(|e| disk_failure("write", block * BLOCK, &e))?;
            fetched += bytes.len() as u64 / BLOCK;
            pace.at(Progress {
                blocks: before + in_batch * fetched.min(content) / content,
                total,
            });
            Ok(())
        })?;
    }
    if fetched != batch.content() {
        let what = format!("the store answered {fetched} of {} blocks", batch.content());
        return Err(Failure::new(Kind::Internal, what));
    }
    // The order of these two is rule 2 of the contract.
    disk.flush().map_err(|e| disk_failure("flush", 0, &e))?;
    for run in &batch.all {
        planes.set(*run, BlockState::Clean);
    }
    metadata.commit(planes, &Changes::default())?;
    done.commits += 1;
    done.fetched += fetched;
    done.kept += batch.kept;
    done.blocks += in_batch;
    pace.at(Progress {
        blocks: done.blocks,
        total,
    });
    Ok(())
}
