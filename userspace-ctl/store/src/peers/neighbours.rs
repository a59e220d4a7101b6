// SPDX-License-Identifier: GPL-2.0

//! The peers that a machine knows, and whom it asks for what.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pristine_image::ImageId;

use super::map::SECTION;
use super::peer::{Came, Patience, Peer, PeerState};
use super::wire::MAX_BLOCKS;
use crate::error::Error;
use crate::store::Store;

pub use super::wire::Entry as Wanted;

/// Peers known at a time.
const KNOWN: usize = 16;
/// Peers that are asked for the same block, before the store is.
const ATTEMPTS: usize = 2;
/// How old a map may get.
const MAP_AGE: Duration = Duration::from_secs(1);
/// The server is asked again after this time while few peers are known: others come at the same time as this machine.
const ASK_SOON: Duration = Duration::from_secs(2);
/// So many are few.
const FEW: usize = 4;
/// A server that failed is asked again after this time.
const ASK_LATER: Duration = Duration::from_secs(15);
/// One that introduces nobody, after this.
const ASK_SELDOM: Duration = Duration::from_secs(600);

/// What peers did in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerTotals {
    /// Blocks that came from peers.
    pub blocks: u64,
    /// Blocks that peers were asked for and that no peer gave.
    pub missed: u64,
    /// Failures of peers: late, gone, in another language.
    pub failed: u64,
    /// Blocks that were wrong.
    pub wrong: u64,
}

/// Blocks, verified: `data` has 4,096 bytes for each of `blocks`.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The blocks.
    pub blocks: Vec<Wanted>,
    /// Their content.
    pub data: Vec<u8>,
}

/// The neighbours of a machine that have, or may have, blocks of an image.
#[derive(Debug)]
pub struct Neighbours {
    image: ImageId,
    /// The port that this machine serves its own blocks on, to be announced.
    port: Option<u16>,
    peers: Mutex<Vec<Arc<Peer>>>,
    /// When which store's server is to be asked; by place in the list of stores.
    ask_at: Mutex<Vec<Option<Instant>>>,
    random: RandomState,
    drawn: AtomicU64,
    blocks: AtomicU64,
    missed: AtomicU64,
    /// Of peers that are not known any more.
    gone: Mutex<PeerTotals>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Neighbours {
    /// Nobody is known yet. With `port` this machine is announced as one that serves the image there.
    pub fn new(image: ImageId, port: Option<u16>) -> Self {
        Neighbours {
            image,
            port,
            peers: Mutex::default(),
            ask_at: Mutex::default(),
            random: RandomState::new(),
            drawn: AtomicU64::new(0),
            blocks: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            gone: Mutex::default(),
        }
    }

    /// The image.
    pub fn image(&self) -> &ImageId {
        &self.image
    }

    /// A number by chance.
    fn draw(&self) -> u64 {
        self.random
            .hash_one(self.drawn.fetch_add(1, Ordering::Relaxed))
    }

    /// Takes up peers. If too many are known then, those that fail go.
    pub fn learn(&self, addresses: &[SocketAddr]) {
        let mut peers = lock(&self.peers);
        for address in addresses {
            if peers.iter().any(|peer| peer.address == *address) {
                continue;
            }
            if peers.len() >= KNOWN {
                let Some(place) = peers.iter().position(|peer| peer.fails()) else {
                    break;
                };
                let state = peers.swap_remove(place).state();
                let mut gone = lock(&self.gone);
                gone.failed += state.failed;
                gone.wrong += state.wrong;
            }
            peers.push(Arc::new(Peer::new(*address)));
        }
    }

    /// Does what is due: asks the stores' servers for peers and announces this machine, asks peers what they have. To be
    /// called about once a second by a thread that has time.
    pub fn look_after(&self, stores: &[Arc<dyn Store>]) {
        self.ask_servers(stores);
        let peers = lock(&self.peers).clone();
        for peer in peers {
            peer.refresh(self.image, MAP_AGE);
        }
    }

    fn ask_servers(&self, stores: &[Arc<dyn Store>]) {
        for (place, store) in stores.iter().enumerate() {
            let due = {
                let mut ask_at = lock(&self.ask_at);
                let places = stores.len().max(ask_at.len());
                ask_at.resize(places, None);
                ask_at.get(place).copied().flatten()
            };
            if due.is_some_and(|at| at > Instant::now()) {
                continue;
            }
            let wait = match store.peers(&self.image, self.port) {
                Ok(list) => {
                    self.learn(&list.peers);
                    match lock(&self.peers).len() < FEW {
                        true => ASK_SOON,
                        false => list.lease / 3,
                    }
                }
                Err(Error::Unsupported { .. }) => ASK_SELDOM,
                Err(_) => ASK_LATER,
            };
            if let Some(at) = lock(&self.ask_at).get_mut(place) {
                *at = Some(Instant::now() + wait);
            }
        }
    }

    /// Fetches what peers have of some blocks. Blocks that are missing from the result are to be fetched elsewhere.
    /// `wanted` should be in ascending order.
    pub fn fetch(&self, wanted: &[Wanted], patience: &Patience) -> Vec<Batch> {
        let end = Instant::now() + patience.all;
        let mut batches = Vec::new();
        let same = |a: &Wanted, b: &Wanted| a.block / SECTION == b.block / SECTION;
        for section in wanted.chunk_by(same) {
            for some in section.chunks(MAX_BLOCKS) {
                if Instant::now() >= end {
                    return batches;
                }
                self.fetch_some(some, patience, &mut batches);
            }
        }
        batches
    }

    /// Fetches blocks of one section.
    fn fetch_some(&self, wanted: &[Wanted], patience: &Patience, batches: &mut Vec<Batch>) {
        let Some(section) = wanted.first().map(|w| w.block / SECTION) else {
            return;
        };
        let mut left = wanted.to_vec();
        let mut asked = HashSet::new();
        while asked.len() < ATTEMPTS && !left.is_empty() {
            let Some(peer) = self.choose(section, &asked) else {
                break;
            };
            asked.insert(peer.address);
            // What it fails with is noted with the peer.
            let Ok(Came { entries, data }) = peer.fetch(self.image, &left, patience) else {
                continue;
            };
            if entries.len() * 2 < left.len() {
                peer.has_not(section);
            }
            if entries.is_empty() {
                continue;
            }
            let came: HashSet<u64> = entries.iter().map(|entry| entry.block).collect();
            left.retain(|entry| !came.contains(&entry.block));
            self.blocks
                .fetch_add(entries.len() as u64, Ordering::Relaxed);
            batches.push(Batch {
                blocks: entries,
                data,
            });
        }
        if !asked.is_empty() {
            self.missed.fetch_add(left.len() as u64, Ordering::Relaxed);
        }
    }

    /// A peer that has a section and the least to do; by chance among several.
    fn choose(&self, section: u64, asked: &HashSet<SocketAddr>) -> Option<Arc<Peer>> {
        let peers = lock(&self.peers);
        let fresh = peers.iter().filter(|peer| !asked.contains(&peer.address));
        let able = fresh.filter_map(|peer| Some((peer.load(section)?, self.draw(), peer)));
        let best = able.min_by_key(|(load, random, _)| (*load, *random));
        best.map(|(_, _, peer)| Arc::clone(peer))
    }

    /// How each peer does.
    pub fn states(&self) -> Vec<PeerState> {
        lock(&self.peers).iter().map(|peer| peer.state()).collect()
    }

    /// What peers did in all.
    pub fn totals(&self) -> PeerTotals {
        let mut totals = *lock(&self.gone);
        totals.blocks = self.blocks.load(Ordering::Relaxed);
        totals.missed = self.missed.load(Ordering::Relaxed);
        for state in self.states() {
            totals.failed += state.failed;
            totals.wrong += state.wrong;
        }
        totals
    }

    /// In which order this machine should take the sections of the image when nothing else decides: each machine in
    /// another one, so that they soon have different things to give to each other.
    pub fn order(&self, sections: u64) -> Vec<u32> {
        // CAST: a device of 2^32 sections of 4 MiB has 16 PiB.
        let mut order: Vec<u32> = (0..sections.min(u64::from(u32::MAX)) as u32).collect();
        order.sort_by_cached_key(|section| self.random.hash_one((section, "order")));
        order
    }
}
