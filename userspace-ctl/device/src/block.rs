// SPDX-License-Identifier: GPL-2.0

//! Block devices and image files: sizes, who uses them, flushing, zeroing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{fallocate, FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Major and minor number of a block device.
///
/// # Errors
///
/// [`Error::NotABlockDevice`].
pub fn number(path: &Path) -> Result<(u32, u32)> {
    let metadata = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if !metadata.file_type().is_block_device() {
        return Err(Error::NotABlockDevice { path: path.into() });
    }
    let rdev = metadata.rdev();
    Ok((rustix::fs::major(rdev), rustix::fs::minor(rdev)))
}

/// Size of a block device or file in bytes.
///
/// # Errors
///
/// Those of the operating system.
pub fn size_bytes(path: &Path) -> Result<u64> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    file.seek(SeekFrom::End(0))
        .map_err(|e| Error::io("find the size of", path, e))
}

/// Whether somebody has claimed a block device: it is mounted, or another device lies on it.
///
/// # Errors
///
/// Those of opening it.
pub fn is_in_use(path: &Path) -> Result<bool> {
    let flags = i32::try_from(OFlags::EXCL.bits()).unwrap_or(0);
    match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(_) => Ok(false),
        Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => Ok(true),
        Err(e) => Err(Error::io("open", path, e)),
    }
}

/// What uses a block device, as far as the kernel tells: a device on top of it, a mount, swap.
pub fn user(major: u32, minor: u32) -> Option<String> {
    let wanted = format!("{major}:{minor}");
    if let Some(entry) = fs::read_dir(format!("/sys/dev/block/{wanted}/holders"))
        .ok()
        .and_then(|mut d| d.next()?.ok())
    {
        let dm = fs::read_to_string(entry.path().join("dm/name"));
        return Some(match dm {
            Ok(name) => format!("/dev/mapper/{}", name.trim()),
            Err(_) => format!("/dev/{}", entry.file_name().to_string_lossy()),
        });
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mounted = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(2);
        (words.next()? == wanted)
            .then(|| words.nth(1))
            .flatten()
            .map(|at| format!("the mount at {at}"))
    });
    mounted.or_else(|| opener(major, minor))
}

/// A process that has the device open.
fn opener(major: u32, minor: u32) -> Option<String> {
    let wanted = rustix::fs::makedev(major, minor);
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let open = descriptors.flatten().any(|d| {
            fs::metadata(d.path())
                .is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == wanted)
        });
        if open {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}

/// Makes everything written to a device or file durable.
///
/// # Errors
///
/// Those of the operating system.
pub fn flush(file: &File) -> io::Result<()> {
    file.sync_data()
}

/// Makes `length` bytes from `offset` of a block device or file read as zero, without sending zeroes if the device can
/// do it itself. Both must be multiples of the device's logical block size.
///
/// # Errors
///
/// Those of the operating system.
pub fn zero(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    // On a block device the first may discard and the second writes zeroes; a file on tmpfs knows only the first.
    for flags in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
        match fallocate(file, flags | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let zeroes = vec![0; usize::try_from(length.min(1 << 20)).unwrap_or(1 << 20)];
    let mut at = offset;
    let end = offset.saturating_add(length);
    while at < end {
        let part = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(zeroes.len());
        file.write_all_at(zeroes.get(..part).unwrap_or(&zeroes), at)?;
        at += part as u64; // CAST: at most 1 MiB.
    }
    Ok(())
}

/// Tells a block device that `length` bytes from `offset` are not needed; what they read as afterwards is not defined.
/// Devices that cannot are left alone.
///
/// # Errors
///
/// Those of the operating system, except that it is not supported.
pub fn discard(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let is_block = file.metadata()?.file_type().is_block_device();
    let mut flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if is_block {
        flags |= FallocateFlags::NO_HIDE_STALE;
    }
    match fallocate(file, flags, offset, length) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn zeroing_a_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 16384]).unwrap();
        zero(file.as_file(), 4096, 8192).unwrap();
        let bytes = fs::read(file.path()).unwrap();
        assert!(bytes[..4096].iter().all(|b| *b == 7));
        assert!(bytes[4096..12288].iter().all(|b| *b == 0));
        assert!(bytes[12288..].iter().all(|b| *b == 7));
        assert_eq!(size_bytes(file.path()).unwrap(), 16384);
        assert!(matches!(
            number(file.path()),
            Err(Error::NotABlockDevice { .. })
        ));
    }
}
