// SPDX-License-Identifier: GPL-2.0

//! Synchronous I/O of whole pages, for metadata.

use core::marker::PhantomData;
use core::ptr::NonNull;

use kernel::alloc::{flags::GFP_KERNEL, KVVec};
use kernel::error::to_result;
use kernel::prelude::*;

use super::raw;
use super::Device;

/// Bytes of a page on disk; independent of the machine's page size.
const PAGE: usize = 4096;
const PAGE_SECTORS: u64 = 8;
/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// How a write reaches the device.
#[derive(Clone, Copy, Default)]
pub struct WriteFlags {
    /// All writes that completed before are made durable first.
    pub preflush: bool,
    /// The write is durable when it completes.
    pub fua: bool,
}

impl WriteFlags {
    /// Durable when it completes, whatever of the writes before.
    pub const FUA: Self = Self {
        preflush: false,
        fua: true,
    };
    /// Durable when it completes, and all that completed before as well.
    pub const FLUSH_FUA: Self = Self {
        preflush: true,
        fua: true,
    };
}

/// Memory for I/O: a whole number of pages.
///
/// Allocated as `kvmalloc` does it; both kinds of memory are aligned enough for any block device.
pub struct Buffer {
    bytes: KVVec<[u8; PAGE]>,
}

impl Buffer {
    /// A buffer of `pages` pages, all zero.
    pub fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            bytes: KVVec::from_elem([0; PAGE], pages, GFP_KERNEL)?,
        })
    }

    /// Page `i`, if there are that many.
    pub fn page(&mut self, i: usize) -> Option<&mut [u8; PAGE]> {
        self.bytes.get_mut(i)
    }

    /// The first page.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a buffer without pages.
    pub fn first(&mut self) -> Result<&mut [u8; PAGE]> {
        self.bytes.first_mut().ok_or(EINVAL)
    }

    /// All pages.
    pub fn pages(&mut self) -> &mut [[u8; PAGE]] {
        self.bytes.as_mut_slice()
    }

    /// All bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.bytes.as_mut_slice().as_flattened_mut()
    }

    /// The first two pages.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a buffer with fewer.
    pub fn pair(&mut self) -> Result<(&mut [u8; PAGE], &mut [u8; PAGE])> {
        match self.bytes.as_mut_slice() {
            [a, b, ..] => Ok((a, b)),
            _ => Err(EINVAL),
        }
    }
}

/// The first sector of page `page`.
fn sector_of(page: u64) -> Result<u64> {
    page.checked_mul(PAGE_SECTORS).ok_or(EINVAL)
}

/// A client of dm-io, with memory pools of its own for forward progress.
///
/// # Invariants
///
/// The pointer came from `dm_io_client_create()` and was not destroyed.
pub struct IoClient(NonNull<raw::dm_io_client>);

// SAFETY: A client may be used and destroyed by any thread.
unsafe impl Send for IoClient {}
// SAFETY: `dm_io()` may be called on one client by several threads at once.
unsafe impl Sync for IoClient {}

impl IoClient {
    /// A new client.
    pub fn new() -> Result<Self> {
        let mut error = 0;
        // SAFETY: `error` is writable.
        let client = unsafe { raw::pristine_dm_io_create(&mut error) };
        // INVARIANT: It was just created.
        NonNull::new(client)
            .map(Self)
            .ok_or_else(|| Error::from_errno(error))
    }

    /// Reads the pages of `buffer` from page `page` of `device` on.
    pub fn read(&self, device: &Device, page: u64, buffer: &mut [[u8; PAGE]]) -> Result {
        // SAFETY: The memory is writable for the length given.
        unsafe {
            self.transfer(
                device,
                sector_of(page)?,
                u64::try_from(buffer.len())? * PAGE_SECTORS,
                buffer.as_mut_ptr().cast(),
                false,
                WriteFlags::default(),
            )
        }
    }

    /// Reads one page.
    pub fn read_page(&self, device: &Device, page: u64, into: &mut [u8; PAGE]) -> Result {
        self.read(device, page, core::slice::from_mut(into))
    }

    /// Writes the first `pages` pages of `buffer` to page `page` of `device` and those that follow.
    pub fn write(
        &self,
        device: &Device,
        page: u64,
        buffer: &mut Buffer,
        pages: usize,
        flags: WriteFlags,
    ) -> Result {
        let slice = buffer.bytes.get_mut(..pages).ok_or(EINVAL)?;
        // SAFETY: The memory is readable for the length given, and exclusively borrowed, so that it does not
        // change under the device.
        unsafe {
            self.transfer(
                device,
                sector_of(page)?,
                u64::try_from(slice.len())? * PAGE_SECTORS,
                slice.as_mut_ptr().cast(),
                true,
                flags,
            )
        }
    }

    /// Makes durable all that was written to `device` and answered.
    pub fn flush(&self, device: &Device) -> Result {
        // SAFETY: Client and device are valid.
        to_result(unsafe { raw::pristine_flush(self.0.as_ptr(), device.bdev()) })
    }

    /// Makes `count` sectors of `device` from `sector` on zero.
    pub fn zero(&self, device: &Device, sector: u64, count: u64) -> Result {
        if sector.checked_add(count).ok_or(EINVAL)? > device.sectors() {
            return Err(EIO);
        }
        // SAFETY: The device is valid.
        to_result(unsafe { raw::pristine_zero(device.bdev(), sector, count) })
    }

    /// Writes `bytes` of the buffer, a whole number of sectors, to `device` from `sector` on.
    pub fn write_at(
        &self,
        device: &Device,
        sector: u64,
        buffer: &mut Buffer,
        bytes: core::ops::Range<usize>,
    ) -> Result {
        let data = buffer.bytes().get_mut(bytes).ok_or(EINVAL)?;
        if data.as_ptr().addr() % SECTOR != 0 || data.len() % SECTOR != 0 {
            return Err(EINVAL);
        }
        let count = u64::try_from(data.len() / SECTOR)?;
        // SAFETY: The memory is readable for the length given, and exclusively borrowed.
        unsafe {
            self.transfer(
                device,
                sector,
                count,
                data.as_mut_ptr(),
                true,
                WriteFlags::default(),
            )
        }
    }

    /// # Safety
    ///
    /// `memory` must be kmalloc or vmalloc memory of `count` sectors, readable and, unless `write`, writable.
    unsafe fn transfer(
        &self,
        device: &Device,
        sector: u64,
        count: u64,
        memory: *mut u8,
        write: bool,
        flags: WriteFlags,
    ) -> Result {
        if sector.checked_add(count).ok_or(EINVAL)? > device.sectors() {
            return Err(EIO);
        }
        // SAFETY: Client and device are valid; the caller vouches for the memory, and the call waits for the
        // I/O to end.
        to_result(unsafe {
            raw::pristine_dm_rw(
                self.0.as_ptr(),
                device.bdev(),
                sector,
                count,
                memory.cast(),
                write,
                flags.preflush,
                flags.fua,
            )
        })
    }
}

impl Drop for IoClient {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the client is there, and it ends here.
        unsafe { raw::pristine_dm_io_destroy(self.0.as_ptr()) }
    }
}

/// While it lives, allocations of the current task do not recurse into I/O.
pub struct NoIo {
    flags: u32,
    // Not `Send`: the state belongs to the task.
    _task: PhantomData<*mut ()>,
}

impl NoIo {
    /// Enters the scope.
    pub fn enter() -> Self {
        Self {
            // SAFETY: No requirements.
            flags: unsafe { raw::pristine_noio_enter() },
            _task: PhantomData,
        }
    }
}

impl Drop for NoIo {
    fn drop(&mut self) {
        // SAFETY: The flags are those that entering returned, in the same task.
        unsafe { raw::pristine_noio_leave(self.flags) }
    }
}
