// SPDX-License-Identifier: GPL-2.0

//! The helper as a whole: its threads, and what it does once a second.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use pristine_image::ImageId;
use pristine_store::peers::{Neighbours, SECTION};

use crate::ahead::Ahead;
use crate::channel::{Channel, Left, Refused};
use crate::demand::{end, Counters, Demand, Queue};
use crate::hydrate::{Hydrator, Progress};
use crate::library::{Library, Limits};
use crate::log;
use crate::pace::{Hydrate, Load, Pace};
use crate::peers::exchange;
use crate::peers::serve::Given;
use crate::source::{Backoff, Source};
use crate::state::{now, peers_state, AtomicFile, SourceState, State};
use crate::stop::{End, Stop};
use crate::trace::{self, Recorder};
use crate::units::Units;

/// All of it is locked in memory, and nothing here recurses.
const STACK: usize = 512 << 10;
/// Threads that take requests: one is always there.
const TAKERS: usize = 2;
/// Threads that fetch ahead of readers.
pub const AHEAD: usize = 4;

/// How the helper works.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Threads that answer requests.
    pub workers: usize,
    /// Threads that hydrate.
    pub hydrators: usize,
    /// What is hydrated.
    pub hydrate: Hydrate,
    /// Whether to fetch ahead of who reads one block after the other.
    pub read_ahead: bool,
    /// Bytes per second of hydration at most.
    pub rate: Option<u64>,
    /// Bytes of unpacked frames that are kept.
    pub cache: u64,
    /// How long failing sources are left alone.
    pub backoff: Backoff,
    /// After this time a request ends with an error; `None` for never.
    pub give_up: Option<Duration>,
    /// Whether it goes on when nothing is stale any more.
    pub stay: bool,
    /// How long what is in hand may take when it is asked to stop.
    pub grace: Duration,
    /// How long one wait for requests takes, and so how long it takes to see the end.
    pub wait: Duration,
    /// Between two looks at progress.
    pub tick: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            workers: 8,
            hydrators: 4,
            hydrate: Hydrate::Idle,
            read_ahead: true,
            rate: None,
            cache: 16 << 20,
            backoff: Backoff::default(),
            give_up: None,
            stay: false,
            grace: Duration::from_secs(5),
            wait: Duration::from_millis(500),
            tick: Duration::from_secs(1),
        }
    }
}

/// Where the helper writes, and what it looks at besides the channel.
#[derive(Debug)]
pub struct Places {
    /// The device's name, for people.
    pub device: String,
    /// The state file.
    pub state: Option<AtomicFile>,
    /// The boot trace.
    pub trace: Option<AtomicFile>,
    /// The device's own load.
    pub load: Load,
    /// What neighbours were given, if they are given anything.
    pub given: Option<Arc<Given>>,
}

/// A helper that is attached.
pub struct Helper<'a> {
    channel: &'a dyn Channel,
    library: Library,
    settings: Settings,
    units: Units,
    places: Places,
    stop: Arc<Stop>,
    recorder: Arc<Recorder>,
    queue: Queue,
    counters: Counters,
    ahead: Ahead,
    progress: Progress,
    /// The trace of an earlier boot here, and the store's.
    followed: Mutex<Vec<Range<u64>>>,
    begin: Instant,
}

impl<'a> Helper<'a> {
    /// A helper of `channel`, which fetches from `sources`. Follows the trace in its place, if there is one. `None` if
    /// the device's blocks are smaller than the image's.
    pub fn new(
        channel: &'a dyn Channel,
        sources: Vec<Source>,
        settings: Settings,
        places: Places,
        stop: Arc<Stop>,
        recorder: Arc<Recorder>,
    ) -> Option<Self> {
        let attached = channel.attached();
        let image = ImageId::from_bytes(attached.image);
        let limits = Limits {
            cache: settings.cache,
            backoff: settings.backoff,
        };
        let followed = read_trace(&places, &image);
        let units = Units::new(attached.block_shift)?;
        Some(Self {
            channel,
            library: Library::new(image, sources, limits, Arc::clone(&stop)),
            settings,
            ahead: Ahead::new(units, attached.blocks),
            units,
            progress: Progress::new(followed.clone()),
            followed: Mutex::new(followed),
            places,
            stop,
            recorder,
            queue: Queue::default(),
            counters: Counters::default(),
            begin: Instant::now(),
        })
    }

    /// Lets it take blocks from neighbours too, and fetch what nobody asked for in an order of its own, so that neighbours
    /// that begin at the same time have different things to give.
    pub fn with_neighbours(mut self, neighbours: Arc<Neighbours>) -> Self {
        let blocks = self.units.image(0..self.channel.attached().blocks).end;
        let order = neighbours.order(blocks.div_ceil(SECTION));
        let sections = order.into_iter().map(u64::from);
        self.progress
            .scatter(sections.map(|n| n * SECTION..((n + 1) * SECTION).min(blocks)));
        self.library.set_neighbours(neighbours);
        self
    }

    /// Serves the device until the end, and says why it ended.
    pub fn run(&self) -> End {
        let load = &self.places.load;
        let pace = Pace::new(self.settings.hydrate, self.settings.rate, load);
        let hydrator = Hydrator {
            channel: self.channel,
            library: &self.library,
            queue: &self.queue,
            progress: &self.progress,
            pace: &pace,
            units: self.units,
            stop: &self.stop,
        };
        let demand = Demand {
            channel: self.channel,
            library: &self.library,
            queue: &self.queue,
            counters: &self.counters,
            recorder: &self.recorder,
            hydrator,
            ahead: &self.ahead,
            units: self.units,
            wait: self.settings.wait,
            give_up: self.settings.give_up,
            stop: &self.stop,
        };
        let mode = self.settings.hydrate;
        std::thread::scope(|scope| {
            let hydrators = match mode {
                Hydrate::Off => 0,
                _ => self.settings.hydrators.max(1),
            };
            for _ in 0..TAKERS {
                self.spawn(scope, "take", move || demand.take());
            }
            for _ in 0..self.settings.workers.max(1) {
                self.spawn(scope, "answer", move || demand.work());
            }
            for _ in 0..hydrators {
                self.spawn(scope, "hydrate", move || hydrator.run(mode));
            }
            let ahead = if self.settings.read_ahead { AHEAD } else { 0 };
            for _ in 0..ahead {
                let wait = self.settings.wait;
                self.spawn(scope, "ahead", move || {
                    hydrator.run_ahead(&self.ahead, wait)
                });
            }
            self.spawn(scope, "stores", || self.look_after_stores());
            if let Some(neighbours) = self.library.neighbours() {
                let sources = self.library.sources();
                self.spawn(scope, "neighbours", || {
                    let given = self.places.given.as_deref();
                    exchange::look_after(neighbours, sources, given, &self.stop);
                });
            }
            self.watch();
            self.finish();
        });
        let end = self.stop.why().unwrap_or(End::Asked);
        self.write_trace();
        self.write_state(None, 0, Some(&end));
        end
    }

    /// What another helper of the same device and image can go on with.
    pub fn into_parts(self) -> (Vec<Source>, Places) {
        (self.library.into_sources(), self.places)
    }

    fn spawn<'s>(&'s self, scope: &'s Scope<'s, '_>, name: &str, work: impl FnOnce() + Send + 's) {
        let builder = Builder::new().name(name.to_owned()).stack_size(STACK);
        if let Err(error) = builder.spawn_scoped(scope, work) {
            self.stop
                .end(End::Failed(format!("cannot start a thread: {error}")));
        }
    }

    /// Looks up all stores' addresses as soon as that is possible, and finds out whether those that were slow are better.
    fn look_after_stores(&self) {
        let mut ask: Vec<usize> = (0..self.library.sources().len()).collect();
        loop {
            if !ask.is_empty() {
                self.look_for_trace(&mut ask);
            }
            for source in self.library.sources() {
                if let Err(error) = source.store() {
                    source.failed(&error, &self.settings.backoff);
                }
            }
            self.library.probe();
            if !self.stop.sleep(self.settings.tick) {
                return;
            }
        }
    }

    /// Asks stores that were not asked yet for the boot trace that all machines share.
    fn look_for_trace(&self, ask: &mut Vec<usize>) {
        let shared = self.library.trace(ask).unwrap_or_default();
        if !shared.is_empty() {
            log::info(format_args!(
                "following the store's boot trace of {} runs",
                shared.len()
            ));
            ask.clear();
        }
        self.progress.follow(&shared);
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        followed.extend(shared);
    }

    /// Once a second until the end: is anything left to do, and how far is it?
    fn watch(&self) {
        let mut last: Option<(Instant, u64)> = None;
        let mut rate = 0;
        let mut told = false;
        let mut trace_written = false;
        loop {
            let left = match self.channel.left() {
                Ok(left) => Some(left),
                Err(Refused::Suspended | Refused::Later) => None,
                Err(error) => {
                    self.stop.end(end(error));
                    None
                }
            };
            if let Some(left) = left {
                let now = Instant::now();
                match last {
                    // A look between two ticks says little.
                    Some((at, _)) if now - at < self.settings.tick / 2 => {}
                    Some((at, before)) => {
                        let seconds = (now - at).as_secs_f64().max(0.001);
                        let done = before.saturating_sub(left.stale) as f64 / seconds;
                        rate = ((rate as f64 * 3.0 + done) / 4.0) as u64;
                        last = Some((now, left.stale));
                    }
                    None => last = Some((now, left.stale)),
                }
                if left.stale == 0 && left.open == 0 && !self.queue.is_busy(Duration::ZERO) {
                    if !told {
                        log::info(format_args!(
                            "nothing on {} is stale any more",
                            self.places.device
                        ));
                        told = true;
                    }
                    if !self.settings.stay {
                        self.stop.end(End::Complete);
                    }
                } else {
                    told = false;
                }
            }
            if !trace_written && self.recorder.ended().is_some() {
                self.write_trace();
                trace_written = true;
            }
            self.write_state(left, rate, None);
            let passed = &self.progress.passed;
            if !self.stop.sleep_until_set(self.settings.tick, passed) {
                return;
            }
        }
    }

    /// Lets what is in hand come to its end, for a while; the rest stays with the kernel.
    fn finish(&self) {
        let until = Instant::now() + self.settings.grace;
        while self.queue.active() > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.stop.cancel();
    }

    fn write_trace(&self) {
        self.recorder.end();
        let Some((file, runs)) = self.places.trace.as_ref().zip(self.recorder.ended()) else {
            return;
        };
        // A boot that asked for nothing has nothing to teach. What came by the earlier trace was not asked for, because
        // it was there: so that trace stays, and what it lacked follows it.
        if runs.is_empty() {
            return;
        }
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let runs = trace::each_once(&[followed.as_slice(), &runs].concat());
        followed.clone_from(&runs);
        drop(followed);
        let image = ImageId::from_bytes(self.channel.attached().image);
        match file.write(&trace::format(&image, &runs)) {
            Ok(()) => log::info(format_args!("recorded a boot trace of {} runs", runs.len())),
            Err(error) => log::warn(format_args!("cannot write the boot trace: {error}")),
        }
    }

    fn write_state(&self, left: Option<Left>, rate: u64, ended: Option<&End>) {
        let Some(file) = &self.places.state else {
            return;
        };
        let attached = self.channel.attached();
        let stale = match (left, ended) {
            (Some(left), _) => left.stale,
            (None, Some(End::Complete)) => 0,
            (None, _) => self.channel.left().map_or(0, |left| left.stale),
        };
        let sources: Vec<SourceState> = self.library.sources().iter().map(source_state).collect();
        let phase = match ended {
            Some(End::Complete) => "done",
            Some(_) => "ended",
            None if stale == 0 => "done",
            None if sources.iter().all(|s| !s.serves) => "waiting",
            None if self.settings.hydrate == Hydrate::Off => "serving",
            None if self.progress.in_trace.load(Ordering::Relaxed) => "trace",
            None => "hydrating",
        };
        let state = State {
            version: 1,
            pid: std::process::id(),
            device: self.places.device.clone(),
            image: ImageId::from_bytes(attached.image).to_string(),
            generation: attached.generation,
            phase,
            updated: now(),
            running: self.begin.elapsed().as_secs(),
            blocks: attached.blocks,
            block_bytes: self.units.bytes(),
            stale,
            blocks_per_second: rate,
            eta: (rate > 0 && ended.is_none()).then(|| stale / rate.max(1)),
            answered: self.counters.answered.load(Ordering::Relaxed),
            failed: self.counters.failed.load(Ordering::Relaxed),
            hydrated: self.progress.taken.load(Ordering::Relaxed),
            source: self.library.in_use().map(str::to_owned),
            sources,
            peers: peers_state(self.library.neighbours(), self.places.given.as_deref()),
            last_error: log::last_warning(),
            ended: ended.map(describe),
        };
        let written = serde_json::to_vec_pretty(&state)
            .map_err(std::io::Error::from)
            .and_then(|json| file.write(&json));
        // Nothing depends on it; the next one may succeed.
        drop(written);
    }
}

fn source_state(source: &Source) -> SourceState {
    let (health, traffic) = (source.health(), source.traffic());
    SourceState {
        location: source.location().to_owned(),
        serves: health.failures == 0,
        requests: traffic.requests,
        bytes: traffic.bytes,
        bytes_per_second: source.rate(),
        failed: health.failed,
        error: health.error,
    }
}

/// What an end is called.
pub fn describe(end: &End) -> String {
    match end {
        End::Complete => "nothing is stale any more".to_owned(),
        End::Asked => "asked to stop".to_owned(),
        End::TakenOver => "another helper took the device over".to_owned(),
        End::Gone => "the device is gone".to_owned(),
        End::Changed(what) | End::Failed(what) => what.clone(),
    }
}

fn read_trace(places: &Places, image: &ImageId) -> Vec<Range<u64>> {
    let bytes = match places
        .trace
        .as_ref()
        .map(|file| file.read(trace::MAX_BYTES))
    {
        None | Some(Ok(None)) => return Vec::new(),
        Some(Ok(Some(bytes))) => bytes,
        Some(Err(error)) => {
            log::warn(format_args!("cannot read the boot trace: {error}"));
            return Vec::new();
        }
    };
    match trace::parse(&bytes, image) {
        Ok(runs) => {
            log::info(format_args!(
                "following a boot trace of {} runs",
                runs.len()
            ));
            runs
        }
        Err(error) => {
            log::warn(format_args!("the boot trace is ignored: {error}"));
            Vec::new()
        }
    }
}
