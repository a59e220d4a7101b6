// SPDX-License-Identifier: GPL-2.0

//! What is known of each client, for its limits: its connections, and how fast it asks and is served.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Nobody waits for longer than this to have a request answered; then it is refused.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Entries of clients that are gone are looked for when so many are known.
const MANY: usize = 4096;
/// After which time a client that is gone is forgotten: its allowance is whole again by then.
const FORGET: Duration = Duration::from_secs(10);

/// A client: an IPv4 address, or a /64 of IPv6, which is what one network gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ClientKey(u64);

impl ClientKey {
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            // No network of IPv6 is 0::/64 but for addresses like ::1, which may share.
            IpAddr::V4(address) => ClientKey(u64::from(address.to_bits())),
            IpAddr::V6(address) => ClientKey((address.to_bits() >> 64) as u64),
        }
    }
}

/// An allowance of so much per second, saved up for at most one second.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Seconds' worth that is left; below zero, it is owed.
    left: f64,
    at: Instant,
}

impl Bucket {
    pub(crate) fn new() -> Self {
        Bucket {
            left: 1.0,
            at: Instant::now(),
        }
    }

    /// Takes `amount` of `rate` per second; returns how long to wait before using it.
    pub(crate) fn take(&mut self, amount: u64, rate: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now.max(self.at);
        self.left = (self.left + passed).min(1.0) - amount as f64 / rate.max(1) as f64;
        if self.left >= 0.0 {
            Duration::ZERO
        } else {
            // Bounded so that nonsense cannot overflow.
            Duration::from_secs_f64((-self.left).min(3600.0))
        }
    }
}

#[derive(Debug)]
struct Known {
    connections: usize,
    requests: Bucket,
    bytes: Bucket,
}

/// All clients.
#[derive(Debug, Default)]
pub(crate) struct Clients(Mutex<HashMap<ClientKey, Known>>);

/// A connection that counts, until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    clients: Arc<Clients>,
    pub(crate) key: ClientKey,
}

impl Clients {
    fn known(&self) -> MutexGuard<'_, HashMap<ClientKey, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection, if the client may have one more.
    pub(crate) fn connect(self: &Arc<Self>, key: ClientKey, limit: usize) -> Option<Counted> {
        let mut known = self.known();
        if known.len() >= MANY && !known.contains_key(&key) {
            let now = Instant::now();
            known.retain(|_, client| {
                let used = client.requests.at.max(client.bytes.at);
                client.connections > 0 || now.saturating_duration_since(used) < FORGET
            });
        }
        let client = known.entry(key).or_insert_with(|| Known {
            connections: 0,
            requests: Bucket::new(),
            bytes: Bucket::new(),
        });
        if client.connections >= limit {
            return None;
        }
        client.connections += 1;
        Some(Counted {
            clients: Arc::clone(self),
            key,
        })
    }
}

impl Counted {
    /// How long a request must wait; an error if that is too long.
    pub(crate) fn request(&self, rate: Option<u64>) -> Result<Duration, Duration> {
        let Some(rate) = rate else {
            return Ok(Duration::ZERO);
        };
        let mut known = self.clients.known();
        let Some(client) = known.get_mut(&self.key) else {
            return Ok(Duration::ZERO);
        };
        let now = Instant::now();
        let wait = client.requests.take(1, rate, now);
        if wait > LONGEST_WAIT {
            // A refused request does not count, or who keeps asking would never be served again.
            client.requests.left += 1.0 / rate.max(1) as f64;
            return Err(wait);
        }
        Ok(wait)
    }

    /// How long to wait before sending so many bytes.
    pub(crate) fn bytes(&self, bytes: u64, rate: Option<u64>) -> Duration {
        let Some(rate) = rate else {
            return Duration::ZERO;
        };
        let mut known = self.clients.known();
        let client = known.get_mut(&self.key);
        client.map_or(Duration::ZERO, |client| {
            client.bytes.take(bytes, rate, Instant::now())
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(client) = self.clients.known().get_mut(&self.key) {
            client.connections -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_allows_its_rate() {
        let mut bucket = Bucket::new();
        let start = Instant::now();
        let mut now = start;
        let mut taken = 0;
        for _ in 0..1000 {
            now += bucket.take(10, 100, now);
            taken += 10;
        }
        let seconds = now.duration_since(start).as_secs_f64();
        // A second's worth was saved up.
        assert!(
            (taken as f64 / 100.0 - 1.0 - seconds).abs() < 0.2,
            "{seconds}"
        );
        // What was not used for long is no more than a second's worth.
        now += Duration::from_secs(1000);
        assert_eq!(bucket.take(100, 100, now), Duration::ZERO);
        assert!(bucket.take(100, 100, now) > Duration::from_millis(900));
    }

    #[test]
    fn clients_are_networks() {
        let key = |text: &str| ClientKey::of(text.parse().unwrap());
        assert_eq!(key("10.0.0.1"), key("::ffff:10.0.0.1"));
        assert_ne!(key("10.0.0.1"), key("10.0.0.2"));
        assert_eq!(key("2001:db8::1"), key("2001:db8::ffff:1"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
    }

    #[test]
    fn connections_are_counted_and_forgotten() {
        let clients = Arc::new(Clients::default());
        let key = ClientKey::of([10, 0, 0, 1].into());
        let one = clients.connect(key, 2).unwrap();
        let _two = clients.connect(key, 2).unwrap();
        assert!(clients.connect(key, 2).is_none());
        drop(one);
        assert!(clients.connect(key, 2).is_some());
    }

    #[test]
    fn who_asks_far_too_often_is_refused_and_then_served_again() {
        let clients = Arc::new(Clients::default());
        let one = clients
            .connect(ClientKey::of([10, 0, 0, 1].into()), 9)
            .unwrap();
        let mut refused = 0;
        for _ in 0..100 {
            refused += usize::from(one.request(Some(2)).is_err());
        }
        // Two at once, and those that wait for up to five seconds.
        assert_eq!(refused, 100 - 2 - 10);
        assert_eq!(one.request(None), Ok(Duration::ZERO));
    }
}
