// SPDX-License-Identifier: GPL-2.0

//! The tracker of [`crate::shared::tracker`] on the kernel's own memory and RCU.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::rcu;

use crate::dm::AtomicWords;
use crate::shared::geometry::Geometry;
use crate::shared::tracker as shared;

pub(super) use shared::bit;

/// The kernel. It takes no memory, and all of it is compiled away.
pub(crate) struct Kernel;

/// The in-memory state of a device.
pub(crate) type Tracker = shared::Tracker<Kernel>;

impl shared::Memory for Kernel {
    type Words = AtomicWords;
    type Count = Atomic<u64>;
    type Section<'a> = rcu::Guard;

    #[inline]
    fn section(&self) -> rcu::Guard {
        rcu::read_lock()
    }
}

impl shared::Words for AtomicWords {
    #[inline]
    fn get(&self, i: usize) -> u64 {
        AtomicWords::get(self, i)
    }

    #[inline]
    fn set(&self, i: usize, mask: u64) -> u64 {
        AtomicWords::set(self, i, mask)
    }

    #[inline]
    fn clear(&self, i: usize, mask: u64) -> u64 {
        AtomicWords::clear(self, i, mask)
    }

    #[inline]
    fn get_acquire(&self, i: usize) -> u64 {
        AtomicWords::get_acquire(self, i)
    }

    fn clear_release(&self, i: usize, mask: u64) -> u64 {
        AtomicWords::clear_release(self, i, mask)
    }

    fn take(&self, i: usize) -> u64 {
        AtomicWords::take(self, i)
    }

    fn copy_to(&self, first: usize, to: &mut [u8]) -> u32 {
        AtomicWords::copy_to(self, first, to)
    }

    fn zero(&self) {
        AtomicWords::zero(self);
    }

    fn bytes(&self) -> usize {
        AtomicWords::bytes(self)
    }
}

impl shared::Count for Atomic<u64> {
    #[inline]
    fn load(&self) -> u64 {
        Atomic::load(self, Relaxed)
    }

    #[inline]
    fn store(&self, n: u64) {
        Atomic::store(self, n, Relaxed);
    }

    #[inline]
    fn add(&self, n: u64) {
        Atomic::add(self, n, Relaxed);
    }
}

impl Tracker {
    /// The state of a device of which nothing is dirty.
    pub(crate) fn new(geometry: Geometry) -> Result<Self> {
        Self::with(Kernel, geometry, Atomic::new(0), |words| {
            AtomicWords::new(usize::try_from(words)?)
        })
    }
}
