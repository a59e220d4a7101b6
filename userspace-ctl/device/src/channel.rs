// SPDX-License-Identifier: GPL-2.0

//! The helper's channel: what `pristined` asks of `/dev/pristine` and answers there. The protocol is described in
//! [`pristine_shared::abi`].

use std::time::Duration;

use pristine_shared::abi::{
    self, AnswerArgs, AttachArgs, FetchStatsArgs, HydrateArgs, NextArgs, Request,
};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::control::{errno, refused, Control, Id, Plane};
use crate::error::Error;
use crate::ioctl;

/// What a helper decides on; everything else that the kernel refuses is [`Refused::Other`].
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The device is gone (`ENODEV`).
    #[error("the device is gone")]
    Gone,
    /// Another helper took the device over (`ESHUTDOWN`).
    #[error("another helper took the device over")]
    TakenOver,
    /// The device is suspended; try again later (`EAGAIN`).
    #[error("the device is suspended")]
    Suspended,
    /// Nothing is wrong with what was asked, and it may be asked again (`ENOMEM`, `EINTR`).
    #[error("the kernel is short of memory")]
    Later,
    /// Nothing on the device was stale when it was loaded, so there is nothing to serve (`ENODATA`).
    #[error("nothing on the device is stale")]
    NothingStale,
    /// The device has a helper (`EBUSY`).
    #[error("the device has a helper already")]
    Busy,
    /// No such request is waiting: it was answered, or came to an end without (`ENOENT`).
    #[error("no such request is waiting")]
    NoRequest,
    /// The data device took the blocks not (`EIO`); who waited for them was served nevertheless.
    #[error("the data device did not take the blocks")]
    NotStored,
    /// Anything else.
    #[error(transparent)]
    Other(#[from] Error),
}

/// Result of the channel's calls.
pub type Result<T = ()> = std::result::Result<T, Refused>;

/// What a helper is told when it attaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Blocks of the device.
    pub blocks: u64,
    /// log2 of the block size in bytes.
    pub block_shift: u32,
    /// The image that stale blocks are fetched from.
    pub image: [u8; 32],
    /// Its generation.
    pub generation: u64,
    /// Identity of the metadata.
    pub meta_uuid: [u8; 16],
}

/// The content of blocks.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// These bytes, at most [`abi::MAX_FETCH`] of them.
    Data(&'a [u8]),
    /// Zeros; nothing is copied.
    Zeroes,
}

/// An open `/dev/pristine` that is a device's helper. Closing it leaves requests to the next helper.
#[derive(Debug)]
pub struct Channel {
    control: Control,
    id: Id,
    attached: Attached,
}

impl Channel {
    /// Makes `control` the helper's of a device; with `take_over`, also if another has it.
    ///
    /// # Errors
    ///
    /// [`Refused::Gone`] if there is no such managed device, [`Refused::NothingStale`], [`Refused::Busy`],
    /// [`Refused::Suspended`].
    pub fn attach(control: Control, id: Id, take_over: bool) -> Result<Self> {
        let mut args = AttachArgs {
            version: abi::VERSION,
            major: id.major,
            minor: id.minor,
            flags: if take_over { abi::TAKE_OVER } else { 0 },
            ..AttachArgs::default()
        };
        ioctl::pristine(control.file(), abi::ATTACH, args.as_mut_bytes())
            .map_err(|e| why("become the helper of", id, e))?;
        let attached = Attached {
            blocks: args.blocks,
            block_shift: args.block_shift,
            image: args.image_id,
            generation: args.generation,
            meta_uuid: args.meta_uuid,
        };
        Ok(Self {
            control,
            id,
            attached,
        })
    }

    /// What the device said when it was attached to.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Waits at most `wait` for requests and gives up to `most` of them; none when the time is over, or while the
    /// device is suspended. Both are cut to what the ABI allows.
    ///
    /// # Errors
    ///
    /// [`Refused::Gone`], [`Refused::TakenOver`].
    pub fn next(&self, most: u32, wait: Duration) -> Result<Vec<Request>> {
        let most = most.clamp(1, abi::MAX_REQUESTS);
        let wait = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let mut args = NextArgs {
            version: abi::VERSION,
            count: most,
            wait_ms: wait.min(abi::MAX_WAIT_MS),
            ..NextArgs::default()
        };
        let entry = std::mem::size_of::<Request>();
        // CAST: at most MAX_REQUESTS.
        let mut bytes = vec![0; most as usize * entry];
        let wanted = bytes.len();
        let result = ioctl::pristine_into(
            self.control.file(),
            abi::NEXT,
            &mut args,
            |a, address| a.requests = address,
            &mut bytes,
            wanted,
        );
        match result {
            Ok(()) => {}
            // A signal, perhaps the one that ends the program: as if the time were over.
            Err(e) if errno(&e) == Some(Errno::INTR) => return Ok(Vec::new()),
            Err(e) => return Err(why("wait for requests of", self.id, e)),
        }
        Ok(bytes
            .chunks_exact(entry)
            .take(args.count.min(most) as usize) // CAST: at most MAX_REQUESTS.
            .filter_map(|b| Request::read_from_bytes(b).ok())
            .collect())
    }

    /// Answers a request with the content of all its blocks. Returns when it is on the data device (not flushed).
    ///
    /// # Errors
    ///
    /// [`Refused::NoRequest`], [`Refused::NotStored`], [`Refused::Suspended`], [`Refused::Gone`],
    /// [`Refused::TakenOver`].
    pub fn answer(&self, request: u64, content: Content<'_>) -> Result {
        let mut args = AnswerArgs {
            version: abi::VERSION,
            id: request,
            ..AnswerArgs::default()
        };
        let done = match content {
            Content::Zeroes => {
                args.flags = abi::ZEROES;
                ioctl::pristine(self.control.file(), abi::ANSWER, args.as_mut_bytes())
            }
            Content::Data(data) => {
                // CAST: a length is at most 64 bits.
                args.bytes = data.len() as u64;
                ioctl::pristine_from(
                    self.control.file(),
                    abi::ANSWER,
                    &mut args,
                    |a, address| a.data = address,
                    data,
                    data.len(),
                )
            }
        };
        done.map_err(|e| why("answer a request of", self.id, e))
    }

    /// Ends a request with an error: an errno, positive.
    ///
    /// # Errors
    ///
    /// As [`Channel::answer`].
    pub fn fail(&self, request: u64, error: u32) -> Result {
        let mut args = AnswerArgs {
            version: abi::VERSION,
            id: request,
            error,
            ..AnswerArgs::default()
        };
        ioctl::pristine(self.control.file(), abi::ANSWER, args.as_mut_bytes())
            .map_err(|e| why("answer a request of", self.id, e))
    }

    /// Offers `blocks` blocks from `first` on; gives how many of them were stale and are not now. Returns when they
    /// are on the data device (not flushed).
    ///
    /// # Errors
    ///
    /// [`Refused::NotStored`], [`Refused::Suspended`], [`Refused::Gone`], [`Refused::TakenOver`].
    pub fn hydrate(&self, first: u64, blocks: u64, content: Content<'_>) -> Result<u64> {
        let mut args = HydrateArgs {
            version: abi::VERSION,
            first,
            blocks,
            ..HydrateArgs::default()
        };
        let done = match content {
            Content::Zeroes => {
                args.flags = abi::ZEROES;
                ioctl::pristine(self.control.file(), abi::HYDRATE, args.as_mut_bytes())
            }
            Content::Data(data) => {
                let bytes = blocks.checked_shl(self.attached.block_shift);
                let offered = bytes.and_then(|b| usize::try_from(b).ok());
                ioctl::pristine_from(
                    self.control.file(),
                    abi::HYDRATE,
                    &mut args,
                    |a, address| a.data = address,
                    data,
                    offered.unwrap_or(usize::MAX),
                )
            }
        };
        done.map_err(|e| why("hydrate blocks of", self.id, e))?;
        Ok(args.taken)
    }

    /// The words `first..first + words` of the stale plane, fewer at the end of the device.
    ///
    /// # Errors
    ///
    /// [`Refused::Gone`], [`Refused::TakenOver`], [`Refused::Suspended`], and those of [`Control::map`].
    pub fn stale(&self, first: u64, words: u64) -> Result<Vec<u64>> {
        let map = self.control.map(self.id, Plane::Stale, first, words);
        map.map_err(|e| self.why_not(e))
    }

    /// What fetching does on the device.
    ///
    /// # Errors
    ///
    /// [`Refused::Gone`], [`Refused::TakenOver`], [`Refused::Suspended`], and those of [`Control::fetch_stats`].
    pub fn stats(&self) -> Result<FetchStatsArgs> {
        let stats = self.control.fetch_stats(self.id);
        stats.map_err(|e| self.why_not(e))
    }

    /// What it means that a call which names the device by its number was refused: while it is suspended no device has
    /// the number, but its helper is its helper still.
    fn why_not(&self, error: Error) -> Refused {
        match gone(error) {
            Refused::Gone => {}
            refused => return refused,
        }
        // An offer of nothing is invalid, if it is from the device's helper.
        match self.hydrate(0, 0, Content::Zeroes) {
            Err(Refused::Other(_)) | Ok(_) => Refused::Suspended,
            Err(refused) => refused,
        }
    }
}

fn gone(error: Error) -> Refused {
    match error {
        Error::NoSuchDevice { .. } => Refused::Gone,
        Error::Kernel { ref source, .. } if errno(source) == Some(Errno::AGAIN) => {
            Refused::Suspended
        }
        Error::Kernel { ref source, .. }
            if matches!(errno(source), Some(Errno::NOMEM | Errno::INTR)) =>
        {
            Refused::Later
        }
        error => Refused::Other(error),
    }
}

fn why(action: &'static str, id: Id, error: std::io::Error) -> Refused {
    match errno(&error) {
        Some(Errno::NODEV) => Refused::Gone,
        Some(Errno::SHUTDOWN) => Refused::TakenOver,
        Some(Errno::AGAIN) => Refused::Suspended,
        Some(Errno::NOMEM | Errno::INTR) => Refused::Later,
        Some(Errno::NODATA) => Refused::NothingStale,
        Some(Errno::BUSY) => Refused::Busy,
        Some(Errno::NOENT) => Refused::NoRequest,
        Some(Errno::IO) => Refused::NotStored,
        _ => Refused::Other(refused(action, id.name(), error)),
    }
}
