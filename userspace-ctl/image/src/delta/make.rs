// SPDX-License-Identifier: GPL-2.0

//! Making a delta.
//!
//! New blocks are cut into frames in the order of the image. For each frame the old blocks that look like it are
//! searched ([`super::similar`]), and it is compressed by zstd with these as a prefix: a new version of a program then
//! costs what changed in it. Frames are made by all cores; each can be unpacked alone, with its references.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;
use zstd::zstd_safe::{compress_bound, get_error_name, CCtx, CParameter};

use super::similar::{SampleCollector, Samples};
use super::{frame_bound, Comparison, Delta, DeltaHead, MAX_CONTENT_BLOCKS, MAX_REFERENCE_BLOCKS};
use crate::error::FormatError;
use crate::wire::{put_signed_varint, put_varint};
use crate::BLOCK_SIZE;

/// zstd's level for the map.
const MAP_LEVEL: i32 = 19;

/// Why a delta could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MakeError {
    /// An option has an impossible value.
    #[error("{0}")]
    Option(String),
    /// The content of an image cannot be read.
    #[error("cannot read the images: {0}")]
    Read(io::Error),
    /// Compression failed.
    #[error("cannot compress: {0}")]
    Compress(String),
    /// The images do not fit the format.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// A thread died.
    #[error("a worker thread died: {0}")]
    Worker(String),
}

/// Takes consecutive blocks, from several threads at once: the first one's number, and their content.
pub type BlockVisitor<'a> = dyn Fn(u64, &[u8]) + Sync + 'a;

/// The content of an image.
pub trait Content: Sync {
    /// The content of blocks, one range after the other.
    ///
    /// # Errors
    /// What can go wrong on the way.
    fn read(&self, blocks: &[Range<u64>]) -> io::Result<Vec<u8>>;

    /// Calls `visit` with all blocks that are not zero, in any order.
    ///
    /// # Errors
    /// As for [`Content::read`].
    fn visit(&self, visit: &BlockVisitor<'_>) -> io::Result<()>;
}

/// How to make a delta.
#[derive(Clone, Debug)]
pub struct MakeOptions {
    /// zstd's level, 1 to 22. Default 19.
    pub level: i32,
    /// Blocks in a frame at most, 1 to [`MAX_CONTENT_BLOCKS`]. Default 1024: 4 MiB.
    pub frame_blocks: u64,
    /// Reference blocks of a frame at most, up to [`MAX_REFERENCE_BLOCKS`]. Default 2048: 8 MiB.
    pub reference_blocks: u64,
    /// Threads to use; `None` for one for each core.
    pub threads: Option<usize>,
}

impl Default for MakeOptions {
    fn default() -> Self {
        MakeOptions {
            level: 19,
            frame_blocks: 1024,
            reference_blocks: 2048,
            threads: None,
        }
    }
}

impl MakeOptions {
    fn check(&self) -> Result<(), MakeError> {
        let error = |text: &str| Err(MakeError::Option(text.to_owned()));
        if !(1..=22).contains(&self.level) {
            return error("the compression level must be 1 to 22");
        }
        if !(1..=MAX_CONTENT_BLOCKS).contains(&self.frame_blocks) {
            return error("a frame of a delta must have 1 to 4096 blocks");
        }
        if self.reference_blocks > MAX_REFERENCE_BLOCKS {
            return error("a frame of a delta must have at most 8192 reference blocks");
        }
        Ok(())
    }
}

/// A frame, and what it was compressed against.
struct Frame {
    bytes: Vec<u8>,
    blocks: u64,
    references: Vec<Range<u64>>,
}

/// Makes the delta of a comparison; returns its bytes. `old` and `new` are the content of the two images, `old_blocks` is
/// about how many blocks of content the old one has. `progress` gets the new blocks that are done, of all that there are.
///
/// # Errors
/// [`MakeError`].
pub fn make(
    comparison: &Comparison,
    old: &dyn Content,
    old_blocks: u64,
    new: &dyn Content,
    options: &MakeOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &AtomicBool,
) -> Result<Vec<u8>, MakeError> {
    options.check()?;
    let total = comparison
        .slots
        .iter()
        .map(|range| range.end - range.start)
        .sum();
    progress(0, total);
    let samples = SampleCollector::new(old_blocks);
    if total > 0 && options.reference_blocks > 0 {
        old.visit(&|first, content| samples.add(first, content))
            .map_err(MakeError::Read)?;
    }
    let samples = samples.finish();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads.unwrap_or(0))
        .build()
        .map_err(|error| MakeError::Worker(error.to_string()))?;
    let done = AtomicU64::new(0);
    let frames: Vec<Frame> = pool.install(|| {
        let groups = groups(&comparison.slots, options.frame_blocks);
        let frames = groups.into_par_iter().map(|group| {
            if cancel.load(Ordering::Relaxed) {
                return Err(MakeError::Cancelled);
            }
            let frame = make_frame(&group, old, new, &samples, options)?;
            progress(
                done.fetch_add(frame.blocks, Ordering::Relaxed) + frame.blocks,
                total,
            );
            Ok(frame)
        });
        frames.collect::<Result<_, MakeError>>()
    })?;
    assemble(comparison, &frames)
}

/// Cuts slots into frames.
fn groups(slots: &[Range<u64>], frame_blocks: u64) -> Vec<Vec<Range<u64>>> {
    let mut groups: Vec<Vec<Range<u64>>> = Vec::new();
    let mut room = 0;
    for range in slots {
        let mut at = range.start;
        while at < range.end {
            if room == 0 {
                groups.push(Vec::new());
                room = frame_blocks;
            }
            let end = range.end.min(at + room);
            if let Some(group) = groups.last_mut() {
                group.push(at..end);
            }
            room -= end - at;
            at = end;
        }
    }
    groups
}

fn make_frame(
    group: &[Range<u64>],
    old: &dyn Content,
    new: &dyn Content,
    samples: &Samples,
    options: &MakeOptions,
) -> Result<Frame, MakeError> {
    let content = new.read(group).map_err(MakeError::Read)?;
    let mut references = samples.like(&content, options.reference_blocks);
    let mut bytes = Vec::new();
    if !references.is_empty() {
        let prefix = old.read(&references).map_err(MakeError::Read)?;
        bytes = compress(&content, &prefix, options.level)?;
    }
    if references.is_empty() {
        bytes = compress(&content, &[], options.level)?;
        references.clear();
    }
    Ok(Frame {
        bytes,
        blocks: (content.len() / BLOCK_SIZE) as u64,
        references,
    })
}

fn compress(content: &[u8], prefix: &[u8], level: i32) -> Result<Vec<u8>, MakeError> {
    let error = |code| MakeError::Compress(get_error_name(code).to_owned());
    let mut context =
        CCtx::try_create().ok_or_else(|| MakeError::Compress("no memory".to_owned()))?;
    let total = content.len() + prefix.len();
    // All of the prefix is to be seen from all of the content, and to be found in the tables.
    let window = total.next_power_of_two().trailing_zeros().clamp(17, 27);
    let mut parameters = vec![
        CParameter::CompressionLevel(level),
        CParameter::ChecksumFlag(true),
        CParameter::WindowLog(window),
    ];
    if level >= 16 {
        parameters.push(CParameter::ChainLog(window + 1));
        parameters.push(CParameter::HashLog(window.min(24)));
    }
    for parameter in parameters {
        context.set_parameter(parameter).map_err(error)?;
    }
    context.ref_prefix(prefix).map_err(error)?;
    let mut out = Vec::with_capacity(compress_bound(content.len()));
    context.compress2(&mut out, content).map_err(error)?;
    Ok(out)
}

/// Head, map and frames; what comes out is read once, so that no delta leaves that a machine would refuse.
fn assemble(comparison: &Comparison, frames: &[Frame]) -> Result<Vec<u8>, MakeError> {
    let mut table = Vec::new();
    put_varint(&mut table, frames.len() as u64);
    for frame in frames {
        if frame.bytes.len() as u64 > frame_bound(frame.blocks) {
            return Err(MakeError::Compress(
                "a frame is larger than its content".to_owned(),
            ));
        }
        put_varint(&mut table, frame.bytes.len() as u64);
        put_varint(&mut table, frame.blocks);
        put_varint(&mut table, frame.references.len() as u64);
        let mut expected = 0;
        for range in &frame.references {
            put_signed_varint(&mut table, range.start.wrapping_sub(expected) as i64);
            put_varint(&mut table, range.end - range.start);
            expected = range.end;
        }
    }
    let map = comparison.encode(&table);
    let stored = zstd::bulk::compress(&map, MAP_LEVEL)
        .map_err(|error| MakeError::Compress(error.to_string()))?;
    let len = frames.iter().map(|frame| frame.bytes.len() as u64).sum();
    let head = DeltaHead::new(
        comparison.old,
        comparison.new,
        &stored,
        map.len() as u64,
        len,
        comparison.is_blinded(),
    );
    let mut bytes = head.write();
    Delta::parse(head, &stored)?;
    bytes.extend(stored);
    for frame in frames {
        bytes.extend_from_slice(&frame.bytes);
    }
    Ok(bytes)
}
