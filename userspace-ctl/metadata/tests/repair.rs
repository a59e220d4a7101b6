// SPDX-License-Identifier: GPL-2.0

//! The repair: after any damage that it accepts, the metadata is good and holds a superset of what was dirty.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::kernel::{Kernel, MASTER};
use common::{disks_of, open, stores, Content, Cut, Disk, Machine, Random};
use pristine_metadata::repair::{plan, Summary};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::log::{Entry, Writer};
use pristine_metadata::shared::superblock::Superblock;
use pristine_metadata::shared::{Page, PAGE_SIZE};
use pristine_metadata::{
    format_on, BlockState, Changes, Class, Error, FormatOptions, Initial, Metadata, Planes, Run,
    Select, Severity, Stores,
};

/// Two pages for each plane.
const BLOCKS: u64 = 40_000;
const META_PAGES: u64 = 60;
const ANCHORS: [u64; 2] = [0, 15];

fn superblock(disks: &[Content]) -> Superblock {
    let copies = ANCHORS.map(|page| {
        let page = disks[1].page(page).unwrap();
        Superblock::decode(&page, 0, META_PAGES)
    });
    pristine_metadata::shared::superblock::choose(copies[0], copies[1]).unwrap()
}

fn rewrite(disks: &mut [Content], change: impl Fn(&mut Superblock)) {
    let mut sb = superblock(disks);
    change(&mut sb);
    for page in ANCHORS {
        sb.encode(disks[1].page_mut(page).unwrap());
    }
}

/// A device that was cut in the middle of its life: two checkpoints of the kernel, three records behind the newer.
/// With it the blocks that are dirty.
fn in_use() -> (Vec<Content>, Vec<u64>) {
    let machine = Machine::new(vec![
        Content::new(BLOCKS + 1, MASTER),
        Content::new(META_PAGES, 0),
    ]);
    let options = FormatOptions {
        log_pages: Some(16),
        initial: Initial::Clean,
        ..FormatOptions::default()
    };
    let mut metadata = format_on(stores(&machine, Placement::Separate), &options).unwrap();
    let machine = Machine::new(disks_of(&mut metadata));
    let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
    let mut dirty = Vec::new();
    let mut write = |kernel: &mut Kernel, block| {
        kernel.write(block, 1);
        dirty.push(block);
    };
    for n in 0..3 {
        write(&mut kernel, n * 17_000 + 7);
    }
    kernel.checkpoint();
    let previous = kernel.metadata.superblock().root.log_seq;
    for n in 0..3 {
        write(&mut kernel, n * 12_000 + 1000);
    }
    kernel.checkpoint();
    for n in 0..3 {
        write(&mut kernel, n * 11_000 + 5000);
    }
    let mut disks = disks_of(&mut kernel.metadata);
    // As the kernel leaves it, which unlike userspace never clears a bit and is not done after a checkpoint.
    rewrite(&mut disks, |sb| {
        sb.clean = false;
        sb.root.previous_log_seq = previous;
    });
    (disks, dirty)
}

fn load(disks: &[Content]) -> Planes {
    let machine = Machine::new(disks.to_vec());
    let mut metadata = Metadata::open_on(stores(&machine, Placement::Separate)).unwrap();
    metadata.load().unwrap().0
}

fn superset(planes: &Planes, dirty: &[u64], at: &str) {
    for block in dirty {
        assert_eq!(
            planes.state(*block),
            BlockState::Dirty,
            "{at}: block {block}"
        );
    }
}

fn contents(mut stores: Stores<Disk>) -> Vec<Content> {
    let data = stores.data.take().unwrap();
    vec![data.content, stores.meta.content]
}

/// Repairs, and checks that nothing is wrong any more.
fn repair(disks: Vec<Content>, at: &str) -> Result<(Vec<Content>, Summary), Error> {
    let machine = Machine::new(disks);
    let (plan, stores) = plan(stores(&machine, Placement::Separate), &mut |_, _| {})?;
    let summary = plan.summary().clone();
    let (report, stores) = plan.apply(stores)?;
    assert!(report.usable, "{at}: {:?}", report.findings);
    assert!(
        report.worst() < Some(Severity::Warning),
        "{at}: {:?}",
        report.findings
    );
    assert_eq!(report.blocks, Some(summary.blocks), "{at}");
    Ok((contents(stores), summary))
}

fn flip(disks: &[Content], disk: usize, page: u64, byte: usize) -> Vec<Content> {
    let mut disks = disks.to_vec();
    disks[disk].page_mut(page).unwrap()[byte] ^= 0x10;
    disks
}

#[test]
fn what_is_good_is_left_alone() {
    let (disks, _) = in_use();
    let (after, summary) = repair(disks.clone(), "good").unwrap();
    assert!(summary.exact && summary.steps.is_empty(), "{summary:?}");
    assert_eq!(after, disks);
}

#[test]
fn a_flipped_bit_in_each_structure_is_repaired() {
    let (disks, dirty) = in_use();
    let right = load(&disks);
    let sb = superblock(&disks);
    let area = usize::from(sb.root.area);
    let (first, l) = (sb.root.log_seq, sb.layout);
    // Which disk and page, and how many blocks may be dirty at most; `None` where all is to be known exactly.
    let cases = [
        (1, 0, None),
        (1, 15, None),
        (0, BLOCKS, None),
        // A page tells of 32,512 blocks, but the checkpoint before and the log tell more.
        (1, l.area_start[area], Some(13 * 256)),
        (1, l.area_start[area] + 1, Some(13 * 256)),
        (1, l.area_start[area] + 2, Some(13 * 256)),
        (1, l.area_start[1 - area], None),
        (1, l.area_start[1 - area] + 1, None),
        (1, l.log_page(first - 2), None),
    ];
    let log = l.log_start..l.log_start + l.log_pages;
    for (disk, page, most) in cases {
        // A record of a few entries ends with its second sector.
        let limit = if disk == 1 && log.contains(&page) {
            1024
        } else {
            4096
        };
        for byte in [3, 100, 511, 600, 2000, 4095] {
            if byte >= limit {
                continue;
            }
            let at = format!("disk {disk} page {page} byte {byte}");
            let (after, summary) = repair(flip(&disks, disk, page, byte), &at).unwrap();
            let planes = load(&after);
            assert!(!summary.steps.is_empty(), "{at}");
            superset(&planes, &dirty, &at);
            match most {
                None => {
                    assert!(summary.exact, "{at}: {summary:?}");
                    assert_eq!(planes, right, "{at}");
                }
                Some(most) => {
                    assert!(!summary.exact, "{at}: {summary:?}");
                    assert!(planes.count(Select::Dirty) <= most, "{at}: {summary:?}");
                }
            }
        }
    }
}

#[test]
fn a_damaged_record_costs_what_it_may_have_said() {
    let (disks, dirty) = in_use();
    let right = load(&disks);
    let sb = superblock(&disks);
    for n in 0..3 {
        let page = sb.layout.log_page(sb.root.log_seq + n);
        // One entry is in the first sector; the second holds none, and it is known that it does not.
        let (after, summary) = repair(flip(&disks, 1, page, 600), "empty sector").unwrap();
        assert!(summary.exact, "{summary:?}");
        assert_eq!(load(&after), right);
        let (after, summary) = repair(flip(&disks, 1, page, 20), "entries").unwrap();
        assert!(!summary.exact, "{summary:?}");
        assert_eq!(load(&after).count(Select::Dirty), BLOCKS);
    }
    // The first that is not there yet: an older one, damaged, in its place. It is no record that counts.
    let page = sb.layout.log_page(sb.root.log_seq + 3);
    let mut bad = disks.clone();
    let old = bad[1].page(sb.layout.log_page(1)).unwrap();
    *bad[1].page_mut(page).unwrap() = old;
    let (after, summary) = repair(flip(&bad, 1, page, 20), "older").unwrap();
    assert!(summary.exact, "{summary:?}");
    superset(&load(&after), &dirty, "older");
    // Nothing of it can be read: perhaps it was the last one.
    let mut bad = disks.clone();
    bad[1].page_mut(page).unwrap().fill(0xee);
    let (after, summary) = repair(bad.clone(), "garbage").unwrap();
    assert!(!summary.exact, "{summary:?}");
    assert_eq!(load(&after).count(Select::Dirty), BLOCKS);
    // Gone, though later ones are there.
    let mut bad_gap = disks.clone();
    bad_gap[1]
        .page_mut(sb.layout.log_page(sb.root.log_seq + 1))
        .unwrap()
        .fill(0);
    let (after, _) = repair(bad_gap, "gap").unwrap();
    assert_eq!(load(&after).count(Select::Dirty), BLOCKS);
}

/// After an orderly stop the checkpoint says it all, and no damage to the log can add anything.
#[test]
fn a_damaged_log_of_a_stopped_device_costs_nothing() {
    let (disks, _) = in_use();
    let machine = Machine::new(disks);
    let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
    let mut disks = disks_of(&mut kernel.metadata);
    let sb = superblock(&disks);
    assert!(sb.clean);
    let right = load(&disks);
    let page = sb.layout.log_page(sb.root.log_seq);
    disks[1].page_mut(page).unwrap().fill(0xee);
    let (after, summary) = repair(disks.clone(), "stopped").unwrap();
    assert!(summary.exact && !summary.steps.is_empty(), "{summary:?}");
    assert_eq!(load(&after), right);
    // In use it would cost everything.
    rewrite(&mut disks, |sb| sb.clean = false);
    let (after, _) = repair(disks, "in use").unwrap();
    assert_eq!(load(&after).count(Select::Dirty), BLOCKS);
}

/// Without a usable checkpoint before, the blocks of the lost page are dirty.
#[test]
fn a_lost_page_costs_its_blocks_where_nothing_else_tells() {
    let (disks, dirty) = in_use();
    let sb = superblock(&disks);
    let area = usize::from(sb.root.area);
    let page = sb.layout.area_start[area] + 2;
    let bad = flip(&disks, 1, page, 50);
    let count = |disks: Vec<Content>| {
        let (after, _) = repair(disks, "page").unwrap();
        let planes = load(&after);
        superset(&planes, &dirty, "page");
        planes.count(Select::Dirty)
    };
    let told = BLOCKS - 32_512;
    assert!(count(bad.clone()) < told);
    // Userspace wrote the current checkpoint.
    let mut other = bad.clone();
    rewrite(&mut other, |sb| sb.root.previous_log_seq = 0);
    assert!(count(other) >= told);
    // A record between the two checkpoints is damaged, or was overwritten.
    let between = sb.layout.log_page(sb.root.previous_log_seq + 1);
    assert!(count(flip(&bad, 1, between, 20)) >= told);
    let mut other = bad.clone();
    other[1].page_mut(between).unwrap().fill(0);
    assert!(count(other) >= told);
    // The same page of the checkpoint before is damaged too.
    let before = sb.layout.area_start[1 - area] + 2;
    assert!(count(flip(&bad, 1, before, 50)) >= told);
    // All of both areas.
    let mut other = bad;
    for n in 0..sb.layout.area_pages * 2 {
        other[1]
            .page_mut(sb.layout.area_start[0] + n)
            .unwrap()
            .fill(0x77);
    }
    assert_eq!(count(other), BLOCKS);
}

/// A plane page whose write was lost is good by itself, but not of this checkpoint.
#[test]
fn an_older_page_is_noticed() {
    let (disks, dirty) = in_use();
    let sb = superblock(&disks);
    let mut bad = disks.clone();
    rewrite(&mut bad, |sb| sb.root.dirty_blocks += 3);
    rewrite(&mut bad, |sb| sb.root.previous_log_seq = 0);
    let (after, summary) = repair(bad, "older page").unwrap();
    assert!(!summary.exact);
    superset(&load(&after), &dirty, "older page");
    assert!(load(&after).count(Select::Dirty) > sb.root.dirty_blocks + 3);
}

#[test]
fn what_the_superblock_knows_costs_nothing() {
    for initial in [Initial::Clean, Initial::Dirty, Initial::Stale] {
        let machine = Machine::new(vec![
            Content::new(BLOCKS + 1, MASTER),
            Content::new(META_PAGES, 0),
        ]);
        let options = FormatOptions {
            log_pages: Some(16),
            initial,
            ..FormatOptions::default()
        };
        let mut metadata = format_on(stores(&machine, Placement::Separate), &options).unwrap();
        let mut disks = disks_of(&mut metadata);
        let right = load(&disks);
        let sb = superblock(&disks);
        for n in 0..sb.layout.area_pages * 2 {
            let page = sb.layout.area_start[0] + n;
            disks[1].page_mut(page).unwrap().fill(0x77);
        }
        let (after, summary) = repair(disks, "all areas").unwrap();
        assert!(summary.exact, "{initial:?}: {summary:?}");
        assert_eq!(load(&after), right, "{initial:?}");
    }
}

#[test]
fn what_cannot_be_known_is_refused() {
    let (disks, _) = in_use();
    let sb = superblock(&disks);
    let refused = |disks: Vec<Content>, class: Class| {
        let error = repair(disks, "refused").map(|(_, s)| s).unwrap_err();
        assert_eq!(error.class(), class, "{error}");
        assert!(error.hint().is_some(), "{error}");
    };
    // Both superblock copies.
    let mut bad = disks.clone();
    for page in ANCHORS {
        bad[1].page_mut(page).unwrap()[200] ^= 1;
    }
    refused(bad, Class::Damaged);
    // The UUID in the label, or all of it.
    refused(flip(&disks, 0, BLOCKS, 20), Class::Damaged);
    let mut bad = disks.clone();
    bad[0].page_mut(BLOCKS).unwrap().fill(0);
    refused(bad, Class::Identity);
    // Another data device.
    let (other, _) = in_use();
    refused(vec![other[0].clone(), disks[1].clone()], Class::Identity);
    // Which blocks are stale.
    let machine = Machine::new(disks.clone());
    let mut metadata = Metadata::open_on(stores(&machine, Placement::Separate)).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    let run = Run {
        start: 100,
        end: 300,
    };
    planes.set(run, BlockState::Stale);
    metadata.commit(&planes, &Changes::default()).unwrap();
    let stale = disks_of(&mut metadata);
    let root = superblock(&stale).root;
    let start = sb.layout.area_start[usize::from(root.area)];
    refused(flip(&stale, 1, start + 1 + 2, 60), Class::Damaged);
    // Dirty bits alone are lost beside them: what is stale stays so.
    let (after, _) = repair(flip(&stale, 1, start + 1, 60), "stale").unwrap();
    assert_eq!(load(&after).count(Select::Stale), 200);
    assert_eq!(load(&after).count(Select::Dirty), 32_512 - 200 + 1);
    // The data device was not given.
    let machine = Machine::new(disks);
    let alone = Stores {
        data: None,
        ..stores(&machine, Placement::Separate)
    };
    let error = plan(alone, &mut |_, _| {}).map(|_| ()).unwrap_err();
    assert_eq!(error.class(), Class::Usage);
}

#[test]
fn copies_that_contradict_each_other_cost_everything() {
    let (mut disks, _) = in_use();
    let mut sb = superblock(&disks);
    sb.root.dirty_blocks += 1;
    sb.encode(disks[1].page_mut(15).unwrap());
    let (after, summary) = repair(disks.clone(), "conflict").unwrap();
    assert!(!summary.exact);
    assert_eq!(load(&after).count(Select::Dirty), BLOCKS);
    // Two devices cannot both be meant.
    sb.data_uuid[0] ^= 1;
    sb.encode(disks[1].page_mut(15).unwrap());
    assert_eq!(
        repair(disks, "conflict").map(|_| ()).unwrap_err().class(),
        Class::Damaged
    );
}

#[test]
fn the_mark_that_asks_for_a_check_goes() {
    let (mut disks, _) = in_use();
    let right = load(&disks);
    rewrite(&mut disks, |sb| sb.needs_check = true);
    let (after, summary) = repair(disks, "mark").unwrap();
    assert!(summary.exact && !superblock(&after).needs_check);
    assert_eq!(load(&after), right);
}

/// Garbage in any pages: refused, or a superset.
#[test]
fn random_damage_never_loses_a_block() {
    let (disks, dirty) = in_use();
    let mut random = Random::new(11);
    let (mut repaired, mut exact) = (0, 0);
    for round in 0..400 {
        let mut bad = disks.clone();
        for _ in 0..1 + random.below(4) {
            let (disk, page) = match random.below(10) {
                0 => (0, BLOCKS),
                1 => (1, ANCHORS[random.below(2) as usize]),
                _ => (1, 16 + random.below(META_PAGES - 16)),
            };
            let page: &mut Page = bad[disk].page_mut(page).unwrap();
            let from = random.below(PAGE_SIZE as u64) as usize;
            let length = 1 + random.below(PAGE_SIZE as u64) as usize;
            for byte in page.iter_mut().skip(from).take(length) {
                *byte = random.next() as u8;
            }
        }
        let at = format!("round {round}");
        match repair(bad, &at) {
            Ok((after, summary)) => {
                superset(&load(&after), &dirty, &at);
                repaired += 1;
                exact += u64::from(summary.exact);
            }
            Err(e) => assert!(e.hint().is_some(), "{at}: {e}"),
        }
    }
    assert!(repaired > 200 && exact > 20, "{repaired} {exact}");
}

/// A repair that is cut anywhere can be run again.
#[test]
fn a_power_cut_during_the_repair_loses_nothing() {
    let (disks, dirty) = in_use();
    let sb = superblock(&disks);
    let area = usize::from(sb.root.area);
    let l = sb.layout;
    let mut states = 0;
    for pages in [
        vec![0],
        vec![15, l.log_page(sb.root.log_seq + 1)],
        vec![l.area_start[area] + 1],
        vec![l.area_start[area], l.area_start[1 - area] + 1],
        vec![l.log_page(sb.root.log_seq + 3), l.log_page(2)],
    ] {
        let mut bad = disks.clone();
        for page in &pages {
            bad[1].page_mut(*page).unwrap()[20..400].fill(0xee);
        }
        let machine = Machine::new(bad);
        let (plan, stores) = plan(stores(&machine, Placement::Separate), &mut |_, _| {}).unwrap();
        plan.apply(stores).unwrap();
        let hows = [Cut::None, Cut::All, Cut::Some, Cut::Garbled];
        states += machine.each_cut(4, &hows, |disks, name| {
            let at = format!("{pages:?} {name}");
            let (after, _) = repair(disks, &at).unwrap_or_else(|e| panic!("{at}: {e}"));
            superset(&load(&after), &dirty, &at);
        });
    }
    assert!(states > 300, "{states}");
}

/// Damage in a page of the ring that holds none of the log does not stop recovery, and is gone after the next commit. What
/// may have been a record does.
#[test]
fn damage_beside_the_log_is_no_damage_to_it() {
    let (disks, _) = in_use();
    let sb = superblock(&disks);
    let right = load(&disks);
    let ring = sb.layout.log_pages;
    let last = sb.root.log_seq + 2;
    let end = last + 1;
    let old = disks[1]
        .page(sb.layout.log_page(sb.root.log_seq - 1))
        .unwrap();
    let tolerated = |disks: Vec<Content>, what: &str| {
        let mut metadata = open(disks, Placement::Separate).unwrap();
        let (planes, log_end) = metadata.load().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(planes == right, "{what}");
        assert_eq!((log_end.damaged, log_end.next_seq), (1, end + 1), "{what}");
        metadata.commit(&planes, &Changes::default()).unwrap();
        let (_, log_end) = open(disks_of(&mut metadata), Placement::Separate)
            .unwrap()
            .load()
            .unwrap();
        assert_eq!(log_end.damaged, 0, "{what}, after a commit");
    };
    // Anywhere but in the log and at its end, whatever it is.
    for seq in end + 1..sb.root.log_seq + ring {
        let mut bad = disks.clone();
        bad[1].page_mut(sb.layout.log_page(seq)).unwrap().fill(0xee);
        tolerated(bad, "garbage behind the end");
    }
    // At the end, if what is left shows that it was no record yet: an older one, or nothing.
    for content in [old, [0; PAGE_SIZE]] {
        for byte in [3, 20, 600, 4095] {
            let mut bad = disks.clone();
            *bad[1].page_mut(sb.layout.log_page(end)).unwrap() = content;
            bad[1].page_mut(sb.layout.log_page(end)).unwrap()[byte] ^= 1;
            tolerated(bad, "an older record at the end");
        }
    }
    // It may have been a record.
    let refused = |disks: Vec<Content>| {
        let mut metadata = open(disks, Placement::Separate).unwrap();
        assert_eq!(metadata.load().unwrap_err().class(), Class::Damaged);
    };
    let mut bad = disks.clone();
    bad[1].page_mut(sb.layout.log_page(end)).unwrap().fill(0xee);
    refused(bad);
    refused(flip(&disks, 1, sb.layout.log_page(last), 20));
    // A good sector of a later record, in a page that is damaged otherwise: the log did not end.
    let mut bad = disks.clone();
    let mut later = [0; PAGE_SIZE];
    let mut writer = Writer::new(&mut later);
    assert!(writer.push(Entry::Intent(Run { start: 0, end: 1 })));
    writer.finish(&sb.meta_uuid, end + 1);
    later[20] ^= 1;
    *bad[1].page_mut(sb.layout.log_page(end + 1)).unwrap() = later;
    refused(bad);
}
