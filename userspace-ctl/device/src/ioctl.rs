// SPDX-License-Identifier: GPL-2.0

//! The one place that calls `ioctl`.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;

use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

/// An ioctl whose argument is a buffer that the kernel reads and writes.
struct Buffer<'a> {
    opcode: Opcode,
    bytes: &'a mut [u8],
}

// SAFETY: `as_ptr` gives the start of a buffer that is borrowed for as long as the call takes. How much of it the kernel
// may touch is for the caller of `call` to say, see there.
unsafe impl Ioctl for Buffer<'_> {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.bytes.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> Result<()> {
        Ok(())
    }
}

/// Calls ioctl `opcode` of `file` with `bytes`.
///
/// # Safety
///
/// The kernel must not touch more than `bytes.len()` bytes at the argument, and any address within `bytes` must be
/// good for what the ioctl does with it.
unsafe fn call(file: &File, opcode: Opcode, bytes: &mut [u8]) -> io::Result<()> {
    let argument = Buffer { opcode, bytes };
    // SAFETY: the implementation of `Ioctl` above and what the caller promises.
    unsafe { rustix::ioctl::ioctl(file, argument) }.map_err(io::Error::from)
}

/// Type of the device-mapper ioctls.
const DM: u32 = 0xfd;
/// Bytes of `struct dm_ioctl`.
pub(crate) const DM_HEADER: usize = 312;

/// A device-mapper ioctl; `buffer` is a `struct dm_ioctl` with its payload behind it.
pub(crate) fn device_mapper(file: &File, command: u32, buffer: &mut [u8]) -> io::Result<()> {
    let stated = buffer
        .get(12..16)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes);
    if buffer.len() < DM_HEADER || stated as usize > buffer.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // CAST: 312 fits.
    let opcode = (3 << 30) | ((DM_HEADER as u32) << 16) | (DM << 8) | command;
    // SAFETY: the kernel reads and writes `data_size` bytes, which was checked to be within the buffer; the payload
    // has no addresses.
    unsafe { call(file, opcode, buffer) }
}

/// An ioctl of `/dev/pristine` without addresses in its argument.
pub(crate) fn pristine(file: &File, opcode: u32, argument: &mut [u8]) -> io::Result<()> {
    if argument.len() < size_of(opcode) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the size that is part of the number, which is all that the kernel touches, was checked.
    unsafe { call(file, opcode, argument) }
}

/// An ioctl of `/dev/pristine` whose argument names a buffer: `set` puts the address into the argument.
///
/// The kernel writes at most as many bytes to the buffer as the argument asks for, which `wanted` must say.
pub(crate) fn pristine_into<T: zerocopy::IntoBytes + zerocopy::FromBytes>(
    file: &File,
    opcode: u32,
    argument: &mut T,
    set: impl FnOnce(&mut T, u64),
    into: &mut [u8],
    wanted: usize,
) -> io::Result<()> {
    let fits = std::mem::size_of::<T>() >= size_of(opcode);
    if !fits || wanted > into.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // CAST: an address is at most 64 bits.
    set(argument, into.as_mut_ptr() as usize as u64);
    // SAFETY: the size of the argument was checked; the address is that of `into`, which is exclusively borrowed
    // during the call, and the kernel writes `wanted` bytes there at most.
    unsafe { call(file, opcode, argument.as_mut_bytes()) }
}

/// An ioctl of `/dev/pristine` whose argument names data for the kernel: `set` puts the address into the argument.
///
/// The kernel reads at most as many bytes of the data as the argument says, which `offered` must say too.
pub(crate) fn pristine_from<T: zerocopy::IntoBytes + zerocopy::FromBytes>(
    file: &File,
    opcode: u32,
    argument: &mut T,
    set: impl FnOnce(&mut T, u64),
    from: &[u8],
    offered: usize,
) -> io::Result<()> {
    let fits = std::mem::size_of::<T>() >= size_of(opcode);
    if !fits || offered > from.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // CAST: an address is at most 64 bits.
    set(argument, from.as_ptr() as usize as u64);
    // SAFETY: the size of the argument was checked; the address is that of `from`, which is borrowed during the
    // call, and the kernel only reads there, `offered` bytes at most.
    unsafe { call(file, opcode, argument.as_mut_bytes()) }
}

fn size_of(opcode: u32) -> usize {
    // CAST: 14 bits fit.
    ((opcode >> 16) & 0x3fff) as usize
}
