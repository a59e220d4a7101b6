// SPDX-License-Identifier: GPL-2.0

//! What differs between two images, by block, by file and by Debian package.
//!
//! Blocks are compared by the digests of the two manifests alone. Of the images themselves only what says where files
//! lie is read (inode tables, directories, the package database), through their stores: two generations of a large
//! image are compared without fetching either. Files are compared by the digests of their blocks.

mod files;
mod packages;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use pristine_image::fs::FsError;
use pristine_image::{Digest, BLOCK_SIZE, DIGESTS_PER_PAGE};

pub use files::{compare_files, FileChange, FileComparison, FileStatus};
pub use packages::PackageChange;

use crate::error::{Error, Result};
use crate::reader::ImageReader;
use crate::retry::CancelToken;

/// How a block of the new image that differs from the old image's block at the same place comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It is zero now.
    Zero,
    /// The old image has this content elsewhere.
    Moved,
    /// The old image does not have this content.
    New,
}

/// Consecutive blocks of the new image that differ from the old image's at the same places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The blocks.
    pub blocks: Range<u64>,
    /// How they come about.
    pub origin: Origin,
}

/// Two images, by block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Blocks of the old image.
    pub old_blocks: u64,
    /// Blocks of the new image.
    pub new_blocks: u64,
    /// Blocks of the new image that differ from the old image's at the same places, those beyond its end included.
    pub changed: u64,
    /// Of these, blocks that are zero.
    pub zero: u64,
    /// Of these, blocks whose content the old image has elsewhere.
    pub moved: u64,
    /// Of these, blocks whose content the old image does not have.
    pub new: u64,
    /// Distinct contents among the new ones: what must be fetched.
    pub new_distinct: u64,
    /// What differs, ascending.
    pub changes: Vec<Change>,
}

/// Compares two images by block. Takes 32 bytes of memory for each distinct block of the old image.
///
/// # Errors
/// What can go wrong with the stores.
pub fn compare(old: &ImageReader, new: &ImageReader, cancel: &CancelToken) -> Result<Comparison> {
    let mut comparison = Comparison {
        old_blocks: old.blocks(),
        new_blocks: new.blocks(),
        ..Comparison::default()
    };
    let mut known: HashSet<Digest> = HashSet::new();
    for number in 0..old.manifest().pages() {
        cancel.check()?;
        if !old.manifest().page_range(number).is_empty() {
            known.extend(old.page(number)?.blocks().map(|block| block.digest));
        }
    }
    let mut new_contents: HashSet<Digest> = HashSet::new();
    for number in 0..new.manifest().pages() {
        cancel.check()?;
        let hash = new.manifest().page_hash(number);
        if hash.is_some() && hash == old.manifest().page_hash(number) {
            continue;
        }
        let page = new.page(number)?;
        let before = match number < old.manifest().pages() {
            true => Some(old.page(number)?),
            false => None,
        };
        for (index, block) in page.blocks().enumerate() {
            let same = before.as_ref().and_then(|page| page.block(index));
            if same.is_some_and(|same| same.digest == block.digest) {
                continue;
            }
            let origin = if block.slot.is_none() {
                Origin::Zero
            } else if known.contains(&block.digest) {
                Origin::Moved
            } else {
                new_contents.insert(block.digest);
                Origin::New
            };
            comparison.add(number * DIGESTS_PER_PAGE as u64 + index as u64, origin);
        }
    }
    comparison.new_distinct = new_contents.len() as u64;
    Ok(comparison)
}

impl Comparison {
    fn add(&mut self, block: u64, origin: Origin) {
        self.changed += 1;
        *match origin {
            Origin::Zero => &mut self.zero,
            Origin::Moved => &mut self.moved,
            Origin::New => &mut self.new,
        } += 1;
        match self.changes.last_mut() {
            Some(last) if last.blocks.end == block && last.origin == origin => last.blocks.end += 1,
            _ => self.changes.push(Change {
                blocks: block..block + 1,
                origin,
            }),
        }
    }

    /// How many blocks of a range of bytes differ, and how many of these are new.
    fn in_bytes(&self, bytes: &Range<u64>) -> (u64, u64) {
        let blocks = bytes.start / BLOCK_SIZE as u64..bytes.end.div_ceil(BLOCK_SIZE as u64);
        let first = self
            .changes
            .partition_point(|change| change.blocks.end <= blocks.start);
        let rest = self.changes.get(first..).unwrap_or_default().iter();
        let (mut changed, mut new) = (0, 0);
        for change in rest.take_while(|change| change.blocks.start < blocks.end) {
            let from = change.blocks.start.max(blocks.start);
            let count = change.blocks.end.min(blocks.end) - from;
            changed += count;
            if change.origin == Origin::New {
                new += count;
            }
        }
        (changed, new)
    }
}

fn fs_error(image: &Arc<ImageReader>, error: FsError) -> Error {
    match error {
        FsError::Io(error) => Error::io(format!("cannot read image {}", image.image()), error),
        error => Error::io(
            format!("cannot read the files of image {}", image.image()),
            std::io::Error::other(error.to_string()),
        ),
    }
}
