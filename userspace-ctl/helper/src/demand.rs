// SPDX-License-Identifier: GPL-2.0

//! Requests: taken from the kernel, sorted, answered.
//!
//! A few threads take requests; others answer them, those that somebody waits for first. Requests that lie near each
//! other are answered by one thread together, with one request to the store where that is possible.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ahead::Ahead;
use crate::channel::{Channel, Content, Refused, Request, AHEAD, EIO, MAX_FETCH, MAX_REQUESTS};
use crate::hydrate::Hydrator;
use crate::library::{Library, LoadError, Urgency};
use crate::log;
use crate::stop::{End, Stop};
use crate::trace::Recorder;
use crate::units::Units;

/// Requests that wait here at most; more wait in the kernel.
const MAX_QUEUE: usize = 4096;
/// While the device is suspended, it is asked again after this time.
const SUSPENDED: Duration = Duration::from_millis(100);
/// Requests this near to each other, in bytes, are answered together.
const NEAR: u64 = 1 << 20;

/// A request, and when it was taken.
#[derive(Clone, Copy, Debug)]
struct Taken {
    request: Request,
    at: Instant,
}

#[derive(Debug, Default)]
struct Inner {
    /// Somebody waits for these.
    waited: VecDeque<Taken>,
    ahead: VecDeque<Taken>,
    /// Requests that are being answered.
    active: usize,
    last: Option<Instant>,
}

/// Requests that were taken and are not being answered yet.
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    /// There is something to answer: as many are woken as have something to do.
    arrived: Condvar,
    /// There is room again.
    taken: Condvar,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests answered with content.
    pub answered: AtomicU64,
    /// Requests that ended with an error.
    pub failed: AtomicU64,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, requests: Vec<Request>) {
        let at = Instant::now();
        let count = requests.len();
        let mut inner = self.lock();
        inner.last = Some(at);
        for request in requests {
            let taken = Taken { request, at };
            match request.flags & AHEAD {
                0 => inner.waited.push_back(taken),
                _ => inner.ahead.push_back(taken),
            }
        }
        drop(inner);
        for _ in 0..count {
            self.arrived.notify_one();
        }
    }

    /// Waits while there is no room, at most for `time`.
    fn wait_for_room(&self, time: Duration) -> bool {
        let inner = self.lock();
        let full = |inner: &mut Inner| inner.waited.len() + inner.ahead.len() >= MAX_QUEUE;
        let waited = self.taken.wait_timeout_while(inner, time, full);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !full(&mut inner)
    }

    /// The next request and those that are near it, at most [`MAX_FETCH`] bytes in all; none after `time`.
    fn pop(&self, units: Units, time: Duration) -> Vec<Taken> {
        let inner = self.lock();
        let empty = |inner: &mut Inner| inner.waited.is_empty() && inner.ahead.is_empty();
        let waited = self.arrived.wait_timeout_while(inner, time, empty);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let was_full = inner.waited.len() + inner.ahead.len() >= MAX_QUEUE;
        let queue = match inner.waited.is_empty() {
            false => &mut inner.waited,
            true => &mut inner.ahead,
        };
        let Some(first) = queue.pop_front() else {
            return Vec::new();
        };
        let near = NEAR / units.bytes();
        let mut left = (MAX_FETCH / units.bytes()).saturating_sub(u64::from(first.request.blocks));
        let mut batch = vec![first];
        queue.retain(|taken| {
            let blocks = u64::from(taken.request.blocks);
            let distance = taken.request.first.abs_diff(first.request.first);
            let take = distance <= near && blocks <= left;
            if take {
                left -= blocks;
                batch.push(*taken);
            }
            !take
        });
        inner.active += batch.len();
        if was_full {
            self.taken.notify_all();
        }
        batch
    }

    fn done(&self, count: usize) {
        let mut inner = self.lock();
        inner.active -= count;
        inner.last = Some(Instant::now());
    }

    /// Whether requests are waiting or being answered, or were not long ago.
    pub fn is_busy(&self, recently: Duration) -> bool {
        let inner = self.lock();
        let recent = inner.last.is_some_and(|last| last.elapsed() < recently);
        recent || inner.active > 0 || !inner.waited.is_empty()
    }

    /// Requests that are being answered.
    pub fn active(&self) -> usize {
        self.lock().active
    }
}

/// What the threads that serve requests share.
#[derive(Clone, Copy)]
pub struct Demand<'a> {
    /// The device.
    pub channel: &'a dyn Channel,
    /// The image.
    pub library: &'a Library,
    /// Requests that wait.
    pub queue: &'a Queue,
    /// What is counted.
    pub counters: &'a Counters,
    /// The boot trace.
    pub recorder: &'a Recorder,
    /// What keeps the neighbours of what was fetched.
    pub hydrator: Hydrator<'a>,
    /// Who reads one block after the other.
    pub ahead: &'a Ahead,
    /// Block sizes.
    pub units: Units,
    /// How long one wait for requests takes.
    pub wait: Duration,
    /// After this time a request ends with an error.
    pub give_up: Option<Duration>,
    /// The end of all.
    pub stop: &'a Stop,
}

impl Demand<'_> {
    /// Takes requests until the end.
    pub fn take(&self) {
        while !self.stop.is_stopping() {
            if !self.queue.wait_for_room(self.wait) {
                continue;
            }
            let begin = Instant::now();
            match self.channel.next(MAX_REQUESTS, self.wait) {
                Ok(requests) if requests.is_empty() => {
                    // A suspended device has nothing at once.
                    if begin.elapsed() < self.wait / 4 {
                        self.stop.sleep(SUSPENDED.min(self.wait));
                    }
                }
                Ok(requests) => {
                    if let Some(other) = requests
                        .iter()
                        .find(|r| r.generation != self.channel.attached().generation)
                    {
                        self.stop.end(End::Changed(format!(
                            "the device asks for generation {}, it was attached to with {}",
                            other.generation,
                            self.channel.attached().generation
                        )));
                        return;
                    }
                    for request in &requests {
                        self.recorder.note(self.units.image(run(request)));
                        self.ahead.note(&run(request));
                    }
                    self.queue.push(requests);
                }
                Err(Refused::Suspended | Refused::Later) => {
                    self.stop.sleep(SUSPENDED);
                }
                Err(error) => self.refused(error),
            }
        }
    }

    /// Answers requests until the end.
    pub fn work(&self) {
        while !self.stop.is_stopping() {
            let batch = self.queue.pop(self.units, self.wait);
            if batch.is_empty() {
                continue;
            }
            let frames = self.batch(&batch);
            self.queue.done(batch.len());
            for frame in frames {
                match self.hydrator.keep(frame) {
                    // Nobody waits for it.
                    Ok(()) | Err(Refused::Suspended | Refused::Later | Refused::NotStored) => {}
                    Err(error) => self.refused(error),
                }
            }
        }
    }

    /// Answers requests. Gives the image blocks of the frames of which they wanted a part.
    fn batch(&self, batch: &[Taken]) -> Vec<Range<u64>> {
        let runs: Vec<Range<u64>> = batch.iter().map(|t| run(&t.request)).collect();
        let wanted: Vec<Range<u64>> = runs.iter().map(|r| self.units.image(r.clone())).collect();
        let oldest = batch.iter().map(|t| t.at).min();
        let deadline = self.give_up.and_then(|time| Some(oldest? + time));
        match self.library.load(&wanted, Urgency::Demand, deadline) {
            Ok(loaded) => {
                for (taken, wanted) in batch.iter().zip(&wanted) {
                    if loaded.is_zero(wanted.clone()) {
                        self.answer(&taken.request, Content::Zeroes);
                    } else {
                        let content = loaded.content(wanted.clone());
                        self.answer(&taken.request, Content::Data(&content));
                    }
                }
                loaded.frames_beyond(&wanted)
            }
            // The kernel keeps the request for the next helper.
            Err(LoadError::Stopped) => Vec::new(),
            Err(LoadError::GaveUp(why)) => {
                for taken in batch {
                    log::warn(format_args!(
                        "blocks {:?} end with an error after {} s: {why}",
                        run(&taken.request),
                        taken.at.elapsed().as_secs()
                    ));
                    self.counters.failed.fetch_add(1, Ordering::Relaxed);
                    self.until_resumed(|| self.channel.fail(taken.request.id, EIO));
                }
                Vec::new()
            }
        }
    }

    fn answer(&self, request: &Request, content: Content<'_>) {
        if self.until_resumed(|| self.channel.answer(request.id, content)) {
            self.counters.answered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Says something to the kernel, again when the device is no longer suspended. Whether it took it.
    fn until_resumed(&self, say: impl Fn() -> crate::channel::Result) -> bool {
        loop {
            match say() {
                Ok(()) => return true,
                Err(Refused::Suspended | Refused::Later) => {
                    // Unanswered it stays with the kernel, so nothing is lost at the end.
                    if !self.stop.sleep(SUSPENDED) {
                        return false;
                    }
                }
                // Written meanwhile, or ended: nobody waits.
                Err(Refused::NoRequest) => return false,
                Err(Refused::NotStored) => {
                    log::warn("the data device does not take what was fetched");
                    return true;
                }
                Err(error) => {
                    self.refused(error);
                    return false;
                }
            }
        }
    }

    fn refused(&self, error: Refused) {
        self.stop.end(end(error));
    }
}

/// What a refusal that is not about one request means.
pub fn end(error: Refused) -> End {
    match error {
        Refused::Gone => End::Gone,
        Refused::TakenOver => End::TakenOver,
        error => End::Failed(error.to_string()),
    }
}

fn run(request: &Request) -> Range<u64> {
    request.first..request.first.saturating_add(u64::from(request.blocks))
}
