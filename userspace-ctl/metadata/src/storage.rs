// SPDX-License-Identifier: GPL-2.0

//! Devices as pages.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pristine_shared::{Page, PAGE_SECTORS, PAGE_SIZE, SECTOR_SIZE};
use rustix::fs::{fadvise, flock, Advice, FlockOperation, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// A device of 4 KiB pages. [`MetaDevice`] is the real one; tests put others in its place.
pub trait Storage {
    /// What messages call it.
    fn path(&self) -> &Path;
    /// Its size in 512-byte sectors.
    fn sectors(&self) -> u64;
    /// Whether [`Storage::write`] is allowed.
    fn writable(&self) -> bool;
    /// Reads a page, counted from the start.
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn read(&mut self, page: u64, into: &mut Page) -> io::Result<()>;
    /// Writes a page. It is durable only after [`Storage::sync`].
    ///
    /// # Errors
    ///
    /// The operating system's.
    fn write(&mut self, page: u64, from: &Page) -> io::Result<()>;
    /// Makes everything written durable.
    ///
    /// # Errors
    ///
    /// The operating system's; after one nothing written since the last success may be believed.
    fn sync(&mut self) -> io::Result<()>;

    /// Its whole pages.
    fn pages(&self) -> u64 {
        self.sectors() / PAGE_SECTORS
    }
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading, beside whoever else uses it; what is read may change meanwhile.
    Read,
    /// For reading, and nobody else may use it.
    ReadExclusive,
    /// For reading and writing, and nobody else may use it.
    Write,
    /// For reading and writing, beside a managed device that holds it and is suspended: whoever opens it so has suspended it.
    WriteSuspended,
}

impl Access {
    fn is_exclusive(self) -> bool {
        matches!(self, Self::ReadExclusive | Self::Write)
    }

    fn is_writing(self) -> bool {
        matches!(self, Self::Write | Self::WriteSuspended)
    }
}

/// A block device or an image file.
#[derive(Debug)]
pub struct MetaDevice {
    file: File,
    path: PathBuf,
    sectors: u64,
    writable: bool,
}

impl MetaDevice {
    /// Opens `path`.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if exclusive access was asked for and the device is mounted, active or held by another
    /// program; [`Error::NotABlockDevice`]; [`Error::Open`].
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let fail = |source: io::Error| Error::Open {
            path: path.clone(),
            source,
        };
        let kind = fs::metadata(&path).map_err(fail)?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(Error::NotABlockDevice { path });
        }
        let exclusive = access.is_exclusive();
        // On a block device O_EXCL without O_CREAT claims it as a mount does; on a file it means nothing.
        let flags = if exclusive && kind.is_block_device() {
            OFlags::EXCL
        } else {
            OFlags::empty()
        };
        let file = OpenOptions::new()
            .read(true)
            .write(access.is_writing())
            .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
            .open(&path);
        let mut file = match file {
            Ok(file) => file,
            Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                let by = holder(&path);
                return Err(Error::InUse { path, by });
            }
            Err(e) => return Err(fail(e)),
        };
        if exclusive && kind.is_file() {
            claim_file(&file, &path, access)?;
        }
        // The kernel target writes below the page cache: what an earlier reader left there may be old.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        let bytes = file.seek(SeekFrom::End(0)).map_err(fail)?;
        Ok(Self {
            file,
            path,
            sectors: bytes / SECTOR_SIZE,
            writable: access.is_writing(),
        })
    }

    /// Another handle on the same open device.
    ///
    /// # Errors
    ///
    /// When the process has no descriptors left.
    pub fn try_clone_file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Whether `other` is the same device or file.
    pub fn same_as(&self, other: &Self) -> bool {
        let id = |f: &File| {
            f.metadata().ok().map(|m| {
                if m.file_type().is_block_device() {
                    (true, m.rdev(), 0)
                } else {
                    (false, m.dev(), m.ino())
                }
            })
        };
        id(&self.file).is_some_and(|a| Some(a) == id(&other.file))
    }
}

/// Keeps others that ask off an image file, and refuses one that a loop device already uses.
fn claim_file(file: &File, path: &Path, access: Access) -> Result {
    let operation = if access.is_writing() {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    match flock(file, operation) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return Err(Error::InUse {
                path: path.into(),
                by: Some("another program that locked it".into()),
            })
        }
        Err(e) => {
            return Err(Error::Open {
                path: path.into(),
                source: e.into(),
            })
        }
    }
    match loop_device_of(path) {
        Some(name) => Err(Error::InUse {
            path: path.into(),
            by: Some(format!("/dev/{name}")),
        }),
        None => Ok(()),
    }
}

/// The loop device that has `path` as its backing file.
fn loop_device_of(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    for entry in fs::read_dir("/sys/block").ok()?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("loop") {
            continue;
        }
        let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
        if backing.is_ok_and(|b| Path::new(b.trim_end_matches('\n')) == path) {
            return Some(name);
        }
    }
    None
}

/// Who holds a block device: the devices stacked on it, or where it is mounted.
pub(crate) fn holder(path: &Path) -> Option<String> {
    let rdev = fs::metadata(path).ok()?.rdev();
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let holders = fs::read_dir(format!("/sys/dev/block/{major}:{minor}/holders"));
    if let Some(entry) = holders.ok().and_then(|mut d| d.next()).and_then(|e| e.ok()) {
        let kernel = entry.file_name().to_string_lossy().into_owned();
        let dm = fs::read_to_string(entry.path().join("dm/name"));
        return Some(match dm {
            Ok(name) => format!("/dev/mapper/{}", name.trim()),
            Err(_) => format!("/dev/{kernel}"),
        });
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let wanted = format!("{major}:{minor}");
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(2);
        (words.next()? == wanted)
            .then(|| words.nth(1))
            .flatten()
            .map(|at| format!("the mount at {at}"))
    })
}

impl Storage for MetaDevice {
    fn path(&self) -> &Path {
        &self.path
    }

    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn read(&mut self, page: u64, into: &mut Page) -> io::Result<()> {
        self.file.read_exact_at(into, offset(page)?)
    }

    fn write(&mut self, page: u64, from: &Page) -> io::Result<()> {
        self.file.write_all_at(from, offset(page)?)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn offset(page: u64) -> io::Result<u64> {
    page.checked_mul(PAGE_SIZE as u64)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

/// A device seen as if it had another size than it has.
#[derive(Debug)]
pub struct Window<S> {
    inner: S,
    sectors: u64,
}

impl<S: Storage> Window<S> {
    /// The device with the size that it has.
    pub(crate) fn new(inner: S) -> Self {
        let sectors = inner.sectors();
        Self { inner, sectors }
    }

    pub(crate) fn resize(&mut self, sectors: u64) {
        self.sectors = sectors;
    }

    /// The device itself.
    pub fn inner(&self) -> &S {
        &self.inner
    }
}

impl<S: Storage> Storage for Window<S> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn read(&mut self, page: u64, into: &mut Page) -> io::Result<()> {
        self.inner.read(page, into)
    }

    fn write(&mut self, page: u64, from: &Page) -> io::Result<()> {
        self.inner.write(page, from)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.inner.sync()
    }
}

/// [`Storage`] operations whose errors say what was done to what.
pub(crate) trait StorageExt: Storage {
    fn read_page(&mut self, page: u64, into: &mut Page) -> Result {
        self.read(page, into)
            .map_err(|e| self.fail("read", Some(page), e))
    }

    fn write_page(&mut self, page: u64, from: &Page) -> Result {
        self.write(page, from)
            .map_err(|e| self.fail("write", Some(page), e))
    }

    fn flush(&mut self) -> Result {
        self.sync().map_err(|e| self.fail("flush", None, e))
    }

    fn fail(&self, action: &'static str, page: Option<u64>, source: io::Error) -> Error {
        Error::Io {
            action,
            path: self.path().into(),
            page,
            source,
        }
    }
}

impl<S: Storage + ?Sized> StorageExt for S {}

/// Lets the shared core read from a [`Storage`], and keeps the operating system's error for it.
pub(crate) struct CoreSource<'a, S> {
    storage: &'a mut S,
    error: Option<(u64, io::Error)>,
}

impl<'a, S: Storage> CoreSource<'a, S> {
    pub(crate) fn new(storage: &'a mut S) -> Self {
        Self {
            storage,
            error: None,
        }
    }

    /// What the shared core said, with the operating system's reason where it has one.
    pub(crate) fn explain(self, error: pristine_shared::Error) -> Error {
        match (error, self.error) {
            (pristine_shared::Error::Io(_), Some((page, e))) => {
                self.storage.fail("read", Some(page), e)
            }
            (error, _) => Error::core(self.storage.path(), error),
        }
    }
}

impl<S: Storage> pristine_shared::recovery::Source for CoreSource<'_, S> {
    fn read(&mut self, page: u64, into: &mut Page) -> pristine_shared::Result {
        self.storage.read(page, into).map_err(|e| {
            self.error = Some((page, e));
            pristine_shared::Error::Io(page)
        })
    }
}
