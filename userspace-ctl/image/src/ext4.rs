// SPDX-License-Identifier: GPL-2.0

//! An ext4 file system from a directory tree, by `mke2fs -d`: no mounting, no loop device.
//!
//! The same tree gives the same bytes: UUID, hash seed and the time of creation are given. What mke2fs takes from
//! the tree are its files' times, the change time included (which nobody can set); a mke2fs from 1.47.1 on limits
//! them to the given time.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Digest, BLOCK_SIZE};

const MIB: u64 = 1 << 20;

/// How to make the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ext4Options {
    /// Its size in bytes, rounded up to MiB; `None` for one that leaves about a quarter free.
    pub size: Option<u64>,
    /// Its UUID, also the seed of its directory hashes.
    pub uuid: String,
    /// Its label, at most 16 bytes.
    pub label: String,
    /// The time of creation, in seconds since 1970.
    pub time: u64,
}

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ext4Error {
    /// The tree cannot be read.
    #[error("cannot read {path}: {error}", path = path.display())]
    Tree {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The file cannot be made.
    #[error("cannot create {path}: {error}", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// There is no mke2fs.
    #[error("cannot run mke2fs: {0}")]
    NoTool(io::Error),
    /// mke2fs failed.
    #[error("mke2fs failed: {0}")]
    Failed(String),
    /// An option that mke2fs would not take.
    #[error("{0}")]
    Option(String),
}

/// A UUID that is always the same for the same name (version 8: made by a rule of one's own).
pub fn uuid_from_name(name: &str) -> String {
    let digest = Digest::of(format!("pristine file system {name}").as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.as_bytes()[..16]);
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

/// Makes an ext4 file system of `tree` in the new, sparse file `output`; returns its size in bytes.
///
/// # Errors
/// [`Ext4Error`]; the file is not left behind.
pub fn make(tree: &Path, output: &Path, options: &Ext4Options) -> Result<u64, Ext4Error> {
    if options.label.len() > 16 {
        return Err(Ext4Error::Option("a label has at most 16 bytes".to_owned()));
    }
    let size = match options.size {
        Some(size) => size.next_multiple_of(MIB),
        None => estimate(tree)?,
    };
    let create = |error| Ext4Error::Create {
        path: output.to_owned(),
        error,
    };
    let file = File::create_new(output).map_err(create)?;
    let result = file
        .set_len(size)
        .map_err(create)
        .and_then(|()| run_mke2fs(tree, output, size, options));
    if result.is_err() {
        // The error that counts is the first.
        let _ = fs::remove_file(output);
    }
    result.map(|()| size)
}

fn run_mke2fs(
    tree: &Path,
    output: &Path,
    size: u64,
    options: &Ext4Options,
) -> Result<(), Ext4Error> {
    let time = options.time.to_string();
    let extended = format!(
        "hash_seed={},lazy_itable_init=0,lazy_journal_init=0,nodiscard",
        options.uuid
    );
    // In /sbin, which is not in everybody's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let result = Command::new("mke2fs")
        .env("PATH", path)
        .env("LC_ALL", "C")
        .env("E2FSPROGS_FAKE_TIME", &time)
        .env("SOURCE_DATE_EPOCH", &time)
        .args([
            "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "1",
        ])
        .args([
            "-U",
            &options.uuid,
            "-L",
            &options.label,
            "-E",
            &extended,
            "-d",
        ])
        .arg(tree)
        .arg(output)
        .arg((size / BLOCK_SIZE as u64).to_string())
        .output()
        .map_err(Ext4Error::NoTool)?;
    if result.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&result.stderr);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let first = lines.iter().rev().take(3).rev().copied();
    Err(Ext4Error::Failed(first.collect::<Vec<_>>().join("; ")))
}

/// A size with room for the tree, the journal, the inodes, and a quarter more.
fn estimate(tree: &Path) -> Result<u64, Ext4Error> {
    let mut usage = Usage::default();
    usage.add(tree)?;
    // mke2fs makes an inode for each 16 KiB; a tree of small files needs more room for that alone.
    let content = usage.blocks * BLOCK_SIZE as u64;
    let for_inodes = usage.inodes * 16384;
    Ok((content + content / 4)
        .max(for_inodes + for_inodes / 8)
        .next_multiple_of(MIB)
        + 64 * MIB)
}

#[derive(Default)]
struct Usage {
    inodes: u64,
    blocks: u64,
    /// Files with several names count once.
    seen: HashSet<(u64, u64)>,
}

impl Usage {
    fn add(&mut self, path: &Path) -> Result<(), Ext4Error> {
        let fail = |error| Ext4Error::Tree {
            path: path.to_owned(),
            error,
        };
        let metadata = fs::symlink_metadata(path).map_err(fail)?;
        let is_directory = metadata.is_dir();
        let first_time = self.seen.insert((metadata.dev(), metadata.ino()));
        if metadata.nlink() > 1 && !is_directory && !first_time {
            return Ok(());
        }
        self.inodes += 1;
        if metadata.is_file() || is_directory {
            // An extent block for each large file is lost in the quarter.
            self.blocks += metadata.len().div_ceil(BLOCK_SIZE as u64);
        }
        if is_directory {
            for entry in fs::read_dir(path).map_err(fail)? {
                self.add(&entry.map_err(fail)?.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_well_formed() {
        let uuid = uuid_from_name("debian");
        assert_eq!(uuid, uuid_from_name("debian"));
        assert_ne!(uuid, uuid_from_name("other"));
        assert_eq!(uuid.len(), 36);
        assert_eq!(&uuid[14..15], "8");
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("etc/deep")).unwrap();
        fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
        fs::write(tree.join("large"), vec![7; 3 << 20]).unwrap();
        fs::hard_link(tree.join("large"), tree.join("etc/again")).unwrap();
        std::os::unix::fs::symlink("hosts", tree.join("etc/link")).unwrap();
        let options = Ext4Options {
            size: None,
            uuid: uuid_from_name("test"),
            label: "test".to_owned(),
            time: 1_700_000_000,
        };
        let make_one = |name: &str| {
            let output = directory.path().join(name);
            make(&tree, &output, &options).unwrap();
            Digest::of(&fs::read(&output).unwrap())
        };
        let first = make_one("a.img");
        // Time goes on: no clock may end up in the image.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(first, make_one("b.img"));
        let exists = make(&tree, &directory.path().join("a.img"), &options);
        assert!(matches!(exists, Err(Ext4Error::Create { .. })));
        let tiny = Ext4Options {
            size: Some(MIB),
            ..options
        };
        let output = directory.path().join("c.img");
        assert!(matches!(
            make(&tree, &output, &tiny),
            Err(Ext4Error::Failed(_))
        ));
        assert!(!output.exists());
    }
}
