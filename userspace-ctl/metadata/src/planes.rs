// SPDX-License-Identifier: GPL-2.0

//! The two planes in memory.

use pristine_shared::bits;
use pristine_shared::checkpoint::Plane;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::recovery::Sink;
use pristine_shared::state::BlockState;

/// The state of all blocks of a fresh device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initial {
    /// The data device holds the image already.
    Clean,
    /// Nobody knows what the data device holds; it is the machine's own.
    Dirty,
    /// The data device holds nothing of value: everything is to come from the image.
    #[default]
    Stale,
}

/// Which blocks are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// [`BlockState::Dirty`].
    Dirty,
    /// [`BlockState::Stale`].
    Stale,
    /// [`BlockState::Clean`].
    Clean,
    /// Dirty or stale: what a revert has to write.
    NotClean,
}

/// Dirty and stale bits of all blocks: block `n` is bit `n % 64` of word `n / 64`. Bits past the last block are zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planes {
    /// The dirty plane.
    pub dirty: Vec<u64>,
    /// The stale plane. Its bits outrank those of the dirty plane.
    pub stale: Vec<u64>,
    geometry: Geometry,
    /// One bit for each extent: the log announced it and did not settle it. Empty but during recovery.
    intended: Vec<u64>,
}

impl Planes {
    /// Planes with all blocks in one state.
    pub fn new(geometry: Geometry, initial: Initial) -> Self {
        let words = usize::try_from(bits::words_for(geometry.blocks())).unwrap_or(usize::MAX);
        let mut planes = Self {
            dirty: vec![0; words],
            stale: vec![0; words],
            geometry,
            intended: Vec::new(),
        };
        let all = Run {
            start: 0,
            end: geometry.blocks(),
        };
        match initial {
            Initial::Clean => {}
            Initial::Dirty => planes.set(all, BlockState::Dirty),
            Initial::Stale => planes.set(all, BlockState::Stale),
        }
        planes
    }

    /// The device that they describe.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How many blocks they describe.
    pub fn blocks(&self) -> u64 {
        self.geometry.blocks()
    }

    /// The state of a block; [`BlockState::Clean`] past the end.
    pub fn state(&self, block: u64) -> BlockState {
        let bit = |plane: &[u64]| {
            usize::try_from(block / bits::WORD_BITS)
                .ok()
                .and_then(|i| plane.get(i))
                .is_some_and(|w| (w >> (block % bits::WORD_BITS)) & 1 == 1)
        };
        BlockState::from_bits(bit(&self.dirty), bit(&self.stale))
    }

    /// Puts the blocks of `run`, cut at the end of the device, into `state`.
    pub fn set(&mut self, run: Run, state: BlockState) {
        let run = Run {
            start: run.start,
            end: run.end.min(self.blocks()),
        };
        for (i, mask) in bits::words(run) {
            let (Some(dirty), Some(stale)) = (self.dirty.get_mut(i), self.stale.get_mut(i)) else {
                return;
            };
            *dirty &= !mask;
            *stale &= !mask;
            match state {
                BlockState::Clean => {}
                BlockState::Dirty => *dirty |= mask,
                BlockState::Stale => *stale |= mask,
            }
        }
    }

    /// Makes all dirty blocks stale: an instant revert, once it is committed. Returns how many were dirty.
    pub fn make_stale(&mut self) -> u64 {
        let mut blocks = 0;
        for (dirty, stale) in self.dirty.iter_mut().zip(&mut self.stale) {
            blocks += u64::from((*dirty & !*stale).count_ones());
            *stale |= std::mem::take(dirty);
        }
        blocks
    }

    /// Makes stale what another image changes, a generation's modified list in blocks of `block_bytes`; all, without a list.
    /// What is dirty stays so elsewhere. Together with [`Changes::image`](crate::Changes) it is a change of generation.
    pub fn outdate(&mut self, modified: Option<&[Run]>, block_bytes: u64) {
        let per_block = (self.geometry.block_size() / block_bytes.max(1)).max(1);
        let all = [Run {
            start: 0,
            end: self.blocks().saturating_mul(per_block),
        }];
        for run in modified.unwrap_or(&all) {
            let run = Run {
                start: run.start / per_block,
                end: run.end.div_ceil(per_block),
            };
            self.set(run, BlockState::Stale);
        }
    }

    /// Whether no block is dirty.
    pub(crate) fn is_undirtied(&self) -> bool {
        (0..self.dirty.len()).all(|i| self.word(Select::Dirty, i) == 0)
    }

    /// The word of blocks that `want` selects, as a mask; bits past the end are zero.
    pub fn word(&self, want: Select, i: usize) -> u64 {
        let dirty = self.dirty.get(i).copied().unwrap_or(0);
        let stale = self.stale.get(i).copied().unwrap_or(0);
        match want {
            Select::Dirty => dirty & !stale,
            Select::Stale => stale,
            Select::NotClean => dirty | stale,
            Select::Clean => !(dirty | stale) & self.valid(i),
        }
    }

    fn valid(&self, i: usize) -> u64 {
        let first = (i as u64).saturating_mul(bits::WORD_BITS);
        match self.blocks().saturating_sub(first) {
            0 => 0,
            n if n >= bits::WORD_BITS => u64::MAX,
            n => u64::MAX >> (bits::WORD_BITS - n),
        }
    }

    /// The runs of blocks that `want` selects, in order, each as long as can be.
    pub fn runs(&self, want: Select) -> impl Iterator<Item = Run> + '_ {
        let mut at = 0;
        let limit = self.blocks();
        std::iter::from_fn(move || loop {
            let (selected, run) = bits::next_run(|i| self.word(want, i), at, limit)?;
            at = run.end;
            if selected {
                return Some(run);
            }
        })
    }

    /// How many blocks `want` selects.
    pub fn count(&self, want: Select) -> u64 {
        (0..self.dirty.len())
            .map(|i| u64::from(self.word(want, i).count_ones()))
            .sum()
    }

    /// How many blocks of `run` are dirty and how many are stale.
    pub fn count_in(&self, run: Run) -> (u64, u64) {
        let run = Run {
            start: run.start,
            end: run.end.min(self.blocks()),
        };
        bits::words(run).fold((0, 0), |(dirty, stale), (i, mask)| {
            let ones = |want| u64::from((self.word(want, i) & mask).count_ones());
            (dirty + ones(Select::Dirty), stale + ones(Select::Stale))
        })
    }

    pub(crate) fn plane(&self, plane: Plane) -> &[u64] {
        match plane {
            Plane::Dirty => &self.dirty,
            Plane::Stale => &self.stale,
        }
    }

    pub(crate) fn ones(&self, plane: Plane) -> u64 {
        self.plane(plane)
            .iter()
            .map(|w| u64::from(w.count_ones()))
            .sum()
    }

    fn plane_mut(&mut self, plane: Plane) -> &mut [u64] {
        match plane {
            Plane::Dirty => &mut self.dirty,
            Plane::Stale => &mut self.stale,
        }
    }
}

impl Sink for Planes {
    fn or_word(&mut self, plane: Plane, word: u64, bits: u64) {
        let to = usize::try_from(word)
            .ok()
            .and_then(|i| self.plane_mut(plane).get_mut(i));
        if let Some(to) = to {
            *to |= bits;
        }
    }

    fn set(&mut self, plane: Plane, run: Run) {
        let blocks = self.blocks();
        let plane = self.plane_mut(plane);
        let run = Run {
            start: run.start,
            end: run.end.min(blocks),
        };
        for (i, mask) in bits::words(run) {
            if let Some(to) = plane.get_mut(i) {
                *to |= mask;
            }
        }
    }

    fn intend(&mut self, extents: Run) {
        let words = bits::words_for(self.geometry.extents());
        self.intended
            .resize(usize::try_from(words).unwrap_or(usize::MAX), 0);
        for (i, mask) in bits::words(extents) {
            if let Some(word) = self.intended.get_mut(i) {
                *word |= mask;
            }
        }
    }

    fn settle(&mut self, extents: Run) {
        for (i, mask) in bits::words(extents) {
            if let Some(word) = self.intended.get_mut(i) {
                *word &= !mask;
            }
        }
    }

    fn validate(&mut self, run: Run) {
        for (i, mask) in bits::words(run) {
            if let Some(word) = self.stale.get_mut(i) {
                *word &= !mask;
            }
        }
    }

    fn conclude(&mut self, geometry: &Geometry) {
        let intended = std::mem::take(&mut self.intended);
        let word = |i: usize| intended.get(i).copied().unwrap_or(0);
        let mut at = 0;
        while let Some((is_set, run)) = bits::next_run(word, at, geometry.extents()) {
            if is_set {
                Sink::set(self, Plane::Dirty, geometry.blocks_in(run));
            }
            at = run.end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_and_runs() {
        let geometry = Geometry::new(8 * 200, 12, 20).unwrap();
        let mut planes = Planes::new(geometry, Initial::Stale);
        assert_eq!(planes.count(Select::Stale), 200);
        planes.set(Run { start: 10, end: 70 }, BlockState::Clean);
        planes.set(Run { start: 20, end: 30 }, BlockState::Dirty);
        planes.set(
            Run {
                start: 199,
                end: 1000,
            },
            BlockState::Dirty,
        );
        assert_eq!(planes.count(Select::Dirty), 11);
        assert_eq!(planes.count(Select::Clean), 50);
        assert_eq!(planes.count(Select::NotClean), 150);
        assert_eq!(planes.state(25), BlockState::Dirty);
        assert_eq!(planes.state(199), BlockState::Dirty);
        assert_eq!(planes.state(200), BlockState::Clean);
        let runs: Vec<_> = planes
            .runs(Select::Clean)
            .map(|r| (r.start, r.end))
            .collect();
        assert_eq!(runs, [(10, 20), (30, 70)]);
        let runs: Vec<_> = planes
            .runs(Select::NotClean)
            .map(|r| (r.start, r.end))
            .collect();
        assert_eq!(runs, [(0, 10), (20, 30), (70, 200)]);
        assert_eq!(planes.count_in(Run { start: 5, end: 25 }), (5, 5));
    }

    #[test]
    fn dirty_becomes_stale_whatever_the_rest() {
        let geometry = Geometry::new(8 * 200, 12, 20).unwrap();
        let mut planes = Planes::new(geometry, Initial::Clean);
        let run = |start, end| Run { start, end };
        planes.set(run(10, 70), BlockState::Dirty);
        planes.set(run(60, 80), BlockState::Stale);
        // Recovery may leave both bits.
        planes.dirty[1] |= 1 << 15;
        assert_eq!(planes.make_stale(), 50);
        assert_eq!(
            planes.runs(Select::Stale).collect::<Vec<_>>(),
            [run(10, 80)]
        );
        assert_eq!(planes.count(Select::Clean), 130);
        assert!(planes.dirty.iter().all(|w| *w == 0));
        assert_eq!(planes.make_stale(), 0);
    }

    #[test]
    fn stale_outranks_dirty_in_every_view() {
        let geometry = Geometry::new(8, 12, 20).unwrap();
        let mut planes = Planes::new(geometry, Initial::Stale);
        planes.dirty[0] = 1;
        assert_eq!(planes.count(Select::Dirty), 0);
        assert_eq!(planes.count(Select::Stale), 1);
        assert_eq!(planes.count(Select::NotClean), 1);
    }
}
