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
//! | [`FETCH_STATS`] | [`FetchStatsArgs`] | - | `ENODEV` |
//! | [`ATTACH`] | [`AttachArgs`] | CAP_SYS_ADMIN | `ENODEV`; `ENODATA`: nothing on it was stale when it was loaded; `EBUSY`: it has a helper, or this file serves another device |
//! | [`NEXT`] | [`NextArgs`] | [`ATTACH`] | as below |
//! | [`ANSWER`] | [`AnswerArgs`] | [`ATTACH`] | `ENOENT`: no such request is waiting (late, or answered); `EIO`: it was answered, but not stored |
//! | [`HYDRATE`] | [`HydrateArgs`] | [`ATTACH`] | `ERANGE`: past the end; `EIO`: not stored |
//!
//! # The helper's channel
//!
//! A file that [`ATTACH`]ed to a device is its helper's; any number of threads may use it. The helper waits for requests
//! with [`NEXT`], and answers each with [`ANSWER`], in any order. A request stays until it is answered: when the file is
//! closed, those that were handed out wait for the next helper. With [`TAKE_OVER`] another file becomes the helper's at once;
//! what the old one still sends is refused with `ESHUTDOWN`. A file that never attached gets `ENOTCONN`. While the
//! device is suspended, [`NEXT`] gives nothing and the others fail with `EAGAIN`; when it is gone, all fail with `ENODEV`.
//!
//! The kernel alone writes the data device. It stores what an answer carries only in blocks that are stale still, so
//! that nothing that was written since is overwritten.

use core::ops::Range;

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bits::words_for;
use super::checkpoint::Plane;
use super::geometry::Run;

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
/// What fetching does on one device.
pub const FETCH_STATS: u32 = iowr::<FetchStatsArgs>(5);
/// Makes the open file the helper's of a device.
pub const ATTACH: u32 = iowr::<AttachArgs>(6);
/// Waits for requests.
pub const NEXT: u32 = iowr::<NextArgs>(7);
/// Answers a request.
pub const ANSWER: u32 = iowr::<AnswerArgs>(8);
/// Offers blocks that nobody asked for.
pub const HYDRATE: u32 = iowr::<HydrateArgs>(9);

/// In [`AttachArgs::flags`]: take the device from the helper that it has.
pub const TAKE_OVER: u32 = 1;
/// In [`AnswerArgs::flags`] and [`HydrateArgs::flags`]: the blocks are all zero, there is no data.
pub const ZEROES: u32 = 1;
/// In [`Request::flags`]: nobody waits for it yet (read-ahead).
pub const AHEAD: u32 = 1;

/// Most bytes of one request, one answer or one [`HYDRATE`] with data.
pub const MAX_FETCH: u64 = 1 << 20;
/// Most requests that one [`NEXT`] returns.
pub const MAX_REQUESTS: u32 = 64;
/// Longest that one [`NEXT`] waits, in milliseconds.
pub const MAX_WAIT_MS: u32 = 60_000;

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

/// Argument of [`FETCH_STATS`]. Counters start at 0 when the device is loaded, and wrap.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FetchStatsArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: major number of the managed device.
    pub major: u32,
    /// In: minor number of the managed device.
    pub minor: u32,
    /// Out: 1 if there is a helper.
    pub attached: u32,
    /// Out: stale blocks.
    pub stale: u64,
    /// Out: requests made, read-ahead included.
    pub requests: u64,
    /// Out: blocks that were answered to requests.
    pub fetched: u64,
    /// Out: blocks that the helper offered and the device took.
    pub hydrated: u64,
    /// Out: stale blocks that were overwritten as a whole, and needed no fetch.
    pub overwritten: u64,
    /// Out: requests that ended with an error.
    pub errors: u64,
    /// Out: requests that are open now.
    pub open: u64,
    /// Out: age of the oldest of them, in microseconds.
    pub oldest_us: u64,
    /// Out: sum of the times from a request to its answer, in microseconds.
    pub latency_us: u64,
    /// Out: the longest of them.
    pub latency_max_us: u64,
}

/// Argument of [`ATTACH`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AttachArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: major number of the managed device.
    pub major: u32,
    /// In: minor number of the managed device.
    pub minor: u32,
    /// In: 0 or [`TAKE_OVER`].
    pub flags: u32,
    /// Out: blocks of the device.
    pub blocks: u64,
    /// Out: the generation of the image.
    pub generation: u64,
    /// Out: log2 of the block size in bytes.
    pub block_shift: u32,
    /// Out: 0.
    pub reserved: u32,
    /// Out: the image that stale blocks are fetched from.
    pub image_id: [u8; 32],
    /// Out: identity of the metadata.
    pub meta_uuid: [u8; 16],
}

/// One request in the answer of [`NEXT`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// Its number, never used again.
    pub id: u64,
    /// The first block.
    pub first: u64,
    /// How many blocks; at least 1, at most [`MAX_FETCH`] bytes.
    pub blocks: u32,
    /// 0 or [`AHEAD`].
    pub flags: u32,
    /// The generation of the image that is meant.
    pub generation: u64,
}

/// Argument of [`NEXT`]. Requests that somebody waits for come first, else the oldest does.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NextArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: requests wanted, 1..=[`MAX_REQUESTS`]. Out: requests returned; 0 when the time is over.
    pub count: u32,
    /// In: how long to wait for the first one, at most [`MAX_WAIT_MS`].
    pub wait_ms: u32,
    /// Must be 0.
    pub reserved: u32,
    /// In: address of an array of [`Request`].
    pub requests: u64,
}

/// Argument of [`ANSWER`]. It returns when the blocks are on the data device (not flushed); who waits for them is
/// served before.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AnswerArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: 0, or the error (an errno, positive) that the request ends with.
    pub error: u32,
    /// In: the request's number.
    pub id: u64,
    /// In: address of the data.
    pub data: u64,
    /// In: bytes of data: those of all blocks of the request; 0 with an error or [`ZEROES`].
    pub bytes: u64,
    /// In: 0 or [`ZEROES`].
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// Argument of [`HYDRATE`]. It returns when the blocks are on the data device (not flushed).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HydrateArgs {
    /// In: [`VERSION`].
    pub version: u32,
    /// In: 0 or [`ZEROES`].
    pub flags: u32,
    /// In: the first block.
    pub first: u64,
    /// In: how many blocks; at most [`MAX_FETCH`] bytes unless they are zero.
    pub blocks: u64,
    /// In: address of the data; 0 with [`ZEROES`].
    pub data: u64,
    /// Out: blocks that were stale, and are not now.
    pub taken: u64,
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

impl NextArgs {
    /// Checks what does not depend on the device.
    ///
    /// # Errors
    ///
    /// [`Refusal::Invalid`].
    pub fn verify(&self) -> Result<(), Refusal> {
        let good = self.reserved == 0
            && (1..=MAX_REQUESTS).contains(&self.count)
            && self.wait_ms <= MAX_WAIT_MS;
        good.then_some(()).ok_or(Refusal::Invalid)
    }
}

impl AnswerArgs {
    /// Largest errno.
    const MAX_ERRNO: u32 = 4095;

    /// Checks what does not depend on the request.
    ///
    /// # Errors
    ///
    /// [`Refusal::Invalid`].
    pub fn verify(&self) -> Result<(), Refusal> {
        let empty = self.error != 0 || self.flags == ZEROES;
        let good = self.reserved == 0
            && self.flags & !ZEROES == 0
            && self.error <= Self::MAX_ERRNO
            && self.bytes <= MAX_FETCH
            && (self.bytes == 0) == empty
            && (self.error == 0 || self.flags == 0);
        good.then_some(()).ok_or(Refusal::Invalid)
    }
}

impl HydrateArgs {
    /// The blocks that are offered, on a device of `blocks` blocks of `1 << shift` bytes.
    ///
    /// # Errors
    ///
    /// [`Refusal::Invalid`], or [`Refusal::PastEnd`].
    pub fn run(&self, blocks: u64, shift: u32) -> Result<Run, Refusal> {
        let zeroes = self.flags == ZEROES;
        let good = self.flags & !ZEROES == 0
            && self.blocks != 0
            && (zeroes || self.blocks <= MAX_FETCH >> shift)
            && (!zeroes || self.data == 0);
        if !good {
            return Err(Refusal::Invalid);
        }
        match self.first.checked_add(self.blocks) {
            Some(end) if end <= blocks => Ok(Run {
                start: self.first,
                end,
            }),
            _ => Err(Refusal::PastEnd),
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
    assert!(core::mem::size_of::<FetchStatsArgs>() == 96);
    assert!(core::mem::size_of::<AttachArgs>() == 88);
    assert!(core::mem::size_of::<Request>() == 32);
    assert!(core::mem::size_of::<NextArgs>() == 24);
    assert!(core::mem::size_of::<AnswerArgs>() == 40);
    assert!(core::mem::size_of::<HydrateArgs>() == 40);
};
