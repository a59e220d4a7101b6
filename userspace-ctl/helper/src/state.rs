// SPDX-License-Identifier: GPL-2.0

//! The state file: what the helper is doing, as JSON, for `pristine device status` and `watch`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use pristine_store::peers::Neighbours;
use rustix::fs::{openat, renameat, Mode, OFlags, CWD};
use serde::Serialize;

use crate::peers::serve::Given;

/// A file that is replaced as a whole. Its directory stays open, so that it is found again whatever becomes of the root
/// (the initramfs's is gone after the switch to the system).
#[derive(Debug)]
pub struct AtomicFile {
    directory: OwnedFd,
    name: String,
}

impl AtomicFile {
    /// The file `name` in a directory, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn new(directory: &Path, name: &str) -> io::Result<Self> {
        let here = PathBuf::from(".");
        let directory = match directory.as_os_str().is_empty() {
            true => here.as_path(),
            false => directory,
        };
        std::fs::create_dir_all(directory)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: openat(CWD, directory, flags, Mode::empty())?,
            name: name.to_owned(),
        })
    }

    /// Replaces the file; whoever reads it sees the old content or the new.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let temporary = format!(".{}.{}", self.name, std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let file = openat(&self.directory, temporary.as_str(), flags, mode)?;
        let mut file = std::fs::File::from(file);
        io::Write::write_all(&mut file, bytes)?;
        // The name must not come to be without the content, where that matters (a trace on a disk).
        file.sync_data()?;
        renameat(
            &self.directory,
            temporary.as_str(),
            &self.directory,
            self.name.as_str(),
        )?;
        Ok(())
    }

    /// The file's content, at most `limit` bytes of it; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn read(&self, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = match openat(&self.directory, self.name.as_str(), flags, Mode::empty()) {
            Ok(file) => std::fs::File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, limit), &mut bytes)?;
        Ok(Some(bytes))
    }
}

/// What is in the state file. Fields may be added.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// Of this description: 1.
    pub version: u32,
    /// Of the helper.
    pub pid: u32,
    /// The managed device's name.
    pub device: String,
    /// The image's id.
    pub image: String,
    /// Its generation.
    pub generation: u64,
    /// What it is doing: `waiting` (no store serves), `trace`, `hydrating`, `serving`, `done`, `ended`.
    pub phase: &'static str,
    /// Seconds since 1970 when this was written.
    pub updated: u64,
    /// Seconds since the helper attached.
    pub running: u64,
    /// Blocks of the device.
    pub blocks: u64,
    /// Bytes in a block.
    pub block_bytes: u64,
    /// Stale blocks.
    pub stale: u64,
    /// Blocks that were stale and are not, per second of late.
    pub blocks_per_second: u64,
    /// Seconds until nothing is stale at that rate; missing if it stands still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<u64>,
    /// Requests answered with content.
    pub answered: u64,
    /// Requests that ended with an error.
    pub failed: u64,
    /// Blocks that were offered and taken.
    pub hydrated: u64,
    /// The store that served last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// All stores, in order of preference.
    pub sources: Vec<SourceState>,
    /// What goes on with neighbours, if anything may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<PeersState>,
    /// The last warning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Why it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

/// One store.
#[derive(Clone, Debug, Serialize)]
pub struct SourceState {
    /// Its URL or directory.
    pub location: String,
    /// Whether it served when it was last asked.
    pub serves: bool,
    /// Requests made to it.
    pub requests: u64,
    /// Bytes that came from it.
    pub bytes: u64,
    /// Bytes per second of late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// How often it failed.
    pub failed: u64,
    /// What it failed with last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What this machine takes from its neighbours and gives to them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PeersState {
    /// Neighbours that are known.
    pub known: u64,
    /// Of these, how many are left alone for now because they were late, gone or wrong.
    pub left_alone: u64,
    /// Blocks that came from neighbours.
    pub blocks: u64,
    /// Blocks that neighbours were asked for in vain.
    pub missed: u64,
    /// How often a neighbour failed.
    pub failed: u64,
    /// How often a neighbour sent something else than it was asked for.
    pub wrong: u64,
    /// Blocks given to neighbours.
    pub given_blocks: u64,
    /// Requests of neighbours that were refused.
    pub refused: u64,
}

/// How things stand with neighbours; `None` if there are to be none.
pub fn peers_state(neighbours: Option<&Neighbours>, given: Option<&Given>) -> Option<PeersState> {
    if neighbours.is_none() && given.is_none() {
        return None;
    }
    let mut state = PeersState::default();
    if let Some(neighbours) = neighbours {
        let (totals, states) = (neighbours.totals(), neighbours.states());
        state.known = states.len() as u64;
        state.left_alone = states.iter().filter(|s| s.left_alone).count() as u64;
        state.blocks = totals.blocks;
        state.missed = totals.missed;
        state.failed = totals.failed;
        state.wrong = totals.wrong;
    }
    if let Some(given) = given {
        state.given_blocks = given.blocks.load(Ordering::Relaxed);
        state.refused = given.refused.load(Ordering::Relaxed);
    }
    Some(state)
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |t| t.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a/b");
        let file = AtomicFile::new(&below, "x.json").unwrap();
        assert_eq!(file.read(100).unwrap(), None);
        file.write(b"one").unwrap();
        // Also when it has another path by now.
        std::fs::rename(&below, dir.path().join("c")).unwrap();
        file.write(b"three").unwrap();
        assert_eq!(file.read(100).unwrap().unwrap(), b"three");
        assert_eq!(file.read(2).unwrap().unwrap(), b"th");
        let names = std::fs::read_dir(dir.path().join("c")).unwrap();
        assert_eq!(names.count(), 1);
    }
}
