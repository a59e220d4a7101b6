// SPDX-License-Identifier: GPL-2.0

//! The stores that an image is read from, in order of preference, and how they do.
//!
//! A source that fails is left alone for a while, which doubles with each failure, and another is asked meanwhile.
//! One that is slow to fail (it hangs, it trickles) must not cost a reader its patience again and again: while another
//! source serves, it is tried in the background only.

use std::net::ToSocketAddrs;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pristine_image::ImageId;
use pristine_store::{
    open_store_with, Error, HttpOptions, ImageReader, ImageSelector, Keyring, ObjectName,
    RetryPolicy, SealedStore, Store, Traffic,
};

use crate::stop::Stop;

/// Waits between attempts.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// After a failure of the network: exponential, with a random part.
    pub network: RetryPolicy,
    /// After wrong content, which seldom gets right in a second.
    pub corrupt: RetryPolicy,
}

impl Default for Backoff {
    fn default() -> Self {
        let policy = |first: u64, max: u64| RetryPolicy {
            attempts: u32::MAX,
            first_delay: Duration::from_millis(first),
            max_delay: Duration::from_millis(max),
        };
        Self {
            network: policy(200, 15_000),
            corrupt: policy(1_000, 60_000),
        }
    }
}

/// How a source does.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Failures since it last served.
    pub failures: u32,
    /// Failures in all.
    pub failed: u64,
    /// What it failed with last, also when it serves again.
    pub error: Option<String>,
    /// Not to be asked before.
    not_before: Option<Instant>,
    /// What it was too slow with, to be asked for again in the background.
    slow: Option<(ObjectName, Range<u64>)>,
    /// Bytes per second of late, 0 if that is not known.
    rate: u64,
}

/// A store.
#[derive(Debug)]
pub struct Source {
    location: String,
    options: HttpOptions,
    /// What opens encrypted images.
    keyring: Option<Arc<Keyring>>,
    store: Mutex<Option<Arc<dyn Store>>>,
    /// The manifest of the image that was read last, as this store has it.
    layout: Mutex<Option<Arc<ImageReader>>>,
    health: Mutex<Health>,
}

/// A lock whose content is whole whatever a thread that died had in mind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Source {
    /// The store at a URL or in a directory; it is not contacted yet. A directory that is no store, and a URL that is
    /// none, are told now.
    ///
    /// # Errors
    ///
    /// As [`open_store_with`].
    pub fn new(
        location: &str,
        options: HttpOptions,
        keyring: Option<Arc<Keyring>>,
    ) -> Result<Self, Error> {
        let store = decrypting(
            open_store_with(location, options.clone())?,
            keyring.as_ref(),
        );
        // A directory is open now. The addresses of a server are looked up when it is first asked.
        let directory = !location.contains("://") || location.starts_with("file://");
        Ok(Self {
            location: location.to_owned(),
            options,
            keyring,
            store: Mutex::new(directory.then_some(store)),
            layout: Mutex::default(),
            health: Mutex::default(),
        })
    }

    /// An open store.
    pub fn from_store(store: Arc<dyn Store>) -> Self {
        Self {
            location: store.location().to_owned(),
            options: HttpOptions::default(),
            keyring: None,
            store: Mutex::new(Some(store)),
            layout: Mutex::default(),
            health: Mutex::default(),
        }
    }

    /// Its URL or directory.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// The open store. A server's addresses are looked up once, and never again: the resolver's files may lie on the
    /// very device that is served.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] if the name cannot be looked up.
    pub fn store(&self) -> Result<Arc<dyn Store>, Error> {
        let mut store = lock(&self.store);
        if let Some(store) = store.as_ref() {
            return Ok(Arc::clone(store));
        }
        let mut options = self.options.clone();
        if let Some(target) = host_and_port(&self.location) {
            let found = target.to_socket_addrs().map_err(|e| Error::Unreachable {
                location: self.location.clone(),
                why: format!("cannot look up {target}: {e}"),
            })?;
            options.addresses = found.collect();
        }
        let opened = open_store_with(&self.location, options)?;
        let opened = decrypting(opened, self.keyring.as_ref());
        *store = Some(Arc::clone(&opened));
        Ok(opened)
    }

    /// The store as the packs of an image are read from it, which may be encrypted.
    ///
    /// # Errors
    ///
    /// As [`Source::store`], and what can go wrong on the way to the image's key.
    pub fn packs_of(&self, image: &ImageId) -> Result<Arc<dyn Store>, Error> {
        let store = self.store()?;
        Ok(store.view_of(image)?.unwrap_or(store))
    }

    /// What was read from it.
    pub fn traffic(&self) -> Traffic {
        let store = lock(&self.store);
        store.as_ref().map(|s| s.traffic()).unwrap_or_default()
    }

    /// The image's manifest as this store has it, if it was read.
    pub fn layout(&self, image: ImageId) -> Option<Arc<ImageReader>> {
        // It may be another's: that of the generation that the device had before.
        lock(&self.layout).clone().filter(|l| l.image() == image)
    }

    /// The manifest as this store has it; one attempt to read it, by one thread.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::open`].
    pub fn open_layout(&self, image: ImageId, stop: &Stop) -> Result<Arc<ImageReader>, Error> {
        let store = self.store()?;
        let mut layout = lock(&self.layout);
        if let Some(layout) = layout.as_ref().filter(|l| l.image() == image) {
            return Ok(Arc::clone(layout));
        }
        let selector = ImageSelector::Id(image);
        let reader = ImageReader::open(store, &selector, RetryPolicy::once(), stop.token())?;
        let reader = Arc::new(reader);
        *layout = Some(Arc::clone(&reader));
        Ok(reader)
    }

    /// How it does.
    pub fn health(&self) -> Health {
        lock(&self.health).clone()
    }

    /// Bytes per second that it served of late; `None` if that is not known.
    pub fn rate(&self) -> Option<u64> {
        Some(lock(&self.health).rate).filter(|rate| *rate > 0)
    }

    /// It sent `bytes` in `time`.
    pub fn measured(&self, bytes: u64, time: Duration) {
        let mut health = lock(&self.health);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
        let rate = bytes.saturating_mul(1_000_000) / micros;
        health.rate = match health.rate {
            0 => rate,
            old => old / 4 * 3 + rate / 4,
        };
    }

    /// It served, and what it sent was right. Whether it had failed before.
    pub fn serves(&self) -> bool {
        let mut health = lock(&self.health);
        let had_failed = health.failures > 0;
        health.failures = 0;
        health.not_before = None;
        health.slow = None;
        had_failed
    }

    /// It failed; gives for how long it is left alone.
    pub fn failed(&self, error: &Error, backoff: &Backoff) -> Duration {
        let mut health = lock(&self.health);
        health.failures = health.failures.saturating_add(1);
        health.failed += 1;
        health.error = Some(error.to_string());
        let policy = match error.is_corruption() {
            true => &backoff.corrupt,
            false => &backoff.network,
        };
        let delay = policy.delay(health.failures);
        health.not_before = Some(Instant::now() + delay);
        delay
    }

    /// Notes what it was too slow with.
    pub fn was_slow(&self, object: ObjectName, range: Range<u64>) {
        lock(&self.health).slow = Some((object, range));
    }

    /// When it may be asked again; `None` for now.
    pub fn not_before(&self) -> Option<Instant> {
        lock(&self.health)
            .not_before
            .filter(|t| *t > Instant::now())
    }

    /// Whether it may be asked now: it serves, or this caller is the one that finds out whether it does again.
    pub fn may_ask(&self, backoff: &Backoff) -> bool {
        let mut health = lock(&self.health);
        match health.not_before {
            None => true,
            Some(time) if time > Instant::now() => false,
            Some(_) => {
                // Others wait for what this one finds.
                health.not_before = Some(Instant::now() + backoff.network.delay(1));
                true
            }
        }
    }

    /// Whether it failed by being slow, and may be slow again.
    pub fn is_slow(&self) -> bool {
        lock(&self.health).slow.is_some()
    }

    /// Asks again for what it was too slow with, if it is time. Whether it serves now.
    pub fn probe(&self, backoff: &Backoff) -> bool {
        if self.not_before().is_some() {
            return false;
        }
        let Some((object, range)) = lock(&self.health).slow.clone() else {
            return false;
        };
        let begin = Instant::now();
        let bytes = range.end - range.start;
        match self.store().and_then(|s| s.get_range(&object, range)) {
            Ok(_) => {
                self.measured(bytes, begin.elapsed());
                self.serves()
            }
            Err(error) => {
                self.failed(&error, backoff);
                false
            }
        }
    }
}

/// The store, with what is encrypted there in the clear.
fn decrypting(store: Arc<dyn Store>, keyring: Option<&Arc<Keyring>>) -> Arc<dyn Store> {
    match keyring {
        Some(keyring) => Arc::new(SealedStore::new(store, Arc::clone(keyring))),
        None => store,
    }
}

/// `host:port` of an HTTP URL.
fn host_and_port(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let port = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let authority = authority.rsplit('@').next().unwrap_or_default();
    // The colons of an IPv6 address are in brackets.
    let after_brackets = authority.rsplit(']').next().unwrap_or_default();
    Some(match after_brackets.contains(':') {
        true => authority.to_owned(),
        false => format!("{authority}:{port}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports() {
        let of = |url| host_and_port(url).unwrap();
        assert_eq!(of("http://store/x/y"), "store:80");
        assert_eq!(of("https://store"), "store:443");
        assert_eq!(of("http://10.0.2.2:8080"), "10.0.2.2:8080");
        assert_eq!(of("http://[fe80::1]/s"), "[fe80::1]:80");
        assert_eq!(of("http://[fe80::1]:81"), "[fe80::1]:81");
        assert_eq!(host_and_port("/srv/store"), None);
    }

    #[test]
    fn one_caller_finds_out_whether_a_source_serves_again() {
        let store = pristine_testkit::TestStore::new().unwrap();
        let source = Source::from_store(store.open().unwrap());
        let backoff = Backoff {
            network: RetryPolicy {
                first_delay: Duration::from_millis(20),
                ..RetryPolicy::default()
            },
            ..Backoff::default()
        };
        assert!(source.may_ask(&backoff));
        source.failed(&Error::Cancelled, &backoff);
        assert!(!source.may_ask(&backoff));
        std::thread::sleep(Duration::from_millis(30));
        assert!(source.may_ask(&backoff));
        assert!(!source.may_ask(&backoff), "the other one asks");
        assert!(source.serves());
        assert!(source.may_ask(&backoff) && source.may_ask(&backoff));
        source.measured(1000, Duration::from_millis(1));
        assert_eq!(source.rate(), Some(1_000_000));
    }
}
