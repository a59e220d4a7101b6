// SPDX-License-Identifier: GPL-2.0

//! Writes that wait for the committer.

use super::{job, Pristine};
use crate::dm::{give_way, now_us, Bio, BioList};
use crate::shared::patience::Patience;

/// What waits. Guarded by `Pristine::pending`.
pub(super) struct Pending {
    bios: BioList,
    /// Bios that came so far, for the statistics; and when the last were taken.
    came: u64,
    taken: u64,
    /// The commit job is due or at work, and will look again. To queue it once more would run it once more, for nothing.
    busy: bool,
    patience: Patience,
}

impl Pending {
    /// Nothing waits.
    pub(super) const fn new() -> Self {
        Self {
            bios: BioList::new(),
            came: 0,
            taken: 0,
            busy: false,
            patience: Patience::new(),
        }
    }

    /// Bios that came so far.
    pub(super) fn came(&self) -> u64 {
        self.came
    }
}

impl Pristine {
    /// Lets a write wait for its intent.
    pub(super) fn defer(&self, bio: Bio) {
        let was_busy = {
            let mut pending = self.pending.lock();
            pending.bios.push(bio);
            pending.came = pending.came.wrapping_add(1);
            core::mem::replace(&mut pending.busy, true)
        };
        if !was_busy {
            self.jobs.now(job::COMMIT);
        }
    }

    /// Takes all that wait, for the commit job. Once it has got nothing, it is to end: the next write starts it again.
    pub(super) fn take_pending(&self) -> BioList {
        self.give_way();
        let mut pending = self.pending.lock();
        pending.taken = pending.came;
        let bios = pending.bios.take();
        pending.busy = !bios.is_empty();
        bios
    }

    /// Lets those run who wait for this CPU, if more writes are likely to come of it.
    fn give_way(&self) {
        let before = {
            let mut pending = self.pending.lock();
            let fresh = pending.came.wrapping_sub(pending.taken);
            // Those that were put back wait for nobody.
            let others = fresh == 0 && !pending.bios.is_empty();
            if others || !pending.patience.gives_way(fresh) {
                return;
            }
            pending.came
        };
        let since = now_us();
        if give_way() {
            let us = now_us().saturating_sub(since);
            let mut pending = self.pending.lock();
            let more = pending.came.wrapping_sub(before);
            pending.patience.learn(more, us);
        }
    }

    /// Puts bios in front of those that wait.
    pub(super) fn put_back(&self, mut bios: BioList) {
        if bios.is_empty() {
            return;
        }
        let mut pending = self.pending.lock();
        bios.append(pending.bios.take());
        pending.bios = bios;
    }
}
