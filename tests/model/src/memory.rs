// SPDX-License-Identifier: GPL-2.0

//! Memory for the shared core's maps that one thread uses.

use std::cell::Cell;

use pristine_shared::tracker::{Count, Memory, Words};

/// Cells, and no RCU.
pub struct Plain;

/// An array of words.
pub struct Array(Vec<Cell<u64>>);

impl Array {
    /// So many words, all zero.
    pub fn new(words: u64) -> Self {
        Self((0..words).map(|_| Cell::new(0)).collect())
    }
}

/// A number.
#[derive(Default)]
pub struct Number(Cell<u64>);

impl Memory for Plain {
    type Words = Array;
    type Count = Number;
    type Section<'a> = ();

    fn section(&self) {}
}

impl Words for Array {
    fn get(&self, i: usize) -> u64 {
        self.0.get(i).map_or(0, Cell::get)
    }

    fn set(&self, i: usize, mask: u64) -> u64 {
        mask & !self.0[i].replace(self.get(i) | mask)
    }

    fn clear(&self, i: usize, mask: u64) -> u64 {
        mask & self.0[i].replace(self.get(i) & !mask)
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
            let word = self.get(first + i);
            to.copy_from_slice(&word.to_le_bytes());
            ones += word.count_ones();
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

impl Count for Number {
    fn load(&self) -> u64 {
        self.0.get()
    }

    fn store(&self, n: u64) {
        self.0.set(n);
    }

    fn add(&self, n: u64) {
        self.0.set(self.0.get() + n);
    }
}
