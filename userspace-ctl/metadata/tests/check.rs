// SPDX-License-Identifier: GPL-2.0

//! The check finds a flipped bit in every structure and says how bad it is.

#![allow(clippy::unwrap_used)]

mod common;

use common::kernel::{Kernel, MASTER};
use common::{disks_of, stores, Content, Cut, Machine, Random};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::superblock::Superblock;
use pristine_metadata::shared::PAGE_SIZE;
use pristine_metadata::{
    check, format_on, FormatOptions, Initial, Metadata, Report, Severity, Storage,
};

const BLOCKS: u64 = 40_000;

fn run(disks: Vec<Content>) -> Report {
    let machine = Machine::new(disks);
    check(stores(&machine, Placement::Separate), &mut |_, _| {})
        .unwrap()
        .0
}

/// A device in the middle of its life: two checkpoints with stored pages, records behind the newer.
fn in_use() -> (Vec<Content>, Superblock, u64) {
    let machine = Machine::new(vec![Content::new(BLOCKS + 1, MASTER), Content::new(60, 0)]);
    let options = FormatOptions {
        log_pages: Some(16),
        initial: Initial::Clean,
        ..FormatOptions::default()
    };
    let mut metadata = format_on(stores(&machine, Placement::Separate), &options).unwrap();
    let machine = Machine::new(disks_of(&mut metadata));
    let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
    for n in 0..4 {
        kernel.write(n * 9000 + 1, 1);
    }
    kernel.write(35_000, 1);
    kernel.flush();
    kernel.checkpoint();
    kernel.write(20_000, 2);
    kernel.checkpoint();
    for n in 0..3 {
        kernel.write(n * 9000 + 600, 3);
    }
    let sb = *kernel.metadata.superblock();
    let disks = disks_of(&mut kernel.metadata);
    (disks, sb, sb.root.log_seq)
}

fn flipped(disks: &[Content], disk: usize, page: u64, byte: usize) -> Report {
    let mut disks = disks.to_vec();
    disks[disk].page_mut(page).unwrap()[byte] ^= 0x10;
    run(disks)
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let (disks, _, _) = in_use();
    let report = run(disks);
    assert_eq!(report.findings, []);
    assert!(report.usable);
    let blocks = report.blocks.unwrap();
    assert_eq!((blocks.total, blocks.stale), (BLOCKS, 0));
    // Six blocks exactly, and three extents.
    assert_eq!(blocks.dirty, 6 + 3 * 256);
}

#[test]
fn a_flipped_bit_in_each_structure_is_found() {
    let (disks, sb, log_seq) = in_use();
    let area = usize::from(sb.root.area);
    let l = sb.layout;
    // Page 0 of an area is its index; the plane pages follow, two for each plane of 40,000 blocks.
    let cases = [
        (1, 0, Severity::Damage, true, "superblock copy 0"),
        (1, 15, Severity::Damage, true, "superblock copy 1"),
        (0, BLOCKS, Severity::Fatal, false, "data device label"),
        (
            1,
            l.area_start[area],
            Severity::Fatal,
            false,
            "index page 0",
        ),
        (
            1,
            l.area_start[area] + 1,
            Severity::Fatal,
            false,
            "plane page 0",
        ),
        (
            1,
            l.area_start[area] + 2,
            Severity::Fatal,
            false,
            "plane page 1",
        ),
        (
            1,
            l.area_start[1 - area],
            Severity::Warning,
            true,
            "index page 0",
        ),
        (
            1,
            l.area_start[1 - area] + 1,
            Severity::Warning,
            true,
            "plane page 0",
        ),
        (1, l.log_page(log_seq), Severity::Fatal, false, "log record"),
        (
            1,
            l.log_page(log_seq + 2),
            Severity::Fatal,
            false,
            "log record",
        ),
        (
            1,
            l.log_page(log_seq - 2),
            Severity::Warning,
            true,
            "log ring",
        ),
    ];
    let log = l.log_start..l.log_start + l.log_pages;
    for (disk, page, severity, usable, name) in cases {
        // The records have a few entries each, and end with their first sector.
        let limit = if disk == 1 && log.contains(&page) {
            512
        } else {
            4096
        };
        for byte in [3, 100, 511, 512, 2000, 4095] {
            if byte >= limit {
                continue;
            }
            let at = format!("disk {disk} page {page} byte {byte}");
            let report = flipped(&disks, disk, page, byte);
            assert_eq!(
                report.worst(),
                Some(severity),
                "{at}: {:?}",
                report.findings
            );
            assert_eq!(report.usable, usable, "{at}");
            let found = report
                .findings
                .iter()
                .find(|f| f.severity == severity)
                .unwrap();
            assert!(found.structure.contains(name), "{at}: {found:?}");
            assert_eq!(found.page, Some(page), "{at}: {found:?}");
        }
    }
}

/// Every bit of every page that holds something, one byte of each at a time, is found or does no harm.
#[test]
fn damage_that_is_not_found_changes_nothing() {
    let (disks, _, _) = in_use();
    let load = |disks: &[Content]| {
        let machine = Machine::new(disks.to_vec());
        Metadata::open_on(stores(&machine, Placement::Separate)).and_then(|mut m| m.load())
    };
    let right = load(&disks).unwrap();
    let mut random = Random::new(3);
    for _ in 0..600 {
        let page = random.below(60);
        let byte = random.below(PAGE_SIZE as u64) as usize;
        let mut bad = disks.clone();
        bad[1].page_mut(page).unwrap()[byte] ^= 1 << random.below(8);
        let report = run(bad.clone());
        match load(&bad) {
            Ok(state) => {
                // Not printed: planes are long.
                let ends = [&state, &right].map(|(_, end)| (end.records, end.next_seq, end.torn));
                assert!(state.0 == right.0, "page {page} byte {byte}: the planes");
                assert_eq!(ends[0], ends[1], "page {page} byte {byte}");
                assert!(report.usable, "page {page} byte {byte}");
            }
            Err(e) => assert!(!report.usable, "page {page} byte {byte}: {e}"),
        }
    }
}

#[test]
fn what_a_power_cut_leaves_is_no_damage() {
    let machine = {
        let (disks, _, _) = in_use();
        Machine::new(disks)
    };
    let mut kernel = Kernel::activate(stores(&machine, Placement::Separate));
    for n in 0..4 {
        kernel.write(n * 9000 + 3000, 4);
    }
    kernel.checkpoint();
    // More than one sector of entries, so that it can be torn.
    let blocks: Vec<u64> = (0..BLOCKS / 256).step_by(2).map(|n| n * 256).collect();
    kernel.write_many(&blocks, 5);
    let (mut torn, mut older, mut cut) = (0, 0, 0);
    machine.each_cut(10, &[Cut::None, Cut::All, Cut::Some], |disks, name| {
        let report = run(disks);
        assert!(report.usable, "{name}: {:?}", report.findings);
        for finding in &report.findings {
            // Without a whole page of the next checkpoint a torn one cannot be told from a damaged one.
            assert!(finding.severity <= Severity::Warning, "{name}: {finding:?}");
            torn += u64::from(finding.what.contains("torn"));
            older += u64::from(finding.what.contains("older"));
            cut += u64::from(finding.what.contains("was cut here"));
        }
    });
    assert!(torn > 0 && older > 0 && cut > 0, "{torn} {older} {cut}");
}

#[test]
fn a_lost_record_before_later_ones_is_fatal() {
    let (mut disks, sb, log_seq) = in_use();
    let page = sb.layout.log_page(log_seq + 1);
    *disks[1].page_mut(page).unwrap() = [0; PAGE_SIZE];
    let report = run(disks);
    assert_eq!(report.worst(), Some(Severity::Fatal));
    assert!(report.findings[0].what.contains("missing"), "{report:?}");
    assert!(!report.usable);
}

#[test]
fn a_device_that_cannot_be_read_is_a_finding() {
    struct Failing(common::Disk, u64);
    impl Storage for Failing {
        fn path(&self) -> &std::path::Path {
            self.0.path()
        }
        fn sectors(&self) -> u64 {
            self.0.sectors()
        }
        fn writable(&self) -> bool {
            false
        }
        fn read(&mut self, page: u64, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
            if page == self.1 {
                return Err(std::io::ErrorKind::Other.into());
            }
            self.0.read(page, into)
        }
        fn write(&mut self, _: u64, _: &[u8; PAGE_SIZE]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn sync(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (disks, sb, _) = in_use();
    for (page, severity) in [
        (0, Severity::Damage),
        (sb.layout.log_page(sb.root.log_seq), Severity::Fatal),
        (sb.layout.log_page(sb.root.log_seq - 1), Severity::Warning),
        (
            sb.layout.area_start[usize::from(sb.root.area)],
            Severity::Fatal,
        ),
        (
            sb.layout.area_start[1 - usize::from(sb.root.area)],
            Severity::Warning,
        ),
    ] {
        let machine = Machine::new(disks.clone());
        let stores = pristine_metadata::Stores {
            meta: Failing(machine.disk(1), page),
            data: Some(Failing(machine.disk(0), u64::MAX)),
            placement: Placement::Separate,
        };
        let (report, _) = check(stores, &mut |_, _| {}).unwrap();
        assert_eq!(report.worst(), Some(severity), "page {page}: {report:?}");
    }
}

#[test]
fn another_data_device_is_fatal() {
    let (mine, _, _) = in_use();
    let (other, _, _) = in_use();
    let report = run(vec![other[0].clone(), mine[1].clone()]);
    assert!(report.identity_mismatch);
    assert_eq!(report.worst(), Some(Severity::Fatal));
}
