// SPDX-License-Identifier: GPL-2.0

//! What differs, by file: of ext2, ext3 and ext4 with blocks of 4 KiB or more, which are the unit of digests.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use pristine_image::fs::ext4::{File, FileKind, Files};
use pristine_image::fs::{survey, Volume, Window};
use pristine_image::{Digest, ReadAt, BLOCK_SIZE};

use super::packages::{self, PackageChange, Packages};
use super::{fs_error, Comparison};
use crate::blocks::ImageBlocks;
use crate::error::Result;
use crate::reader::ImageReader;

/// What happened to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileStatus {
    /// The old image has no file of this name.
    Added,
    /// The new image has no file of this name.
    Removed,
    /// Its content is another.
    Changed,
    /// Its content is the same, at another place on the disk.
    Moved,
}

impl FileStatus {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            FileStatus::Added => "added",
            FileStatus::Removed => "removed",
            FileStatus::Changed => "changed",
            FileStatus::Moved => "moved",
        }
    }
}

/// A file that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileChange {
    /// Its path; what is no file has a name in brackets.
    pub path: String,
    /// What happened.
    pub status: FileStatus,
    /// Its length in bytes, in the new image if it is there.
    pub size: u64,
    /// Blocks of it that differ from what was at their places.
    pub blocks: u64,
    /// Blocks of it whose content the old image does not have.
    pub new: u64,
    /// The Debian package that it belongs to.
    pub package: Option<String>,
}

/// What differs, by file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileComparison {
    /// Files that differ, by new blocks, the most first.
    pub files: Vec<FileChange>,
    /// Packages that differ, in the same order; `None` if the images have no package database.
    pub packages: Option<Vec<PackageChange>>,
    /// Blocks that differ and are in no file: free, journal, tables.
    pub elsewhere: u64,
    /// Why files are not told, if they are not.
    pub unknown: Option<String>,
}

/// A file system of an image whose files can be told.
struct Readable {
    volume: Volume,
    files: Files,
    /// A file's content by the digests of its blocks.
    contents: HashMap<u32, Digest>,
    packages: Option<Packages>,
}

/// Compares the files of two images. `comparison` is theirs, by block.
///
/// # Errors
/// What can go wrong with the stores; a file system that cannot be read is told in the result.
pub fn compare_files(
    old: &Arc<ImageReader>,
    new: &Arc<ImageReader>,
    comparison: &Comparison,
) -> Result<FileComparison> {
    let unknown = |why: String| FileComparison {
        unknown: Some(why),
        ..FileComparison::default()
    };
    let (old, new) = match (readable(old)?, readable(new)?) {
        (Ok(old), Ok(new)) => (old, new),
        (Err(why), _) | (_, Err(why)) => return Ok(unknown(why)),
    };
    Ok(differences(&old, &new, comparison))
}

/// The file system of an image: the largest that can be read. Else why there is none.
fn readable(image: &Arc<ImageReader>) -> Result<std::result::Result<Readable, String>> {
    let blocks = ImageBlocks::new(Arc::clone(image));
    let found = survey(&blocks).map_err(|error| fs_error(image, error))?;
    let ext = found
        .volumes
        .into_iter()
        .filter(|volume| volume.kind.is_ext());
    let Some(volume) = ext.max_by_key(|volume| volume.range.end - volume.range.start) else {
        let why = "files are told for ext2, ext3 and ext4 alone, and there is none in image";
        return Ok(Err(format!("{why} {}", image.image())));
    };
    let window = Window::new(&blocks, volume.range.clone());
    let files = Files::read(&window).map_err(|error| fs_error(image, error))?;
    if files.block_size() % BLOCK_SIZE as u64 != 0 || volume.range.start % BLOCK_SIZE as u64 != 0 {
        let why = "its file system's blocks are not blocks of the image";
        return Ok(Err(format!("image {}: {why}", image.image())));
    }
    let mut contents = HashMap::new();
    for file in files
        .files
        .iter()
        .filter(|file| file.kind == FileKind::Regular)
    {
        if let std::collections::hash_map::Entry::Vacant(entry) = contents.entry(file.inode) {
            entry.insert(content(image, &volume, file)?);
        }
    }
    let packages = packages::read(&files, &window).map_err(|error| fs_error(image, error))?;
    Ok(Ok(Readable {
        volume,
        files,
        contents,
        packages,
    }))
}

/// A digest of a file's length and of its blocks' digests; zeros and holes are the same.
fn content(image: &ImageReader, volume: &Volume, file: &File) -> Result<Digest> {
    let mut list = file.size.to_le_bytes().to_vec();
    for (at, range) in &file.extents {
        let first = (volume.range.start + range.start) / BLOCK_SIZE as u64;
        let count = (range.end - range.start) / BLOCK_SIZE as u64;
        for index in 0..count {
            let Some(block) = image
                .block(first + index)?
                .filter(|block| block.slot.is_some())
            else {
                continue;
            };
            list.extend((at / BLOCK_SIZE as u64 + index).to_le_bytes());
            list.extend(block.digest.as_bytes());
        }
    }
    Ok(Digest::of(&list))
}

fn differences(old: &Readable, new: &Readable, comparison: &Comparison) -> FileComparison {
    let mut result = FileComparison::default();
    let mut seen = std::collections::HashSet::new();
    let mut in_files = 0;
    let place = |range: &Range<u64>| {
        let start = new.volume.range.start;
        start + range.start..start + range.end
    };
    for file in &new.files.files {
        let (mut blocks, mut fresh) = (0, 0);
        // A file with several names counts once.
        if seen.insert(file.inode) {
            let ranges = file
                .extents
                .iter()
                .map(|(_, range)| range)
                .chain(&file.maps);
            for range in ranges {
                let (changed, new) = comparison.in_bytes(&place(range));
                blocks += changed;
                fresh += new;
            }
        }
        in_files += blocks;
        let before = old.files.find(&file.path);
        let same = before.is_some_and(|before| {
            before.kind == file.kind
                && match file.kind {
                    FileKind::Regular => {
                        old.contents.get(&before.inode) == new.contents.get(&file.inode)
                    }
                    _ => fresh == 0,
                }
        });
        let status = match before {
            None => FileStatus::Added,
            Some(_) if !same => FileStatus::Changed,
            Some(_) if blocks > 0 => FileStatus::Moved,
            Some(_) => continue,
        };
        result.files.push(FileChange {
            path: name(file),
            status,
            size: file.size,
            blocks,
            new: fresh,
            package: new.packages.as_ref().and_then(|p| p.owner(&file.path)),
        });
    }
    for file in old
        .files
        .files
        .iter()
        .filter(|file| new.files.find(&file.path).is_none())
    {
        result.files.push(FileChange {
            path: name(file),
            status: FileStatus::Removed,
            size: file.size,
            blocks: 0,
            new: 0,
            package: old.packages.as_ref().and_then(|p| p.owner(&file.path)),
        });
    }
    for (what, ranges) in [
        ("(journal)", &new.files.journal),
        ("(superblock, bitmaps, inode tables)", &new.files.structure),
    ] {
        let counts = ranges
            .iter()
            .map(|range| comparison.in_bytes(&place(&range)));
        let (blocks, fresh) = counts.fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
        if blocks > 0 {
            result.files.push(FileChange {
                path: what.to_owned(),
                status: FileStatus::Changed,
                size: ranges.total(),
                blocks,
                new: fresh,
                package: None,
            });
        }
    }
    result.elsewhere = comparison.changed.saturating_sub(in_files);
    let order = |file: &FileChange| (std::cmp::Reverse(file.new), std::cmp::Reverse(file.blocks));
    result
        .files
        .sort_by(|a, b| order(a).cmp(&order(b)).then_with(|| a.path.cmp(&b.path)));
    if let (Some(old), Some(new)) = (&old.packages, &new.packages) {
        result.packages = Some(packages::differences(old, new, &result.files));
    }
    result
}

/// Directories end with a slash.
fn name(file: &File) -> String {
    match file.kind {
        FileKind::Directory if file.path != "/" => format!("{}/", file.path),
        _ => file.path.clone(),
    }
}

/// Tells the disk what will be read of these files.
pub(super) fn prefetch(disk: &dyn ReadAt, files: &[&File]) -> std::io::Result<()> {
    let mut ranges: Vec<_> = files
        .iter()
        .flat_map(|file| file.extents.iter().map(|(_, range)| range.clone()))
        .collect();
    ranges.sort_by_key(|range| range.start);
    disk.prefetch(&ranges)
}
