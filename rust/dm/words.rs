// SPDX-License-Identifier: GPL-2.0

//! Large arrays of atomic words.

use kernel::alloc::{flags, KVVec};
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, AtomicType, Relaxed, Release};

use super::raw;

/// `word.load(Relaxed)`, without the function call that the kernel crate makes of it: the fast path of each write
/// loads two words, and the calls cost more than all else that it does.
#[inline]
pub fn peek<T: AtomicType>(word: &Atomic<T>) -> T {
    // SAFETY: The pointer is valid and aligned, and only accessed atomically. A volatile read of an aligned machine
    // word is what the kernel's memory model calls READ_ONCE(), and `load(Relaxed)` is defined as that.
    unsafe { word.as_ptr().read_volatile() }
}

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
        self.0.get(i).map_or(0, peek)
    }

    /// Sets the bits of `mask` in word `i`; returns those that were not set before.
    #[inline]
    pub fn set(&self, i: usize, mask: u64) -> u64 {
        let Some(word) = self.0.get(i) else { return 0 };
        let mut old = peek(word);
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
        let mut old = peek(word);
        while old & mask != 0 {
            match word.cmpxchg(old, old & !mask, Relaxed) {
                Ok(_) => return mask & old,
                Err(now) => old = now,
            }
        }
        0
    }

    /// As [`AtomicWords::get`], with acquire ordering.
    #[inline]
    pub fn get_acquire(&self, i: usize) -> u64 {
        self.0.get(i).map_or(0, |word| {
            let word = peek(word);
            // What `load(Acquire)` means, without its function call (see `peek`): nothing after it moves before it.
            core::sync::atomic::fence(core::sync::atomic::Ordering::Acquire);
            word
        })
    }

    /// As [`AtomicWords::clear`], with release ordering.
    pub fn clear_release(&self, i: usize, mask: u64) -> u64 {
        let Some(word) = self.0.get(i) else { return 0 };
        let mut old = peek(word);
        while old & mask != 0 {
            match word.cmpxchg(old, old & !mask, Release) {
                Ok(_) => return mask & old,
                Err(now) => old = now,
            }
        }
        0
    }

    /// Copies as many words as fit from word `first` on into `to`, little-endian, zero past the end; returns the
    /// number of bits set in them. Each word is read once.
    pub fn copy_to(&self, first: usize, to: &mut [u8]) -> u32 {
        let words = self.0.get(first..).unwrap_or(&[]);
        let count = words.len().min(to.len() / 8);
        if let Some(rest) = to.get_mut(count * 8..) {
            rest.fill(0);
        }
        // SAFETY: There are `count` words behind the one pointer and as many times 8 bytes behind the other. The
        // words are read once each and whole, as atomic words must be; `Atomic<u64>` is laid out as a u64.
        unsafe { raw::pristine_copy_words(to.as_mut_ptr(), words.as_ptr().cast(), count) }
    }

    /// Takes word `i`: clears it and returns what it was.
    pub fn take(&self, i: usize) -> u64 {
        self.0.get(i).map_or(0, |word| match peek(word) {
            0 => 0,
            _ => word.xchg(0, Relaxed),
        })
    }

    /// Sets all words to 0.
    pub fn zero(&self) {
        for word in self.0.iter() {
            word.store(0, Relaxed);
        }
    }
}
