// SPDX-License-Identifier: GPL-2.0

//! Where an image is made from: a raw image file or a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom as RawSeek};

use super::BuildError;
use crate::BLOCK_SIZE;

/// An open source; reading it does not change it.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    file: File,
    /// Bytes that can be read.
    len: u64,
    /// Only files tell where their holes are.
    sparse: bool,
    /// Inode, size and time of change when it was opened.
    stamp: Option<(u64, u64, i64, i64)>,
}

impl Source {
    /// Opens a regular file or a block device. A block device is opened exclusively, so that one that is
    /// mounted (and changes while it is read) is refused.
    ///
    /// # Errors
    /// [`BuildError::Open`], [`BuildError::InUse`] or [`BuildError::NotASource`].
    pub fn open(path: &Path) -> Result<Self, BuildError> {
        let fail = |error: io::Error| BuildError::Open {
            path: path.to_owned(),
            error,
        };
        let metadata = path.metadata().map_err(fail)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BuildError::NotASource(path.to_owned()));
        }
        let mut options = OpenOptions::new();
        options.read(true);
        if kind.is_block_device() {
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        let mut file = options.open(path).map_err(|error| {
            if error.kind() == io::ErrorKind::ResourceBusy {
                BuildError::InUse(path.to_owned())
            } else {
                fail(error)
            }
        })?;
        let len = file.seek(SeekFrom::End(0)).map_err(fail)?;
        Ok(Source {
            path: path.to_owned(),
            file,
            len,
            sparse: kind.is_file(),
            stamp: kind.is_file().then(|| stamp(&metadata)),
        })
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `range` lies in a hole: its bytes are zero, and need not be read.
    pub(super) fn is_hole(&self, start: u64, end: u64) -> bool {
        if !self.sparse {
            return false;
        }
        match rustix::fs::seek(&self.file, RawSeek::Data(start)) {
            Ok(data) => data >= end.min(self.len),
            // No data from here to the end of the file.
            Err(rustix::io::Errno::NXIO) => true,
            Err(_) => false,
        }
    }

    /// Fills `buffer` from `offset`; bytes beyond the end are zero.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BuildError> {
        let there = self.len.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (data, padding) = buffer.split_at_mut(there);
        padding.fill(0);
        let result = self.file.read_exact_at(data, offset);
        result.map_err(|error| BuildError::Read {
            path: self.path.clone(),
            offset,
            error,
        })
    }

    /// Fails if the file was changed since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), BuildError> {
        let Some(before) = self.stamp else {
            return Ok(());
        };
        let metadata = self.file.metadata().map_err(|error| BuildError::Open {
            path: self.path.clone(),
            error,
        })?;
        if stamp(&metadata) != before {
            return Err(BuildError::Changed(self.path.clone()));
        }
        Ok(())
    }

    /// Bytes of zeros that are missing to a whole block at the end.
    pub(super) fn padding(&self) -> u64 {
        self.len.next_multiple_of(BLOCK_SIZE as u64) - self.len
    }
}

fn stamp(metadata: &std::fs::Metadata) -> (u64, u64, i64, i64) {
    let (ino, size) = (metadata.ino(), metadata.size());
    (ino, size, metadata.mtime(), metadata.mtime_nsec())
}
