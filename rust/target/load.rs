// SPDX-License-Identifier: GPL-2.0

//! Activation: from what lies on disk to the state in memory.

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::area::Area;
use super::checkpointer::{Checkpointer, Retire, BATCH};
use super::fetch::StaleMap;
use super::meta::{errno, MetaIo};
use super::tracker::Tracker;
use super::Pristine;
use crate::dm::{Buffer, Errno, WriteFlags};
use crate::shared::bits;
use crate::shared::checkpoint::{self, Plane};
use crate::shared::error::Error as Damage;
use crate::shared::geometry::{Geometry, Run};
use crate::shared::layout::Placement;
use crate::shared::log::{self, RecordKind};
use crate::shared::recovery::{self, LogEnd, Sink};
use crate::shared::superblock::{Root, Superblock};
use crate::shared::table::Features;

/// The superblock of a device that is to become active.
pub(super) struct Found {
    /// As it is on disk.
    pub(super) now: Superblock,
    /// As the table wants it: the same, or grown.
    pub(super) wanted: Superblock,
}

/// Reads the superblock and checks that it belongs to these devices and to what the table line asks for (rule 5
/// of the contract). `sectors` is the length of the target.
pub(super) fn read_superblock(
    meta: &MetaIo,
    features: &Features,
    sectors: u64,
    buffer: &mut Buffer,
) -> Result<Found, Damage> {
    let page = buffer.first().map_err(|_| Damage::BadGeometry("buffer"))?;
    let sb = recovery::load_superblock(&mut meta.source(), meta.placement(), meta.pages(), page)?;
    let data_sectors = meta.data_sectors();
    if !features.grow || data_sectors < sb.data_sectors {
        sb.verify_size(data_sectors)?;
    }
    let uuid = meta.data_uuid(&sb, page)?;
    sb.verify_data(sb.data_sectors, &uuid)?;
    let wanted = if features.grow {
        sb.grown(sectors, data_sectors, meta.pages())?
    } else if sectors == sb.geometry.sectors() {
        sb
    } else {
        return Err(Damage::ManagedSize(sectors, sb.geometry.sectors()));
    };
    if meta.placement() == Placement::Tail && wanted.layout != sb.layout {
        return Err(Damage::TailMoves);
    }
    if features.meta_uuid.is_some_and(|uuid| uuid != sb.meta_uuid) {
        return Err(Damage::MetaUuid);
    }
    if features.image.is_some_and(|image| image != sb.image_id) {
        return Err(Damage::ImageId);
    }
    if let Some(generation) = features.generation {
        if generation != sb.generation {
            return Err(Damage::Generation(sb.generation, generation));
        }
    }
    if sb.needs_check {
        return Err(Damage::NeedsCheck);
    }
    Ok(Found { now: sb, wanted })
}

/// Says in the kernel log why metadata is refused.
pub(super) fn complain(meta: &MetaIo, why: &Damage) {
    pr_err!("{}: {}\n", meta.data().name(), core::format_args!("{why}"));
}

/// Takes the planes of a checkpoint.
struct Planes<'a> {
    tracker: &'a Tracker,
    /// `None` if no block may be stale.
    map: Option<&'a StaleMap>,
    /// The area that is being read.
    area: Option<&'a mut Area>,
    /// Stale blocks, when there must be none.
    stale: u64,
}

impl Planes<'_> {
    fn count(&mut self, plane: Plane, page: u64, count: u64) {
        if let Some(area) = &mut self.area {
            area.add(plane, page, count);
        }
    }
}

impl Sink for Planes<'_> {
    fn or_word(&mut self, plane: Plane, word: u64, mask: u64) {
        let count = mask.count_ones().into();
        self.count(
            plane,
            word * bits::WORD_BITS / checkpoint::BITS_PER_PAGE,
            count,
        );
        // CAST: The words of a plane fit in memory.
        let i = word as usize;
        match (plane, self.map) {
            (Plane::Dirty, _) => self.tracker.recover_word(i, mask),
            (Plane::Stale, Some(map)) => map.recover_word(i, mask),
            (Plane::Stale, None) => self.stale += count,
        }
    }

    fn set(&mut self, plane: Plane, run: Run) {
        // From a checkpoint it is always a whole page; from the log the count is not wanted.
        self.count(plane, run.start / checkpoint::BITS_PER_PAGE, run.len());
        match (plane, self.map) {
            (Plane::Dirty, _) => self.tracker.recover(run),
            (Plane::Stale, Some(map)) => map.recover(run),
            (Plane::Stale, None) => self.stale += run.len(),
        }
    }

    fn intend(&mut self, extents: Run) {
        self.tracker.intend(extents);
    }

    fn settle(&mut self, extents: Run) {
        self.tracker.settle(extents);
    }

    fn validate(&mut self, run: Run) {
        if let Some(map) = self.map {
            map.recover_valid(run);
        }
    }

    fn conclude(&mut self, geometry: &Geometry) {
        self.tracker.conclude();
        let Some(map) = self.map else { return };
        // The stale bit outranks the dirty one; from here on a dirty block is one whose content counts.
        for (i, mask) in bits::words(Run {
            start: 0,
            end: geometry.blocks(),
        }) {
            self.tracker.forget_word(i, map.word(i) & mask);
        }
    }
}

impl Pristine {
    /// Loads the state and makes the device's metadata say that it is in use.
    pub(super) fn load(&self, cp: &mut Checkpointer) -> Result {
        let refused = |e: Damage| {
            complain(&self.meta, &e);
            errno(&e)
        };
        let sectors = self.geometry.sectors();
        let Found { now: sb, wanted } =
            read_superblock(&self.meta, &self.features, sectors, cp.buffer()).map_err(refused)?;
        if sb.meta_uuid != self.meta_uuid
            || wanted.geometry != self.geometry
            || wanted.layout != self.layout
            || sb.image_id != self.image_id
        {
            pr_err!(
                "{}: the metadata was formatted since the table was loaded\n",
                self.meta.data().name()
            );
            return Err(Errno::MediumType.into());
        }
        let mut scratch = Buffer::new(2)?;
        let end = self.load_state(cp, &sb, &mut scratch).map_err(refused)?;
        // The log adds something, or ends in a torn record.
        let next_seq = (!sb.clean || end.records != 0 || end.torn).then_some(end.next_seq);
        cp.sb = Some(sb);
        self.stats.checkpoint_seq.store(sb.root.seq, Relaxed);
        self.stats.generation.store(sb.generation, Relaxed);
        {
            let mut log = self.log.lock();
            log.hot.clear();
            log.next_seq = next_seq.unwrap_or(sb.root.log_seq);
            log.needed_seq = sb.root.log_seq;
            self.publish_log(&log);
        }
        // This also makes both copies equal again, if one was damaged or a crash came between them: an older copy
        // refers to the area that the next checkpoint is written to. When it fails the device stays inactive, and
        // whoever tries again begins with what is on the disk then.
        self.mark(cp, false).inspect_err(|_| {
            pr_err!(
                "{}: writing the superblock failed\n",
                self.meta.data().name()
            );
        })?;
        if next_seq.is_some() {
            pr_info!(
                "{}: not stopped in order; {} blocks count as dirty\n",
                self.meta.data().name(),
                self.tracker.dirty_count()
            );
        }
        let grows = wanted != sb;
        if grows {
            self.grow(cp, &wanted).inspect_err(|_| {
                pr_err!(
                    "{}: growing failed; the old size is in force\n",
                    self.meta.data().name()
                );
            })?;
        }
        self.load_undo(cp, &mut scratch)?;
        // The log is folded in before anything is written to it.
        if next_seq.is_some() || grows {
            self.write_checkpoint(cp, Retire::All, false)?;
        }
        if grows {
            pr_info!(
                "{}: grew from {} to {} managed sectors\n",
                self.meta.data().name(),
                sb.geometry.sectors(),
                sectors
            );
        }
        if end.damaged != 0 {
            self.heal_ring(cp, end.damaged)?;
        }
        Ok(())
    }

    /// Writes the damaged pages of the ring anew, when no record in it is needed.
    fn heal_ring(&self, cp: &mut Checkpointer, damaged: u64) -> Result {
        pr_warn!(
            "{}: {} pages of the log were damaged; nothing in them was needed, they are written anew\n",
            self.meta.data().name(),
            damaged
        );
        let ring = self.layout.log_start..self.layout.log_start + self.layout.log_pages;
        for page in ring {
            let read = self.meta.read(page, cp.buffer(), 1);
            let into = cp.buffer().first()?;
            if read.is_err() || log::classify(&self.meta_uuid, into) == RecordKind::Damaged {
                into.fill(0);
                self.meta
                    .write(page, cp.buffer(), 1, WriteFlags::default())?;
                self.count_meta(1);
            }
        }
        Ok(())
    }

    /// Prepares growth, which takes effect with the next checkpoint: the old size is in force until then. In
    /// `cp.sb` is the old superblock, as it is on disk in both copies.
    ///
    /// Areas that get larger must not be written over the checkpoint that is current. The first one stays where it
    /// begins, and the second one of the new layout lies behind all of the old first one; so the current one has to be
    /// the first.
    fn grow(&self, cp: &mut Checkpointer, wanted: &Superblock) -> Result {
        let Some(old) = cp.sb else { return Err(ENODEV) };
        if wanted.layout != old.layout && old.root.area != 0 {
            self.move_checkpoint(cp, &old)?;
        }
        let Some(old) = cp.sb else { return Err(ENODEV) };
        // It may be cut away again until the superblocks say that it is the device's.
        self.meta.write_label(wanted, cp.buffer())?;

        if wanted.geometry != old.geometry {
            let mut fresh = Run {
                start: old.geometry.whole_blocks(),
                end: wanted.geometry.blocks(),
            };
            if let Some(fetcher) = &self.fetcher {
                if fetcher.map.any_stale(fresh.start, fresh.start) {
                    fresh.start += 1;
                }
            }
            self.tracker.recover(fresh);
        }
        for area in [0, 1] {
            self.tracker.mark_all_changed(area);
            if let Some(fetcher) = &self.fetcher {
                fetcher.map.mark_all_changed(area);
            }
        }
        cp.sb = Some(Superblock {
            sequence: old.sequence,
            clean: false,
            root: Root {
                // The checkpoint becomes the one before, and no log leads from it to what is new.
                log_seq: 0,
                ..old.root
            },
            ..*wanted
        });
        Ok(())
    }

    /// Makes a copy of the current checkpoint in the first area the current one. Both superblock copies name the second
    /// area, so that the first one is free.
    fn move_checkpoint(&self, cp: &mut Checkpointer, old: &Superblock) -> Result {
        let [to, from] = old.layout.area_start;
        let mut done = 0;
        while done < old.layout.area_pages {
            // CAST: usize to u64, and back what is no more than it.
            let count = (BATCH as u64).min(old.layout.area_pages - done) as usize;
            self.meta.read(from + done, cp.buffer(), count)?;
            self.meta
                .write(to + done, cp.buffer(), count, WriteFlags::default())?;
            done += count as u64;
        }
        let sb = Superblock {
            sequence: old.sequence + 1,
            root: Root {
                area: 0,
                // There is no other checkpoint to fall back on.
                previous_log_seq: 0,
                ..old.root
            },
            ..*old
        };
        self.meta.write_superblock(&sb, cp.buffer())?;
        cp.sb = Some(sb);
        Ok(())
    }

    /// Fills the tracker. Returns where the log ends.
    fn load_state(
        &self,
        cp: &mut Checkpointer,
        sb: &Superblock,
        scratch: &mut Buffer,
    ) -> Result<LogEnd, Damage> {
        if let Some(fetcher) = &self.fetcher {
            fetcher.reset();
        }
        self.tracker.reset();
        cp.reset_areas();
        let (index, page) = scratch.pair().map_err(|_| Damage::BadGeometry("buffer"))?;
        let area = sb.root.area;

        let mut planes = Planes {
            tracker: &self.tracker,
            map: self.fetcher.as_ref().map(|fetcher| &fetcher.map),
            area: cp.area(area),
            stale: 0,
        };
        recovery::load_planes(&mut self.meta.source(), sb, index, page, &mut planes)?;
        if planes.stale != 0 {
            // It came to have them since the table was loaded.
            return Err(Damage::StaleBlocks(planes.stale));
        }
        planes.area = None;
        let end = recovery::replay(&mut self.meta.source(), sb, page, &mut planes)?;

        // What the area that is not current holds is of no interest; all of it is written anew.
        let outdated = [
            true,
            // Also if dirty bits of stale blocks were left out.
            end.records != 0 || end.torn || sb.root.stale_blocks != 0,
        ];
        for (area, outdated) in [1 - area, area].into_iter().zip(outdated) {
            if outdated {
                self.tracker.mark_all_changed(area);
                if let Some(fetcher) = &self.fetcher {
                    fetcher.map.mark_all_changed(area);
                }
            }
        }
        Ok(end)
    }
}
