// SPDX-License-Identifier: GPL-2.0

//! `/dev/pristine`: lists, statistics, dirty maps and checkpoints of active devices.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::path::Path;

use pristine_shared::abi::{
    self, CheckpointArgs, DeviceEntry, FetchStatsArgs, ListArgs, MapArgs, StatsArgs,
};
use pristine_shared::bits;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Result};
use crate::ioctl;

/// An open `/dev/pristine`.
#[derive(Debug)]
pub struct Control {
    file: File,
}

/// A managed device by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl Id {
    pub(crate) fn name(self) -> String {
        format!("{}:{}", self.major, self.minor)
    }
}

/// Which plane a map is wanted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// Changed blocks.
    Dirty,
    /// Blocks whose local content is worthless.
    Stale,
}

impl Control {
    /// Opens `/dev/pristine`.
    ///
    /// # Errors
    ///
    /// [`Error::ModuleNotLoaded`], [`Error::Denied`].
    pub fn open() -> Result<Self> {
        let path = Path::new("/dev").join(abi::DEVICE_NAME);
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => Ok(Self { file }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Error::ModuleNotLoaded),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(Error::Denied {
                action: format!("open {}", path.display()),
            }),
            // ENXIO, ENODEV: a node that was left behind.
            Err(e) if matches!(errno(&e), Some(Errno::NXIO | Errno::NODEV)) => {
                Err(Error::ModuleNotLoaded)
            }
            Err(e) => Err(Error::io("open", path, e)),
        }
    }

    /// All managed devices.
    ///
    /// # Errors
    ///
    /// [`Error::AbiVersion`] and those of the kernel.
    pub fn list(&self) -> Result<Vec<DeviceEntry>> {
        let entry = size_of::<DeviceEntry>();
        let mut room = 32usize;
        loop {
            let mut bytes = vec![0; room * entry];
            let mut args = ListArgs {
                version: abi::VERSION,
                count: u32::try_from(room).unwrap_or(0),
                entries: 0,
            };
            let wanted = bytes.len();
            ioctl::pristine_into(
                &self.file,
                abi::LIST,
                &mut args,
                |a, address| a.entries = address,
                &mut bytes,
                wanted,
            )
            .map_err(|e| refused("list the devices of", "/dev/pristine".into(), e))?;
            let count = args.count as usize;
            if count <= room {
                return Ok(bytes
                    .chunks_exact(entry)
                    .take(count)
                    .filter_map(|b| DeviceEntry::read_from_bytes(b).ok())
                    .collect());
            }
            // More came meanwhile, perhaps more still before the next call.
            room = count + 8;
        }
    }

    /// Counters of a device.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`], [`Error::AbiVersion`].
    pub fn stats(&self, id: Id) -> Result<StatsArgs> {
        let mut args = StatsArgs {
            version: abi::VERSION,
            major: id.major,
            minor: id.minor,
            ..StatsArgs::default()
        };
        ioctl::pristine(&self.file, abi::STATS, args.as_mut_bytes())
            .map_err(|e| refused("read the statistics of", id.name(), e))?;
        Ok(args)
    }

    /// What fetching does on a device.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`], [`Error::AbiVersion`] (also from a module that is too old to have it).
    pub fn fetch_stats(&self, id: Id) -> Result<FetchStatsArgs> {
        let mut args = FetchStatsArgs {
            version: abi::VERSION,
            major: id.major,
            minor: id.minor,
            ..FetchStatsArgs::default()
        };
        ioctl::pristine(&self.file, abi::FETCH_STATS, args.as_mut_bytes())
            .map_err(|e| refused("read the fetch statistics of", id.name(), e))?;
        Ok(args)
    }

    /// The words `first..first + words` of a plane of a device, fewer at its end: block `n` is bit `n % 64` of word
    /// `n / 64`.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`], [`Error::Denied`], [`Error::AbiVersion`].
    pub fn map(&self, id: Id, plane: Plane, first: u64, words: u64) -> Result<Vec<u64>> {
        let mut map = Vec::new();
        let mut at = first;
        let end = first.saturating_add(words);
        while at < end {
            let count = (end - at).min(abi::MAP_MAX_WORDS);
            // CAST: at most MAP_MAX_WORDS.
            let mut bytes = vec![0; count as usize * 8];
            let mut args = MapArgs {
                version: abi::VERSION,
                major: id.major,
                minor: id.minor,
                plane: match plane {
                    Plane::Dirty => abi::PLANE_DIRTY,
                    Plane::Stale => abi::PLANE_STALE,
                },
                first_word: at,
                words: count,
                bits: 0,
            };
            let wanted = bytes.len();
            ioctl::pristine_into(
                &self.file,
                abi::MAP,
                &mut args,
                |a, address| a.bits = address,
                &mut bytes,
                wanted,
            )
            .map_err(|e| refused("read the map of", id.name(), e))?;
            let got = args.words.min(count);
            map.extend(
                bytes
                    .chunks_exact(8)
                    .take(got as usize) // CAST: at most MAP_MAX_WORDS.
                    .filter_map(|b| b.try_into().ok())
                    .map(u64::from_le_bytes),
            );
            if got < count {
                break;
            }
            at += got;
        }
        Ok(map)
    }

    /// The file, for the ioctls of the helper.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A whole plane of a device of `blocks` blocks.
    ///
    /// # Errors
    ///
    /// As [`Control::map`].
    pub fn plane(&self, id: Id, plane: Plane, blocks: u64) -> Result<Vec<u64>> {
        self.map(id, plane, 0, bits::words_for(blocks))
    }

    /// Writes a checkpoint now; gives its number once it is durable.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] with `EROFS` or `EIO` if the metadata device fails: the device is read-only then.
    pub fn checkpoint(&self, id: Id) -> Result<u64> {
        let mut args = CheckpointArgs {
            version: abi::VERSION,
            major: id.major,
            minor: id.minor,
            ..CheckpointArgs::default()
        };
        ioctl::pristine(&self.file, abi::CHECKPOINT, args.as_mut_bytes())
            .map_err(|e| refused("write a checkpoint of", id.name(), e))?;
        Ok(args.checkpoint_seq)
    }
}

pub(crate) fn errno(e: &io::Error) -> Option<Errno> {
    e.raw_os_error().map(Errno::from_raw_os_error)
}

pub(crate) fn refused(action: &'static str, name: String, source: io::Error) -> Error {
    match errno(&source) {
        Some(Errno::NODEV) => Error::NoSuchDevice { name },
        Some(Errno::PROTO | Errno::NOTTY) => Error::AbiVersion(abi::VERSION),
        Some(Errno::PERM | Errno::ACCESS) => Error::Denied {
            action: format!("{action} {name}"),
        },
        _ => Error::Kernel {
            action,
            name,
            source,
            kernel: None,
        },
    }
}
