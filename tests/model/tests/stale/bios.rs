// SPDX-License-Identifier: GPL-2.0

//! Bios: the ways that they take, as `rust/target/route.rs` has them, and their answers.

use pristine_model::memory::{Array, Number};
use pristine_shared::flights::Way;
use pristine_shared::geometry::Geometry;
use pristine_shared::log::Entry;

use super::*;

impl Model {
    /// A device of which the blocks of these masks are stale, and dirty.
    pub(super) fn new(without: Without, stale: u16, dirty: u16) -> Self {
        let blocks = |mask: u16| -> BTreeSet<u64> {
            let set = (0..HALVES / 2).filter(|i| mask & 1 << i != 0);
            set.map(|i| FIRST + i as u64).collect()
        };
        let (stale, dirty) = (blocks(stale), blocks(dirty & !stale));
        let content = |half| match block_of(half) {
            // What the last session left there.
            block if stale.contains(&block) => 500 + half as u64,
            block if dirty.contains(&block) => 700 + half as u64,
            _ => first_master(half),
        };
        let content: Vec<_> = (0..HALVES).map(content).collect();
        let device = Device {
            durable: content.clone(),
            cache: content,
            pending: Vec::new(),
            tokens: 0,
            clock: 0,
            master: (0..HALVES).map(first_master).collect(),
        };
        Self::load(without, device, stale, dirty)
    }

    /// A device that is activated.
    pub(super) fn load(
        without: Without,
        device: Device,
        stale: BTreeSet<u64>,
        dirty: BTreeSet<u64>,
    ) -> Self {
        let geometry = Geometry::new(BLOCKS * 8, 12, 14).unwrap();
        let words = |n| Ok::<_, ()>(Array::new(n));
        let map = StaleMap::with(geometry, Number::default, words).unwrap();
        for block in &stale {
            map.recover(Run {
                start: *block,
                end: block + 1,
            });
        }
        map.mark_all_changed(0);
        map.mark_all_changed(1);
        let truth = |half: usize| {
            Truth::new(if stale.contains(&block_of(half)) {
                device.master[half]
            } else {
                device.durable[half]
            })
        };
        let none = Run { start: 0, end: 0 };
        Self {
            without,
            truth: (0..HALVES).map(truth).collect(),
            device,
            meta: Metadata {
                areas: [stale, BTreeSet::new()],
                dirty: dirty.clone(),
                ..Metadata::default()
            },
            map,
            flights: Flights::new((0..SLOTS).map(|_| None).collect()),
            notes: Notes::new(vec![none; NOTES], SLOTS),
            crowd: Vec::new(),
            advanced: false,
            dirty,
            hot: BTreeSet::new(),
            deferred: Vec::new(),
            io: Vec::new(),
            ended: Vec::new(),
            job: None,
            checkpoint: None,
            begun: 0,
            done: 0,
            wanted: false,
            helper: 1,
            held: Vec::new(),
            lost: Vec::new(),
            now: 0,
            bios: 0,
            open: BTreeSet::new(),
        }
    }

    // Bios come.

    pub(super) fn begin(&mut self, op: Op, halves: Range<usize>, fua: bool) {
        if op == Op::Write
            && self.truth[halves.clone()]
                .iter()
                .any(|t| t.flying.is_some())
        {
            // What two writes at once leave is nobody's business.
            return;
        }
        self.bios += 1;
        let bio = Bio {
            id: self.bios,
            op,
            halves,
            fua,
            tag: Tag::None,
            promise: self.truth.iter().map(|t| t.acknowledged).collect(),
        };
        self.open.insert(bio.id);
        match op {
            Op::Flush => return self.map_flush(bio),
            Op::Write => {
                for half in bio.halves.clone() {
                    self.truth[half].flying = Some(value_of(&bio));
                }
            }
            Op::Read => {}
        }
        let (run, _) = bio.span();
        let (first, last, is_change) = (run.start, run.end - 1, op == Op::Write);
        let plain = !self.map.any_stale(first, last)
            && (!is_change || !self.map.any_unsettled(first, last));
        assert!(plain || !self.map.is_plain(first, last, is_change));
        match plain {
            true if is_change => self.admit_or_defer(bio, run),
            true => self.io.push(Io::Read(bio)),
            false => self.route(bio),
        }
    }

    pub(super) fn map_flush(&mut self, mut bio: Bio) {
        if !self.notes.is_empty() {
            let end = match self.without {
                Without::Seal => self.notes.end(),
                _ => self.notes.seal(),
            };
            bio.tag = Tag::Flush(end);
            if self.without == Without::Record {
                let runs = self.notes.until(end).iter();
                self.meta.log.extend(runs.map(|run| Entry::Valid(*run)));
            }
        }
        let point = self.device.clock;
        self.io.push(Io::Flush { bio, point });
    }

    pub(super) fn route(&mut self, mut bio: Bio) {
        let (run, mut whole) = bio.span();
        if self.without == Without::Edges {
            whole = run;
        }
        let is_change = bio.op == Op::Write;
        let next = |run| self.map.next(run);
        let way = if is_change {
            self.flights.write(run, whole, next, self.now)
        } else {
            self.flights.read(run, next, MOST, false, self.now)
        };
        match way {
            Way::Wait(slot) => return self.flights.waiters(slot).unwrap().push(bio),
            Way::Full => return self.crowd.push(bio),
            Way::Write(id) => {
                if self.notes.len() + SLOTS >= NOTES && self.without != Without::Room {
                    self.flights.end(id);
                    self.crowd.push(bio);
                    self.wanted = true;
                    return;
                }
                bio.tag = Tag::Write(id);
            }
            Way::Free if is_change => {
                let noted = self.map.any_unsettled(run.start, run.end - 1);
                if noted && self.without != Without::Note {
                    if !self.notes.add(run) {
                        self.crowd.push(bio);
                        self.wanted = true;
                        return;
                    }
                    if bio.fua {
                        bio.tag = Tag::Fua;
                    }
                }
            }
            Way::Free => return self.io.push(Io::Read(bio)),
        }
        self.admit_or_defer(bio, run);
    }

    pub(super) fn route_all(&mut self, bios: Vec<Bio>) {
        for bio in bios {
            self.route(bio);
        }
    }

    pub(super) fn route_crowd(&mut self) {
        let crowd = std::mem::take(&mut self.crowd);
        self.route_all(crowd);
    }

    // The data device answers.

    pub(super) fn complete_io(&mut self, i: usize) {
        if self.io.is_empty() {
            return;
        }
        match self.io.remove(i % self.io.len()) {
            Io::Read(bio) => self.answer_read(bio, false),
            Io::Write { bio, token } => {
                if bio.fua {
                    self.device.land_durable(token);
                } else {
                    self.device.land(token);
                }
                for half in bio.halves.clone() {
                    let truth = &mut self.truth[half];
                    truth.history.push(value_of(&bio));
                    truth.flying = None;
                }
                self.come_back(bio);
            }
            Io::Flush { bio, point } => {
                self.device.flush(point);
                self.come_back(bio);
            }
            Io::Store { id, token } => {
                self.device.land(token);
                self.end_store(id, true);
            }
        }
    }

    pub(super) fn come_back(&mut self, bio: Bio) {
        if bio.tag == Tag::None {
            self.answer(bio);
        } else {
            self.ended.push(bio);
        }
    }

    /// A store, or a write to blocks that are all stale, fails. Anything may be there now.
    pub(super) fn fail_io(&mut self, i: usize) {
        if self.io.is_empty() {
            return;
        }
        let i = i % self.io.len();
        match &self.io[i] {
            Io::Store { id, token } => {
                let (id, token) = (*id, *token);
                self.device.land(token);
                self.io.remove(i);
                self.end_store(id, false);
            }
            Io::Write { bio, token } => {
                let (run, whole) = bio.span();
                let Tag::Write(id) = bio.tag else { return };
                if run != whole || self.map.next(run) != Some((true, run)) {
                    return;
                }
                self.device.land(*token);
                let Io::Write { bio, .. } = self.io.remove(i) else {
                    unreachable!()
                };
                self.refuse(bio);
                self.end_write(id, false);
            }
            _ => {}
        }
    }

    pub(super) fn answer_read(&mut self, bio: Bio, is_served: bool) {
        for half in bio.halves.clone() {
            let value = if is_served {
                self.device.master[half]
            } else {
                self.device.cache[half]
            };
            assert_eq!(
                value,
                self.truth[half].now(),
                "a read returns the wrong content"
            );
        }
        self.answer(bio);
    }

    pub(super) fn answer(&mut self, bio: Bio) {
        assert!(self.open.remove(&bio.id), "a bio is answered twice");
        if bio.op == Op::Flush {
            for (truth, promise) in self.truth.iter_mut().zip(&bio.promise) {
                truth.promised = truth.promised.max(*promise);
            }
        }
        if bio.op == Op::Write {
            let value = value_of(&bio);
            for half in bio.halves {
                let truth = &mut self.truth[half];
                let at = truth.history.iter().position(|v| *v == value).unwrap();
                truth.acknowledged = truth.acknowledged.max(at);
                if bio.fua {
                    truth.promised = truth.promised.max(at);
                }
            }
        }
    }

    /// Answers with an error.
    pub(super) fn refuse(&mut self, bio: Bio) {
        assert!(self.open.remove(&bio.id), "a bio is answered twice");
        if bio.op == Op::Write {
            for half in bio.halves {
                self.truth[half].flying = None;
            }
        }
    }
}
