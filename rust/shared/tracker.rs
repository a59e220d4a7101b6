// SPDX-License-Identifier: GPL-2.0

//! What is known of blocks and extents in memory, and the fast path that reads and changes it.
//!
//! # Why the fast path needs no lock
//!
//! Two facts are kept at all times:
//!
//! 1. An extent's *hot* bit is set only while a durable record that announces it is part of what recovery
//!    replays.
//! 2. A block's *dirty* bit is set only if the block is dirty in the durable checkpoint or in a durable record, or its
//!    extent was hot when the bit was set and what announced it has not been given up since.
//!
//! So a write may go ahead if all its blocks are dirty, or are in hot extents. Checkpoints and records with exact bits
//! give up intents: whoever writes them clears the hot bits of extents, waits for an RCU grace period, and only then
//! copies the dirty bits. A writer
//! looks at the hot bit and sets dirty bits within one RCU read-side section; either it sees the bit cleared, or
//! its dirty bits are set before the copy is made. Fact 2 follows, and with it rule 1 of the contract.
//!
//! No access here orders anything by itself: all are relaxed, what orders them is the grace period and, among those
//! that change the hot set, the log's lock. That this is enough is checked, not believed: `tests/model/tests/tracker.rs`
//! runs this very code with the atomics of the `loom` crate through every interleaving of writers, committer and
//! checkpointer, and every value that a relaxed load may see. Without the read-side section, the grace period
//! or its barriers, or with the copy made too early, it finds a write that recovery does not know of.

use super::bits::{self, words, words_for};
use super::checkpoint;
use super::geometry::{Geometry, Run};

/// An array of words that all CPUs change at once. All operations are atomic, and relaxed but for the two that say
/// otherwise.
pub trait Words {
    /// Word `i`, 0 past the end.
    fn get(&self, i: usize) -> u64;
    /// Sets the bits of `mask` in word `i`; returns those that were not set before.
    fn set(&self, i: usize, mask: u64) -> u64;
    /// Clears the bits of `mask` in word `i`; returns those that were set before.
    fn clear(&self, i: usize, mask: u64) -> u64;
    /// As `get`, with acquire ordering: what came before the bit was cleared with [`Words::clear_release`] is seen.
    fn get_acquire(&self, i: usize) -> u64;
    /// As `clear`, with release ordering.
    fn clear_release(&self, i: usize, mask: u64) -> u64;
    /// Clears word `i`; returns what it was.
    fn take(&self, i: usize) -> u64 {
        match self.get(i) {
            0 => 0,
            _ => self.clear(i, u64::MAX),
        }
    }
    /// Copies words from `first` on, little-endian, for as long as there is room in `to`, zero past the end; returns the
    /// number of bits set in them. Each word is read once.
    fn copy_to(&self, first: usize, to: &mut [u8]) -> u32;
    /// Sets all words to 0.
    fn zero(&self);
    /// Bytes that the array takes.
    fn bytes(&self) -> usize;
}

/// A number that all CPUs change at once. All operations are atomic and relaxed.
pub trait Count {
    /// The number.
    fn load(&self) -> u64;
    /// Replaces it.
    fn store(&self, n: u64);
    /// Adds to it.
    fn add(&self, n: u64);
}

/// What the tracker stands on: the kernel's memory and RCU, or a model of them.
pub trait Memory {
    /// Arrays of words.
    type Words: Words;
    /// Numbers.
    type Count: Count;
    /// An RCU read-side section; it ends when this is dropped.
    type Section<'a>
    where
        Self: 'a;
    /// Begins a read-side section.
    fn section(&self) -> Self::Section<'_>;
}

/// The word and the mask of bit `n`.
#[inline]
pub fn bit(n: u64) -> (usize, u64) {
    // CAST: A device's words fit in memory, hence their number in a usize.
    ((n / bits::WORD_BITS) as usize, 1 << (n % bits::WORD_BITS))
}

/// The in-memory state of a device.
pub struct Tracker<M: Memory> {
    memory: M,
    geometry: Geometry,
    /// One bit for each block. Its words are those of the plane pages on disk, in order.
    dirty: M::Words,
    dirty_count: M::Count,
    /// One bit for each extent: a durable intent is live.
    hot: M::Words,
    /// One bit for each extent: written to since the last checkpoint looked.
    used: M::Words,
    /// For each checkpoint area, one bit for each plane page: the page may differ from what the area holds.
    changed: [M::Words; 2],
}

impl<M: Memory> Tracker<M> {
    /// The state of a device of which nothing is dirty; `allocate` gives so many words, all zero.
    ///
    /// # Errors
    ///
    /// Those of `allocate`.
    pub fn with<E>(
        memory: M,
        geometry: Geometry,
        dirty_count: M::Count,
        mut allocate: impl FnMut(u64) -> Result<M::Words, E>,
    ) -> Result<Self, E> {
        let pages = words_for(checkpoint::plane_pages(&geometry));
        let extents = words_for(geometry.extents());
        Ok(Self {
            memory,
            geometry,
            dirty: allocate(words_for(geometry.blocks()))?,
            dirty_count,
            hot: allocate(extents)?,
            used: allocate(extents)?,
            changed: [allocate(pages)?, allocate(pages)?],
        })
    }

    fn planes(&self) -> [&M::Words; 5] {
        let [first, second] = &self.changed;
        [&self.dirty, &self.hot, &self.used, first, second]
    }

    /// Forgets everything. Nobody else may use the tracker meanwhile.
    pub fn reset(&self) {
        let [dirty, others @ ..] = self.planes();
        // The largest by far, and empty in a new tracker: 4 million words for 1 TiB.
        if self.dirty_count.load() != 0 {
            dirty.zero();
        }
        for words in others {
            words.zero();
        }
        self.dirty_count.store(0);
    }

    /// Bytes of memory that the state takes.
    pub fn bytes(&self) -> usize {
        self.planes().iter().map(|words| words.bytes()).sum()
    }

    /// Dirty blocks.
    pub fn dirty_count(&self) -> u64 {
        self.dirty_count.load()
    }

    /// Word `i` of the dirty plane, of 64 blocks.
    pub fn dirty_word(&self, i: usize) -> u64 {
        self.dirty.get(i)
    }

    /// Whether all blocks of `run` are dirty.
    #[inline]
    fn all_dirty(&self, run: Run) -> bool {
        words(run).all(|(i, mask)| self.dirty.get(i) & mask == mask)
    }

    #[inline]
    fn set_dirty(&self, run: Run) {
        let mut fresh = 0;
        for (i, mask) in words(run) {
            fresh += u64::from(self.dirty.set(i, mask).count_ones());
        }
        if fresh != 0 {
            self.dirty_count.add(fresh);
        }
    }

    /// Whether a durable intent for the extent is live.
    #[inline]
    pub fn is_hot(&self, extent: u64) -> bool {
        let (i, mask) = bit(extent);
        self.hot.get(i) & mask != 0
    }

    /// The common case of [`Tracker::admit`], in a load and a comparison: whether blocks `first` to `last` are dirty
    /// and lie in one word. With it, the module's `map` takes some 30 instructions more than dm-linear's
    /// (`make bench-cost`); loads that are function calls, as the kernel crate's are, took three times as much.
    #[inline(always)]
    pub fn is_dirty_word(&self, first: u64, last: u64) -> bool {
        let (i, _) = bit(first);
        let count = last.wrapping_sub(first);
        // CAST: Distances within a word. A run of more than a word fails the comparison of words.
        let mask = u64::MAX
            .wrapping_shr(bits::WORD_BITS.wrapping_sub(1).wrapping_sub(count) as u32)
            .wrapping_shl(first as u32);
        first / bits::WORD_BITS == last / bits::WORD_BITS && self.dirty.get(i) & mask == mask
    }

    /// Whether a write to the blocks of `run` may go ahead now. If so, they are dirty from here on.
    pub fn admit(&self, run: Run) -> bool {
        if self.all_dirty(run) {
            return true;
        }
        let extents = self.geometry.extents_of(run);
        // Most of those that are told no. They need no section: whoever is told no sets no bit.
        if extents.len() == 1 && !self.is_hot(extents.start) {
            return false;
        }
        let _section = self.memory.section();
        for extent in extents.start..extents.end {
            if self.is_hot(extent) {
                let (i, mask) = bit(extent);
                self.used.set(i, mask);
            } else {
                let whole = self.geometry.blocks_of_extent(extent);
                let part = Run {
                    start: run.start.max(whole.start),
                    end: run.end.min(whole.end),
                };
                if !self.all_dirty(part) {
                    return false;
                }
            }
        }
        self.set_dirty(run);
        true
    }

    /// Makes an extent hot. Its intent must be durable; the caller holds the log's lock.
    pub fn heat(&self, extent: u64) {
        self.mark_changed(extent);
        let (i, mask) = bit(extent);
        self.used.set(i, mask);
        self.hot.set(i, mask);
    }

    /// Makes the blocks of `run` dirty, though their extents are not hot. A record that tells so must be durable; the
    /// caller holds the log's lock.
    pub fn tell(&self, run: Run) {
        self.mark_pages(run);
        self.set_dirty(run);
    }

    /// Notes that cold extents are written to; whether none of them was since [`Tracker::forget_used`].
    pub fn touch(&self, extents: Run) -> bool {
        (extents.start..extents.end).fold(true, |first, extent| {
            let (i, mask) = bit(extent);
            self.used.set(i, mask) != 0 && first
        })
    }

    /// From here on all extents count as not written to.
    pub fn forget_used(&self) {
        for i in 0..words_for(self.geometry.extents()) {
            // CAST: There is memory for them.
            self.used.take(i as usize);
        }
    }

    /// Makes an extent cold. Before the dirty bits are copied, an RCU grace period must pass.
    pub fn cool(&self, extent: u64) {
        let (i, mask) = bit(extent);
        self.hot.clear(i, mask);
    }

    /// Whether the extent was written to since this was last asked.
    pub fn take_used(&self, extent: u64) -> bool {
        let (i, mask) = bit(extent);
        self.used.clear(i, mask) != 0
    }

    /// Whether the extent was written to since [`Tracker::take_used`] was last asked.
    pub fn is_used(&self, extent: u64) -> bool {
        let (i, mask) = bit(extent);
        self.used.get(i) & mask != 0
    }

    /// Takes the dirty bits of one word that recovery found to be of stale blocks.
    pub fn forget_word(&self, i: usize, mask: u64) {
        let cleared = self.dirty.clear(i, mask).count_ones();
        let count = self.dirty_count.load();
        self.dirty_count.store(count.saturating_sub(cleared.into()));
    }

    /// Notes that the plane pages of an extent may come to differ from what the areas hold.
    pub fn mark_changed(&self, extent: u64) {
        self.mark_pages(self.geometry.blocks_of_extent(extent));
    }

    #[inline]
    fn mark_pages(&self, blocks: Run) {
        for (i, mask) in words(checkpoint::pages_of(blocks)) {
            for area in &self.changed {
                area.set(i, mask);
            }
        }
    }

    /// Notes that nothing is known of what area `area` (0 or 1) holds.
    pub fn mark_all_changed(&self, area: u8) {
        if let Some(changed) = self.changed.get(usize::from(area)) {
            for (i, mask) in words(Run {
                start: 0,
                end: checkpoint::plane_pages(&self.geometry),
            }) {
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

    /// Copies the dirty bits from word `first` on into the payload of a plane page; returns how many are set.
    pub fn copy_dirty(&self, first: usize, to: &mut [u8]) -> u32 {
        self.dirty.copy_to(first, to)
    }

    // During recovery no extent is hot, and the hot bits serve for the intents that the log holds.

    /// Notes intents that recovery found.
    pub fn intend(&self, extents: Run) {
        for (i, mask) in words(extents) {
            self.hot.set(i, mask);
        }
    }

    /// Forgets such intents.
    pub fn settle(&self, extents: Run) {
        for (i, mask) in words(extents) {
            self.hot.clear(i, mask);
        }
    }

    /// Sets the dirty bits of all extents with such intents, and forgets these.
    pub fn conclude(&self) {
        let mut at = 0;
        let limit = self.geometry.extents();
        while let Some((is_intended, extents)) = bits::next_run(|i| self.hot.get(i), at, limit) {
            if is_intended {
                self.recover(self.geometry.blocks_in(extents));
            }
            at = extents.end;
        }
        self.hot.zero();
    }

    /// Sets dirty bits that recovery found.
    pub fn recover(&self, run: Run) {
        self.set_dirty(run);
    }

    /// Sets the bits of one word that recovery found.
    pub fn recover_word(&self, i: usize, mask: u64) {
        let fresh = self.dirty.set(i, mask).count_ones();
        self.dirty_count.add(u64::from(fresh));
    }
}
