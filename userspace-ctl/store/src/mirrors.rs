// SPDX-License-Identifier: GPL-2.0

//! Several stores with the same images as one: what one does not serve, the next one does.
//!
//! They are asked in the order in which they were given. One that fails (it is down, trickles, sends errors or what makes
//! no sense) is left alone for a while, which doubles with each failure, and asked again then: it comes back by itself.
//! What does not fit a digest is found out above a store, which then says so ([`Store::was_wrong`]), and the next attempt
//! goes elsewhere. Only reading goes over several stores.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use pristine_image::ImageId;

use crate::error::{Error, Result};
use crate::object::{ChannelName, ObjectName};
use crate::peers::PeerList;
use crate::release::SignedRelease;
use crate::retry::RetryPolicy;
use crate::store::{Revision, Store, Traffic};

/// How long a store that failed is left alone.
const BACKOFF: RetryPolicy = RetryPolicy {
    attempts: u32::MAX,
    first_delay: Duration::from_secs(1),
    max_delay: Duration::from_secs(60),
};

/// How one of the stores does.
#[derive(Debug, Default)]
struct Health {
    /// Failures since it last served.
    failures: u32,
    /// It is not to be asked before, unless no other one serves.
    not_before: Option<Instant>,
    /// When that was last found out.
    failed_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct State {
    health: Vec<Health>,
    /// Which one served each thread last: what a thread got it verifies before it asks for more.
    last: HashMap<ThreadId, usize>,
}

/// Called with the location of a store that failed, and how.
pub type Told = Arc<dyn Fn(&str, &Error) + Send + Sync>;

/// Several stores, the preferred one first.
pub struct Mirrors {
    stores: Vec<Arc<dyn Store>>,
    state: Mutex<State>,
    location: String,
    backoff: RetryPolicy,
    told: Told,
}

impl std::fmt::Debug for Mirrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mirrors").field(&self.stores).finish()
    }
}

impl Mirrors {
    /// All of `stores` as one; `told` hears of each failure.
    pub fn new(stores: Vec<Arc<dyn Store>>, told: Told) -> Self {
        let locations: Vec<&str> = stores.iter().map(|store| store.location()).collect();
        Mirrors {
            location: locations.join(", "),
            state: Mutex::new(State {
                health: stores.iter().map(|_| Health::default()).collect(),
                last: HashMap::new(),
            }),
            stores,
            backoff: BACKOFF,
            told,
        }
    }

    /// With another time to leave failing stores alone.
    #[must_use]
    pub fn with_backoff(self, backoff: RetryPolicy) -> Self {
        Mirrors { backoff, ..self }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stores to ask, in order: those that serve, as far as is known, and then the others, which have to do if none does.
    fn order(&self) -> Vec<usize> {
        let now = Instant::now();
        let mut state = self.lock();
        let (mut order, mut failing) = (Vec::new(), Vec::new());
        for (index, health) in state.health.iter_mut().enumerate() {
            match health.not_before {
                Some(time) if time > now => failing.push((time, index)),
                Some(_) => {
                    // This caller finds out whether it serves again; others go on with the next one meanwhile.
                    health.not_before = Some(now + self.backoff.first_delay);
                    order.push(index);
                }
                None => order.push(index),
            }
        }
        failing.sort_unstable();
        order.extend(failing.into_iter().map(|(_, index)| index));
        order
    }

    /// A store has answered what it was asked at `begin`.
    fn served(&self, index: usize, begin: Instant) {
        let mut state = self.lock();
        state.last.insert(std::thread::current().id(), index);
        if let Some(health) = state.health.get_mut(index) {
            // What one that lies answers to those who asked before it was found out does not make it good again.
            if health.failed_at.is_none_or(|time| begin >= time) {
                *health = Health::default();
            }
        }
    }

    /// A store has failed at what it was asked at `begin`. Threads that fail together are one failure, which is told once.
    fn failed(&self, index: usize, begin: Instant, error: &Error) {
        let mut state = self.lock();
        let Some(health) = state.health.get_mut(index) else {
            return;
        };
        let is_new = health.failed_at.is_none_or(|time| begin >= time);
        if is_new {
            health.failures = health.failures.saturating_add(1);
        }
        let now = Instant::now();
        health.failed_at = Some(now);
        health.not_before = Some(now + self.backoff.delay(health.failures));
        drop(state);
        if let Some(store) = self.stores.get(index).filter(|_| is_new) {
            (self.told)(store.location(), error);
        }
    }

    /// Asks one store after the other until one answers.
    fn ask<T>(&self, ask: impl Fn(&dyn Store) -> Result<T>) -> Result<T> {
        let mut missing = None;
        let mut failed = None;
        // Before it is known who is well, so that no failure comes between.
        let begin = Instant::now();
        for index in self.order() {
            let Some(store) = self.stores.get(index) else {
                continue;
            };
            match ask(store.as_ref()) {
                Ok(answer) => {
                    self.served(index, begin);
                    return Ok(answer);
                }
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                // It serves, but lacks this: a mirror that is behind.
                Err(error @ (Error::NotFound { .. } | Error::NoImage { .. })) => {
                    missing.get_or_insert(error);
                }
                Err(error) => {
                    self.failed(index, begin, &error);
                    failed.get_or_insert(error);
                }
            }
        }
        // It may be in a store that failed.
        Err(failed.or(missing).unwrap_or_else(|| Error::Unreachable {
            location: self.location.clone(),
            why: "there is no store".to_owned(),
        }))
    }
}

impl Store for Mirrors {
    fn location(&self) -> &str {
        &self.location
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        self.ask(|store| store.get(object, limit))
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        self.ask(|store| store.get_range(object, range.clone()))
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        self.ask(|store| store.get_start(object, len))
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        let found = self.ask(|store| match store.size(object)? {
            Some(size) => Ok(size),
            None => Err(Error::NotFound {
                location: store.location().to_owned(),
                object: object.to_string(),
            }),
        });
        match found {
            Ok(size) => Ok(Some(size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn images(&self) -> Result<Vec<ImageId>> {
        self.ask(|store| store.images())
    }

    fn channels(&self) -> Result<Vec<ChannelName>> {
        self.ask(|store| store.channels())
    }

    fn releases(&self, channel: &ChannelName) -> Result<Vec<u64>> {
        self.ask(|store| store.releases(channel))
    }

    fn read_pointer(&self, channel: &ChannelName) -> Result<Option<(SignedRelease, Revision)>> {
        let found = self.ask(|store| {
            let found = store.read_pointer(channel)?;
            found.ok_or_else(|| Error::NotFound {
                location: store.location().to_owned(),
                object: format!("channel {channel}"),
            })
        });
        match found {
            Ok(found) => Ok(Some(found)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn peers(&self, image: &ImageId, port: Option<u16>) -> Result<PeerList> {
        // One that introduces nobody serves nevertheless, so this says nothing about how it does.
        let mut failed = None;
        for store in &self.stores {
            match store.peers(image, port) {
                Ok(list) => return Ok(list),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| self.unsupported("introduce peers".to_owned())))
    }

    fn traffic(&self) -> Traffic {
        let traffic = self.stores.iter().map(|store| store.traffic());
        traffic.fold(Traffic::default(), |sum, one| Traffic {
            requests: sum.requests + one.requests,
            bytes: sum.bytes + one.bytes,
        })
    }

    fn was_wrong(&self, error: &Error) -> bool {
        let last = self.lock().last.get(&std::thread::current().id()).copied();
        let Some(last) = last else {
            return false;
        };
        self.failed(last, Instant::now(), error);
        self.lock().health.iter().any(|h| h.failures == 0)
    }
}
