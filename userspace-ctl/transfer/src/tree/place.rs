// SPDX-License-Identifier: GPL-2.0

//! Where a name of an archive is in the tree.

use std::collections::{BTreeMap, VecDeque};

use super::{Inode, InodeId, Kind, Link, Meta, TreeBuilder, MAX_NAME, MAX_PATH, ROOT};
use crate::error::{Error, Result};

/// Symbolic links followed for one name, as Linux does.
const MAX_LINKS: u32 = 40;

/// The parts of a name in an archive; empty for the root itself.
///
/// A slash at the beginning means the root of the archive, as for all programs that unpack tar.
///
/// # Errors
/// [`Error::Unsafe`] for a name with `..`, or one that no file can have.
pub(super) fn parts(name: &[u8]) -> Result<Vec<Vec<u8>>> {
    let shown = || format!("the entry {:?}", String::from_utf8_lossy(name));
    let mut parts = Vec::new();
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(Error::refused(shown(), "its name has .. in it")),
            part if part.len() > MAX_NAME || part.contains(&0) => {
                return Err(Error::refused(shown(), "no file can have this name"));
            }
            part => parts.push(part.to_vec()),
        }
    }
    if parts.iter().map(|part| part.len() + 1).sum::<usize>() > MAX_PATH {
        let why = format!("its path has more than {MAX_PATH} bytes");
        return Err(Error::refused(shown(), why));
    }
    Ok(parts)
}

/// What to do about directories on the way that are not there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// Make them.
    Make,
    /// Then there is no such place.
    Stop,
}

impl TreeBuilder {
    /// The directory that a path leads to, with symbolic links followed within the tree.
    ///
    /// # Errors
    /// [`Error::Damaged`] if something on the way is no directory, or links lead in a circle.
    pub(super) fn directory_at(
        &mut self,
        path: &[Vec<u8>],
        missing: Missing,
    ) -> Result<Option<InodeId>> {
        let shown = || {
            let joined = path.join(&b'/');
            format!("the directory {:?}", String::from_utf8_lossy(&joined))
        };
        let mut todo: VecDeque<Vec<u8>> = path.iter().cloned().collect();
        let mut way = vec![ROOT];
        let (mut links, mut len) = (0, 0);
        while let Some(part) = todo.pop_front() {
            if part == b".." {
                // Only from the target of a link; the root is its own parent.
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let here = way.last().copied().unwrap_or(ROOT);
            let entry = self
                .tree
                .directory(here)
                .and_then(|d| d.get(&part))
                .copied();
            let next = match entry {
                Some(link) => link.inode,
                None if missing == Missing::Stop => return Ok(None),
                None => self.make_directory(here, &part)?,
            };
            match self.tree.inode(next).map(|inode| &inode.kind) {
                Some(Kind::Directory(_)) => {
                    if missing == Missing::Make {
                        // This archive has it too, even if it does not list it.
                        self.link(here, &part, next);
                    }
                    way.push(next);
                }
                Some(Kind::Symlink(target)) => {
                    links += 1;
                    len += target.len();
                    if links > MAX_LINKS || len > MAX_PATH {
                        return Err(Error::damaged(shown(), "its symbolic links lead nowhere"));
                    }
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    for part in target.split(|&byte| byte == b'/').rev() {
                        if !part.is_empty() && part != b"." {
                            todo.push_front(part.to_vec());
                        }
                    }
                }
                _ if missing == Missing::Stop => return Ok(None),
                _ => {
                    let why = format!("{:?} is no directory", String::from_utf8_lossy(&part));
                    return Err(Error::damaged(shown(), why));
                }
            }
            if way.len() > MAX_PATH / 2 {
                return Err(Error::refused(shown(), "it lies too deep"));
            }
        }
        Ok(way.last().copied())
    }

    /// A directory that an archive uses and does not list.
    fn make_directory(&mut self, parent: InodeId, name: &[u8]) -> Result<InodeId> {
        let inode = Inode {
            meta: Meta {
                mode: 0o755,
                ..Meta::default()
            },
            kind: Kind::Directory(BTreeMap::new()),
        };
        let id = self.add(inode, "the archive")?;
        self.link(parent, name, id);
        Ok(id)
    }

    /// Gives an inode a name, instead of what had it.
    pub(super) fn link(&mut self, parent: InodeId, name: &[u8], inode: InodeId) {
        let layer = self.layers;
        if let Some(entries) = self.tree.directory_mut(parent) {
            entries.insert(name.to_vec(), Link { inode, layer });
        }
    }

    /// Puts an inode at a path. A directory over a directory changes only what is known about it.
    pub(super) fn put(&mut self, path: &[Vec<u8>], inode: Inode, what: &str) -> Result<()> {
        let is_directory = matches!(inode.kind, Kind::Directory(_));
        let Some((name, parent)) = path.split_last() else {
            // The root itself.
            if !is_directory {
                return Err(Error::refused(
                    what,
                    "it would be in the place of the root directory",
                ));
            }
            if let Some(root) = self.tree.inodes.get_mut(ROOT) {
                root.meta = inode.meta;
            }
            return Ok(());
        };
        let Some(parent) = self.directory_at(parent, Missing::Make)? else {
            return Ok(());
        };
        let there = self
            .tree
            .directory(parent)
            .and_then(|d| d.get(name))
            .copied();
        if let Some(link) = there.filter(|_| is_directory) {
            if let Some(existing) = self.tree.inodes.get_mut(link.inode) {
                if matches!(existing.kind, Kind::Directory(_)) {
                    existing.meta = inode.meta;
                    // It belongs to this archive now, but what lies in it does not.
                    self.link(parent, name, link.inode);
                    return Ok(());
                }
            }
        }
        let id = self.add(inode, what)?;
        self.link(parent, name, id);
        Ok(())
    }

    /// Gives the file at `target` another name.
    pub(super) fn hard_link(
        &mut self,
        path: &[Vec<u8>],
        target: &[Vec<u8>],
        what: &str,
    ) -> Result<()> {
        let missing = || {
            Error::damaged(
                what,
                "it is a hard link to a file that is not in the archive",
            )
        };
        let (target_name, target_parent) = target.split_last().ok_or_else(missing)?;
        let target_parent = self
            .directory_at(target_parent, Missing::Stop)?
            .ok_or_else(missing)?;
        let link = self
            .tree
            .directory(target_parent)
            .and_then(|d| d.get(target_name));
        let inode = link.ok_or_else(missing)?.inode;
        if matches!(
            self.tree.inode(inode).map(|i| &i.kind),
            Some(Kind::Directory(_)) | None
        ) {
            return Err(Error::refused(what, "it is a hard link to a directory"));
        }
        let Some((name, parent)) = path.split_last() else {
            return Err(Error::refused(
                what,
                "it would be in the place of the root directory",
            ));
        };
        if let Some(parent) = self.directory_at(parent, Missing::Make)? {
            self.link(parent, name, inode);
        }
        Ok(())
    }

    /// Does what a whiteout says: removes a name of archives before this one, or all in a directory.
    pub(super) fn white_out(&mut self, path: &[Vec<u8>], what: &str) -> Result<()> {
        let Some((mark, parent)) = path.split_last() else {
            return Ok(());
        };
        let layer = self.layers;
        let refuse = |why: &str| Err(Error::refused(what, why));
        let name = match mark.strip_prefix(b".wh.") {
            Some(b".wh..opq") => None,
            // Notes of aufs to itself.
            Some(rest) if rest.starts_with(b".wh.") => return Ok(()),
            Some(b"" | b"." | b"..") => {
                return refuse("it is a whiteout of nothing that can be removed")
            }
            Some(name) => Some(name.to_vec()),
            None => return Ok(()),
        };
        let Some(parent) = self.directory_at(parent, Missing::Stop)? else {
            // Nothing was there.
            return Ok(());
        };
        let Some(name) = name else {
            self.make_opaque(parent);
            return Ok(());
        };
        if let Some(entries) = self.tree.directory_mut(parent) {
            if let Some(link) = entries.get(&name).copied() {
                if link.layer < layer {
                    entries.remove(&name);
                } else {
                    // This archive itself puts something there: what it had before goes, that stays.
                    self.make_opaque(link.inode);
                }
            }
        }
        Ok(())
    }

    /// Removes from a directory all that archives before this one put there.
    fn make_opaque(&mut self, directory: InodeId) {
        let layer = self.layers;
        let mut todo = vec![directory];
        while let Some(id) = todo.pop() {
            let Some(entries) = self.tree.directory_mut(id) else {
                continue;
            };
            entries.retain(|_, link| link.layer == layer);
            todo.extend(entries.values().map(|link| link.inode));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let ok = |name: &[u8]| parts(name).unwrap().join(&b'/');
        assert_eq!(ok(b"./etc//hosts"), b"etc/hosts");
        assert_eq!(ok(b"/etc/hosts/"), b"etc/hosts");
        assert_eq!(ok(b"./"), b"");
        assert_eq!(ok(b"a/..b/c..."), b"a/..b/c...");
        for bad in [
            &b"../x"[..],
            b"a/../b",
            b"..",
            b"a/..",
            &[b'x'; 256],
            b"a\0b",
        ] {
            assert!(parts(bad).is_err(), "{bad:?}");
        }
        assert!(parts(&b"d/".repeat(2000)).is_err());
    }
}
