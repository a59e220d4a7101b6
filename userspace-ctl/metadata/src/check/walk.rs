// SPDX-License-Identifier: GPL-2.0

//! The structures behind the superblock: both checkpoint areas and the log.

use pristine_shared::checkpoint::{self, PageState, Place};
use pristine_shared::error::{Error as Core, Structure};
use pristine_shared::log::{self, RecordKind};
use pristine_shared::recovery;
use pristine_shared::superblock::Superblock;
use pristine_shared::{Page, PAGE_SIZE};

use super::{Report, Severity, LOST};
use crate::storage::Storage;

/// The structures behind the superblock, one page after the other.
pub(super) struct Walk<'a, S> {
    meta: &'a mut S,
    sb: &'a Superblock,
    report: &'a mut Report,
    progress: &'a mut dyn FnMut(u64, u64),
    total: u64,
}

impl<'a, S: Storage> Walk<'a, S> {
    /// `total` is how many pages there are to read, for `progress`.
    pub(super) fn new(
        meta: &'a mut S,
        sb: &'a Superblock,
        report: &'a mut Report,
        progress: &'a mut dyn FnMut(u64, u64),
        total: u64,
    ) -> Self {
        Self {
            meta,
            sb,
            report,
            progress,
            total,
        }
    }

    /// Looks at all of them.
    pub(super) fn run(mut self) {
        self.current_area();
        self.other_area();
        self.log_ring();
    }

    fn read(&mut self, page: u64, into: &mut Page) -> pristine_shared::Result {
        self.report.pages_read += 1;
        (self.progress)(self.report.pages_read.min(self.total), self.total);
        self.meta.read(page, into).map_err(|_| Core::Io(page))
    }

    fn start(&self, area: u8) -> u64 {
        self.sb
            .layout
            .area_start
            .get(usize::from(area))
            .copied()
            .unwrap_or(0)
    }

    /// Every page of the current checkpoint must be good.
    fn current_area(&mut self) {
        let sb = self.sb;
        let mut bad = Vec::new();
        area_pages(
            sb,
            sb.root.area,
            sb.root.seq,
            &mut |page, into| self.read(page, into),
            &mut |structure, page, e| bad.push((structure, page, e)),
        );
        for (structure, page, e) in bad {
            self.report.add(Severity::Fatal, structure, page, e, LOST);
        }
    }

    /// The other area holds the checkpoint before, or parts of the next that a power cut left, or nothing.
    fn other_area(&mut self) {
        let sb = self.sb;
        let area = 1 - sb.root.area.min(1);
        if sb.root.seq == 1 {
            // Never written since the format.
            return;
        }
        let mut bad = Vec::new();
        area_pages(
            sb,
            area,
            sb.root.seq - 1,
            &mut |page, into| self.read(page, into),
            &mut |structure, page, e| bad.push((structure, page, e)),
        );
        if bad.is_empty() {
            return;
        }
        // A page that carries the next sequence shows that a checkpoint was under way.
        let start = self.start(area);
        let mut buffer = [0; PAGE_SIZE];
        let mut cut = false;
        for n in 0..sb.layout.area_pages {
            if cut || self.read(start + n, &mut buffer).is_err() {
                continue;
            }
            cut = is_of(sb, area, n, sb.root.seq + 1, &buffer);
        }
        for (structure, page, e) in bad {
            if cut {
                self.report.add(
                    Severity::Info,
                    structure,
                    page,
                    format!("{e}: a checkpoint was cut here"),
                    "the current checkpoint is in the other area; this one is written again next",
                );
            } else {
                self.report.add(
                    Severity::Warning,
                    structure,
                    page,
                    e,
                    "it is of the checkpoint before, which is not needed any more",
                );
            }
        }
    }

    fn log_ring(&mut self) {
        let sb = self.sb;
        let ring = sb.layout.log_pages.max(1);
        let mut buffer = [0; PAGE_SIZE];
        let mut kinds = Vec::new();
        for n in 0..ring {
            kinds.push(
                self.read(sb.layout.log_start + n, &mut buffer)
                    .map(|()| log::classify(&sb.meta_uuid, &buffer)),
            );
        }
        let kind_of = |seq: u64| {
            usize::try_from(seq % ring.max(1))
                .ok()
                .and_then(|i| kinds.get(i))
                .copied()
                .unwrap_or(Ok(RecordKind::Blank))
        };
        // What a replay reads: whole records from the root's on, and the page at which it ends.
        let first = sb.root.log_seq;
        let mut end = first;
        while end - first < ring && kind_of(end) == Ok(RecordKind::Whole(end)) {
            let page = sb.layout.log_page(end);
            let good = self.read(page, &mut buffer).and_then(|()| {
                log::entries(&sb.meta_uuid, &buffer, |entry| {
                    if !entry.fits(&sb.geometry) {
                        return Err(Core::BadField(Structure::Log(end), "past the end"));
                    }
                    Ok(())
                })
            });
            if let Err(e) = good {
                self.report
                    .add(Severity::Fatal, Structure::Log(end), page, e, LOST);
            }
            end += 1;
        }
        let full = end - first >= ring;
        for (n, kind) in (0..ring).zip(&kinds) {
            let page = sb.layout.log_start + n;
            let is_end = !full && page == sb.layout.log_page(end);
            let needed = (n + ring - first % ring) % ring < end - first;
            match kind {
                Err(_) | Ok(RecordKind::Damaged) => {
                    self.damaged_log_page(page, end, is_end, needed);
                }
                Ok(kind) => self.log_page(page, *kind, end, is_end, needed),
            }
        }
    }

    /// A page of the ring that is damaged or cannot be read. One that holds none of the log does not stop a replay.
    fn damaged_log_page(&mut self, page: u64, end: u64, is_end: bool, needed: bool) {
        let mut buffer = [0; PAGE_SIZE];
        let read = self.read(page, &mut buffer);
        let newest = read
            .map(|()| log::salvage(&self.sb.meta_uuid, &buffer, end).1)
            .unwrap_or(0);
        let record = Structure::Log(end);
        let report = &mut *self.report;
        let is_fatal = is_end && !recovery::ends_at(self.sb, end, read.ok().map(|()| &buffer));
        match read {
            Err(e) if is_fatal || needed => report.add(
                Severity::Fatal,
                "log ring",
                page,
                e,
                "the metadata device fails: replace it",
            ),
            _ if is_fatal => {
                report.add(Severity::Fatal, record, page, Core::BadChecksum(record), LOST);
            }
            _ if newest > end => {
                report.add(Severity::Fatal, record, page, Core::LogGap(end), LOST);
            }
            Err(e) => report.add(
                Severity::Warning,
                "log ring",
                page,
                e,
                "no record in it is needed; it will be written anew; if that fails, replace the device",
            ),
            Ok(()) => report.add(
                Severity::Warning,
                "log ring",
                page,
                "is damaged, in a record that is not needed any more",
                "it will be written over; if there are more of these, the device is failing",
            ),
        }
    }

    fn log_page(&mut self, page: u64, kind: RecordKind, end: u64, is_end: bool, needed: bool) {
        let report = &mut *self.report;
        let record = Structure::Log(end);
        match kind {
            RecordKind::Torn(seq) if is_end && seq == end => report.add(
                Severity::Info,
                record,
                page,
                "is torn: the power went while it was written",
                "nothing that it announced had begun; the next activation goes on behind it",
            ),
            RecordKind::Whole(seq) | RecordKind::Torn(seq) if seq > end => {
                let e = if is_end {
                    Core::LogOverwritten(end)
                } else {
                    Core::LogGap(end)
                };
                report.add(Severity::Fatal, record, page, e, LOST);
            }
            RecordKind::Torn(seq) if !needed => report.add(
                Severity::Info,
                "log ring",
                page,
                format!("record {seq} is torn: the power went while it was written"),
                "it is not needed any more",
            ),
            _ => {}
        }
    }
}

/// Whether page `n` of an area is a good page of the checkpoint `seq`, and not of one before.
fn is_of(sb: &Superblock, area: u8, n: u64, seq: u64, page: &Page) -> bool {
    let indexes = checkpoint::index_pages(&sb.geometry);
    let place = |seq, index: u64| Place {
        meta_uuid: &sb.meta_uuid,
        area,
        seq,
        index: u32::try_from(index).unwrap_or(u32::MAX),
    };
    if n < indexes {
        return checkpoint::verify_index(page, &place(seq, n)).is_ok();
    }
    // A plane page may be older than its checkpoint, so it is of this one only if the one before refuses it.
    let at = n - indexes;
    checkpoint::verify_plane(page, &place(seq, at)).is_ok()
        && checkpoint::verify_plane(page, &place(seq - 1, at)).is_err()
}

/// Reads all index pages of an area and all plane pages that they call stored, and reports each that is not good.
pub(crate) fn area_pages(
    sb: &Superblock,
    area: u8,
    seq: u64,
    read: &mut dyn FnMut(u64, &mut Page) -> pristine_shared::Result,
    bad: &mut dyn FnMut(Structure, u64, Core),
) {
    let geometry = &sb.geometry;
    let per_plane = checkpoint::plane_pages(geometry);
    let indexes = checkpoint::index_pages(geometry);
    let start = sb
        .layout
        .area_start
        .get(usize::from(area))
        .copied()
        .unwrap_or(0);
    // CAST: MAX_BLOCKS keeps plane pages below 2^32.
    let place = |index: u64| Place {
        meta_uuid: &sb.meta_uuid,
        area,
        seq,
        index: index as u32,
    };
    let (mut index, mut buffer) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    for i in 0..indexes {
        let at = place(i);
        let page = start + i;
        let name = Structure::Index(area, at.index);
        if let Err(e) = read(page, &mut index).and_then(|()| checkpoint::verify_index(&index, &at))
        {
            bad(name, page, e);
            continue;
        }
        let first = i * checkpoint::ENTRIES_PER_INDEX;
        for n in first..(first + checkpoint::ENTRIES_PER_INDEX).min(per_plane * 2) {
            match checkpoint::index_state(&index, &at, n) {
                Ok(PageState::Stored) => {}
                Ok(_) => continue,
                Err(e) => {
                    bad(name, page, e);
                    continue;
                }
            }
            let at = place(n);
            let page = start + indexes + n;
            let name = Structure::Plane(area, at.index);
            let good = read(page, &mut buffer)
                .and_then(|()| checkpoint::verify_plane(&buffer, &at))
                .and_then(|()| {
                    let past = (0..checkpoint::PAGE_WORDS).any(|w| {
                        let mask = checkpoint::valid_mask(geometry, n % per_plane, w);
                        checkpoint::word(&buffer, w) & !mask != 0
                    });
                    if past {
                        return Err(Core::BadField(name, "bits past the end"));
                    }
                    Ok(())
                });
            if let Err(e) = good {
                bad(name, page, e);
            }
        }
    }
}
