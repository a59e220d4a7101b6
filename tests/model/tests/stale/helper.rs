// SPDX-License-Identifier: GPL-2.0

//! Flights: what the helper does, as `rust/target/channel.rs` has it, and how they end.

use pristine_shared::flights::Refused;

use super::disk::halves_of;
use super::*;

impl Model {
    // Flights end.

    pub(super) fn end_write(&mut self, id: u64, good: bool) {
        let flight = self.flights.end(id).unwrap();
        if good {
            self.map.validate(flight.run);
            self.advanced = true;
            let _ = self.notes.add_promised(flight.run);
        }
        let crowd = std::mem::take(&mut self.crowd);
        self.wanted |= self.notes.is_filling_up();
        self.route_all(flight.waiters);
        self.route_all(crowd);
    }

    pub(super) fn end_store(&mut self, id: u64, good: bool) {
        let flight = self.flights.end(id).unwrap();
        if good {
            self.map.validate(flight.run);
            self.advanced = true;
            self.route_all(flight.waiters);
        } else {
            self.fail_waiters(flight);
        }
        self.route_crowd();
    }

    pub(super) fn fail_waiters(&mut self, flight: Flight<Vec<Bio>>) {
        for bio in flight.waiters {
            let (run, whole) = bio.span();
            let needed = Run {
                start: flight.run.start.max(run.start),
                end: flight.run.end.min(run.end),
            };
            let needed = match self.without {
                Without::Cover => flight.run,
                _ => needed,
            };
            let covered = whole.start <= needed.start && needed.end <= whole.end;
            if bio.op == Op::Write && covered {
                self.route(bio);
            } else {
                let needs_fetch = bio.op == Op::Read || run != whole;
                assert!(needs_fetch, "a write that needs no fetch fails with one");
                self.refuse(bio);
            }
        }
    }

    // The helper.

    pub(super) fn take(&mut self) {
        if let Some(flight) = self.flights.take(self.helper) {
            assert!(flight.run.len() <= MOST);
            self.held.push((flight.id, flight.run));
        }
    }

    /// Takes one of the requests that the helper has out of its hands.
    pub(super) fn pick(&mut self, i: usize) -> Option<(u64, Run)> {
        let i = i.checked_rem(self.held.len())?;
        Some(self.held.remove(i))
    }

    pub(super) fn answer_data(&mut self, i: usize) {
        let Some((id, run)) = self.pick(i) else {
            return;
        };
        match self.flights.answer(id, self.helper, run.len()) {
            Ok(found) => assert_eq!(found, run),
            // It took too long.
            Err(e) => return assert_eq!((e, self.flights.find_run(id)), (Refused::Unknown, None)),
        }
        let waiters = std::mem::take(self.flights.waiters_of(id).unwrap());
        let halves = halves_of(run);
        for bio in waiters {
            let within = halves.start <= bio.halves.start && bio.halves.end <= halves.end;
            if bio.op == Op::Read && within {
                self.answer_read(bio, true);
            } else {
                self.flights.waiters_of(id).unwrap().push(bio);
            }
        }
        self.store(id, run);
    }

    pub(super) fn store(&mut self, id: u64, run: Run) {
        let master = self.device.master.clone();
        self.store_as(id, run, &master);
        if self.without == Without::Store {
            self.map.validate(run);
            self.advanced = true;
        }
    }

    fn store_as(&mut self, id: u64, run: Run, master: &[u64]) {
        let token = self.device.issue(halves_of(run), |half| master[half]);
        self.io.push(Io::Store { id, token });
    }

    pub(super) fn answer_wrongly(&mut self, i: usize, blocks: u64) {
        let Some((id, run)) = i.checked_rem(self.held.len()).map(|i| self.held[i]) else {
            return;
        };
        if self.flights.is_taken(id, self.helper) && run.len() != blocks {
            let refused = self.flights.answer(id, self.helper, blocks);
            assert_eq!(refused, Err(Refused::Length(run.len())));
        }
    }

    /// The data of an answer cannot be read.
    pub(super) fn answer_unreadably(&mut self, i: usize) {
        let Some((id, run)) = i.checked_rem(self.held.len()).map(|i| self.held[i]) else {
            return;
        };
        if self.flights.is_taken(id, self.helper) {
            assert_eq!(self.flights.answer(id, self.helper, run.len()), Ok(run));
            self.flights.unanswer(id, self.helper);
            assert!(self.flights.is_taken(id, self.helper));
        }
    }

    pub(super) fn answer_error(&mut self, i: usize) {
        let Some((id, _)) = self.pick(i) else { return };
        if self.flights.is_taken(id, self.helper) {
            let flight = self.flights.end(id).unwrap();
            self.fail_waiters(flight);
            self.route_crowd();
        }
    }

    pub(super) fn die(&mut self) {
        self.flights.give_back(Some(self.helper));
        let held = std::mem::take(&mut self.held);
        let master = &self.device.master;
        let lost = held.iter();
        let lost = lost.map(|(id, run)| (self.helper, *id, *run, master.clone()));
        self.lost.extend(lost);
        self.helper += 1;
    }

    /// A helper that is none any more answers.
    pub(super) fn answer_late(&mut self, i: usize) {
        if let Some(i) = i.checked_rem(self.lost.len()) {
            let (helper, id, run, master) = self.lost[i].clone();
            let refused = self.flights.answer(id, helper, run.len());
            if self.without == Without::Session && refused == Ok(run) {
                return self.store_as(id, run, &master);
            }
            assert_eq!(refused, Err(Refused::Unknown));
        }
    }

    pub(super) fn offer(&mut self, run: Run) {
        let next = |run| self.map.next(run);
        if let Ok(Some((id, part))) = self.flights.offer(run, next, self.now) {
            self.store(id, part);
        }
    }

    pub(super) fn expire(&mut self) {
        while let Some(flight) = self.flights.expire(self.now.saturating_sub(40)) {
            self.fail_waiters(flight);
            self.route_crowd();
        }
    }
}
