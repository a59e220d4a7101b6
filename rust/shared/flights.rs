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
mod tests {
    use super::*;
    extern crate std;
    use std::vec::Vec;

    use crate::bits;

    type Table = Flights<Vec<Option<Flight<Vec<u32>>>>>;

    fn table() -> Table {
        Flights::new((0..SLOTS).map(|_| None).collect())
    }

    fn run(start: u64, end: u64) -> Run {
        Run { start, end }
    }

    /// The stale blocks of `plane`, as [`Flights::read`] wants to know them.
    fn plane(words: &[u64]) -> impl Fn(Run) -> Option<(bool, Run)> + '_ {
        |run| bits::next_run(|i| words.get(i).copied().unwrap_or(0), run.start, run.end)
    }

    const ALL: &[u64] = &[u64::MAX; 32];
    const MOST: u64 = 256;

    /// The runs of all flights, in the order of their slots, and how far they are.
    fn flights(table: &Table) -> Vec<(Run, Phase)> {
        table.all().map(|(_, f)| (f.run, f.phase)).collect()
    }

    fn read(table: &mut Table, run: Run) -> Way {
        table.read(run, plane(ALL), MOST, false, 0)
    }

    #[test]
    fn overlapping_reads_share_a_fetch() {
        let mut table = table();
        assert_eq!(read(&mut table, run(10, 20)), Way::Wait(0));
        assert_eq!(read(&mut table, run(10, 20)), Way::Wait(0));
        assert_eq!(read(&mut table, run(19, 20)), Way::Wait(0));
        // What the first does not bring is another fetch, on either side.
        assert_eq!(read(&mut table, run(5, 30)), Way::Wait(1));
        let queued = |start, end| (run(start, end), Phase::Queued);
        assert_eq!(
            flights(&table),
            [queued(10, 20), queued(5, 10), queued(20, 30)]
        );
        table.waiters(0).unwrap().push(7);
        let ended = table.end(1).unwrap();
        assert_eq!((ended.run, ended.waiters), (run(10, 20), [7].to_vec()));
        assert!(table.end(1).is_none());
        assert!(table.waiters(0).is_none());
    }

    #[test]
    fn a_read_is_split_where_blocks_are_valid_and_where_it_is_long() {
        let mut table = table();
        let words = [0xff0f, 0, 1];
        assert_eq!(
            table.read(run(4, 8), plane(&words), MOST, false, 0),
            Way::Free
        );
        assert_eq!(
            table.read(run(2, 2), plane(&words), MOST, false, 0),
            Way::Free
        );
        assert_eq!(
            table.read(run(2, 200), plane(&words), 5, false, 0),
            Way::Wait(0)
        );
        let runs: Vec<_> = flights(&table).iter().map(|(run, _)| *run).collect();
        assert_eq!(runs, [run(2, 4), run(8, 13), run(13, 16), run(128, 129)]);
    }

    #[test]
    fn fetches_leave_slots_to_writes() {
        let mut table = table();
        for n in 0..MAX_FETCHES as u64 {
            assert!(matches!(
                read(&mut table, run(2 * n, 2 * n + 1)),
                Way::Wait(_)
            ));
        }
        assert_eq!(read(&mut table, run(1000, 1001)), Way::Full);
        // One that has a part of it under way waits for that.
        assert_eq!(read(&mut table, run(0, 2)), Way::Wait(0));
        assert_eq!(flights(&table).len(), MAX_FETCHES);
        for n in 0..MAX_FETCHES as u64 {
            let run = run(1000 + n, 1001 + n);
            assert!(matches!(
                table.write(run, run, plane(ALL), 0),
                Way::Write(_)
            ));
        }
        let one = run(2000, 2001);
        assert_eq!(table.write(one, one, plane(ALL), 0), Way::Full);
        assert!(table.offer(one, plane(ALL), 0).is_err());
        // A slot that gets free is used again, under another number.
        assert!(table.end(1).is_some());
        assert_eq!(
            table.write(one, one, plane(ALL), 0),
            Way::Write(SLOTS as u64 + 1)
        );
    }

    #[test]
    fn a_write_waits_for_what_is_under_way() {
        let mut table = table();
        assert_eq!(read(&mut table, run(10, 20)), Way::Wait(0));
        assert_eq!(
            table.write(run(0, 11), run(0, 11), plane(ALL), 0),
            Way::Wait(0)
        );
        assert_eq!(
            table.write(run(0, 10), run(0, 10), plane(ALL), 0),
            Way::Write(2)
        );
        // Reads and writes wait for it in turn, and nothing is fetched for them.
        assert_eq!(read(&mut table, run(3, 10)), Way::Wait(1));
        assert_eq!(
            table.write(run(9, 10), run(9, 10), plane(ALL), 0),
            Way::Wait(1)
        );
        assert_eq!(flights(&table).len(), 2);
    }

    #[test]
    fn a_write_to_valid_blocks_waits_for_nobody() {
        let mut table = table();
        let words = [0xf0];
        assert_eq!(
            table.write(run(4, 8), run(4, 8), plane(&words), 0),
            Way::Write(1)
        );
        assert_eq!(
            table.write(run(0, 4), run(0, 4), plane(&words), 0),
            Way::Free
        );
        assert_eq!(
            table.write(run(8, 9), run(9, 9), plane(&words), 0),
            Way::Free
        );
        // The flight of one that covers both kinds is for all of its blocks.
        assert!(table.end(1).is_some());
        assert_eq!(
            table.write(run(0, 64), run(0, 64), plane(&words), 0),
            Way::Write(2)
        );
        assert_eq!(table.find_run(2), Some(run(0, 64)));
    }

    #[test]
    fn the_edges_of_a_write_are_fetched_one_by_one() {
        let mut table = table();
        let queued = |start, end| (run(start, end), Phase::Queued);
        assert_eq!(
            table.write(run(3, 9), run(4, 8), plane(ALL), 0),
            Way::Wait(0)
        );
        assert_eq!(flights(&table), [queued(3, 4), queued(8, 9)]);
        // They came: now the write itself is under way, edges and all.
        table.end(1);
        table.end(2);
        assert_eq!(
            table.write(run(3, 9), run(4, 8), plane(&[0xf0]), 0),
            Way::Write(3)
        );
        assert_eq!(flights(&table), [(run(3, 9), Phase::Write)]);
        table.end(3);
        // One edge alone, and a write within two blocks, which covers none.
        let whole = run(3, 8);
        assert_eq!(table.write(run(3, 9), whole, plane(ALL), 0), Way::Wait(0));
        assert_eq!(
            table.write(run(20, 22), run(21, 21), plane(ALL), 0),
            Way::Wait(1)
        );
        assert_eq!(
            flights(&table),
            [queued(8, 9), queued(20, 21), queued(21, 22)]
        );
    }

    #[test]
    fn offers_skip_what_is_under_way_or_valid() {
        let mut table = table();
        let words = [0xfff0];
        read(&mut table, run(6, 8));
        table.write(run(9, 10), run(9, 10), plane(ALL), 0);
        let offer = |table: &mut Table, start| table.offer(run(start, 20), plane(&words), 0);
        assert_eq!(offer(&mut table, 0), Ok(Some((3, run(4, 6)))));
        assert_eq!(offer(&mut table, 6), Ok(Some((4, run(8, 9)))));
        assert_eq!(offer(&mut table, 9), Ok(Some((5, run(10, 16)))));
        assert_eq!(offer(&mut table, 0), Ok(None));
        assert!(table.is_storing());
        // Who needs an offered block waits for it.
        assert_eq!(
            table.read(run(4, 5), plane(&words), MOST, false, 0),
            Way::Wait(2)
        );
    }

    #[test]
    fn offers_are_limited() {
        let mut table = table();
        for n in 0..MAX_OFFERS as u64 {
            let offer = table.offer(run(2 * n, 2 * n + 1), plane(ALL), 0);
            assert!(matches!(offer, Ok(Some(_))));
        }
        assert_eq!(table.offer(run(1000, 1001), plane(ALL), 0), Err(Full));
        // An offer of nothing that is stale is no error.
        assert_eq!(table.offer(run(1000, 1001), plane(&[]), 0), Ok(None));
    }

    #[test]
    fn what_somebody_waits_for_is_taken_first_then_what_is_older() {
        let mut table = table();
        let mut ahead = |start, ahead| table.read(run(start, start + 2), plane(ALL), 2, ahead, 0);
        ahead(0, true);
        ahead(10, true);
        ahead(20, false);
        ahead(30, false);
        // Somebody waits for the second now.
        ahead(11, false);
        // That nobody waits for another part of it changes nothing.
        ahead(10, true);
        let order: Vec<_> = core::iter::from_fn(|| table.take(5).map(|f| f.run.start)).collect();
        assert_eq!(order, [10, 20, 30, 12, 0]);
        assert!(flights(&table).iter().all(|(_, p)| *p == Phase::Taken(5)));
    }

    #[test]
    fn what_a_helper_leaves_is_for_the_next_one() {
        let mut table = table();
        read(&mut table, run(0, 1));
        read(&mut table, run(2, 3));
        read(&mut table, run(4, 5));
        assert_eq!(table.take(1).map(|f| f.id), Some(1));
        assert_eq!(table.take(2).map(|f| f.id), Some(2));
        table.give_back(Some(1));
        assert!(!table.is_taken(1, 1) && table.is_taken(2, 2));
        assert_eq!(table.answer(1, 1, 1), Err(Refused::Unknown));
        assert_eq!(table.take(3).map(|f| f.id), Some(1));
        // What is being stored is not given back.
        assert_eq!(table.answer(1, 3, 1), Ok(run(0, 1)));
        table.give_back(None);
        let phases: Vec<_> = flights(&table).iter().map(|(_, p)| *p).collect();
        assert_eq!(phases, [Phase::Storing, Phase::Queued, Phase::Queued]);
    }

    #[test]
    fn answers_that_do_not_fit_are_refused() {
        let mut table = table();
        read(&mut table, run(0, 4));
        let written = run(10, 11);
        table.write(written, written, plane(ALL), 0);
        // Nobody took it; it is another's; it is too short; there is none; it is no fetch.
        assert_eq!(table.answer(1, 1, 4), Err(Refused::Unknown));
        table.take(1);
        assert_eq!(table.answer(1, 2, 4), Err(Refused::Unknown));
        for blocks in [0, 3, 5, u64::MAX] {
            assert_eq!(table.answer(1, 1, blocks), Err(Refused::Length(4)));
        }
        assert_eq!(table.answer(9, 1, 4), Err(Refused::Unknown));
        assert_eq!(table.answer(2, 1, 1), Err(Refused::Unknown));
        assert_eq!(table.answer(1, 1, 4), Ok(run(0, 4)));
        // A second one.
        assert_eq!(table.answer(1, 1, 4), Err(Refused::Unknown));
        // The data could not be read: it may be answered again.
        table.unanswer(1, 1);
        table.unanswer(2, 1);
        assert_eq!(table.answer(1, 1, 4), Ok(run(0, 4)));
        assert_eq!(table.end(1).map(|f| f.run), Some(run(0, 4)));
        assert_eq!(table.answer(1, 1, 4), Err(Refused::Unknown));
    }

    #[test]
    fn only_fetches_that_wait_expire() {
        let mut table = table();
        table.read(run(0, 1), plane(ALL), 1, false, 10);
        table.read(run(1, 2), plane(ALL), 1, false, 20);
        table.read(run(2, 3), plane(ALL), 1, false, 5);
        table.write(run(3, 4), run(3, 4), plane(ALL), 1);
        assert!(matches!(table.offer(run(4, 5), plane(ALL), 1), Ok(Some(_))));
        assert_eq!(table.waiting(), (3, Some(5)));
        // The first is being stored, the second with the helper.
        table.take(1);
        table.take(1);
        assert!(table.answer(1, 1, 1).is_ok());
        assert_eq!(table.waiting(), (2, Some(5)));
        assert!(table.expire(5).is_none());
        assert_eq!(table.expire(20).map(|f| f.id), Some(3));
        assert!(table.expire(20).is_none());
        assert_eq!(table.expire(21).map(|f| f.id), Some(2));
        assert!(table.expire(u64::MAX).is_none());
        assert_eq!(table.waiting(), (0, None));
        // What expired is refused when it comes after all, and may be asked for again.
        assert_eq!(table.answer(2, 1, 1), Err(Refused::Unknown));
        assert!(matches!(read(&mut table, run(1, 2)), Way::Wait(_)));
        assert_eq!(table.since(1), Some(10));
        assert!(table.is_storing());
    }
}
