// SPDX-License-Identifier: GPL-2.0

//! The undo area: whatever a power cut leaves, what is taken back from it is the master's.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{disks_of, open, stores, Content, Cut, Disk, Machine, Random};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::log::{Entry, Writer};
use pristine_metadata::shared::undo::{self, Place};
use pristine_metadata::shared::{Page, PAGE_SIZE};
use pristine_metadata::{
    format_on, BlockState, Changes, FormatOptions, Image, Initial, Metadata, Originals, Planes,
    Run, Select, Storage, Superblock,
};

const BLOCKS: u64 = 220;
const UNDO_PAGES: u64 = 40;
const ALL: [Cut; 4] = [Cut::None, Cut::All, Cut::Some, Cut::Garbled];
/// A garbled record is damage, and refused.
const IN_USE: [Cut; 3] = [Cut::None, Cut::All, Cut::Some];
const BOTH: [Placement; 2] = [Placement::Separate, Placement::Tail];

fn quiet(_: u64, _: u64) {}

/// What the master has in a block: every fourth is zero.
fn master(block: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    if block % 4 != 3 {
        page.fill((block % 251) as u8 | 1);
        page[..8].copy_from_slice(&block.to_le_bytes());
    }
    page
}

/// A formatted device that holds the master.
fn formatted(placement: Placement, undo_pages: u64) -> Machine {
    let disks = match placement {
        Placement::Separate => vec![
            Content::new(BLOCKS + 1, 0),
            Content::new(60 + undo_pages, 0x5a),
        ],
        Placement::Tail => vec![Content::new(BLOCKS + 60 + undo_pages, 0x5a)],
    };
    let options = FormatOptions {
        managed_bytes: Some(BLOCKS * 4096),
        log_pages: Some(16),
        initial: Initial::Clean,
        undo_bytes: undo_pages * 4096,
        force: true,
        image: Some(Image {
            id: [9; 32],
            generation: 1,
            bytes: BLOCKS * 4096,
        }),
        ..FormatOptions::default()
    };
    let machine = Machine::new(disks);
    let mut metadata = format_on(stores(&machine, placement), &options).unwrap();
    let mut disks = disks_of(&mut metadata);
    for block in 0..BLOCKS {
        *disks[0].page_mut(block).unwrap() = master(block);
    }
    Machine::new(disks)
}

fn data(metadata: &mut Metadata<Disk>) -> &mut Disk {
    let stores = metadata.stores_mut();
    stores.data.as_mut().unwrap_or(&mut stores.meta)
}

/// What the kernel target does with an undo area: the original, then the exact record, then the write.
struct Kernel {
    metadata: Metadata<Disk>,
    planes: Planes,
    next_seq: u64,
    used: u64,
    /// Whether the record waits for the chunk. Off to see that the tests notice.
    in_order: bool,
}

impl Kernel {
    fn activate(machine: &Machine, placement: Placement) -> Self {
        let mut metadata = Metadata::open_on(stores(machine, placement)).unwrap();
        let (planes, _) = metadata.load().unwrap();
        let sb = *metadata.superblock();
        metadata.commit(&planes, &Changes::default()).unwrap();
        let next_seq = metadata.superblock().root.log_seq;
        let mut page = [0; PAGE_SIZE];
        let mut source = Source(&mut metadata.stores_mut().meta);
        let used = undo::walk(&mut source, &sb, sb.undo.used, &mut page, |_, _| ()).end;
        let used = if metadata.superblock().undo.epoch == sb.undo.epoch {
            used
        } else {
            0
        };
        Self {
            metadata,
            planes,
            next_seq,
            used,
            in_order: true,
        }
    }

    fn write(&mut self, blocks: &[u64], content: u8) {
        let sb = *self.metadata.superblock();
        if self.next_seq >= sb.root.log_seq + sb.layout.log_pages {
            self.metadata
                .commit(&self.planes, &Changes::default())
                .unwrap();
            self.next_seq = self.metadata.superblock().root.log_seq;
        }
        let sb = *self.metadata.superblock();
        let fresh: Vec<u64> = blocks
            .iter()
            .copied()
            .filter(|b| self.planes.state(*b) == BlockState::Clean)
            .collect();
        if !fresh.is_empty() {
            if self.in_order {
                self.keep(&sb, &fresh);
            }
            let mut page = [0; PAGE_SIZE];
            let mut writer = Writer::new(&mut page);
            for block in &fresh {
                assert!(writer.push(Entry::Dirty(run(*block))));
            }
            writer.finish(&sb.meta_uuid, self.next_seq);
            let meta = &mut self.metadata.stores_mut().meta;
            // Behind a flush.
            meta.sync().unwrap();
            meta.write(sb.layout.log_page(self.next_seq), &page)
                .unwrap();
            meta.sync().unwrap();
            self.next_seq += 1;
        }
        for block in blocks {
            data(&mut self.metadata)
                .write(*block, &[content; PAGE_SIZE])
                .unwrap();
            self.planes.set(run(*block), BlockState::Dirty);
        }
        if !self.in_order {
            self.keep(&sb, &fresh);
        }
    }

    fn keep(&mut self, sb: &Superblock, fresh: &[u64]) {
        if self.used + 1 + fresh.len() as u64 > sb.layout.undo_pages {
            return;
        }
        let mut header = [0; PAGE_SIZE];
        let mut writer = undo::Writer::new(&mut header);
        let mut next = sb.layout.undo_start + self.used + 1;
        let mut page = [0; PAGE_SIZE];
        for block in fresh {
            data(&mut self.metadata).read(*block, &mut page).unwrap();
            if writer.push(&mut header, *block, &page) {
                self.metadata.stores_mut().meta.write(next, &page).unwrap();
                next += 1;
            }
        }
        writer.finish(&mut header, &Place::new(sb, self.used));
        let meta = &mut self.metadata.stores_mut().meta;
        meta.write(sb.layout.undo_start + self.used, &header)
            .unwrap();
        self.used = next - sb.layout.undo_start;
    }
}

struct Source<'a>(&'a mut Disk);

impl pristine_metadata::shared::recovery::Source for Source<'_> {
    fn read(&mut self, page: u64, into: &mut Page) -> pristine_metadata::shared::Result {
        Storage::read(self.0, page, into).map_err(|_| pristine_metadata::shared::Error::Io(page))
    }
}

fn run(block: u64) -> Run {
    Run {
        start: block,
        end: block + 1,
    }
}

fn session(kernel: &mut Kernel, random: &mut Random) {
    for step in 1..9 {
        let blocks: Vec<u64> = (0..1 + random.below(4)).map(|_| random.below(60)).collect();
        kernel.write(&blocks, 0xf0 + step);
        if step % 5 == 0 {
            kernel
                .metadata
                .commit(&kernel.planes, &Changes::default())
                .unwrap();
            kernel.next_seq = kernel.metadata.superblock().root.log_seq;
        }
    }
}

/// Takes all back that has an original. Clean blocks are the master's then; of dirty ones returns how many are left.
fn undo_all(disks: Vec<Content>, placement: Placement, name: &str) -> (Metadata<Disk>, u64) {
    let mut metadata = open(disks, placement).unwrap_or_else(|e| panic!("{name}: {e}"));
    let (mut planes, _) = metadata.load().unwrap_or_else(|e| panic!("{name}: {e}"));
    let originals = Originals::read(&mut metadata, &mut quiet);
    let missing = originals.missing(&planes, Select::NotClean);
    originals
        .restore(&mut metadata, &mut planes, &mut quiet)
        .unwrap();
    assert_eq!(planes.count(Select::NotClean), missing, "{name}");
    let (loaded, _) = metadata.load().unwrap();
    assert_eq!(loaded, planes, "{name}");
    check_clean(&mut metadata, &planes, name);
    (metadata, missing)
}

fn check_clean(metadata: &mut Metadata<Disk>, planes: &Planes, name: &str) {
    let mut page = [0; PAGE_SIZE];
    for block in 0..BLOCKS {
        if planes.state(block) == BlockState::Clean {
            data(metadata).read(block, &mut page).unwrap();
            assert_eq!(page, master(block), "{name}: block {block}");
        }
    }
}

#[test]
fn each_dirty_block_has_its_original_wherever_the_power_went() {
    let mut states = 0;
    for (seed, placement) in (0..).zip(BOTH) {
        let machine = formatted(placement, 200);
        let mut kernel = Kernel::activate(&machine, placement);
        session(&mut kernel, &mut Random::new(seed));
        states += machine.each_cut(2, &IN_USE, |disks, name| {
            let (mut metadata, missing) = undo_all(disks, placement, name);
            assert_eq!(missing, 0, "{name}: dirty without an original");
            let again = Originals::read(&mut metadata, &mut quiet);
            assert!(
                again.is_empty() || metadata.superblock().undo.used == 0,
                "{name}"
            );
        });
    }
    assert!(states > 200, "{states} states");
}

#[test]
fn the_test_notices_a_chunk_that_comes_after_its_record() {
    let machine = formatted(Placement::Separate, 200);
    let mut kernel = Kernel::activate(&machine, Placement::Separate);
    kernel.in_order = false;
    session(&mut kernel, &mut Random::new(3));
    let mut without = 0;
    machine.each_cut(2, &IN_USE, |disks, name| {
        let mut metadata =
            open(disks, Placement::Separate).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (planes, _) = metadata.load().unwrap();
        let originals = Originals::read(&mut metadata, &mut quiet);
        without += originals.missing(&planes, Select::Dirty);
    });
    assert!(without > 0);
}

#[test]
fn a_full_area_loses_nothing_else() {
    for placement in BOTH {
        let machine = formatted(placement, UNDO_PAGES);
        let mut kernel = Kernel::activate(&machine, placement);
        for block in 0..100 {
            kernel.write(&[block, 110 + block], 0xee);
        }
        let mut left = 0;
        machine.each_cut(1, &[Cut::Some], |disks, name| {
            let (_, missing) = undo_all(disks, placement, name);
            left = left.max(missing);
        });
        assert!(
            (100..200).contains(&left),
            "{left} blocks without an original"
        );
    }
}

#[test]
fn undoing_that_is_cut_is_done_again() {
    for (seed, placement) in (10..).zip(BOTH) {
        let machine = formatted(placement, 200);
        let mut kernel = Kernel::activate(&machine, placement);
        session(&mut kernel, &mut Random::new(seed));
        // What memory knows only is lost with a crash; this is an orderly stop.
        kernel
            .metadata
            .commit(&kernel.planes, &Changes::default())
            .unwrap();
        let second = Machine::new(disks_of(&mut kernel.metadata));
        let mut metadata = Metadata::open_on(stores(&second, placement)).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        let originals = Originals::read(&mut metadata, &mut quiet);
        let done = originals
            .restore(&mut metadata, &mut planes, &mut quiet)
            .unwrap();
        assert!(done.blocks > 5);
        second.each_cut(2, &ALL, |disks, name| {
            // Neither of the two is ever called clean; what is, is the master's.
            let mut cut = open(disks.clone(), placement).unwrap_or_else(|e| panic!("{name}: {e}"));
            let (planes, _) = cut.load().unwrap();
            check_clean(&mut cut, &planes, name);
            let (_, missing) = undo_all(disks, placement, name);
            assert_eq!(missing, 0, "{name}");
        });
    }
}

#[test]
fn what_is_damaged_is_not_put_back() {
    for placement in BOTH {
        let machine = formatted(placement, 200);
        let mut kernel = Kernel::activate(&machine, placement);
        session(&mut kernel, &mut Random::new(5));
        let sb = *kernel.metadata.superblock();
        let dirty = kernel.planes.count(Select::Dirty);
        let disks = disks_of(&mut kernel.metadata);
        let mut random = Random::new(1);
        let mut hidden = 0;
        for page in 0..kernel.used {
            let mut disks = disks.clone();
            let at = random.below(PAGE_SIZE as u64) as usize;
            let meta = disks.last_mut().unwrap();
            meta.page_mut(sb.layout.undo_start + page).unwrap()[at] ^= 1;
            let (_, missing) = undo_all(disks, placement, &format!("page {page}"));
            assert!(
                missing < dirty || page == 0,
                "page {page}: {missing} of {dirty}"
            );
            hidden += missing;
        }
        assert!(hidden > 0);
        // All of it.
        let mut garbage = disks;
        let meta = garbage.last_mut().unwrap();
        for page in 0..200 {
            meta.page_mut(sb.layout.undo_start + page)
                .unwrap()
                .fill(0xff);
        }
        let (_, missing) = undo_all(garbage, placement, "garbage");
        assert_eq!(missing, dirty);
    }
}

#[test]
fn another_image_empties_the_area_and_so_does_nothing_dirty() {
    let placement = Placement::Separate;
    let machine = formatted(placement, 200);
    let mut kernel = Kernel::activate(&machine, placement);
    kernel.write(&[1, 2, 3], 0xcc);
    let mut metadata = kernel.metadata;
    let mut planes = kernel.planes;
    metadata.commit(&planes, &Changes::default()).unwrap();
    let blocks = |m: &mut Metadata<Disk>| Originals::read(m, &mut quiet).blocks();
    assert_eq!(blocks(&mut metadata), 3, "an ordinary commit keeps it");
    let image = |id, generation| Changes {
        image: Some(Image {
            id: [id; 32],
            generation,
            bytes: 4096,
        }),
        ..Changes::default()
    };
    metadata.commit(&planes, &image(9, 2)).unwrap();
    assert_eq!(
        blocks(&mut metadata),
        3,
        "so does the same image under another number"
    );
    let disks = disks_of(&mut metadata);
    metadata.commit(&planes, &image(8, 3)).unwrap();
    assert_eq!(blocks(&mut metadata), 0, "but not another one");

    let mut metadata = open(disks, placement).unwrap();
    planes.make_stale();
    metadata.commit(&planes, &Changes::default()).unwrap();
    assert_eq!(blocks(&mut metadata), 0, "nothing is dirty any more");
}
