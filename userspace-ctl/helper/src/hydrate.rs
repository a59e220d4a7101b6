// SPDX-License-Identifier: GPL-2.0

//! Hydration: blocks that nobody asked for yet.
//!
//! First comes what the boot traces say will be asked for, in their order; then everything in the image's order. What was
//! unpacked anyway for a request is kept whatever is hydrated: see [`Hydrator::keep`]. Only what is stale is offered, so
//! nothing is fetched in vain.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ahead::{Ahead, Piece};
use crate::channel::{Channel, Content, Refused, MAX_FETCH};
use crate::demand::{end, Queue};
use crate::library::{Library, LoadError, Urgency};
use crate::loaded::Loaded;
use crate::log;
use crate::pace::{Hydrate, Pace};
use crate::stop::Stop;
use crate::units::Units;

/// Words of the stale map read at once: 256 Ki blocks.
const WORDS: u64 = 4096;
/// Zero runs at least this long, in bytes, are offered as such; shorter ones among others go with them.
const ZERO_RUN: u64 = 64 << 10;
/// Most blocks in one offer of zeros: a limit on how long one call takes.
const MAX_ZEROS: u64 = 1 << 18;
/// Blocks of one piece of work lie no further apart than this, in bytes.
const MAX_SPAN: u64 = 4 << 20;
/// Between two passes, if there is still something stale.
const BETWEEN: Duration = Duration::from_secs(1);
/// Between two looks whether the store's trace is there.
const AWAITING: Duration = Duration::from_millis(5);
/// After a failure of the data device.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// What to hydrate next, in device blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Job {
    /// Zero blocks.
    Zeros(Range<u64>),
    /// Blocks to fetch, at most [`MAX_FETCH`] bytes; `true` if the trace says so.
    Data(Vec<Range<u64>>, bool),
}

/// Where hydration is.
#[derive(Debug, Default)]
struct Cursor {
    /// What the trace has still to say, in image blocks.
    trace: VecDeque<Range<u64>>,
    /// What comes before the pass, out of the image's order, in image blocks.
    scattered: VecDeque<Range<u64>>,
    /// The next device block of the pass.
    at: u64,
    /// A part of the stale map, from this word on.
    first_word: u64,
    words: Vec<u64>,
    /// Jobs that are being done.
    active: usize,
    /// Whether the trace may still come, and the pass must wait for it.
    awaits_trace: bool,
}

/// What the hydrating threads share.
#[derive(Debug)]
pub struct Progress {
    cursor: Mutex<Cursor>,
    /// Blocks that the device took.
    pub taken: AtomicU64,
    /// Whether the trace is being followed.
    pub in_trace: AtomicBool,
    /// A pass has come to its end: perhaps nothing is stale any more.
    pub passed: AtomicBool,
}

impl Progress {
    /// Begins with this machine's trace; the pass waits until [`Progress::follow`] says what else there is.
    pub fn new(trace: Vec<Range<u64>>) -> Self {
        Self {
            in_trace: AtomicBool::new(!trace.is_empty()),
            cursor: Mutex::new(Cursor {
                trace: trace.into(),
                awaits_trace: true,
                ..Cursor::default()
            }),
            taken: AtomicU64::new(0),
            passed: AtomicBool::new(false),
        }
    }

    fn cursor(&self) -> MutexGuard<'_, Cursor> {
        self.cursor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows this, too, after what is being followed.
    pub fn follow(&self, trace: &[Range<u64>]) {
        let mut cursor = self.cursor();
        cursor.trace.extend(trace.iter().cloned());
        cursor.awaits_trace = false;
        if !cursor.trace.is_empty() {
            self.in_trace.store(true, Ordering::Relaxed);
        }
    }

    /// After the trace, takes these image blocks in this order, before all in the image's.
    pub fn scatter(&self, order: impl Iterator<Item = Range<u64>>) {
        self.cursor().scattered = order.collect();
    }
}

/// What a hydrating thread needs.
#[derive(Clone, Copy)]
pub struct Hydrator<'a> {
    /// The device.
    pub channel: &'a dyn Channel,
    /// The image.
    pub library: &'a Library,
    /// Requests, which come first.
    pub queue: &'a Queue,
    /// Where it is.
    pub progress: &'a Progress,
    /// When it may go on.
    pub pace: &'a Pace<'a>,
    /// Block sizes.
    pub units: Units,
    /// The end of all.
    pub stop: &'a Stop,
}

impl Hydrator<'_> {
    /// Hydrates until the end.
    pub fn run(&self, mode: Hydrate) {
        if mode == Hydrate::Off {
            return;
        }
        while !self.stop.is_stopping() {
            if let Err(error) = self.step() {
                match error {
                    Refused::Suspended | Refused::Later => {
                        self.stop.sleep(Duration::from_millis(100));
                    }
                    Refused::NotStored => {
                        log::warn("the data device does not take what is hydrated");
                        self.stop.sleep(AFTER_FAILURE);
                    }
                    error => self.stop.end(end(error)),
                }
            }
        }
    }

    /// Fetches ahead of readers until the end.
    pub fn run_ahead(&self, ahead: &Ahead, wait: Duration) {
        while !self.stop.is_stopping() {
            let Some(piece) = ahead.pop(wait) else {
                continue;
            };
            if let Err(error) = self.ahead(&piece) {
                match error {
                    // Nobody waits for it.
                    Refused::Suspended | Refused::Later | Refused::NotStored => {}
                    error => self.stop.end(end(error)),
                }
            }
        }
    }

    fn ahead(&self, piece: &Piece) -> Result<(), Refused> {
        let stale = self.stale_runs(piece.blocks.clone())?;
        let wanted: Vec<Range<u64>> = stale.iter().map(|r| self.units.image(r.clone())).collect();
        let now = Some(Instant::now());
        // One attempt with each store: should none serve, the reader's own request goes on trying.
        if let (false, Ok(loaded)) = (
            stale.is_empty(),
            self.library.load(&wanted, Urgency::Background, now),
        ) {
            for run in stale {
                let before = run.start..run.end.min(piece.marker);
                let after = run.start.max(piece.marker + 1)..run.end;
                let runs = [before, after];
                for run in runs.into_iter().filter(|run| run.start < run.end) {
                    self.offer_loaded(&loaded, &[run])?;
                }
            }
        }
        Ok(())
    }

    fn step(&self) -> Result<(), Refused> {
        // The manifest says what is zero, and costs a request that hydration need not make while it fails.
        let Ok(_) = self.library.open(None) else {
            return Ok(());
        };
        let Some(job) = self.next_job()? else {
            let wait = match self.cursor().awaits_trace {
                true => AWAITING,
                false => BETWEEN,
            };
            self.stop.sleep(wait);
            return Ok(());
        };
        let done = self.job(job);
        self.cursor().active -= 1;
        done
    }

    fn job(&self, job: Job) -> Result<(), Refused> {
        match job {
            Job::Zeros(run) => {
                if self.pace.wait(0, false, self.queue, self.stop) {
                    self.hydrate(run, Content::Zeroes)?;
                }
                Ok(())
            }
            Job::Data(runs, from_trace) => self.data(&runs, from_trace),
        }
    }

    fn data(&self, runs: &[Range<u64>], from_trace: bool) -> Result<(), Refused> {
        let blocks: u64 = runs.iter().map(|r| r.end - r.start).sum();
        let bytes = blocks * self.units.bytes();
        if !self.pace.wait(bytes, from_trace, self.queue, self.stop) {
            return Ok(());
        }
        let wanted: Vec<Range<u64>> = runs.iter().map(|r| self.units.image(r.clone())).collect();
        match self.library.load(&wanted, Urgency::Background, None) {
            Ok(loaded) => {
                self.offer_loaded(&loaded, runs)?;
                // A trace has what was asked for, not what was kept with it.
                let frames = match from_trace {
                    true => loaded.frames_beyond(&wanted),
                    false => Vec::new(),
                };
                frames.into_iter().try_for_each(|frame| self.keep(frame))
            }
            // Without a deadline it does not give up.
            Err(LoadError::Stopped | LoadError::GaveUp(_)) => Ok(()),
        }
    }

    fn offer_loaded(&self, loaded: &Loaded, runs: &[Range<u64>]) -> Result<(), Refused> {
        // What was asked for, or written, since the work began is not offered in vain.
        let stale: Result<Vec<_>, Refused> = runs
            .iter()
            .map(|run| self.stale_runs(run.clone()))
            .collect();
        for run in stale?.into_iter().flatten() {
            let image = self.units.image(run.clone());
            if loaded.is_zero(image.clone()) {
                self.hydrate(run.clone(), Content::Zeroes)?;
            } else {
                self.hydrate(run.clone(), Content::Data(&loaded.content(image)))?;
            }
        }
        Ok(())
    }

    fn hydrate(&self, run: Range<u64>, content: Content<'_>) -> Result<(), Refused> {
        let taken = self
            .channel
            .hydrate(run.start, run.end - run.start, content)?;
        self.progress.taken.fetch_add(taken, Ordering::Relaxed);
        Ok(())
    }

    /// Offers what is unpacked of some image blocks and stale. A frame that was fetched for one of its blocks is kept
    /// as a whole like this: most of the work is done, who reads one block often comes back for the next, and each frame is fetched
    /// once, however its blocks are asked for.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn keep(&self, image: Range<u64>) -> Result<(), Refused> {
        let run = self.units.device(image, self.channel.attached().blocks);
        let stale = self.stale_runs(run)?;
        let wanted: Vec<Range<u64>> = stale.iter().map(|r| self.units.image(r.clone())).collect();
        let Some((loaded, missing)) = self.library.peek(&wanted) else {
            return Ok(());
        };
        let per_block = self.units.per_block();
        let missing: Vec<u64> = missing.iter().map(|block| block / per_block).collect();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in stale.into_iter().flatten() {
            if missing.binary_search(&block).is_err() {
                push(&mut runs, block);
            }
        }
        self.offer_loaded(&loaded, &runs)
    }

    /// The stale blocks among device blocks.
    fn stale_runs(&self, run: Range<u64>) -> Result<Vec<Range<u64>>, Refused> {
        let mut runs = Vec::new();
        if run.is_empty() {
            return Ok(runs);
        }
        let first = run.start / 64;
        let words = self.channel.stale(first, run.end.div_ceil(64) - first)?;
        for block in run {
            if bit(&words, block - first * 64) {
                push(&mut runs, block);
            }
        }
        Ok(runs)
    }

    fn next_job(&self) -> Result<Option<Job>, Refused> {
        let mut cursor = self.cursor();
        let runs = self.runs_of(&mut cursor.trace)?;
        let mut job = (!runs.is_empty()).then_some(Job::Data(runs, true));
        if job.is_none() && cursor.awaits_trace {
            return Ok(None);
        }
        if job.is_none() {
            self.progress.in_trace.store(false, Ordering::Relaxed);
            // What is zero costs nothing, and the pass takes it in far larger steps.
            let is_zero = |s: &Range<u64>| self.library.zeros(s.clone()) >= s.end - s.start;
            while cursor.scattered.front().is_some_and(is_zero) {
                cursor.scattered.pop_front();
            }
            let runs = self.runs_of(&mut cursor.scattered)?;
            job = (!runs.is_empty()).then_some(Job::Data(runs, false));
        }
        if job.is_none() {
            job = self.pass_job(&mut cursor)?;
        }
        cursor.active += usize::from(job.is_some());
        Ok(job)
    }

    fn cursor(&self) -> MutexGuard<'_, Cursor> {
        self.progress.cursor()
    }

    /// The next blocks of a queue of image blocks that are stale.
    fn runs_of(&self, queue: &mut VecDeque<Range<u64>>) -> Result<Vec<Range<u64>>, Refused> {
        let most = MAX_FETCH / self.units.bytes();
        let mut left = most;
        let mut runs: Vec<Range<u64>> = Vec::new();
        while let Some(image) = queue.pop_front() {
            let run = self.units.device(image, self.channel.attached().blocks);
            if run.is_empty() {
                continue;
            }
            let part = run.start..run.end.min(run.start + left);
            if part.end < run.end {
                queue.push_front(self.units.image(part.end..run.end));
            }
            for stale in self.stale_runs(part)? {
                left -= stale.end - stale.start;
                runs.push(stale);
            }
            // A trace has many short runs; a few at a time, so that the first ones are there first.
            if left == 0 || runs.len() >= 64 {
                break;
            }
        }
        Ok(runs)
    }

    /// The next stale blocks of the pass; none at its end, and the next call begins another.
    fn pass_job(&self, cursor: &mut Cursor) -> Result<Option<Job>, Refused> {
        let blocks = self.channel.attached().blocks;
        let most = MAX_FETCH / self.units.bytes();
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut count = 0;
        while count < most {
            let Some(block) = self.next_stale(cursor, blocks)? else {
                break;
            };
            let first = runs.first().map_or(block, |run| run.start);
            if (block - first) * self.units.bytes() > MAX_SPAN {
                break;
            }
            let last = runs.last().map(|run| run.end);
            // How far the zeros reach is asked at the beginning of each run, and where they may begin.
            let zeros = self.zeros(cursor, block, blocks);
            if zeros * self.units.bytes() >= ZERO_RUN || (zeros > 0 && last != Some(block)) {
                if runs.is_empty() {
                    cursor.at = block + zeros;
                    return Ok(Some(Job::Zeros(block..block + zeros)));
                }
                break;
            }
            push(&mut runs, block);
            count += 1;
            cursor.at = block + 1;
        }
        if runs.is_empty() {
            // What was not stored for some reason is seen by the next pass, when nothing of this one is under way.
            if cursor.active == 0 {
                cursor.at = 0;
                cursor.words.clear();
                self.stop.set(&self.progress.passed);
            }
            return Ok(None);
        }
        Ok(Some(Job::Data(runs, false)))
    }

    /// How many stale zero blocks there are from `block` on.
    fn zeros(&self, cursor: &Cursor, block: u64, blocks: u64) -> u64 {
        let map_end = (cursor.first_word * 64 + cursor.words.len() as u64 * 64).min(blocks);
        let limit = map_end.min(block + MAX_ZEROS);
        let image = self.units.image(block..limit);
        let zeros = self.library.zeros(image) / self.units.per_block();
        let base = cursor.first_word * 64;
        let stale = (block..block + zeros).take_while(|b| bit(&cursor.words, b - base));
        stale.count() as u64
    }

    /// The next stale block from the cursor on, of the map as it was read.
    fn next_stale(&self, cursor: &mut Cursor, blocks: u64) -> Result<Option<u64>, Refused> {
        while cursor.at < blocks {
            let word = cursor.at / 64;
            let end = cursor.first_word + cursor.words.len() as u64;
            if !(cursor.first_word..end).contains(&word) {
                cursor.first_word = word;
                cursor.words = self.channel.stale(word, WORDS)?;
                if cursor.words.is_empty() {
                    return Ok(None);
                }
            }
            // CAST: below WORDS.
            let index = (word - cursor.first_word) as usize;
            let bits = cursor.words.get(index).copied().unwrap_or(0) >> (cursor.at % 64);
            if bits != 0 {
                let block = cursor.at + u64::from(bits.trailing_zeros());
                return Ok((block < blocks).then_some(block));
            }
            cursor.at = (word + 1) * 64;
        }
        Ok(None)
    }
}

fn bit(words: &[u64], number: u64) -> bool {
    let word = usize::try_from(number / 64).ok().and_then(|i| words.get(i));
    word.is_some_and(|word| word >> (number % 64) & 1 == 1)
}

fn push(runs: &mut Vec<Range<u64>>, block: u64) {
    match runs.last_mut() {
        Some(last) if last.end == block => last.end += 1,
        _ => runs.push(block..block + 1),
    }
}
