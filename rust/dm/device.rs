// SPDX-License-Identifier: GPL-2.0

//! The devices below a target.

use core::ptr::NonNull;

use kernel::bindings;

use super::raw;

/// A device that a target holds open.
///
/// # Invariants
///
/// `dev` came from `dm_get_device()` for `ti` and was not put. `ti` outlives this value: targets, and with them
/// their devices, are dropped in `dtr` at the latest (see [`super::Target`]).
pub struct Device {
    ti: NonNull<raw::dm_target>,
    dev: NonNull<raw::dm_dev>,
}

// SAFETY: Both pointers may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: All methods only read what does not change while the device is held.
unsafe impl Sync for Device {}

impl Device {
    /// # Safety
    ///
    /// `dev` must have come from `dm_get_device()` for `ti`, and the new value must alone be responsible for
    /// putting it, not later than in the `dtr` of `ti`.
    pub(super) unsafe fn from_raw(ti: NonNull<raw::dm_target>, dev: NonNull<raw::dm_dev>) -> Self {
        // INVARIANT: The caller vouches for it.
        Self { ti, dev }
    }

    pub(super) fn raw(&self) -> *mut raw::dm_dev {
        self.dev.as_ptr()
    }

    #[inline]
    pub(super) fn bdev(&self) -> *mut bindings::block_device {
        // SAFETY: By the type invariant `dev` is valid; its `bdev` does not change while it is held.
        unsafe { (*self.dev.as_ptr()).bdev }
    }

    /// The size in sectors.
    pub fn sectors(&self) -> u64 {
        // SAFETY: The block device is valid while it is held.
        unsafe { raw::pristine_bdev_sectors(self.bdev()) }
    }

    /// Whether it refuses to be written to, though it could be opened for that.
    pub fn is_read_only(&self) -> bool {
        // SAFETY: The block device is valid while it is held.
        unsafe { raw::pristine_bdev_read_only(self.bdev()) }
    }

    /// The device number as `major:minor`, the way device-mapper prints it.
    pub fn name(&self) -> &str {
        // SAFETY: By the type invariant `dev` is valid; the name is written once, before it is handed out.
        let name = unsafe { &(*self.dev.as_ptr()).name };
        // SAFETY: An array of C characters is as readable as bytes.
        let bytes = unsafe { core::slice::from_raw_parts(name.as_ptr().cast::<u8>(), name.len()) };
        core::ffi::CStr::from_bytes_until_nul(bytes)
            .ok()
            .and_then(|s| s.to_str().ok())
            .unwrap_or("?")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this is the one put that is owed, and `ti` is still there.
        unsafe { raw::dm_put_device(self.ti.as_ptr(), self.dev.as_ptr()) }
    }
}

/// The queue limits of a managed device while they are made.
pub struct Limits<'a>(pub(super) &'a mut bindings::queue_limits);

impl Limits<'_> {
    /// Keeps discards, secure erases and write-zeroes to at most `sectors` sectors each.
    pub fn cap_ranges(&mut self, sectors: u32) {
        let l = &mut *self.0;
        for limit in [
            &mut l.max_hw_discard_sectors,
            &mut l.max_discard_sectors,
            &mut l.max_secure_erase_sectors,
            &mut l.max_write_zeroes_sectors,
            &mut l.max_hw_wzeroes_unmap_sectors,
            &mut l.max_wzeroes_unmap_sectors,
        ] {
            *limit = (*limit).min(sectors);
        }
    }
}
