// SPDX-License-Identifier: GPL-2.0

//! Memory for the shared core's maps on loom's atomics.

use loom::sync::atomic::{AtomicU64, Ordering};
use pristine_shared::tracker::{Count, Words};

/// The kernel's array of words, operation by operation.
pub struct Array(Vec<AtomicU64>);

impl Array {
    /// So many words, all zero.
    pub fn new(words: u64) -> Self {
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Words for Array {
    fn get(&self, i: usize) -> u64 {
        self.0[i].load(Ordering::Relaxed)
    }

    fn set(&self, i: usize, mask: u64) -> u64 {
        let word = &self.0[i];
        let mut old = word.load(Ordering::Relaxed);
        while old & mask != mask {
            match word.compare_exchange(old, old | mask, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return mask & !old,
                Err(now) => old = now,
            }
        }
        0
    }

    fn clear(&self, i: usize, mask: u64) -> u64 {
        let word = &self.0[i];
        let mut old = word.load(Ordering::Relaxed);
        while old & mask != 0 {
            match word.compare_exchange(old, old & !mask, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return mask & old,
                Err(now) => old = now,
            }
        }
        0
    }

    fn get_acquire(&self, i: usize) -> u64 {
        self.0[i].load(Ordering::Acquire)
    }

    fn clear_release(&self, i: usize, mask: u64) -> u64 {
        let word = &self.0[i];
        let mut old = word.load(Ordering::Relaxed);
        while old & mask != 0 {
            match word.compare_exchange(old, old & !mask, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return mask & old,
                Err(now) => old = now,
            }
        }
        0
    }

    fn copy_to(&self, first: usize, to: &mut [u8]) -> u32 {
        let mut ones = 0;
        for (i, to) in to.chunks_exact_mut(8).enumerate() {
            let word = if first + i < self.0.len() {
                self.get(first + i)
            } else {
                0
            };
            to.copy_from_slice(&word.to_le_bytes());
            ones += word.count_ones();
        }
        ones
    }

    fn zero(&self) {
        for word in &self.0 {
            word.store(0, Ordering::Relaxed);
        }
    }

    fn bytes(&self) -> usize {
        self.0.len() * 8
    }
}

/// How many blocks are dirty. Nothing depends on it, so loom need not try it out.
pub struct Number;

impl Count for Number {
    fn load(&self) -> u64 {
        0
    }

    fn store(&self, _: u64) {}

    fn add(&self, _: u64) {}
}
