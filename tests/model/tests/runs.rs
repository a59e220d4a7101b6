// SPDX-License-Identifier: GPL-2.0

//! The arithmetic of runs, bits and geometry against counting on one's fingers.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use pristine_shared::bits::{next_run, words, words_for};
use pristine_shared::checkpoint::{self, BITS_PER_PAGE};
use pristine_shared::geometry::{Geometry, Run};
use proptest::prelude::*;

fn geometry() -> impl Strategy<Value = Geometry> {
    (1..200_000u64, 12..=16u32, 0..=4u32)
        .prop_map(|(sectors, block, extent)| Geometry::new(sectors, block, block + extent).unwrap())
}

/// The units that hold at least one of `items`, each unit so many items long.
fn covering(items: impl Iterator<Item = u64>, unit: u64) -> BTreeSet<u64> {
    items.map(|item| item / unit).collect()
}

fn set(run: Run) -> BTreeSet<u64> {
    (run.start..run.end).collect()
}

proptest! {
    #![proptest_config(common::cases(400))]

    #[test]
    fn words_hold_the_bits_of_a_run(start in 0..1000u64, len in 0..700u64) {
        let run = Run { start, end: start + len };
        let mut bits = BTreeSet::new();
        let mut last = None;
        for (word, mask) in words(run) {
            prop_assert!(mask != 0 && last < Some(word), "in order, and none in vain");
            last = Some(word);
            bits.extend((0..64).filter(|i| mask & (1 << i) != 0).map(|i| word as u64 * 64 + i));
        }
        prop_assert_eq!(bits, set(run));
    }

    /// Also where no array reaches.
    #[test]
    fn words_end_at_the_last_number(start in u64::MAX - 300..=u64::MAX, len in 0..300u64) {
        let run = Run { start, end: start.saturating_add(len) };
        let bits: u32 = words(run).map(|(_, mask)| mask.count_ones()).sum();
        prop_assert_eq!(u64::from(bits), run.len());
    }

    #[test]
    fn runs_are_what_one_reads(plane in prop::collection::vec(
        prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), any::<u64>().prop_map(|n| n & n << 7)], 0..12),
        cut in 0..64u64, from in 0..100u64,
    ) {
        let limit = (plane.len() as u64 * 64).saturating_sub(cut);
        let bit = |n: u64| plane[n as usize / 64] >> (n % 64) & 1 == 1;
        let mut at = from;
        while let Some((value, run)) = next_run(|i| plane.get(i).copied().unwrap_or(0), at, limit) {
            prop_assert_eq!(run.start, at);
            prop_assert!(run.end > at && run.end <= limit);
            prop_assert!((run.start..run.end).all(|n| bit(n) == value));
            prop_assert!(run.end == limit || bit(run.end) != value, "the run ends too early");
            at = run.end;
        }
        prop_assert!(at >= limit);
    }

    #[test]
    fn geometry_counts(g in geometry(), start in any::<prop::sample::Index>(), count in 0..3000u64) {
        let per_block = g.block_size() / 512;
        let per_extent = g.extent_size() / g.block_size();
        prop_assert_eq!(g.blocks(), g.sectors().div_ceil(per_block));
        prop_assert_eq!(g.extents(), g.blocks().div_ceil(per_extent));
        prop_assert_eq!(g.blocks_per_extent(), per_extent);
        prop_assert_eq!(words_for(g.blocks()), g.blocks().div_ceil(64));

        let sector = start.index(g.sectors() as usize) as u64;
        let sectors = sector..(sector + count).min(g.sectors());
        let blocks = g.blocks_of(sector, count);
        prop_assert_eq!(set(blocks), covering(sectors, per_block));
        let extents = g.extents_of(blocks);
        prop_assert_eq!(set(extents), covering(blocks.start..blocks.end, per_extent));
        for extent in extents.start..extents.end {
            let whole = set(g.blocks_of_extent(extent));
            let naive = extent * per_extent..((extent + 1) * per_extent).min(g.blocks());
            prop_assert_eq!(whole, naive.collect());
        }
        if !extents.is_empty() {
            let whole = g.blocks_in(extents);
            prop_assert!(whole.start <= blocks.start && blocks.end <= whole.end && whole.end <= g.blocks());
        }
    }

    /// No number from anywhere makes arithmetic go round.
    #[test]
    fn geometry_takes_any_number(
        g in geometry(),
        a in prop_oneof![any::<u64>(), u64::MAX - 9..=u64::MAX],
        b in prop_oneof![any::<u64>(), u64::MAX - 9..=u64::MAX],
    ) {
        let blocks = g.blocks_of(a, b);
        prop_assert!(blocks.is_empty() || blocks.end <= g.blocks());
        let whole = g.blocks_in(Run { start: a, end: b });
        prop_assert!(whole.start <= g.blocks() && whole.end <= g.blocks());
        prop_assert!(g.blocks_of_extent(a).end <= g.blocks());
        let _ = g.extents_of(Run { start: a, end: b });
        let _ = checkpoint::pages_of(Run { start: a, end: b });
        prop_assert!(checkpoint::blocks_in_page(&g, a).end <= g.blocks());
    }

    #[test]
    fn plane_pages_share_out_the_blocks(blocks in 1..4 * BITS_PER_PAGE) {
        let g = Geometry::new(blocks * 8, 12, 20).unwrap();
        let mut next = 0;
        for page in 0..checkpoint::plane_pages(&g) {
            let run = checkpoint::blocks_in_page(&g, page);
            prop_assert_eq!(run.start, next);
            next = run.end;
            let masks = (0..checkpoint::PAGE_WORDS).map(|i| checkpoint::valid_mask(&g, page, i));
            prop_assert_eq!(masks.map(|m| u64::from(m.count_ones())).sum::<u64>(), run.len());
        }
        prop_assert_eq!(next, blocks);
    }
}
