// SPDX-License-Identifier: GPL-2.0

//! Growing a managed device in place, while it is not active.
//!
//! The growth is one step: it takes effect with the first superblock copy that says so. Until then the old size is in
//! force, whatever was cut, and growing again goes on. In this order:
//!
//! 1. The state as it is goes into a checkpoint, so that the log is void and both superblock copies are equal; if
//!    the checkpoint areas get larger, into area 0, which stays where it is.
//! 2. On a separate metadata device: the data device gets its label at its new end. The checkpoint of the grown planes
//!    goes to area 1, which begins behind all that the old area 0 takes.
//! 3. In a reserved tail, which moves: the old superblocks get the new size of the data device. From then on they are good
//!    for growing alone; without that, a device that is made smaller again would show a state from before it was used.
//!    Ring and checkpoint are written at the new end, which must not reach the old tail.
//! 4. The superblocks are written.
//! 5. A tail that moved loses its old superblocks.
//!
//! What is new is dirty: what the data device holds there is nobody's, and the master is zero past its end.

use pristine_shared::checkpoint::Plane;
use pristine_shared::error::Error as Core;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::layout::{Layout, Placement};
use pristine_shared::state::BlockState;
use pristine_shared::superblock::{Label, Root, Superblock, MAGIC};
use pristine_shared::{PAGE_SECTORS, PAGE_SIZE, SECTOR_SIZE};

use crate::commit::{write_checkpoint, write_superblocks, Changes};
use crate::error::{Error, Result};
use crate::open::{has_label, read_copy, read_superblock, Metadata, Stores};
use crate::planes::{Initial, Planes};
use crate::storage::{Storage, StorageExt, Window};

/// How to grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrowOptions {
    /// Bytes to manage. By default all that the data device has besides its label or the metadata.
    pub managed_bytes: Option<u64>,
    /// Bytes that the data device had when its reserved tail was written. By default the tail is searched for, which
    /// reads the whole device.
    pub from_bytes: Option<u64>,
}

/// A growth that is possible, and not done yet.
#[derive(Debug)]
pub struct Growth<S> {
    metadata: Metadata<Window<S>>,
    planes: Planes,
    after: Superblock,
    /// Sectors of the data device and of what holds the metadata, as they are now.
    sectors: Sizes,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    data: u64,
    meta: u64,
}

/// What the sizes come to.
struct Sizing<S> {
    stores: Stores<Window<S>>,
    before: Superblock,
    copies_equal: bool,
    after: Superblock,
    sectors: Sizes,
}

/// What growing a device that is in use would come to: its superblock now, and as it would be. The kernel grows such a
/// device itself; here is said beforehand whether it can.
///
/// # Errors
///
/// As [`Growth::plan`]; metadata in the reserved tail of a data device that is larger now is not looked for.
pub fn preview<S: Storage>(
    stores: Stores<S>,
    options: &GrowOptions,
) -> Result<(Superblock, Superblock)> {
    let sizing = Sizing::new(stores, options, None)?;
    Ok((sizing.before, sizing.after))
}

impl<S: Storage> Sizing<S> {
    /// `search` gets the progress of the search for a tail; without it there is none.
    fn new(
        stores: Stores<S>,
        options: &GrowOptions,
        search: Option<&mut dyn FnMut(u64, u64)>,
    ) -> Result<Self> {
        let mut stores = Stores {
            meta: Window::new(stores.meta),
            data: stores.data.map(Window::new),
            placement: stores.placement,
        };
        if stores.placement == Placement::Separate && stores.data.is_none() {
            return Err(Error::NeedsDataDevice {
                metadata: stores.meta.path().into(),
            });
        }
        let sectors = Sizes {
            data: stores.data.as_ref().unwrap_or(&stores.meta).sectors(),
            meta: stores.meta.sectors(),
        };
        if let (Placement::Tail, Some(progress)) = (stores.placement, search) {
            let pages = find_tail(&mut stores, options.from_bytes, progress)?;
            if pages != stores.meta.pages() {
                stores.meta.resize(pages * PAGE_SECTORS);
            }
        }
        let (before, copies_equal) = read_superblock(&mut stores)?;
        let shrinks = |found: u64, expected: u64| Error::Shrinks {
            path: stores.data.as_ref().unwrap_or(&stores.meta).path().into(),
            found: found.saturating_mul(SECTOR_SIZE),
            expected: expected.saturating_mul(SECTOR_SIZE),
        };
        if sectors.data < before.data_sectors {
            return Err(shrinks(sectors.data, before.data_sectors));
        }
        if before.needs_check {
            return Err(Error::core(stores.meta.path(), Core::NeedsCheck));
        }
        let wanted = wanted(&stores, &before, sectors, options)?;
        if wanted < before.geometry.sectors() {
            return Err(shrinks(wanted, before.geometry.sectors()));
        }
        let after = before
            .grown(wanted, sectors.data, sectors.meta / PAGE_SECTORS)
            .map_err(|e| Error::core(stores.meta.path(), e))?;
        if stores.placement == Placement::Tail && after.layout != before.layout {
            let end = stores.meta.pages();
            let start = match after.layout.undo_pages {
                0 => after.layout.log_start,
                _ => after.layout.undo_start,
            };
            if start < end {
                let short = end - start;
                return Err(Error::NoRoomToMove {
                    path: stores.meta.path().into(),
                    missing: short.saturating_mul(PAGE_SIZE as u64),
                });
            }
        }
        if let Some(data) = &mut stores.data {
            data.resize(before.data_sectors);
        }
        Ok(Self {
            stores,
            before,
            copies_equal,
            after,
            sectors,
        })
    }
}

impl<S: Storage> Growth<S> {
    /// Looks at devices that are open already and finds out what growing them comes to; nothing is written.
    /// `progress` gets the pages read and those that there are, while a tail is searched for.
    ///
    /// # Errors
    ///
    /// Those of opening and loading metadata; [`Error::Shrinks`], [`Error::TooSmall`], [`Error::NoRoomToMove`],
    /// [`Error::Ambiguous`].
    pub fn plan(
        stores: Stores<S>,
        options: &GrowOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let sizing = Sizing::new(stores, options, Some(progress))?;
        let mut metadata = Metadata {
            stores: sizing.stores,
            superblock: sizing.before,
            copies_equal: sizing.copies_equal,
            log_end: None,
        };
        if metadata.stores.placement == Placement::Separate {
            // In a tail a growth that was cut has left the new size.
            metadata = metadata.verified()?;
        }
        let (planes, _) = metadata.load()?;
        Ok(Self {
            metadata,
            planes,
            after: sizing.after,
            sectors: sizing.sectors,
        })
    }

    /// What the superblock says now.
    pub fn before(&self) -> &Superblock {
        &self.metadata.superblock
    }

    /// What it will say, but for the checkpoint that it names.
    pub fn after(&self) -> &Superblock {
        &self.after
    }

    /// Whether there is anything to do.
    pub fn is_needed(&self) -> bool {
        let before = self.before();
        self.after.geometry != before.geometry
            || self.after.layout != before.layout
            || self.sectors.data != before.data_sectors
    }

    /// Grows the device. What is returned is open for writing.
    ///
    /// # Errors
    ///
    /// Those of reading and writing. Whatever fails, the old size is in force or the new one.
    pub fn apply(mut self) -> Result<Metadata<Window<S>>> {
        if !self.is_needed() {
            return Ok(self.metadata);
        }
        let moves = self.after.layout != self.before().layout;
        let metadata = &mut self.metadata;
        metadata.commit(&self.planes, &Changes::default())?;
        let separate = metadata.stores.placement == Placement::Separate;
        if moves && separate && metadata.superblock.root.area != 0 {
            metadata.commit(&self.planes, &Changes::default())?;
        }
        let old = metadata.superblock;
        let old_end = metadata.stores.meta.sectors();
        let tail_moves = moves && !separate;
        if tail_moves {
            let begun = Superblock {
                sequence: old.sequence.wrapping_add(1),
                data_sectors: self.after.data_sectors,
                ..old
            };
            write_superblocks(&mut metadata.stores, &begun)?;
            metadata.superblock = begun;
        }

        let planes = self.planes.grown(self.after.geometry);
        let stores = &mut metadata.stores;
        stores.meta.resize(self.sectors.meta);
        if let Some(data) = &mut stores.data {
            data.resize(self.sectors.data);
        }
        let new = Superblock {
            sequence: metadata.superblock.sequence.wrapping_add(1),
            clean: true,
            root: Root {
                area: if tail_moves {
                    0
                } else {
                    1 - old.root.area.min(1)
                },
                seq: old.root.seq.wrapping_add(1),
                log_seq: old.root.log_seq,
                previous_log_seq: 0,
                dirty_blocks: planes.ones(Plane::Dirty),
                stale_blocks: planes.ones(Plane::Stale),
            },
            undo: if moves { old.undo.emptied() } else { old.undo },
            ..self.after
        };
        let label_moves = Label::page_of(old.data_sectors) != Label::page_of(new.data_sectors);
        if label_moves {
            write_label(stores, &new)?;
        }
        if tail_moves {
            // What is there must not be taken for a damaged superblock when the writing of the first one is cut.
            wipe_anchors(&mut stores.meta)?;
            let zero = [0; PAGE_SIZE];
            for page in 0..new.layout.log_pages {
                stores.meta.write_page(new.layout.log_start + page, &zero)?;
            }
        }
        write_checkpoint(&mut stores.meta, &new, &planes)?;
        stores.meta.flush()?;
        metadata.copies_equal = false;
        write_superblocks(stores, &new)?;
        metadata.copies_equal = true;
        metadata.superblock = new;
        metadata.log_end = None;

        let stores = &mut metadata.stores;
        if !label_moves {
            // It is told by its UUID; that it names the size is for those who look.
            write_label(stores, &new)?;
        }
        if tail_moves {
            stores.meta.resize(old_end);
            let wiped = wipe_anchors(&mut stores.meta);
            stores.meta.resize(self.sectors.meta);
            wiped?;
        }
        Ok(self.metadata)
    }
}

/// Sectors to manage.
fn wanted<S: Storage>(
    stores: &Stores<Window<S>>,
    before: &Superblock,
    sectors: Sizes,
    options: &GrowOptions,
) -> Result<u64> {
    let old = &before.geometry;
    let pages = sectors.data / PAGE_SECTORS;
    // For the whole device, which is at least what it takes for what is left of it.
    let all = Geometry::new(pages * PAGE_SECTORS, old.block_shift(), old.extent_shift())
        .map_err(|e| Error::core(stores.meta.path(), e))?;
    let reserve = match stores.placement {
        Placement::Separate => 1,
        Placement::Tail => {
            Layout::total_pages(&all, before.layout.log_pages) + before.layout.undo_pages
        }
    };
    let left = pages.saturating_sub(reserve) * PAGE_SECTORS;
    match options.managed_bytes {
        None => {
            let block = (old.block_size() / SECTOR_SIZE).max(1);
            // The last block may have ended with the device.
            Ok((left / block * block).max(old.sectors()))
        }
        Some(bytes) => {
            let wanted = bytes.div_ceil(SECTOR_SIZE);
            if stores.placement == Placement::Separate && wanted > left {
                return Err(Error::TooSmall {
                    path: stores.data.as_ref().unwrap_or(&stores.meta).path().into(),
                    what: "the managed size asked for with the label".into(),
                    found: sectors.data.saturating_mul(SECTOR_SIZE),
                    needed: bytes.saturating_add(PAGE_SIZE as u64),
                });
            }
            Ok(wanted)
        }
    }
}

fn write_label<S: Storage>(stores: &mut Stores<S>, sb: &Superblock) -> Result {
    let Some(data) = &mut stores.data else {
        return Ok(());
    };
    let label = Label {
        data_uuid: sb.data_uuid,
        meta_uuid: sb.meta_uuid,
        data_sectors: sb.data_sectors,
    };
    let mut page = [0; PAGE_SIZE];
    label.encode(&mut page);
    let at = Label::page_of(sb.data_sectors).map_err(|e| Error::core(data.path(), e))?;
    data.write_page(at, &page)?;
    data.flush()
}

fn wipe_anchors<S: Storage>(meta: &mut S) -> Result {
    for copy in [0, 1] {
        let at = Placement::Tail
            .anchor(copy, meta.pages())
            .map_err(|e| Error::core(meta.path(), e))?;
        meta.write_page(at, &[0; PAGE_SIZE])?;
    }
    meta.flush()
}

/// Pages that the device had when its tail was written.
///
/// The superblocks tell by their layout how far from the device's end they are, so one in its place is known. There may
/// be several: of earlier uses of the device, of images of other devices in its content, and the one that a growth
/// has left that was cut before it could take it away. Of several with one UUID the newest counts; with several UUIDs
/// nothing is guessed.
fn find_tail<S: Storage>(
    stores: &mut Stores<Window<S>>,
    from_bytes: Option<u64>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    let meta = &mut stores.meta;
    let total = meta.pages();
    if tail_of(meta, total).is_some() {
        return Ok(total);
    }
    if has_label(meta) {
        return Err(Error::NeedsMetadataDevice {
            data: meta.path().into(),
        });
    }
    if let Some(bytes) = from_bytes {
        let pages = bytes / PAGE_SIZE as u64;
        if pages > total {
            return Err(Error::Shrinks {
                path: meta.path().into(),
                found: total.saturating_mul(PAGE_SIZE as u64),
                expected: bytes,
            });
        }
        match tail_of(meta, pages) {
            // Where a growth was begun, it may have come to its end elsewhere.
            Some(sb) if sb.data_sectors / PAGE_SECTORS == pages => return Ok(pages),
            Some(_) => {}
            None => {
                return Err(Error::NoTail {
                    path: meta.path().into(),
                    from: bytes,
                })
            }
        }
    }
    let mut found: Vec<(u64, Superblock)> = Vec::new();
    let mut page = [0; PAGE_SIZE];
    for at in 0..total {
        if at % 1024 == 0 {
            progress(at, total);
        }
        meta.read_page(at, &mut page)?;
        if !page.starts_with(&MAGIC) {
            continue;
        }
        // As copy 0 it is the last page of the device, as copy 1 the 16th from its end.
        for (copy, pages) in [(0, at + 1), (1, at + 16)] {
            let known = found.iter().any(|(p, _)| *p == pages);
            match Superblock::decode(&page, copy, pages) {
                Ok(sb) if sb.layout.placement == Placement::Tail && !known => {
                    found.push((pages, sb));
                }
                _ => {}
            }
        }
    }
    progress(total, total);
    let path = meta.path();
    let newest = found.iter().max_by_key(|(_, sb)| sb.sequence);
    let Some((pages, newest)) = newest else {
        return Err(Error::core(path, Core::NotFormatted));
    };
    if found.iter().any(|(_, sb)| sb.meta_uuid != newest.meta_uuid) {
        let sizes = found.iter().map(|(pages, _)| pages * PAGE_SIZE as u64);
        return Err(Error::Ambiguous {
            path: path.into(),
            sizes: sizes.collect(),
        });
    }
    Ok(*pages)
}

/// The newer good superblock copy of a tail that ends at page `pages`.
fn tail_of<S: Storage>(meta: &mut Window<S>, pages: u64) -> Option<Superblock> {
    let now = meta.sectors();
    meta.resize(pages * PAGE_SECTORS);
    let mut page = [0; PAGE_SIZE];
    let copies = [0, 1].map(|copy| read_copy(meta, Placement::Tail, copy, &mut page).ok());
    meta.resize(now);
    copies
        .into_iter()
        .flatten()
        .filter(|sb| sb.layout.placement == Placement::Tail)
        .max_by_key(|sb| sb.sequence)
}

impl Planes {
    /// These planes, and more blocks behind them, all dirty. A last block that the device did not hold to its end gets
    /// dirty too, unless it is stale.
    fn grown(&self, geometry: Geometry) -> Self {
        let mut grown = Self::new(geometry, Initial::Clean);
        for (to, from) in [
            (&mut grown.dirty, &self.dirty),
            (&mut grown.stale, &self.stale),
        ] {
            for (to, from) in to.iter_mut().zip(from) {
                *to = *from;
            }
        }
        if geometry.sectors() == self.geometry().sectors() {
            return grown;
        }
        let mut fresh = Run {
            start: self.geometry().whole_blocks(),
            end: geometry.blocks(),
        };
        if self.state(fresh.start) == BlockState::Stale {
            fresh.start += 1;
        }
        grown.set(fresh, BlockState::Dirty);
        grown
    }
}
