// SPDX-License-Identifier: GPL-2.0

//! The devices: what arrives of what was written, and what a half of a block must be.

use std::collections::BTreeSet;
use std::ops::Range;

use pristine_shared::geometry::Run;
use pristine_shared::log::Entry;

use super::{EXTENT_BLOCKS, FIRST};

/// What the first generation holds.
pub(super) fn first_master(half: usize) -> u64 {
    1000 + half as u64
}

pub(super) fn block_of(half: usize) -> u64 {
    FIRST + half as u64 / 2
}

pub(super) fn halves_of(run: Run) -> Range<usize> {
    let half = |block: u64| (block - FIRST) as usize * 2;
    half(run.start)..half(run.end)
}

/// A write that the data device was given.
pub(super) struct Pending {
    pub(super) token: u64,
    pub(super) half: usize,
    pub(super) value: u64,
    /// When it was answered, and can be read.
    pub(super) landed: Option<u64>,
}

/// The data device.
pub(super) struct Device {
    pub(super) durable: Vec<u64>,
    /// What a read returns.
    pub(super) cache: Vec<u64>,
    pub(super) pending: Vec<Pending>,
    pub(super) tokens: u64,
    pub(super) clock: u64,
    /// What the generation holds that the device has.
    pub(super) master: Vec<u64>,
}

impl Device {
    pub(super) fn issue(&mut self, halves: Range<usize>, value: impl Fn(usize) -> u64) -> u64 {
        self.tokens += 1;
        let token = self.tokens;
        let writes = halves.map(|half| Pending {
            token,
            half,
            value: value(half),
            landed: None,
        });
        self.pending.extend(writes);
        token
    }

    pub(super) fn land(&mut self, token: u64) {
        self.clock += 1;
        for write in self.pending.iter_mut().filter(|w| w.token == token) {
            write.landed = Some(self.clock);
            self.cache[write.half] = write.value;
        }
    }

    /// A write with FUA lands.
    pub(super) fn land_durable(&mut self, token: u64) {
        self.land(token);
        let halves: Vec<_> = self.pending.iter().filter(|w| w.token == token).collect();
        let halves: Vec<_> = halves.iter().map(|w| w.half).collect();
        self.settle(|w| w.landed.is_some() && halves.contains(&w.half));
    }

    /// Makes what was answered by `point` durable.
    pub(super) fn flush(&mut self, point: u64) {
        self.settle(|w| w.landed.is_some_and(|landed| landed <= point));
    }

    pub(super) fn settle(&mut self, arrives: impl Fn(&Pending) -> bool) {
        for write in self.pending.iter().filter(|w| arrives(w)) {
            self.durable[write.half] = write.value;
        }
        self.pending.retain(|w| !arrives(w));
    }

    /// What a half may hold after a power cut.
    pub(super) fn possible(&self, half: usize) -> impl Iterator<Item = u64> + '_ {
        let pending = self.pending.iter().filter(move |w| w.half == half);
        pending
            .map(|w| w.value)
            .chain(std::iter::once(self.durable[half]))
    }
}

/// What a half must be.
pub(super) struct Truth {
    /// What it was and became, as far as that can be read.
    pub(super) history: Vec<u64>,
    /// From which of them on it survives a power cut.
    pub(super) promised: usize,
    /// The last one that was acknowledged.
    pub(super) acknowledged: usize,
    /// A write that is on its way.
    pub(super) flying: Option<u64>,
}

impl Truth {
    pub(super) fn new(value: u64) -> Self {
        Self {
            history: vec![value],
            promised: 0,
            acknowledged: 0,
            flying: None,
        }
    }

    pub(super) fn now(&self) -> u64 {
        *self.history.last().unwrap()
    }

    pub(super) fn may_be(&self, value: u64) -> bool {
        self.history[self.promised..].contains(&value) || self.flying == Some(value)
    }
}

/// The metadata that are durable.
#[derive(Default)]
pub(super) struct Metadata {
    /// The stale planes of both areas.
    pub(super) areas: [BTreeSet<u64>; 2],
    pub(super) area: usize,
    pub(super) dirty: BTreeSet<u64>,
    pub(super) log: Vec<Entry>,
    /// The first entry that is replayed.
    pub(super) needed: usize,
}

impl Metadata {
    pub(super) fn used(&self) -> usize {
        self.log.len() - self.needed
    }

    /// The stale and the dirty blocks that recovery finds.
    pub(super) fn recover(&self) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let (mut stale, mut dirty) = (self.areas[self.area].clone(), self.dirty.clone());
        for entry in &self.log[self.needed..] {
            match entry {
                Entry::Intent(extents) => {
                    dirty.extend(extents.start * EXTENT_BLOCKS..extents.end * EXTENT_BLOCKS);
                }
                Entry::Valid(run) => stale.retain(|b| !(run.start..run.end).contains(b)),
                other => panic!("nobody writes {other:?}"),
            }
        }
        dirty.retain(|block| !stale.contains(block));
        (stale, dirty)
    }
}
