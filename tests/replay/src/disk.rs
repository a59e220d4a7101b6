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
    /// Managed sectors that the device grows to when it becomes active.
    grow: Option<u64>,
    managed_blocks: usize,
    extent_blocks: u64,
    /// The blocks of the managed device that differ from the master, one bit each.
    differs: Vec<u64>,
    model: Model,
    /// The blocks that were stale at the start, one bit each.
    was_stale: Vec<u64>,
    /// The blocks that may not be valid: they do not hold what they should.
    bad_here: Vec<u64>,
    /// The blocks that may not be stale: the master does not hold what they should.
    bad_away: Vec<u64>,
    /// What recovery made of the metadata as it is.
    recovered: Option<Result<State, Core>>,
}

/// What recovery says of the blocks, one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Those that count as changed; none that is stale.
    pub dirty: Vec<u64>,
    /// Those whose content is the master's, whatever lies here.
    pub stale: Vec<u64>,
    /// How many blocks are not among them because of the log alone.
    pub told: u64,
}

/// What undoes a change.
pub struct Undo {
    offset: usize,
    old: Vec<u8>,
}

impl Disk {
    /// A disk with this content. With `grow` its metadata is of a smaller device, or becomes so: what is new counts as
    /// dirty, whether the growth has taken effect or not.
    pub fn new(
        start: Vec<u8>,
        master: Option<Vec<u8>>,
        data_len: usize,
        placement: Placement,
        grow: Option<u64>,
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
            grow,
            managed_blocks: 0,
            extent_blocks: 0,
            differs: Vec::new(),
            model,
            was_stale: Vec::new(),
            bad_here: Vec::new(),
            bad_away: Vec::new(),
            recovered: None,
        };
        let sb = disk
            .superblock()
            .and_then(|sb| disk.grown(&sb))
            .map_err(|e| format!("the disk before the recording: {e}"))?;
        if sb.geometry.block_size() != BLOCK as u64 {
            return Err("blocks that are not 4 KiB are not checked here".to_owned());
        }
        disk.managed_blocks = usize::try_from(sb.geometry.blocks()).map_err(|e| e.to_string())?;
        disk.extent_blocks = sb.geometry.blocks_per_extent();
        for plane in [
            &mut disk.differs,
            &mut disk.was_stale,
            &mut disk.bad_here,
            &mut disk.bad_away,
        ] {
            *plane = vec![0; disk.managed_blocks.div_ceil(64)];
        }
        let master_len = disk.master.as_ref().map_or(usize::MAX, Vec::len);
        if master_len < disk.managed_blocks * BLOCK {
            return Err("the master is shorter than the device".to_owned());
        }
        let state = disk
            .recover()
            .map_err(|e| format!("the disk before the recording: {e}"))?;
        disk.was_stale = state.stale.clone();
        if disk.master.is_none() && disk.stale_at_start() != 0 {
            return Err("with stale blocks the master must be given".to_owned());
        }
        if disk.master.is_some() {
            disk.notice(0, disk.managed_blocks * BLOCK);
            for block in 0..disk.managed_blocks {
                disk.judge_master(block);
            }
        }
        Ok(disk)
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The blocks of the managed device as they lie here.
    pub fn blocks(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.managed_blocks).map(|block| part(&self.bytes, block))
    }

    /// What the managed device holds with these blocks stale.
    pub fn managed(&self, stale: &[u64]) -> Vec<u8> {
        let mut bytes = (self.bytes.get(..self.managed_blocks * BLOCK))
            .unwrap_or(&self.bytes)
            .to_vec();
        for (block, to) in bytes.chunks_mut(BLOCK).enumerate() {
            if is_set(stale, block) {
                to.copy_from_slice(self.master_of(block));
            }
        }
        bytes
    }

    /// How many blocks were stale at the start.
    pub fn stale_at_start(&self) -> u64 {
        count(&self.was_stale)
    }

    /// How many blocks that were stale are clean in this state.
    pub fn fetched(&self, state: &State) -> u64 {
        let words = self.was_stale.iter().zip(&state.stale).zip(&state.dirty);
        words
            .map(|((was, stale), dirty)| u64::from((was & !stale & !dirty).count_ones()))
            .sum()
    }

    fn master_of(&self, block: usize) -> &[u8] {
        part(self.master.as_ref().unwrap_or(&self.start), block)
    }

    /// What a block held at the start, for those who read it.
    fn base_of(&self, block: usize) -> &[u8] {
        if is_set(&self.was_stale, block) {
            self.master_of(block)
        } else {
            part(&self.start, block)
        }
    }

    /// Blocks of an extent.
    pub fn extent_blocks(&self) -> u64 {
        self.extent_blocks
    }

    /// Whether any block differs from the master, stale ones aside.
    pub fn is_changed(&self, state: &State) -> bool {
        let mut words = self.differs.iter().zip(&state.stale);
        words.any(|(differs, stale)| differs & !stale != 0)
    }

    /// A block that breaks the contract in this state, and how.
    pub fn misfit(&self, state: &State) -> Option<String> {
        let first = |wrong: &dyn Fn(usize, u64) -> u64| {
            let mut words = state.stale.iter().enumerate();
            words.find_map(|(n, stale)| {
                let wrong = wrong(n, *stale);
                (wrong != 0).then(|| n * 64 + wrong.trailing_zeros() as usize)
            })
        };
        let word = |plane: &[u64], n: usize| plane.get(n).copied().unwrap_or(0);
        if let Some(block) = first(&|n, stale| stale & word(&self.bad_away, n)) {
            return Some(format!(
                "{}, and the block is stale",
                self.model.complain(block as u64)
            ));
        }
        if let Some(block) = first(&|n, stale| !stale & word(&self.bad_here, n)) {
            let valid = if is_set(&self.was_stale, block) {
                ", and the block, which was stale, is valid"
            } else {
                ""
            };
            return Some(format!("{}{valid}", self.model.complain(block as u64)));
        }
        if let Some(block) = first(&|n, stale| stale & !word(&self.was_stale, n)) {
            return Some(format!("block {block} is stale and was not before"));
        }
        first(&|n, stale| !stale & word(&self.differs, n) & !word(&state.dirty, n))
            .map(|block| format!("superset: block {block} is changed and not dirty"))
    }

    /// The first `count` operations of the workload are durable.
    pub fn flushed(&mut self, count: usize) {
        for block in self.model.flushed(count) {
            self.promised(block);
        }
    }

    /// The operation at `place` is durable by itself.
    pub fn durable(&mut self, place: usize) {
        for block in self.model.durable(place) {
            self.promised(block);
        }
    }

    fn promised(&mut self, block: u64) {
        let block = usize::try_from(block).unwrap_or(usize::MAX);
        self.judge(block);
        self.judge_master(block);
    }

    /// Whether a block may be valid.
    fn judge(&mut self, block: usize) {
        if block < self.managed_blocks {
            let (here, base) = (part(&self.bytes, block), self.base_of(block));
            let bad = !self.model.fits(block as u64, here, base);
            put(&mut self.bad_here, block, bad);
        }
    }

    /// Whether a block may be stale.
    fn judge_master(&mut self, block: usize) {
        if block < self.managed_blocks {
            let (master, base) = (self.master_of(block), self.base_of(block));
            let bad = !self.model.fits(block as u64, master, base);
            put(&mut self.bad_away, block, bad);
        }
    }

    /// Brings up to date what is known of these bytes.
    fn notice(&mut self, offset: usize, len: usize) {
        let end = (offset + len).div_ceil(BLOCK);
        if end > self.managed_blocks {
            self.recovered = None;
        }
        for block in offset / BLOCK..end.min(self.managed_blocks) {
            let changed = part(&self.bytes, block) != self.master_of(block);
            put(&mut self.differs, block, changed);
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

    /// The superblock that counts.
    pub fn superblock(&self) -> Result<Superblock, Core> {
        let mut source = self.metadata();
        let pages = (source.0.len() / PAGE_SIZE) as u64;
        recovery::load_superblock(&mut source, self.placement, pages, &mut [0; PAGE_SIZE])
    }

    /// The planes, recovered with the code that the kernel and the agent use, identity checked.
    pub fn recover(&mut self) -> Result<State, Core> {
        match &self.recovered {
            Some(known) => known.clone(),
            None => {
                let fresh = self.recover_anew();
                self.recovered = Some(fresh.clone());
                fresh
            }
        }
    }

    /// What the superblock is to become.
    fn grown(&self, sb: &Superblock) -> Result<Superblock, Core> {
        let data_sectors = (self.data_len / SECTOR) as u64;
        let pages = (self.metadata().0.len() / PAGE_SIZE) as u64;
        match self.grow {
            Some(sectors) => sb.grown(sectors, data_sectors, pages),
            None => Ok(*sb),
        }
    }

    fn recover_anew(&self) -> Result<State, Core> {
        let sb = self.superblock()?;
        let wanted = self.grown(&sb)?;
        let sectors = match self.grow {
            Some(_) => sb.data_sectors,
            None => (self.data_len / SECTOR) as u64,
        };
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
            stale: vec![0; self.differs.len()],
            told: 0,
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
        if wanted.geometry != sb.geometry {
            let fresh = Run {
                start: sb.geometry.whole_blocks(),
                end: wanted.geometry.blocks(),
            };
            for (word, mask) in bits::words(fresh) {
                planes.dirty[word] |= mask & !planes.stale[word];
            }
        }
        Ok(State {
            dirty: planes.dirty,
            stale: planes.stale,
            told: planes.told,
        })
    }
}

/// A block's part of `bytes`.
fn part(bytes: &[u8], block: usize) -> &[u8] {
    bytes.get(block * BLOCK..(block + 1) * BLOCK).unwrap_or(&[])
}

/// Bits that are set.
pub fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

fn is_set(words: &[u64], bit: usize) -> bool {
    words
        .get(bit / 64)
        .is_some_and(|w| w >> (bit % 64) & 1 == 1)
}

fn put(words: &mut [u64], bit: usize, value: bool) {
    if let Some(word) = words.get_mut(bit / 64) {
        *word = *word & !(1 << (bit % 64)) | u64::from(value) << (bit % 64);
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
    stale: Vec<u64>,
    told: u64,
    /// Extents that were announced and not settled.
    intended: BTreeSet<u64>,
}

impl Planes {
    fn plane(&mut self, plane: Plane) -> &mut [u64] {
        match plane {
            Plane::Dirty => &mut self.dirty,
            Plane::Stale => &mut self.stale,
        }
    }
}

impl Sink for Planes {
    fn or_word(&mut self, plane: Plane, word: u64, bits: u64) {
        self.plane(plane)[word as usize] |= bits;
    }

    fn set(&mut self, plane: Plane, run: Run) {
        for (word, mask) in bits::words(run) {
            self.plane(plane)[word] |= mask;
        }
    }

    fn intend(&mut self, extents: Run) {
        self.intended.extend(extents.start..extents.end);
    }

    fn settle(&mut self, extents: Run) {
        self.intended
            .retain(|e| *e < extents.start || *e >= extents.end);
    }

    fn validate(&mut self, run: Run) {
        for (word, mask) in bits::words(run) {
            self.told += u64::from((self.stale[word] & mask).count_ones());
            self.stale[word] &= !mask;
        }
    }

    fn conclude(&mut self, geometry: &Geometry) {
        for extent in std::mem::take(&mut self.intended) {
            self.set(Plane::Dirty, geometry.blocks_of_extent(extent));
        }
        // As in the kernel: stale outranks dirty.
        for (dirty, stale) in self.dirty.iter_mut().zip(&self.stale) {
            *dirty &= !stale;
        }
    }
}
