// SPDX-License-Identifier: GPL-2.0

//! The jobs: intents, what follows a flush (`rust/target/notes.rs`), and checkpoints (`rust/target/checkpointer.rs`).

use pristine_shared::log::Entry;

use super::*;

impl Model {
    // Write-ahead, the simple way: `tests/model/tests/tracker.rs` has it in full.

    pub(super) fn admit_or_defer(&mut self, bio: Bio, run: Run) {
        if self.cold(run).is_empty() {
            self.dirty.extend(run.start..run.end);
            self.submit(bio);
        } else {
            self.deferred.push(bio);
        }
    }

    pub(super) fn cold(&self, run: Run) -> BTreeSet<u64> {
        let clean = (run.start..run.end).filter(|b| !self.dirty.contains(b));
        let cold = clean.map(|b| b / EXTENT_BLOCKS);
        cold.filter(|e| !self.hot.contains(e)).collect()
    }

    pub(super) fn announce(&mut self, extents: impl IntoIterator<Item = u64>) {
        for start in extents {
            let end = start + 1;
            self.meta.log.push(Entry::Intent(Run { start, end }));
            self.hot.insert(start);
        }
    }

    pub(super) fn commit(&mut self) {
        for bio in std::mem::take(&mut self.deferred) {
            let (run, _) = bio.span();
            let cold = self.cold(run);
            if self.meta.used() + cold.len() + 4 > LOG_ENTRIES {
                self.wanted = true;
                self.deferred.push(bio);
                continue;
            }
            self.announce(cold);
            self.admit_or_defer(bio, run);
        }
    }

    pub(super) fn submit(&mut self, bio: Bio) {
        let value = value_of(&bio);
        let token = self.device.issue(bio.halves.clone(), |_| value);
        self.io.push(Io::Write { bio, token });
    }

    // The job for bios that have come back.

    pub(super) fn run_job(&mut self) {
        let Some(mut job) = self.job.take() else {
            return self.start_job();
        };
        job.stage = match job.stage {
            JobStage::Flush => {
                job.end = self.notes.seal();
                match self.without {
                    Without::FuaFlush => JobStage::Copy,
                    _ => JobStage::Flushing(self.device.clock),
                }
            }
            JobStage::Flushing(point) => {
                self.device.flush(point);
                JobStage::Copy
            }
            JobStage::Copy => {
                let runs = self.notes.until(job.end).to_vec();
                if runs.is_empty() {
                    JobStage::Answer
                } else if self.meta.used() + runs.len() > LOG_ENTRIES {
                    self.wanted = true;
                    JobStage::Checkpoint(self.begun + 1)
                } else {
                    JobStage::Record(runs)
                }
            }
            JobStage::Record(runs) => {
                self.meta.log.extend(runs.into_iter().map(Entry::Valid));
                JobStage::Drop
            }
            JobStage::Drop => {
                self.notes.drop_until(job.end);
                self.route_crowd();
                JobStage::Answer
            }
            JobStage::Checkpoint(number) if self.done < number => {
                self.wanted = true;
                JobStage::Checkpoint(number)
            }
            JobStage::Checkpoint(_) => JobStage::Answer,
            JobStage::Answer => {
                for bio in job.promised {
                    self.answer(bio);
                }
                return;
            }
        };
        self.job = Some(job);
    }

    pub(super) fn start_job(&mut self) {
        let mut job = Job {
            promised: Vec::new(),
            end: 0,
            stage: JobStage::Copy,
        };
        for bio in std::mem::take(&mut self.ended) {
            match bio.tag {
                Tag::Write(id) => self.end_write(id, true),
                Tag::Flush(end) => job.end = job.end.max(end),
                Tag::Fua | Tag::None => {}
            }
            if bio.op == Op::Write && !bio.fua {
                self.answer(bio);
                continue;
            }
            if bio.op == Op::Write {
                job.stage = JobStage::Flush;
            }
            if self.without == Without::Answer {
                self.answer(bio);
            } else {
                job.promised.push(bio);
            }
        }
        if !job.promised.is_empty() || job.end != 0 {
            self.job = Some(job);
        }
    }

    // Checkpoints.

    pub(super) fn run_checkpoint(&mut self, all_cold: bool) {
        let Some(mut cp) = self.checkpoint.take() else {
            self.begun += 1;
            self.wanted = false;
            self.checkpoint = Some(Checkpoint {
                number: self.begun,
                stage: Stage::Retire,
                area: 1 - self.meta.area,
                needed: 0,
                dirty: BTreeSet::new(),
                noted: 0,
                must_flush: false,
                is_changed: false,
            });
            return;
        };
        cp.stage = match cp.stage {
            Stage::Retire => {
                cp.needed = self.meta.log.len();
                let hot = std::mem::take(&mut self.hot);
                if !all_cold && self.meta.used() + hot.len() < LOG_ENTRIES {
                    self.announce(hot);
                }
                Stage::Begin
            }
            Stage::Begin => {
                self.map.begin();
                cp.is_changed = self.map.take_changed(cp.area as u8, 0) & 1 != 0;
                cp.noted = self.notes.seal();
                cp.must_flush = std::mem::take(&mut self.advanced);
                if self.without == Without::Settle {
                    self.map.settle();
                }
                Stage::Dirty
            }
            Stage::Dirty => {
                cp.dirty = self.dirty.clone();
                Stage::Stale
            }
            Stage::Stale => {
                if cp.is_changed {
                    self.meta.areas[cp.area] = self.copy();
                }
                // What became valid meanwhile may be in the copy.
                cp.must_flush |= self.advanced && self.without != Without::SecondLook;
                cp.must_flush &= self.without != Without::DataFlush;
                Stage::Flush
            }
            Stage::Flush if cp.must_flush => Stage::Flushing(self.device.clock),
            Stage::Flush => Stage::Superblock,
            Stage::Flushing(point) => {
                self.device.flush(point);
                Stage::Superblock
            }
            Stage::Superblock => {
                self.meta.area = cp.area;
                self.meta.dirty = std::mem::take(&mut cp.dirty);
                self.meta.needed = cp.needed;
                Stage::Settle
            }
            Stage::Settle => {
                self.map.settle();
                Stage::Drop
            }
            Stage::Drop => {
                self.notes.drop_until(cp.noted);
                self.done = cp.number;
                return self.route_crowd();
            }
        };
        self.checkpoint = Some(cp);
    }

    pub(super) fn copy(&self) -> BTreeSet<u64> {
        let mut bytes = [0; 16];
        self.map.copy_to(0, &mut bytes);
        let word = |i: usize| u64::from_le_bytes(bytes[i * 8..][..8].try_into().unwrap());
        (0..BLOCKS)
            .filter(|b| word((b / 64) as usize) >> (b % 64) & 1 == 1)
            .collect()
    }
}
