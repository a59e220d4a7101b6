// SPDX-License-Identifier: GPL-2.0

//! Bios as owned values.

use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use kernel::bindings;

use super::raw;
use super::trace::{self, Decision};
use super::Device;

/// Bits of `bi_opf` that hold the operation.
const OP_MASK: u32 = (1 << 8) - 1;

/// How a bio ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// An I/O error.
    IoError,
    /// It would have had to wait, and REQ_NOWAIT was set.
    Again,
    /// Out of memory or of another resource.
    Resource,
    /// Device-mapper shall keep it until the device is resumed; only while it is suspended without a flush.
    Requeue,
}

impl Status {
    fn raw(self) -> bindings::blk_status_t {
        // CAST: A blk_status_t is one byte; the enumerators that carry its values are wider.
        (match self {
            Self::IoError => raw::PRISTINE_STS_IOERR,
            Self::Again => raw::PRISTINE_STS_AGAIN,
            Self::Resource => raw::PRISTINE_STS_RESOURCE,
            Self::Requeue => raw::PRISTINE_STS_REQUEUE,
        }) as bindings::blk_status_t
    }
}

/// What `map` returns. Only the ways out of a [`MapBio`] make one.
#[must_use]
pub struct Mapped(pub(super) i32);

/// A bio that is owned: it is answered or sent on exactly once.
///
/// # Invariants
///
/// `0` points to a bio that this value alone may submit or end.
#[repr(transparent)]
struct Owned(NonNull<bindings::bio>);

// SAFETY: A bio is not bound to a thread; by the invariant nobody else touches it.
unsafe impl Send for Owned {}

impl Owned {
    #[inline]
    fn opf(&self) -> u32 {
        // SAFETY: By the type invariant the bio is valid and ours.
        unsafe { (*self.0.as_ptr()).bi_opf }
    }

    #[inline]
    fn sector(&self) -> u64 {
        // SAFETY: By the type invariant the bio is valid and ours; the field is read by value, as the
        // iterator is packed.
        unsafe { (*self.0.as_ptr()).bi_iter.bi_sector }
    }

    #[inline]
    fn sectors(&self) -> u64 {
        // SAFETY: As above.
        u64::from(unsafe { (*self.0.as_ptr()).bi_iter.bi_size } >> 9)
    }

    #[inline(always)]
    fn trace(&self, decision: Decision) {
        // SAFETY: By the type invariant the bio is valid and ours.
        unsafe { trace::map(self.0, decision) }
    }

    fn into_raw(self) -> NonNull<bindings::bio> {
        ManuallyDrop::new(self).0
    }

    fn end(self, result: Result<(), Status>) {
        self.trace(match result {
            Ok(()) => Decision::Done,
            Err(Status::Again) => Decision::Again,
            Err(_) => Decision::Error,
        });
        let bio = self.into_raw();
        // SAFETY: The bio was ours, and the ownership ends here.
        unsafe {
            match result {
                Ok(()) => raw::pristine_bio_end(bio.as_ptr()),
                Err(status) => raw::pristine_bio_fail(bio.as_ptr(), status.raw()),
            }
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the bio is ours to end, and it ends here.
        unsafe { raw::pristine_bio_fail(self.0.as_ptr(), Status::IoError.raw()) }
    }
}

macro_rules! accessors {
    ($type:ty) => {
        impl $type {
            /// The first sector.
            #[inline]
            pub fn sector(&self) -> u64 {
                self.owned.sector()
            }

            /// The number of sectors; 0 for a flush without data.
            #[inline]
            pub fn sectors(&self) -> u64 {
                self.owned.sectors()
            }

            /// Whether it changes what is on the device: write, discard, secure erase, write-zeroes, and
            /// whatever operation comes later with the direction bit set.
            #[inline]
            pub fn is_change(&self) -> bool {
                self.owned.opf() & OP_MASK & 1 != 0
            }
        }
    };
}

/// `REQ_NOWAIT`, which is an enumerator in C.
const NOWAIT: u32 = 1 << bindings::req_flag_bits___REQ_NOWAIT;
const FUA: u32 = 1 << bindings::req_flag_bits___REQ_FUA;
const AHEAD: u32 = 1 << bindings::req_flag_bits___REQ_RAHEAD;

/// A bio in `map`.
pub struct MapBio {
    owned: Owned,
}

accessors!(MapBio);

impl MapBio {
    /// # Safety
    ///
    /// `bio` must be valid, and device-mapper must have handed it to `map` and not have got it back.
    pub(super) unsafe fn from_raw(bio: NonNull<bindings::bio>) -> Self {
        // INVARIANT: The caller vouches for it.
        Self { owned: Owned(bio) }
    }

    /// Whether it must not wait.
    #[inline]
    pub fn is_nowait(&self) -> bool {
        self.owned.opf() & NOWAIT != 0
    }

    /// Sends the bio to `device`, at the same sector.
    #[inline]
    pub fn remap(self, device: &Device) -> Mapped {
        self.owned.trace(Decision::Remap);
        let bio = self.owned.into_raw();
        // SAFETY: The bio was ours; device-mapper submits it when `map` returns DM_MAPIO_REMAPPED.
        unsafe { raw::pristine_bio_set_dev(bio.as_ptr(), device.bdev()) };
        // CAST: A small constant.
        Mapped(raw::DM_MAPIO_REMAPPED as i32)
    }

    /// Answers the bio.
    pub fn complete(self, result: Result<(), Status>) -> Mapped {
        self.owned.end(result);
        // CAST: A small constant.
        Mapped(raw::DM_MAPIO_SUBMITTED as i32)
    }

    /// Keeps the bio for later.
    pub fn defer(self) -> (Bio, Mapped) {
        self.owned.trace(Decision::Defer);
        // CAST: A small constant.
        (
            Bio { owned: self.owned },
            Mapped(raw::DM_MAPIO_SUBMITTED as i32),
        )
    }
}

/// A bio that was kept for later.
pub struct Bio {
    owned: Owned,
}

accessors!(Bio);

impl Bio {
    pub(super) fn raw(&self) -> NonNull<bindings::bio> {
        self.owned.0
    }

    /// # Safety
    ///
    /// `bio` must be valid, and nobody else may submit or end it.
    pub(super) unsafe fn from_raw(bio: NonNull<bindings::bio>) -> Self {
        // INVARIANT: The caller vouches for it.
        Self { owned: Owned(bio) }
    }

    /// Points the bio to `device`; it is the caller's to submit.
    pub(super) fn redirect(self, device: &Device) -> NonNull<bindings::bio> {
        self.owned.trace(Decision::Release);
        let bio = self.owned.into_raw();
        // SAFETY: The bio was ours, and is the caller's now.
        unsafe { raw::pristine_bio_set_dev(bio.as_ptr(), device.bdev()) };
        bio
    }

    /// Whether its content must be durable when it is answered.
    pub fn is_fua(&self) -> bool {
        self.owned.opf() & FUA != 0
    }

    /// Whether nobody waits for it yet.
    pub fn is_ahead(&self) -> bool {
        self.owned.opf() & AHEAD != 0
    }

    /// Whether the device below answered it with an error.
    pub fn failed(&self) -> bool {
        // SAFETY: By the type invariant the bio is valid and ours.
        unsafe { (*self.owned.0.as_ptr()).bi_status != 0 }
    }

    /// Copies `data` into a read, which must be for as many bytes; `false` if it is not, or if it takes the device below to
    /// make of it what the reader wants (integrity, inline encryption).
    pub fn fill(&mut self, data: &[u8]) -> bool {
        if self.is_change() || self.sectors().checked_mul(512) != u64::try_from(data.len()).ok() {
            return false;
        }
        // SAFETY: The bio is ours, and as long as the data.
        unsafe { raw::pristine_bio_fill(self.owned.0.as_ptr(), data.as_ptr().cast()) }
    }

    /// Sends the bio to `device`, at the same sector.
    pub fn submit(self, device: &Device) {
        let bio = self.redirect(device);
        // SAFETY: The bio was ours, and the ownership goes to the block layer.
        unsafe { bindings::submit_bio_noacct(bio.as_ptr()) };
    }

    /// Answers the bio. With `Ok`, one that the device below answered with an error keeps that error.
    pub fn complete(self, result: Result<(), Status>) {
        self.owned.end(result);
    }
}

/// A list of bios, first in first out, linked through the bios themselves: adding needs no memory.
///
/// # Invariants
///
/// `head` is the first of a chain through `bi_next` that ends with `tail`; every bio in it is owned by the list.
#[derive(Default)]
pub struct BioList {
    head: Option<NonNull<bindings::bio>>,
    tail: Option<NonNull<bindings::bio>>,
}

// SAFETY: The list owns its bios, which are not bound to a thread.
unsafe impl Send for BioList {}

impl BioList {
    /// A list without bios.
    pub const fn new() -> Self {
        Self {
            head: None,
            tail: None,
        }
    }

    /// Whether there is no bio in it.
    pub fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    /// Adds a bio at the end.
    pub fn push(&mut self, bio: Bio) {
        let raw = bio.owned.into_raw();
        // SAFETY: The bio is ours, so its link is ours to use.
        unsafe { (*raw.as_ptr()).bi_next = core::ptr::null_mut() };
        match self.tail {
            // SAFETY: By the type invariant the tail is a bio of the list.
            Some(tail) => unsafe { (*tail.as_ptr()).bi_next = raw.as_ptr() },
            None => self.head = Some(raw),
        }
        self.tail = Some(raw);
    }

    /// Takes the first bio.
    pub fn pop(&mut self) -> Option<Bio> {
        let first = self.head?;
        // SAFETY: By the type invariant the head is a bio of the list.
        let next = NonNull::new(unsafe { (*first.as_ptr()).bi_next });
        // SAFETY: As above; whoever gets it must find the link empty.
        unsafe { (*first.as_ptr()).bi_next = core::ptr::null_mut() };
        self.head = next;
        if next.is_none() {
            self.tail = None;
        }
        // INVARIANT: The bio has left the list, so the new value alone owns it.
        Some(Bio {
            owned: Owned(first),
        })
    }

    /// Takes all bios.
    pub fn take(&mut self) -> Self {
        core::mem::take(self)
    }

    /// Moves the bios of `other` behind those of this list.
    pub fn append(&mut self, mut other: Self) {
        let Some(head) = other.head.take() else {
            return;
        };
        match self.tail {
            // SAFETY: By the type invariant the tail is a bio of the list.
            Some(tail) => unsafe { (*tail.as_ptr()).bi_next = head.as_ptr() },
            None => self.head = Some(head),
        }
        self.tail = other.tail.take();
    }
}

impl Drop for BioList {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
