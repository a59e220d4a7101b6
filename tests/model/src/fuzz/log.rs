// SPDX-License-Identifier: GPL-2.0

//! Replay of any pages: whole, torn, old and damaged records in any order.

use arbitrary::Arbitrary;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::layout::Placement;
use pristine_shared::superblock::MAX_SEQUENCE;

use super::Strict;
use crate::disk::{fix_crc, Damage, Kind};
use crate::image::{self, LOG_PAGES, META_UUID};
use crate::naive;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A record, or the sectors of it that a power cut let through.
    Record {
        ahead: i8,
        sectors: u8,
        runs: Vec<(u16, u8)>,
    },
    /// The next record in turn, whole.
    Next(u8),
    /// Damage to a page of the ring.
    Damage {
        page: u8,
        damage: Damage,
        good_crc: bool,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    extents: u8,
    log_seq: u32,
    at_the_end: bool,
    steps: Vec<Step>,
}

pub(super) fn run(data: &[u8]) {
    let Some(input) = super::read::<Input>(data) else {
        return;
    };
    let mut image = image::base(Placement::Separate).clone();
    let first = if input.at_the_end {
        MAX_SEQUENCE - u64::from(input.log_seq % 64)
    } else {
        u64::from(input.log_seq).max(1)
    };
    image.sb.root.log_seq = first;
    // Few blocks, so that an input takes little time; the last extent is cut.
    image.sb.geometry = Geometry::new(u64::from(input.extents % 64) * 64 + 24, 12, 15).unwrap();
    let mut next = first;
    for step in &input.steps {
        match step {
            Step::Record {
                ahead,
                sectors,
                runs,
            } => {
                let entries: Vec<_> = runs
                    .iter()
                    .map(|(start, len)| super::entry(*start, *len))
                    .collect();
                let seq = next.wrapping_add_signed(i64::from(*ahead));
                image.write_entries(seq, &entries, *sectors);
            }
            Step::Next(extent) => {
                let start = u64::from(*extent);
                let run = Run {
                    start,
                    end: start + 1,
                };
                image.write_record(next, &[run], 0xff);
                next += 1;
            }
            Step::Damage {
                page,
                damage,
                good_crc,
            } => {
                let at = image.sb.layout.log_start + u64::from(*page) % LOG_PAGES;
                let page = image.meta.page_mut(at);
                damage.apply(page);
                if *good_crc {
                    fix_crc(page, Kind::Log, &META_UUID);
                }
            }
        }
    }
    let blocks = image.sb.geometry.blocks();
    super::agree_on_log(
        &image.meta,
        &image.sb,
        (Strict::new(blocks), naive::no_planes(blocks)),
    );
}
