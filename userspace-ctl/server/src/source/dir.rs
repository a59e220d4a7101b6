// SPDX-License-Identifier: GPL-2.0

//! Objects in a directory. The kernel's page cache is the cache: what many ask for at once is read from the disk once, and
//! memory is given back when others need it. What is kept here is open files.
//!
//! A thread that serves many clients must not wait for a disk. So before bytes are used, `preadv2` with `RWF_NOWAIT` tells
//! whether they are in memory; if not, a thread for that reads them first.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pristine_store::{ChannelName, DirStore, ObjectName, Store};
use quick_cache::sync::Cache;
use rustix::fs::{fadvise, Advice, OFlags};
use rustix::io::{preadv2, Errno, ReadWriteFlags};

use super::{blocking, Trouble};
use crate::metrics::Metrics;

/// Files kept open.
const OPEN_FILES: usize = 256;
/// For how long: a file that was removed goes on being served up to then.
const OPEN_TIME: Duration = Duration::from_secs(10);
/// The kernel's readahead, as it is on most disks.
const SHORT: u64 = 128 << 10;
/// Pointers are far smaller; a file that is larger is none.
const MAX_POINTER: u64 = 64 << 10;

/// A store's directory.
#[derive(Debug)]
pub(crate) struct Dir {
    dir: Arc<DirStore>,
    store: Arc<dyn Store>,
    open: Cache<String, Arc<OpenFile>>,
}

/// An object's file.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) file: File,
    pub(crate) len: u64,
    since: Instant,
}

impl Dir {
    /// # Errors
    /// The directory is no store.
    pub(crate) fn new(root: &Path) -> Result<Self, pristine_store::Error> {
        let dir = Arc::new(DirStore::open(root)?);
        Ok(Dir {
            store: dir.clone(),
            dir,
            open: Cache::new(OPEN_FILES),
        })
    }

    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Opens an object's file, or takes one that is open.
    pub(crate) async fn open(
        &self,
        object: &ObjectName,
        metrics: &Metrics,
    ) -> Result<Arc<OpenFile>, Trouble> {
        let name = object.path();
        if let Some(file) = self.open.get(&name) {
            if file.since.elapsed() < OPEN_TIME {
                metrics.cache(true);
                return Ok(file);
            }
            // Another may have put a new one there meanwhile; that is only opened once more.
            self.open.remove(&name);
        }
        metrics.cache(false);
        let path = self.dir.root().join(&name);
        let open = async {
            let opened = blocking(move || open_file(&path)).await?;
            Ok::<_, Trouble>(Arc::new(opened?))
        };
        self.open.get_or_insert_async(&name, open).await
    }

    /// A pointer is replaced by renaming: one open file has all of it.
    pub(crate) async fn pointer(&self, channel: &ChannelName) -> Result<Vec<u8>, Trouble> {
        let path = self.dir.root().join(channel.path());
        let read = move || {
            let opened = open_file(&path)?;
            let mut bytes = Vec::new();
            opened.file.take(MAX_POINTER).read_to_end(&mut bytes)?;
            Ok::<_, io::Error>(bytes)
        };
        Ok(blocking(read).await??)
    }
}

/// Opens a regular file; anything else in its place (a directory, a pipe that would block) is not there.
fn open_file(path: &Path) -> io::Result<OpenFile> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(OpenFile {
        file,
        len: metadata.len(),
        since: Instant::now(),
    })
}

/// Whether an attempt that must not wait would have waited.
fn would_wait(error: Errno) -> bool {
    error == Errno::AGAIN
}

impl OpenFile {
    /// Exactly the bytes in `range`.
    pub(crate) async fn read(this: &Arc<Self>, range: Range<u64>) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let got = preadv2(&this.file, &mut slices, range.start, ReadWriteFlags::NOWAIT);
        if got == Ok(len) {
            return Ok(bytes);
        }
        let file = Arc::clone(this);
        let read = move || {
            file.file.read_exact_at(&mut bytes, range.start)?;
            Ok(bytes)
        };
        tokio::task::spawn_blocking(read).await?
    }

    /// Brings the bytes in `range` into memory, unless they are there.
    pub(crate) async fn warm(this: &Arc<Self>, range: Range<u64>) -> io::Result<()> {
        let cold = |at: u64| {
            let mut byte = [0];
            let mut slices = [IoSliceMut::new(&mut byte)];
            let got = preadv2(&this.file, &mut slices, at, ReadWriteFlags::NOWAIT);
            // File systems that cannot tell have to do without.
            got.is_err_and(would_wait)
        };
        // Readahead brings what follows, so of a short part the end comes last.
        let short = range.end - range.start <= SHORT;
        if !cold(range.end - 1) && (short || !cold(range.start)) {
            return Ok(());
        }
        let file = Arc::clone(this);
        let read = move || {
            let len = std::num::NonZeroU64::new(range.end - range.start);
            // Only a hint: the whole of it at once, before it is waited for.
            let _ = fadvise(&file.file, range.start, len, Advice::WillNeed);
            let mut at = range.start;
            while at < range.end {
                file.file.read_at(&mut [0], at)?;
                at += 64 << 10;
            }
            file.file.read_at(&mut [0], range.end - 1)?;
            Ok(())
        };
        tokio::task::spawn_blocking(read).await?
    }
}
