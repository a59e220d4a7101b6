// SPDX-License-Identifier: GPL-2.0

//! Who has announced itself, in memory and bounded.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pristine_store::ImageId;

use super::PeerSettings;
use crate::clients::ClientKey;

/// How often all that have ended are looked for, at most.
const SWEEP: Duration = Duration::from_secs(5);
/// The same when room is needed: a flood must not cost much either.
const SOON: Duration = Duration::from_secs(1);

/// Why an announcement was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// The client has made too many.
    Client,
    /// There are too many in all.
    All,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    peer: SocketAddr,
    /// Who announced it.
    client: ClientKey,
    until: Instant,
}

/// The peers of an image.
#[derive(Debug, Default)]
struct Image {
    entries: Vec<Entry>,
    /// Where each is among them.
    places: HashMap<SocketAddr, usize>,
}

#[derive(Debug, Default)]
struct Inner {
    images: HashMap<ImageId, Image>,
    clients: HashMap<ClientKey, usize>,
    total: usize,
    swept: Option<Instant>,
}

/// All peers.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Inner>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `peer` serves an image, as `from` says.
    pub(crate) fn announce(
        &self,
        image: ImageId,
        peer: SocketAddr,
        from: IpAddr,
        settings: &PeerSettings,
        now: Instant,
    ) -> Result<(), Full> {
        let mut inner = self.lock();
        inner.sweep(now, SWEEP);
        let client = ClientKey::of(from);
        let until = now + settings.lease;
        let known = inner
            .images
            .get_mut(&image)
            .and_then(|of| of.get_mut(&peer));
        if let Some(entry) = known {
            entry.until = until;
            return Ok(());
        }
        // Who may announce others does so for many.
        let trusted = settings.announcers.iter().any(|net| net.contains(&from));
        let full = |inner: &Inner| {
            let of_client = inner.clients.get(&client).copied().unwrap_or(0);
            match (
                inner.total >= settings.total,
                of_client >= settings.per_client,
            ) {
                (true, _) => Some(Full::All),
                (_, true) if !trusted => Some(Full::Client),
                _ => None,
            }
        };
        if full(&inner).is_some() {
            inner.sweep(now, SOON);
        }
        if let Some(full) = full(&inner) {
            return Err(full);
        }
        let entry = Entry {
            peer,
            client,
            until,
        };
        inner.images.entry(image).or_default().push(entry);
        *inner.clients.entry(client).or_default() += 1;
        inner.total += 1;
        Ok(())
    }

    /// Forgets a peer of an image.
    pub(crate) fn withdraw(&self, image: &ImageId, peer: &SocketAddr) {
        let mut inner = self.lock();
        let place = inner
            .images
            .get(image)
            .and_then(|of| of.places.get(peer).copied());
        if let Some(place) = place {
            inner.remove(image, place);
        }
    }

    /// Up to `count` peers of an image by chance, each once, but not `without`.
    pub(crate) fn some(
        &self,
        image: &ImageId,
        without: &SocketAddr,
        count: usize,
        now: Instant,
    ) -> Vec<SocketAddr> {
        let mut inner = self.lock();
        inner.sweep(now, SWEEP);
        let Some(of) = inner.images.get_mut(image) else {
            return Vec::new();
        };
        let mut chosen = Vec::with_capacity(count);
        // The first steps of a shuffle: what was chosen is moved to the front.
        let random = RandomState::new();
        for at in 0..of.entries.len() {
            if chosen.len() == count {
                break;
            }
            let left = (of.entries.len() - at) as u64;
            // CAST: below the number of entries.
            of.swap(at, at + (random.hash_one(at) % left) as usize);
            let entry = of.entries[at];
            if entry.until > now && entry.peer != *without {
                chosen.push(entry.peer);
            }
        }
        chosen
    }

    /// How many there are.
    pub(crate) fn len(&self, now: Instant) -> usize {
        let mut inner = self.lock();
        inner.sweep(now, SOON);
        inner.total
    }
}

impl Image {
    fn get_mut(&mut self, peer: &SocketAddr) -> Option<&mut Entry> {
        let place = *self.places.get(peer)?;
        self.entries.get_mut(place)
    }

    fn push(&mut self, entry: Entry) {
        self.places.insert(entry.peer, self.entries.len());
        self.entries.push(entry);
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.entries.swap(one, other);
        for place in [one, other] {
            self.places.insert(self.entries[place].peer, place);
        }
    }

    fn remove(&mut self, place: usize) -> Entry {
        let entry = self.entries.swap_remove(place);
        self.places.remove(&entry.peer);
        if let Some(moved) = self.entries.get(place) {
            self.places.insert(moved.peer, place);
        }
        entry
    }
}

impl Inner {
    fn remove(&mut self, image: &ImageId, place: usize) {
        let Some(of) = self.images.get_mut(image) else {
            return;
        };
        let entry = of.remove(place);
        if of.entries.is_empty() {
            self.images.remove(image);
        }
        self.total -= 1;
        if let Some(count) = self.clients.get_mut(&entry.client) {
            *count -= 1;
            if *count == 0 {
                self.clients.remove(&entry.client);
            }
        }
    }

    /// Forgets those whose time is over, unless that was done not `pause` ago.
    fn sweep(&mut self, now: Instant, pause: Duration) {
        let since = |at| now.saturating_duration_since(at);
        if self.swept.is_some_and(|at| since(at) < pause) {
            return;
        }
        self.swept = Some(now);
        let images: Vec<ImageId> = self.images.keys().copied().collect();
        for image in images {
            let mut place = 0;
            while let Some(entry) = self.images.get(&image).and_then(|of| of.entries.get(place)) {
                match entry.until <= now {
                    true => self.remove(&image, place),
                    false => place += 1,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(number: u8) -> ImageId {
        ImageId::from_bytes([number; 32])
    }

    fn peer(number: u32, port: u16) -> SocketAddr {
        let [_, a, b, c] = number.to_be_bytes();
        SocketAddr::from(([10, a, b, c], port))
    }

    fn announce(
        registry: &Registry,
        number: u32,
        port: u16,
        settings: &PeerSettings,
        now: Instant,
    ) -> Result<(), Full> {
        let peer = peer(number, port);
        registry.announce(image(1), peer, peer.ip(), settings, now)
    }

    #[test]
    fn announcements_end_with_their_lease() {
        let (registry, settings, now) =
            (Registry::default(), PeerSettings::default(), Instant::now());
        announce(&registry, 1, 80, &settings, now).unwrap();
        announce(&registry, 2, 80, &settings, now + settings.lease / 2).unwrap();
        let nobody = peer(9, 9);
        let mut all = registry.some(&image(1), &nobody, 8, now);
        all.sort();
        assert_eq!(all, [peer(1, 80), peer(2, 80)]);
        assert_eq!(
            registry.some(&image(1), &peer(1, 80), 8, now),
            [peer(2, 80)]
        );
        assert_eq!(registry.some(&image(2), &nobody, 8, now), []);
        let later = now + settings.lease;
        assert_eq!(registry.some(&image(1), &nobody, 8, later), [peer(2, 80)]);
        // Who says so again stays.
        announce(&registry, 2, 80, &settings, later).unwrap();
        let later = later + settings.lease * 9 / 10;
        assert_eq!(registry.some(&image(1), &nobody, 8, later), [peer(2, 80)]);
        registry.withdraw(&image(1), &peer(2, 80));
        registry.withdraw(&image(1), &peer(2, 80));
        assert_eq!(registry.len(later), 0);
        assert!(registry.lock().clients.is_empty() && registry.lock().images.is_empty());
    }

    #[test]
    fn a_flood_stays_within_limits() {
        let registry = Registry::default();
        let now = Instant::now();
        let settings = PeerSettings {
            total: 100,
            announcers: vec!["10.0.0.7/32".parse().unwrap()],
            ..PeerSettings::default()
        };
        for port in 1..=50 {
            let taken = announce(&registry, 1, port, &settings, now);
            let expected = if port <= 8 { Ok(()) } else { Err(Full::Client) };
            assert_eq!(taken, expected, "{port}");
        }
        // Who has its place keeps it.
        announce(&registry, 1, 1, &settings, now).unwrap();
        for number in 2..200 {
            let taken = announce(&registry, number, 1, &settings, now);
            let expected = if number <= 93 { Ok(()) } else { Err(Full::All) };
            assert_eq!(taken, expected, "{number}");
        }
        assert_eq!(registry.len(now), 100);
        // Once they are over, there is room, whoever asked meanwhile.
        let later = now + settings.lease;
        for port in 1..=50 {
            announce(&registry, 7, port, &settings, later).unwrap();
        }
        assert_eq!(registry.len(later), 50);
    }

    #[test]
    fn a_handful_is_chosen_by_chance_and_each_once() {
        let (registry, settings, now) =
            (Registry::default(), PeerSettings::default(), Instant::now());
        for number in 1..=40 {
            announce(&registry, number, 80, &settings, now).unwrap();
        }
        let mut seen: HashMap<SocketAddr, u32> = HashMap::new();
        for _ in 0..400 {
            let chosen = registry.some(&image(1), &peer(1, 80), 8, now);
            assert_eq!(chosen.len(), 8);
            let mut unique = chosen.clone();
            unique.sort();
            unique.dedup();
            assert_eq!(unique.len(), 8);
            for one in chosen {
                *seen.entry(one).or_default() += 1;
            }
        }
        // 3,200 over 39 peers, 82 each: nobody is left out.
        assert_eq!(seen.len(), 39);
        assert!(seen.values().all(|count| *count > 20), "{seen:?}");
        // What was shuffled is still found.
        for number in 1..=40 {
            registry.withdraw(&image(1), &peer(number, 80));
        }
        assert_eq!(registry.len(now), 0);
    }
}
