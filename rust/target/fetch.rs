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

use super::{job, Counter, Pristine};
use crate::dm::{
    now_us, AtomicWords, Bio, BioList, Buffer, Hooks, MapBio, Mapped, Status,
};
use crate::shared::abi::MAX_FETCH;
use crate::shared::flights::{Flight, Flights, Way, SLOTS};
use crate::shared::geometry::{Geometry, Run};
use crate::shared::notes::{self, Notes};
use crate::shared::stale;

/// The stale blocks, on the kernel's memory.
pub(super) type StaleMap = stale::StaleMap<super::tracker::Kernel>;

/// Longest that a fetch may hold up a suspension or the way down, in microseconds.
const PATIENCE_US: u64 = 10_000_000;
/// How often fetches are looked at that may have taken too long, in milliseconds.
const EXPIRY_MS: u32 = 500;

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
    requeue: bool,
    /// Since when somebody waits for the device to come to rest.
    hurry: Option<u64>,
}

impl Desk {
    /// Whether somebody waits for the device to come to rest.
    pub(super) fn is_hurried(&self) -> bool {
        self.hurry.is_some()
    }
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
    stored: CondVar,
    /// Notes that no metadata have yet; a copy for those without the lock.
    pub(super) noted: Atomic<u64>,
    /// Blocks became valid since the last checkpoint began.
    pub(super) advanced: Atomic<bool>,
    pub(super) figures: Figures,
    /// Room to sort notes in.
    #[pin]
    pub(super) sorter: Mutex<KVec<Run>>,
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
        let sorter = KVec::from_elem(none, notes::CAPACITY, GFP_KERNEL)?;
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
            sorter <- new_mutex!(sorter, "pristine::sorter"),
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
    fn note(&self, desk: &mut Desk, run: Run, promised: bool) -> bool {
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

impl Pristine {
    /// `map` of a device that had stale blocks when it was loaded.
    #[inline(never)]
    pub(super) fn map_cached(&self, fetcher: &Fetcher, bio: MapBio) -> Mapped {
        let (sector, sectors) = (bio.sector(), bio.sectors());
        if sectors == 0 {
            return self.map_flush(fetcher, bio);
        }
        let (first, last) = self.geometry.block_span(sector, sectors);
        let is_change = bio.is_change();
        if !fetcher.map.any_stale(first, last)
            && (!is_change || !fetcher.map.any_unsettled(first, last))
        {
            if !is_change || (self.is_writable() && self.tracker.is_dirty_word(first, last)) {
                return bio.remap(self.meta.data());
            }
            fetcher.hooks.set_map_tag(&bio, tag::NONE);
            return self.map_change(bio);
        }
        if is_change && !self.is_writable() {
            self.refuse_one();
            return bio.complete(Err(Status::IoError));
        }
        if bio.is_nowait() {
            return bio.complete(Err(Status::Again));
        }
        fetcher.hooks.set_map_tag(&bio, tag::NONE);
        let (bio, mapped) = bio.defer();
        self.route(fetcher, bio);
        mapped
    }

    /// A flush: what is noted by now is durable when the data device has answered it, and is recorded then.
    fn map_flush(&self, fetcher: &Fetcher, bio: MapBio) -> Mapped {
        if fetcher.noted.load(Relaxed) == 0 {
            return bio.remap(self.meta.data());
        }
        let end = fetcher.desk.lock().notes.seal();
        let (bio, mapped) = bio.defer();
        fetcher.hooks.set_tag(&bio, tag::new(tag::FLUSH, end));
        fetcher.hooks.submit(bio, self.meta.data());
        mapped
    }

    /// The blocks that a bio touches, and those of them that it covers as a whole.
    fn span(&self, bio: &Bio) -> (Run, Run) {
        let geometry = &self.geometry;
        let (sector, end) = (bio.sector(), bio.sector().saturating_add(bio.sectors()));
        let run = geometry.blocks_of(sector, bio.sectors());
        let mask = (geometry.block_size() >> 9) - 1;
        let mut whole = run;
        if sector & mask != 0 {
            whole.start += 1;
        }
        // The last block of the device may reach past its end.
        if end & mask != 0 && end < geometry.sectors() {
            whole.end = whole.end.saturating_sub(1);
        }
        whole.end = whole.end.max(whole.start);
        (run, whole)
    }

    /// Sends a bio on, or lets it wait for what it needs.
    pub(super) fn route(&self, fetcher: &Fetcher, bio: Bio) {
        if bio.is_change() && !self.is_writable() {
            self.refuse_one();
            return bio.complete(Err(Status::IoError));
        }
        let (run, whole) = self.span(&bio);
        let next = |run| fetcher.map.next(run);
        let mut guard = fetcher.desk.lock();
        let desk = &mut *guard;
        let now = now_us();
        let way = if bio.is_change() {
            desk.flights.write(run, whole, next, now)
        } else {
            let most = MAX_FETCH >> self.geometry.block_shift();
            desk.flights.read(run, next, most, bio.is_ahead(), now)
        };
        let bio = match way {
            Way::Wait(_) | Way::Full if desk.requeue => {
                drop(guard);
                return bio.complete(Err(Status::Requeue));
            }
            Way::Wait(slot) => {
                match desk.flights.waiters(slot) {
                    Some(waiters) => waiters.push(bio),
                    None => desk.crowd.push(bio),
                }
                drop(guard);
                fetcher.requested.notify_one();
                return self.plan_expiry(fetcher);
            }
            Way::Full => {
                desk.crowd.push(bio);
                drop(guard);
                fetcher.requested.notify_one();
                return self.plan_expiry(fetcher);
            }
            Way::Write(id) => {
                let kind = if bio.is_fua() {
                    tag::WRITE_FUA
                } else {
                    tag::WRITE
                };
                fetcher.hooks.set_tag(&bio, tag::new(kind, id));
                bio
            }
            Way::Free if bio.is_change() => {
                let last = run.end.saturating_sub(1);
                if fetcher.map.any_unsettled(run.start, last) {
                    if !fetcher.note(desk, run, false) {
                        desk.crowd.push(bio);
                        drop(guard);
                        // A checkpoint makes the notes superfluous.
                        return self.jobs.now(job::SETTLE);
                    }
                    if bio.is_fua() {
                        fetcher.hooks.set_tag(&bio, tag::new(tag::FUA, 0));
                    }
                }
                bio
            }
            Way::Free => {
                drop(guard);
                return bio.submit(self.meta.data());
            }
        };
        drop(guard);
        if self.tracker.admit(run) {
            self.submit(bio);
        } else {
            self.defer(bio);
        }
    }

    /// Routes the bios that wait for room.
    pub(super) fn route_crowd(&self, fetcher: &Fetcher) {
        let crowd = fetcher.desk.lock().crowd.take();
        self.route_all(fetcher, crowd);
    }

    /// Routes all bios of a list.
    pub(super) fn route_all(&self, fetcher: &Fetcher, mut bios: BioList) {
        while let Some(bio) = bios.pop() {
            self.route(fetcher, bio);
        }
    }

    /// Sends a write whose extents are hot to the data device.
    pub(super) fn submit(&self, bio: Bio) {
        match &self.fetcher {
            Some(fetcher) if fetcher.hooks.tag(&bio) != tag::NONE => {
                fetcher.hooks.submit(bio, self.meta.data());
            }
            _ => bio.submit(self.meta.data()),
        }
    }

    /// Answers a write that was not sent with an error.
    pub(super) fn drop_change(&self, bio: Bio, why: Status) {
        if let Some(fetcher) = &self.fetcher {
            let (kind, number) = tag::parts(fetcher.hooks.tag(&bio));
            if kind == tag::WRITE || kind == tag::WRITE_FUA {
                self.end_write(fetcher, number, false);
            }
        }
        bio.complete(Err(why));
    }

    /// Ends the flight of a write that covers its stale blocks.
    pub(super) fn end_write(&self, fetcher: &Fetcher, id: u64, good: bool) {
        let mut guard = fetcher.desk.lock();
        let desk = &mut *guard;
        let Some(flight) = desk.flights.end(id) else {
            return;
        };
        if good {
            let valid = fetcher.map.validate(flight.run);
            fetcher.advanced.store(true, Relaxed);
            fetcher.figures.overwritten.add(valid, Relaxed);
            // Room was kept for one note of each flight.
            let _ = fetcher.note(desk, flight.run, true);
        }
        let mut waiters = flight.waiters;
        waiters.append(desk.crowd.take());
        let filling_up = desk.notes.is_filling_up();
        drop(guard);
        if filling_up {
            self.jobs.now(job::SETTLE);
        }
        self.route_all(fetcher, waiters);
    }

    /// Ends the flight of blocks that were stored, or could not be. Returns how many became valid.
    pub(super) fn end_store(&self, fetcher: &Fetcher, id: u64, good: bool) -> u64 {
        let mut guard = fetcher.desk.lock();
        let desk = &mut *guard;
        let Some(flight) = desk.flights.end(id) else {
            return 0;
        };
        let mut valid = 0;
        if good {
            valid = fetcher.map.validate(flight.run);
            fetcher.advanced.store(true, Relaxed);
        }
        let crowd = desk.crowd.take();
        drop(guard);
        fetcher.stored.notify_all();
        if good {
            self.route_all(fetcher, flight.waiters);
            if self.features.checkpoint_ms != 0 {
                self.jobs.within(job::SETTLE, self.features.checkpoint_ms);
            }
        } else {
            self.fail_waiters(fetcher, flight);
        }
        self.route_all(fetcher, crowd);
        valid
    }

    /// Ends a flight without its blocks: those who need them get an error.
    pub(super) fn fail_waiters(&self, fetcher: &Fetcher, flight: Flight<BioList>) {
        let mut waiters = flight.waiters;
        while let Some(bio) = waiters.pop() {
            let (_, whole) = self.span(&bio);
            let covered = whole.start <= flight.run.start && flight.run.end <= whole.end;
            if bio.is_change() && covered {
                self.route(fetcher, bio);
            } else {
                bio.complete(Err(Status::IoError));
            }
        }
    }

    /// Sees to it that fetches end that take too long, if there is a limit.
    fn plan_expiry(&self, fetcher: &Fetcher) {
        if self.features.fetch_timeout_ms != 0 || fetcher.desk.lock().hurry.is_some() {
            self.jobs.within(job::EXPIRE, EXPIRY_MS);
        }
    }

    /// The job that ends fetches that take too long.
    pub(super) fn expire(&self) {
        let Some(fetcher) = &self.fetcher else { return };
        loop {
            let mut guard = fetcher.desk.lock();
            let desk = &mut *guard;
            let now = now_us();
            let mut limit = match self.features.fetch_timeout_ms {
                0 => 0,
                ms => now.saturating_sub(u64::from(ms) * 1000),
            };
            if let Some(since) = desk.hurry {
                // Without a helper, waiting is of no use.
                let patience = if desk.helper.is_some() { PATIENCE_US } else { 0 };
                if now.saturating_sub(since) >= patience {
                    limit = now.saturating_add(1);
                }
            }
            let Some(flight) = desk.flights.expire(limit) else {
                let (waiting, _) = desk.flights.waiting();
                drop(guard);
                if waiting != 0 {
                    self.plan_expiry(fetcher);
                }
                return;
            };
            let requeue = desk.requeue;
            let crowd = desk.crowd.take();
            drop(guard);
            if requeue {
                let mut waiters = flight.waiters;
                while let Some(bio) = waiters.pop() {
                    bio.complete(Err(Status::Requeue));
                }
            } else {
                fetcher.figures.errors.add(1, Relaxed);
                if crate::dm::may_print() {
                    pr_err!(
                        "{}: blocks {}..{} were not fetched in time\n",
                        self.meta.data().name(),
                        flight.run.start,
                        flight.run.end
                    );
                }
                self.fail_waiters(fetcher, flight);
            }
            self.route_all(fetcher, crowd);
        }
    }

    /// The device is to come to rest: nobody waits for a helper for ever. `requeue`: nobody waits at all.
    pub(super) fn hurry(&self, fetcher: &Fetcher, requeue: bool) {
        {
            let mut desk = fetcher.desk.lock();
            desk.requeue = requeue;
            desk.hurry.get_or_insert(if requeue { 0 } else { now_us() });
        }
        self.jobs.now(job::EXPIRE);
    }

    /// The device goes on after all.
    pub(super) fn take_time(&self, fetcher: &Fetcher) {
        let mut desk = fetcher.desk.lock();
        desk.requeue = false;
        desk.hurry = None;
    }
}
