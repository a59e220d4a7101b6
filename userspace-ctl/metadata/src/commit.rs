// SPDX-License-Identifier: GPL-2.0

//! A new checkpoint, written so that a cut leaves the old state or the new one.

use pristine_shared::checkpoint::{self, PageState, Place, Plane};
use pristine_shared::error::Error as Core;
use pristine_shared::log::{self, RecordKind};
use pristine_shared::superblock::{ImageId, Root, Superblock};
use pristine_shared::undo::Undo;
use pristine_shared::{Page, PAGE_SIZE, SECTOR_SIZE};

use crate::error::{Error, Result};
use crate::open::{read_copy, Metadata, Stores};
use crate::planes::{Planes, Select};
use crate::storage::{Storage, StorageExt};

/// An image as the metadata knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its Merkle root.
    pub id: ImageId,
    /// Its generation, 0 for one that was never published.
    pub generation: u64,
    /// Its size in bytes, at most that of the managed device.
    pub bytes: u64,
}

/// What a commit changes besides the planes; `None` leaves a thing as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The image that Clean means equality with.
    pub image: Option<Image>,
    /// Whether the device is being filled for the first time.
    pub provisioning: Option<bool>,
    /// Whether a check is needed before the device is used.
    pub needs_check: Option<bool>,
    /// Keep the undo area though no block is dirty: blocks that are stale are to be put back from it.
    ///
    /// Otherwise a commit after which no block is dirty empties it; so does, in any case, one that changes the image.
    pub keep_undo: bool,
}

impl<S: Storage> Metadata<S> {
    /// Makes `planes` and `changes` the state of the device, in one step that a power cut cannot divide.
    ///
    /// The checkpoint goes to the area that no superblock copy refers to; it is durable before the first copy
    /// changes, and that before the second does. The log is void afterwards.
    ///
    /// The caller has made durable on the data device whatever makes a bit of `planes` go (rule 2 of the contract).
    ///
    /// # Errors
    ///
    /// After an I/O error the device holds the old state or the new one, and this handle refuses nothing: a
    /// second commit is safe. A damaged log refuses, because where it ends must be known.
    pub fn commit(&mut self, planes: &Planes, changes: &Changes) -> Result {
        let old = self.superblock;
        if !self.stores.meta.writable() {
            return Err(Error::ReadOnly {
                path: self.stores.meta.path().into(),
            });
        }
        if *planes.geometry() != old.geometry {
            return Err(Error::WrongPlanes {
                found: planes.blocks(),
                expected: old.geometry.blocks(),
            });
        }
        let managed = old.geometry.sectors().saturating_mul(SECTOR_SIZE);
        if let Some(image) = changes.image.filter(|i| i.bytes > managed) {
            return Err(Error::ImageTooLarge {
                image: image.bytes,
                managed,
            });
        }
        let end = self.log_end()?;
        self.heal_ring(end.records)?;
        self.commit_at(planes, changes, end.next_seq)
    }

    /// As [`Metadata::commit`], when it is known already that `next_log_seq` is above every record in the ring.
    pub(crate) fn commit_at(
        &mut self,
        planes: &Planes,
        changes: &Changes,
        next_log_seq: u64,
    ) -> Result {
        let old = self.superblock;
        if !self.copies_equal {
            self.heal()?;
        }
        let image = changes.image.unwrap_or(Image {
            id: old.image_id,
            generation: old.generation,
            bytes: old.image_bytes,
        });
        let new = Superblock {
            sequence: old.sequence.wrapping_add(1),
            image_bytes: image.bytes,
            generation: image.generation,
            image_id: image.id,
            clean: true,
            needs_check: changes.needs_check.unwrap_or(old.needs_check),
            provisioning: changes.provisioning.unwrap_or(old.provisioning),
            undo: if image.id != old.image_id || (planes.is_undirtied() && !changes.keep_undo) {
                old.undo.emptied()
            } else {
                Undo {
                    // With `keep_undo` those that had originals are stale now.
                    kept: if changes.keep_undo {
                        0
                    } else {
                        old.undo.kept.min(planes.count(Select::Dirty))
                    },
                    ..old.undo
                }
            },
            root: Root {
                area: 1 - old.root.area.min(1),
                seq: old.root.seq.wrapping_add(1),
                log_seq: next_log_seq,
                // The planes may have lost bits since the checkpoint before.
                previous_log_seq: 0,
                dirty_blocks: planes.ones(Plane::Dirty),
                stale_blocks: planes.ones(Plane::Stale),
            },
            ..old
        };
        write_checkpoint(&mut self.stores.meta, &new, planes)?;
        self.stores.meta.flush()?;
        self.copies_equal = false;
        write_superblocks(&mut self.stores, &new)?;
        self.copies_equal = true;
        self.superblock = new;
        // Nothing was written since, and the record at `next_seq` does not exist yet.
        self.log_end = None;
        Ok(())
    }
}

impl<S: Storage> Metadata<S> {
    /// Makes a superblock copy that is damaged or older equal to the good one.
    ///
    /// An older copy refers to the area that the next commit writes, so it must stop doing so before that. The good
    /// copy is not touched: a cut that garbles what is being written must leave one.
    fn heal(&mut self) -> Result {
        let sb = self.superblock;
        let mut buffer = [0; PAGE_SIZE];
        for copy in [0, 1] {
            let stores = &mut self.stores;
            if read_copy(&mut stores.meta, stores.placement, copy, &mut buffer) != Ok(sb) {
                write_superblock(stores, &sb, copy)?;
            }
        }
        self.copies_equal = true;
        Ok(())
    }
}

impl<S: Storage> Metadata<S> {
    /// Blanks the pages of the ring that are damaged or cannot be read; only for a log that could be replayed, of
    /// `records` records, so that they are none of these.
    ///
    /// Where the new log begins, or once it has grown up to one, the damage could be a record, and recovery would
    /// refuse.
    fn heal_ring(&mut self, records: u64) -> Result {
        let sb = self.superblock;
        let (ring, first) = (sb.layout.log_pages.max(1), sb.root.log_seq);
        let mut buffer = [0; PAGE_SIZE];
        for at in 0..ring {
            let page = sb.layout.log_start + at;
            let is_needed = (at + ring - first % ring) % ring < records;
            let damaged = match self.stores.meta.read_page(page, &mut buffer) {
                Ok(()) => log::classify(&sb.meta_uuid, &buffer) == RecordKind::Damaged,
                Err(e) if is_needed => return Err(e),
                Err(_) => true,
            };
            if damaged {
                self.stores.meta.write_page(page, &[0; PAGE_SIZE])?;
            }
        }
        Ok(())
    }
}

/// Writes both copies, each durable before the next is touched.
pub(crate) fn write_superblocks<S: Storage>(stores: &mut Stores<S>, sb: &Superblock) -> Result {
    write_superblock(stores, sb, 0)?;
    write_superblock(stores, sb, 1)
}

fn write_superblock<S: Storage>(stores: &mut Stores<S>, sb: &Superblock, copy: u8) -> Result {
    let mut page = [0; PAGE_SIZE];
    sb.encode(&mut page);
    let at = stores
        .placement
        .anchor(copy, stores.meta.pages())
        .map_err(|e| Error::core(stores.meta.path(), e))?;
    stores.meta.write_page(at, &page)?;
    stores.meta.flush()
}

/// Writes the checkpoint that the root of `sb` names: the plane pages that must be stored, then the index.
pub(crate) fn write_checkpoint<S: Storage>(
    meta: &mut S,
    sb: &Superblock,
    planes: &Planes,
) -> Result {
    let geometry = &sb.geometry;
    let per_plane = checkpoint::plane_pages(geometry);
    let core = |e| Error::core("checkpoint", e);
    let start = *sb
        .layout
        .area_start
        .get(usize::from(sb.root.area))
        .ok_or_else(|| core(Core::BadGeometry("area")))?;
    let place = |n: u64| -> Result<Place<'_>> {
        Ok(Place {
            meta_uuid: &sb.meta_uuid,
            area: sb.root.area,
            seq: sb.root.seq,
            index: u32::try_from(n).map_err(|_| core(Core::BadGeometry("plane pages")))?,
        })
    };
    let mut page: Page = [0; PAGE_SIZE];
    let split = |n: u64| {
        if n < per_plane {
            (Plane::Dirty, n)
        } else {
            (Plane::Stale, n - per_plane)
        }
    };
    let state = |n: u64| {
        let (plane, page) = split(n);
        page_state(planes, plane, page)
    };

    for n in 0..per_plane * 2 {
        if state(n) != PageState::Stored {
            continue;
        }
        let (plane, at) = split(n);
        let words = page_words(planes, plane, at);
        checkpoint::encode_plane(&mut page, &place(n)?, |i| {
            words.get(i).copied().unwrap_or(0)
        });
        meta.write_page(start + checkpoint::index_pages(geometry) + n, &page)?;
    }
    for n in 0..checkpoint::index_pages(geometry) {
        checkpoint::encode_index(&mut page, &place(n)?, |entry| {
            if entry < per_plane * 2 {
                state(entry)
            } else {
                PageState::Zero
            }
        });
        meta.write_page(start + n, &page)?;
    }
    Ok(())
}

/// The words of a plane that one of its pages holds.
fn page_words(planes: &Planes, plane: Plane, page: u64) -> &[u64] {
    let words = planes.plane(plane);
    let from = usize::try_from(page)
        .unwrap_or(usize::MAX)
        .saturating_mul(checkpoint::PAGE_WORDS)
        .min(words.len());
    let upto = from.saturating_add(checkpoint::PAGE_WORDS).min(words.len());
    words.get(from..upto).unwrap_or(&[])
}

fn page_state(planes: &Planes, plane: Plane, page: u64) -> PageState {
    let words = page_words(planes, plane, page);
    if words.iter().all(|w| *w == 0) {
        return PageState::Zero;
    }
    let full = words
        .iter()
        .enumerate()
        .all(|(i, w)| *w == checkpoint::valid_mask(planes.geometry(), page, i));
    if full {
        PageState::Ones
    } else {
        PageState::Stored
    }
}
