// SPDX-License-Identifier: GPL-2.0

//! Fresh metadata.

use pristine_shared::checkpoint::{self, Place};
use pristine_shared::error::Error as Core;
use pristine_shared::geometry::{self, Geometry};
use pristine_shared::layout::{Layout, Placement};
use pristine_shared::superblock::{self, Label, Root, Superblock, Uuid};
use pristine_shared::undo::Undo;
use pristine_shared::{PAGE_SECTORS, PAGE_SIZE, SECTOR_SIZE};

use crate::commit::{write_checkpoint, write_superblocks, Image};
use crate::error::{Error, Result};
use crate::open::{has_label, read_copy, Devices, Metadata, Stores};
use crate::planes::{Initial, Planes};
use crate::signature;
use crate::storage::{Access, MetaDevice, Storage, StorageExt};

/// How to format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// log2 of the block size in bytes, 12 to 20.
    pub block_shift: u32,
    /// log2 of the extent size in bytes, from `block_shift` to 26.
    pub extent_shift: u32,
    /// Bytes to manage. By default the image's size rounded up to whole blocks; without an image all that the
    /// data device has besides its label or the metadata.
    pub managed_bytes: Option<u64>,
    /// Pages of the log ring; by default one for each 64 MiB managed, 16 to 256.
    pub log_pages: Option<u64>,
    /// The image that Clean means equality with.
    pub image: Option<Image>,
    /// What all blocks start as.
    pub initial: Initial,
    /// Whether the device is being filled for the first time.
    pub provisioning: bool,
    /// Bytes of an undo area, which keeps the originals of blocks that change; 0 for none. Rounded up to whole pages.
    pub undo_bytes: u64,
    /// Overwrite metadata or other data that is there.
    pub force: bool,
}

impl FormatOptions {
    fn undo_pages(&self) -> u64 {
        self.undo_bytes.div_ceil(PAGE_SIZE as u64)
    }
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self {
            block_shift: geometry::DEFAULT_BLOCK_SHIFT,
            extent_shift: geometry::DEFAULT_EXTENT_SHIFT,
            managed_bytes: None,
            log_pages: None,
            image: None,
            initial: Initial::default(),
            provisioning: false,
            undo_bytes: 0,
            force: false,
        }
    }
}

/// Formats `devices`. What is returned is open for writing and holds both devices exclusively.
///
/// A cut leaves the metadata that was there, none, or the new.
///
/// # Errors
///
/// Refuses, without `force`, metadata that exists and a metadata device that holds something else; always, devices
/// that are in use or too small.
pub fn format(devices: &Devices, options: &FormatOptions) -> Result<Metadata<MetaDevice>> {
    format_on(Stores::open(devices, Access::Write)?, options)
}

/// Formats devices that are open already; otherwise as [`format()`].
///
/// # Errors
///
/// As [`format()`].
pub fn format_on<S: Storage>(
    mut stores: Stores<S>,
    options: &FormatOptions,
) -> Result<Metadata<S>> {
    let (geometry, layout) = plan(&stores, options)?;
    if !options.force {
        refuse_existing(&mut stores, options, &geometry, &layout)?;
    }
    let superblock = Superblock {
        sequence: 1,
        meta_uuid: uuid()?,
        data_uuid: uuid()?,
        data_sectors: data_sectors(&stores),
        image_bytes: options.image.map_or(0, |i| i.bytes),
        geometry,
        layout,
        clean: true,
        needs_check: false,
        provisioning: options.provisioning,
        root: Root {
            area: 0,
            seq: 1,
            log_seq: 1,
            previous_log_seq: 0,
            dirty_blocks: match options.initial {
                Initial::Dirty => geometry.blocks(),
                _ => 0,
            },
            stale_blocks: match options.initial {
                Initial::Stale => geometry.blocks(),
                _ => 0,
            },
        },
        generation: options.image.map_or(0, |i| i.generation),
        image_id: options.image.map_or([0; 32], |i| i.id),
        undo: match layout.undo_pages {
            0 => Undo::default(),
            _ => Undo::default().opened(),
        },
    };

    // From here on the old metadata is not valid any more; the new is not until its superblocks are written.
    wipe_anchors(&mut stores)?;
    let zero = [0; PAGE_SIZE];
    for page in 0..layout.log_pages {
        stores.meta.write_page(layout.log_start + page, &zero)?;
    }
    let planes = Planes::new(geometry, options.initial);
    write_checkpoint(&mut stores.meta, &superblock, &planes)?;
    stores.meta.flush()?;
    if let Some(data) = &mut stores.data {
        let mut page = [0; PAGE_SIZE];
        let label = Label {
            data_uuid: superblock.data_uuid,
            meta_uuid: superblock.meta_uuid,
            data_sectors: superblock.data_sectors,
        };
        label.encode(&mut page);
        let at = Label::page_of(data.sectors()).map_err(|e| Error::core(data.path(), e))?;
        data.write_page(at, &page)?;
        data.flush()?;
    }
    write_superblocks(&mut stores, &superblock)?;
    Ok(Metadata {
        stores,
        superblock,
        copies_equal: true,
        log_end: None,
    })
}

fn data_sectors<S: Storage>(stores: &Stores<S>) -> u64 {
    stores.data.as_ref().unwrap_or(&stores.meta).sectors()
}

/// Random bytes with the marks of a version 4 UUID.
fn uuid() -> Result<Uuid> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::Random { source: e.into() })?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    Ok(bytes)
}

/// What will be managed and where the metadata will lie.
fn plan<S: Storage>(stores: &Stores<S>, options: &FormatOptions) -> Result<(Geometry, Layout)> {
    let meta = &stores.meta;
    let data = match (&stores.data, stores.placement) {
        (Some(data), Placement::Separate) => data,
        (None, Placement::Tail) => meta,
        _ => {
            return Err(Error::core(
                meta.path(),
                Core::BadGeometry("metadata without a data device"),
            ))
        }
    };
    let geometry_of = |bytes: u64| {
        Geometry::new(
            bytes.div_ceil(SECTOR_SIZE),
            options.block_shift,
            options.extent_shift,
        )
        .map_err(|e| Error::core(data.path(), e))
    };
    let log_pages = |g: &Geometry| {
        options
            .log_pages
            .unwrap_or_else(|| Layout::default_log_pages(g))
    };
    // Besides the managed blocks the data device has its label, or the metadata.
    let reserve = |g: &Geometry| match stores.placement {
        Placement::Separate => 1,
        Placement::Tail => {
            Layout::total_pages(g, log_pages(g)).saturating_add(options.undo_pages())
        }
    };
    let page_bytes = PAGE_SIZE as u64;
    let (wanted, what) = match (options.managed_bytes, options.image) {
        (Some(bytes), image) => {
            if let Some(image) = image.filter(|i| i.bytes > bytes) {
                return Err(Error::ImageTooLarge {
                    image: image.bytes,
                    managed: bytes,
                });
            }
            (Some(bytes), "the managed size asked for")
        }
        (None, Some(image)) => {
            let block = 1u64.checked_shl(options.block_shift).unwrap_or(page_bytes);
            (
                Some(image.bytes.max(1).saturating_add(block - 1) / block * block),
                "the image",
            )
        }
        (None, None) => (None, "metadata"),
    };
    let what = match stores.placement {
        Placement::Separate => format!("{what} with the label"),
        Placement::Tail => format!("{what} with the metadata in the reserved tail"),
    };
    let geometry = match wanted {
        Some(bytes) => {
            let geometry = geometry_of(bytes)?;
            let needed = bytes
                .div_ceil(page_bytes)
                .saturating_add(reserve(&geometry))
                .saturating_mul(page_bytes);
            if data.pages() * page_bytes < needed {
                return Err(Error::TooSmall {
                    path: data.path().into(),
                    what,
                    found: data.sectors().saturating_mul(SECTOR_SIZE),
                    needed,
                });
            }
            geometry
        }
        None => {
            // The reserve for the whole device is at least that for what is left of it.
            let too_small = |needed: u64| Error::TooSmall {
                path: data.path().into(),
                what: what.clone(),
                found: data.sectors().saturating_mul(SECTOR_SIZE),
                needed: needed.saturating_mul(page_bytes),
            };
            let least = match stores.placement {
                Placement::Separate => 2,
                Placement::Tail => reserve(&geometry_of(1)?) + 1,
            };
            if data.pages() < least {
                return Err(too_small(least));
            }
            let all = geometry_of(data.pages() * page_bytes)?;
            let block_pages =
                (1u64 << options.block_shift.min(geometry::MAX_BLOCK_SHIFT)) / page_bytes;
            let left = data.pages().saturating_sub(reserve(&all)) / block_pages * block_pages;
            if left == 0 {
                return Err(too_small(reserve(&all) + block_pages));
            }
            geometry_of(left * page_bytes)?
        }
    };
    let layout = Layout::with_undo(
        stores.placement,
        &geometry,
        meta.pages(),
        log_pages(&geometry),
        options.undo_pages(),
    )
    .map_err(|e| Error::core(meta.path(), e))?;
    debug_assert!(geometry.sectors() <= data.pages() * PAGE_SECTORS);
    Ok((geometry, layout))
}

/// Refuses what would be lost.
fn refuse_existing<S: Storage>(
    stores: &mut Stores<S>,
    options: &FormatOptions,
    geometry: &Geometry,
    layout: &Layout,
) -> Result {
    let interrupted = was_interrupted(stores, layout);
    let devices = [Some(&mut stores.meta), stores.data.as_mut()];
    for (n, device) in devices.into_iter().enumerate() {
        let Some(device) = device else { continue };
        // Anchors at the start mean something on a metadata device alone; on a data device it is content.
        let start =
            (n == 0 && stores.placement == Placement::Separate).then_some(Placement::Separate);
        for placement in start.into_iter().chain([Placement::Tail]) {
            match probe_anchors(device, placement) {
                Found::Nothing => {}
                Found::Usable => {
                    return Err(Error::AlreadyFormatted {
                        path: device.path().into(),
                        usable: true,
                    })
                }
                Found::Damaged => {
                    return Err(Error::AlreadyFormatted {
                        path: device.path().into(),
                        usable: false,
                    })
                }
            }
        }
        if has_label(device) && !interrupted {
            return Err(Error::HoldsData {
                path: device.path().into(),
                what: "the label of a data device whose metadata is elsewhere".into(),
            });
        }
    }
    match stores.placement {
        Placement::Separate => {
            if let Some(what) = signature::probe(&mut stores.meta)? {
                return Err(Error::HoldsData {
                    path: stores.meta.path().into(),
                    what: what.into(),
                });
            }
        }
        Placement::Tail => {}
    }
    if options.initial == Initial::Stale {
        return Ok(());
    }
    // The content is to be kept, so it must lie within what is managed.
    let data = stores.data.as_mut().unwrap_or(&mut stores.meta);
    let managed = geometry.sectors().saturating_mul(SECTOR_SIZE);
    match signature::content_end(data)? {
        Some((what, end)) if end > managed => Err(Error::HoldsData {
            path: data.path().into(),
            what: format!(
                "{what} that ends at byte {end}, past the {managed} bytes that will be managed"
            ),
        }),
        _ => Ok(()),
    }
}

/// Whether the data device's label is that of a format that was cut before its superblocks were written: then the
/// first checkpoint that goes with the label lies where this format would put its own.
fn was_interrupted<S: Storage>(stores: &mut Stores<S>, layout: &Layout) -> bool {
    let Some(data) = &mut stores.data else {
        return false;
    };
    let mut page = [0; PAGE_SIZE];
    let label = Label::page_of(data.sectors())
        .ok()
        .and_then(|at| data.read(at, &mut page).ok())
        .and_then(|()| Label::decode(&page).ok());
    let Some(label) = label else { return false };
    let place = Place {
        meta_uuid: &label.meta_uuid,
        area: 0,
        seq: 1,
        index: 0,
    };
    let at = layout.area_start[0];
    stores.meta.read(at, &mut page).is_ok() && checkpoint::verify_index(&page, &place).is_ok()
}

enum Found {
    Nothing,
    Usable,
    Damaged,
}

fn probe_anchors<S: Storage>(device: &mut S, placement: Placement) -> Found {
    let mut buffer = [0; PAGE_SIZE];
    let mut found = Found::Nothing;
    for copy in [0, 1] {
        match read_copy(device, placement, copy, &mut buffer) {
            Ok(_) => return Found::Usable,
            Err(Core::BadMagic(_) | Core::TooSmall(..)) if !has_magic(&buffer) => {}
            Err(_) => found = Found::Damaged,
        }
        buffer.fill(0);
    }
    found
}

fn has_magic(page: &[u8]) -> bool {
    page.starts_with(&superblock::MAGIC)
}

/// Zeroes all anchors, so that nothing that was there before can be taken for the new metadata, nor the other way.
fn wipe_anchors<S: Storage>(stores: &mut Stores<S>) -> Result {
    let zero = [0; PAGE_SIZE];
    let placement = stores.placement;
    let at = |s: &S, placement: Placement, copy| {
        placement
            .anchor(copy, s.pages())
            .map_err(|e| Error::core(s.path(), e))
    };
    for copy in [0, 1] {
        let page = at(&stores.meta, placement, copy)?;
        stores.meta.write_page(page, &zero)?;
    }
    stores.meta.flush()?;
    // What was a tail is content now, or belongs to nobody; without this it would still be found.
    let data = match stores.placement {
        Placement::Tail => None,
        Placement::Separate => stores.data.as_mut(),
    };
    if let Some(data) = data {
        let mut buffer = [0; PAGE_SIZE];
        for copy in [0, 1] {
            let Ok(page) = Placement::Tail.anchor(copy, data.pages()) else {
                continue;
            };
            data.read_page(page, &mut buffer)?;
            if has_magic(&buffer) {
                data.write_page(page, &zero)?;
            }
        }
        data.flush()?;
    }
    Ok(())
}
