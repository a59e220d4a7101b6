// SPDX-License-Identifier: GPL-2.0

//! Stale blocks: what reads and writes them goes through here.
//!
//! A bio that touches no stale block, and for a write no unsettled one (see [`stale`](crate::shared::stale)), goes the
//! same way as on a device that never had any. The others are *routed*:
//!
//! | bio | stale blocks in it | what happens |
//! | --- | --- | --- |
//! | read | any | the helper is asked for them; the answer completes the read, and is stored |
//! | write | covered in part | these are fetched first |
//! | write | covered as a whole | the write takes its way; the blocks are valid when it has ended |
//! | write | none, but unsettled ones | noted, then the write takes its way |
//! | flush | | if anything is noted, a record follows before it is answered (see [`notes`](super::notes)) |
//!
//! Whoever meets a block in flight waits in that flight's list, and asks again when it ends. So each block is fetched once,
//! and written by one at a time. There is one lock, the desk's, which is never held over I/O.

use kernel::alloc::{flags::GFP_KERNEL, KBox, KVec};
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_condvar, new_mutex, new_spinlock, CondVar, Mutex, SpinLock};

use super::Counter;
use crate::dm::{AtomicWords, BioList, Buffer, Hooks};
use crate::shared::abi::MAX_FETCH;
use crate::shared::flights::{Flight, Flights, SLOTS};
use crate::shared::geometry::{Geometry, Run};
use crate::shared::notes::{self, Notes};
use crate::shared::stale;

/// The stale blocks, on the kernel's memory.
pub(super) type StaleMap = stale::StaleMap<super::tracker::Kernel>;

/// What a bio's tag says: the kind in the lower bits, and a number above it.
pub(super) mod tag {
    /// It takes the common way.
    pub(crate) const NONE: u64 = 0;
    /// It covers stale blocks as a whole; the number is its flight's.
    pub(crate) const WRITE: u64 = 1;
    /// The same, and it must be durable when it is answered.
    pub(crate) const WRITE_FUA: u64 = 2;
    /// It writes unsettled blocks, and must be durable when it is answered.
    pub(crate) const FUA: u64 = 3;
    /// It is a flush; the number is one past that of the last note that it seals.
    pub(crate) const FLUSH: u64 = 4;

    const BITS: u32 = 3;

    /// The tag.
    pub(crate) fn new(kind: u64, number: u64) -> u64 {
        number << BITS | kind
    }

    /// Kind and number of a tag.
    pub(crate) fn parts(tag: u64) -> (u64, u64) {
        (tag & ((1 << BITS) - 1), tag >> BITS)
    }
}

/// Numbers that statistics show.
#[derive(Default)]
pub(super) struct Figures {
    pub(super) requests: Counter,
    pub(super) fetched: Counter,
    pub(super) hydrated: Counter,
    pub(super) overwritten: Counter,
    pub(super) errors: Counter,
    pub(super) latency_us: Counter,
    pub(super) latency_max_us: Counter,
}

/// What is under way. Guarded by `Fetcher::desk`; no other lock is taken after it.
pub(super) struct Desk {
    pub(super) flights: Flights<KVec<Option<Flight<BioList>>>>,
    /// Bios that wait for room in the table of flights, or of notes.
    pub(super) crowd: BioList,
    pub(super) notes: Notes<KVec<Run>>,
    /// The helper that the device has.
    pub(super) helper: Option<u64>,
    /// The device is active.
    pub(super) open: bool,
    /// The device is being suspended without a flush: nobody waits.
    pub(super) requeue: bool,
    /// Since when somebody waits for the device to come to rest.
    pub(super) hurry: Option<u64>,
}

/// The part of a target that had stale blocks when it was loaded.
#[pin_data]
pub(super) struct Fetcher {
    pub(super) map: StaleMap,
    pub(super) hooks: Hooks,
    #[pin]
    pub(super) desk: SpinLock<Desk>,
    /// A request was queued, or the device is not active any more.
    #[pin]
    pub(super) requested: CondVar,
    /// Something that was being stored has ended.
    #[pin]
    pub(super) stored: CondVar,
    /// Notes that no metadata have yet; a copy for those without the lock.
    pub(super) noted: Atomic<u64>,
    /// Blocks became valid since the last checkpoint began.
    pub(super) advanced: Atomic<bool>,
    pub(super) figures: Figures,
    /// Notes while they are recorded.
    #[pin]
    pub(super) recording: Mutex<KVec<Run>>,
    /// Memory for data of [`MAX_FETCH`] bytes that is not in use.
    #[pin]
    buffers: Mutex<KVec<Buffer>>,
}

/// Buffers that are kept.
const BUFFERS: usize = 8;

impl Fetcher {
    /// For a device of this geometry.
    pub(super) fn new(geometry: Geometry, hooks: Hooks) -> Result<Pin<KBox<Self>>> {
        let mut slots = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        for _ in 0..SLOTS {
            slots.push_within_capacity(None).map_err(|_| ENOMEM)?;
        }
        let none = Run { start: 0, end: 0 };
        let notes = KVec::from_elem(none, notes::CAPACITY, GFP_KERNEL)?;
        let map = StaleMap::with(
            geometry,
            || Atomic::new(0),
            |words| AtomicWords::new(usize::try_from(words)?),
        )?;
        let desk = Desk {
            flights: Flights::new(slots),
            crowd: BioList::new(),
            notes: Notes::new(notes, SLOTS),
            helper: None,
            open: false,
            requeue: false,
            hurry: None,
        };
        let recording = KVec::from_elem(none, notes::CAPACITY, GFP_KERNEL)?;
        let buffers = KVec::with_capacity(BUFFERS, GFP_KERNEL)?;
        let init = try_pin_init!(Self {
            map,
            hooks,
            desk <- new_spinlock!(desk, "pristine::desk"),
            requested <- new_condvar!("pristine::requested"),
            stored <- new_condvar!("pristine::stored"),
            noted: Atomic::new(0),
            advanced: Atomic::new(false),
            figures: Figures::default(),
            recording <- new_mutex!(recording, "pristine::recording"),
            buffers <- new_mutex!(buffers, "pristine::buffers"),
        }? Error);
        KBox::pin_init(init, GFP_KERNEL)
    }

    /// Bytes of memory that grow with the device.
    pub(super) fn bytes(&self) -> usize {
        self.map.bytes()
    }

    /// A buffer for so many pages, at most [`MAX_FETCH`] bytes.
    pub(super) fn buffer(&self, pages: usize) -> Result<Buffer> {
        let most = usize::try_from(MAX_FETCH)? / crate::shared::PAGE_SIZE;
        if pages <= most / 8 {
            return Buffer::new(pages);
        }
        let kept = self.buffers.lock().pop();
        kept.map_or_else(|| Buffer::new(most), Ok)
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&self, mut buffer: Buffer) {
        let most = usize::try_from(MAX_FETCH).unwrap_or(0) / crate::shared::PAGE_SIZE;
        if buffer.pages().len() == most {
            // There is room for some; the others are freed.
            let _ = self.buffers.lock().push_within_capacity(buffer);
        }
    }

    /// The device becomes active: nothing is under way. To be called before the state is loaded.
    pub(super) fn reset(&self) {
        let mut desk = self.desk.lock();
        while desk.flights.expire(u64::MAX).is_some() {}
        desk.notes.clear();
        self.noted.store(0, Relaxed);
        self.map.reset();
        drop(desk);
        self.advanced.store(false, Relaxed);
    }

    /// Bios and helpers may come.
    pub(super) fn open(&self) {
        let mut desk = self.desk.lock();
        desk.open = true;
        desk.requeue = false;
        desk.hurry = None;
    }

    /// No bio is under way any more: waits until nothing is being stored, and lets nothing begin.
    pub(super) fn close(&self) {
        let mut desk = self.desk.lock();
        desk.open = false;
        desk.flights.give_back(None);
        self.requested.notify_all();
        while desk.flights.is_storing() {
            self.stored.wait(&mut desk);
        }
    }

    /// Notes that the blocks of `run`, which are valid, must be recorded.
    pub(super) fn note(&self, desk: &mut Desk, run: Run, promised: bool) -> bool {
        let added = if promised {
            desk.notes.add_promised(run)
        } else {
            desk.notes.add(run)
        };
        self.noted.store(desk.notes.len() as u64, Relaxed); // CAST: usize to u64.
        added
    }

    /// Drops the notes with numbers below `end`: the metadata have them. Returns the bios that waited for room.
    pub(super) fn drop_notes(&self, end: u64) -> BioList {
        let mut desk = self.desk.lock();
        desk.notes.drop_until(end);
        self.noted.store(desk.notes.len() as u64, Relaxed); // CAST: usize to u64.
        desk.crowd.take()
    }
}
