// SPDX-License-Identifier: GPL-2.0

//! Verified blocks of the image, from whichever source has them.
//!
//! Nothing leaves here that is not what the image id vouches for: the manifest's pages are verified by the reader, and
//! each block by its digest. What cannot be had is asked for again, of the next source first, for as long as the
//! caller waits.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pristine_image::ImageId;
use pristine_store::peers::Neighbours;
use pristine_store::{read_trace, Error, ErrorKind, ImageReader, ObjectName};

use crate::cache::{Cache, Key, Unpacked};
use crate::loaded::Loaded;
use crate::log;
use crate::peers::exchange;
use crate::plan::{requests, FrameRef, Pages, Plan};
use crate::source::{Backoff, Source};
use crate::stop::Stop;

/// A gap between frames of up to this many bytes is read too, rather than making another request.
const MAX_GAP: u64 = 32 << 10;
/// Most bytes of one request to a store, if the source is quick.
const MAX_REQUEST: u64 = 1 << 20;
/// A request should take no longer than this: a reader may come to wait behind it.
const REQUEST_TIME: Duration = Duration::from_millis(500);
/// Least bytes of one request, whatever the source's rate: one frame.
const MIN_REQUEST: u64 = 128 << 10;

/// How to read.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of unpacked frames that are kept.
    pub cache: u64,
    /// How long failing sources are left alone.
    pub backoff: Backoff,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody waits for it: a source that is known to be slow is the last resort.
    Demand,
    /// Nobody does, so it may find out whether a source is better now.
    Background,
}

/// Why nothing was loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The helper comes to an end.
    #[error("the helper stops")]
    Stopped,
    /// The time is over; the last error of a source.
    #[error("{0}")]
    GaveUp(String),
}

/// The image, as its sources have it.
#[derive(Debug)]
pub struct Library {
    image: ImageId,
    sources: Vec<Source>,
    cache: Cache,
    backoff: Backoff,
    stop: Arc<Stop>,
    /// The first manifest that was read; other sources that have the same packs need none of their own.
    layout: Mutex<Option<Arc<ImageReader>>>,
    /// Which source served last.
    in_use: Mutex<Option<usize>>,
    /// Wakes those that wait for a source to serve again.
    served: Condvar,
    /// Asked before the sources.
    neighbours: Option<Arc<Neighbours>>,
}

/// A source failed: which, and how.
struct Failed {
    source: usize,
    error: Box<Error>,
}

impl Failed {
    fn new(source: usize, error: Error) -> Self {
        Self {
            source,
            error: Box::new(error),
        }
    }
}

impl Library {
    /// The image `image` in `sources`, the best first. Nothing is asked of them yet.
    pub fn new(image: ImageId, sources: Vec<Source>, limits: Limits, stop: Arc<Stop>) -> Self {
        Self {
            image,
            sources,
            cache: Cache::new(limits.cache),
            backoff: limits.backoff,
            stop,
            layout: Mutex::default(),
            in_use: Mutex::default(),
            served: Condvar::new(),
            neighbours: None,
        }
    }

    /// Lets neighbours be asked before the sources.
    pub fn set_neighbours(&mut self, neighbours: Arc<Neighbours>) {
        self.neighbours = Some(neighbours);
    }

    /// The neighbours that are asked, if any.
    pub fn neighbours(&self) -> Option<&Neighbours> {
        self.neighbours.as_deref()
    }

    /// The sources.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// The sources, for another helper of the same image.
    pub fn into_sources(self) -> Vec<Source> {
        self.sources
    }

    /// The location of the source that served last.
    pub fn in_use(&self) -> Option<&str> {
        let last = *self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        self.sources.get(last?).map(Source::location)
    }

    /// Reads the manifest, trying again until `deadline`.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn open(&self, deadline: Option<Instant>) -> Result<Arc<ImageReader>, LoadError> {
        self.with_sources(Urgency::Demand, deadline, |source| {
            let (layout, own) = self
                .layout(source)
                .map_err(|error| Failed::new(source, error))?;
            Ok((layout, own))
        })
    }

    /// Loads image blocks, trying again until `deadline`, or for ever.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn load(
        &self,
        wanted: &[Range<u64>],
        urgency: Urgency,
        deadline: Option<Instant>,
    ) -> Result<Loaded, LoadError> {
        let (near, left) = self.ask_neighbours(wanted, urgency);
        if left.is_empty() {
            return Ok(near);
        }
        let mut loaded = self.with_sources(urgency, deadline, |source| {
            let loaded = self.attempt(source, &left)?;
            let served = loaded.fetched;
            Ok((loaded, served))
        })?;
        loaded.extend(near);
        Ok(loaded)
    }

    /// What neighbours have of image blocks, and what is left to be loaded from elsewhere. Whatever goes wrong with them,
    /// that is all of it.
    fn ask_neighbours(&self, wanted: &[Range<u64>], urgency: Urgency) -> (Loaded, Vec<Range<u64>>) {
        let all = || (Loaded::default(), wanted.to_vec());
        let Some((neighbours, layout)) = self.neighbours.as_ref().zip(self.any_layout()) else {
            return all();
        };
        let Ok(plan) = Plan::new(&layout, wanted) else {
            return all();
        };
        let near = exchange::load(neighbours, &plan, &self.cache, urgency);
        if near.is_empty() {
            return all();
        }
        let mut left: Vec<Range<u64>> = Vec::new();
        for place in plan.places.iter().filter(|p| !near.holds(p.block)) {
            match left.last_mut() {
                Some(last) if last.end == place.block => last.end += 1,
                _ => left.push(place.block..place.block + 1),
            }
        }
        (near, left)
    }

    /// As much of image blocks as is at hand. Also gives those that are not.
    pub fn peek(&self, wanted: &[Range<u64>]) -> Option<(Loaded, Vec<u64>)> {
        let layout = self.any_layout()?;
        let plan = Plan::new(&layout, wanted).ok()?;
        let have = plan.frames.iter().map(|f| self.cache.get(&f.key));
        let have: Vec<_> = have.collect();
        let mut loaded = Loaded::default();
        let mut missing = Vec::new();
        for places in plan.by_frame() {
            let frame = places.first().and_then(|p| have.get(p.frame)?.as_ref());
            if let Some(frame) = frame {
                frame.hash_blocks(places.iter().map(|p| p.index));
            }
            for place in places {
                match frame.filter(|f| f.block(place.index, &place.digest).is_some()) {
                    Some(frame) => loaded.push(place.block, frame, place.index, place.digest),
                    None => missing.push(place.block),
                }
            }
        }
        Some((loaded, missing))
    }

    /// Asks those sources that are left in `ask` for the image's boot trace, each once; ones that cannot be reached stay there.
    /// One that is garbage, or does not come, is as good as none.
    pub fn trace(&self, ask: &mut Vec<usize>) -> Option<Vec<Range<u64>>> {
        let mut found = None;
        ask.retain(|index| {
            let Some(source) = self.sources.get(*index).filter(|_| found.is_none()) else {
                return false;
            };
            if !source.may_ask(&self.backoff) {
                return true;
            }
            let read = source
                .store()
                .and_then(|store| read_trace(store.as_ref(), self.image));
            match read {
                Ok(runs) => {
                    self.serves(*index);
                    found = runs;
                    false
                }
                // Nobody is there yet: that will be so for blocks, too.
                Err(error @ Error::Unreachable { .. }) => {
                    self.note(&Failed::new(*index, error));
                    true
                }
                // It says nothing about how the source serves blocks.
                Err(error) => {
                    log::warn(format_args!("{error}; going on without it"));
                    false
                }
            }
        });
        found
    }

    /// How many zero blocks a run of image blocks begins with. 0 if the manifest cannot tell now.
    pub fn zeros(&self, blocks: Range<u64>) -> u64 {
        let layout = self.any_layout();
        layout.map_or(0, |l| Pages::new(&l).zeros(blocks).unwrap_or(0))
    }

    /// Asks sources that were too slow again, as long as another serves. For a thread that has time.
    pub fn probe(&self) {
        for source in self.sources.iter().filter(|s| s.is_slow()) {
            if self.sources.iter().any(|s| s.health().failures == 0) && source.probe(&self.backoff)
            {
                log::info(format_args!("{} serves again", source.location()));
                self.served.notify_all();
            }
        }
    }

    fn any_layout(&self) -> Option<Arc<ImageReader>> {
        let layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        layout.clone()
    }

    /// The manifest to read with from a source, and whether it is the source's own.
    fn layout(&self, source: usize) -> Result<(Arc<ImageReader>, bool), Error> {
        let own = self.sources.get(source);
        if let Some(own) = own.and_then(|source| source.layout(self.image)) {
            // Whoever looks for neighbours may have been the first to read it.
            self.take_up(&own);
            return Ok((own, true));
        }
        match self.any_layout() {
            Some(layout) => Ok((layout, false)),
            None => Ok((self.own_layout(source)?, true)),
        }
    }

    fn own_layout(&self, source: usize) -> Result<Arc<ImageReader>, Error> {
        let begin = Instant::now();
        let from = self.sources.get(source).ok_or(Error::Cancelled)?;
        let opened = from.open_layout(self.image, &self.stop).inspect_err(|e| {
            if matches!(e, Error::Timeout { .. }) && begin.elapsed() > Duration::from_secs(1) {
                from.was_slow(ObjectName::Manifest(self.image), 0..4096);
            }
        })?;
        self.take_up(&opened);
        Ok(opened)
    }

    /// The first manifest is the one that all go by.
    fn take_up(&self, opened: &Arc<ImageReader>) {
        let mut layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        layout.get_or_insert_with(|| Arc::clone(opened));
    }

    /// Runs `attempt` with one source after the other, until one succeeds. It also says whether the source was asked
    /// for anything.
    fn with_sources<T>(
        &self,
        urgency: Urgency,
        deadline: Option<Instant>,
        attempt: impl Fn(usize) -> Result<(T, bool), Failed>,
    ) -> Result<T, LoadError> {
        let mut last = String::from("no store was asked");
        loop {
            let mut next = 0;
            while let Some(source) = self.choose(urgency, &mut next) {
                if self.stop.token().is_cancelled() {
                    return Err(LoadError::Stopped);
                }
                match attempt(source) {
                    Ok((value, asked)) => {
                        if asked {
                            self.serves(source);
                        }
                        return Ok(value);
                    }
                    Err(failed) if matches!(*failed.error, Error::Cancelled) => {
                        return Err(LoadError::Stopped)
                    }
                    Err(failed) => {
                        last = self.note(&failed);
                        if failed.source != source {
                            // What this one was not asked for was wrong; now it will be.
                            next = 0;
                        }
                    }
                }
            }
            let now = Instant::now();
            if deadline.is_some_and(|d| d <= now) {
                return Err(LoadError::GaveUp(last));
            }
            let again = self.sources.iter().filter_map(Source::not_before).min();
            let until = again.unwrap_or(now + Duration::from_millis(50));
            let until = deadline.map_or(until, |d| until.min(d));
            self.wait_for_sources(until.saturating_duration_since(now));
        }
    }

    /// The next source to ask, from the `next`th on in the order of preference. Ones that are slow come last when
    /// somebody waits.
    fn choose(&self, urgency: Urgency, next: &mut usize) -> Option<usize> {
        let slow_last = urgency == Urgency::Demand;
        let quick = (0..self.sources.len()).map(|i| (i, false));
        let slow = (0..self.sources.len()).map(|i| (i, true));
        for (place, (i, is_slow)) in quick.chain(slow).enumerate().skip(*next) {
            *next = place + 1;
            let Some(source) = self.sources.get(i) else {
                continue;
            };
            let now_slow = slow_last && source.is_slow();
            if now_slow == is_slow && source.may_ask(&self.backoff) {
                return Some(i);
            }
        }
        None
    }

    fn serves(&self, source: usize) {
        if let Some(from) = self.sources.get(source).filter(|s| s.serves()) {
            log::info(format_args!("{} serves again", from.location()));
        }
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        *in_use = Some(source);
        self.served.notify_all();
    }

    fn wait_for_sources(&self, time: Duration) {
        // In small pieces, so that the end of the helper is seen.
        let piece = time.clamp(Duration::from_millis(5), Duration::from_millis(250));
        let in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.served.wait_timeout(in_use, piece));
    }

    /// Notes and tells that a source failed; gives the error's text.
    fn note(&self, failed: &Failed) -> String {
        let text = failed.error.to_string();
        if let Some(source) = self.sources.get(failed.source) {
            let delay = source.failed(&failed.error, &self.backoff);
            let failures = source.health().failures;
            // Of a long series the first ones and then fewer and fewer.
            if failures <= 3 || failures.is_power_of_two() {
                log::warn(format_args!(
                    "{text}; asking again in {:.1} s (failure {failures})",
                    delay.as_secs_f64()
                ));
            }
        }
        text
    }

    /// One attempt to load from a source.
    fn attempt(&self, source: usize, wanted: &[Range<u64>]) -> Result<Loaded, Failed> {
        let failed = |error| Failed::new(source, error);
        let (layout, own) = self.layout(source).map_err(failed)?;
        match self.attempt_with(source, &layout, wanted) {
            // Perhaps this source has the image in other packs, or the other source's manifest lies about where
            // content is, or its pages cannot be read any more.
            Err(error) if !own && error.source == source && may_be_layout(&error.error) => {
                let layout = self.own_layout(source).map_err(failed)?;
                self.attempt_with(source, &layout, wanted)
            }
            result => result,
        }
    }

    fn attempt_with(
        &self,
        source: usize,
        layout: &ImageReader,
        wanted: &[Range<u64>],
    ) -> Result<Loaded, Failed> {
        let failed = |error| Failed::new(source, error);
        let plan = Plan::new(layout, wanted).map_err(failed)?;
        let (have, fetched) = self.frames(source, &plan.frames).map_err(failed)?;
        let mut loaded = Loaded::default();
        loaded.fetched = fetched;
        let mut seen = vec![false; plan.frames.len()];
        for places in plan.by_frame() {
            let first = places.first();
            let frame = first.and_then(|p| Some((p, plan.frames.get(p.frame)?)));
            let found = frame.and_then(|(p, f)| Some((p, f, have.get(&f.key)?)));
            let Some((first, frame, unpacked)) = found else {
                return Err(failed(Error::Cancelled));
            };
            if let Some(seen) = seen.get_mut(first.frame).filter(|seen| !**seen) {
                *seen = true;
                let start = first.block.saturating_sub(u64::from(first.index));
                loaded.frames.push(start..start + u64::from(frame.blocks));
            }
            unpacked.hash_blocks(places.iter().map(|p| p.index));
            for place in places {
                if unpacked.block(place.index, &place.digest).is_none() {
                    self.cache.forget(&frame.key, unpacked);
                    // Whoever it came from, perhaps long ago.
                    let from = self.sources.get(unpacked.source);
                    let error = Error::Content {
                        location: from.map(|s| s.location().to_owned()).unwrap_or_default(),
                        object: ObjectName::Pack(frame.key.0).to_string(),
                        block: place.block,
                        attempts: 1,
                    };
                    return Err(Failed::new(unpacked.source, error));
                }
                loaded.push(place.block, unpacked, place.index, place.digest);
            }
        }
        Ok(loaded)
    }

    /// Frames, from the cache or from a source (and whether from there); what another thread fetches already is waited
    /// for.
    fn frames(
        &self,
        source: usize,
        wanted: &[FrameRef],
    ) -> Result<(HashMap<Key, Arc<Unpacked>>, bool), Error> {
        let mut have: HashMap<Key, Arc<Unpacked>> = HashMap::new();
        let mut fetched = false;
        loop {
            let missing: Vec<Key> = wanted
                .iter()
                .map(|f| f.key)
                .filter(|key| !have.contains_key(key))
                .collect();
            if missing.is_empty() {
                return Ok((have, fetched));
            }
            self.stop.token().check()?;
            let mut claim = self.cache.claim(&missing);
            have.extend(claim.ready.drain(..));
            if claim.mine.is_empty() {
                let theirs = std::mem::take(&mut claim.theirs);
                drop(claim);
                self.cache.wait(&theirs, Duration::from_millis(250));
                continue;
            }
            let mine = wanted.iter().filter(|f| claim.mine.contains(&f.key));
            let rate = self.sources.get(source).and_then(Source::rate);
            let max = rate.map_or(MAX_REQUEST, |rate| {
                let bytes = u128::from(rate) * REQUEST_TIME.as_millis() / 1000;
                u64::try_from(bytes)
                    .unwrap_or(u64::MAX)
                    .clamp(MIN_REQUEST, MAX_REQUEST)
            });
            let mut result = Ok(());
            fetched = true;
            // All of them, even if one fails: what arrived intact need not be fetched again.
            for request in requests(mine.copied().collect(), max, MAX_GAP) {
                match self.fetch(source, &request) {
                    Ok(frames) => have.extend(frames),
                    Err(error) if error.is_corruption() => result = Err(error),
                    Err(error) => return Err(error),
                }
            }
            result?;
        }
    }

    /// Fetches the frames of one request; what is intact of it goes to the cache.
    fn fetch(
        &self,
        source: usize,
        request: &[FrameRef],
    ) -> Result<Vec<(Key, Arc<Unpacked>)>, Error> {
        let (Some(first), Some(last), Some(from)) =
            (request.first(), request.last(), self.sources.get(source))
        else {
            return Ok(Vec::new());
        };
        let object = ObjectName::Pack(first.key.0);
        let range = u64::from(first.key.1)..u64::from(last.key.1) + u64::from(last.len);
        let begin = Instant::now();
        let bytes = from
            .packs_of(&self.image)
            .and_then(|store| store.get_range(&object, range.clone()))
            .inspect_err(|error| {
                if matches!(error, Error::Timeout { .. }) {
                    from.was_slow(object, range.start..range.start + u64::from(first.len));
                }
            })?;
        let time = begin.elapsed();
        let mut frames = Vec::new();
        let mut wrong = None;
        for frame in request {
            // CAST: a pack is below 4 GiB.
            let at = (u64::from(frame.key.1) - range.start) as usize;
            let stored = bytes.get(at..at + frame.len as usize).unwrap_or_default();
            match Unpacked::new(stored, frame.blocks, source) {
                Ok(unpacked) => {
                    let unpacked = Arc::new(unpacked);
                    self.cache.put(frame.key, &unpacked);
                    frames.push((frame.key, unpacked));
                }
                Err(error) => wrong = Some(error),
            }
        }
        match wrong {
            Some(error) => Err(Error::Format {
                location: from.location().to_owned(),
                object: object.to_string(),
                error,
            }),
            None => {
                from.measured(bytes.len() as u64, time);
                Ok(frames)
            }
        }
    }
}

/// Whether another manifest of the same image might cure it.
fn may_be_layout(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Damaged)
        || matches!(error, Error::Unreachable { .. } | Error::Io { .. })
}
