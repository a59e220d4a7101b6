// SPDX-License-Identifier: GPL-2.0

//! The questions of the fast path about stale blocks, with blocks becoming valid and checkpoints at the same time, under
//! loom: `rust/shared/stale.rs` itself, on loom's atomics, through every interleaving and every value that a relaxed
//! load may see.
//!
//! What is checked are the two facts that its comment gives: who finds a block not stale finds its content, and who
//! finds it not unsettled finds it valid in the durable metadata.
//!
//! The tests that should panic take away one of the things on which that rests, to show that the model would notice.

#![allow(clippy::unwrap_used)]

#[path = "common/atomics.rs"]
mod atomics;

use std::sync::atomic::{AtomicU64 as StdAtomicU64, Ordering::SeqCst};
use std::sync::Mutex as StdMutex;

use atomics::Array;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::stale::StaleMap;
use pristine_shared::tracker::{Count, Memory, Words};

/// What is taken away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The acquire ordering of who asks.
    Acquire,
    /// The release ordering of who makes a block valid.
    Release,
    /// The order of the two bits: a block is unsettled only after it is valid.
    Bits,
    /// The order of the two questions: who writes asks first whether a block is unsettled.
    Questions,
    /// The order of superblock and settling.
    Superblock,
    /// The second generation: a checkpoint settles all that is valid when it is durable.
    Generations,
}

/// What the arrays of a map share.
struct Shared {
    without: Without,
    /// Bits that are still to be set. Used under the desk's lock.
    late: StdMutex<Vec<(Arc<Array>, usize, u64)>>,
}

/// One of a map's arrays.
enum Bits {
    Stale(Array, Arc<Shared>),
    Unsettled(Arc<Array>, Arc<Shared>),
    /// Which pages changed since the last checkpoint; all of them, always.
    Changed,
}

impl Bits {
    fn array(&self) -> Option<&Array> {
        match self {
            Self::Stale(array, _) => Some(array),
            Self::Unsettled(array, _) => Some(array),
            Self::Changed => None,
        }
    }
}

impl Words for Bits {
    fn get(&self, i: usize) -> u64 {
        self.array().map_or(0, |a| a.get(i))
    }

    fn set(&self, i: usize, mask: u64) -> u64 {
        match self {
            Self::Unsettled(array, shared) if shared.without == Without::Bits => {
                let mut late = shared.late.lock().unwrap();
                late.push((array.clone(), i, mask));
                0
            }
            _ => self.array().map_or(0, |a| a.set(i, mask)),
        }
    }

    fn clear(&self, i: usize, mask: u64) -> u64 {
        self.array().map_or(0, |a| a.clear(i, mask))
    }

    fn get_acquire(&self, i: usize) -> u64 {
        match self {
            Self::Stale(array, shared) if shared.without == Without::Acquire => array.get(i),
            _ => self.array().map_or(0, |a| a.get_acquire(i)),
        }
    }

    fn clear_release(&self, i: usize, mask: u64) -> u64 {
        let Self::Stale(array, shared) = self else {
            return 0;
        };
        let cleared = match shared.without {
            Without::Release => array.clear(i, mask),
            _ => array.clear_release(i, mask),
        };
        let late = std::mem::take(&mut *shared.late.lock().unwrap());
        for (array, i, mask) in late {
            array.set(i, mask);
        }
        cleared
    }

    fn copy_to(&self, first: usize, to: &mut [u8]) -> u32 {
        self.array().map_or(0, |a| a.copy_to(first, to))
    }

    fn zero(&self) {
        if let Some(array) = self.array() {
            array.zero();
        }
    }

    fn bytes(&self) -> usize {
        0
    }
}

/// A number that only who holds the desk's lock looks at, so that loom need not try it out.
#[derive(Default)]
struct Number(StdAtomicU64);

impl Count for Number {
    fn load(&self) -> u64 {
        self.0.load(SeqCst)
    }

    fn store(&self, n: u64) {
        self.0.store(n, SeqCst);
    }

    fn add(&self, n: u64) {
        self.0.fetch_add(n, SeqCst);
    }
}

struct Loom;

impl Memory for Loom {
    type Words = Bits;
    type Count = Number;
    type Section<'a> = ();

    fn section(&self) {}
}

/// Two stale blocks in one group.
struct Device {
    map: StaleMap<Loom>,
    desk: Mutex<()>,
    /// What is on the data device; 1 is the content.
    content: [AtomicU64; 2],
    /// The stale bits that are durable: a disk, which is what it is when power fails.
    durable: StdAtomicU64,
    without: Without,
}

impl Device {
    fn new(without: Without) -> Arc<Self> {
        let shared = Arc::new(Shared {
            without,
            late: StdMutex::default(),
        });
        let mut allocated = 0;
        let allocate = |words| {
            allocated += 1;
            Ok::<_, ()>(match allocated {
                1 => Bits::Stale(Array::new(words), shared.clone()),
                2 | 3 => Bits::Unsettled(Arc::new(Array::new(words)), shared.clone()),
                _ => Bits::Changed,
            })
        };
        let geometry = Geometry::new(2 * 8, 12, 13).unwrap();
        let map = StaleMap::with(geometry, Number::default, allocate).unwrap();
        map.recover(Run { start: 0, end: 2 });
        Arc::new(Self {
            map,
            desk: Mutex::new(()),
            content: [AtomicU64::new(0), AtomicU64::new(0)],
            durable: StdAtomicU64::new(0b11),
            without,
        })
    }

    /// A fetched block is stored.
    fn store(&self, block: usize) {
        self.content[block].store(1, Ordering::Relaxed);
        let _desk = self.desk.lock().unwrap();
        let start = block as u64;
        self.map.validate(Run {
            start,
            end: start + 1,
        });
    }

    /// The checkpointer, as far as stale blocks go, step by step as in `rust/target/checkpointer.rs`.
    fn checkpoint(&self) {
        {
            let _desk = self.desk.lock().unwrap();
            if self.without != Without::Generations {
                self.map.begin();
            }
            if self.without == Without::Superblock {
                self.map.settle();
            }
        }
        let mut bytes = [0; 8];
        {
            let _desk = self.desk.lock().unwrap();
            self.map.copy_to(0, &mut bytes);
        }
        self.durable.store(u64::from_le_bytes(bytes), SeqCst);
        let _desk = self.desk.lock().unwrap();
        if self.without == Without::Generations {
            self.map.begin();
        }
        if self.without != Without::Superblock {
            self.map.settle();
        }
    }

    /// A read of one block.
    fn read(&self, block: usize) {
        let n = block as u64;
        if !self.map.any_stale(n, n) {
            let content = self.content[block].load(Ordering::Relaxed);
            assert_eq!(content, 1, "a read finds no content");
        }
    }

    /// A write of one block, whatever makes it so.
    fn write(&self, block: usize) {
        let n = block as u64;
        let goes_ahead = match self.without {
            Without::Questions => !self.map.any_unsettled(n, n) && !self.map.any_stale(n, n),
            _ => self.map.is_plain(n, n, true),
        };
        if goes_ahead {
            let stale = self.durable.load(SeqCst) & 1 << block;
            assert_eq!(stale, 0, "a write goes ahead that recovery calls stale");
        }
    }
}

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let long = std::env::var_os("TEST_LONG").is_some();
    builder.preemption_bound = Some(preemptions + usize::from(long));
    builder.check(model);
}

/// A reader while a block is stored.
fn reader(without: Without) {
    explore(3, move || {
        let device = Device::new(without);
        let storer = {
            let device = device.clone();
            thread::spawn(move || device.store(0))
        };
        let reader = {
            let device = device.clone();
            thread::spawn(move || device.read(0))
        };
        storer.join().unwrap();
        reader.join().unwrap();
        device.read(0);
    });
}

/// A writer while blocks are stored and checkpoints are written.
fn writer(without: Without) {
    explore(3, move || {
        let device = Device::new(without);
        let storer = {
            let device = device.clone();
            thread::spawn(move || {
                device.store(0);
                device.store(1);
            })
        };
        let writer = {
            let device = device.clone();
            thread::spawn(move || {
                device.write(0);
                device.write(1);
            })
        };
        device.checkpoint();
        device.checkpoint();
        writer.join().unwrap();
        storer.join().unwrap();
    });
}

#[test]
fn a_block_that_is_not_stale_has_its_content() {
    reader(Without::Nothing);
}

#[test]
fn a_block_that_is_not_unsettled_is_valid_on_disk() {
    writer(Without::Nothing);
}

#[test]
#[should_panic(expected = "a read finds no content")]
fn fails_without_acquire() {
    reader(Without::Acquire);
}

#[test]
#[should_panic(expected = "a read finds no content")]
fn fails_without_release() {
    reader(Without::Release);
}

#[test]
#[should_panic(expected = "a write goes ahead that recovery calls stale")]
fn fails_if_a_writer_need_not_see_what_came_before() {
    writer(Without::Acquire);
}

#[test]
#[should_panic(expected = "a write goes ahead that recovery calls stale")]
fn fails_if_the_unsettled_bit_comes_after_the_stale_one() {
    writer(Without::Bits);
}

#[test]
#[should_panic(expected = "a write goes ahead that recovery calls stale")]
fn fails_if_the_questions_are_asked_the_other_way_round() {
    writer(Without::Questions);
}

#[test]
#[should_panic(expected = "a write goes ahead that recovery calls stale")]
fn fails_if_blocks_are_settled_before_the_superblock() {
    writer(Without::Superblock);
}

#[test]
#[should_panic(expected = "a write goes ahead that recovery calls stale")]
fn fails_without_the_second_generation() {
    writer(Without::Generations);
}
