// SPDX-License-Identifier: GPL-2.0

//! Which blocks are stale, in memory, and which stopped being so without the metadata knowing.
//!
//! While a device is active its stale blocks only get fewer: a block becomes *valid* when its content, fetched or
//! overwritten as a whole, is on the data device. Two facts are kept:
//!
//! 1. A reader that finds a block's stale bit clear finds its content on the data device.
//! 2. A block that the durable metadata calls stale, and that is valid, is *unsettled*: whoever writes to it must see
//!    to it that a record calls it valid before the next flush is answered, or recovery would call stale what was
//!    promised to last (rule 4 of the contract). Blocks that nobody wrote to need no such record: if they are stale
//!    again after a crash, they are fetched again.
//!
//! A checkpoint settles what became valid before it began to copy. Unsettled blocks are kept track of in groups of 64, a
//! bit for each, in two generations: one that collects, and one that the checkpoint under way will settle.
//!
//! All changes are made under a lock of the caller's; only the questions of the fast path, [`StaleMap::any_stale`] and
//! [`StaleMap::any_unsettled`], need none. They are asked in this order, and a block becomes valid in the opposite
//! one.

use super::bits::{self, words, words_for};
use super::checkpoint;
use super::geometry::{Geometry, Run};
use super::tracker::{bit, Count, Memory, Words};

/// The stale blocks of a device.
pub struct StaleMap<M: Memory> {
    geometry: Geometry,
    /// One bit for each block. Its words are those of the plane pages on disk, in order.
    stale: M::Words,
    count: M::Count,
    /// One bit for each word of `stale`: it has unsettled blocks. The generation that collects is `collecting`.
    unsettled: [M::Words; 2],
    collecting: M::Count,
    /// For each checkpoint area, one bit for each plane page: the page may differ from what the area holds.
    changed: [M::Words; 2],
}

impl<M: Memory> StaleMap<M> {
    /// A map without stale blocks; `allocate` gives so many words, all zero, and `number` a number, 0.
    ///
    /// # Errors
    ///
    /// Those of `allocate`.
    pub fn with<E>(
        geometry: Geometry,
        number: impl Fn() -> M::Count,
        mut allocate: impl FnMut(u64) -> Result<M::Words, E>,
    ) -> Result<Self, E> {
        let pages = words_for(checkpoint::plane_pages(&geometry));
        let groups = words_for(words_for(geometry.blocks()));
        Ok(Self {
            geometry,
            stale: allocate(words_for(geometry.blocks()))?,
            count: number(),
            unsettled: [allocate(groups)?, allocate(groups)?],
            collecting: number(),
            changed: [allocate(pages)?, allocate(pages)?],
        })
    }

    /// Forgets everything. Nobody else may use the map meanwhile.
    pub fn reset(&self) {
        let [a, b] = &self.unsettled;
        let [c, d] = &self.changed;
        for words in [&self.stale, a, b, c, d] {
            words.zero();
        }
        self.count.store(0);
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        let [a, b] = &self.unsettled;
        let [c, d] = &self.changed;
        [&self.stale, a, b, c, d].iter().map(|w| w.bytes()).sum()
    }

    /// Stale blocks.
    pub fn count(&self) -> u64 {
        self.count.load()
    }

    /// Word `i` of the stale plane, of 64 blocks.
    pub fn word(&self, i: usize) -> u64 {
        self.stale.get(i)
    }

    /// The common case of the two questions below in a few loads: blocks `first` to `last` lie in one word, none of them is
    /// stale, and, for a change, none can be unsettled.
    #[inline(always)]
    pub fn is_plain(&self, first: u64, last: u64, is_change: bool) -> bool {
        let (i, _) = bit(first);
        let count = last.wrapping_sub(first);
        // CAST: Distances within a word. A run of more than a word fails the comparison of words.
        let mask = u64::MAX
            .wrapping_shr(bits::WORD_BITS.wrapping_sub(1).wrapping_sub(count) as u32)
            .wrapping_shl(first as u32);
        if first / bits::WORD_BITS != last / bits::WORD_BITS
            || self.stale.get_acquire(i) & mask != 0
        {
            return false;
        }
        let [a, b] = &self.unsettled;
        let (group, mask) = bit(first / bits::WORD_BITS);
        !is_change || (a.get(group) | b.get(group)) & mask == 0
    }

    /// Whether any of blocks `first` to `last` is stale. If not, their content is on the data device.
    #[inline]
    pub fn any_stale(&self, first: u64, last: u64) -> bool {
        let run = Run {
            start: first,
            end: last.saturating_add(1),
        };
        words(run).any(|(i, mask)| self.stale.get_acquire(i) & mask != 0)
    }

    /// Whether any of blocks `first` to `last`, of which none is stale, may be unsettled.
    #[inline]
    pub fn any_unsettled(&self, first: u64, last: u64) -> bool {
        let groups = Run {
            start: first / bits::WORD_BITS,
            end: (last / bits::WORD_BITS).saturating_add(1),
        };
        let [a, b] = &self.unsettled;
        words(groups).any(|(i, mask)| (a.get(i) | b.get(i)) & mask != 0)
    }

    /// The first run of equal blocks in `run`: whether they are stale, and which. `None` for an empty one.
    pub fn next(&self, run: Run) -> Option<(bool, Run)> {
        bits::next_run(|i| self.stale.get(i), run.start, run.end)
    }

    /// Makes the blocks of `run` valid; their content is on the data device. Returns how many were stale.
    pub fn validate(&self, run: Run) -> u64 {
        let collecting = usize::from(self.collecting.load() != 0);
        let mut cleared = 0;
        for (i, mask) in words(run) {
            if self.stale.get(i) & mask == 0 {
                continue;
            }
            if let Some(unsettled) = self.unsettled.get(collecting) {
                // CAST: usize to u64.
                let (group, bit) = bit(i as u64);
                unsettled.set(group, bit);
            }
            cleared += u64::from(self.stale.clear_release(i, mask).count_ones());
        }
        if cleared != 0 {
            for area in &self.changed {
                for (i, mask) in words(checkpoint::pages_of(run)) {
                    area.set(i, mask);
                }
            }
            self.count.store(self.count.load() - cleared);
        }
        cleared
    }

    /// A checkpoint begins to copy: what becomes valid from here on is for the next one. Not to be called again before
    /// [`StaleMap::settle`].
    pub fn begin(&self) {
        self.collecting.store(1 - self.collecting.load().min(1));
    }

    /// The checkpoint that [`StaleMap::begin`] was called for is durable.
    pub fn settle(&self) {
        let settled = usize::from(self.collecting.load() == 0);
        if let Some(unsettled) = self.unsettled.get(settled) {
            unsettled.zero();
        }
    }

    /// Notes that nothing is known of what area `area` (0 or 1) holds.
    pub fn mark_all_changed(&self, area: u8) {
        let pages = Run {
            start: 0,
            end: checkpoint::plane_pages(&self.geometry),
        };
        if let Some(changed) = self.changed.get(usize::from(area)) {
            for (i, mask) in words(pages) {
                changed.set(i, mask);
            }
        }
    }

    /// The plane pages of word `i` that may differ from what area `area` holds; from here on they count as not.
    pub fn take_changed(&self, area: u8, i: usize) -> u64 {
        self.changed
            .get(usize::from(area))
            .map_or(0, |changed| changed.take(i))
    }

    /// Copies the stale bits from word `first` on into the payload of a plane page; returns how many are set.
    pub fn copy_to(&self, first: usize, to: &mut [u8]) -> u32 {
        self.stale.copy_to(first, to)
    }

    /// Sets stale bits that recovery found.
    pub fn recover(&self, run: Run) {
        for (i, mask) in words(run) {
            self.recover_word(i, mask);
        }
    }

    /// Sets the bits of one word that recovery found.
    pub fn recover_word(&self, i: usize, mask: u64) {
        let fresh = self.stale.set(i, mask).count_ones();
        self.count.add(u64::from(fresh));
    }

    /// Clears bits that recovery found to be valid.
    pub fn recover_valid(&self, run: Run) {
        let cleared = words(run)
            .map(|(i, mask)| u64::from(self.stale.clear(i, mask).count_ones()))
            .sum::<u64>();
        self.count.store(self.count.load() - cleared);
    }
}
