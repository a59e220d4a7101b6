// SPDX-License-Identifier: GPL-2.0

//! The helper's side of [`fetch`](super::fetch): requests go out, answers and offers come in.
//!
//! An answer's data are copied from the helper once. Reads that lie in the request's blocks are completed from the copy, then
//! it is written to the data device; the blocks are valid when that has ended. All of it happens in the helper's
//! own thread, which returns when it is done: a helper can have no more under way than it has threads, and none
//! that it does not wait for.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::CondVarTimeoutResult;
use kernel::time::msecs_to_jiffies;
use kernel::uaccess::{UserPtr, UserSlice};

use super::fetch::Fetcher;
use super::Pristine;
use crate::dm::{now_us, BioList, Buffer, Errno, Registry, SECTOR};
use crate::shared::abi;
use crate::shared::flights::{Full, Refused};
use crate::shared::geometry::Run;
use crate::shared::PAGE_SIZE;

/// The number of the last helper; 0 was none.
static LAST_HELPER: Atomic<u64> = Atomic::new(0);

/// What an open file is a helper of.
#[derive(Clone, Copy)]
pub(super) struct Session {
    helper: u64,
    number: (u32, u32),
}

/// How a request of the helper's ended.
enum Outcome<R> {
    Done(R),
    /// The device is suspended.
    Resting,
}

/// Makes a new session with an active device.
///
/// # Errors
///
/// `ENODATA`: nothing on it was stale when it was loaded; `EBUSY`: it has a helper, and `take_over` is not set.
pub(super) fn attach(device: &Pristine, number: (u32, u32), take_over: bool) -> Result<Session> {
    let fetcher = device.fetcher.as_ref().ok_or(Errno::NoData)?;
    let mut desk = fetcher.desk.lock();
    if let Some(old) = desk.helper {
        if !take_over {
            return Err(EBUSY);
        }
        desk.flights.give_back(Some(old));
    }
    let helper = LAST_HELPER.fetch_add(1, Relaxed) + 1;
    desk.helper = Some(helper);
    drop(desk);
    // The one that lost it must learn of it, and there may be requests for the new one.
    fetcher.requested.notify_all();
    Ok(Session { helper, number })
}

impl Session {
    /// Whether it is with another device than this.
    pub(super) fn is_of_another(self, number: (u32, u32)) -> bool {
        self.number != number
    }

    /// Calls `f` with the device, if the session's helper is still its helper.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device is gone; `ESHUTDOWN`: it has another helper, or none; those of `f`.
    fn with<R>(
        self,
        f: impl FnOnce(&Pristine, &Fetcher) -> Result<Outcome<R>>,
    ) -> Result<Outcome<R>> {
        let mut f = Some(f);
        let mut result = Err(ENODEV);
        Registry::for_each(|device: &Pristine| {
            let Some(fetcher) = &device.fetcher else {
                return true;
            };
            if fetcher.desk.lock().helper != Some(self.helper) {
                if device.last_number() == self.number {
                    result = Err(Errno::Shutdown.into());
                }
                return true;
            }
            if let Some(f) = f.take() {
                result = f(device, fetcher);
            }
            false
        });
        result
    }

    /// Ends the session: what was handed out waits for the next helper.
    pub(super) fn end(self) {
        let _ = self.with(|device, fetcher| {
            let mut desk = fetcher.desk.lock();
            desk.helper = None;
            desk.flights.give_back(Some(self.helper));
            let hurried = desk.hurry.is_some();
            drop(desk);
            if hurried {
                device.jobs.now(super::job::EXPIRE);
            }
            Ok(Outcome::Done(()))
        });
    }

    /// Fills `requests`, waiting at most `wait_ms` for the first; returns how many there are.
    pub(super) fn next(self, requests: &mut [abi::Request], wait_ms: u32) -> Result<usize> {
        let end = now_us().saturating_add(u64::from(wait_ms) * 1000);
        loop {
            match self.with(|device, fetcher| self.wait(device, fetcher, requests, end))? {
                Outcome::Done(count) => return Ok(count),
                Outcome::Resting => {
                    // Not for long, and nothing tells of its end that a target could wait for: it may be replaced.
                    let left = end.saturating_sub(now_us()) / 1000;
                    // CAST: At most 50.
                    crate::dm::sleep_ms(left.min(50) as u32)?;
                    if left == 0 {
                        return Ok(0);
                    }
                }
            }
        }
    }

    fn wait(
        self,
        device: &Pristine,
        fetcher: &Fetcher,
        requests: &mut [abi::Request],
        end: u64,
    ) -> Result<Outcome<usize>> {
        let generation = device.stats.generation.load(Relaxed);
        let mut desk = fetcher.desk.lock();
        loop {
            if desk.helper != Some(self.helper) {
                return Err(Errno::Shutdown.into());
            }
            if !desk.open {
                return Ok(Outcome::Resting);
            }
            let mut count = 0;
            for slot in requests.iter_mut() {
                let Some(flight) = desk.flights.take(self.helper) else {
                    break;
                };
                *slot = abi::Request {
                    id: flight.id,
                    first: flight.run.start,
                    // CAST: At most `MAX_FETCH` bytes.
                    blocks: flight.run.len() as u32,
                    flags: if flight.ahead { abi::AHEAD } else { 0 },
                    generation,
                };
                count += 1;
            }
            let left = end.saturating_sub(now_us()) / 1000;
            if count != 0 || left == 0 {
                fetcher.figures.requests.add(count as u64, Relaxed); // CAST: usize to u64.
                return Ok(Outcome::Done(count));
            }
            // CAST: At most `MAX_WAIT_MS`.
            let jiffies = msecs_to_jiffies(left as u32).max(1);
            match fetcher
                .requested
                .wait_interruptible_timeout(&mut desk, jiffies)
            {
                CondVarTimeoutResult::Signal { .. } => {
                    // What it was woken for is another's.
                    fetcher.requested.notify_one();
                    return Err(EINTR);
                }
                CondVarTimeoutResult::Woken { .. } | CondVarTimeoutResult::Timeout => {}
            }
        }
    }

    /// Answers a request.
    pub(super) fn answer(self, args: &abi::AnswerArgs) -> Result {
        let outcome = self.with(|device, fetcher| {
            if args.error != 0 {
                return device.answer_error(fetcher, self.helper, args.id);
            }
            device.answer_data(fetcher, self.helper, args)
        })?;
        match outcome {
            Outcome::Done(()) => Ok(()),
            Outcome::Resting => Err(EAGAIN),
        }
    }

    /// Stores an offer of the helper's where it is of use; returns how many blocks it made valid.
    pub(super) fn hydrate(self, args: &abi::HydrateArgs) -> Result<u64> {
        match self.with(|device, fetcher| device.hydrate(fetcher, args))? {
            Outcome::Done(taken) => Ok(taken),
            Outcome::Resting => Err(EAGAIN),
        }
    }
}

/// Copies `bytes` bytes from the helper's memory into the front of a buffer.
fn copy_in(buffer: &mut Buffer, address: u64, bytes: usize) -> Result {
    let user = UserSlice::new(UserPtr::from_addr(usize::try_from(address)?), bytes);
    let to = buffer.bytes().get_mut(..bytes).ok_or(EINVAL)?;
    user.reader().read_slice(to)
}

impl Pristine {
    fn answer_error(&self, fetcher: &Fetcher, helper: u64, id: u64) -> Result<Outcome<()>> {
        let flight = {
            let mut desk = fetcher.desk.lock();
            if !desk.open {
                return Ok(Outcome::Resting);
            }
            if !desk.flights.is_taken(id, helper) {
                return Err(ENOENT);
            }
            desk.flights.end(id).ok_or(ENOENT)?
        };
        fetcher.figures.errors.add(1, Relaxed);
        self.fail_waiters(fetcher, flight);
        self.route_crowd(fetcher);
        Ok(Outcome::Done(()))
    }

    fn answer_data(
        &self,
        fetcher: &Fetcher,
        helper: u64,
        args: &abi::AnswerArgs,
    ) -> Result<Outcome<()>> {
        let shift = self.geometry.block_shift();
        let (run, since) = {
            let mut desk = fetcher.desk.lock();
            if !desk.open {
                return Ok(Outcome::Resting);
            }
            let run = desk.flights.find_run(args.id).ok_or(ENOENT)?;
            let blocks = if args.flags & abi::ZEROES != 0 {
                run.len()
            } else if args.bytes & (self.geometry.block_size() - 1) == 0 {
                args.bytes.wrapping_shr(shift)
            } else {
                0
            };
            let since = desk.flights.since(args.id).unwrap_or(0);
            match desk.flights.answer(args.id, helper, blocks) {
                Ok(run) => (run, since),
                Err(Refused::Unknown) => return Err(ENOENT),
                Err(Refused::Length(_)) => return Err(EINVAL),
            }
        };
        let bytes = usize::try_from(run.len().wrapping_shl(shift))?;
        let prepared = fetcher
            .buffer(bytes.div_ceil(PAGE_SIZE))
            .and_then(|mut buffer| {
                if args.flags & abi::ZEROES == 0 {
                    copy_in(&mut buffer, args.data, bytes)?;
                } else if let Some(to) = buffer.bytes().get_mut(..bytes) {
                    to.fill(0);
                }
                Ok(buffer)
            });
        let mut buffer = match prepared {
            Ok(buffer) => buffer,
            Err(e) => {
                let mut desk = fetcher.desk.lock();
                desk.flights.unanswer(args.id, helper);
                // It may have lost the device meanwhile; then the request is for the next one.
                if desk.helper != Some(helper) {
                    desk.flights.give_back(Some(helper));
                }
                drop(desk);
                fetcher.stored.notify_all();
                fetcher.requested.notify_all();
                return Err(e);
            }
        };
        self.serve(fetcher, args.id, run, &mut buffer);
        let took = now_us().saturating_sub(since);
        fetcher.figures.fetched.add(run.len(), Relaxed);
        fetcher.figures.latency_us.add(took, Relaxed);
        if fetcher.figures.latency_max_us.load(Relaxed) < took {
            fetcher.figures.latency_max_us.store(took, Relaxed);
        }
        let stored = self.store(run, &mut buffer, 0);
        self.end_store(fetcher, args.id, stored.is_ok());
        fetcher.give_back(buffer);
        stored.map(Outcome::Done)
    }

    /// Completes the reads that wait for flight `id` and lie in its blocks from the data in `buffer`.
    fn serve(&self, fetcher: &Fetcher, id: u64, run: Run, buffer: &mut Buffer) {
        let mut waiters = {
            let mut desk = fetcher.desk.lock();
            desk.flights.waiters_of(id).map(BioList::take)
        }
        .unwrap_or_default();
        let mut others = BioList::new();
        let sectors = self.geometry.block_size() >> 9;
        let (start, end) = (run.start * sectors, run.end * sectors);
        while let Some(mut bio) = waiters.pop() {
            let (first, last) = (bio.sector(), bio.sector().saturating_add(bio.sectors()));
            let data = (!bio.is_change() && start <= first && last <= end)
                .then(|| {
                    let from = usize::try_from((first - start) << 9).ok()?;
                    let to = usize::try_from((last - start) << 9).ok()?;
                    buffer.bytes().get(from..to)
                })
                .flatten();
            match data {
                Some(data) if bio.fill(data) => bio.complete(Ok(())),
                _ => others.push(bio),
            }
        }
        if others.is_empty() {
            return;
        }
        let mut desk = fetcher.desk.lock();
        match desk.flights.waiters_of(id) {
            Some(waiters) => {
                others.append(waiters.take());
                *waiters = others;
            }
            // It has not ended: this is the one that ends it.
            None => desk.crowd.append(others),
        }
    }

    /// Writes the blocks of `run` from byte `from` of `buffer` on to the data device; what lies past its end is left out.
    fn store(&self, run: Run, buffer: &mut Buffer, from: usize) -> Result {
        let sectors = self.geometry.block_size() >> 9;
        let start = run.start * sectors;
        let end = (run.end * sectors).min(self.geometry.sectors());
        let bytes = usize::try_from(end.saturating_sub(start))? * SECTOR;
        self.meta.write_data(start, buffer, from..from + bytes)
    }

    fn hydrate(&self, fetcher: &Fetcher, args: &abi::HydrateArgs) -> Result<Outcome<u64>> {
        let shift = self.geometry.block_shift();
        let run = args
            .run(self.geometry.blocks(), shift)
            .map_err(super::control::refuse)?;
        let zeroes = args.flags & abi::ZEROES != 0;
        let mut buffer = None;
        if !zeroes && fetcher.map.any_stale(run.start, run.end - 1) {
            let bytes = usize::try_from(run.len().wrapping_shl(shift))?;
            let mut fresh = fetcher.buffer(bytes.div_ceil(PAGE_SIZE))?;
            copy_in(&mut fresh, args.data, bytes)?;
            buffer = Some(fresh);
        }
        let mut taken = 0;
        let mut outcome = None;
        let mut result = Ok(());
        let mut rest = run;
        while result.is_ok() {
            let offer = {
                let mut desk = fetcher.desk.lock();
                if !desk.open {
                    outcome = Some(Ok(Outcome::Resting));
                    break;
                }
                desk.flights
                    .offer(rest, |run| fetcher.map.next(run), now_us())
            };
            let (id, part) = match offer {
                Ok(Some(offer)) => offer,
                Ok(None) => break,
                // More threads than there are slots; the helper may offer the blocks again.
                Err(Full) => {
                    outcome = Some(Err(EAGAIN));
                    break;
                }
            };
            rest.start = part.end;
            result = match &mut buffer {
                Some(buffer) => {
                    let from = (part.start - run.start).wrapping_shl(shift);
                    usize::try_from(from)
                        .map_err(Error::from)
                        .and_then(|from| self.store(part, buffer, from))
                }
                None if zeroes => self.store_zeroes(part),
                // They were valid when it was looked, and are not stale again.
                None => Err(EINVAL),
            };
            taken += self.end_store(fetcher, id, result.is_ok());
        }
        if let Some(buffer) = buffer {
            fetcher.give_back(buffer);
        }
        fetcher.figures.hydrated.add(taken, Relaxed);
        outcome.unwrap_or_else(|| result.map(|()| Outcome::Done(taken)))
    }

    fn store_zeroes(&self, run: Run) -> Result {
        let sectors = self.geometry.block_size() >> 9;
        let start = run.start * sectors;
        let end = (run.end * sectors).min(self.geometry.sectors());
        self.meta.zero_data(start, end.saturating_sub(start))
    }
}
