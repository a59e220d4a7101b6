// SPDX-License-Identifier: GPL-2.0

//! The ioctls of `/dev/pristine`: the one description of the ABI, compiled into both sides.
//!
//! All structures are `repr(C)`, have no implicit padding and the same layout for 32- and 64-bit callers. The
//! first field of every argument is `version`, which must be [`VERSION`]; another version is refused with
//! `EPROTO` before anything else is looked at. Reserved fields must be zero.
//!
//! | ioctl | argument | needs | errors besides EPROTO, EFAULT and EINVAL |
//! | --- | --- | --- | --- |
//! | [`LIST`] | [`ListArgs`] | - | |
//! | [`STATS`] | [`StatsArgs`] | - | `ENODEV`: no such managed device |
//! | [`MAP`] | [`MapArgs`] | CAP_SYS_ADMIN | `ENODEV`; `ERANGE`: past the end |
//! | [`CHECKPOINT`] | [`CheckpointArgs`] | CAP_SYS_ADMIN | `ENODEV`; `EROFS`, `EIO`: it failed and the device is read-only now |

use core::ops::Range;

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bits::words_for;
use super::checkpoint::Plane;

/// Version of this ABI.
pub const VERSION: u32 = 1;
/// The ioctl type byte.
pub const TYPE: u8 = 0xb9;
/// Name of the misc device, below `/dev`.
pub const DEVICE_NAME: &str = "pristine";

/// Number of an ioctl that carries `T` both ways, as `_IOWR` makes it.
const fn iowr<T>(number: u32) -> u32 {
    // CAST: every argument is far below the 14 bits that the size has.
    (3 << 30) | ((core::mem::size_of::<T>() as u32) << 16) | ((TYPE as u32) << 8) | number
}

/// Lists the managed devices.
pub const LIST: u32 = iowr::<ListArgs>(1);
/// Statistics of one device.
pub const STATS: u32 = iowr::<StatsArgs>(2);
/// A part of a plane.
pub const MAP: u32 = iowr::<MapArgs>(3);
/// Writes a checkpoint now and returns when it is durable.
pub const CHECKPOINT: u32 = iowr::<CheckpointArgs>(4);

/// The dirty plane, in [`MapArgs::plane`].
pub const PLANE_DIRTY: u32 = 0;
/// The stale plane, in [`MapArgs::plane`].
pub const PLANE_STALE: u32 = 1;

/// Most words that one [`MAP`] returns.
pub const MAP_MAX_WORDS: u64 = 65536;

/// Argument of [`LIST`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ListArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: entries that fit in the buffer. Out: entries that there are, which may be more.
    pub count: u32,
    /// In: address of an array of [`DeviceEntry`].
    pub entries: u64,
}

/// One device in the answer of [`LIST`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceEntry {
    /// Major number of the managed device.
    pub major: u32,
    /// Minor number of the managed device.
    pub minor: u32,
    /// Blocks of the device.
    pub blocks: u64,
    /// Dirty blocks now.
    pub dirty: u64,
    /// log2 of the block size in bytes.
    pub block_shift: u32,
    /// [`super::state::Mode::code`].
    pub mode: u32,
    /// Identity of the metadata.
    pub meta_uuid: [u8; 16],
}

/// Argument of [`STATS`]. Counters start at 0 when the device is loaded, and wrap.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StatsArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: major number of the managed device.
    pub major: u32,
    /// In: minor number of the managed device.
    pub minor: u32,
    /// Out: [`super::state::Mode::code`].
    pub mode: u32,
    /// Out: blocks of the device.
    pub blocks: u64,
    /// Out: dirty blocks.
    pub dirty: u64,
    /// Out: stale blocks.
    pub stale: u64,
    /// Out: extents with a live intent.
    pub hot: u64,
    /// Out: most extents with a live intent.
    pub hot_limit: u64,
    /// Out: bios that waited for an intent.
    pub deferred: u64,
    /// Out: intent records written.
    pub records: u64,
    /// Out: extents that those records announced.
    pub intents: u64,
    /// Out: checkpoints written.
    pub checkpoints: u64,
    /// Out: bytes written to the metadata in all.
    pub meta_bytes: u64,
    /// Out: writes refused because the device is read-only.
    pub refused: u64,
    /// Out: records in the log since the checkpoint.
    pub log_used: u64,
    /// Out: pages of the log ring.
    pub log_pages: u64,
    /// Out: sequence of the last checkpoint.
    pub checkpoint_seq: u64,
    /// Out: memory that the device's state takes, in bytes.
    pub memory: u64,
}

/// Argument of [`MAP`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MapArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: major number of the managed device.
    pub major: u32,
    /// In: minor number of the managed device.
    pub minor: u32,
    /// In: [`PLANE_DIRTY`] or [`PLANE_STALE`].
    pub plane: u32,
    /// In: first word, each of 64 blocks; block `n` is bit `n % 64` of word `n / 64`.
    pub first_word: u64,
    /// In: words wanted, at most [`MAP_MAX_WORDS`]. Out: words returned, fewer at the end of the device.
    pub words: u64,
    /// In: address of an array of that many little-endian 64-bit words.
    pub bits: u64,
}

/// Argument of [`CHECKPOINT`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CheckpointArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: major number of the managed device.
    pub major: u32,
    /// In: minor number of the managed device.
    pub minor: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Out: sequence of the checkpoint that is durable now.
    pub checkpoint_seq: u64,
}

/// Why an argument is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Another version of the ABI: `EPROTO`.
    Version,
    /// A field outside its range: `EINVAL`.
    Invalid,
    /// Past the end of the device: `ERANGE`.
    PastEnd,
}

/// Checks the `version` of an argument.
///
/// # Errors
///
/// [`Refusal::Version`].
pub fn verify_version(version: u32) -> Result<(), Refusal> {
    if version == VERSION {
        Ok(())
    } else {
        Err(Refusal::Version)
    }
}

impl MapArgs {
    /// Checks what does not depend on the device; gives the plane that is meant.
    ///
    /// # Errors
    ///
    /// [`Refusal::Invalid`].
    pub fn verify(&self) -> Result<Plane, Refusal> {
        match self.plane {
            _ if self.words > MAP_MAX_WORDS => Err(Refusal::Invalid),
            PLANE_DIRTY => Ok(Plane::Dirty),
            PLANE_STALE => Ok(Plane::Stale),
            _ => Err(Refusal::Invalid),
        }
    }

    /// The words to be returned of a device of `blocks` blocks.
    ///
    /// # Errors
    ///
    /// [`Refusal::PastEnd`] if the first of them is not there.
    pub fn range(&self, blocks: u64) -> Result<Range<u64>, Refusal> {
        match words_for(blocks).checked_sub(self.first_word) {
            None | Some(0) => Err(Refusal::PastEnd),
            Some(left) => Ok(self.first_word..self.first_word + self.words.min(left)),
        }
    }
}

impl CheckpointArgs {
    /// Checks the reserved field.
    ///
    /// # Errors
    ///
    /// [`Refusal::Invalid`].
    pub fn verify(&self) -> Result<(), Refusal> {
        if self.reserved == 0 {
            Ok(())
        } else {
            Err(Refusal::Invalid)
        }
    }
}

const _: () = {
    assert!(core::mem::size_of::<ListArgs>() == 16);
    assert!(core::mem::size_of::<DeviceEntry>() == 48);
    assert!(core::mem::size_of::<StatsArgs>() == 136);
    assert!(core::mem::size_of::<MapArgs>() == 40);
    assert!(core::mem::size_of::<CheckpointArgs>() == 24);
};
