// SPDX-License-Identifier: GPL-2.0

//! The disk that data and metadata share, in memory, and what recovery makes of it.
//!
//! What changes with a write (which blocks differ from the master, which do not hold what they should) is kept up to date
//! with it, so that a state costs what it changes and one recovery.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use pristine_shared::bits;
use pristine_shared::checkpoint::Plane;
use pristine_shared::error::Error as Core;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::layout::Placement;
use pristine_shared::recovery::{self, Sink, Source};
use pristine_shared::superblock::{Label, Superblock};
use pristine_shared::{Page, PAGE_SIZE};

use crate::events::Change;
use crate::model::Model;

/// Bytes in a block.
pub const BLOCK: usize = 4096;
/// Bytes that a disk writes wholly or not at all.
pub const SECTOR: usize = 512;

/// A file's bytes. What it leaves out takes no memory.
pub fn read_sparse(path: &Path) -> Result<Vec<u8>, String> {
    let io = |e: std::io::Error| format!("cannot read {}: {e}", path.display());
    let mut file = File::open(path).map_err(io)?;
    let len = usize::try_from(file.metadata().map_err(io)?.len()).map_err(|e| e.to_string())?;
    let mut bytes = vec![0; len];
    let mut buffer = vec![0; 1 << 16];
    for to in bytes.chunks_mut(1 << 16) {
        let from = &mut buffer[..to.len()];
        file.read_exact(from).map_err(io)?;
        if from.iter().any(|b| *b != 0) {
            to.copy_from_slice(from);
        }
    }
    Ok(bytes)
}

/// The disk: the data device in front, behind it the metadata device. With the metadata in the tail it is all
/// data device.
pub struct Disk {
    bytes: Vec<u8>,
    /// What it held at the start of the recording.
    start: Vec<u8>,
    /// The master image, if it held something else.
    master: Option<Vec<u8>>,
    /// Bytes of the data device.
    data_len: usize,
    placement: Placement,
    managed_blocks: usize,
    extent_blocks: u64,
    /// The blocks of the managed device that differ from the master, one bit each.
    differs: Vec<u64>,
    model: Model,
    /// The blocks that do not hold what they should.
    misfits: BTreeSet<usize>,
    /// What recovery made of the metadata as it is.
    recovered: Option<Result<Vec<u64>, Core>>,
}

/// What undoes a change.
pub struct Undo {
    offset: usize,
    old: Vec<u8>,
}

impl Disk {
    /// A disk with this content.
    pub fn new(
        start: Vec<u8>,
        master: Option<Vec<u8>>,
        data_len: usize,
        placement: Placement,
        model: Model,
    ) -> Result<Self, String> {
        let mut bytes = vec![0; start.len()];
        for (to, from) in bytes.chunks_mut(1 << 16).zip(start.chunks(1 << 16)) {
            if from.iter().any(|b| *b != 0) {
                to.copy_from_slice(from);
            }
        }
        let mut disk = Self {
            bytes,
            start,
            master,
            data_len,
            placement,
            managed_blocks: 0,
            extent_blocks: 0,
            differs: Vec::new(),
            model,
            misfits: BTreeSet::new(),
            recovered: None,
        };
        let sb = disk
            .superblock()
            .map_err(|e| format!("the disk before the recording: {e}"))?;
        if sb.geometry.block_size() != BLOCK as u64 {
            return Err("blocks that are not 4 KiB are not checked here".to_owned());
        }
        disk.managed_blocks = usize::try_from(sb.geometry.blocks()).map_err(|e| e.to_string())?;
        disk.extent_blocks = sb.geometry.blocks_per_extent();
        disk.differs = vec![0; disk.managed_blocks.div_ceil(64)];
        if disk.master.is_some() {
            disk.notice(0, disk.managed_blocks * BLOCK);
        }
        Ok(disk)
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The managed device.
    pub fn managed(&self) -> &[u8] {
        self.bytes
            .get(..self.managed_blocks * BLOCK)
            .unwrap_or(&self.bytes)
    }

    /// Blocks of an extent.
    pub fn extent_blocks(&self) -> u64 {
        self.extent_blocks
    }

    /// The words of the plane of blocks that differ from the master.
    pub fn changed(&self) -> &[u64] {
        &self.differs
    }

    /// A block that does not hold what it should, and why.
    pub fn misfit(&self) -> Option<String> {
        self.misfits
            .first()
            .map(|block| self.model.complain(*block as u64))
    }

    /// The first `count` operations of the workload are durable.
    pub fn flushed(&mut self, count: usize) {
        for block in self.model.flushed(count) {
            self.judge(usize::try_from(block).unwrap_or(usize::MAX));
        }
    }

    /// The operation at `place` is durable by itself.
    pub fn durable(&mut self, place: usize) {
        for block in self.model.durable(place) {
            self.judge(usize::try_from(block).unwrap_or(usize::MAX));
        }
    }

    fn judge(&mut self, block: usize) {
        if block >= self.managed_blocks {
            return;
        }
        let at = block * BLOCK..(block + 1) * BLOCK;
        let good = match (self.bytes.get(at.clone()), self.start.get(at)) {
            (Some(content), Some(start)) => self.model.fits(block as u64, content, start),
            _ => false,
        };
        if good {
            self.misfits.remove(&block);
        } else {
            self.misfits.insert(block);
        }
    }

    /// Brings up to date what is known of these bytes.
    fn notice(&mut self, offset: usize, len: usize) {
        let end = (offset + len).div_ceil(BLOCK);
        if end > self.managed_blocks {
            self.recovered = None;
        }
        for block in offset / BLOCK..end.min(self.managed_blocks) {
            let at = block * BLOCK..(block + 1) * BLOCK;
            let master = self.master.as_ref().unwrap_or(&self.start);
            let changed = self.bytes.get(at.clone()) != master.get(at);
            if let Some(word) = self.differs.get_mut(block / 64) {
                *word = *word & !(1 << (block % 64)) | u64::from(changed) << (block % 64);
            }
            self.judge(block);
        }
    }

    /// Applies a change at byte `offset`, or of its sectors those that `keep` chooses.
    pub fn apply(
        &mut self,
        offset: u64,
        change: &Change,
        keep: impl Fn(usize) -> bool,
    ) -> Result<Undo, String> {
        let at = usize::try_from(offset).map_err(|e| e.to_string())?;
        let len = change.len();
        let place = self
            .bytes
            .get_mut(at..at.saturating_add(len))
            .ok_or_else(|| format!("a write at byte {offset}, past the end of the disk"))?;
        let undo = Undo {
            offset: at,
            old: place.to_vec(),
        };
        for (n, to) in place.chunks_mut(SECTOR).enumerate() {
            if keep(n) {
                match change {
                    Change::Write(bytes) => {
                        to.copy_from_slice(&bytes[n * SECTOR..n * SECTOR + to.len()]);
                    }
                    Change::Clear(_) => to.fill(0),
                }
            }
        }
        self.notice(at, len);
        Ok(undo)
    }

    /// Takes a change back; the last one first.
    pub fn undo(&mut self, undo: Undo) {
        let len = undo.old.len();
        if let Some(place) = self.bytes.get_mut(undo.offset..undo.offset + len) {
            place.copy_from_slice(&undo.old);
        }
        self.notice(undo.offset, len);
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

    /// The dirty plane, recovered with the code that the kernel and the agent use, identity checked.
    pub fn recover(&mut self) -> Result<&[u64], Core> {
        if self.recovered.is_none() {
            self.recovered = Some(self.recover_anew());
        }
        match &self.recovered {
            Some(Ok(dirty)) => Ok(dirty),
            Some(Err(e)) => Err(*e),
            None => Ok(&[]),
        }
    }

    fn recover_anew(&self) -> Result<Vec<u64>, Core> {
        let sb = self.superblock()?;
        let sectors = (self.data_len / SECTOR) as u64;
        let uuid = match self.placement {
            Placement::Tail => sb.data_uuid,
            Placement::Separate => {
                let data = self.bytes.get(..self.data_len).unwrap_or(&[]);
                let mut page = [0; PAGE_SIZE];
                Pages(data).read(Label::page_of(sectors)?, &mut page)?;
                Label::decode(&page)?.data_uuid
            }
        };
        sb.verify_data(sectors, &uuid)?;
        let mut planes = Planes {
            dirty: vec![0; self.differs.len()],
            stale: 0,
            intended: BTreeSet::new(),
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
    /// Extents that were announced and not settled.
    intended: BTreeSet<u64>,
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

    fn intend(&mut self, extents: Run) {
        self.intended.extend(extents.start..extents.end);
    }

    fn settle(&mut self, extents: Run) {
        self.intended
            .retain(|e| *e < extents.start || *e >= extents.end);
    }

    fn validate(&mut self, _: Run) {}

    fn conclude(&mut self, geometry: &Geometry) {
        for extent in std::mem::take(&mut self.intended) {
            self.set(Plane::Dirty, geometry.blocks_of_extent(extent));
        }
    }
}
