// SPDX-License-Identifier: GPL-2.0

//! The log's writer and replay against a list of what was announced: any sequence of records, around the ring and
//! around again, with torn records, old ones in their place, and damage.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use pristine_model::image::{self, Image, LOG_PAGES};
use pristine_model::{sink_intents, Intents};
use pristine_shared::checkpoint::Plane;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::layout::Placement;
use pristine_shared::recovery::{self, LogEnd, Sink};
use pristine_shared::superblock::MAX_SEQUENCE;
use pristine_shared::PAGE_SIZE;
use proptest::collection::vec;
use proptest::prelude::*;

const EXTENT_BLOCKS: u64 = 8;
const EXTENTS: u64 = 64;

/// Extents as pairs of start and length.
type Runs = Vec<(u64, u64)>;

#[derive(Clone, Debug)]
enum Step {
    /// A record with these extents, acknowledged.
    Commit(Runs),
    /// A checkpoint makes all records superfluous.
    Checkpoint,
    /// A cut while a record is written: these sectors of it arrive.
    Crash(Runs, u8),
}

fn runs() -> impl Strategy<Value = Runs> {
    let run = (0..EXTENTS).prop_flat_map(|start| (Just(start), 1..=(EXTENTS - start).min(9)));
    prop_oneof![4 => vec(run.clone(), 0..5), 1 => vec(run, 60..140)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => runs().prop_map(Step::Commit),
        1 => Just(Step::Checkpoint),
        2 => (runs(), any::<u8>()).prop_map(|(runs, sectors)| Step::Crash(runs, sectors)),
        1 => runs().prop_map(|runs| Step::Crash(runs, 0xff)),
    ]
}

fn first_sequence() -> impl Strategy<Value = u64> {
    prop_oneof![1..40u64, MAX_SEQUENCE - 400..MAX_SEQUENCE - 300]
}

fn to_runs(runs: &Runs) -> Vec<Run> {
    let run = |&(start, len): &(u64, u64)| Run {
        start,
        end: start + len,
    };
    runs.iter().map(run).collect()
}

/// The blocks that were set, one by one.
#[derive(Default)]
struct Blocks {
    dirty: BTreeSet<u64>,
    intents: Intents,
}

impl Sink for Blocks {
    fn or_word(&mut self, _: Plane, _: u64, _: u64) {
        panic!("replay knows runs alone");
    }

    fn set(&mut self, plane: Plane, run: Run) {
        assert_eq!(plane, Plane::Dirty);
        self.dirty.extend(run.start..run.end);
    }

    fn validate(&mut self, run: Run) {
        panic!("nothing is stale, so {run:?} cannot become valid");
    }

    sink_intents!();
}

/// The sectors of a record that hold its entries, and the one that ends it.
fn needed(runs: &Runs) -> u16 {
    (1 << (runs.len().div_ceil(62) + 1).min(8)) - 1
}

/// A log and what was announced in it.
struct Model {
    image: Image,
    next: u64,
    announced: Vec<Runs>,
}

impl Model {
    fn new(first: u64) -> Self {
        let mut image = image::base(Placement::Separate).clone();
        // The last extent is cut short.
        let sectors = (EXTENTS * EXTENT_BLOCKS - 3) * 8;
        image.sb.geometry = Geometry::new(sectors, 12, 15).unwrap();
        for n in 0..LOG_PAGES {
            *image.meta.page_mut(image.sb.layout.log_start + n) = [0; PAGE_SIZE];
        }
        image.sb.root.log_seq = first;
        Self {
            image,
            next: first,
            announced: Vec::new(),
        }
    }

    fn checkpoint(&mut self) {
        self.image.sb.root.log_seq = self.next;
        self.announced.clear();
    }

    fn commit(&mut self, runs: &Runs) {
        if self.announced.len() as u64 == LOG_PAGES {
            self.checkpoint();
        }
        self.image.write_record(self.next, &to_runs(runs), 0xff);
        self.announced.push(runs.clone());
        self.next += 1;
    }

    fn blocks(&self) -> BTreeSet<u64> {
        let extents = self.announced.iter().flatten();
        extents
            .flat_map(|(start, len)| start * EXTENT_BLOCKS..(start + len) * EXTENT_BLOCKS)
            .filter(|block| *block < self.image.sb.geometry.blocks())
            .collect()
    }

    fn replay(&self) -> pristine_shared::Result<(LogEnd, BTreeSet<u64>)> {
        let mut blocks = Blocks::default();
        let mut meta = self.image.meta.clone();
        let end = recovery::replay(&mut meta, &self.image.sb, &mut [0; PAGE_SIZE], &mut blocks)?;
        Ok((end, blocks.dirty))
    }
}

proptest! {
    #![proptest_config(common::cases(60))]

    #[test]
    fn replay_finds_what_was_announced(first in first_sequence(), steps in vec(step(), 0..48)) {
        let mut model = Model::new(first);
        for step in &steps {
            let mut whole = true;
            match step {
                Step::Commit(runs) => model.commit(runs),
                Step::Checkpoint => model.checkpoint(),
                Step::Crash(runs, sectors) => {
                    if model.announced.len() as u64 == LOG_PAGES {
                        model.checkpoint();
                    }
                    model.image.write_record(model.next, &to_runs(runs), *sectors);
                    whole = u16::from(*sectors) & needed(runs) == needed(runs);
                    if whole {
                        // It was never acknowledged, but it is whole.
                        model.announced.push(runs.clone());
                        model.next += 1;
                    }
                }
            }
            let (end, blocks) = model.replay().unwrap();
            prop_assert_eq!(blocks, model.blocks());
            prop_assert_eq!(end.records, model.announced.len() as u64);
            prop_assert!(!(whole && end.torn));
            // The number of a torn record is never used again.
            prop_assert_eq!(end.next_seq, model.next + 1);
            if matches!(step, Step::Crash(..)) {
                model.next = end.next_seq;
                model.checkpoint();
            }
        }
    }

    /// A record that is not the last cannot be missing after a crash: if it is, recovery says so.
    #[test]
    fn a_lost_record_is_noticed(
        first in first_sequence(),
        before in vec(runs(), 0..40),
        records in vec(runs(), 2..16),
        lost in any::<prop::sample::Index>(),
        sectors in any::<u8>(),
    ) {
        let mut model = Model::new(first);
        before.iter().for_each(|runs| model.commit(runs));
        model.checkpoint();
        let (log_seq, old) = (model.next, model.image.meta.clone());
        records.iter().for_each(|runs| model.commit(runs));
        let seq = log_seq + lost.index(records.len() - 1) as u64;
        let at = model.image.sb.layout.log_page(seq);
        // What the ring held there before, but for some sectors that arrived.
        let new = *model.image.meta.page(at).unwrap();
        *model.image.meta.page_mut(at) = *old.page(at).unwrap();
        model.image.meta.write_sectors(at, &new, sectors);
        let lost = &records[(seq - log_seq) as usize];
        if u16::from(sectors) & needed(lost) == needed(lost) {
            // Nothing that counts is lost.
            prop_assert_eq!(model.replay().unwrap().1, model.blocks());
        } else {
            prop_assert!(model.replay().is_err());
        }
    }

    /// One wrong bit anywhere in a record that counts is an error, never the end of the log. Behind its end it is nothing.
    #[test]
    fn a_flipped_bit_is_noticed(
        first in first_sequence(),
        records in vec(runs(), 1..16),
        hit in any::<prop::sample::Index>(),
        bit in 0..PAGE_SIZE * 8,
    ) {
        let mut model = Model::new(first);
        records.iter().for_each(|runs| model.commit(runs));
        let hit = hit.index(records.len());
        // One without entries announces nothing, so nothing is lost with it.
        prop_assume!(!records[hit].is_empty());
        let at = model.image.sb.layout.log_page(first + hit as u64);
        model.image.meta.page_mut(at)[bit / 8] ^= 1 << (bit % 8);
        if (needed(&records[hit]) >> (bit / 8 / 512)) & 1 == 1 {
            prop_assert!(model.replay().is_err());
        } else {
            prop_assert_eq!(model.replay().unwrap().1, model.blocks());
        }
    }
}
