// SPDX-License-Identifier: GPL-2.0

//! What the agent did, for programs: `/run/pristine/agent.json`, and one line on the console.

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::failure::{Failure, Kind};
use crate::flow::{Facts, Mode};
use crate::master::Traffic;
use crate::restore::Done;

/// Where the report lies; `/run` goes on into the system.
pub const PATH: &str = "/run/pristine/agent.json";

/// The report. Times are in milliseconds, blocks are those that the metadata tracks unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // The names are the documentation of the JSON.
pub struct Report {
    /// clean, provision, revert, update, serve or as-is.
    pub mode: &'static str,
    /// Whether there are stale blocks, to be fetched while the system runs (`revert=instant` and the like).
    pub instant: bool,
    /// In hexadecimal; empty if the store was not asked.
    pub image: String,
    pub generation: u64,
    pub image_bytes: u64,
    pub data: String,
    /// The managed device, once it is active.
    pub device: String,
    pub blocks_total: u64,
    /// Dirty and stale when the agent began.
    pub blocks_dirty: u64,
    pub blocks_stale: u64,
    /// Stale when the system starts.
    pub blocks_left: u64,
    /// Blocks of 4 KiB fetched from the store, made zero, and found right on the disk.
    pub blocks_fetched: u64,
    pub blocks_zeroed: u64,
    pub blocks_kept: u64,
    /// Blocks that an update wrote from a delta, or from elsewhere on the disk.
    pub blocks_updated: u64,
    /// Blocks that were put back from the undo area, and originals in it that are damaged.
    pub blocks_undone: u64,
    pub undo_damaged: u64,
    /// Over the network, manifest included.
    pub bytes_fetched: u64,
    pub requests: u64,
    pub commits: u64,
    /// From the first look at the disk to a disk that is right; 0 for what was not done.
    pub provision_ms: u64,
    pub revert_ms: u64,
    /// For what came from the undo area.
    pub undo_ms: u64,
    pub network_ms: u64,
    /// From the start of the machine's kernel to that of this attempt, and from there to a device that is active and,
    /// with stale blocks, served.
    pub begin_ms: u64,
    pub total_ms: u64,
    /// How often the whole was tried.
    pub attempts: u64,
}

impl Report {
    /// Takes over what the metadata said.
    pub fn found(&mut self, facts: &Facts) {
        self.blocks_total = facts.blocks;
        if self.blocks_undone != 0 {
            // It was found already, before some were put back.
            return;
        }
        self.blocks_dirty = facts.dirty;
        self.blocks_stale = facts.stale;
    }

    /// Takes over what was put back from the undo area, in `ms` milliseconds.
    pub fn undid(&mut self, blocks: u64, damaged: u64, ms: u64) {
        self.blocks_undone += blocks;
        self.undo_damaged = damaged;
        self.undo_ms += ms;
    }

    /// What the whole was, if blocks were put back and nothing else was done.
    pub fn mode(&self) -> &'static str {
        if self.blocks_undone != 0 && self.mode == Mode::Clean.word() {
            Mode::Revert.word()
        } else {
            self.mode
        }
    }

    /// Takes over what was done, in `ms` milliseconds.
    pub fn did(&mut self, mode: Mode, done: &Done, traffic: Traffic, ms: u64) {
        self.mode = mode.word();
        self.blocks_fetched = done.fetched;
        self.blocks_zeroed = done.zeroed;
        self.blocks_kept = done.kept;
        self.blocks_updated = done.updated;
        self.commits = done.commits;
        self.bytes_fetched = traffic.bytes;
        self.requests = traffic.requests;
        match mode {
            Mode::Provision => self.provision_ms = ms,
            Mode::Revert | Mode::Update => self.revert_ms = ms,
            Mode::Clean | Mode::Serve | Mode::AsIs => {}
        }
    }

    /// One line of JSON.
    pub fn line(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| "{}".into())
    }

    /// Writes the file and says the line.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn publish(&self, path: &Path) -> Result<(), Failure> {
        let line = self.line();
        crate::console::say(format_args!("report {line}"));
        let fail = |e| {
            Failure::new(
                Kind::Internal,
                format!("cannot write {}: {e}", path.display()),
            )
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(fail)?;
        }
        fs::write(path, line + "\n").map_err(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_what_the_demo_reads() {
        let line = Report::default().line();
        for key in [
            "blocks_total",
            "blocks_dirty",
            "blocks_stale",
            "blocks_fetched",
            "bytes_fetched",
            "image_bytes",
            "provision_ms",
            "revert_ms",
            "image",
            "generation",
            "requests",
        ] {
            assert!(line.contains(&format!("\"{key}\":")), "{key}");
        }
        assert!(!line.contains('\n'));
    }
}
