// SPDX-License-Identifier: GPL-2.0

//! Applying an archive to the tree.

use std::collections::BTreeMap;
use std::sync::Arc;

use tar::EntryType;

use super::members::{Member, Members};
use super::place::parts;
use super::{FileContent, Inode, Kind, Meta, Piece, TreeBuilder};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::open::Watch;

/// How GNU tar and others note extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// How GNU tar notes the context of SELinux.
const SELINUX: &[u8] = b"RHT.security.selinux";
/// The most bytes of a symbolic link.
const MAX_TARGET: usize = 4095;

impl TreeBuilder {
    /// Adds the members of a tar archive. Of two with the same name the later counts. With `whiteouts`, names that
    /// begin with `.wh.` remove what archives before this one put there, as in the layers of a container image.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Unsafe`] for names and links that would lead out, [`Error::TooLarge`],
    /// [`Error::Cancelled`], and those of the input.
    pub(crate) fn apply(
        &mut self,
        input: &Input,
        whiteouts: bool,
        watch: &Watch<'_>,
    ) -> Result<()> {
        self.layers += 1;
        let total = input.bytes.len();
        let mut members = Members::new(input.sequential(), total, &input.name);
        let mut any = false;
        while let Some(member) = members.next()? {
            watch.check()?;
            watch.step("reading", members.position(), Some(total));
            any = true;
            self.apply_member(member, input, whiteouts)?;
        }
        if !any && !whiteouts {
            return Err(Error::damaged(&input.name, "the archive holds no files"));
        }
        Ok(())
    }

    fn apply_member(&mut self, member: Member, input: &Input, whiteouts: bool) -> Result<()> {
        let what = format!(
            "{:?} in {}",
            String::from_utf8_lossy(&member.name),
            input.name
        );
        let path = parts(&member.name)?;
        if let Some((last, parents)) = path.split_last().filter(|_| whiteouts) {
            if parents.iter().any(|name| name.starts_with(b".wh..wh.")) {
                // Notes of aufs to itself.
                return Ok(());
            }
            if parents.iter().any(|name| name.starts_with(b".wh.")) {
                return Err(Error::refused(what, "it would lie in a whiteout"));
            }
            if last.starts_with(b".wh.") {
                return self.white_out(&path, &what);
            }
        }
        let kind = match member.kind {
            EntryType::Link => {
                let target = parts(&member.link)?;
                return self.hard_link(&path, &target, &what);
            }
            EntryType::Directory => Kind::Directory(BTreeMap::new()),
            // Before POSIX, a slash made a directory.
            EntryType::Regular if member.name.ends_with(b"/") => Kind::Directory(BTreeMap::new()),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.charge(member.len, &input.name)?;
                Kind::File(content(&member, input))
            }
            EntryType::Symlink => {
                if member.link.is_empty() || member.link.len() > MAX_TARGET {
                    return Err(Error::damaged(
                        what,
                        "a symbolic link of an impossible length",
                    ));
                }
                Kind::Symlink(member.link.clone())
            }
            EntryType::Char | EntryType::Block => Kind::Device {
                block: member.kind == EntryType::Block,
                major: member.device.0,
                minor: member.device.1,
            },
            EntryType::Fifo => Kind::Fifo,
            // What GNU tar and Solaris have for sockets and other things that no disk holds.
            other if other.as_byte() == b's' => {
                self.sockets += 1;
                return Ok(());
            }
            other => {
                let letter = char::from(other.as_byte());
                let why = format!("it is of a kind ({letter:?}) that this program does not know");
                return Err(Error::unsupported(what, why));
            }
        };
        let meta = self.meta(&member, &what)?;
        self.put(&path, Inode { meta, kind }, &what)
    }

    fn meta(&mut self, member: &Member, what: &str) -> Result<Meta> {
        let id = |id: u64| {
            u32::try_from(id)
                .map_err(|_| Error::damaged(what, "its owner has an impossible number"))
        };
        let mut xattrs = BTreeMap::new();
        for (key, value) in &member.pax {
            if let Some(name) = key.strip_prefix(XATTR) {
                if name.is_empty() || name.len() > 255 || name.contains(&0) || value.len() > 65536 {
                    return Err(Error::damaged(what, "an impossible extended attribute"));
                }
                xattrs.insert(name.to_vec(), value.clone());
            } else if key == SELINUX {
                let mut context = value.clone();
                if context.last() != Some(&0) {
                    context.push(0);
                }
                xattrs.insert(b"security.selinux".to_vec(), context);
            } else if key.starts_with(b"SCHILY.acl.") {
                self.acls += 1;
            }
        }
        Ok(Meta {
            mode: member.mode,
            uid: id(member.uid)?,
            gid: id(member.gid)?,
            mtime: member.mtime,
            xattrs,
        })
    }
}

fn content(member: &Member, input: &Input) -> FileContent {
    let pieces = member.pieces.iter().map(|&(at, offset, len)| Piece {
        at,
        input: Arc::clone(&input.bytes),
        offset,
        len,
    });
    FileContent {
        len: member.len,
        pieces: pieces.collect(),
    }
}
