// SPDX-License-Identifier: GPL-2.0

//! The disk that data and metadata share, in memory, and what recovery makes of it.

use pristine_shared::bits;
use pristine_shared::checkpoint::Plane;
use pristine_shared::error::Error as Core;
use pristine_shared::geometry::Run;
use pristine_shared::layout::Placement;
use pristine_shared::recovery::{self, Sink, Source};
use pristine_shared::superblock::{Label, Superblock};
use pristine_shared::{Page, PAGE_SIZE};

use crate::log::{Change, Entry};

/// Bytes in a block.
pub const BLOCK: usize = 4096;
/// Bytes that a disk writes wholly or not at all.
pub const SECTOR: usize = 512;

/// A disk: the data device in front, behind it the metadata device. With the metadata in the tail it is all
/// data device.
pub struct Disk {
    bytes: Vec<u8>,
    original: Vec<u8>,
    /// Bytes of the data device.
    data_len: usize,
    placement: Placement,
    /// The blocks of the managed device that differ from the original, one bit each.
    differs: Vec<u64>,
    managed_blocks: usize,
}

/// What undoes a change.
pub struct Undo {
    offset: usize,
    old: Vec<u8>,
}

impl Disk {
    /// A disk with this content.
    pub fn new(original: Vec<u8>, data_len: usize, placement: Placement) -> Result<Self, String> {
        let mut disk = Self {
            bytes: original.clone(),
            original,
            data_len,
            placement,
            differs: Vec::new(),
            managed_blocks: 0,
        };
        let sb = disk
            .superblock()
            .map_err(|e| format!("the disk before the recording: {e}"))?;
        if sb.geometry.block_size() != BLOCK as u64 {
            return Err("blocks that are not 4 KiB are not checked here".to_owned());
        }
        disk.managed_blocks = usize::try_from(sb.geometry.blocks()).map_err(|e| e.to_string())?;
        disk.differs = vec![0; disk.managed_blocks.div_ceil(64)];
        Ok(disk)
    }

    /// The data device.
    pub fn data(&self) -> &[u8] {
        self.bytes.get(..self.data_len).unwrap_or(&[])
    }

    /// Whether a block differs from the original.
    pub fn is_changed(&self, block: usize) -> bool {
        self.differs
            .get(block / 64)
            .is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// The words of the plane of blocks that differ.
    pub fn changed(&self) -> &[u64] {
        &self.differs
    }

    fn notice(&mut self, offset: usize, len: usize) {
        let end = (offset + len).div_ceil(BLOCK).min(self.managed_blocks);
        for block in offset / BLOCK..end {
            let at = block * BLOCK..(block + 1) * BLOCK;
            let changed = self.bytes.get(at.clone()) != self.original.get(at);
            if let Some(word) = self.differs.get_mut(block / 64) {
                *word = *word & !(1 << (block % 64)) | u64::from(changed) << (block % 64);
            }
        }
    }

    /// Applies an entry, or of its sectors those that `keep` chooses.
    pub fn apply(
        &mut self,
        entry: &Entry,
        mut keep: impl FnMut(usize) -> bool,
    ) -> Result<Undo, String> {
        let offset = usize::try_from(entry.offset).map_err(|e| e.to_string())?;
        let len = usize::try_from(entry.len()).map_err(|e| e.to_string())?;
        let place = self
            .bytes
            .get_mut(offset..offset + len)
            .ok_or_else(|| format!("a write at byte {offset}, past the end of the disk"))?;
        let undo = Undo {
            offset,
            old: place.to_vec(),
        };
        for (n, to) in place.chunks_mut(SECTOR).enumerate() {
            if keep(n) {
                match &entry.change {
                    Change::Write(bytes) => {
                        to.copy_from_slice(&bytes[n * SECTOR..n * SECTOR + to.len()]);
                    }
                    _ => to.fill(0),
                }
            }
        }
        self.notice(offset, len);
        Ok(undo)
    }

    /// Takes a change back; the last one first.
    pub fn undo(&mut self, undo: Undo) {
        if let Some(place) = self
            .bytes
            .get_mut(undo.offset..undo.offset + undo.old.len())
        {
            place.copy_from_slice(&undo.old);
        }
        self.notice(undo.offset, undo.old.len());
    }

    fn metadata(&self) -> Pages<'_> {
        Pages(match self.placement {
            Placement::Separate => self.bytes.get(self.data_len..).unwrap_or(&[]),
            Placement::Tail => &self.bytes,
        })
    }

    fn superblock(&self) -> Result<Superblock, Core> {
        let mut source = self.metadata();
        let pages = (source.0.len() / PAGE_SIZE) as u64;
        recovery::load_superblock(&mut source, self.placement, pages, &mut [0; PAGE_SIZE])
    }

    /// Recovers the dirty plane with the code that the kernel and the agent use, identity checked.
    pub fn recover(&self) -> Result<Vec<u64>, Core> {
        let sb = self.superblock()?;
        let sectors = (self.data_len / SECTOR) as u64;
        let uuid = match self.placement {
            Placement::Tail => sb.data_uuid,
            Placement::Separate => {
                let mut page = [0; PAGE_SIZE];
                Pages(self.data()).read(Label::page_of(sectors)?, &mut page)?;
                Label::decode(&page)?.data_uuid
            }
        };
        sb.verify_data(sectors, &uuid)?;
        let mut planes = Planes {
            dirty: vec![0; self.differs.len()],
            stale: 0,
        };
        let (mut index, mut page) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        recovery::load_planes(
            &mut self.metadata(),
            &sb,
            &mut index,
            &mut page,
            &mut planes,
        )?;
        recovery::replay(&mut self.metadata(), &sb, &mut page, &mut planes)?;
        if planes.stale != 0 {
            return Err(Core::StaleBlocks(planes.stale));
        }
        Ok(planes.dirty)
    }
}

struct Pages<'a>(&'a [u8]);

impl Source for Pages<'_> {
    fn read(&mut self, page: u64, into: &mut Page) -> Result<(), Core> {
        let at = usize::try_from(page).map_err(|_| Core::Io(page))? * PAGE_SIZE;
        into.copy_from_slice(self.0.get(at..at + PAGE_SIZE).ok_or(Core::Io(page))?);
        Ok(())
    }
}

struct Planes {
    dirty: Vec<u64>,
    stale: u64,
}

impl Sink for Planes {
    fn or_word(&mut self, plane: Plane, word: u64, bits: u64) {
        match plane {
            Plane::Dirty => self.dirty[word as usize] |= bits,
            Plane::Stale => self.stale += u64::from(bits.count_ones()),
        }
    }

    fn set(&mut self, plane: Plane, run: Run) {
        match plane {
            Plane::Dirty => {
                for (word, mask) in bits::words(run) {
                    self.dirty[word] |= mask;
                }
            }
            Plane::Stale => self.stale += run.len(),
        }
    }
}
