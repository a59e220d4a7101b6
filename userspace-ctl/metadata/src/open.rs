// SPDX-License-Identifier: GPL-2.0

//! Opening metadata, checking whose it is, and loading the state of the blocks.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pristine_shared::checkpoint::Plane;
use pristine_shared::error::{Error as Core, Structure};
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::layout::Placement;
use pristine_shared::recovery::{self, LogEnd, Sink};
use pristine_shared::superblock::{Label, Superblock};
use pristine_shared::{Page, PAGE_SECTORS, PAGE_SIZE};

use crate::error::{Error, Result};
use crate::planes::{Initial, Planes};
use crate::storage::{Access, CoreSource, MetaDevice, Storage, StorageExt};

/// Where a managed device's parts are: block devices or image files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// Data device with the metadata in its reserved tail.
    Tail {
        /// The data device.
        data: PathBuf,
    },
    /// Data device and a metadata device of its own.
    Separate {
        /// The data device.
        data: PathBuf,
        /// The metadata device.
        metadata: PathBuf,
    },
    /// A separate metadata device without its data device: enough to look at it, not enough to know whose it is.
    MetadataOnly {
        /// The metadata device.
        metadata: PathBuf,
    },
}

impl Devices {
    /// A data device and, unless its tail is reserved for it, a metadata device.
    pub fn new(data: impl Into<PathBuf>, metadata: Option<impl Into<PathBuf>>) -> Self {
        match metadata {
            None => Self::Tail { data: data.into() },
            Some(metadata) => Self::Separate {
                data: data.into(),
                metadata: metadata.into(),
            },
        }
    }

    /// The data device, if it is known.
    pub fn data(&self) -> Option<&Path> {
        match self {
            Self::Tail { data } | Self::Separate { data, .. } => Some(data),
            Self::MetadataOnly { .. } => None,
        }
    }

    /// The separate metadata device, if there is one.
    pub fn metadata(&self) -> Option<&Path> {
        match self {
            Self::Tail { .. } => None,
            Self::Separate { metadata, .. } | Self::MetadataOnly { metadata } => Some(metadata),
        }
    }
}

/// The opened devices of [`Devices`].
#[derive(Debug)]
pub struct Stores<S> {
    /// What holds the metadata; with [`Placement::Tail`] it is the data device.
    pub meta: S,
    /// The data device, when it is another one and known.
    pub data: Option<S>,
    /// Where the metadata lives.
    pub placement: Placement,
}

impl Stores<MetaDevice> {
    /// Opens the devices.
    ///
    /// # Errors
    ///
    /// Those of [`MetaDevice::open`], and [`Error::SameDevice`].
    pub fn open(devices: &Devices, access: Access) -> Result<Self> {
        let (meta, data, placement) = match devices {
            Devices::Tail { data } => (MetaDevice::open(data, access)?, None, Placement::Tail),
            Devices::Separate { data, metadata } => {
                refuse_same(data, metadata)?;
                let meta = MetaDevice::open(metadata, access)?;
                (
                    meta,
                    Some(MetaDevice::open(data, access)?),
                    Placement::Separate,
                )
            }
            Devices::MetadataOnly { metadata } => (
                MetaDevice::open(metadata, access)?,
                None,
                Placement::Separate,
            ),
        };
        Ok(Self {
            meta,
            data,
            placement,
        })
    }
}

/// Says so before the second open of one device would say "in use".
fn refuse_same(data: &Path, metadata: &Path) -> Result {
    let id = |path: &Path| {
        std::fs::metadata(path)
            .ok()
            .map(|m| (m.rdev(), m.dev() * u64::from(m.rdev() == 0), m.ino()))
    };
    match (id(data), id(metadata)) {
        (Some((d, _, _)), Some((m, _, _))) if d != m => Ok(()),
        (Some((0, dev, ino)), Some(other)) if (0, dev, ino) != other => Ok(()),
        (None, _) | (_, None) => Ok(()),
        _ => Err(Error::SameDevice {
            data: data.into(),
            metadata: metadata.into(),
        }),
    }
}

/// The metadata of a managed device, open.
#[derive(Debug)]
pub struct Metadata<S = MetaDevice> {
    pub(crate) stores: Stores<S>,
    pub(crate) superblock: Superblock,
    /// Whether both superblock copies were as good and as new as the chosen one when last looked at.
    pub(crate) copies_equal: bool,
    /// Known after [`Metadata::load`], or once a commit looked for it.
    pub(crate) log_end: Option<LogEnd>,
}

impl Metadata<MetaDevice> {
    /// Opens the metadata of `devices` and checks that it belongs to the data device, unless that is not known
    /// ([`Devices::MetadataOnly`]).
    ///
    /// # Errors
    ///
    /// See [`Error::class`]; [`Class::NotFormatted`](crate::Class::NotFormatted) when there is no metadata at all.
    pub fn open(devices: &Devices, access: Access) -> Result<Self> {
        Self::open_on(Stores::open(devices, access)?)
    }

    /// Another handle on the open data device, under the same claim; `None` if it is not known.
    pub fn data_file(&self) -> Option<File> {
        let device = match self.stores.placement {
            Placement::Tail => &self.stores.meta,
            Placement::Separate => self.stores.data.as_ref()?,
        };
        device.try_clone_file().ok()
    }
}

impl<S: Storage> Metadata<S> {
    /// Opens the metadata on devices that are open already; otherwise as [`Metadata::open`].
    ///
    /// # Errors
    ///
    /// As [`Metadata::open`].
    pub fn open_on(mut stores: Stores<S>) -> Result<Self> {
        let (superblock, copies_equal) = read_superblock(&mut stores)?;
        let metadata = Self {
            stores,
            superblock,
            copies_equal,
            log_end: None,
        };
        metadata.verified()
    }

    pub(crate) fn verified(mut self) -> Result<Self> {
        let sb = self.superblock;
        let sectors = match (self.stores.placement, &mut self.stores.data) {
            (Placement::Tail, _) => {
                let sectors = self.stores.meta.sectors();
                sb.verify_data(sectors, &sb.data_uuid)
                    .map_err(|e| Error::core(self.stores.meta.path(), e))?;
                return Ok(self);
            }
            (Placement::Separate, None) => return Ok(self),
            (Placement::Separate, Some(data)) => data.sectors(),
        };
        // The size first: a data device that was resized has its label elsewhere.
        let meta_path = self.stores.meta.path().to_path_buf();
        if sectors != sb.data_sectors {
            return Err(Error::core(
                meta_path,
                Core::DataSize(sectors, sb.data_sectors),
            ));
        }
        let label_at = Label::page_of(sectors).map_err(|e| Error::core(&meta_path, e))?;
        if sb.geometry.sectors() > label_at * PAGE_SECTORS {
            let e = Core::BadField(Structure::Superblock(0), "managed size");
            return Err(Error::core(meta_path, e));
        }
        if let Some(data) = &mut self.stores.data {
            let mut page = [0; PAGE_SIZE];
            data.read_page(label_at, &mut page)?;
            let label = match Label::decode(&page) {
                Ok(label) => label,
                Err(Core::BadMagic(_)) => {
                    return Err(Error::NoLabel {
                        data: data.path().into(),
                        metadata: meta_path,
                    })
                }
                Err(e) => return Err(Error::core(data.path(), e)),
            };
            sb.verify_data(sectors, &label.data_uuid)
                .map_err(|e| Error::core(meta_path, e))?;
        }
        Ok(self)
    }

    /// What the superblock says.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The devices, for reading beside the metadata.
    pub fn stores_mut(&mut self) -> &mut Stores<S> {
        &mut self.stores
    }

    /// The states of all blocks: the checkpoint and what the log adds.
    ///
    /// # Errors
    ///
    /// Any damage; nothing is guessed.
    pub fn load(&mut self) -> Result<(Planes, LogEnd)> {
        let sb = self.superblock;
        let mut planes = Planes::new(sb.geometry, Initial::Clean);
        let (mut index, mut buffer) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        let mut source = CoreSource::new(&mut self.stores.meta);
        let loaded = recovery::load_planes(&mut source, &sb, &mut index, &mut buffer, &mut planes)
            .and_then(|()| recovery::replay(&mut source, &sb, &mut buffer, &mut planes));
        let end = match loaded {
            Ok(end) => end,
            Err(e) => return Err(source.explain(e)),
        };
        self.log_end = Some(end);
        Ok((planes, end))
    }

    /// Where the log ends, read if it is not known yet.
    pub(crate) fn log_end(&mut self) -> Result<LogEnd> {
        if let Some(end) = self.log_end {
            return Ok(end);
        }
        let sb = self.superblock;
        let mut buffer = [0; PAGE_SIZE];
        let mut source = CoreSource::new(&mut self.stores.meta);
        let end = match recovery::replay(&mut source, &sb, &mut buffer, &mut Nowhere) {
            Ok(end) => end,
            Err(e) => return Err(source.explain(e)),
        };
        self.log_end = Some(end);
        Ok(end)
    }
}

/// A sink for when only the end of the log is wanted.
struct Nowhere;

impl Sink for Nowhere {
    fn or_word(&mut self, _: Plane, _: u64, _: u64) {}
    fn set(&mut self, _: Plane, _: Run) {}
    fn intend(&mut self, _: Run) {}
    fn settle(&mut self, _: Run) {}
    fn validate(&mut self, _: Run) {}
    fn conclude(&mut self, _: &Geometry) {}
}

/// The superblock to use, and whether both copies say the same.
pub(crate) fn read_superblock<S: Storage>(stores: &mut Stores<S>) -> Result<(Superblock, bool)> {
    let placement = stores.placement;
    let pages = stores.meta.pages();
    let mut buffer = [0; PAGE_SIZE];
    let mut source = CoreSource::new(&mut stores.meta);
    match recovery::load_superblock(&mut source, placement, pages, &mut buffer) {
        Ok(sb) => {
            let equal = [0, 1].into_iter().all(|n| {
                read_copy(&mut stores.meta, placement, n, &mut buffer).is_ok_and(|s| s == sb)
            });
            Ok((sb, equal))
        }
        Err(e) => {
            let error = source.explain(e);
            if e == Core::NotFormatted
                && placement == Placement::Tail
                && has_label(&mut stores.meta)
            {
                let data = stores.meta.path().into();
                return Err(Error::NeedsMetadataDevice { data });
            }
            Err(error)
        }
    }
}

/// One superblock copy; an I/O error is reported as damage would be.
pub(crate) fn read_copy<S: Storage>(
    meta: &mut S,
    placement: Placement,
    copy: u8,
    buffer: &mut Page,
) -> pristine_shared::Result<Superblock> {
    let pages = meta.pages();
    let at = placement.anchor(copy, pages)?;
    meta.read(at, buffer).map_err(|_| Core::Io(at))?;
    Superblock::decode(buffer, copy, pages)
}

/// Whether the last page of a data device is a good label.
pub(crate) fn has_label<S: Storage>(data: &mut S) -> bool {
    let mut page = [0; PAGE_SIZE];
    Label::page_of(data.sectors())
        .is_ok_and(|at| data.read(at, &mut page).is_ok() && Label::decode(&page).is_ok())
}
