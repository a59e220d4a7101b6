// SPDX-License-Identifier: GPL-2.0

//! Leases: how those who write to a store and those who remove from it keep out of each other's way.
//!
//! A writer relies on what it finds in the store: a pack that is there is not sent again, and a channel is moved to an
//! image because it is there. A collector removes what nobody needs. Each of both announces itself by a note of its
//! own in `leases/` *before* it looks at anything, and takes it away when it is done:
//!
//! - A writer (`write-…`) writes its lease, and then lists the leases. It waits while there is one of a collector.
//! - A collector (`gc-…`) writes its lease, and then lists the leases. If there is any other, it gives up.
//!
//! Each lists after it wrote, so of a writer and a collector at least one sees the other, and no writer looks while a
//! collector removes. Two collectors may both give up.
//!
//! A lease is renewed while its holder lives, and one that is older than its time (five minutes) is of a holder that
//! died. A holder that was held up for half of that time stops, instead of renewing it, for others may have taken it
//! for dead. Ages are told by the store's clock alone; that of the holder only measures how long it was held up.

use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::note::{self, NoteKind, NoteName, Noted};
use crate::retry::CancelToken;
use crate::store::Store;

const WRITER: &str = "write-";
const COLLECTOR: &str = "gc-";

/// Time, as far as leases need it.
pub trait Clock: Debug + Send + Sync {
    /// Time since some moment in the past; it goes on while the machine sleeps.
    fn now(&self) -> Duration;

    /// Seconds since 1970.
    fn unix(&self) -> u64;

    /// Waits.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    fn sleep(&self, time: Duration, cancel: &CancelToken) -> Result<()>;
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
        Duration::new(seconds, nanoseconds)
    }

    fn unix(&self) -> u64 {
        pristine_trust::now()
    }

    fn sleep(&self, time: Duration, cancel: &CancelToken) -> Result<()> {
        cancel.sleep(time)
    }
}

/// How leases are taken.
#[derive(Clone, Debug)]
pub struct LeaseOptions {
    /// How old a lease may get before its holder counts as dead; the same for all who use a store. Default 5 minutes.
    pub time: Duration,
    /// How often a writer looks whether a collector is done. Default 2 s.
    pub poll: Duration,
    /// Whether a thread renews the lease; otherwise [`Lease::keep`] alone does. Default true.
    pub heartbeat: bool,
    /// Default [`SystemClock`].
    pub clock: Arc<dyn Clock>,
}

impl Default for LeaseOptions {
    fn default() -> Self {
        LeaseOptions {
            time: Duration::from_secs(300),
            poll: Duration::from_secs(2),
            heartbeat: true,
            clock: Arc::new(SystemClock),
        }
    }
}

/// A lease; it is given back when this is dropped.
#[derive(Debug)]
pub struct Lease {
    held: Arc<Held>,
    /// When it was taken, in milliseconds since 1970 by the store's clock.
    since: u64,
    /// Ends the thread that renews it.
    heartbeat: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

#[derive(Debug)]
struct Held {
    store: Arc<dyn Store>,
    /// `None` for a store that has no leases: nobody can remove from it either.
    name: Option<NoteName>,
    text: Vec<u8>,
    options: LeaseOptions,
    /// When it was last renewed, by the holder's clock; `None` once it was too late for that.
    renewed: Mutex<Option<Duration>>,
}

impl Lease {
    /// A writer's lease, for `purpose` ("publish"). Waits until no collector is at work; `waiting` is told why, each
    /// time it looked.
    ///
    /// # Errors
    /// [`Error::Cancelled`], and what can go wrong with the store.
    pub fn write(
        store: &Arc<dyn Store>,
        purpose: &str,
        options: &LeaseOptions,
        cancel: &CancelToken,
        waiting: &dyn Fn(&str),
    ) -> Result<Self> {
        let lease = match Lease::new(store, WRITER, purpose, options) {
            Err(Error::Unsupported { .. }) => {
                return Ok(Lease::none(store, options));
            }
            lease => lease?,
        };
        loop {
            let others = lease.held.others()?.1;
            let collector = others.iter().find(|other| is(other, COLLECTOR));
            let Some(collector) = collector else {
                return lease.beat();
            };
            waiting(&describe(store.as_ref(), &collector.name));
            options.clock.sleep(options.poll, cancel)?;
            lease.keep()?;
        }
    }

    /// A collector's lease.
    ///
    /// # Errors
    /// [`Error::InUse`] if anybody else has a lease; what can go wrong with the store.
    pub fn collect(store: &Arc<dyn Store>, options: &LeaseOptions) -> Result<Self> {
        let lease = Lease::new(store, COLLECTOR, "gc", options)?;
        let (_, others) = lease.held.others()?;
        if let Some(other) = others.first() {
            return Err(Error::InUse {
                location: store.location().to_owned(),
                who: describe(store.as_ref(), &other.name),
            });
        }
        lease.beat()
    }

    fn new(
        store: &Arc<dyn Store>,
        kind: &str,
        purpose: &str,
        options: &LeaseOptions,
    ) -> Result<Self> {
        let name = NoteName::new(NoteKind::Lease, &format!("{kind}{}", nonce()));
        // A nonce has the characters of a name.
        let name =
            name.map_err(|error| Error::io("cannot name a lease", std::io::Error::other(error)))?;
        let text = note::encode(
            NoteKind::Lease,
            &[("purpose", purpose.to_owned()), ("holder", holder())],
        );
        let before = options.clock.now();
        // From here on it is given back when this fails.
        let mut lease = Lease {
            held: Arc::new(Held {
                store: Arc::clone(store),
                name: Some(name.clone()),
                text,
                options: options.clone(),
                renewed: Mutex::new(Some(before)),
            }),
            since: 0,
            heartbeat: None,
        };
        store.write_note(&name, &lease.held.text)?;
        lease.since = lease.held.others()?.0;
        Ok(lease)
    }

    fn none(store: &Arc<dyn Store>, options: &LeaseOptions) -> Self {
        Lease {
            held: Arc::new(Held {
                store: Arc::clone(store),
                name: None,
                text: Vec::new(),
                options: options.clone(),
                renewed: Mutex::new(None),
            }),
            since: 0,
            heartbeat: None,
        }
    }

    /// Lets a thread renew it.
    fn beat(mut self) -> Result<Self> {
        if self.held.options.heartbeat {
            let (stop, stopped) = mpsc::channel();
            let held = Arc::clone(&self.held);
            let beat = move || {
                let pause = held.options.time / 8;
                // An error shows when the holder looks; the next beat may go through before that.
                while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                    let _ = held.keep();
                }
            };
            let spawned = std::thread::Builder::new()
                .name("pristine-lease".to_owned())
                .spawn(beat);
            let thread = spawned.map_err(|error| Error::io("cannot start a thread", error))?;
            self.heartbeat = Some((stop, thread));
        }
        Ok(self)
    }

    /// When it was taken, in milliseconds since 1970 by the store's clock; 0 if the store has no leases.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Makes sure that the lease still holds, for some time from now on; to be called before each change.
    ///
    /// # Errors
    /// [`Error::LeaseLost`] if it was not renewed for too long; what can go wrong on renewing it.
    pub fn keep(&self) -> Result<()> {
        self.held.keep()
    }
}

impl Held {
    fn keep(&self) -> Result<()> {
        let Some(name) = &self.name else {
            return Ok(());
        };
        let mut renewed = self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.options.clock.now();
        let age = renewed.map(|renewed| now.saturating_sub(renewed));
        match age {
            Some(age) if age < self.options.time / 10 => Ok(()),
            Some(age) if age < self.options.time / 2 => {
                self.store.write_note(name, &self.text)?;
                *renewed = Some(now);
                Ok(())
            }
            _ => {
                *renewed = None;
                Err(Error::LeaseLost {
                    location: self.store.location().to_owned(),
                    why: "this program was held up for minutes".to_owned(),
                })
            }
        }
    }

    /// The time of this lease, and the others that are not of the dead.
    fn others(&self) -> Result<(u64, Vec<Noted>)> {
        let leases = self.store.notes(NoteKind::Lease)?;
        let mine = leases
            .iter()
            .find(|noted| Some(&noted.name) == self.name.as_ref());
        let mine = mine.ok_or_else(|| Error::LeaseLost {
            location: self.store.location().to_owned(),
            why: "it is not there any more".to_owned(),
        })?;
        let now = mine.modified;
        let time = u64::try_from(self.options.time.as_millis()).unwrap_or(u64::MAX);
        let fresh = |noted: &&Noted| noted.modified.saturating_add(time) > now;
        let others = leases
            .iter()
            .filter(|noted| Some(&noted.name) != self.name.as_ref());
        Ok((now, others.filter(fresh).cloned().collect()))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.heartbeat.take() {
            drop(stop);
            // It ends at once, or with its request.
            let _ = thread.join();
        }
        if let Some(name) = &self.held.name {
            // One that stays becomes old.
            let _ = self.held.store.remove_note(name);
        }
    }
}

/// Leases in a store whose holders died, by their age in comparison with a lease that was just taken.
pub(crate) fn dead(store: &dyn Store, lease: &Lease) -> Result<Vec<NoteName>> {
    let leases = store.notes(NoteKind::Lease)?;
    let time = lease.held.options.time.as_millis();
    let time = u64::try_from(time).unwrap_or(u64::MAX);
    let old = |noted: &Noted| noted.modified.saturating_add(time) <= lease.since;
    let dead = leases.into_iter().filter(old);
    Ok(dead.map(|noted| noted.name).collect())
}

/// Those who write to a store right now, in words; of no use but to tell people.
///
/// # Errors
/// What can go wrong with the store.
pub fn holders(store: &dyn Store) -> Result<Vec<String>> {
    let leases = store.notes(NoteKind::Lease)?;
    Ok(leases
        .iter()
        .map(|noted| describe(store, &noted.name))
        .collect())
}

fn is(noted: &Noted, kind: &str) -> bool {
    noted.name.name().starts_with(kind)
}

/// Who holds a lease, and for what.
fn describe(store: &dyn Store, name: &NoteName) -> String {
    let bytes = store.read_note(name).ok().flatten().unwrap_or_default();
    let field = |key| note::field(NoteKind::Lease, &bytes, key).unwrap_or("?");
    format!("{} by {}", field("purpose"), field("holder"))
}

/// Who this is, for people.
fn holder() -> String {
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy().into_owned();
    format!("process {} on {host}", std::process::id())
}

/// A name that nobody else has.
pub(crate) fn nonce() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    // RandomState is seeded by the system, and differs for each one made.
    let random = RandomState::new().hash_one(std::process::id());
    format!("{}-{random:016x}", now.as_secs())
}
