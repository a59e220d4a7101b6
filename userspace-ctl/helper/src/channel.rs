// SPDX-License-Identifier: GPL-2.0

//! What the helper needs of the kernel, as a trait, so that everything else can be tested without one.

use std::time::Duration;

use pristine_device::channel as device;
pub use pristine_device::channel::{Attached, Content, Refused, Result};
pub use pristine_device::shared::abi::{Request, AHEAD, MAX_FETCH, MAX_REQUESTS};

/// The errno that a request ends with when the helper gives it up.
pub const EIO: u32 = 5;

/// A device's channel, attached to. All methods may be called from several threads at once; their meaning is that of
/// [`pristine_device::channel::Channel`].
pub trait Channel: Send + Sync {
    /// What the device said when it was attached to.
    fn attached(&self) -> Attached;

    /// Waits for requests.
    ///
    /// # Errors
    ///
    /// As [`device::Channel::next`].
    fn next(&self, most: u32, wait: Duration) -> Result<Vec<Request>>;

    /// Answers a request.
    ///
    /// # Errors
    ///
    /// As [`device::Channel::answer`].
    fn answer(&self, request: u64, content: Content<'_>) -> Result;

    /// Ends a request with an errno.
    ///
    /// # Errors
    ///
    /// As [`device::Channel::answer`].
    fn fail(&self, request: u64, error: u32) -> Result;

    /// Offers blocks; gives how many were taken.
    ///
    /// # Errors
    ///
    /// As [`device::Channel::hydrate`].
    fn hydrate(&self, first: u64, blocks: u64, content: Content<'_>) -> Result<u64>;

    /// Words of the stale plane.
    ///
    /// # Errors
    ///
    /// As [`device::Channel::stale`].
    fn stale(&self, first_word: u64, words: u64) -> Result<Vec<u64>>;

    /// Stale blocks, and requests that are open.
    ///
    /// # Errors
    ///
    /// As [`device::Channel::stats`].
    fn left(&self) -> Result<Left>;
}

/// What is left to do on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Stale blocks.
    pub stale: u64,
    /// Requests that are open.
    pub open: u64,
}

impl Channel for device::Channel {
    fn attached(&self) -> Attached {
        *self.attached()
    }

    fn next(&self, most: u32, wait: Duration) -> Result<Vec<Request>> {
        self.next(most, wait)
    }

    fn answer(&self, request: u64, content: Content<'_>) -> Result {
        self.answer(request, content)
    }

    fn fail(&self, request: u64, error: u32) -> Result {
        self.fail(request, error)
    }

    fn hydrate(&self, first: u64, blocks: u64, content: Content<'_>) -> Result<u64> {
        self.hydrate(first, blocks, content)
    }

    fn stale(&self, first_word: u64, words: u64) -> Result<Vec<u64>> {
        self.stale(first_word, words)
    }

    fn left(&self) -> Result<Left> {
        let stats = self.stats()?;
        Ok(Left {
            stale: stats.stale,
            open: stats.open,
        })
    }
}
