// SPDX-License-Identifier: GPL-2.0

//! Fetching blocks of an image, in parallel, each verified before anybody sees it.

mod near;
mod plan;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pristine_image::pack::decode_frame;
use pristine_image::{Digest, Page, BLOCK_SIZE, DIGESTS_PER_PAGE};

use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::peers::Neighbours;
use crate::reader::ImageReader;
use crate::retry::{CancelToken, RetryPolicy};
use plan::{FrameJob, Piece, Planner, Request, Work};

/// Receives blocks. Called from several threads at once, in no particular order, once for each wanted block.
pub trait BlockSink: Sync {
    /// Takes consecutive blocks from `first` on, verified; `data` is a multiple of [`BLOCK_SIZE`] long.
    ///
    /// # Errors
    /// Any error ends the fetch with [`Error::Sink`].
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()>;

    /// Takes consecutive blocks that are zero; the range may be as large as the image.
    ///
    /// # Errors
    /// As for [`BlockSink::blocks`].
    fn zeros(&self, blocks: Range<u64>) -> io::Result<()>;
}

/// How to fetch.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Requests at once, each by a thread that also verifies and delivers. Default 4.
    pub parallel: usize,
    /// Bytes asked for in one request at most (a frame that is longer is asked for nevertheless). Default 2 MiB.
    /// Memory is about `parallel` times this.
    pub max_request: u64,
    /// A gap of up to this many bytes is fetched too, rather than making another request. Default 32 KiB.
    pub max_gap: u64,
    /// How often a failed or corrupt request is tried again.
    pub retry: RetryPolicy,
    /// Stops the fetch.
    pub cancel: CancelToken,
    /// Asked for blocks before the store is. Default: nobody.
    pub neighbours: Option<Arc<Neighbours>>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        FetchOptions {
            parallel: 4,
            max_request: 2 << 20,
            max_gap: 32 << 10,
            retry: RetryPolicy::default(),
            cancel: CancelToken::new(),
            neighbours: None,
        }
    }
}

/// What a fetch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchReport {
    /// Blocks delivered with content.
    pub blocks: u64,
    /// Zero blocks delivered, which cost nothing.
    pub zero_blocks: u64,
    /// Requests made to the store while this fetch ran, those for the manifest and repeated ones included.
    pub requests: u64,
    /// Bytes received in them.
    pub bytes: u64,
    /// Requests that were tried again.
    pub retries: u64,
    /// Frames that arrived with wrong content.
    pub corrupt: u64,
}

impl ImageReader {
    /// Fetches the blocks in `wanted` and delivers each to `sink`, verified. Ranges should not overlap (a block that is
    /// wanted twice is delivered twice). Ascending ranges are planned best.
    ///
    /// # Errors
    /// The first error that was not cured by trying again: [`Error::Content`] for content that stays wrong,
    /// [`Error::Sink`], [`Error::Cancelled`], and what can go wrong with the store. The sink may have received any part
    /// of the blocks by then.
    pub fn fetch(
        &self,
        wanted: impl IntoIterator<Item = Range<u64>>,
        options: &FetchOptions,
        sink: &dyn BlockSink,
    ) -> Result<FetchReport> {
        let wanted: VecDeque<Range<u64>> = wanted
            .into_iter()
            .map(|range| range.start..range.end.min(self.blocks()))
            .filter(|range| !range.is_empty())
            .collect();
        let before = self.store().traffic();
        let planner = Planner::new(self, wanted, options.max_request, options.max_gap);
        let fetch = Fetch {
            reader: self,
            options,
            sink,
            planner: Mutex::new(planner),
            stop: AtomicBool::new(false),
            error: Mutex::new(None),
            blocks: AtomicU64::new(0),
            zero_blocks: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
        };
        std::thread::scope(|scope| {
            // The calling thread is one of the workers.
            for _ in 1..options.parallel.max(1) {
                scope.spawn(|| fetch.work());
            }
            fetch.work();
        });
        let error = fetch.error.into_inner();
        if let Some(error) = error.unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let after = self.store().traffic();
        Ok(FetchReport {
            blocks: fetch.blocks.into_inner(),
            zero_blocks: fetch.zero_blocks.into_inner(),
            requests: after.requests - before.requests,
            bytes: after.bytes - before.bytes,
            retries: fetch.retries.into_inner(),
            corrupt: fetch.corrupt.into_inner(),
        })
    }
}

impl ImageReader {
    /// Bytes of packs that [`ImageReader::fetch`] would ask for, if nothing has to be asked for twice.
    ///
    /// # Errors
    /// As [`ImageReader::page`].
    pub fn bytes_of(
        &self,
        wanted: impl IntoIterator<Item = Range<u64>>,
        options: &FetchOptions,
    ) -> Result<u64> {
        let wanted = wanted.into_iter().collect();
        let mut planner = Planner::new(self, wanted, options.max_request, options.max_gap);
        let mut bytes = 0;
        while let Some(work) = planner.next()? {
            if let Work::Fetch(request) = work {
                bytes += request.len();
            }
        }
        Ok(bytes)
    }
}

struct Fetch<'a> {
    reader: &'a ImageReader,
    options: &'a FetchOptions,
    sink: &'a dyn BlockSink,
    planner: Mutex<Planner<'a>>,
    /// Set with the first error.
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
    blocks: AtomicU64,
    zero_blocks: AtomicU64,
    retries: AtomicU64,
    corrupt: AtomicU64,
}

/// Why a frame was not delivered.
enum FrameError {
    /// Its content is wrong; the number is that of a block it was wanted for.
    Corrupt(u64),
    /// Anything that another copy would not cure.
    Fatal(Error),
}

impl Fetch<'_> {
    fn work(&self) {
        if let Err(error) = self.work_until_done() {
            let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error);
            // After the error is noted: what others say because of this must not come first.
            self.stop.store(true, Ordering::Release);
        }
    }

    fn work_until_done(&self) -> Result<()> {
        while !self.stop.load(Ordering::Acquire) {
            self.options.cancel.check()?;
            let work = {
                let mut planner = self.planner.lock().unwrap_or_else(PoisonError::into_inner);
                planner.next()?
            };
            match work {
                None => break,
                Some(Work::Zeros(blocks)) => {
                    let count = blocks.end - blocks.start;
                    self.sink.zeros(blocks).map_err(Error::Sink)?;
                    self.zero_blocks.fetch_add(count, Ordering::Relaxed);
                }
                Some(Work::Fetch(request)) => self.fetch(request)?,
            }
        }
        Ok(())
    }

    /// Carries out a request; what fails is tried again, and only that. What was too slow or was cut is asked for in
    /// smaller parts, so that a bad line still gets somewhere.
    fn fetch(&self, request: Request) -> Result<()> {
        let packs = self.reader.manifest().frames().packs();
        // Frames come from the table, and so do their packs.
        let Some(pack) = packs.get(request.pack as usize) else {
            return Ok(());
        };
        let object = ObjectName::Pack(pack.id);
        let mut waiting = request.jobs;
        if let Some(neighbours) = &self.options.neighbours {
            self.ask_neighbours(neighbours, &mut waiting)?;
        }
        let mut at_once = waiting.len();
        // Since something last succeeded.
        let mut failures = 0;
        while !waiting.is_empty() {
            let later = waiting.split_off(at_once.min(waiting.len()));
            let mut jobs = std::mem::replace(&mut waiting, later);
            let error = match self.attempt(&object, &mut jobs, failures + 1) {
                Ok(()) => {
                    failures = 0;
                    continue;
                }
                Err(error) => error,
            };
            failures += 1;
            let curable = error.is_transient() || error.is_corruption();
            if !curable || failures >= self.options.retry.attempts {
                return Err(error);
            }
            // What is encrypted shows damage before it is unpacked.
            if matches!(error, Error::Content { .. } | Error::Format { .. }) {
                self.reader.store().was_wrong(&error);
            }
            if self.stop.load(Ordering::Acquire) {
                // Another worker has failed for good; its error is the one to report.
                return Err(Error::Cancelled);
            }
            if matches!(error, Error::Timeout { .. } | Error::Cut { .. }) {
                at_once = (jobs.len() / 2).max(1);
            }
            jobs.append(&mut waiting);
            waiting = jobs;
            self.retries.fetch_add(1, Ordering::Relaxed);
            let delay = self.options.retry.delay(failures);
            self.options.cancel.sleep(delay)?;
        }
        Ok(())
    }

    /// One attempt; on failure, `jobs` keeps those that are not delivered.
    fn attempt(&self, object: &ObjectName, jobs: &mut Vec<FrameJob>, attempts: u32) -> Result<()> {
        let (Some(first), Some(last)) = (jobs.first(), jobs.last()) else {
            return Ok(());
        };
        let start = u64::from(first.frame.offset);
        let end = u64::from(last.frame.offset) + u64::from(last.frame.len);
        let store = self.reader.store();
        let bytes = store.get_range(object, start..end)?;
        let mut failed = Vec::new();
        let mut wrong_block = None;
        for job in jobs.drain(..) {
            let at = (u64::from(job.frame.offset) - start) as usize;
            let frame = bytes
                .get(at..at + job.frame.len as usize)
                .unwrap_or_default();
            match self.deliver(&job, frame) {
                Ok(()) => (),
                Err(FrameError::Fatal(error)) => return Err(error),
                Err(FrameError::Corrupt(block)) => {
                    self.corrupt.fetch_add(1, Ordering::Relaxed);
                    wrong_block.get_or_insert(block);
                    failed.push(job);
                }
            }
        }
        *jobs = failed;
        match wrong_block {
            None => Ok(()),
            Some(block) => Err(Error::Content {
                location: store.location().to_owned(),
                object: object.to_string(),
                block,
                attempts,
            }),
        }
    }

    /// Unpacks a frame, verifies all blocks of it that are wanted, and delivers them.
    fn deliver(&self, job: &FrameJob, frame: &[u8]) -> std::result::Result<(), FrameError> {
        let first_wanted = job.pieces.first().map_or(0, |piece| piece.block);
        let data = decode_frame(frame, job.frame.blocks as usize)
            .map_err(|_| FrameError::Corrupt(first_wanted))?;
        // All of them before the first is delivered, so that a frame is delivered once or not at all.
        let mut known: Vec<Option<Digest>> = vec![None; job.frame.blocks as usize];
        for piece in &job.pieces {
            self.verify(piece, &data, &mut known)?;
        }
        for piece in &job.pieces {
            self.options.cancel.check().map_err(FrameError::Fatal)?;
            let content = piece_content(piece, &data);
            let delivered = self.sink.blocks(piece.block, content);
            delivered.map_err(|error| FrameError::Fatal(Error::Sink(error)))?;
            self.blocks
                .fetch_add(u64::from(piece.count), Ordering::Relaxed);
        }
        Ok(())
    }

    fn verify(
        &self,
        piece: &Piece,
        data: &[u8],
        known: &mut [Option<Digest>],
    ) -> std::result::Result<(), FrameError> {
        let content = piece_content(piece, data);
        if content.len() != piece.count as usize * BLOCK_SIZE {
            return Err(FrameError::Corrupt(piece.block));
        }
        let places = known.iter_mut().skip(piece.index as usize);
        let (places, blocks): (Vec<_>, Vec<_>) = places
            .zip(content.chunks_exact(BLOCK_SIZE))
            .filter(|(known, _)| known.is_none())
            .filter_map(|(known, block)| Some((known, block.first_chunk()?)))
            .unzip();
        for (known, digest) in places.into_iter().zip(Digest::of_blocks(blocks)) {
            *known = Some(digest);
        }
        let mut page: Option<(u64, Arc<Page>)> = None;
        let indices = piece.index as usize..;
        for (block, index) in (piece.block..piece.block + u64::from(piece.count)).zip(indices) {
            let number = block / DIGESTS_PER_PAGE as u64;
            let page = match &page {
                Some((current, page)) if *current == number => page,
                _ => {
                    let next = self.reader.page(number).map_err(FrameError::Fatal)?;
                    &page.insert((number, next)).1
                }
            };
            let expected = page.block((block % DIGESTS_PER_PAGE as u64) as usize);
            let found = known.get(index).copied().flatten();
            if found.is_none() || expected.map(|expected| expected.digest) != found {
                return Err(FrameError::Corrupt(block));
            }
        }
        Ok(())
    }
}

fn piece_content<'a>(piece: &Piece, data: &'a [u8]) -> &'a [u8] {
    let start = piece.index as usize * BLOCK_SIZE;
    let end = start + piece.count as usize * BLOCK_SIZE;
    // The planner keeps pieces within their frame, whose size decode_frame has checked.
    data.get(start..end).unwrap_or_default()
}
