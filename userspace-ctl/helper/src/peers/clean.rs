// SPDX-License-Identifier: GPL-2.0

//! The blocks of a managed device that are the image's: neither dirty nor stale.
//!
//! They are read from the data device, past the page cache, and never through the managed device: a read there could make
//! the kernel ask for stale blocks. A block becomes dirty in the kernel's map before the write that changes it is sent, so
//! what is clean after it was read was clean while it was read.

use std::collections::hash_map::{Entry, HashMap};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pristine_device::control::{Control, Id, Plane};
use pristine_device::dm::Dm;
use pristine_image::{ImageId, BLOCK_SIZE};
use pristine_store::peers::{SectionMap, SECTION};
use rustix::fs::OFlags;

use crate::units::Units;

/// For how long it is believed which image a device means, and how large it is.
const IDENTITY_TIME: Duration = Duration::from_secs(2);
/// Words of a map that are read at once.
const WORDS: u64 = 4096;
/// What `O_DIRECT` wants memory to be aligned to, whatever the disk.
const ALIGN: usize = 4096;

/// What a device means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The image.
    pub image: ImageId,
    /// Its blocks.
    pub blocks: u64,
    /// Its block size, and the image's.
    pub units: Units,
}

/// A device whose clean blocks can be read.
pub trait CleanBlocks: Send + Sync {
    /// What the device means now.
    ///
    /// # Errors
    ///
    /// It is gone, or means no image.
    fn shape(&self) -> io::Result<Shape>;

    /// The words `first..first + words` of the map of clean device blocks, fewer at its end.
    ///
    /// # Errors
    ///
    /// Those of the kernel.
    fn clean(&self, first: u64, words: u64) -> io::Result<Vec<u64>>;

    /// Reads image blocks from the data device, whatever is there.
    ///
    /// # Errors
    ///
    /// Those of the disk.
    fn read(&self, blocks: Range<u64>) -> io::Result<Vec<u8>>;
}

/// A managed device in this machine.
#[derive(Debug)]
pub struct Managed {
    name: String,
    id: Id,
    dm: Dm,
    control: Control,
    data: File,
    shape: Mutex<Option<(Instant, Shape)>>,
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

impl Managed {
    /// Opens a managed device and its data device.
    ///
    /// # Errors
    ///
    /// Those of the kernel, and of opening the data device for direct I/O.
    pub fn open(name: &str, id: Id) -> io::Result<Self> {
        let dm = Dm::open().map_err(other)?;
        let managed = dm.managed(name).map_err(other)?;
        let path = node(&managed.data)?;
        let flags = OFlags::DIRECT | OFlags::CLOEXEC;
        let data = OpenOptions::new()
            .read(true)
            .custom_flags(i32::try_from(flags.bits()).unwrap_or_default())
            .open(&path)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        Ok(Managed {
            name: name.to_owned(),
            id,
            dm,
            control: Control::open().map_err(other)?,
            data,
            shape: Mutex::default(),
        })
    }
}

impl Managed {
    /// Stale blocks.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn stale(&self) -> io::Result<u64> {
        let managed = self.dm.managed(&self.name).map_err(other)?;
        Ok(managed.status.stale)
    }
}

/// The node of a block device by its number, which needs no udev.
fn node(number: &str) -> io::Result<PathBuf> {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{number}/uevent"))?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    let missing = || io::Error::other(format!("block device {number} has no name"));
    Ok(PathBuf::from("/dev").join(name.ok_or_else(missing)?))
}

impl CleanBlocks for Managed {
    fn shape(&self) -> io::Result<Shape> {
        let mut known = self.shape.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, shape)) = *known {
            if at.elapsed() < IDENTITY_TIME {
                return Ok(shape);
            }
        }
        let status = self.dm.managed(&self.name).map_err(other)?.status;
        let image = ImageId::from_bytes(status.image);
        let units = Units::new(status.block_size.max(1).ilog2());
        let units = units.ok_or_else(|| io::Error::other("its blocks are too small"))?;
        if status.image == [0; 32] {
            return Err(io::Error::other("it means no image"));
        }
        let shape = Shape {
            image,
            blocks: status.blocks,
            units,
        };
        *known = Some((Instant::now(), shape));
        Ok(shape)
    }

    fn clean(&self, first: u64, words: u64) -> io::Result<Vec<u64>> {
        let plane = |plane| self.control.map(self.id, plane, first, words);
        // A block that is made stale by a revert was dirty before: looked at in this order, it is one of both.
        let dirty = plane(Plane::Dirty).map_err(other)?;
        let stale = plane(Plane::Stale).map_err(other)?;
        Ok(dirty.iter().zip(&stale).map(|(d, s)| !(d | s)).collect())
    }

    fn read(&self, blocks: Range<u64>) -> io::Result<Vec<u8>> {
        let block = BLOCK_SIZE as u64; // CAST: 4096.
        let len = usize::try_from((blocks.end - blocks.start) * block).map_err(other)?;
        let mut room = vec![0; len + ALIGN];
        let skip = room.as_ptr().align_offset(ALIGN).min(ALIGN);
        let buffer = room.get_mut(skip..skip + len).unwrap_or_default();
        self.data.read_exact_at(buffer, blocks.start * block)?;
        room.copy_within(skip..skip + len, 0);
        room.truncate(len);
        Ok(room)
    }
}

/// Which of some image blocks are clean, in the same order. Blocks that the device does not have are not.
///
/// # Errors
///
/// Those of [`CleanBlocks::clean`].
pub fn are_clean(
    device: &dyn CleanBlocks,
    shape: &Shape,
    blocks: impl Iterator<Item = u64>,
) -> io::Result<Vec<bool>> {
    // Usually they lie together, in few words.
    const TOGETHER: u64 = 16;
    let mut read: HashMap<u64, Vec<u64>> = HashMap::new();
    let mut clean = Vec::new();
    for image in blocks {
        let block = image / shape.units.per_block();
        if block >= shape.blocks {
            clean.push(false);
            continue;
        }
        let (part, word) = (block / 64 / TOGETHER, block / 64 % TOGETHER);
        let words = match read.entry(part) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(device.clean(part * TOGETHER, TOGETHER)?),
        };
        // CAST: below TOGETHER.
        let found = words.get(word as usize);
        clean.push(found.is_some_and(|word| word >> (block % 64) & 1 == 1));
    }
    Ok(clean)
}

/// The sections of which at least half of the blocks are clean.
///
/// # Errors
///
/// Those of [`CleanBlocks::clean`].
pub fn section_map(device: &dyn CleanBlocks, shape: &Shape) -> io::Result<SectionMap> {
    let per_block = shape.units.per_block();
    let mut map = SectionMap::new(shape.blocks * per_block);
    let mut counts: HashMap<u64, u64> = HashMap::new();
    let words = shape.blocks.div_ceil(64);
    let mut first = 0;
    while first < words {
        let part = device.clean(first, WORDS.min(words - first))?;
        if part.is_empty() {
            break;
        }
        for (word, bits) in (first..).zip(&part) {
            let mut bits = *bits;
            while bits != 0 {
                let run_start = bits.trailing_zeros();
                let run = (bits >> run_start).trailing_ones();
                let start = word * 64 + u64::from(run_start);
                let end = (start + u64::from(run)).min(shape.blocks);
                add(&mut counts, start * per_block..end.max(start) * per_block);
                bits &= u64::MAX.checked_shl(run_start + run).unwrap_or(0);
            }
        }
        first += part.len() as u64;
        // Only the section that goes on in the next part can still get more.
        let done = first * 64 * per_block / SECTION;
        counts.retain(|section, blocks| {
            if *section < done || first >= words {
                let all = (shape.blocks * per_block - section * SECTION).min(SECTION);
                if *blocks * 2 >= all {
                    map.set(*section);
                }
                return false;
            }
            true
        });
    }
    Ok(map)
}

/// Adds clean image blocks to the counts of their sections.
fn add(counts: &mut HashMap<u64, u64>, blocks: Range<u64>) {
    let mut at = blocks.start;
    while at < blocks.end {
        let end = blocks.end.min((at / SECTION + 1) * SECTION);
        *counts.entry(at / SECTION).or_default() += end - at;
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake {
        clean: Vec<u64>,
    }

    impl CleanBlocks for Fake {
        fn shape(&self) -> io::Result<Shape> {
            Err(io::ErrorKind::NotFound.into())
        }

        fn clean(&self, first: u64, words: u64) -> io::Result<Vec<u64>> {
            let some = self.clean.iter().skip(first as usize);
            Ok(some.take(words as usize).copied().collect())
        }

        fn read(&self, _: Range<u64>) -> io::Result<Vec<u8>> {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    fn shape(blocks: u64, shift: u32) -> Shape {
        Shape {
            image: ImageId::from_bytes([1; 32]),
            blocks,
            units: Units::new(shift).unwrap(),
        }
    }

    #[test]
    fn half_of_a_section_is_enough() {
        // Sections of 16 words; 40 words, so that the last section is half as long.
        let mut clean = vec![0; 40];
        clean[..8].fill(u64::MAX);
        clean[16..23].fill(u64::MAX);
        clean[23] = u64::MAX >> 1;
        clean[36..40].fill(u64::MAX);
        let device = Fake { clean };
        let map = section_map(&device, &shape(40 * 64, 12)).unwrap();
        let has: Vec<bool> = (0..4).map(|section| map.has(section)).collect();
        assert_eq!(has, [true, false, true, false]);
        // Blocks of 64 KiB: a word is a section, and bits beyond the end count for nothing.
        let device = Fake {
            clean: vec![u64::MAX, u64::MAX >> 32, 1, u64::MAX],
        };
        let map = section_map(&device, &shape(200, 16)).unwrap();
        let has: Vec<bool> = (0..5).map(|section| map.has(section)).collect();
        assert_eq!(has, [true, true, false, true, false]);
    }

    #[test]
    fn single_blocks() {
        let mut clean = vec![0; 100];
        clean[0] = 0b101;
        clean[99] = 1 << 63;
        let device = Fake { clean };
        let shape = shape(6400, 12);
        let of = |blocks: &[u64]| are_clean(&device, &shape, blocks.iter().copied()).unwrap();
        let found = of(&[2, 1, 0, 6399, 6400, u64::MAX]);
        assert_eq!(found, [true, false, true, true, false, false]);
    }
}
