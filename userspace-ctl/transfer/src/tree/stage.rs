// SPDX-License-Identifier: GPL-2.0

//! Writing a tree to a directory, with owners, modes, times, extended attributes, hard links and devices.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pristine_image::{is_zero, BLOCK_SIZE};
use rustix::fs::{AtFlags, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, CWD};

use super::{FileContent, InodeId, Kind, Meta, Tree, MAX_PATH, ROOT};
use crate::error::{Error, Result};
use crate::open::Watch;

/// Bytes copied at once.
const PIECE: usize = 1 << 20;

impl Tree {
    /// Writes the tree into the empty directory `root`, which nobody else must be able to write to. Needs the rights of
    /// root, for owners and devices.
    ///
    /// # Errors
    /// [`Error::Io`] if the file system refuses something, [`Error::Cancelled`], and those of the inputs.
    pub fn stage(&self, root: &Path, watch: &Watch<'_>) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::Io {
                what: "unpack an archive with its owners and devices: run it as root".to_owned(),
                error: io::ErrorKind::PermissionDenied.into(),
            });
        }
        let mut stage = Stage {
            tree: self,
            root,
            written: HashMap::new(),
            buffer: vec![0; PIECE],
            done: 0,
            total: self.bytes(),
            watch,
        };
        // Directories get their times and modes last: what is written into them would change the times, and a mode may
        // not let even root in where capabilities are missing.
        let mut directories = vec![(PathBuf::new(), ROOT)];
        let mut at = 0;
        while let Some((path, id)) = directories.get(at).cloned() {
            at += 1;
            for (name, link) in self.directory(id).into_iter().flatten() {
                let path = path.join(OsStr::from_bytes(name));
                if stage.entry(&path, link.inode)? {
                    directories.push((path, link.inode));
                }
            }
        }
        for (path, id) in directories.iter().rev() {
            if let Some(inode) = self.inode(*id) {
                stage.meta(&root.join(path), &inode.meta, true)?;
            }
        }
        Ok(())
    }
}

struct Stage<'a> {
    tree: &'a Tree,
    root: &'a Path,
    /// Where files are that may have more names.
    written: HashMap<InodeId, PathBuf>,
    buffer: Vec<u8>,
    done: u64,
    total: u64,
    watch: &'a Watch<'a>,
}

impl Stage<'_> {
    /// Writes one entry; returns whether it is a directory.
    fn entry(&mut self, path: &Path, id: InodeId) -> Result<bool> {
        self.watch.check()?;
        let full = self.root.join(path);
        let fail = |error: io::Error| Error::io(format!("write {:?} of the archive", path), error);
        if path.as_os_str().len() > MAX_PATH {
            let why = format!("its path has more than {MAX_PATH} bytes");
            return Err(Error::refused(format!("{path:?}"), why));
        }
        if let Some(first) = self.written.get(&id) {
            fs::hard_link(first, &full).map_err(fail)?;
            return Ok(false);
        }
        let Some(inode) = self.tree.inode(id) else {
            return Ok(false);
        };
        match &inode.kind {
            Kind::Directory(_) => {
                fs::create_dir(&full).map_err(fail)?;
                return Ok(true);
            }
            Kind::File(content) => self.file(&full, path, content)?,
            Kind::Symlink(target) => {
                let target = OsString::from_vec(target.clone());
                std::os::unix::fs::symlink(target, &full).map_err(fail)?;
            }
            Kind::Device {
                block,
                major,
                minor,
            } => {
                let kind = match block {
                    true => FileType::BlockDevice,
                    false => FileType::CharacterDevice,
                };
                let device = rustix::fs::makedev(*major, *minor);
                rustix::fs::mknodat(CWD, &full, kind, Mode::empty(), device)
                    .map_err(|error| fail(error.into()))?;
            }
            Kind::Fifo => {
                rustix::fs::mknodat(CWD, &full, FileType::Fifo, Mode::empty(), 0)
                    .map_err(|error| fail(error.into()))?;
            }
        }
        let is_link = matches!(inode.kind, Kind::Symlink(_));
        self.meta(&full, &inode.meta, !is_link)?;
        self.written.insert(id, full);
        Ok(false)
    }

    fn file(&mut self, full: &Path, path: &Path, content: &FileContent) -> Result<()> {
        let write = |error: io::Error| Error::io(format!("write {path:?} of the archive"), error);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(full)
            .map_err(write)?;
        for piece in &content.pieces {
            let mut at = 0;
            while at < piece.len {
                self.watch.check()?;
                let len = (piece.len - at).min(PIECE as u64) as usize;
                let part = &mut self.buffer[..len];
                piece
                    .input
                    .read_at(piece.offset + at, part)
                    .map_err(|error| Error::io(format!("read {path:?} of the archive"), error))?;
                write_sparse(&file, part, piece.at + at).map_err(write)?;
                at += len as u64;
                self.done += len as u64;
                self.watch.step("unpacking", self.done, Some(self.total));
            }
        }
        file.set_len(content.len).map_err(write)
    }

    /// Owner, mode, attributes and time, in the order in which none undoes another.
    fn meta(&self, full: &Path, meta: &Meta, has_mode: bool) -> Result<()> {
        let fail = |what: &str, error: rustix::io::Errno| {
            let path = full.strip_prefix(self.root).unwrap_or(full);
            Error::io(format!("set {what} of {path:?} of the archive"), error)
        };
        let owner = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        rustix::fs::chownat(
            CWD,
            full,
            Some(owner.0),
            Some(owner.1),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|error| fail("the owner", error))?;
        if has_mode {
            rustix::fs::chmod(full, Mode::from_raw_mode(meta.mode))
                .map_err(|error| fail("the mode", error))?;
        }
        // A change of owner would take capabilities away.
        for (name, value) in &meta.xattrs {
            let shown = format!("the attribute {:?}", String::from_utf8_lossy(name));
            rustix::fs::lsetxattr(full, name.as_slice(), value, XattrFlags::empty())
                .map_err(|error| fail(&shown, error))?;
        }
        let time = Timespec {
            tv_sec: meta.mtime.0,
            tv_nsec: meta.mtime.1.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, full, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| fail("the time", error))
    }
}

/// Writes what is not zero.
fn write_sparse(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    for (index, block) in bytes.chunks(BLOCK_SIZE).enumerate() {
        if !is_zero(block) {
            file.write_all_at(block, at + (index * BLOCK_SIZE) as u64)?;
        }
    }
    Ok(())
}
