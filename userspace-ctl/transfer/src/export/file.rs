// SPDX-License-Identifier: GPL-2.0

//! Exports to files and block devices.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use pristine_image::{Digest, BLOCK_SIZE, DIGESTS_PER_PAGE};
use pristine_store::{BlockSink, ImageReader};
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom as RawSeek};

use super::{ExportOptions, Exported};
use crate::error::{Error, Result};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Zeros that are written at once where a device cannot do better.
const ZEROS: usize = 1 << 20;

/// Exports to a sparse file, which has its name once it is complete and durable.
///
/// # Errors
/// [`Error::Exists`] unless it may be replaced, [`Error::Busy`] if another export to it is running, and what can go
/// wrong with the store and the disk. What was written stays for the next attempt.
pub fn to_file(
    image: &ImageReader,
    output: &Path,
    options: &ExportOptions<'_>,
) -> Result<Exported> {
    match output.symlink_metadata() {
        Ok(metadata) if !metadata.is_file() => {
            let what = format!("{} is there, and no regular file", output.display());
            return Err(Error::Usage(what));
        }
        Ok(_) if !options.replace => {
            return Err(Error::Exists {
                what: output.display().to_string(),
            });
        }
        _ => {}
    }
    let partial = partial_path(output, image)?;
    let write = |error: io::Error| Error::io(format!("write {}", partial.display()), error);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(&partial)
        .map_err(write)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::Busy {
            what: partial.display().to_string(),
            why: "another export writes to it".to_owned(),
        }
    })?;
    let old = file.metadata().map_err(write)?.len();
    file.set_len(image.size()).map_err(write)?;
    let wanted = missing(image, &file, old.min(image.size()), options)?;
    let target = Target {
        file: &file,
        sparse: true,
        old: old.min(image.size()),
        done: AtomicU64::new(0),
        total: image.size(),
        options,
    };
    let exported = fetch(image, wanted, &target, options)?;
    if !has_name(&file, &partial)? {
        return Err(Error::Busy {
            what: partial.display().to_string(),
            why: "it was replaced meanwhile".to_owned(),
        });
    }
    file.sync_all().map_err(write)?;
    std::fs::rename(&partial, output).map_err(|error| {
        Error::io(
            format!("rename {} to {}", partial.display(), output.display()),
            error,
        )
    })?;
    sync_directory(output.parent().unwrap_or(Path::new("")))?;
    Ok(exported)
}

/// Whether the file still has the name that it is to be renamed from.
fn has_name(file: &File, path: &Path) -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let look = |error: io::Error| Error::io(format!("look at {}", path.display()), error);
    let own = file.metadata().map_err(look)?;
    let named = path.symlink_metadata().map_err(look)?;
    Ok((own.dev(), own.ino()) == (named.dev(), named.ino()))
}

/// The name under which a file is written: beside its own, and of this image alone.
fn partial_path(output: &Path, image: &ImageReader) -> Result<PathBuf> {
    let name = output
        .file_name()
        .ok_or_else(|| Error::Usage(format!("{} is no name of a file", output.display())))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    let id: String = image.image().to_string().chars().take(12).collect();
    partial.push(format!(".{id}.part"));
    Ok(output.with_file_name(partial))
}

/// Makes a rename durable.
pub(super) fn sync_directory(directory: &Path) -> Result<()> {
    let directory = match directory == Path::new("") {
        true => Path::new("."),
        false => directory,
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::io(format!("write {}", directory.display()), error))
}

/// The blocks that a file does not hold yet, of which the first `len` bytes may be right.
fn missing(
    image: &ImageReader,
    file: &File,
    len: u64,
    options: &ExportOptions<'_>,
) -> Result<Vec<Range<u64>>> {
    let page_bytes = (DIGESTS_PER_PAGE * BLOCK_SIZE) as u64;
    let mut wanted: Vec<Range<u64>> = Vec::new();
    let mut want = |range: Range<u64>| match wanted.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => wanted.push(range),
    };
    let mut buffer = vec![0; DIGESTS_PER_PAGE * BLOCK_SIZE];
    for number in 0..image.manifest().pages() {
        let blocks = image.manifest().page_blocks(number);
        let start = number * page_bytes;
        let has_data = start < len
            && rustix::fs::seek(file, RawSeek::Data(start))
                .is_ok_and(|data| data < blocks.end * BLOCK);
        if !has_data {
            want(blocks);
            continue;
        }
        options.watch.check()?;
        options.watch.step("comparing", start, Some(len));
        let page = image.page(number)?;
        let there = (len - start).min((blocks.end - blocks.start) * BLOCK);
        let there = (there / BLOCK * BLOCK) as usize;
        file.read_exact_at(&mut buffer[..there], start)
            .map_err(|error| Error::io("read what an earlier export wrote", error))?;
        for (index, block) in blocks.enumerate() {
            let content = buffer[..there].chunks_exact(BLOCK_SIZE).nth(index);
            let expected = page.block(index).map(|block| block.digest);
            if content.is_none_or(|content| Some(Digest::of(content)) != expected) {
                want(block..block + 1);
            }
        }
    }
    Ok(wanted)
}

/// Exports to a block device, which must hold the image and not be in use. What lies behind the image is left alone.
///
/// # Errors
/// [`Error::Busy`] if it is mounted or otherwise held, [`Error::TooSmall`], and what can go wrong with the store and the
/// device.
pub fn to_device(
    image: &ImageReader,
    device: &Path,
    options: &ExportOptions<'_>,
) -> Result<Exported> {
    let name = device.display().to_string();
    let write = |error: io::Error| Error::io(format!("write {name}"), error);
    let metadata = device.metadata().map_err(write)?;
    if !metadata.file_type().is_block_device() {
        return Err(Error::Usage(format!("{name} is no block device")));
    }
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(device);
    let mut file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => Error::Busy {
            what: name.clone(),
            why: "it is mounted, or part of another device".to_owned(),
        },
        _ => write(error),
    })?;
    let len = file.seek(SeekFrom::End(0)).map_err(write)?;
    if len < image.size() {
        return Err(Error::TooSmall {
            what: name,
            len,
            needed: image.size(),
        });
    }
    let target = Target {
        file: &file,
        sparse: false,
        old: image.size(),
        done: AtomicU64::new(0),
        total: image.size(),
        options,
    };
    let all = std::iter::once(0..image.blocks()).collect();
    let exported = fetch(image, all, &target, options)?;
    file.sync_all().map_err(write)?;
    Ok(exported)
}

fn fetch(
    image: &ImageReader,
    wanted: Vec<Range<u64>>,
    target: &Target<'_>,
    options: &ExportOptions<'_>,
) -> Result<Exported> {
    let blocks: u64 = wanted.iter().map(|range| range.end - range.start).sum();
    let kept = image.blocks() - blocks;
    target.progress(kept * BLOCK);
    let report = image.fetch(wanted, &options.fetch, target)?;
    Ok(Exported {
        bytes: image.size(),
        fetched_blocks: report.blocks,
        zero_blocks: report.zero_blocks,
        kept_blocks: kept,
        received_bytes: report.bytes,
        requests: report.requests,
    })
}

/// Where blocks are written.
struct Target<'a> {
    file: &'a File,
    /// Zeros are holes.
    sparse: bool,
    /// Bytes from the beginning that may have other content.
    old: u64,
    done: AtomicU64,
    total: u64,
    options: &'a ExportOptions<'a>,
}

impl Target<'_> {
    fn progress(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.options.watch.step("exporting", done, Some(self.total));
    }

    fn zero(&self, start: u64, end: u64) -> io::Result<()> {
        let end = end.min(self.old);
        if start >= end {
            // A new file is zero where nothing was written.
            return Ok(());
        }
        let flags = match self.sparse {
            true => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            false => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        if rustix::fs::fallocate(self.file, flags, start, end - start).is_ok() {
            return Ok(());
        }
        let zeros = vec![0; ZEROS];
        let mut at = start;
        while at < end {
            let len = (end - at).min(ZEROS as u64);
            self.file.write_all_at(&zeros[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }
}

impl BlockSink for Target<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, first * BLOCK)?;
        self.progress(data.len() as u64);
        Ok(())
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        self.zero(blocks.start * BLOCK, blocks.end * BLOCK)?;
        self.progress((blocks.end - blocks.start) * BLOCK);
        Ok(())
    }
}
