// SPDX-License-Identifier: GPL-2.0

//! Which blocks belong to which file of an ext2, ext3 or ext4 file system, and what is in a file.
//!
//! Read-only, over any [`ReadAt`]: also over an image in a store, of which only inode tables and directories are
//! fetched then. Directories are read level by level, so that what a level needs is fetched at once.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::inode::Extent;
use super::Layout;
use crate::fs::bytes::{read, Fields};
use crate::fs::{FsError, Ranges, Result};
use crate::ReadAt;

/// The root directory.
pub const ROOT: u32 = 2;
/// The journal.
pub const JOURNAL: u32 = 8;
/// Entries that are followed; no real image has as many.
const MAX_ENTRIES: usize = 50_000_000;
/// The longest file that is read whole.
const MAX_FILE: u64 = 64 << 20;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a pipe or a socket.
    Special,
}

/// A file, under one of its names.
#[derive(Clone, Debug)]
pub struct File {
    /// Its path, from `/` on; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// Its inode's number.
    pub inode: u32,
    /// What it is.
    pub kind: FileKind,
    /// Its length in bytes.
    pub size: u64,
    /// Where its content lies, by place in the file: byte in the file, and bytes of the file system.
    pub extents: Vec<(u64, Range<u64>)>,
    /// Bytes of the file system that say where its content lies.
    pub maps: Vec<Range<u64>>,
}

/// All files of a file system.
#[derive(Debug)]
pub struct Files {
    layout: Layout,
    /// By path, in alphabetical order; a file with several names once for each.
    pub files: Vec<File>,
    /// The journal's bytes, if it has one inside.
    pub journal: Ranges,
    /// Superblocks, descriptors, bitmaps and inode tables.
    pub structure: Ranges,
}

impl Files {
    /// Reads all directories of the file system in `disk`.
    ///
    /// # Errors
    /// [`FsError`] if the file system is damaged, or reading fails.
    pub fn read(disk: &dyn ReadAt) -> Result<Self> {
        let layout = Layout::read(disk)?;
        let tables: Vec<_> = layout.used_tables().iter().collect();
        disk.prefetch(&tables)?;
        let structure = layout.layout_blocks();
        let structure = structure
            .iter()
            .map(|r| r.start * layout.block_size..r.end * layout.block_size);
        let journal = match layout.compat & super::feature::COMPAT_HAS_JOURNAL {
            0 => Ranges::new(),
            _ => {
                let inode = layout.inode(disk, JOURNAL)?;
                Ranges::of(
                    layout
                        .extents(disk, &inode)?
                        .iter()
                        .map(|e| layout.bytes(e))
                        .collect(),
                )
            }
        };
        let mut files = Files {
            structure: structure.collect(),
            layout,
            files: Vec::new(),
            journal,
        };
        files.walk(disk)?;
        files.files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    fn walk(&mut self, disk: &dyn ReadAt) -> Result<()> {
        let root = self.file(disk, String::new(), ROOT)?;
        let mut level = vec![root];
        let mut seen = HashSet::from([ROOT]);
        // Files with several names are read once.
        let mut known: HashMap<u32, usize> = HashMap::new();
        while !level.is_empty() {
            let content = level
                .iter()
                .flat_map(|dir| dir.extents.iter().map(|(_, range)| range.clone()));
            let content = Ranges::of(content.collect());
            disk.prefetch(&content.iter().collect::<Vec<_>>())?;
            let mut next = Vec::new();
            for directory in level {
                for (name, inode) in self.entries(disk, &directory)? {
                    let path = format!("{}/{name}", directory.path);
                    if self.files.len() + next.len() > MAX_ENTRIES {
                        return Err(FsError::refused("its directories have too many entries"));
                    }
                    if let Some(&at) = known.get(&inode) {
                        let mut again = self.files[at].clone();
                        again.path = path;
                        self.files.push(again);
                        continue;
                    }
                    let file = self.file(disk, path, inode)?;
                    if file.kind != FileKind::Directory {
                        known.insert(inode, self.files.len());
                        self.files.push(file);
                    } else if seen.insert(inode) {
                        next.push(file);
                    } else {
                        let why = format!("the directory {} has two names", file.path);
                        return Err(FsError::refused(why));
                    }
                }
                self.files.push(directory);
            }
            level = next;
        }
        // The root's path is empty until here, for the sake of those below.
        if let Some(root) = self.files.iter_mut().find(|file| file.inode == ROOT) {
            root.path = "/".to_owned();
        }
        Ok(())
    }

    fn file(&self, disk: &dyn ReadAt, path: String, number: u32) -> Result<File> {
        let inode = self.layout.inode(disk, number)?;
        let kind = match inode.mode >> 12 {
            8 => FileKind::Regular,
            4 => FileKind::Directory,
            10 => FileKind::Symlink,
            _ => FileKind::Special,
        };
        let (mut extents, mut maps) = (Vec::new(), Vec::new());
        let has_blocks = match kind {
            FileKind::Special => false,
            // Short ones are in the inode.
            FileKind::Symlink => inode.size >= 60,
            _ => true,
        };
        if has_blocks && !inode.is_inline() {
            for extent in self.layout.mapped(disk, &inode, &mut maps)? {
                if !extent.unwritten {
                    let from = extent.logical * self.layout.block_size;
                    extents.push((from, self.layout.bytes(&extent)));
                }
            }
        }
        Ok(File {
            path,
            inode: number,
            kind,
            size: inode.size,
            extents,
            maps: maps
                .into_iter()
                .map(|block| self.layout.block_bytes(block))
                .collect(),
        })
    }

    /// The entries of a directory, but for itself and its parent.
    fn entries(&self, disk: &dyn ReadAt, directory: &File) -> Result<Vec<(String, u32)>> {
        let damaged = || {
            let path = if directory.path.is_empty() {
                "/"
            } else {
                &directory.path
            };
            FsError::refused(format!("the directory {path} is damaged"))
        };
        let inode = self.layout.inode(disk, directory.inode)?;
        let mut found = Vec::new();
        if inode.is_inline() {
            // The first four bytes are the parent's inode.
            let area = Fields(&inode.map).from(4).0;
            parse_entries(area, &mut found).ok_or_else(damaged)?;
            return Ok(found);
        }
        for (_, range) in &directory.extents {
            // Beyond the directory's size there is nothing of it.
            for block in range.clone().step_by(self.layout.block_size as usize) {
                let bytes = read(disk, block, self.layout.block_size as usize)?;
                parse_entries(&bytes, &mut found).ok_or_else(damaged)?;
            }
        }
        Ok(found)
    }

    /// Bytes of a block of the file system.
    pub fn block_size(&self) -> u64 {
        self.layout.block_size
    }

    /// The file with a path.
    pub fn find(&self, path: &str) -> Option<&File> {
        let at = self
            .files
            .binary_search_by(|file| file.path.as_str().cmp(path));
        self.files.get(at.ok()?)
    }

    /// The files whose paths begin so.
    pub fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a File> {
        let first = self
            .files
            .partition_point(|file| file.path.as_str() < prefix);
        let rest = self.files[first..].iter();
        rest.take_while(move |file| file.path.starts_with(prefix))
    }

    /// The whole content of a file, at most 64 MiB.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn content(&self, disk: &dyn ReadAt, file: &File) -> Result<Vec<u8>> {
        if file.size > MAX_FILE {
            let why = format!("{} has {} bytes, too many to read it", file.path, file.size);
            return Err(FsError::refused(why));
        }
        let inode = self.layout.inode(disk, file.inode)?;
        let mut content = vec![0; file.size as usize];
        if inode.is_inline() {
            let len = content.len().min(inode.map.len());
            content[..len].copy_from_slice(&inode.map[..len]);
            if content.len() > len {
                let why = format!("{} lies in its inode's attributes", file.path);
                return Err(FsError::refused(why));
            }
            return Ok(content);
        }
        for (at, range) in &file.extents {
            let len = (range.end - range.start).min(file.size.saturating_sub(*at));
            if len > 0 {
                let bytes = read(disk, range.start, len as usize)?;
                let at = *at as usize;
                content[at..at + len as usize].copy_from_slice(&bytes);
            }
        }
        Ok(content)
    }
}

/// Adds the entries of a directory's block; `None` if it is damaged. The inner nodes of hashed directories look like
/// blocks with a single unused entry.
fn parse_entries(block: &[u8], found: &mut Vec<(String, u32)>) -> Option<()> {
    let mut rest = Fields(block);
    while rest.0.len() >= 8 {
        let (inode, name_len) = (rest.le32(0), usize::from(rest.u8(6)));
        // Blocks of 64 KiB do not fit 16 bits.
        let len = match rest.le16(4) {
            0xffff | 0 if block.len() == 1 << 16 => 1 << 16,
            len => usize::from(len),
        };
        let len = len.min(if block.len() == 1 << 16 {
            rest.0.len()
        } else {
            len
        });
        if len < 8 || len > rest.0.len() || 8 + name_len > len {
            return None;
        }
        let name = rest.0.get(8..8 + name_len)?;
        if inode != 0 && name_len > 0 && name != b"." && name != b".." {
            found.push((String::from_utf8_lossy(name).into_owned(), inode));
        }
        rest = rest.from(len);
    }
    Some(())
}

impl Layout {
    /// The parts of the inode tables that were ever used.
    fn used_tables(&self) -> Ranges {
        let tables = self
            .groups
            .iter()
            .filter(|group| !group.inodes_uninit)
            .map(|group| {
                let unused = u64::from(group.unused_inodes).min(self.inodes_per_group);
                let start = group.inode_table * self.block_size;
                start..start + (self.inodes_per_group - unused) * self.inode_size
            });
        Ranges::of(tables.collect())
    }

    fn block_bytes(&self, block: u64) -> Range<u64> {
        block * self.block_size..(block + 1) * self.block_size
    }

    fn bytes(&self, extent: &Extent) -> Range<u64> {
        extent.physical * self.block_size..(extent.physical + extent.len) * self.block_size
    }
}
