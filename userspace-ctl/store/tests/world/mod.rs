// SPDX-License-Identifier: GPL-2.0

//! The store in memory of the model: its steps, its scheduler, its time and its oracle.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use pristine_store::lease::Clock;
use pristine_store::{
    CancelToken, ChannelName, Error, ImageId, Listed, NoteKind, NoteName, Noted, ObjectKind,
    ObjectName, Put, Result, Revision, SignedRelease, Store, Traffic,
};

/// The time of a lease in the model.
pub const LEASE: Duration = Duration::from_secs(300);
/// The longest that a request takes.
const REQUEST: u64 = 300_000 / 4;

/// Numbers that follow from a seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

#[derive(Debug)]
struct State {
    rng: Rng,
    /// Path to content and time.
    objects: BTreeMap<String, (Vec<u8>, u64)>,
    /// Milliseconds.
    now: u64,
    /// Actors that wait for a step, and whether that is a request (or only a look at the clock).
    waiting: BTreeMap<usize, bool>,
    /// Actors that are between steps.
    running: BTreeSet<usize>,
    granted: Option<usize>,
    /// When each actor's request was sent.
    sent: BTreeMap<usize, u64>,
    /// Requests left before an actor dies.
    lives: BTreeMap<usize, u64>,
    dead: BTreeSet<usize>,
    keep: u64,
    /// No jumps any more.
    calm: bool,
    needs: BTreeMap<ImageId, BTreeSet<String>>,
    /// Where each channel's pointer was: generation to image.
    pointed: BTreeMap<String, BTreeMap<u64, ImageId>>,
    broken: Option<String>,
    log: Vec<String>,
}

/// The store, and all who use it.
#[derive(Debug)]
pub struct World {
    state: Mutex<State>,
    turn: Condvar,
}

/// Marks an actor as gone, also if it panics.
pub struct Ending(pub Arc<World>, pub usize);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.finish(self.1);
    }
}

impl World {
    pub fn new(
        seed: u64,
        actors: usize,
        keep: u64,
        needs: BTreeMap<ImageId, BTreeSet<String>>,
    ) -> Arc<Self> {
        Arc::new(World {
            state: Mutex::new(State {
                rng: Rng::new(seed ^ 0x5eed),
                objects: BTreeMap::new(),
                now: 1_700_000_000_000,
                waiting: BTreeMap::new(),
                running: (0..actors).collect(),
                granted: None,
                sent: BTreeMap::new(),
                lives: BTreeMap::new(),
                dead: BTreeSet::new(),
                keep,
                calm: false,
                needs,
                pointed: BTreeMap::new(),
                broken: None,
                log: Vec::new(),
            }),
            turn: Condvar::new(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn crash_after(&self, actor: usize, requests: u64) {
        self.lock().lives.insert(actor, requests);
    }

    pub fn crashed(&self, actor: usize) -> bool {
        self.lock().dead.contains(&actor)
    }

    pub fn finish(&self, actor: usize) {
        let mut state = self.lock();
        state.running.remove(&actor);
        state.choose();
        self.turn.notify_all();
    }

    /// For what comes after the actors: nobody crashes any more, nobody waits for a turn.
    pub fn survive(&self) {
        let mut state = self.lock();
        state.lives.clear();
        state.dead.clear();
        state.running = BTreeSet::from([0]);
        state.calm = true;
    }

    pub fn sleep_for_long(&self) {
        self.lock().now += 2 * 300_000;
    }

    /// One step of an actor. Of one that dies at it, half of the requests still take effect.
    fn step<T>(
        &self,
        actor: usize,
        what: &str,
        is_request: bool,
        operation: impl FnOnce(&mut State) -> T,
    ) -> Result<T> {
        let mut state = self.lock();
        state.running.remove(&actor);
        state.waiting.insert(actor, is_request);
        let now = state.now;
        state.sent.insert(actor, now);
        state.choose();
        self.turn.notify_all();
        while state.granted != Some(actor) {
            state = self
                .turn
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.granted = None;
        state.waiting.remove(&actor);
        state.running.insert(actor);
        let mut operation = Some(operation);
        if is_request && !state.dead.contains(&actor) {
            if let Some(lives) = state.lives.get_mut(&actor) {
                if *lives == 0 {
                    state.dead.insert(actor);
                    if state.rng.below(2) == 0 {
                        state.log(actor, what, " and dies");
                        operation.take().map(|operation| operation(&mut state));
                        state.check(what);
                    }
                } else {
                    *lives -= 1;
                }
            }
        }
        let Some(operation) = operation.filter(|_| !is_request || !state.dead.contains(&actor))
        else {
            return Err(Error::Io {
                what: "the power is off".to_owned(),
                error: std::io::ErrorKind::Other.into(),
            });
        };
        if is_request {
            state.log(actor, what, "");
        }
        let result = operation(&mut state);
        state.check(what);
        Ok(result)
    }

    pub fn broken(&self) -> Option<String> {
        self.lock().broken.clone()
    }

    pub fn check_broken(&self, seed: u64) {
        let state = self.lock();
        if let Some(broken) = &state.broken {
            let log = state.log.join("\n");
            panic!("seed {seed} (MODEL_SEED={seed} runs it alone): {broken}\n{log}");
        }
    }

    /// The image of a generation in the history.
    pub fn generation(&self, channel: &str, generation: u64) -> Option<ImageId> {
        self.lock().released(channel, generation)
    }

    /// There is just what channels and pins need.
    pub fn check_exact(&self, seed: u64) {
        let state = self.lock();
        let mut needed: BTreeSet<&String> = BTreeSet::new();
        for (_, image) in state.live(true) {
            // One that was not complete may have been removed before.
            let needs = &state.needs[&image];
            if needs.iter().all(|path| state.objects.contains_key(path)) {
                needed.extend(needs);
            }
        }
        let kept = ["images/", "packs/"];
        let there: BTreeSet<&String> = state
            .objects
            .keys()
            .filter(|path| kept.iter().any(|kept| path.starts_with(kept)))
            .collect();
        assert_eq!(there, needed, "seed {seed}");
        let leases = state.objects.keys().any(|path| path.starts_with("leases/"));
        assert!(!leases, "seed {seed}: a lease is left");
    }
}

impl State {
    /// Chooses who goes on, when all wait.
    fn choose(&mut self) {
        if !self.running.is_empty() || self.granted.is_some() || self.waiting.is_empty() {
            return;
        }
        self.pass_time();
        let index = self.rng.below(self.waiting.len() as u64) as usize;
        self.granted = self.waiting.keys().nth(index).copied();
    }

    /// Time goes on, sometimes by much, but no request takes for ever.
    fn pass_time(&mut self) {
        let much = match self.rng.below(16) {
            _ if self.calm => 50,
            0 => 400_000,
            1..4 => 60_000,
            _ => 50,
        };
        let by = self.rng.below(much);
        self.advance(by);
    }

    fn advance(&mut self, by: u64) {
        let requests = self
            .waiting
            .iter()
            .filter(|(actor, is_request)| **is_request && !self.dead.contains(*actor));
        let earliest = requests.filter_map(|(actor, _)| self.sent.get(actor)).min();
        let limit = earliest.map_or(u64::MAX, |sent| sent + REQUEST);
        self.now = (self.now + by).min(limit).max(self.now);
    }

    fn log(&mut self, actor: usize, what: &str, then: &str) {
        let now = self.now;
        self.log.push(format!("{now} actor {actor}: {what}{then}"));
    }

    /// What must be complete: why, and the image; with `begun`, also the generations that no pointer ever had, for their
    /// publishers lost a race or died. A collector cannot tell these from others.
    fn live(&self, begun: bool) -> Vec<(String, ImageId)> {
        let mut live = Vec::new();
        for (channel, pointed) in &self.pointed {
            let Some((&current, _)) = pointed.last_key_value() else {
                continue;
            };
            let directory = format!("releases/{channel}/");
            let mut history: Vec<u64> = self
                .objects
                .keys()
                .filter_map(|path| path.strip_prefix(&directory)?.parse().ok())
                .filter(|generation| *generation <= current)
                .collect();
            history.sort_unstable();
            for generation in history.iter().rev().take(self.keep as usize) {
                let image = match pointed.get(generation) {
                    None if begun => self.released(channel, *generation),
                    image => image.copied(),
                };
                live.extend(image.map(|i| (format!("{channel} generation {generation}"), i)));
            }
        }
        for (path, (bytes, _)) in &self.objects {
            let image = path
                .strip_prefix("pins/")
                .and_then(|_| std::str::from_utf8(bytes).ok()?.split_once("image "))
                .and_then(|(_, rest)| rest.lines().next()?.parse().ok());
            if let Some(image) = image {
                live.push((path.clone(), image));
            }
        }
        live
    }

    fn released(&self, channel: &str, generation: u64) -> Option<ImageId> {
        let path = format!("releases/{channel}/{generation}");
        let (bytes, _) = self.objects.get(&path)?;
        let parsed = SignedRelease::parse(bytes, &channel.parse().ok()?, "model").ok()?;
        Some(parsed.release().image)
    }

    fn check(&mut self, what: &str) {
        if self.broken.is_some() {
            return;
        }
        for (why, image) in self.live(false) {
            let missing = self.needs[&image]
                .iter()
                .find(|path| !self.objects.contains_key(*path));
            if let Some(missing) = missing {
                self.broken = Some(format!("after \"{what}\", {why} lacks {missing}"));
                return;
            }
        }
    }
}

/// The model's time, as an actor sees it.
#[derive(Debug)]
pub struct ModelClock {
    world: Arc<World>,
    actor: usize,
}

impl ModelClock {
    pub fn new(world: &Arc<World>, actor: usize) -> Self {
        ModelClock {
            world: Arc::clone(world),
            actor,
        }
    }
}

impl Clock for ModelClock {
    fn now(&self) -> Duration {
        let now = self
            .world
            .step(self.actor, "clock", false, |state| state.now);
        Duration::from_millis(now.unwrap_or_default())
    }

    fn unix(&self) -> u64 {
        self.now().as_secs()
    }

    fn sleep(&self, time: Duration, _: &CancelToken) -> Result<()> {
        let by = u64::try_from(time.as_millis()).unwrap_or(0);
        self.world
            .step(self.actor, "sleep", false, |state| state.advance(by))
    }
}

/// The store, as an actor sees it.
#[derive(Debug)]
pub struct ModelStore {
    world: Arc<World>,
    actor: usize,
}

impl ModelStore {
    pub fn new(world: &Arc<World>, actor: usize) -> Self {
        ModelStore {
            world: Arc::clone(world),
            actor,
        }
    }

    fn step<T>(&self, what: String, operation: impl FnOnce(&mut State) -> T) -> Result<T> {
        self.world.step(self.actor, &what, true, operation)
    }

    fn content(&self, object: &ObjectName) -> Result<Vec<u8>> {
        let path = object.path();
        let found = self.step(format!("get {path}"), |state| {
            state.objects.get(&path).map(|(bytes, _)| bytes.clone())
        })?;
        found.ok_or_else(|| Error::NotFound {
            location: "model".to_owned(),
            object: object.to_string(),
        })
    }

    fn paths(&self, directory: &str) -> Result<Vec<(String, u64, u64)>> {
        let start = format!("{directory}/");
        self.step(format!("list {directory}"), |state| {
            let all = state.objects.iter();
            all.filter(|(path, _)| path.starts_with(&start))
                .map(|(path, (bytes, time))| (path.clone(), bytes.len() as u64, *time))
                .collect()
        })
    }

    fn write(&self, path: String, bytes: &[u8]) -> Result<()> {
        self.step(format!("write {path}"), |state| {
            let now = state.now;
            state.objects.insert(path, (bytes.to_vec(), now));
        })
    }

    fn delete(&self, path: String) -> Result<()> {
        self.step(format!("remove {path}"), |state| {
            state.objects.remove(&path);
        })
    }
}

impl Store for ModelStore {
    fn location(&self) -> &str {
        "model"
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        let bytes = self.content(object)?;
        assert!(bytes.len() as u64 <= limit);
        Ok(bytes)
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        let bytes = self.content(object)?;
        Ok(bytes[range.start as usize..range.end as usize].to_vec())
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        let mut bytes = self.content(object)?;
        bytes.truncate(len as usize);
        Ok(bytes)
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        let path = object.path();
        self.step(format!("size {path}"), |state| {
            let found = state.objects.get(&path);
            found.map(|(bytes, _)| bytes.len() as u64)
        })
    }

    fn put(&self, object: &ObjectName, bytes: &[u8]) -> Result<Put> {
        let path = object.path();
        self.step(format!("put {path}"), |state| {
            if state.objects.contains_key(&path) {
                return Put::AlreadyThere;
            }
            let now = state.now;
            state.objects.insert(path.clone(), (bytes.to_vec(), now));
            Put::Created
        })
    }

    fn images(&self) -> Result<Vec<ImageId>> {
        unreachable!("nobody asks for it here")
    }

    fn channels(&self) -> Result<Vec<ChannelName>> {
        let paths = self.paths("channels")?;
        let name = |(path, _, _): &(String, u64, u64)| path.strip_prefix("channels/")?.parse().ok();
        Ok(paths.iter().filter_map(name).collect())
    }

    fn releases(&self, channel: &ChannelName) -> Result<Vec<u64>> {
        let directory = format!("releases/{channel}");
        let paths = self.paths(&directory)?;
        let number = |path: &str| path.rsplit_once('/')?.1.parse().ok();
        let mut all: Vec<u64> = paths
            .iter()
            .filter_map(|(path, _, _)| number(path))
            .collect();
        all.sort_unstable();
        Ok(all)
    }

    fn read_pointer(&self, channel: &ChannelName) -> Result<Option<(SignedRelease, Revision)>> {
        let path = channel.path();
        let found = self.step(format!("get {path}"), |state| {
            state.objects.get(&path).cloned()
        })?;
        let Some((bytes, _)) = found else {
            return Ok(None);
        };
        let parsed = SignedRelease::parse(&bytes, channel, "model")?;
        Ok(Some((parsed, Revision::of(&bytes))))
    }

    fn swap_pointer(
        &self,
        expected: Option<&Revision>,
        pointer: &SignedRelease,
    ) -> Result<Revision> {
        let release = pointer.release().clone();
        let bytes = pointer.encode().into_bytes();
        let revision = Revision::of(&bytes);
        let path = release.channel.path();
        let what = format!("point {path} to {}", release.generation);
        let moved = self.step(what, |state| {
            let current = state
                .objects
                .get(&path)
                .map(|(bytes, _)| Revision::of(bytes));
            if current.as_ref() != expected {
                return false;
            }
            let now = state.now;
            state.objects.insert(path.clone(), (bytes, now));
            let pointed = state.pointed.entry(release.channel.to_string());
            pointed
                .or_default()
                .insert(release.generation, release.image);
            true
        })?;
        if moved {
            return Ok(revision);
        }
        Err(Error::Conflict {
            location: "model".to_owned(),
            channel: release.channel,
            now: "elsewhere".to_owned(),
        })
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn list(&self, kind: ObjectKind) -> Result<Vec<Listed>> {
        let paths = self.paths(kind.directory())?;
        let listed = |(path, len, modified): &(String, u64, u64)| {
            let object = ObjectName::from_path(path)?;
            let (len, modified) = (*len, *modified);
            Some(Listed {
                object,
                len,
                modified,
            })
        };
        Ok(paths.iter().filter_map(listed).collect())
    }

    fn remove(&self, object: &ObjectName) -> Result<()> {
        self.delete(object.path())
    }

    fn notes(&self, kind: NoteKind) -> Result<Vec<Noted>> {
        let start = format!("{}/", kind.directory());
        let paths = self.paths(kind.directory())?;
        let noted = |(path, _, modified): &(String, u64, u64)| {
            let name = NoteName::new(kind, path.strip_prefix(&start)?).ok()?;
            let modified = *modified;
            Some(Noted { name, modified })
        };
        Ok(paths.iter().filter_map(noted).collect())
    }

    fn read_note(&self, name: &NoteName) -> Result<Option<Vec<u8>>> {
        let path = name.path();
        self.step(format!("get {path}"), |state| {
            state.objects.get(&path).map(|(bytes, _)| bytes.clone())
        })
    }

    fn write_note(&self, name: &NoteName, bytes: &[u8]) -> Result<()> {
        self.write(name.path(), bytes)
    }

    fn remove_note(&self, name: &NoteName) -> Result<()> {
        self.delete(name.path())
    }
}
