// SPDX-License-Identifier: GPL-2.0

//! The ways of bios through a device with stale blocks; see [`fetch`](super::fetch).

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::fetch::{tag, Fetcher};
use super::{job, Pristine};
use crate::dm::{now_us, Bio, BioList, MapBio, Mapped, Status};
use crate::shared::abi::MAX_FETCH;
use crate::shared::flights::{Flight, Way};
use crate::shared::geometry::Run;

/// Longest that a fetch may hold up a suspension or the way down, in microseconds.
const PATIENCE_US: u64 = 10_000_000;
/// How often fetches are looked at that may have taken too long, in milliseconds.
const EXPIRY_MS: u32 = 500;

impl Pristine {
    /// `map` of a bio that may touch stale or unsettled blocks, or is a flush, of a device that had stale blocks when it was
    /// loaded. What is not is told from it in `map`, with some 30 instructions (`make bench-cost`, `pristine_stale`).
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
            return self.map_change(bio);
        }
        if is_change && !self.is_writable() {
            self.refuse_one();
            return bio.complete(Err(Status::IoError));
        }
        if bio.is_nowait() {
            return bio.complete(Err(Status::Again));
        }
        let (bio, mapped) = bio.defer();
        fetcher.hooks.set_tag(&bio, tag::NONE);
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
            Way::Wait(_) | Way::Full => {
                let waiters = match way {
                    Way::Wait(slot) => desk.flights.waiters(slot),
                    _ => None,
                };
                waiters.unwrap_or(&mut desk.crowd).push(bio);
                let hurried = desk.hurry.is_some();
                drop(guard);
                fetcher.requested.notify_one();
                return self.plan_expiry(hurried);
            }
            // Its note has a place when it ends: there are as many in reserve as there can be flights, and none begins
            // when the rest is full.
            Way::Write(id) if !desk.notes.has_room() => {
                // Nobody else has had the desk since, so nobody waits for it.
                drop(desk.flights.end(id));
                desk.crowd.push(bio);
                drop(guard);
                return self.jobs.now(job::SETTLE);
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
            // Of the flight's blocks only those that are the bio's count.
            let (run, whole) = self.span(&bio);
            let covered = whole.start <= flight.run.start.max(run.start)
                && flight.run.end.min(run.end) <= whole.end;
            if bio.is_change() && covered {
                self.route(fetcher, bio);
            } else {
                bio.complete(Err(Status::IoError));
            }
        }
    }

    /// Sees to it that fetches end that take too long, if there is a limit.
    fn plan_expiry(&self, hurried: bool) {
        if self.features.fetch_timeout_ms != 0 || hurried {
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
                let patience = if desk.helper.is_some() {
                    PATIENCE_US
                } else {
                    0
                };
                if now.saturating_sub(since) >= patience {
                    limit = now.saturating_add(1);
                }
            }
            let Some(flight) = desk.flights.expire(limit) else {
                let (waiting, _) = desk.flights.waiting();
                let hurried = desk.hurry.is_some();
                drop(guard);
                if waiting != 0 {
                    self.plan_expiry(hurried);
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
