// SPDX-License-Identifier: GPL-2.0

//! Checkpoints, the log and recovery against a set of blocks: any sequence of writes and checkpoints, cut anywhere,
//! with what was not flushed arriving in part and in sectors, and the device used again after each cut.
//!
//! The session below does what the kernel target does, in the order that its checkpointer's comment gives, with the
//! shared encoders; the crash lane does the same with the real target.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use pristine_model::disk::Disk;
use pristine_model::image::META_UUID;
use pristine_model::{image, naive, sink_intents, Intents};
use pristine_shared::checkpoint::{self, PageState, Place, Plane};
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::layout::{Layout, Placement};
use pristine_shared::log::{Entry, Writer};
use pristine_shared::recovery::{self, Sink};
use pristine_shared::superblock::Superblock;
use pristine_shared::{Page, PAGE_SIZE};
use proptest::collection::vec;
use proptest::prelude::*;

const LOG_PAGES: u64 = 16;
const EXTENT_BLOCKS: u64 = 32;

#[derive(Clone, Debug)]
enum Step {
    /// A write: where it starts, as a fraction of the device, and how many blocks.
    Write(u16, u8),
    /// A checkpoint that retires the hot extents whose number has one of these bits.
    Checkpoint(u8),
}

/// What reaches the devices, in order.
enum Event {
    /// A page of metadata. Without FUA it may be lost until the next barrier.
    Meta { at: u64, page: Box<Page>, fua: bool },
    /// A flush.
    Barrier,
    /// Blocks of the data device change.
    Data(Run),
    /// An announcement was made of these extents; from here they may be recovered as dirty.
    Announce(Run),
}

/// A device that is active.
struct Session {
    sb: Superblock,
    dirty: BTreeSet<u64>,
    hot: BTreeSet<u64>,
    next_seq: u64,
    /// What each area holds of each page of the dirty plane, as far as that is known.
    areas: [Vec<Option<Vec<u64>>>; 2],
    events: Vec<Event>,
}

impl Session {
    fn extent(&self, n: u64) -> Run {
        Run {
            start: n,
            end: n + 1,
        }
    }

    fn announce(&mut self, extents: &[u64]) {
        if extents.is_empty() {
            return;
        }
        let mut page = Box::new([0; PAGE_SIZE]);
        let mut writer = Writer::new(&mut page);
        for extent in extents {
            assert!(writer.push(Entry::Intent(self.extent(*extent))));
            self.events.push(Event::Announce(self.extent(*extent)));
        }
        writer.finish(&META_UUID, self.next_seq);
        let at = self.sb.layout.log_page(self.next_seq);
        let fua = true;
        self.events.push(Event::Meta { at, page, fua });
        self.next_seq += 1;
    }

    fn write(&mut self, run: Run) {
        if self.next_seq - self.sb.root.log_seq + 2 >= LOG_PAGES {
            self.checkpoint(0xff);
        }
        let blocks: BTreeSet<u64> = (run.start..run.end).collect();
        let cold: BTreeSet<u64> = blocks
            .difference(&self.dirty)
            .map(|block| block / EXTENT_BLOCKS)
            .filter(|extent| !self.hot.contains(extent))
            .collect();
        self.announce(&cold.iter().copied().collect::<Vec<_>>());
        self.hot.extend(&cold);
        self.dirty.extend(&blocks);
        self.events.push(Event::Data(run));
    }

    fn words(&self, page: u64) -> Vec<u64> {
        let mut words = vec![0; checkpoint::PAGE_WORDS];
        let blocks = checkpoint::blocks_in_page(&self.sb.geometry, page);
        for block in self.dirty.range(blocks.start..blocks.end) {
            let bit = block - blocks.start;
            words[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        words
    }

    fn checkpoint(&mut self, retire: u8) {
        let g = self.sb.geometry;
        self.hot.retain(|extent| retire & (1 << (extent % 8)) == 0);
        let mut sb = self.sb;
        sb.sequence += 1;
        sb.root.area = 1 - sb.root.area;
        sb.root.seq += 1;
        sb.root.log_seq = self.next_seq;
        sb.root.dirty_blocks = self.dirty.len() as u64;
        self.announce(&self.hot.iter().copied().collect::<Vec<_>>());

        let area = usize::from(sb.root.area);
        let start = sb.layout.area_start[area];
        let index_pages = checkpoint::index_pages(&g);
        let place = |index: u64| Place {
            meta_uuid: &META_UUID,
            area: sb.root.area,
            seq: sb.root.seq,
            index: index as u32,
        };
        let mut states = Vec::new();
        for n in 0..checkpoint::plane_pages(&g) {
            let words = self.words(n);
            let set: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
            states.push(match set {
                0 => PageState::Zero,
                all if all == checkpoint::blocks_in_page(&g, n).len() => PageState::Ones,
                _ => PageState::Stored,
            });
            if states.last() == Some(&PageState::Stored)
                && self.areas[area][n as usize].as_ref() != Some(&words)
            {
                let mut page = Box::new([0; PAGE_SIZE]);
                checkpoint::encode_plane(&mut page, &place(n), |i| words[i]);
                let at = start + index_pages + n;
                let fua = false;
                self.events.push(Event::Meta { at, page, fua });
                self.areas[area][n as usize] = Some(words);
            }
        }
        let mut page = Box::new([0; PAGE_SIZE]);
        checkpoint::encode_index(&mut page, &place(0), |n| {
            states.get(n as usize).copied().unwrap_or(PageState::Zero)
        });
        let (at, fua) = (start, false);
        self.events.push(Event::Meta { at, page, fua });
        self.events.push(Event::Barrier);
        for copy in [0, 1] {
            let mut page = Box::new([0; PAGE_SIZE]);
            sb.encode(&mut page);
            let at = Placement::Separate.anchor(copy, u64::MAX).unwrap();
            let fua = true;
            self.events.push(Event::Meta { at, page, fua });
        }
        self.sb = sb;
    }
}

/// What recovery finds.
#[derive(Default)]
struct Found {
    dirty: BTreeSet<u64>,
    stale: BTreeSet<u64>,
    intents: Intents,
}

impl Found {
    fn plane(&mut self, plane: Plane) -> &mut BTreeSet<u64> {
        match plane {
            Plane::Dirty => &mut self.dirty,
            Plane::Stale => &mut self.stale,
        }
    }
}

impl Sink for Found {
    fn or_word(&mut self, plane: Plane, word: u64, bits: u64) {
        let set = (0..64).filter(|i| bits & (1 << i) != 0);
        self.plane(plane).extend(set.map(|i| word * 64 + i));
    }

    fn set(&mut self, plane: Plane, run: Run) {
        self.plane(plane).extend(run.start..run.end);
    }

    fn validate(&mut self, run: Run) {
        self.stale.retain(|b| *b < run.start || *b >= run.end);
    }

    sink_intents!();
}

fn recover(disk: &Disk) -> pristine_shared::Result<(Superblock, Found, u64)> {
    let mut disk = disk.clone();
    let (mut index, mut buffer) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let pages = disk.len();
    let sb = recovery::load_superblock(&mut disk, Placement::Separate, pages, &mut buffer)?;
    let mut found = Found::default();
    recovery::load_planes(&mut disk, &sb, &mut index, &mut buffer, &mut found)?;
    let end = recovery::replay(&mut disk, &sb, &mut buffer, &mut found)?;
    // The naive recovery says the same.
    let mut planes = naive::planes(&disk, &sb).unwrap();
    naive::add(&mut planes, &sb, &naive::log(&disk, &sb).unwrap());
    let dirty = |block: &u64| planes[0][(block / 8) as usize] & (1 << (block % 8)) != 0;
    assert!(found.dirty.iter().all(dirty));
    assert_eq!(naive::counts(&planes)[0], found.dirty.len() as u64);
    Ok((sb, found, end.next_seq))
}

fn activate(disk: &Disk) -> pristine_shared::Result<Session> {
    let (sb, found, next_seq) = recover(disk)?;
    let pages = checkpoint::plane_pages(&sb.geometry) as usize;
    let mut session = Session {
        sb,
        dirty: found.dirty,
        hot: BTreeSet::new(),
        next_seq,
        areas: [vec![None; pages], vec![None; pages]],
        events: Vec::new(),
    };
    // The number of a torn record is never used again: this moves the log's beginning past it.
    session.checkpoint(0xff);
    Ok(session)
}

fn format(blocks: u64) -> Disk {
    let geometry = Geometry::new(blocks * 8, 12, 17).unwrap();
    let pages = Layout::total_pages(&geometry, LOG_PAGES);
    let mut sb = image::base(Placement::Separate).sb;
    sb.geometry = geometry;
    sb.layout = Layout::new(Placement::Separate, &geometry, pages, LOG_PAGES).unwrap();
    sb.data_sectors = (blocks + 1) * 8;
    sb.image_bytes = 0;
    (sb.root.area, sb.root.seq, sb.root.log_seq) = (0, 1, 1);
    (sb.root.dirty_blocks, sb.root.stale_blocks) = (0, 0);
    let mut disk = Disk::new(pages);
    let place = Place {
        meta_uuid: &META_UUID,
        area: 0,
        seq: 1,
        index: 0,
    };
    let index = disk.page_mut(sb.layout.area_start[0]);
    checkpoint::encode_index(index, &place, |_| PageState::Zero);
    for copy in [0, 1] {
        let at = Placement::Separate.anchor(copy, pages).unwrap();
        sb.encode(disk.page_mut(at));
    }
    disk
}

/// A session's steps, where it is cut, and what decides of each unflushed write how much of it arrives.
type Life = (Vec<Step>, prop::sample::Index, Vec<u8>);

fn life() -> impl Strategy<Value = Life> {
    let step = prop_oneof![
        4 => (any::<u16>(), prop_oneof![1..9u8, any::<u8>()]).prop_map(|(at, n)| Step::Write(at, n)),
        1 => prop_oneof![Just(0xff), Just(0), any::<u8>()].prop_map(Step::Checkpoint),
    ];
    let sectors = prop_oneof![Just(0), Just(0xff), any::<u8>()];
    (
        vec(step, 0..24),
        any::<prop::sample::Index>(),
        vec(sectors, 1..12),
    )
}

fn blocks() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 1..700u64, 1 => 32512..32900u64]
}

proptest! {
    #![proptest_config(common::cases(60))]

    #[test]
    fn what_was_written_is_recovered(blocks in blocks(), lives in vec(life(), 1..4)) {
        let mut disk = format(blocks);
        // Blocks that differ from the master, and those that may be recovered as dirty for any reason.
        let mut written = BTreeSet::new();
        let mut allowed = BTreeSet::new();
        for (steps, cut, sectors) in &lives {
            let mut session = activate(&disk).unwrap();
            for step in steps {
                match step {
                    Step::Write(at, count) => {
                        let start = u64::from(*at) * blocks / 65536;
                        let end = (start + u64::from(*count)).min(blocks);
                        if start < end {
                            session.write(Run { start, end });
                        }
                    }
                    Step::Checkpoint(retire) => session.checkpoint(*retire),
                }
            }
            let cut = cut.index(session.events.len() + 1);
            let mut luck = sectors.iter().copied().cycle();
            // Where an unflushed page would land, in order, until a barrier makes it durable.
            let mut unflushed: Vec<(u64, &Page)> = Vec::new();
            for event in &session.events[..cut] {
                match event {
                    Event::Meta { at, page, fua: true } => disk.write_sectors(*at, page, 0xff),
                    Event::Meta { at, page, fua: false } => unflushed.push((*at, page)),
                    Event::Barrier => {
                        for (at, page) in unflushed.drain(..) {
                            disk.write_sectors(at, page, 0xff);
                        }
                    }
                    Event::Data(run) => written.extend(run.start..run.end),
                    Event::Announce(run) => {
                        let run = session.sb.geometry.blocks_in(*run);
                        allowed.extend(run.start..run.end);
                    }
                }
            }
            for (at, page) in unflushed {
                disk.write_sectors(at, page, luck.next().unwrap());
            }
            if let Some(Event::Meta { at, page, .. }) = session.events.get(cut) {
                disk.write_sectors(*at, page, luck.next().unwrap());
            }
            let recovered = recover(&disk);
            prop_assert!(recovered.is_ok(), "{:?}", recovered.err());
            let (_, found, _) = recovered.unwrap();
            prop_assert!(found.stale.is_empty());
            prop_assert!(written.is_subset(&found.dirty), "lost: {:?}", written.difference(&found.dirty));
            prop_assert!(found.dirty.is_subset(&allowed), "made up: {:?}", found.dirty.difference(&allowed));
        }
        // Shut down in order: exactly what was recovered, and what was written since.
        let mut session = activate(&disk).unwrap();
        let expected = session.dirty.clone();
        session.checkpoint(0xff);
        for event in &session.events {
            if let Event::Meta { at, page, .. } = event {
                disk.write_sectors(*at, page, 0xff);
            }
        }
        prop_assert_eq!(recover(&disk).unwrap().1.dirty, expected);
    }
}

/// More plane pages than one index page tells of: 1.4 TiB of blocks.
#[test]
fn two_index_pages() {
    let geometry = Geometry::new(360_000_000 * 8, 12, 20).unwrap();
    assert_eq!(checkpoint::index_pages(&geometry), 2);
    let pages = Layout::total_pages(&geometry, LOG_PAGES);
    let mut sb = image::base(Placement::Separate).sb;
    sb.geometry = geometry;
    sb.layout = Layout::new(Placement::Separate, &geometry, pages, LOG_PAGES).unwrap();
    let mut disk = Disk::new(pages);
    let start = sb.layout.area_start[usize::from(sb.root.area)];
    let place = |index| Place {
        meta_uuid: &META_UUID,
        area: sb.root.area,
        seq: sb.root.seq,
        index,
    };
    let per_plane = checkpoint::plane_pages(&geometry);
    // The last page of the dirty plane, and one of the stale plane behind the first index page.
    let ones = [per_plane - 1, checkpoint::ENTRIES_PER_INDEX + 5];
    let stored = checkpoint::ENTRIES_PER_INDEX + 6;
    for index in 0..2 {
        let page = disk.page_mut(start + u64::from(index));
        checkpoint::encode_index(page, &place(index), |n| match n {
            n if ones.contains(&n) => PageState::Ones,
            n if n == stored => PageState::Stored,
            _ => PageState::Zero,
        });
    }
    checkpoint::encode_plane(
        disk.page_mut(start + 2 + stored),
        &place(stored as u32),
        |i| i as u64,
    );
    let dirty = checkpoint::blocks_in_page(&geometry, ones[0]);
    let stale = checkpoint::blocks_in_page(&geometry, ones[1] - per_plane);
    sb.root.dirty_blocks = dirty.len();
    sb.root.stale_blocks =
        stale.len() + (0..508u64).map(|i| u64::from(i.count_ones())).sum::<u64>();
    let mut found = Found::default();
    let (mut index, mut buffer) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    recovery::load_planes(&mut disk, &sb, &mut index, &mut buffer, &mut found).unwrap();
    assert_eq!(found.dirty, (dirty.start..dirty.end).collect());
    let first = checkpoint::blocks_in_page(&geometry, stored - per_plane).start;
    let mut expected: BTreeSet<_> = (stale.start..stale.end).collect();
    for i in 0..508u64 {
        let set = (0..9).filter(|bit| i & (1 << bit) != 0);
        expected.extend(set.map(|bit| first + i * 64 + bit));
    }
    assert_eq!(found.stale, expected);
}
