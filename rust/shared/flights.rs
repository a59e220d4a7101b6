// SPDX-License-Identifier: GPL-2.0

//! What is under way on stale blocks, and who waits for it.
//!
//! A *flight* is a run of blocks that somebody is about to make valid: a fetch that the helper is asked for, an offer of the
//! helper's that is being stored, or a write that covers its blocks as a whole. Flights never overlap, so no two of
//! them write to the same block, and whoever needs a block that is in flight waits for that flight's end.
//!
//! The table has a fixed number of slots and needs no memory later. Fetches may take only a part of them: writes get
//! on, even when no helper ever answers.

use core::ops::DerefMut;

use super::geometry::Run;

/// Slots of a table.
pub const SLOTS: usize = 256;
/// Most fetches at once.
pub const MAX_FETCHES: usize = SLOTS / 2;
/// Most offers at once.
pub const MAX_OFFERS: usize = SLOTS / 4;

/// How far a flight has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A fetch that no helper has taken yet.
    Queued,
    /// A fetch that this helper has taken.
    Taken(u64),
    /// A fetch whose answer is being stored.
    Storing,
    /// Blocks that the helper offered are being stored.
    Offered,
    /// A write.
    Write,
}

impl Phase {
    /// Whether it is a fetch that waits for its answer.
    fn is_waiting(self) -> bool {
        matches!(self, Self::Queued | Self::Taken(_))
    }

    /// Whether the target itself is writing.
    fn is_storing(self) -> bool {
        matches!(self, Self::Storing | Self::Offered)
    }
}

/// One flight.
#[derive(Debug)]
pub struct Flight<W> {
    /// Its number, never used again.
    pub id: u64,
    /// The blocks.
    pub run: Run,
    /// How far it has come.
    pub phase: Phase,
    /// Nobody waits for it yet (read-ahead).
    pub ahead: bool,
    /// When it began, in microseconds of the caller's clock.
    pub since: u64,
    /// Who waits for its end.
    pub waiters: W,
}

/// What a read has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing: the blocks are valid.
    Free,
    /// To wait for the flight in this slot, then to ask again.
    Wait(usize),
    /// To wait until any flight ends, then to ask again.
    Full,
    /// For a write: to go on, and to end the flight with this number when it has.
    Write(u64),
}

/// Why an answer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No fetch with this number waits for an answer of this helper.
    Unknown,
    /// It is for so many blocks.
    Length(u64),
}

/// Too many offers are under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The table. `S` holds [`SLOTS`] slots, all `None` to start with.
#[derive(Debug)]
pub struct Flights<S> {
    slots: S,
    last_id: u64,
}

impl<S, W: Default> Flights<S>
where
    S: DerefMut<Target = [Option<Flight<W>>]>,
{
    /// A table without flights.
    pub fn new(slots: S) -> Self {
        Self { slots, last_id: 0 }
    }

    fn all<'a>(&'a self) -> impl Iterator<Item = (usize, &'a Flight<W>)>
    where
        W: 'a,
    {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(i, slot)| slot.as_ref().map(|flight| (i, flight)))
    }

    fn overlapping(&self, run: Run) -> Option<(usize, &Flight<W>)> {
        self.all()
            .find(|(_, f)| f.run.start < run.end && run.start < f.run.end)
    }

    fn count(&self, kind: impl Fn(Phase) -> bool) -> usize {
        self.all().filter(|(_, f)| kind(f.phase)).count()
    }

    fn add(&mut self, run: Run, phase: Phase, ahead: bool, now: u64) -> Option<usize> {
        let (slot, place) = self
            .slots
            .iter_mut()
            .enumerate()
            .find(|(_, place)| place.is_none())?;
        self.last_id += 1;
        *place = Some(Flight {
            id: self.last_id,
            run,
            phase,
            ahead,
            since: now,
            waiters: W::default(),
        });
        Some(slot)
    }

    /// Who waits for the flight in `slot`.
    pub fn waiters(&mut self, slot: usize) -> Option<&mut W> {
        let flight = self.slots.get_mut(slot)?.as_mut()?;
        Some(&mut flight.waiters)
    }

    /// Sees to it that all stale blocks of `run` are in flight; `next` gives the first run of equal blocks in a run and
    /// whether they are stale. Fetches are for at most `most` blocks each.
    pub fn read(
        &mut self,
        run: Run,
        next: impl Fn(Run) -> Option<(bool, Run)>,
        most: u64,
        ahead: bool,
        now: u64,
    ) -> Way {
        let mut first = None;
        let mut at = run;
        while let Some((is_stale, part)) = next(at) {
            at.start = part.end;
            let mut rest = part;
            while is_stale && !rest.is_empty() {
                // The flight that holds the first block, or where the next one begins.
                let end = match self.overlapping(Run {
                    start: rest.start,
                    end: rest.start + 1,
                }) {
                    Some((slot, flight)) => {
                        let end = flight.run.end;
                        first.get_or_insert(slot);
                        if let Some(Some(flight)) = self.slots.get_mut(slot) {
                            flight.ahead &= ahead;
                        }
                        end
                    }
                    None => {
                        let others = self.all().map(|(_, f)| f.run.start);
                        let free = others.filter(|s| *s > rest.start).min();
                        let new = Run {
                            start: rest.start,
                            end: rest
                                .end
                                .min(free.unwrap_or(u64::MAX))
                                .min(rest.start.saturating_add(most)),
                        };
                        let fetches = self.count(|p| p.is_waiting() || p == Phase::Storing);
                        let slot = if fetches < MAX_FETCHES {
                            self.add(new, Phase::Queued, ahead, now)
                        } else {
                            None
                        };
                        let Some(slot) = slot else {
                            return first.map_or(Way::Full, Way::Wait);
                        };
                        first.get_or_insert(slot);
                        new.end
                    }
                };
                rest.start = end.min(rest.end);
            }
        }
        first.map_or(Way::Free, Way::Wait)
    }

    /// The same for a write to the blocks of `run`, of which it covers those of `whole`: stale blocks that it covers in
    /// part must be fetched first; then, if any is stale, the write itself is a flight.
    pub fn write(
        &mut self,
        run: Run,
        whole: Run,
        next: impl Fn(Run) -> Option<(bool, Run)>,
        now: u64,
    ) -> Way {
        let is_stale = |part: Run| match next(part) {
            Some((true, _)) => true,
            // The first run is valid; if it is not all, a stale one follows.
            Some((false, valid)) => valid.end < part.end,
            None => false,
        };
        if !is_stale(run) {
            return Way::Free;
        }
        if let Some((slot, _)) = self.overlapping(run) {
            if let Some(Some(flight)) = self.slots.get_mut(slot) {
                flight.ahead = false;
            }
            return Way::Wait(slot);
        }
        let edges = if whole.is_empty() {
            [run, Run { start: 0, end: 0 }]
        } else {
            [
                Run {
                    start: run.start,
                    end: whole.start,
                },
                Run {
                    start: whole.end,
                    end: run.end,
                },
            ]
        };
        let mut first = Way::Free;
        for edge in edges {
            match self.read(edge, &next, 1, false, now) {
                Way::Free => {}
                way if first == Way::Free => first = way,
                _ => {}
            }
        }
        if first != Way::Free {
            return first;
        }
        let slot = self.add(run, Phase::Write, false, now);
        let flight = slot.and_then(|slot| self.slots.get(slot)?.as_ref());
        flight.map_or(Way::Full, |flight| Way::Write(flight.id))
    }

    /// The first part of `run` that is stale and not in flight becomes an offer of the helper's: its number and blocks.
    ///
    /// # Errors
    ///
    /// [`Full`].
    pub fn offer(
        &mut self,
        run: Run,
        next: impl Fn(Run) -> Option<(bool, Run)>,
        now: u64,
    ) -> Result<Option<(u64, Run)>, Full> {
        let mut at = run;
        while let Some((is_stale, part)) = next(at) {
            at.start = part.end;
            if !is_stale {
                continue;
            }
            let mut rest = part;
            while !rest.is_empty() {
                let first = Run {
                    start: rest.start,
                    end: rest.start + 1,
                };
                if let Some((_, flight)) = self.overlapping(first) {
                    rest.start = flight.run.end.min(rest.end);
                    continue;
                }
                let others = self.all().map(|(_, f)| f.run.start);
                let free = others.filter(|s| *s > rest.start).min();
                let new = Run {
                    start: rest.start,
                    end: rest.end.min(free.unwrap_or(u64::MAX)),
                };
                if self.count(|p| p == Phase::Offered) >= MAX_OFFERS {
                    return Err(Full);
                }
                let slot = self.add(new, Phase::Offered, false, now).ok_or(Full)?;
                let flight = self.slots.get(slot).and_then(Option::as_ref);
                return Ok(flight.map(|flight| (flight.id, new)));
            }
        }
        Ok(None)
    }

    /// The next request for helper `owner`, which it has taken then: those that somebody waits for before others, older
    /// ones first.
    pub fn take(&mut self, owner: u64) -> Option<&Flight<W>> {
        let (slot, _) = self
            .all()
            .filter(|(_, f)| f.phase == Phase::Queued)
            .min_by_key(|(_, f)| (f.ahead, f.id))?;
        let flight = self.slots.get_mut(slot)?.as_mut()?;
        flight.phase = Phase::Taken(owner);
        Some(flight)
    }

    /// Gives requests that helper `owner` has taken and not answered back to the queue; all, with `None`.
    pub fn give_back(&mut self, owner: Option<u64>) {
        for flight in self.slots.iter_mut().flatten() {
            if let Phase::Taken(by) = flight.phase {
                if owner.is_none_or(|owner| owner == by) {
                    flight.phase = Phase::Queued;
                }
            }
        }
    }

    fn find(&mut self, id: u64) -> Option<&mut Option<Flight<W>>> {
        self.slots
            .iter_mut()
            .find(|slot| slot.as_ref().is_some_and(|f| f.id == id))
    }

    /// Helper `owner` answers request `id` with so many blocks: their run. The request is being stored from here on, and
    /// no other answer is taken.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing has changed.
    pub fn answer(&mut self, id: u64, owner: u64, blocks: u64) -> Result<Run, Refused> {
        let flight = self
            .find(id)
            .and_then(Option::as_mut)
            .filter(|f| f.phase == Phase::Taken(owner))
            .ok_or(Refused::Unknown)?;
        if flight.run.len() != blocks {
            return Err(Refused::Length(flight.run.len()));
        }
        flight.phase = Phase::Storing;
        Ok(flight.run)
    }

    /// Puts a request whose answer could not be used back to where it was.
    pub fn unanswer(&mut self, id: u64, owner: u64) {
        if let Some(Some(flight)) = self.find(id) {
            if flight.phase == Phase::Storing {
                flight.phase = Phase::Taken(owner);
            }
        }
    }

    /// The blocks of flight `id`.
    pub fn find_run(&mut self, id: u64) -> Option<Run> {
        self.find(id)?.as_ref().map(|flight| flight.run)
    }

    /// When flight `id` began.
    pub fn since(&mut self, id: u64) -> Option<u64> {
        self.find(id)?.as_ref().map(|flight| flight.since)
    }

    /// Whether helper `owner` has taken request `id` and not answered it.
    pub fn is_taken(&mut self, id: u64, owner: u64) -> bool {
        matches!(self.find(id), Some(Some(f)) if f.phase == Phase::Taken(owner))
    }

    /// Who waits for flight `id` so far.
    pub fn waiters_of(&mut self, id: u64) -> Option<&mut W> {
        self.find(id)?.as_mut().map(|flight| &mut flight.waiters)
    }

    /// Ends flight `id`.
    pub fn end(&mut self, id: u64) -> Option<Flight<W>> {
        self.find(id)?.take()
    }

    /// Ends a fetch that waits and began before `time`.
    pub fn expire(&mut self, time: u64) -> Option<Flight<W>> {
        self.slots
            .iter_mut()
            .find(|slot| {
                slot.as_ref()
                    .is_some_and(|f| f.phase.is_waiting() && f.since < time)
            })?
            .take()
    }

    /// Fetches that wait for their answer, and when the oldest began.
    pub fn waiting(&self) -> (u64, Option<u64>) {
        let waiting = self.all().filter(|(_, f)| f.phase.is_waiting());
        waiting.fold((0, None), |(n, oldest), (_, f)| {
            let since = oldest.map_or(f.since, |o: u64| o.min(f.since));
            (n + 1, Some(since))
        })
    }

    /// Whether the target itself is writing.
    pub fn is_storing(&self) -> bool {
        self.all().any(|(_, f)| f.phase.is_storing())
    }
}

#[cfg(test)]
mod tests;
