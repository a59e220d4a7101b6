// SPDX-License-Identifier: GPL-2.0

//! Metadata to start from: made by the formatter, with a commit and some records on top.

use std::sync::OnceLock;

use pristine_metadata::{format_on, Changes, FormatOptions, Initial, Stores};
use pristine_shared::geometry::Run;
use pristine_shared::layout::{Placement, ANCHOR_PAGES};
use pristine_shared::log::{Entry, Writer};
use pristine_shared::state::BlockState;
use pristine_shared::superblock::{Label, Superblock, Uuid};
use pristine_shared::{PAGE_SECTORS, PAGE_SIZE};

use crate::disk::{fix_crc, Disk, Kind};

/// The UUIDs that all images have, so that one input always means the same.
pub const META_UUID: Uuid = [0x4d; 16];
/// See [`META_UUID`].
pub const DATA_UUID: Uuid = [0x44; 16];
/// Blocks of the managed device: one plane page and a bit.
pub const BLOCKS: u64 = 32512 + 777;
/// Pages of the log.
pub const LOG_PAGES: u64 = 16;

/// The devices of an image.
#[derive(Clone, Debug)]
pub struct Image {
    /// What holds the metadata.
    pub meta: Disk,
    /// The data device, if that is another.
    pub data: Option<Disk>,
    /// The superblock, as it was made.
    pub sb: Superblock,
}

impl Image {
    /// The devices as the metadata library takes them.
    pub fn stores(&self) -> Stores<Disk> {
        Stores {
            meta: self.meta.clone(),
            data: self.data.clone(),
            placement: self.sb.layout.placement,
        }
    }

    /// What page `n` of the metadata is.
    pub fn kind(&self, n: u64) -> Option<Kind> {
        let l = &self.sb.layout;
        let within = |start: u64, len: u64| (start..start + len).contains(&n);
        let anchors = [0, 1].map(|copy| l.placement.anchor(copy, self.meta.len()));
        if anchors.contains(&Ok(n)) {
            Some(Kind::Root)
        } else if within(l.log_start, l.log_pages) {
            Some(Kind::Log)
        } else if l
            .area_start
            .iter()
            .any(|start| within(*start, l.area_pages))
        {
            Some(Kind::Checkpoint)
        } else {
            None
        }
    }

    /// The pages of the metadata, anchors first.
    pub fn pages(&self) -> Vec<u64> {
        let l = &self.sb.layout;
        let anchors = [0, 1].map(|copy| l.placement.anchor(copy, self.meta.len()).unwrap());
        let rest = l.log_start..l.area_start[1] + l.area_pages;
        anchors.into_iter().chain(rest).collect()
    }

    /// Writes a record that announces extents, or those of its sectors whose bit is set.
    pub fn write_record(&mut self, seq: u64, runs: &[Run], sectors: u8) {
        let entries: Vec<_> = runs.iter().copied().map(Entry::Intent).collect();
        self.write_entries(seq, &entries, sectors);
    }

    /// Writes a record, or those of its sectors whose bit is set.
    pub fn write_entries(&mut self, seq: u64, entries: &[Entry], sectors: u8) {
        let mut page = [0; PAGE_SIZE];
        let mut writer = Writer::new(&mut page);
        for entry in entries {
            let _ = writer.push(*entry);
        }
        writer.finish(&self.sb.meta_uuid, seq);
        self.meta
            .write_sectors(self.sb.layout.log_page(seq), &page, sectors);
    }
}

/// The image for this placement.
pub fn base(placement: Placement) -> &'static Image {
    static SEPARATE: OnceLock<Image> = OnceLock::new();
    static TAIL: OnceLock<Image> = OnceLock::new();
    match placement {
        Placement::Separate => &SEPARATE,
        Placement::Tail => &TAIL,
    }
    .get_or_init(|| make(placement))
}

fn make(placement: Placement) -> Image {
    // The metadata takes less than this.
    const ROOM: u64 = ANCHOR_PAGES + LOG_PAGES + 32;
    let (meta, data) = match placement {
        Placement::Separate => (Disk::new(ROOM), Some(Disk::new(BLOCKS + 1))),
        Placement::Tail => (Disk::new(BLOCKS + ROOM), None),
    };
    let stores = Stores {
        meta,
        data,
        placement,
    };
    let options = FormatOptions {
        managed_bytes: Some(BLOCKS * PAGE_SIZE as u64),
        log_pages: Some(LOG_PAGES),
        initial: Initial::Clean,
        ..FormatOptions::default()
    };
    let mut metadata = format_on(stores, &options).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    let set = |planes: &mut pristine_metadata::Planes, start, end, state| {
        planes.set(Run { start, end }, state);
    };
    set(&mut planes, 0, 32512, BlockState::Dirty);
    set(&mut planes, 32600, 32700, BlockState::Dirty);
    set(&mut planes, 32700, 32800, BlockState::Stale);
    metadata.commit(&planes, &Changes::default()).unwrap();
    let mut image = Image {
        sb: *metadata.superblock(),
        meta: metadata.stores_mut().meta.clone(),
        data: metadata.stores_mut().data.clone(),
    };
    image.fix_identity();
    let log_seq = image.sb.root.log_seq;
    for n in 0..3 {
        let run = |start, len| Run {
            start,
            end: start + len,
        };
        image.write_record(log_seq + n, &[run(n * 3, 2), run(100 + n, 1)], 0xff);
    }
    image
}

impl Image {
    /// Replaces the random UUIDs.
    fn fix_identity(&mut self) {
        let sb = Superblock {
            meta_uuid: META_UUID,
            data_uuid: DATA_UUID,
            clean: false,
            ..self.sb
        };
        self.sb = sb;
        for n in self.pages() {
            let Some(kind) = self.kind(n) else { continue };
            if self.meta.page(n).is_none_or(|page| *page == [0; PAGE_SIZE]) {
                continue;
            }
            let page = self.meta.page_mut(n);
            match kind {
                Kind::Root => sb.encode(page),
                Kind::Checkpoint | Kind::Log => fix_crc(page, kind, &META_UUID),
            }
        }
        if let Some(data) = &mut self.data {
            let sectors = data.len() * PAGE_SECTORS;
            let label = Label {
                data_uuid: DATA_UUID,
                meta_uuid: META_UUID,
                data_sectors: sectors,
            };
            label.encode(data.page_mut(Label::page_of(sectors).unwrap()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pristine_metadata::{check, Metadata};

    #[test]
    fn images_are_good() {
        for placement in [Placement::Separate, Placement::Tail] {
            let image = base(placement);
            let (report, _) = check(image.stores(), &mut |_, _| {}).unwrap();
            assert_eq!(report.worst(), None, "{:?}", report.findings);
            let (_, end) = Metadata::open_on(image.stores()).unwrap().load().unwrap();
            assert_eq!(end.records, 3);
        }
    }
}
