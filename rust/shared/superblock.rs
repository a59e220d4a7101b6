// SPDX-License-Identifier: GPL-2.0

//! The superblock, root of the metadata, and the label of the data device.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes as _, IntoBytes as _};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::crc::crc32c;
use super::error::{Error, Result, Structure};
use super::geometry::Geometry;
use super::layout::{Layout, Placement};
use super::undo::Undo;
use super::{Page, PAGE_SIZE};

/// First bytes of a superblock.
pub const MAGIC: [u8; 8] = *b"PRISTINE";
/// First bytes of a data device's label.
pub const LABEL_MAGIC: [u8; 8] = *b"PRISTLBL";
/// The format version written and the newest one read.
pub const VERSION: u32 = 1;
/// The incompatible feature of an undo area (see [`super::undo`]): who does not know it would let it grow wrong.
pub const INCOMPAT_UNDO: u64 = 1;
/// Features without which the metadata cannot be used at all.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_UNDO;
/// Features without which it can be read but not changed. None is defined yet.
pub const RO_COMPAT_KNOWN: u64 = 0;

/// Largest sequence number of a superblock, checkpoint or record that is taken for one.
pub const MAX_SEQUENCE: u64 = 1 << 62;

/// A UUID as its 16 bytes in the order in which they are written.
pub type Uuid = [u8; 16];
/// An image id: the Merkle root of the master image, all zero when there is none.
pub type ImageId = [u8; 32];

const FLAG_CLEAN: u32 = 1;
const FLAG_NEEDS_CHECK: u32 = 2;
const FLAG_PROVISIONING: u32 = 4;
const FLAGS_KNOWN: u32 = FLAG_CLEAN | FLAG_NEEDS_CHECK | FLAG_PROVISIONING;

/// Where the checksum lies in a superblock and in a label; it covers all bytes after itself.
const CRC_AT: usize = 8;
const CRC_END: usize = 12;

/// The superblock as it lies on disk. The rest of its page is zero.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskSuperblock {
    magic: [u8; 8],
    crc: U32,
    version: U32,
    incompat: U64,
    ro_compat: U64,
    compat: U64,
    sequence: U64,
    meta_uuid: Uuid,
    data_uuid: Uuid,
    data_sectors: U64,
    managed_sectors: U64,
    image_bytes: U64,
    block_shift: U32,
    extent_shift: U32,
    placement: U32,
    flags: U32,
    log_start: U64,
    log_pages: U64,
    area_start: [U64; 2],
    area_pages: U64,
    checkpoint_area: U32,
    reserved: U32,
    checkpoint_seq: U64,
    log_seq: U64,
    dirty_blocks: U64,
    stale_blocks: U64,
    generation: U64,
    image_id: ImageId,
    previous_log_seq: U64,
    undo_start: U64,
    undo_pages: U64,
    undo_epoch: U64,
    undo_used: U64,
    undo_kept: U64,
}

const _: () = assert!(core::mem::size_of::<DiskSuperblock>() == 288);

/// The label as it lies on disk. The rest of its page is zero.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskLabel {
    magic: [u8; 8],
    crc: U32,
    version: U32,
    data_uuid: Uuid,
    meta_uuid: Uuid,
    data_sectors: U64,
}

const _: () = assert!(core::mem::size_of::<DiskLabel>() == 56);

/// The state of a managed device that the superblock roots: which checkpoint, and what the log adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// The area (0 or 1) that holds the current checkpoint.
    pub area: u8,
    /// The sequence number of that checkpoint; its index pages carry the same, its plane pages this or less.
    pub seq: u64,
    /// The first log record to be replayed over the checkpoint.
    pub log_seq: u64,
    /// The first log record that leads from the checkpoint before this one, in the other area, to here: what a repair
    /// may fall back on. 0 if the log alone does not lead here, as after a revert.
    pub previous_log_seq: u64,
    /// Blocks that the checkpoint calls dirty.
    pub dirty_blocks: u64,
    /// Blocks that the checkpoint calls stale.
    pub stale_blocks: u64,
}

/// What a superblock says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Grows by one with every write of the pair.
    pub sequence: u64,
    /// Identity of this metadata, new with every format.
    pub meta_uuid: Uuid,
    /// Identity of the data device.
    pub data_uuid: Uuid,
    /// Size of the whole data device in sectors when it was formatted.
    pub data_sectors: u64,
    /// Size of the image in bytes, at most the managed size; 0 when there is no image yet.
    pub image_bytes: u64,
    /// The managed device.
    pub geometry: Geometry,
    /// Where the structures are.
    pub layout: Layout,
    /// The device was suspended or removed in order: the checkpoint is exact and the log adds nothing.
    pub clean: bool,
    /// A failure was seen; only a check or a repair may go on from here.
    pub needs_check: bool,
    /// The device is being filled from its image for the first time.
    pub provisioning: bool,
    /// The current checkpoint.
    pub root: Root,
    /// The generation of the image, 0 when there is none.
    pub generation: u64,
    /// The image that Clean means equality with.
    pub image_id: ImageId,
    /// What the undo area holds; all zero if there is none.
    pub undo: Undo,
}

fn page_crc(page: &Page) -> u32 {
    crc32c(0, page.get(CRC_END..).unwrap_or(&[]))
}

fn store_crc(page: &mut Page) {
    let crc = page_crc(page);
    if let Some(at) = page.get_mut(CRC_AT..CRC_END) {
        at.copy_from_slice(&crc.to_le_bytes());
    }
}

impl Superblock {
    /// Writes the superblock into `page`.
    pub fn encode(&self, page: &mut Page) {
        page.fill(0);
        let flags = if self.clean { FLAG_CLEAN } else { 0 }
            | if self.needs_check {
                FLAG_NEEDS_CHECK
            } else {
                0
            }
            | if self.provisioning {
                FLAG_PROVISIONING
            } else {
                0
            };
        let disk = DiskSuperblock {
            magic: MAGIC,
            crc: U32::ZERO,
            version: VERSION.into(),
            incompat: if self.layout.undo_pages == 0 {
                U64::ZERO
            } else {
                INCOMPAT_UNDO.into()
            },
            ro_compat: U64::ZERO,
            compat: U64::ZERO,
            sequence: self.sequence.into(),
            meta_uuid: self.meta_uuid,
            data_uuid: self.data_uuid,
            data_sectors: self.data_sectors.into(),
            managed_sectors: self.geometry.sectors().into(),
            image_bytes: self.image_bytes.into(),
            block_shift: self.geometry.block_shift().into(),
            extent_shift: self.geometry.extent_shift().into(),
            placement: match self.layout.placement {
                Placement::Separate => 0,
                Placement::Tail => 1,
            }
            .into(),
            flags: flags.into(),
            log_start: self.layout.log_start.into(),
            log_pages: self.layout.log_pages.into(),
            area_start: self.layout.area_start.map(Into::into),
            area_pages: self.layout.area_pages.into(),
            checkpoint_area: u32::from(self.root.area).into(),
            reserved: U32::ZERO,
            checkpoint_seq: self.root.seq.into(),
            log_seq: self.root.log_seq.into(),
            dirty_blocks: self.root.dirty_blocks.into(),
            stale_blocks: self.root.stale_blocks.into(),
            generation: self.generation.into(),
            image_id: self.image_id,
            previous_log_seq: self.root.previous_log_seq.into(),
            undo_start: self.layout.undo_start.into(),
            undo_pages: self.layout.undo_pages.into(),
            undo_epoch: self.undo.epoch.into(),
            undo_used: self.undo.used.into(),
            undo_kept: self.undo.kept.into(),
        };
        if let Some((head, _)) =
            page.split_first_chunk_mut::<{ core::mem::size_of::<DiskSuperblock>() }>()
        {
            head.copy_from_slice(disk.as_bytes());
        }
        store_crc(page);
    }

    /// Reads superblock copy `copy` of a metadata device (or tail) of `device_pages` whole pages.
    ///
    /// # Errors
    ///
    /// Says which field or checksum is wrong; [`Error::NewerVersion`] and [`Error::UnknownFeatures`] before any
    /// field that a newer format may have changed is looked at.
    pub fn decode(page: &Page, copy: u8, device_pages: u64) -> Result<Self> {
        let me = Structure::Superblock(copy);
        let bad = |field| Error::BadField(me, field);
        let (disk, _) =
            DiskSuperblock::read_from_prefix(page.as_slice()).map_err(|_| bad("length"))?;
        if disk.magic != MAGIC {
            return Err(Error::BadMagic(me));
        }
        if disk.crc.get() != page_crc(page) {
            return Err(Error::BadChecksum(me));
        }
        if disk.version.get() > VERSION {
            return Err(Error::NewerVersion(disk.version.get(), VERSION));
        }
        if disk.version.get() == 0 {
            return Err(bad("version"));
        }
        // There is no read-only way to use metadata yet, so an unknown ro_compat feature refuses as well.
        let unknown =
            (disk.incompat.get() & !INCOMPAT_KNOWN) | (disk.ro_compat.get() & !RO_COMPAT_KNOWN);
        if unknown != 0 {
            return Err(Error::UnknownFeatures(unknown));
        }
        let flags = disk.flags.get();
        if flags & !FLAGS_KNOWN != 0 {
            return Err(bad("flags"));
        }
        let geometry = Geometry::new(
            disk.managed_sectors.get(),
            disk.block_shift.get(),
            disk.extent_shift.get(),
        )
        .map_err(|_| bad("geometry"))?;
        let layout = Layout {
            placement: match disk.placement.get() {
                0 => Placement::Separate,
                1 => Placement::Tail,
                _ => return Err(bad("placement")),
            },
            log_start: disk.log_start.get(),
            log_pages: disk.log_pages.get(),
            area_start: disk.area_start.map(U64::get),
            area_pages: disk.area_pages.get(),
            undo_start: disk.undo_start.get(),
            undo_pages: disk.undo_pages.get(),
        };
        let undo = Undo {
            epoch: disk.undo_epoch.get(),
            used: disk.undo_used.get(),
            kept: disk.undo_kept.get(),
        };
        let has_undo = disk.incompat.get() & INCOMPAT_UNDO != 0;
        if has_undo != (layout.undo_pages != 0)
            || has_undo != (1..=MAX_SEQUENCE).contains(&undo.epoch)
            || undo.used > layout.undo_pages
            || undo.kept > geometry.blocks()
            || (!has_undo && undo != Undo::default())
        {
            return Err(bad("undo area"));
        }
        Self::verify_layout(&layout, &geometry, device_pages, me)?;
        // In a tail the layout says so; here the label lies behind the managed blocks.
        let room = Label::page_of(disk.data_sectors.get()).unwrap_or(0) * super::PAGE_SECTORS;
        if layout.placement == Placement::Separate && geometry.sectors() > room {
            return Err(bad("managed size"));
        }
        let area = match disk.checkpoint_area.get() {
            0 => 0,
            1 => 1,
            _ => return Err(bad("checkpoint area")),
        };
        let blocks = geometry.blocks();
        if disk.dirty_blocks.get() > blocks || disk.stale_blocks.get() > blocks {
            return Err(bad("block counts"));
        }
        // Counting on from here must not overflow, for as long as any device lives.
        let countable = 1..=MAX_SEQUENCE;
        if ![disk.sequence, disk.checkpoint_seq, disk.log_seq]
            .iter()
            .all(|n| countable.contains(&n.get()))
        {
            return Err(bad("sequence"));
        }
        if disk.image_bytes.get() > geometry.sectors().saturating_mul(super::SECTOR_SIZE) {
            return Err(bad("image size"));
        }
        Ok(Self {
            sequence: disk.sequence.get(),
            meta_uuid: disk.meta_uuid,
            data_uuid: disk.data_uuid,
            data_sectors: disk.data_sectors.get(),
            image_bytes: disk.image_bytes.get(),
            geometry,
            layout,
            clean: flags & FLAG_CLEAN != 0,
            needs_check: flags & FLAG_NEEDS_CHECK != 0,
            provisioning: flags & FLAG_PROVISIONING != 0,
            root: Root {
                area,
                seq: disk.checkpoint_seq.get(),
                log_seq: disk.log_seq.get(),
                previous_log_seq: disk.previous_log_seq.get(),
                dirty_blocks: disk.dirty_blocks.get(),
                stale_blocks: disk.stale_blocks.get(),
            },
            generation: disk.generation.get(),
            image_id: disk.image_id,
            undo,
        })
    }

    /// A separate metadata device may have grown since; a tail may not have moved.
    fn verify_layout(
        layout: &Layout,
        geometry: &Geometry,
        device_pages: u64,
        me: Structure,
    ) -> Result {
        match layout.verify(geometry, device_pages) {
            Ok(()) => Ok(()),
            Err(e @ Error::TooSmall(..)) => Err(e),
            Err(_) => Err(Error::BadField(me, "layout")),
        }
    }

    /// The superblock of the same device grown to `sectors` managed sectors, on a data device that has `data_sectors` now;
    /// what holds the metadata has `pages` whole pages. The root is left as it is: whoever makes the growth take effect
    /// writes a checkpoint of the new geometry.
    ///
    /// Blocks from [`Geometry::whole_blocks`] of the old geometry on hold nobody knows what, and the master is zero
    /// there: they are dirty, but for one that is stale.
    ///
    /// # Errors
    ///
    /// [`Error::DataSize`] and [`Error::ManagedSize`] for sizes smaller than they were, [`Error::TooSmall`] if the
    /// metadata has no room, [`Error::BadGeometry`] if the data device has none.
    pub fn grown(&self, sectors: u64, data_sectors: u64, pages: u64) -> Result<Self> {
        if data_sectors < self.data_sectors {
            return Err(Error::DataSize(data_sectors, self.data_sectors));
        }
        let old = &self.geometry;
        if sectors < old.sectors() {
            return Err(Error::ManagedSize(sectors, old.sectors()));
        }
        let geometry = Geometry::new(sectors, old.block_shift(), old.extent_shift())?;
        let placement = self.layout.placement;
        let layout = Layout::with_undo(
            placement,
            &geometry,
            pages,
            self.layout.log_pages,
            self.layout.undo_pages,
        )?;
        if placement == Placement::Separate
            && sectors > Label::page_of(data_sectors)? * super::PAGE_SECTORS
        {
            return Err(Error::BadGeometry("managed size"));
        }
        Ok(Self {
            data_sectors,
            geometry,
            layout,
            // What grows may be written over it before the growth takes effect.
            undo: if layout == self.layout {
                self.undo
            } else {
                self.undo.emptied()
            },
            ..*self
        })
    }

    /// Checks the size of the data device, in sectors, against the one it was formatted with (rule 5). To be done
    /// before its label is read: the label lies at the end.
    pub fn verify_size(&self, sectors: u64) -> Result {
        if sectors != self.data_sectors {
            return Err(Error::DataSize(sectors, self.data_sectors));
        }
        Ok(())
    }

    /// Checks the identity of the data device (rule 5): its size now, in sectors, and the UUID it carries.
    pub fn verify_data(&self, sectors: u64, uuid: &Uuid) -> Result {
        self.verify_size(sectors)?;
        if *uuid != self.data_uuid {
            return Err(Error::DataUuid);
        }
        Ok(())
    }
}

/// Of two superblock copies the one to use: the newer of the good ones.
///
/// # Errors
///
/// The error of copy 0 (or of copy 1 where that says more) when neither is good. A newer version or unknown
/// features in either copy refuse: the other copy may be what an old tool left behind.
pub fn choose(first: Result<Superblock>, second: Result<Superblock>) -> Result<Superblock> {
    for copy in [&first, &second] {
        if let Err(e @ (Error::NewerVersion(..) | Error::UnknownFeatures(_))) = copy {
            return Err(*e);
        }
    }
    match (first, second) {
        (Ok(a), Ok(b)) if a.meta_uuid != b.meta_uuid => {
            Err(Error::Mismatched(Structure::Superblock(1)))
        }
        (Ok(a), Ok(b)) => Ok(if b.sequence > a.sequence { b } else { a }),
        (Ok(a), Err(_)) => Ok(a),
        (Err(_), Ok(b)) => Ok(b),
        (Err(Error::BadMagic(_)), Err(Error::BadMagic(_))) => Err(Error::NotFormatted),
        (Err(Error::BadMagic(_)), Err(e)) => Err(e),
        (Err(e), Err(_)) => Err(e),
    }
}

/// The label in the last whole page of a data device whose metadata is elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Identity of the data device.
    pub data_uuid: Uuid,
    /// The metadata that was formatted with it.
    pub meta_uuid: Uuid,
    /// Size of the data device in sectors when it was labelled.
    pub data_sectors: u64,
}

impl Label {
    /// Writes the label into `page`.
    pub fn encode(&self, page: &mut Page) {
        page.fill(0);
        let disk = DiskLabel {
            magic: LABEL_MAGIC,
            crc: U32::ZERO,
            version: VERSION.into(),
            data_uuid: self.data_uuid,
            meta_uuid: self.meta_uuid,
            data_sectors: self.data_sectors.into(),
        };
        if let Some((head, _)) =
            page.split_first_chunk_mut::<{ core::mem::size_of::<DiskLabel>() }>()
        {
            head.copy_from_slice(disk.as_bytes());
        }
        store_crc(page);
    }

    /// Reads a label.
    pub fn decode(page: &Page) -> Result<Self> {
        let (disk, _) = DiskLabel::read_from_prefix(page.as_slice())
            .map_err(|_| Error::BadField(Structure::Label, "length"))?;
        if disk.magic != LABEL_MAGIC {
            return Err(Error::BadMagic(Structure::Label));
        }
        if disk.crc.get() != page_crc(page) {
            return Err(Error::BadChecksum(Structure::Label));
        }
        if disk.version.get() > VERSION {
            return Err(Error::NewerVersion(disk.version.get(), VERSION));
        }
        Ok(Self {
            data_uuid: disk.data_uuid,
            meta_uuid: disk.meta_uuid,
            data_sectors: disk.data_sectors.get(),
        })
    }

    /// The page of the label on a data device of `sectors` sectors.
    ///
    /// # Errors
    ///
    /// [`Error::TooSmall`] for a device without room for anything beside it.
    pub fn page_of(sectors: u64) -> Result<u64> {
        let pages = sectors / super::PAGE_SECTORS;
        if pages < 2 {
            return Err(Error::TooSmall(pages, 2));
        }
        Ok(pages - 1)
    }
}

const _: () = assert!(core::mem::size_of::<DiskSuperblock>() <= PAGE_SIZE);
