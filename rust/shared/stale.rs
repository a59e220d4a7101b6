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
        // The largest by far, and empty in a new map: 4 million words for 1 TiB.
        if self.count.load() != 0 {
            self.stale.zero();
        }
        for words in [a, b, c, d] {
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

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use core::cell::Cell;
    use std::vec::Vec;

    struct Plain;

    struct Array(Vec<Cell<u64>>);

    impl Words for Array {
        fn get(&self, i: usize) -> u64 {
            self.0.get(i).map_or(0, Cell::get)
        }

        fn set(&self, i: usize, mask: u64) -> u64 {
            let old = self.0[i].replace(self.get(i) | mask);
            mask & !old
        }

        fn clear(&self, i: usize, mask: u64) -> u64 {
            let old = self.0[i].replace(self.get(i) & !mask);
            mask & old
        }

        fn get_acquire(&self, i: usize) -> u64 {
            self.get(i)
        }

        fn clear_release(&self, i: usize, mask: u64) -> u64 {
            self.clear(i, mask)
        }

        fn copy_to(&self, first: usize, to: &mut [u8]) -> u32 {
            let mut ones = 0;
            for (i, to) in to.chunks_exact_mut(8).enumerate() {
                to.copy_from_slice(&self.get(first + i).to_le_bytes());
                ones += self.get(first + i).count_ones();
            }
            ones
        }

        fn zero(&self) {
            self.0.iter().for_each(|word| word.set(0));
        }

        fn bytes(&self) -> usize {
            self.0.len() * 8
        }
    }

    impl Count for Cell<u64> {
        fn load(&self) -> u64 {
            self.get()
        }

        fn store(&self, n: u64) {
            self.set(n);
        }

        fn add(&self, n: u64) {
            self.set(self.get() + n);
        }
    }

    impl Memory for Plain {
        type Words = Array;
        type Count = Cell<u64>;
        type Section<'a> = ();

        fn section(&self) {}
    }

    fn run(start: u64, end: u64) -> Run {
        Run { start, end }
    }

    /// Two plane pages.
    const BLOCKS: u64 = checkpoint::BITS_PER_PAGE + 100;

    fn map() -> StaleMap<Plain> {
        let geometry = Geometry::new(BLOCKS * 8, 12, 20).unwrap();
        let words = |n| Ok::<_, ()>(Array((0..n).map(|_| Cell::new(0)).collect()));
        StaleMap::with(geometry, || Cell::new(0), words).unwrap()
    }

    #[test]
    fn blocks_become_valid_once() {
        let map = map();
        map.recover(run(10, 200));
        map.recover_word(0, 0x3ff | (1 << 20));
        assert_eq!(map.count(), 200);
        map.recover_valid(run(190, 300));
        assert_eq!(map.count(), 190);
        assert_eq!(map.validate(run(60, 70)), 10);
        assert_eq!(map.validate(run(50, 70)), 10);
        assert_eq!(map.validate(run(50, 70)), 0);
        assert_eq!(map.count(), 170);
        assert!(!map.any_stale(50, 69));
        assert!(map.any_stale(49, 50) && map.any_stale(69, 70) && map.any_stale(0, BLOCKS - 1));
        assert_eq!(map.next(run(0, BLOCKS)), Some((true, run(0, 50))));
        assert_eq!(map.next(run(50, BLOCKS)), Some((false, run(50, 70))));
        assert_eq!(map.next(run(5, 5)), None);
        assert_eq!(map.word(1), u64::MAX << 6);
        map.reset();
        assert_eq!(map.count(), 0);
        assert!(!map.any_stale(0, BLOCKS - 1) && !map.any_unsettled(0, BLOCKS - 1));
    }

    #[test]
    fn what_recovery_finds_valid_is_settled() {
        let map = map();
        map.recover(run(0, 100));
        map.recover_valid(run(0, 50));
        assert!(!map.any_unsettled(0, 99));
    }

    #[test]
    fn only_what_became_valid_before_a_checkpoint_is_settled_by_it() {
        let map = map();
        map.recover(run(0, BLOCKS));
        map.validate(run(3, 4));
        assert!(map.any_unsettled(3, 3) && map.any_unsettled(2, 200));
        // Groups of 64 are told apart.
        assert!(!map.any_unsettled(64, BLOCKS - 1));
        map.begin();
        map.validate(run(64, 65));
        map.validate(run(5, 6));
        assert!(map.any_unsettled(3, 3) && map.any_unsettled(64, 64));
        map.settle();
        // The first group has a block that is not settled again.
        assert!(map.any_unsettled(3, 3) && map.any_unsettled(64, 64));
        map.begin();
        assert!(map.any_unsettled(3, 3) && map.any_unsettled(64, 64));
        map.validate(run(200, 201));
        map.settle();
        assert!(!map.any_unsettled(0, 127));
        assert!(map.any_unsettled(200, 200));
        // What was valid is not unsettled by being so again.
        map.validate(run(3, 4));
        assert!(!map.any_unsettled(0, 127));
    }

    /// The short form of the questions gives their answers for what lies in one word, and never more.
    #[test]
    fn plain_is_neither_stale_nor_unsettled() {
        let map = map();
        map.recover(run(0, 300));
        map.validate(run(64, 128));
        map.validate(run(140, 200));
        map.begin();
        map.settle();
        map.validate(run(128, 130));
        for first in 0..300 {
            for last in first..300 {
                for is_change in [false, true] {
                    let plain = !map.any_stale(first, last)
                        && (!is_change || !map.any_unsettled(first, last));
                    let one = first / 64 == last / 64;
                    assert_eq!(map.is_plain(first, last, is_change), plain && one);
                }
            }
        }
        assert!(map.is_plain(64, 127, true) && !map.is_plain(128, 129, true));
    }

    #[test]
    fn each_area_learns_of_changed_pages() {
        let map = map();
        map.mark_all_changed(0);
        assert_eq!(map.take_changed(0, 0), 3);
        assert_eq!(map.take_changed(0, 0), 0);
        assert_eq!(map.take_changed(1, 0), 0);
        map.recover(run(0, BLOCKS));
        map.validate(run(BLOCKS - 1, BLOCKS));
        assert_eq!(map.take_changed(0, 0), 2);
        assert_eq!(map.take_changed(1, 0), 2);
        map.validate(run(BLOCKS - 1, BLOCKS));
        assert_eq!(map.take_changed(0, 0), 0);
        map.validate(run(0, BLOCKS));
        assert_eq!(map.take_changed(1, 0), 3);
        assert_eq!(map.take_changed(2, 0), 0);
    }

    #[test]
    fn a_copy_has_the_bits_and_their_number() {
        let map = map();
        map.recover(run(60, 70));
        let mut bytes = [0xaa; 16];
        assert_eq!(map.copy_to(0, &mut bytes), 10);
        assert_eq!(bytes[..8], (0xf_u64 << 60).to_le_bytes());
        assert_eq!(bytes[8..], 0x3fu64.to_le_bytes());
        let last = words_for(BLOCKS) as usize;
        assert_eq!(map.copy_to(last, &mut bytes), 0);
        assert_eq!(bytes, [0; 16]);
    }
}
