// SPDX-License-Identifier: GPL-2.0

//! Disks with a file system or with partitions, made by the real programs and then changed, through everything that
//! reads one: whatever the bytes are, it ends, and what is called free lies on the disk and holds no superblock.
//!
//! The disks are mostly holes; what they hold is in `disks/`, packed: see [`Disk::unpack`].

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use pristine_image::fs::ext4::Files;
use pristine_image::fs::{survey, Kind, Window, Zeroed};
use pristine_image::ReadAt;

const PAGE: u64 = 4096;
const DISKS: [&[u8]; 6] = [
    include_bytes!("disks/ext4.zst"),
    include_bytes!("disks/ext2.zst"),
    include_bytes!("disks/xfs.zst"),
    include_bytes!("disks/btrfs.zst"),
    include_bytes!("disks/vfat.zst"),
    include_bytes!("disks/gpt.zst"),
];

/// A disk: its length, and the pages that are not zero.
#[derive(Clone, Debug)]
struct Disk {
    len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Disk {
    /// From a zstd frame of: the length, then for each page its number (both u64, little-endian) and its bytes.
    fn unpack(packed: &[u8]) -> Self {
        let bytes = zstd::bulk::decompress(packed, 64 << 20).unwrap();
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let pages = (8..bytes.len()).step_by(8 + PAGE as usize).map(|at| {
            let content = bytes[at + 8..at + 8 + PAGE as usize].to_vec();
            (number(at), content)
        });
        Disk {
            len: number(0),
            pages: pages.collect(),
        }
    }

    fn page(&mut self, number: u64) -> &mut Vec<u8> {
        self.pages
            .entry(number)
            .or_insert_with(|| vec![0; PAGE as usize])
    }
}

impl ReadAt for Disk {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(offset + buffer.len() as u64 <= self.len, "beyond the disk");
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        for (number, content) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            let part = &content[(from - start) as usize..(to - start) as usize];
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
        }
        Ok(())
    }

    fn is_hole(&self, range: Range<u64>) -> bool {
        let mut pages = self
            .pages
            .range(range.start / PAGE..range.end.div_ceil(PAGE));
        pages.next().is_none()
    }
}

#[derive(Arbitrary, Debug)]
struct Edit {
    /// Which of the disk's pages.
    page: u16,
    at: u16,
    bytes: Vec<u8>,
    /// Whether the checksums in the page are made right again.
    right: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    disk: u8,
    edits: Vec<Edit>,
    /// Cuts the disk's end off.
    cut: Option<u16>,
}

fn put_crc(page: &mut [u8], range: Range<usize>, at: usize) {
    page[at..at + 4].fill(0);
    let crc = crc32c::crc32c(&page[range]);
    page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Makes the checksums of what the page holds right.
fn make_right(disk: &mut Disk, number: u64) {
    let page = disk.page(number);
    for sector in (0..PAGE as usize).step_by(512) {
        let at = match page.get(sector..sector + 4) {
            Some(b"XFSB") => 224,
            Some(b"XAGF") => 216,
            Some(b"XAFL") => 32,
            _ => continue,
        };
        put_crc(page, sector..sector + 512, sector + at);
    }
    if page.starts_with(b"AB3B") {
        put_crc(page, 0..PAGE as usize, 52);
    }
    // ext: 1 KiB into its first page, without the inversion at the end.
    if page[1080..1082] == [0x53, 0xef] {
        let crc = !crc32c::crc32c(&page[1024..2044]);
        page[2044..2048].copy_from_slice(&crc.to_le_bytes());
    }
    // Btrfs: the superblock, and nodes of a page.
    if page[64..72] == *b"_BHRfS_M" || (page[32..48] != [0; 16] && page[100] < 8) {
        let crc = crc32c::crc32c(&page[32..]);
        page[..4].copy_from_slice(&crc.to_le_bytes());
    }
}

pub(super) fn run(data: &[u8]) {
    static UNPACKED: OnceLock<Vec<Disk>> = OnceLock::new();
    let disks = UNPACKED.get_or_init(|| DISKS.iter().map(|disk| Disk::unpack(disk)).collect());
    let Some(input) = super::read::<Input>(data) else {
        return;
    };
    let mut disk = disks[usize::from(input.disk) % disks.len()].clone();
    for edit in &input.edits {
        let numbers: Vec<u64> = disk.pages.keys().copied().collect();
        let number = numbers[usize::from(edit.page) % numbers.len()];
        let page = disk.page(number);
        let at = usize::from(edit.at) % PAGE as usize;
        for (to, from) in page[at..].iter_mut().zip(&edit.bytes) {
            *to = *from;
        }
        if edit.right {
            make_right(&mut disk, number);
        }
    }
    if let Some(cut) = input.cut {
        disk.len = disk.len.saturating_sub(u64::from(cut) * 512);
    }
    check(disk);
}

fn check(disk: Disk) {
    let len = disk.len;
    // The disk's own reads fail on nothing.
    let survey = survey(&disk).unwrap();
    assert!(survey.free.end() <= len);
    let mut total = 0;
    for volume in &survey.volumes {
        assert!(volume.range.end <= len || volume.kept.is_some());
        total += volume.free + volume.dead;
        assert!(volume.kept.is_none() || volume.free + volume.dead == 0);
        let start = volume.range.start;
        let superblock = match volume.kind {
            Kind::Ext2 | Kind::Ext3 | Kind::Ext4 => 1024..2048,
            Kind::Btrfs => 65536..69632,
            _ => 0..512,
        };
        let superblock = start + superblock.start..start + superblock.end;
        assert!(!survey.free.touches(superblock), "a superblock is free");
        if volume.kind.is_ext() {
            let window = Window::new(&disk, volume.range.clone());
            if let Ok(files) = Files::read(&window) {
                for file in files.files.iter().take(20) {
                    let _ = files.content(&window, file);
                }
            }
        }
    }
    assert_eq!(survey.free.total(), total);
    let free = survey.free.clone();
    let zeroed = Zeroed::new(Box::new(disk), free.clone());
    for range in free.iter().take(4) {
        let mut bytes = vec![1; (range.end - range.start).min(PAGE) as usize];
        zeroed.read_at(range.start, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&b| b == 0));
    }
}
