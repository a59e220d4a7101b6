// SPDX-License-Identifier: GPL-2.0

//! The trees of Btrfs that say what is used: chunks, the roots of the other trees, extents, block groups.

use std::collections::HashMap;
use std::ops::Range;

use super::{has_node_checksum, Super};
use crate::fs::bytes::{read, Fields};
use crate::fs::{FsError, Ranges, Result};
use crate::ReadAt;

const EXTENT_TREE: u64 = 2;
const BLOCK_GROUP_TREE: u64 = 11;
const CHUNK_OBJECTS: u64 = 256;

const ROOT_ITEM: u8 = 132;
const EXTENT_ITEM: u8 = 168;
const METADATA_ITEM: u8 = 169;
const BLOCK_GROUP_ITEM: u8 = 192;
const CHUNK_ITEM: u8 = 228;

const NODE_HEADER: usize = 101;
const KEY_LEN: usize = 17;
const ITEM_LEN: usize = 25;
const POINTER_LEN: usize = 33;
const MAX_LEVEL: u8 = 7;

/// Data, system and metadata may be mixed; of the profiles only dup.
const PLAIN_TYPES: u64 = 0x7 | 0x20;

/// A key of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    object: u64,
    kind: u8,
    offset: u64,
}

impl Key {
    fn parse(f: Fields<'_>) -> Self {
        Key {
            object: f.le64(0),
            kind: f.u8(8),
            offset: f.le64(9),
        }
    }
}

/// A range of the logical address space, and where it lies.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) logical: u64,
    pub(super) len: u64,
    kind: u64,
    /// Device and byte on it.
    stripes: Vec<(u64, u64)>,
}

impl Chunk {
    fn parse(logical: u64, f: Fields<'_>) -> Result<Self> {
        let count = usize::from(f.le16(44));
        let len = f.le64(0);
        let stripes = (0..count).map(|n| (f.le64(48 + 32 * n), f.le64(56 + 32 * n)));
        let stripes: Vec<_> = stripes.collect();
        let far = |at: u64| at.checked_add(len).is_none_or(|end| end > 1 << 62);
        let wrong = len == 0
            || count == 0
            || f.0.len() < 48 + 32 * count
            || far(logical)
            || stripes.iter().any(|&(_, at)| far(at));
        if wrong {
            return Err(FsError::refused("its chunks are damaged"));
        }
        Ok(Chunk {
            logical,
            len,
            kind: f.le64(24),
            stripes,
        })
    }

    /// Whether each stripe holds all of the chunk.
    pub(super) fn is_plain(&self) -> bool {
        self.kind & !PLAIN_TYPES == 0
    }

    /// Where its stripes on a device begin.
    pub(super) fn stripes_on(&self, device: u64) -> impl Iterator<Item = u64> + '_ {
        let here = self.stripes.iter().filter(move |(on, _)| *on == device);
        here.map(|&(_, at)| at)
    }
}

/// Reads trees.
pub(super) struct Reader<'a> {
    disk: &'a dyn ReadAt,
    node: u32,
    device: u64,
    meta_uuid: [u8; 16],
    /// By logical address, ascending.
    chunks: Vec<Chunk>,
    /// Nodes that may still be read: no more than there is room for on the disk.
    left: u64,
    /// The roots of the trees wanted here.
    roots: HashMap<u64, (u64, u8, u64)>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(disk: &'a dyn ReadAt, sb: &Super) -> Result<Self> {
        let mut reader = Reader {
            disk,
            node: sb.node,
            device: sb.device,
            meta_uuid: sb.meta_uuid,
            chunks: Vec::new(),
            left: 4 * (disk.len() / u64::from(sb.node)),
            roots: HashMap::new(),
        };
        let mut rest = Fields(&sb.system_chunks);
        while !rest.0.is_empty() {
            let key = Key::parse(rest);
            let item = rest.from(KEY_LEN);
            let chunk = Chunk::parse(key.offset, item)?;
            let len = 48 + 32 * chunk.stripes.len();
            reader.chunks.push(chunk);
            rest = item.from(len);
        }
        reader.sort_chunks()?;
        Ok(reader)
    }

    fn sort_chunks(&mut self) -> Result<()> {
        self.chunks.sort_by_key(|chunk| chunk.logical);
        let overlap = |pair: &[Chunk]| pair[0].logical + pair[0].len > pair[1].logical;
        if self.chunks.windows(2).any(overlap) {
            return Err(FsError::refused("its chunks overlap"));
        }
        Ok(())
    }

    /// All chunks.
    pub(super) fn chunks(&mut self, sb: &Super) -> Result<Vec<Chunk>> {
        let mut chunks = Vec::new();
        let root = (sb.chunk_root, sb.chunk_root_level, sb.chunk_generation);
        self.walk(root, &mut |key, item| {
            if key.object == CHUNK_OBJECTS && key.kind == CHUNK_ITEM {
                chunks.push(Chunk::parse(key.offset, item)?);
            }
            Ok(())
        })?;
        self.chunks = chunks;
        self.sort_chunks()?;
        self.read_roots(sb)?;
        Ok(self.chunks.clone())
    }

    fn read_roots(&mut self, sb: &Super) -> Result<()> {
        let mut roots = HashMap::new();
        let root = (sb.root, sb.root_level, sb.generation);
        self.walk(root, &mut |key, item| {
            let wanted = key.object == EXTENT_TREE || key.object == BLOCK_GROUP_TREE;
            if wanted && key.kind == ROOT_ITEM {
                let root = (item.le64(176), item.u8(238), item.le64(160));
                roots.insert(key.object, root);
            }
            Ok(())
        })?;
        self.roots = roots;
        Ok(())
    }

    fn root(&self, tree: u64) -> Result<(u64, u8, u64)> {
        let root = self.roots.get(&tree).copied();
        root.ok_or_else(|| FsError::refused(format!("its tree {tree} is missing")))
    }

    /// All that is allocated, by logical address.
    pub(super) fn extents(&mut self, sb: &Super) -> Result<Ranges> {
        let node = u64::from(sb.node);
        let mut extents = Ranges::new();
        let root = self.root(EXTENT_TREE)?;
        self.walk(root, &mut |key, _| {
            let len = match key.kind {
                EXTENT_ITEM => key.offset,
                METADATA_ITEM => node,
                _ => return Ok(()),
            };
            let end = key.object.checked_add(len);
            let end = end.filter(|_| len > 0 && key.object >= extents.end());
            let end = end.ok_or_else(|| FsError::refused("its extents overlap"))?;
            extents.push(key.object..end);
            Ok(())
        })?;
        Ok(extents)
    }

    /// Length and bytes used of each block group, by its address.
    pub(super) fn block_groups(&mut self, sb: &Super) -> Result<HashMap<u64, (u64, u64)>> {
        let tree = match sb.groups_apart {
            true => BLOCK_GROUP_TREE,
            false => EXTENT_TREE,
        };
        let mut groups = HashMap::new();
        let root = self.root(tree)?;
        self.walk(root, &mut |key, item| {
            if key.kind == BLOCK_GROUP_ITEM {
                groups.insert(key.object, (key.offset, item.le64(0)));
            }
            Ok(())
        })?;
        Ok(groups)
    }

    /// Calls `each` with all items of a tree, in order.
    fn walk(
        &mut self,
        root: (u64, u8, u64),
        each: &mut dyn FnMut(Key, Fields<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut last = None;
        let (at, level, generation) = root;
        if level > MAX_LEVEL {
            return Err(damaged(at));
        }
        self.walk_node(at, level, generation, &mut last, each)
    }

    fn walk_node(
        &mut self,
        at: u64,
        level: u8,
        generation: u64,
        last: &mut Option<Key>,
        each: &mut dyn FnMut(Key, Fields<'_>) -> Result<()>,
    ) -> Result<()> {
        let bytes = self.node(at, level, generation)?;
        let f = Fields(&bytes);
        let count = f.le32(96) as usize;
        let entry_len = if level == 0 { ITEM_LEN } else { POINTER_LEN };
        if count > (bytes.len() - NODE_HEADER) / entry_len {
            return Err(damaged(at));
        }
        for index in 0..count {
            let entry = f.from(NODE_HEADER + index * entry_len);
            let key = Key::parse(entry);
            // A pointer has the key of the first item below it.
            let ascending =
                last.is_none_or(|last| if level == 0 { last < key } else { last <= key });
            if !ascending {
                return Err(damaged(at));
            }
            if level > 0 {
                let (child, generation) = (entry.le64(KEY_LEN), entry.le64(KEY_LEN + 8));
                self.walk_node(child, level - 1, generation, last, each)?;
                continue;
            }
            *last = Some(key);
            let start = NODE_HEADER + entry.le32(KEY_LEN) as usize;
            let end = start.saturating_add(entry.le32(KEY_LEN + 4) as usize);
            let item = bytes.get(start..end).ok_or_else(|| damaged(at))?;
            each(key, Fields(item))?;
        }
        Ok(())
    }

    /// A node, checked.
    fn node(&mut self, at: u64, level: u8, generation: u64) -> Result<Vec<u8>> {
        self.left = self.left.checked_sub(1).ok_or_else(|| damaged(at))?;
        let node = u64::from(self.node);
        let chunk = self.chunks.partition_point(|chunk| chunk.logical <= at);
        let chunk = chunk
            .checked_sub(1)
            .and_then(|index| self.chunks.get(index));
        let inside = |range: Range<u64>| at.checked_add(node).is_some_and(|end| end <= range.end);
        let chunk = chunk
            .filter(|chunk| chunk.is_plain() && inside(chunk.logical..chunk.logical + chunk.len))
            .ok_or_else(|| FsError::refused("a tree of it lies in no chunk that can be read"))?;
        let stripe = chunk.stripes_on(self.device).next();
        let stripe = stripe.ok_or_else(|| damaged(at))?;
        let bytes = read(self.disk, stripe + (at - chunk.logical), node as usize)?;
        let f = Fields(&bytes);
        let good = has_node_checksum(&bytes)
            && f.array(32) == self.meta_uuid
            && f.le64(48) == at
            && f.u8(100) == level
            && f.le64(80) == generation;
        if good {
            Ok(bytes)
        } else {
            Err(damaged(at))
        }
    }
}

fn damaged(at: u64) -> FsError {
    FsError::refused(format!(
        "the node at {at} of one of its trees is damaged (run btrfs check on it)"
    ))
}
