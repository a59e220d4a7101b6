// SPDX-License-Identifier: GPL-2.0

//! The fuzz targets. Each takes any bytes, makes something of them that reaches deep, and asserts what must hold.
//!
//! The bytes are read with the `arbitrary` crate as a list of edits to something good, and checksums are made
//! right where the input asks for that: random bytes alone would never get past the first checksum.

mod abi;
mod checkpoint;
mod delta;
mod filesystem;
mod image;
mod log;
mod release;
mod sealed;
mod superblock;
mod text;
mod trace;
mod transfer;
mod undo;

use arbitrary::{Arbitrary, Unstructured};
use pristine_shared::checkpoint::Plane;
use pristine_shared::geometry::{Geometry, Run};
use pristine_shared::log::Entry;
use pristine_shared::recovery::{self, LogEnd, Sink};
use pristine_shared::superblock::Superblock;
use pristine_shared::PAGE_SIZE;

use crate::disk::Disk;
use crate::{naive, Intents};

/// A fuzz target: its name and what it does with an input. It panics on a bug.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 17] = [
    ("superblock", superblock::run),
    ("log", log::run),
    ("checkpoint", checkpoint::run),
    ("image", image::run),
    ("check", image::run_check),
    ("table", text::run_table),
    ("status", text::run_status),
    ("abi", abi::run),
    ("delta", delta::run),
    ("xz", transfer::run_xz),
    ("caibx", transfer::run_caibx),
    ("oci", transfer::run_oci),
    ("release", release::run),
    ("filesystem", filesystem::run),
    ("trace", trace::run),
    ("undo", undo::run),
    ("sealed", sealed::run),
];

/// Runs the target of this name.
///
/// # Panics
///
/// If there is none, or it found a bug.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(n, _)| *n == name).unwrap();
    target(data);
}

/// What the bytes mean; `None` for some that mean nothing.
fn read<'a, T: Arbitrary<'a>>(data: &'a [u8]) -> Option<T> {
    T::arbitrary_take_rest(Unstructured::new(data)).ok()
}

/// An entry of a record: three bits of `start` choose its kind.
fn entry(start: u16, len: u8) -> Entry {
    let run = |mask| {
        let start = u64::from(start & mask);
        Run {
            start,
            end: start + u64::from(len),
        }
    };
    match start >> 13 {
        2 => Entry::Dirty(run(0x1fff)),
        3 => Entry::Valid(run(0x1fff)),
        4 | 5 => Entry::Settled(run(0x3fff)),
        _ => Entry::Intent(run(0xffff)),
    }
}

/// A sink that trusts nobody.
struct Strict {
    blocks: u64,
    planes: [Vec<u64>; 2],
    intents: Intents,
}

impl Strict {
    fn new(blocks: u64) -> Self {
        let words = blocks.div_ceil(64) as usize;
        Self {
            blocks,
            planes: [vec![0; words], vec![0; words]],
            intents: Intents::default(),
        }
    }

    fn plane(&mut self, plane: Plane) -> &mut Vec<u64> {
        match plane {
            Plane::Dirty => &mut self.planes[0],
            Plane::Stale => &mut self.planes[1],
        }
    }

    /// Whether these are the blocks.
    fn holds(&self, planes: &naive::Planes) -> bool {
        self.planes.iter().zip(planes).all(|(words, bytes)| {
            let (whole, rest) = bytes.split_at(bytes.len() / 8 * 8);
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            let same = |(word, bytes): (&u64, &[u8])| word.to_le_bytes() == *bytes;
            words.iter().zip(whole.chunks(8)).all(same)
                && words
                    .get(whole.len() / 8)
                    .is_none_or(|word| word.to_le_bytes() == last)
        })
    }
}

impl Sink for Strict {
    fn or_word(&mut self, plane: Plane, word: u64, bits: u64) {
        assert!(
            word < self.blocks.div_ceil(64),
            "word {word} is past the end"
        );
        let left = self.blocks - word * 64;
        assert!(left >= 64 || bits >> left == 0, "bits past the last block");
        self.plane(plane)[word as usize] |= bits;
    }

    fn set(&mut self, plane: Plane, run: Run) {
        assert!(
            run.start < run.end && run.end <= self.blocks,
            "{run:?} of {}",
            self.blocks
        );
        let plane = self.plane(plane);
        for (i, mask) in pristine_shared::bits::words(run) {
            plane[i] |= mask;
        }
    }

    fn validate(&mut self, run: Run) {
        for (i, mask) in pristine_shared::bits::words(run) {
            self.planes[1][i] &= !mask;
        }
    }

    crate::sink_intents!();
}

/// Loads the checkpoint with the real code and with the naive; they must agree on whether that works and on every
/// block.
fn agree_on_planes(disk: &Disk, sb: &Superblock) -> Option<(Strict, naive::Planes)> {
    let mut sink = Strict::new(sb.geometry.blocks());
    let (mut index, mut buffer) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let mut source = disk.clone();
    let real = recovery::load_planes(&mut source, sb, &mut index, &mut buffer, &mut sink);
    let plain = naive::planes(disk, sb);
    assert_eq!(real.is_ok(), plain.is_ok(), "{real:?}");
    let plain = plain.ok()?;
    assert!(sink.holds(&plain), "the checkpoint's blocks differ");
    Some((sink, plain))
}

/// The same for the log, over planes that were loaded.
fn agree_on_log(
    disk: &Disk,
    sb: &Superblock,
    (mut sink, mut plain): (Strict, naive::Planes),
) -> Option<LogEnd> {
    let before = sink.planes.clone();
    let mut buffer = [0; PAGE_SIZE];
    let real = recovery::replay(&mut disk.clone(), sb, &mut buffer, &mut sink);
    let log = naive::log(disk, sb);
    assert_eq!(real.is_ok(), log.is_ok(), "{real:?}");
    let (end, log) = (real.ok()?, log.ok()?);
    naive::add(&mut plain, sb, &log);
    assert!(sink.holds(&plain), "the blocks after replay differ");
    assert_eq!((end.records, end.torn), (log.records, log.torn));
    assert_eq!(end.next_seq, sb.root.log_seq + log.records + 1);
    // Rule 4: what the checkpoint called dirty is dirty still, and no log makes a block stale.
    let [was, is] = [&before[0], &sink.planes[0]];
    assert!(was.iter().zip(is).all(|(was, is)| was & !is == 0));
    let [was, is] = [&before[1], &sink.planes[1]];
    assert!(was.iter().zip(is).all(|(was, is)| is & !was == 0));
    Some(end)
}

/// Both.
fn agree(disk: &Disk, sb: &Superblock) -> Option<LogEnd> {
    let planes = agree_on_planes(disk, sb)?;
    agree_on_log(disk, sb, planes)
}
