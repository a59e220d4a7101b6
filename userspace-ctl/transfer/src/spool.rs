// SPDX-License-Identifier: GPL-2.0

//! Temporary files for what must be unpacked before it can be read: sparse, without a name, limited in size.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pristine_image::{is_zero, ReadAt, BLOCK_SIZE};
use rustix::fs::SeekFrom as RawSeek;

use crate::error::{Error, Result};
use crate::open::Watch;

/// Bytes written at once.
const PIECE: usize = 256 << 10;
/// Left free on the file system that takes temporary files, when no limit is given.
const RESERVE: u64 = 256 << 20;

/// A file without a name, which goes with it.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    len: u64,
}

impl Spool {
    /// An empty file in `directory`.
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(directory).map_err(|error| {
            Error::io(
                format!("make a temporary file in {}", directory.display()),
                error,
            )
        })?;
        Ok(Spool { file, len: 0 })
    }

    /// Takes all that `reader` yields; blocks of zeros become holes. `total` is how much that will be, if it is known.
    ///
    /// # Errors
    /// [`Error::TooLarge`] beyond `limit`, [`Error::Cancelled`], and those of `reader` and of the file.
    pub(crate) fn fill(
        &mut self,
        reader: &mut dyn Read,
        name: &str,
        limit: u64,
        total: Option<u64>,
        watch: &Watch<'_>,
    ) -> Result<()> {
        let too_large = || Error::TooLarge {
            what: name.to_owned(),
            limit,
        };
        if total.is_some_and(|total| total > limit) {
            return Err(too_large());
        }
        let write = |error| Error::io("write a temporary file", error);
        let mut piece = vec![0; PIECE];
        loop {
            watch.check()?;
            let len = read_full(reader, &mut piece)
                .map_err(|error| Error::io(format!("unpack {name}"), error))?;
            if self.len + len as u64 > limit {
                return Err(too_large());
            }
            for (index, block) in piece[..len].chunks(BLOCK_SIZE).enumerate() {
                if !is_zero(block) {
                    let at = self.len + (index * BLOCK_SIZE) as u64;
                    self.file.write_all_at(block, at).map_err(write)?;
                }
            }
            self.len += len as u64;
            watch.step("unpacking", self.len, total);
            if len < piece.len() {
                break;
            }
        }
        self.file.set_len(self.len).map_err(write)
    }
}

impl ReadAt for Spool {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn is_hole(&self, range: Range<u64>) -> bool {
        match rustix::fs::seek(&self.file, RawSeek::Data(range.start)) {
            Ok(data) => data >= range.end,
            // No data from here to the end of the file.
            Err(rustix::io::Errno::NXIO) => true,
            Err(_) => false,
        }
    }
}

/// Fills `buffer`; less only at the end.
pub(crate) fn read_full(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match reader.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(len) => done += len,
            // Our own errors may have this kind; they are not a signal's.
            Err(error)
                if error.kind() == io::ErrorKind::Interrupted && error.get_ref().is_none() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The most that may be unpacked into `directory` if nothing else is said: what is free there, without 256 MiB.
///
/// # Errors
/// If that cannot be told.
pub fn default_limit(directory: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(directory)
        .map_err(|error| Error::io(format!("look at {}", directory.display()), error))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    Ok(free.saturating_sub(RESERVE))
}
