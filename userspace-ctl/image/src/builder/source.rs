// SPDX-License-Identifier: GPL-2.0

//! Where an image is made from: a raw image file, a block device, or anything else that can be read at any place.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom as RawSeek};

use super::BuildError;
use crate::fs::{self, Survey};
use crate::BLOCK_SIZE;

/// Bytes that can be read at any place, by several threads at once.
pub trait ReadAt: Send + Sync + Debug {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// Any; also if the bytes reach beyond the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Whether the bytes in `range` are known to be zero, so that they need not be read.
    fn is_hole(&self, range: Range<u64>) -> bool {
        let _ = range;
        false
    }

    /// These bytes will be read soon; what lies far away can be fetched at once. Doing nothing is right, if slow.
    ///
    /// # Errors
    /// What can go wrong on the way.
    fn prefetch(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        let _ = ranges;
        Ok(())
    }

    /// Whether it is still what it was when it was opened.
    ///
    /// # Errors
    /// If that cannot be told.
    fn is_unchanged(&self) -> io::Result<bool> {
        Ok(true)
    }
}

/// An open source; reading it does not change it.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    input: Box<dyn ReadAt>,
}

impl Source {
    /// Opens a regular file or a block device. A block device is opened exclusively, so that one that is
    /// mounted (and changes while it is read) is refused.
    ///
    /// # Errors
    /// [`BuildError::Open`], [`BuildError::InUse`] or [`BuildError::NotASource`].
    pub fn open(path: &Path) -> Result<Self, BuildError> {
        Ok(Source::new(path, Box::new(RawFile::open(path)?)))
    }

    /// From something that is open; `path` is its name in messages.
    pub fn new(path: impl Into<PathBuf>, input: Box<dyn ReadAt>) -> Self {
        Source {
            path: path.into(),
            input,
        }
    }

    /// The same with zeros in all that its file systems count as free, and what these are.
    ///
    /// # Errors
    /// [`BuildError::Survey`] if it cannot be read; what is not understood is kept as it is.
    pub fn zero_free(self) -> Result<(Self, Survey), BuildError> {
        let survey = fs::survey(self.input.as_ref()).map_err(|error| BuildError::Survey {
            path: self.path.clone(),
            error,
        })?;
        let input = match survey.free.is_empty() {
            true => self.input,
            false => Box::new(fs::Zeroed::new(self.input, survey.free.clone())),
        };
        Ok((Source::new(self.path, input), survey))
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is read.
    pub fn input(&self) -> &dyn ReadAt {
        self.input.as_ref()
    }

    /// What is read, alone.
    pub fn into_input(self) -> Box<dyn ReadAt> {
        self.input
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.input.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.input.is_empty()
    }

    /// Whether `range` lies in a hole: its bytes are zero, and need not be read.
    pub(super) fn is_hole(&self, start: u64, end: u64) -> bool {
        self.input.is_hole(start..end.min(self.len()))
    }

    /// Fills `buffer` from `offset`; bytes beyond the end are zero.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BuildError> {
        let there = self.len().saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (data, padding) = buffer.split_at_mut(there);
        padding.fill(0);
        let result = self.input.read_at(offset, data);
        result.map_err(|error| BuildError::Read {
            path: self.path.clone(),
            offset,
            error,
        })
    }

    /// Fails if the source was changed since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), BuildError> {
        match self.input.is_unchanged() {
            Ok(true) => Ok(()),
            Ok(false) => Err(BuildError::Changed(self.path.clone())),
            Err(error) => Err(BuildError::Open {
                path: self.path.clone(),
                error,
            }),
        }
    }

    /// Bytes of zeros that are missing to a whole block at the end.
    pub(super) fn padding(&self) -> u64 {
        self.len().next_multiple_of(BLOCK_SIZE as u64) - self.len()
    }
}

/// A regular file or a block device.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    /// Bytes that can be read.
    len: u64,
    /// Only files tell where their holes are.
    sparse: bool,
    /// Inode, size and time of change when it was opened.
    stamp: Option<(u64, u64, i64, i64)>,
}

impl RawFile {
    /// Opens it, see [`Source::open`].
    ///
    /// # Errors
    /// As [`Source::open`].
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
        Ok(RawFile {
            file,
            len,
            sparse: kind.is_file(),
            stamp: kind.is_file().then(|| stamp(&metadata)),
        })
    }
}

impl ReadAt for RawFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn is_hole(&self, range: Range<u64>) -> bool {
        if !self.sparse {
            return false;
        }
        match rustix::fs::seek(&self.file, RawSeek::Data(range.start)) {
            Ok(data) => data >= range.end,
            // No data from here to the end of the file.
            Err(rustix::io::Errno::NXIO) => true,
            Err(_) => false,
        }
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        match self.stamp {
            Some(before) => Ok(stamp(&self.file.metadata()?) == before),
            None => Ok(true),
        }
    }
}

fn stamp(metadata: &std::fs::Metadata) -> (u64, u64, i64, i64) {
    let (ino, size) = (metadata.ino(), metadata.size());
    (ino, size, metadata.mtime(), metadata.mtime_nsec())
}
