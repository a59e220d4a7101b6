// SPDX-License-Identifier: GPL-2.0

//! Some of the states, for the kernel to recover.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disk::{Disk, State};
use crate::Random;

/// Chooses states at random, and has a command activate them.
///
/// For each, the disk is written to the file `state` and the runs of blocks that are dirty and stale to `dirty` and `stale`
/// ("first end", a line each). The command must fail if the kernel recovers anything else, and leave in `readback` what
/// the managed device holds then.
pub struct Sampler {
    dir: PathBuf,
    command: Vec<String>,
    /// After these events a state is tried.
    events: BTreeSet<usize>,
}

impl Sampler {
    /// For about `count` states, each after another of these events, with files in `dir`.
    pub fn new(
        dir: &Path,
        command: Vec<String>,
        count: usize,
        events: &[usize],
        random: &mut Random,
    ) -> Self {
        let mut chosen = BTreeSet::new();
        while chosen.len() < count.min(events.len() / 2) {
            let at = random.below(events.len() as u64);
            chosen.extend(usize::try_from(at).ok().and_then(|at| events.get(at)));
        }
        Self {
            dir: dir.to_owned(),
            command,
            events: chosen,
        }
    }

    /// Whether a state after event `at` is to be tried.
    pub fn wants(&self, at: usize) -> bool {
        self.events.contains(&at)
    }

    /// Tries a state; the inner error is the kernel's, the outer one that it could not be tried.
    pub fn run(&self, disk: &Disk, found: &State) -> Result<Result<(), String>, String> {
        let name = |name: &str| self.dir.join(name);
        write_over(&name("state"), disk.bytes())?;
        for (runs, plane) in [("dirty", &found.dirty), ("stale", &found.stale)] {
            let runs = name(runs);
            fs::write(&runs, runs_of(plane)).map_err(|e| format!("{}: {e}", runs.display()))?;
        }
        let Some((program, args)) = self.command.split_first() else {
            return Err("no command for the samples".to_owned());
        };
        let status = Command::new(program)
            .args(args)
            .status()
            .map_err(|e| format!("cannot run {program}: {e}"))?;
        if !status.success() {
            return Ok(Err(format!("in the kernel: {program}: {status}")));
        }
        let path = name("readback");
        let readback = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let same = readback == disk.managed(&found.stale);
        Ok(if same {
            Ok(())
        } else {
            Err("in the kernel: the device holds something else".to_owned())
        })
    }
}

/// Writes over a file that a loop device is attached to; the size stays.
fn write_over(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let io = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut file = fs::OpenOptions::new().write(true).open(path).map_err(io)?;
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    file.write_all(bytes).map_err(io)
}

/// The runs of set bits, a line "first end" each.
fn runs_of(words: &[u64]) -> String {
    let mut text = String::new();
    let mut first = None;
    for bit in 0..=words.len() * 64 {
        let set = words
            .get(bit / 64)
            .is_some_and(|w| w >> (bit % 64) & 1 == 1);
        match (set, first) {
            (true, None) => first = Some(bit),
            (false, Some(start)) => {
                text.push_str(&format!("{start} {bit}\n"));
                first = None;
            }
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::runs_of;

    #[test]
    fn runs() {
        assert_eq!(runs_of(&[]), "");
        assert_eq!(runs_of(&[0b110, 1]), "1 3\n64 65\n");
        assert_eq!(runs_of(&[0, u64::MAX]), "64 128\n");
    }
}
