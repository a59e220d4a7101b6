// SPDX-License-Identifier: GPL-2.0

//! The files of archives, put together in memory before anything is written.
//!
//! Archives come from anywhere. Here their names are only keys: an entry is put at its place in a tree of our own,
//! symbolic links on the way are followed within that tree (as a container's root would), `..` is refused, and hard
//! links can only name files of the tree. What comes out has plain paths with real directories on the way, so that
//! writing it to disk ([`Tree::stage`]) cannot leave its directory, whatever the archives held.

mod archive;
pub(crate) mod members;
mod place;
mod stage;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use pristine_image::ReadAt;
use pristine_store::CancelToken;

use crate::error::{Error, Result};
use crate::input::{Bytes, Input};
use crate::open::Watch;

/// The most files in a tree.
const MAX_INODES: usize = 4_000_000;
/// The longest path in a tree, in bytes: with the directory it is written to, it must be one that Linux takes.
const MAX_PATH: usize = 3500;
/// The longest name, in bytes.
const MAX_NAME: usize = 255;

type InodeId = usize;
const ROOT: InodeId = 0;

/// What an inode has besides its content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permissions, with the set-id and sticky bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// The bytes of a file: pieces of inputs; between them it is zero.
#[derive(Debug, Default)]
pub(crate) struct FileContent {
    pub(crate) len: u64,
    pub(crate) pieces: Vec<Piece>,
}

#[derive(Debug)]
pub(crate) struct Piece {
    /// Where it goes in the file.
    pub(crate) at: u64,
    /// Where it comes from.
    pub(crate) input: Arc<dyn ReadAt>,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

#[derive(Debug)]
pub(crate) enum Kind {
    Directory(BTreeMap<Vec<u8>, Link>),
    File(FileContent),
    Symlink(Vec<u8>),
    /// A character device, if `block` is not set.
    Device {
        block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) inode: InodeId,
    /// The number of the archive that put it there.
    pub(crate) layer: u32,
}

/// The files of one or more archives.
#[derive(Debug)]
pub struct Tree {
    pub(crate) inodes: Vec<Inode>,
}

impl Tree {
    fn new() -> Self {
        let root = Inode {
            meta: Meta {
                mode: 0o755,
                ..Meta::default()
            },
            kind: Kind::Directory(BTreeMap::new()),
        };
        Tree { inodes: vec![root] }
    }

    /// Puts together archives that are in memory, one over the other; of content they may have `limit` bytes. With
    /// `whiteouts` they are the layers of a container image.
    ///
    /// # Errors
    /// What is wrong with an archive.
    pub fn from_layers(
        layers: impl IntoIterator<Item = Vec<u8>>,
        whiteouts: bool,
        limit: u64,
    ) -> Result<Self> {
        let watch = Watch {
            progress: &|_, _, _| (),
            cancel: CancelToken::new(),
        };
        let mut builder = TreeBuilder::new(limit);
        for (number, layer) in layers.into_iter().enumerate() {
            let input = Input {
                name: format!("layer {number}"),
                bytes: Arc::new(Bytes(layer)),
            };
            builder.apply(&input, whiteouts, &watch)?;
        }
        Ok(builder.finish().0)
    }

    pub(crate) fn inode(&self, id: InodeId) -> Option<&Inode> {
        self.inodes.get(id)
    }

    fn directory(&self, id: InodeId) -> Option<&BTreeMap<Vec<u8>, Link>> {
        match &self.inodes.get(id)?.kind {
            Kind::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    fn directory_mut(&mut self, id: InodeId) -> Option<&mut BTreeMap<Vec<u8>, Link>> {
        match &mut self.inodes.get_mut(id)?.kind {
            Kind::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    /// Bytes of content in all files, holes included.
    pub fn bytes(&self) -> u64 {
        let lens = self.inodes.iter().map(|inode| match &inode.kind {
            Kind::File(content) => content.len,
            _ => 0,
        });
        lens.fold(0, u64::saturating_add)
    }

    /// All paths and what they are, in order; for tests and listings.
    pub fn paths(&self) -> Vec<(PathBuf, char)> {
        let mut found = Vec::new();
        let mut stack = vec![(PathBuf::new(), ROOT)];
        while let Some((path, id)) = stack.pop() {
            let Some(entries) = self.directory(id) else {
                continue;
            };
            for (name, link) in entries {
                use std::os::unix::ffi::OsStrExt;
                let path = path.join(std::ffi::OsStr::from_bytes(name));
                let letter = match self.inode(link.inode).map(|inode| &inode.kind) {
                    Some(Kind::Directory(_)) => {
                        stack.push((path.clone(), link.inode));
                        'd'
                    }
                    Some(Kind::Symlink(_)) => 'l',
                    Some(Kind::Device { block: true, .. }) => 'b',
                    Some(Kind::Device { .. }) => 'c',
                    Some(Kind::Fifo) => 'p',
                    _ => 'f',
                };
                found.push((path, letter));
            }
        }
        found.sort();
        found
    }
}

/// Puts a tree together from archives.
#[derive(Debug)]
pub struct TreeBuilder {
    tree: Tree,
    /// Archives applied.
    layers: u32,
    /// Bytes of content that may come yet.
    left: u64,
    limit: u64,
    notes: Vec<String>,
    /// Files whose ACLs, given as text, are not kept.
    acls: u64,
    /// Sockets, which are nothing without their process.
    sockets: u64,
}

impl TreeBuilder {
    /// An empty tree that may get `limit` bytes of content.
    pub fn new(limit: u64) -> Self {
        TreeBuilder {
            tree: Tree::new(),
            layers: 0,
            left: limit,
            limit,
            notes: Vec::new(),
            acls: 0,
            sockets: 0,
        }
    }

    /// The tree, and what the user should know about it.
    pub fn finish(mut self) -> (Tree, Vec<String>) {
        if self.acls > 0 {
            self.notes.push(format!(
                "access control lists of {} files were not kept",
                self.acls
            ));
        }
        if self.sockets > 0 {
            self.notes
                .push(format!("{} sockets were left out", self.sockets));
        }
        (self.tree, self.notes)
    }

    fn add(&mut self, inode: Inode, what: &str) -> Result<InodeId> {
        if self.tree.inodes.len() >= MAX_INODES {
            let why = format!("it has more than {MAX_INODES} files");
            return Err(Error::unsupported(what, why));
        }
        self.tree.inodes.push(inode);
        Ok(self.tree.inodes.len() - 1)
    }

    /// Takes `len` bytes from what may come yet.
    fn charge(&mut self, len: u64, what: &str) -> Result<()> {
        match self.left.checked_sub(len) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(Error::TooLarge {
                what: what.to_owned(),
                limit: self.limit,
            }),
        }
    }
}
