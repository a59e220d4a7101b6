// SPDX-License-Identifier: GPL-2.0

//! Activation: from what lies on disk to the state in memory.

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::area::Area;
use super::checkpointer::{Checkpointer, Retire};
use super::fetch::StaleMap;
use super::meta::{errno, MetaIo};
use super::tracker::Tracker;
use super::Pristine;
use crate::dm::{Buffer, Errno};
use crate::shared::bits;
use crate::shared::checkpoint::{self, Plane};
use crate::shared::error::Error as Damage;
use crate::shared::geometry::{Geometry, Run};
use crate::shared::recovery::{self, Sink};
use crate::shared::superblock::Superblock;
use crate::shared::table::Features;

/// Reads the superblock and checks that it belongs to these devices and to what the table line asks for (rule 5
/// of the contract). `sectors` is the length of the target.
pub(super) fn read_superblock(
    meta: &MetaIo,
    features: &Features,
    sectors: u64,
    buffer: &mut Buffer,
) -> Result<Superblock, Damage> {
    let page = buffer.first().map_err(|_| Damage::BadGeometry("buffer"))?;
    let sb = recovery::load_superblock(&mut meta.source(), meta.placement(), meta.pages(), page)?;
    sb.verify_size(meta.data().sectors())?;
    let uuid = meta.data_uuid(&sb, page)?;
    sb.verify_data(meta.data().sectors(), &uuid)?;
    if sectors != sb.geometry.sectors() {
        return Err(Damage::ManagedSize(sectors, sb.geometry.sectors()));
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
    Ok(sb)
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
        let sb =
            read_superblock(&self.meta, &self.features, sectors, cp.buffer()).map_err(refused)?;
        if sb.meta_uuid != self.meta_uuid
            || sb.geometry != self.geometry
            || sb.layout != self.layout
            || sb.image_id != self.image_id
        {
            pr_err!(
                "{}: the metadata was formatted since the table was loaded\n",
                self.meta.data().name()
            );
            return Err(Errno::MediumType.into());
        }
        let mut scratch = Buffer::new(2)?;
        let next_seq = self.load_state(cp, &sb, &mut scratch).map_err(refused)?;
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
            // The log added something, or ends in a torn record: fold it in before anything is written to it.
            pr_info!(
                "{}: not stopped in order; {} blocks count as dirty\n",
                self.meta.data().name(),
                self.tracker.dirty_count()
            );
            self.write_checkpoint(cp, Retire::All, false)?;
        }
        Ok(())
    }

    /// Fills the tracker. Returns the number that the next record must have, if the log is not as a clean stop
    /// leaves it.
    fn load_state(
        &self,
        cp: &mut Checkpointer,
        sb: &Superblock,
        scratch: &mut Buffer,
    ) -> Result<Option<u64>, Damage> {
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
        Ok((!sb.clean || end.records != 0 || end.torn).then_some(end.next_seq))
    }
}
