// SPDX-License-Identifier: GPL-2.0

//! Large arrays of atomic words.

use kernel::alloc::{flags, KVVec};
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};

/// An array of 64-bit words, each read and changed atomically.
pub struct AtomicWords(KVVec<Atomic<u64>>);

impl AtomicWords {
    /// `count` words, all zero.
    pub fn new(count: usize) -> Result<Self> {
        let mut words = KVVec::with_capacity(count, flags::GFP_KERNEL | flags::__GFP_ZERO)?;
        // SAFETY: The memory holds at least `count` words and was zeroed, and zero is a valid atomic word.
        unsafe { words.inc_len(count) };
        Ok(Self(words))
    }

    /// Bytes that the array takes.
    pub fn bytes(&self) -> usize {
        self.0.len() * 8
    }

    /// Word `i`, 0 past the end.
    #[inline]
    pub fn get(&self, i: usize) -> u64 {
        self.0.get(i).map_or(0, |w| w.load(Relaxed))
    }

    /// Sets the bits of `mask` in word `i`; returns those that were not set before.
    #[inline]
    pub fn set(&self, i: usize, mask: u64) -> u64 {
        let Some(word) = self.0.get(i) else { return 0 };
        let mut old = word.load(Relaxed);
        while old & mask != mask {
            match word.cmpxchg(old, old | mask, Relaxed) {
                Ok(_) => return mask & !old,
                Err(now) => old = now,
            }
        }
        0
    }

    /// Clears the bits of `mask` in word `i`; returns those that were set before.
    pub fn clear(&self, i: usize, mask: u64) -> u64 {
        let Some(word) = self.0.get(i) else { return 0 };
        let mut old = word.load(Relaxed);
        while old & mask != 0 {
            match word.cmpxchg(old, old & !mask, Relaxed) {
                Ok(_) => return mask & old,
                Err(now) => old = now,
            }
        }
        0
    }

    /// Sets all words to 0.
    pub fn zero(&self) {
        for word in self.0.iter() {
            word.store(0, Relaxed);
        }
    }
}
