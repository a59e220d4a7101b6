// SPDX-License-Identifier: GPL-2.0

//! The states that a power cut can leave, from a recording.
//!
//! At any instant the disk holds all that is durable by then, and of each write that was asked for and is not yet durable
//! any choice of sectors. A write becomes durable when it is answered, if it has FUA, or when a flush of its device is that was
//! asked for after the write's own answer. From then on no older write can come over it.

use std::collections::{HashMap, HashSet};

use crate::disk::{self, Disk, State, Undo, SECTOR};
use crate::events::{Change, Event};
use crate::sample::Sampler;
use crate::steps::Steps;
use crate::Random;

/// A write that may have arrived, in part, or not at all.
struct Pending {
    id: u64,
    offset: u64,
    change: Change,
    fua: bool,
    /// It was answered.
    done: bool,
    /// Sectors that something durable lies over.
    covered: HashSet<usize>,
}

impl Pending {
    fn end(&self) -> u64 {
        self.offset + self.change.len() as u64
    }

    /// The mask that stands for all of its sectors; sector `n` is bit `n % 64`.
    fn whole(&self) -> u64 {
        match self.change.len().div_ceil(SECTOR) {
            n if n < 64 => (1 << n) - 1,
            _ => u64::MAX,
        }
    }
}

/// What was tried.
#[derive(Default)]
pub struct Counts {
    /// States, each different from those before.
    pub states: usize,
    /// Those in which a write had arrived in part.
    pub torn: usize,
    /// Those in which a random choice of what was under way had arrived.
    pub subsets: usize,
    /// Those that the kernel recovered too.
    pub sampled: usize,
    /// Those that broke the contract.
    pub wrong: usize,
    /// Most blocks that were dirty without having been touched.
    pub most_over: u64,
    /// Most writes that were under way at once.
    pub most_pending: usize,
    /// Blocks that were stale in the end.
    pub stale_at_end: u64,
    /// States in which blocks were valid that the checkpoint called stale.
    pub told: usize,
    /// Most blocks that had been stale and were clean.
    pub most_fetched: u64,
    /// Writes, and marks that said that something is durable.
    pub writes: usize,
    /// See `writes`.
    pub durable_marks: usize,
}

/// How a state came about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// All that was asked for has arrived, or nothing that was not durable.
    Prefix,
    /// As the first, but the last write in part.
    Torn,
    /// A random choice.
    Subset,
}

/// Walks through a recording.
pub struct Explorer<'a> {
    disk: Disk,
    /// If the workload is these.
    steps: Option<Steps>,
    /// One bit for each block that is allowed to be dirty: it was at the start, or the workload touched it.
    allowed: Vec<u64>,
    /// Most blocks more than these that may be dirty.
    bound: u64,
    subsets: usize,
    random: Random,
    sampler: Option<&'a Sampler>,
    pending: Vec<Pending>,
    /// For each flush under way the writes that it makes durable.
    flushes: HashMap<u64, Vec<u64>>,
    /// What was tried.
    pub counts: Counts,
}

impl<'a> Explorer<'a> {
    /// Starts with `disk`. `touched` are the blocks that the workload ever touches, `hot_limit` the most extents that may
    /// be hot.
    pub fn new(
        mut disk: Disk,
        steps: Option<Steps>,
        touched: &[u64],
        hot_limit: u64,
        subsets: usize,
        random: Random,
        sampler: Option<&'a Sampler>,
    ) -> Result<Self, String> {
        let mut allowed = disk
            .recover()
            .map_err(|e| format!("the disk before the recording: {e}"))?
            .dirty;
        for block in touched {
            let word = usize::try_from(block / 64)
                .ok()
                .and_then(|w| allowed.get_mut(w))
                .ok_or_else(|| format!("an operation on block {block}, past the end"))?;
            *word |= 1 << (block % 64);
        }
        // The hot ones, and as many that a checkpoint under way has just retired.
        let bound = 2 * hot_limit * disk.extent_blocks();
        Ok(Self {
            disk,
            steps,
            allowed,
            bound,
            subsets,
            random,
            sampler,
            pending: Vec::new(),
            flushes: HashMap::new(),
            counts: Counts::default(),
        })
    }

    /// Goes through all events.
    pub fn run(&mut self, events: &[Event]) -> Result<(), String> {
        self.check(Kind::Prefix, false, false, &|| {
            "before the recording".to_owned()
        })?;
        for (at, event) in events.iter().enumerate() {
            let mut moved = true;
            match event {
                Event::Write {
                    id,
                    offset,
                    change,
                    fua,
                } => {
                    self.counts.writes += 1;
                    self.pending.push(Pending {
                        id: *id,
                        offset: *offset,
                        change: change.clone(),
                        fua: *fua,
                        done: false,
                        covered: HashSet::new(),
                    });
                    self.counts.most_pending = self.counts.most_pending.max(self.pending.len());
                }
                Event::Flush { id, offset, len } => {
                    let device = *offset..offset.saturating_add(*len);
                    let answered = (self.pending.iter())
                        .filter(|p| p.done && device.contains(&p.offset))
                        .map(|p| p.id);
                    self.flushes.insert(*id, answered.collect());
                    moved = false;
                }
                Event::Done(id) => moved = self.done(*id)?,
                Event::Mark(text) => self.mark(at, text)?,
            }
            if moved {
                self.states(at, matches!(event, Event::Write { .. }))?;
            }
        }
        Ok(())
    }

    /// A request was answered; whether anything became durable by that.
    fn done(&mut self, id: u64) -> Result<bool, String> {
        if let Some(writes) = self.flushes.remove(&id) {
            let mut moved = false;
            for write in writes {
                moved |= self.settle(write)?;
            }
            return Ok(moved);
        }
        let Some(write) = self.pending.iter_mut().find(|p| p.id == id) else {
            return Err(format!("request {id} was answered, but never made"));
        };
        write.done = true;
        if write.fua {
            return self.settle(id);
        }
        Ok(false)
    }

    /// A write is durable, unless it has been for long.
    fn settle(&mut self, id: u64) -> Result<bool, String> {
        let Some(at) = self.pending.iter().position(|p| p.id == id) else {
            return Ok(false);
        };
        let write = self.pending.remove(at);
        for older in self.pending.iter_mut().take(at) {
            let (first, end) = (write.offset.max(older.offset), write.end().min(older.end()));
            for byte in (first..end).step_by(SECTOR) {
                let sector = (byte - older.offset) / SECTOR as u64;
                older
                    .covered
                    .insert(usize::try_from(sector).map_err(|e| e.to_string())?);
            }
        }
        self.disk
            .apply(write.offset, &write.change, |n| !write.covered.contains(&n))?;
        Ok(true)
    }

    fn mark(&mut self, at: usize, text: &str) -> Result<(), String> {
        let (word, number) = text.split_once(' ').unwrap_or((text, "0"));
        let number = number
            .parse()
            .map_err(|e| format!("the mark {text}: {e}"))?;
        match word {
            "flushed" => self.disk.flushed(number),
            "durable" => self.disk.durable(number),
            // The device was suspended or stopped: the map is exact.
            "step" => match &mut self.steps {
                Some(steps) => steps.reach(number)?,
                None => return Err(format!("the mark {text} without steps")),
            },
            "exact" => self.check(Kind::Prefix, true, false, &|| format!("event {at}, {text}"))?,
            _ => return Err(format!("unknown mark {text}")),
        }
        self.counts.durable_marks += usize::from(word != "exact");
        Ok(())
    }

    /// The states that a power cut after event `at` may leave.
    fn states(&mut self, at: usize, asked: bool) -> Result<(), String> {
        let whole: Vec<_> = self.pending.iter().map(Pending::whole).collect();
        let mut choices = vec![(Kind::Prefix, vec![0; whole.len()])];
        choices.push((Kind::Prefix, whole.clone()));
        if let (true, Some((last, rest))) = (asked, whole.split_last()) {
            let torn = self.random.next() & last;
            choices.push((Kind::Torn, rest.iter().copied().chain([torn]).collect()));
        }
        if !whole.is_empty() {
            for _ in 0..self.subsets {
                choices.push((Kind::Subset, self.choose(&whole)));
            }
        }
        let mut tried = HashSet::new();
        choices.retain(|(_, masks)| tried.insert(masks.clone()));
        // The kernel tries one of them.
        let sampled = match self.sampler {
            Some(sampler) if sampler.wants(at) => self.random.below(choices.len() as u64),
            _ => u64::MAX,
        };
        for (n, (kind, masks)) in choices.iter().enumerate() {
            self.try_state(at, *kind, masks, &whole, n as u64 == sampled)?;
        }
        Ok(())
    }

    /// A random choice of what has arrived: from nearly nothing to nearly all.
    fn choose(&mut self, whole: &[u64]) -> Vec<u64> {
        let arrived = [1, 4, 7].get(self.random.below(3) as usize).copied();
        let mut masks = Vec::new();
        for all in whole {
            let mask = match self.random.below(8) {
                0 | 1 => self.random.next() & all,
                n if n < arrived.unwrap_or(4) => *all,
                _ => 0,
            };
            masks.push(mask);
        }
        masks
    }

    fn try_state(
        &mut self,
        at: usize,
        kind: Kind,
        masks: &[u64],
        whole: &[u64],
        sampled: bool,
    ) -> Result<(), String> {
        let mut undo: Vec<Undo> = Vec::new();
        for (write, mask) in self.pending.iter().zip(masks) {
            if *mask != 0 {
                undo.push(self.disk.apply(write.offset, &write.change, |n| {
                    mask >> (n % 64) & 1 == 1 && !write.covered.contains(&n)
                })?);
            }
        }
        let torn = masks.iter().zip(whole).any(|(m, w)| *m != 0 && m != w);
        self.counts.torn += usize::from(torn);
        self.check(kind, false, sampled, &|| {
            let what = match kind {
                Kind::Prefix => "all or nothing of what was under way",
                Kind::Torn => "the last write torn",
                Kind::Subset => "a subset of what was under way",
            };
            format!("event {at}, {what} ({masks:x?})")
        })?;
        while let Some(last) = undo.pop() {
            self.disk.undo(last);
        }
        Ok(())
    }

    /// Checks the contract in the state at hand.
    fn check(
        &mut self,
        kind: Kind,
        exact: bool,
        sampled: bool,
        what: &dyn Fn() -> String,
    ) -> Result<(), String> {
        self.counts.states += 1;
        self.counts.subsets += usize::from(kind == Kind::Subset);
        let mut verdict = self.verdict(exact);
        if let (Ok(()), Some(sampler), true) = (&verdict, self.sampler, sampled) {
            self.counts.sampled += 1;
            let state = self.disk.recover().map_err(|e| e.to_string())?;
            verdict = sampler.run(&self.disk, &state)?;
        }
        if let Err(why) = verdict {
            self.counts.wrong += 1;
            if self.counts.wrong <= 10 {
                println!("wrong: {}: {why}", what());
            }
        }
        Ok(())
    }

    fn verdict(&mut self, exact: bool) -> Result<(), String> {
        if let Some(steps) = &self.steps {
            return steps.verdict(&mut self.disk);
        }
        let state: State = match self.disk.recover() {
            Ok(state) => state,
            Err(e) => return Err(format!("recovery fails: {e}")),
        };
        if let Some(why) = self.disk.misfit(&state) {
            return Err(why);
        }
        self.counts.told += usize::from(state.told != 0);
        let fetched = self.disk.fetched(&state);
        self.counts.most_fetched = self.counts.most_fetched.max(fetched);
        let over: u64 = (state.dirty)
            .iter()
            .zip(&self.allowed)
            .map(|(dirty, allowed)| u64::from((dirty & !allowed).count_ones()))
            .sum();
        self.counts.most_over = self.counts.most_over.max(over);
        if over > self.bound || exact && over != 0 {
            return Err(format!("{over} blocks too many are dirty"));
        }
        Ok(())
    }

    /// What must hold at the end, when the device was stopped in order: the map is exact.
    pub fn finish(&mut self) -> Result<(), String> {
        self.check(Kind::Prefix, true, false, &|| {
            "after the stop in order".to_owned()
        })?;
        let state = self.disk.recover().map_err(|e| e.to_string())?;
        self.counts.stale_at_end = disk::count(&state.stale);
        if let Some(steps) = &self.steps {
            return match steps.is_over() {
                true => Ok(()),
                false => Err("the recording ends before the last step".to_owned()),
            };
        }
        if state.dirty != self.allowed {
            println!("wrong: after the stop in order the map is not what was written");
            self.counts.wrong += 1;
        }
        if !self.disk.is_changed(&state) {
            return Err(
                "nothing on the disk differs from the master: the recording is empty".to_owned(),
            );
        }
        Ok(())
    }
}
