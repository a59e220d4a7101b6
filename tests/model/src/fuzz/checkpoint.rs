// SPDX-License-Identifier: GPL-2.0

//! Index and plane pages, as the encoders write them and as they never would.

use arbitrary::Arbitrary;
use pristine_shared::checkpoint::{self, PageState, Place};
use pristine_shared::geometry::Geometry;
use pristine_shared::layout::{Layout, Placement};

use crate::disk::{fix_crc, Damage, Disk, Kind};
use crate::image::{self, LOG_PAGES, META_UUID};
use crate::naive;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Content {
    Zero,
    Ones,
    /// Stored: this pattern in every word, written by a checkpoint so much older.
    Stored(u64, i8),
}

#[derive(Arbitrary, Debug)]
struct Input {
    sectors: u32,
    block_shift: u8,
    seq: u16,
    second_area: bool,
    contents: Vec<Content>,
    /// Cut the patterns at the end of the device, as a writer would.
    cut: bool,
    damage: Vec<(u8, Damage, bool)>,
    true_counts: bool,
    counts: [u16; 2],
}

pub(super) fn run(data: &[u8]) {
    let Some(input) = super::read::<Input>(data) else {
        return;
    };
    // Up to three plane pages for each plane.
    let shift = 12 + u32::from(input.block_shift) % 9;
    let sectors = (u64::from(input.sectors) % (3 * 32512 * 8) + 1) << (shift - 12);
    let Ok(geometry) = Geometry::new(sectors, shift, 20.max(shift)) else {
        return;
    };
    let pages = Layout::total_pages(&geometry, LOG_PAGES);
    let layout = Layout::new(Placement::Separate, &geometry, pages, LOG_PAGES).unwrap();
    let mut disk = Disk::new(pages);
    let mut sb = image::base(Placement::Separate).sb;
    sb.geometry = geometry;
    sb.layout = layout;
    sb.root.area = input.second_area.into();
    sb.root.seq = u64::from(input.seq).max(1);

    let start = layout.area_start[usize::from(input.second_area)];
    let per_plane = checkpoint::plane_pages(&geometry);
    let content = |n: u64| {
        let content = input.contents.get(n as usize).copied();
        content.unwrap_or(Content::Zero)
    };
    let place = |n: u64, seq: u64| Place {
        meta_uuid: &META_UUID,
        area: sb.root.area,
        seq,
        index: n as u32,
    };
    for n in 0..checkpoint::index_pages(&geometry) {
        checkpoint::encode_index(disk.page_mut(start + n), &place(n, sb.root.seq), |page| {
            match content(page) {
                Content::Zero => PageState::Zero,
                Content::Ones => PageState::Ones,
                Content::Stored(..) => PageState::Stored,
            }
        });
    }
    for n in 0..per_plane * 2 {
        let Content::Stored(pattern, older) = content(n) else {
            continue;
        };
        let seq = sb.root.seq.wrapping_add_signed(-i64::from(older));
        let at = start + checkpoint::index_pages(&geometry) + n;
        checkpoint::encode_plane(disk.page_mut(at), &place(n, seq), |i| {
            let mask = if input.cut {
                checkpoint::valid_mask(&geometry, n % per_plane, i)
            } else {
                u64::MAX
            };
            pattern.rotate_left(i as u32) & mask
        });
    }
    for (n, damage, good_crc) in &input.damage {
        let page = disk.page_mut(start + u64::from(*n) % layout.area_pages);
        damage.apply(page);
        if *good_crc {
            fix_crc(page, Kind::Checkpoint, &META_UUID);
        }
    }
    let counts = input.counts.map(u64::from);
    [sb.root.dirty_blocks, sb.root.stale_blocks] = if input.true_counts {
        naive::uncounted_planes(&disk, &sb).map_or(counts, |planes| naive::counts(&planes))
    } else {
        counts
    };
    super::agree_on_planes(&disk, &sb);
}
