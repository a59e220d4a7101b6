// SPDX-License-Identifier: GPL-2.0

//! All of the metadata as it lies on disk, decoded.

use std::collections::HashMap;

use pristine_shared::checkpoint::{self, PageState, Place, Plane};
use pristine_shared::layout::Placement;
use pristine_shared::log::{self, RecordKind};
use pristine_shared::superblock::{self, Label, Superblock, Uuid};
use pristine_shared::table::Hex;
use pristine_shared::undo;
use pristine_shared::PAGE_SIZE;

use crate::open::{read_copy, Stores};
use crate::storage::{CoreSource, Storage};

/// Everything, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Dump {
    /// "separate" or "tail".
    pub placement: &'static str,
    /// Pages of the device that holds the metadata.
    pub device_pages: u64,
    /// Both superblock copies.
    pub superblocks: [SuperblockDump; 2],
    /// Which of the copies is used (the newer good one), if one can be.
    pub current: Option<u8>,
    /// Why none can be used.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub error: Option<String>,
    /// The data device's label; absent with metadata in the tail and when the data device was not given.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub label: Option<LabelDump>,
    /// Both checkpoint areas; empty when no superblock says where they are.
    pub areas: Vec<Area>,
    /// All records of the ring in the order of their pages, blank ones left out.
    pub log: Vec<Record>,
    /// What the undo area holds; absent without one.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub undo: Option<UndoDump>,
}

/// The undo area.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct UndoDump {
    /// Its first page.
    pub start: u64,
    /// Its pages.
    pub pages: u64,
    /// One past the last page in use, counted from its start.
    pub used: u64,
    /// Chunks in it.
    pub chunks: u64,
    /// Headers that are damaged.
    pub damaged_headers: u64,
    /// The pages of the data device whose originals it has, as first and one past the last.
    pub originals: Vec<(u64, u64)>,
}

/// A superblock copy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct SuperblockDump {
    /// Where it lies.
    pub page: Option<u64>,
    /// Why it cannot be read.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub error: Option<String>,
    /// Its fields in the order of the format; empty if it cannot be read.
    pub fields: Vec<(&'static str, String)>,
}

/// The label of a data device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct LabelDump {
    /// Where it lies on the data device.
    pub page: u64,
    /// Why it cannot be read.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub error: Option<String>,
    /// Its fields.
    pub fields: Vec<(&'static str, String)>,
}

/// A checkpoint area.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Area {
    /// 0 or 1.
    pub number: u8,
    /// Its first page.
    pub start: u64,
    /// Its pages.
    pub pages: u64,
    /// Whether the superblock names it.
    pub current: bool,
    /// The checkpoint that is in it as a whole; `None` if none is.
    pub checkpoint: Option<u64>,
    /// What its index says of the pages of the dirty plane.
    pub dirty: PlaneDump,
    /// What its index says of the pages of the stale plane.
    pub stale: PlaneDump,
    /// What is wrong with it, if a checkpoint was found in it.
    pub errors: Vec<String>,
}

/// The pages of a plane in a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct PlaneDump {
    /// Pages that are all zero.
    pub zero: u64,
    /// Pages that are all one.
    pub ones: u64,
    /// Pages that are stored.
    pub stored: u64,
    /// Blocks whose bit is set.
    pub blocks: u64,
}

/// A page of the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Record {
    /// Where it lies.
    pub page: u64,
    /// "whole", "torn", "damaged" or "unreadable".
    pub kind: &'static str,
    /// Its number.
    pub seq: Option<u64>,
    /// Whether a recovery replays it.
    pub replayed: bool,
    /// The extents that it announces, as first and one past the last.
    pub extents: Vec<(u64, u64)>,
    /// The blocks that it calls dirty, likewise.
    pub dirty: Vec<(u64, u64)>,
    /// The extents of which it tells all dirty blocks, likewise.
    pub settled: Vec<(u64, u64)>,
    /// The blocks that are not stale any more with it, likewise.
    pub valid: Vec<(u64, u64)>,
}

/// A UUID as people write it.
pub fn uuid_text(uuid: &Uuid) -> String {
    let hex = Hex(uuid).to_string();
    [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)]
        .into_iter()
        .filter_map(|(from, to)| hex.get(from..to))
        .collect::<Vec<_>>()
        .join("-")
}

/// Decodes everything on `stores`. Damage is part of the result, never an error.
pub fn dump<S: Storage>(stores: &mut Stores<S>) -> Dump {
    let placement = stores.placement;
    let pages = stores.meta.pages();
    let mut buffer = [0; PAGE_SIZE];
    let copies = [0, 1].map(|n| read_copy(&mut stores.meta, placement, n, &mut buffer));
    let chosen = superblock::choose(copies[0], copies[1]);
    let superblocks = [0u8, 1].map(|n| {
        let page = placement.anchor(n, pages).ok();
        match &copies[usize::from(n)] {
            Ok(sb) => SuperblockDump {
                page,
                error: None,
                fields: superblock_fields(sb),
            },
            Err(e) => SuperblockDump {
                page,
                error: Some(e.to_string()),
                fields: Vec::new(),
            },
        }
    });
    let mut dump = Dump {
        placement: match placement {
            Placement::Separate => "separate",
            Placement::Tail => "tail",
        },
        device_pages: pages,
        superblocks,
        current: None,
        error: chosen.as_ref().err().map(ToString::to_string),
        label: label(stores),
        areas: Vec::new(),
        log: Vec::new(),
        undo: None,
    };
    if let Ok(sb) = chosen {
        dump.undo = undo_area(&mut stores.meta, &sb);
        dump.current = Some(u8::from(copies[0] != Ok(sb)));
        dump.areas = [0, 1]
            .into_iter()
            .map(|n| area(&mut stores.meta, &sb, n))
            .collect();
        dump.log = ring(&mut stores.meta, &sb);
    }
    dump
}

fn undo_area<S: Storage>(meta: &mut S, sb: &Superblock) -> Option<UndoDump> {
    if sb.layout.undo_pages == 0 {
        return None;
    }
    let mut pages = Vec::new();
    let mut chunks = 0;
    let mut buffer = [0; PAGE_SIZE];
    let found = undo::walk(
        &mut CoreSource::new(meta),
        sb,
        0,
        &mut buffer,
        |chunk, header| {
            chunks += 1;
            pages.extend(undo::entries_of(header, chunk).map(|e| e.page));
        },
    );
    pages.sort_unstable();
    pages.dedup();
    let mut originals: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match originals.last_mut() {
            Some((_, end)) if *end == page => *end += 1,
            _ => originals.push((page, page + 1)),
        }
    }
    Some(UndoDump {
        start: sb.layout.undo_start,
        pages: sb.layout.undo_pages,
        used: found.end,
        chunks,
        damaged_headers: found.damaged,
        originals,
    })
}

fn superblock_fields(sb: &Superblock) -> Vec<(&'static str, String)> {
    let g = &sb.geometry;
    let l = &sb.layout;
    let image = if sb.image_id == [0; 32] {
        "-".to_owned()
    } else {
        Hex(&sb.image_id).to_string()
    };
    vec![
        ("sequence", sb.sequence.to_string()),
        ("meta_uuid", uuid_text(&sb.meta_uuid)),
        ("data_uuid", uuid_text(&sb.data_uuid)),
        ("data_sectors", sb.data_sectors.to_string()),
        ("managed_sectors", g.sectors().to_string()),
        ("image_bytes", sb.image_bytes.to_string()),
        ("block_bytes", g.block_size().to_string()),
        ("extent_bytes", g.extent_size().to_string()),
        ("clean", sb.clean.to_string()),
        ("needs_check", sb.needs_check.to_string()),
        ("provisioning", sb.provisioning.to_string()),
        ("log_start", l.log_start.to_string()),
        ("log_pages", l.log_pages.to_string()),
        (
            "area_start",
            format!("{} {}", l.area_start[0], l.area_start[1]),
        ),
        ("area_pages", l.area_pages.to_string()),
        ("checkpoint_area", sb.root.area.to_string()),
        ("checkpoint_seq", sb.root.seq.to_string()),
        ("log_seq", sb.root.log_seq.to_string()),
        ("dirty_blocks", sb.root.dirty_blocks.to_string()),
        ("stale_blocks", sb.root.stale_blocks.to_string()),
        ("generation", sb.generation.to_string()),
        ("image_id", image),
        ("undo_start", l.undo_start.to_string()),
        ("undo_pages", l.undo_pages.to_string()),
        ("undo_epoch", sb.undo.epoch.to_string()),
        ("undo_used", sb.undo.used.to_string()),
        ("undo_kept", sb.undo.kept.to_string()),
    ]
}

fn label<S: Storage>(stores: &mut Stores<S>) -> Option<LabelDump> {
    let data = match stores.placement {
        Placement::Tail => return None,
        Placement::Separate => stores.data.as_mut()?,
    };
    let page = Label::page_of(data.sectors()).ok()?;
    let mut buffer = [0; PAGE_SIZE];
    let label = match data.read(page, &mut buffer) {
        Ok(()) => Label::decode(&buffer).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    Some(match label {
        Ok(label) => LabelDump {
            page,
            error: None,
            fields: vec![
                ("data_uuid", uuid_text(&label.data_uuid)),
                ("meta_uuid", uuid_text(&label.meta_uuid)),
                ("data_sectors", label.data_sectors.to_string()),
            ],
        },
        Err(error) => LabelDump {
            page,
            error: Some(error),
            fields: Vec::new(),
        },
    })
}

fn area<S: Storage>(meta: &mut S, sb: &Superblock, number: u8) -> Area {
    let current = sb.root.area == number;
    let mut area = Area {
        number,
        start: sb.layout.area_start[usize::from(number.min(1))],
        pages: sb.layout.area_pages,
        current,
        checkpoint: None,
        dirty: PlaneDump::default(),
        stale: PlaneDump::default(),
        errors: Vec::new(),
    };
    let candidates = if current {
        vec![sb.root.seq]
    } else {
        // The one before, or the one that a power cut kept from becoming the next.
        vec![sb.root.seq.saturating_sub(1), sb.root.seq + 1]
    };
    for seq in candidates.into_iter().filter(|seq| *seq != 0) {
        if current || index_is(meta, sb, number, seq) {
            area.checkpoint = Some(seq);
            read_area(meta, sb, &mut area, seq);
            break;
        }
    }
    area
}

fn place(sb: &Superblock, area: u8, seq: u64, index: u64) -> Place<'_> {
    Place {
        meta_uuid: &sb.meta_uuid,
        area,
        seq,
        index: u32::try_from(index).unwrap_or(u32::MAX),
    }
}

/// Whether all index pages of an area are of checkpoint `seq`.
fn index_is<S: Storage>(meta: &mut S, sb: &Superblock, area: u8, seq: u64) -> bool {
    let start = sb.layout.area_start[usize::from(area.min(1))];
    let mut page = [0; PAGE_SIZE];
    (0..checkpoint::index_pages(&sb.geometry)).all(|n| {
        meta.read(start + n, &mut page).is_ok()
            && checkpoint::verify_index(&page, &place(sb, area, seq, n)).is_ok()
    })
}

fn read_area<S: Storage>(meta: &mut S, sb: &Superblock, area: &mut Area, seq: u64) {
    let geometry = &sb.geometry;
    let per_plane = checkpoint::plane_pages(geometry);
    let indexes = checkpoint::index_pages(geometry);
    let mut errors = Vec::new();
    crate::check::area_pages(
        sb,
        area.number,
        seq,
        &mut |at, into| {
            meta.read(at, into)
                .map_err(|_| pristine_shared::Error::Io(at))
        },
        &mut |_, at, e| errors.push(format!("page {at}: {e}")),
    );
    area.errors = errors;
    let (mut index, mut page) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let mut index_good = false;
    for n in 0..per_plane * 2 {
        let i = n / checkpoint::ENTRIES_PER_INDEX;
        let at = place(sb, area.number, seq, i);
        if n % checkpoint::ENTRIES_PER_INDEX == 0 {
            index_good = meta.read(area.start + i, &mut index).is_ok()
                && checkpoint::verify_index(&index, &at).is_ok();
        }
        let Some(state) = index_good
            .then(|| checkpoint::index_state(&index, &at, n).ok())
            .flatten()
        else {
            continue;
        };
        let (plane, plane_page) = if n < per_plane {
            (Plane::Dirty, n)
        } else {
            (Plane::Stale, n - per_plane)
        };
        let to = match plane {
            Plane::Dirty => &mut area.dirty,
            Plane::Stale => &mut area.stale,
        };
        match state {
            PageState::Zero => to.zero += 1,
            PageState::Ones => {
                to.ones += 1;
                to.blocks += checkpoint::blocks_in_page(geometry, plane_page).len();
            }
            PageState::Stored => {
                to.stored += 1;
                let good = meta.read(area.start + indexes + n, &mut page).is_ok()
                    && checkpoint::verify_plane(&page, &place(sb, area.number, seq, n)).is_ok();
                if good {
                    to.blocks += (0..checkpoint::PAGE_WORDS)
                        .map(|w| u64::from(checkpoint::word(&page, w).count_ones()))
                        .sum::<u64>();
                }
            }
        }
    }
}

fn ring<S: Storage>(meta: &mut S, sb: &Superblock) -> Vec<Record> {
    let mut page = [0; PAGE_SIZE];
    let mut records = Vec::new();
    for n in 0..sb.layout.log_pages {
        let at = sb.layout.log_start + n;
        let (kind, seq) = match meta.read(at, &mut page) {
            Err(_) => ("unreadable", None),
            Ok(()) => match log::classify(&sb.meta_uuid, &page) {
                RecordKind::Blank => continue,
                RecordKind::Whole(seq) => ("whole", Some(seq)),
                RecordKind::Torn(seq) => ("torn", Some(seq)),
                RecordKind::Damaged => ("damaged", None),
            },
        };
        let (mut extents, mut dirty) = (Vec::new(), Vec::new());
        let (mut settled, mut valid) = (Vec::new(), Vec::new());
        if kind == "whole" {
            // An entry of an unknown kind ends the list; the check says so.
            let _ = log::entries(&sb.meta_uuid, &page, |entry| {
                let (list, run) = match entry {
                    log::Entry::Intent(run) => (&mut extents, run),
                    log::Entry::Dirty(run) => (&mut dirty, run),
                    log::Entry::Settled(run) => (&mut settled, run),
                    log::Entry::Valid(run) => (&mut valid, run),
                };
                list.push((run.start, run.end));
                Ok(())
            });
        }
        records.push(Record {
            page: at,
            kind,
            seq,
            replayed: false,
            extents,
            dirty,
            settled,
            valid,
        });
    }
    let by_seq: HashMap<u64, usize> = (0..)
        .zip(&records)
        .filter(|(_, r): &(usize, &Record)| r.kind == "whole")
        .filter_map(|(i, r)| Some((r.seq?, i)))
        .collect();
    let mut next = sb.root.log_seq;
    while let Some(record) = by_seq.get(&next).and_then(|i| records.get_mut(*i)) {
        record.replayed = true;
        next += 1;
    }
    records
}
