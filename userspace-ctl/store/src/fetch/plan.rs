// SPDX-License-Identifier: GPL-2.0

//! From wanted blocks to requests.
//!
//! Blocks are turned into runs of (slot, block, count), and the runs are merged in the order of their slots: the
//! order in which content lies in packs. So each frame is fetched once however many of its blocks are wanted and
//! wherever they go, and frames that lie near each other share a request. Runs take 24 bytes whatever their
//! length; at most a window of [`MAX_RUNS`] of them is planned at a time, so that memory is bounded.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;

use pristine_image::{Frame, DIGESTS_PER_PAGE};

use crate::error::Result;
use crate::reader::ImageReader;

/// Runs in a window.
const MAX_RUNS: usize = 1 << 20;

/// Consecutive blocks of a frame that go to consecutive blocks of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first block's index in the frame.
    pub(super) index: u32,
    /// The first block of the image.
    pub(super) block: u64,
    /// Blocks.
    pub(super) count: u32,
}

/// A frame to fetch, and what of it is wanted.
#[derive(Clone, Debug)]
pub(super) struct FrameJob {
    pub(super) frame: Frame,
    pub(super) pieces: Vec<Piece>,
}

/// Frames of one pack, fetched in one request; never empty.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) pack: u32,
    pub(super) jobs: Vec<FrameJob>,
}

impl Request {
    /// Bytes of the pack that it asks for.
    pub(super) fn len(&self) -> u64 {
        match (self.jobs.first(), self.jobs.last()) {
            (Some(first), Some(last)) => {
                u64::from(last.frame.offset) + u64::from(last.frame.len)
                    - u64::from(first.frame.offset)
            }
            _ => 0,
        }
    }
}

/// Something to do.
#[derive(Clone, Debug)]
pub(super) enum Work {
    /// Blocks that are zero.
    Zeros(Range<u64>),
    /// Frames to fetch.
    Fetch(Request),
}

/// A run of blocks in consecutive slots; ordered by slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Run {
    slot: u64,
    block: u64,
    count: u64,
}

/// Makes work of wanted blocks.
pub(super) struct Planner<'a> {
    reader: &'a ImageReader,
    /// Wanted blocks that are not planned yet.
    wanted: VecDeque<Range<u64>>,
    zeros: VecDeque<Range<u64>>,
    runs: BinaryHeap<Reverse<Run>>,
    max_request: u64,
    max_gap: u64,
}

impl<'a> Planner<'a> {
    pub(super) fn new(
        reader: &'a ImageReader,
        wanted: VecDeque<Range<u64>>,
        max_request: u64,
        max_gap: u64,
    ) -> Self {
        Planner {
            reader,
            wanted,
            zeros: VecDeque::new(),
            runs: BinaryHeap::new(),
            max_request,
            max_gap,
        }
    }

    /// The next thing to do; `None` when all is done.
    pub(super) fn next(&mut self) -> Result<Option<Work>> {
        if self.zeros.is_empty() && self.runs.is_empty() {
            self.fill()?;
        }
        if let Some(zeros) = self.zeros.pop_front() {
            return Ok(Some(Work::Zeros(zeros)));
        }
        Ok(self.request().map(Work::Fetch))
    }

    /// Plans the next window.
    fn fill(&mut self) -> Result<()> {
        let mut runs: Vec<Run> = Vec::new();
        while let Some(range) = self.wanted.pop_front() {
            let mut at = range.start;
            while at < range.end {
                if runs.len() >= MAX_RUNS {
                    self.wanted.push_front(at..range.end);
                    break;
                }
                let number = at / DIGESTS_PER_PAGE as u64;
                let first = number * DIGESTS_PER_PAGE as u64;
                let end = range.end.min(first + DIGESTS_PER_PAGE as u64);
                if self.reader.manifest().page_range(number).is_empty() {
                    push_zeros(&mut self.zeros, at..end);
                } else {
                    let page = self.reader.page(number)?;
                    for block in at..end {
                        let slot = page.block((block - first) as usize).and_then(|b| b.slot);
                        match slot {
                            Some(slot) => push_run(&mut runs, slot, block),
                            None => push_zeros(&mut self.zeros, block..block + 1),
                        }
                    }
                }
                at = end;
            }
            if runs.len() >= MAX_RUNS {
                break;
            }
        }
        self.runs = runs.into_iter().map(Reverse).collect();
        Ok(())
    }

    /// The next request: the frame of the lowest slot, and those after it that are near enough.
    fn request(&mut self) -> Option<Request> {
        let mut request: Option<Request> = None;
        while let Some(Reverse(run)) = self.runs.peek() {
            let frame = self.reader.manifest().frames().frame_of(run.slot)?;
            if !request
                .as_ref()
                .is_none_or(|request| self.fits(request, &frame))
            {
                break;
            }
            let pieces = self.take_pieces(&frame);
            let request = request.get_or_insert_with(|| Request {
                pack: frame.pack,
                jobs: Vec::new(),
            });
            request.jobs.push(FrameJob { frame, pieces });
        }
        request
    }

    fn fits(&self, request: &Request, frame: &Frame) -> bool {
        let (Some(first), Some(last)) = (request.jobs.first(), request.jobs.last()) else {
            return true;
        };
        let end_of_last = u64::from(last.frame.offset) + u64::from(last.frame.len);
        let end = u64::from(frame.offset) + u64::from(frame.len);
        request.pack == frame.pack
            && u64::from(frame.offset) >= end_of_last
            && u64::from(frame.offset) - end_of_last <= self.max_gap
            && end - u64::from(first.frame.offset) <= self.max_request
    }

    /// Takes everything that lies in a frame from the runs.
    fn take_pieces(&mut self, frame: &Frame) -> Vec<Piece> {
        let end = frame.first_slot + u64::from(frame.blocks);
        let mut pieces = Vec::new();
        while let Some(&Reverse(run)) = self.runs.peek().filter(|run| run.0.slot < end) {
            self.runs.pop();
            let count = run.count.min(end - run.slot);
            pieces.push(Piece {
                index: (run.slot - frame.first_slot) as u32,
                block: run.block,
                count: count as u32,
            });
            if count < run.count {
                self.runs.push(Reverse(Run {
                    slot: run.slot + count,
                    block: run.block + count,
                    count: run.count - count,
                }));
            }
        }
        pieces
    }
}

fn push_run(runs: &mut Vec<Run>, slot: u64, block: u64) {
    if let Some(last) = runs.last_mut() {
        if last.slot + last.count == slot && last.block + last.count == block {
            last.count += 1;
            return;
        }
    }
    runs.push(Run {
        slot,
        block,
        count: 1,
    });
}

fn push_zeros(zeros: &mut VecDeque<Range<u64>>, range: Range<u64>) {
    match zeros.back_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => zeros.push_back(range),
    }
}
