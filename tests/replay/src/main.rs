// SPDX-License-Identifier: GPL-2.0

//! Crash states from a recording of dm-log-writes, each recovered with the real recovery code and checked.
//!
//! ```text
//! pristine-replay <log> <disk before> <data bytes> <operations> <seed> <subsets> <most hot extents> [--tail]
//! ```
//!
//! The recorded disk holds the data device in its first `<data bytes>` and the metadata device behind it. The
//! states are:
//!
//! - the prefix of the log before every entry, and the whole of it;
//! - each prefix with some sectors of the next entry, which the cut tore;
//! - of the writes that were on their way to a flush, `<subsets>` random choices, each torn at random.
//!
//! In each of them recovery must succeed, every block that differs from the disk before must be recovered as dirty,
//! what was acknowledged by a flush must be there, and no more may be dirty than the hot extents explain. The
//! last line of output is `<states> states, <n> wrong`; the exit status is 1 if any is wrong.

mod disk;
mod log;
mod model;

use std::path::Path;
use std::process::ExitCode;

use pristine_shared::layout::Placement;

use disk::Disk;
use log::{Change, Entry};
use model::Model;

/// Blocks of an extent of the default size.
const EXTENT_BLOCKS: usize = 256;

/// A small generator of random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

struct Replay {
    disk: Disk,
    model: Model,
    hot_limit: usize,
    /// Operations that a flush has made durable in the state that is being made.
    acknowledged: usize,
    states: usize,
    wrong: usize,
    /// Most blocks that were dirty without having been touched.
    worst_over: usize,
}

impl Replay {
    /// Checks the contract in the state at hand.
    fn check(&mut self, what: impl Fn() -> String) {
        self.states += 1;
        if let Err(why) = self.verdict() {
            self.wrong += 1;
            if self.wrong <= 10 {
                println!("wrong: {}: {why}", what());
            }
        }
    }

    fn verdict(&mut self) -> Result<(), String> {
        let dirty = self
            .disk
            .recover()
            .map_err(|e| format!("recovery fails: {e}"))?;
        for (n, (changed, dirty)) in self.disk.changed().iter().zip(&dirty).enumerate() {
            let lost = changed & !dirty;
            if lost != 0 {
                let block = n * 64 + lost.trailing_zeros() as usize;
                return Err(format!("superset: block {block} is changed and not dirty"));
            }
        }
        self.model.check(self.disk.data(), self.acknowledged)?;
        let over = (0..dirty.len() * 64)
            .filter(|b| dirty[b / 64] >> (b % 64) & 1 == 1 && !self.model.touched(*b as u64))
            .count();
        self.worst_over = self.worst_over.max(over);
        // The hot ones, and as many that a checkpoint under way has just retired.
        if over > 2 * self.hot_limit * EXTENT_BLOCKS {
            return Err(format!("{over} blocks too many are dirty"));
        }
        Ok(())
    }

    /// States in which the cut tore `entry`.
    fn torn(&mut self, at: usize, entry: &Entry, random: &mut Random) -> Result<(), String> {
        let choices = random.next();
        let undo = self.disk.apply(entry, |n| choices >> (n % 32) & 1 == 1)?;
        self.check(|| format!("entry {at} torn ({choices:#x})"));
        self.disk.undo(undo);
        Ok(())
    }

    /// States in which of a group of writes without a flush between them only some arrived.
    fn subset(&mut self, at: usize, group: &[Entry], random: &mut Random) -> Result<(), String> {
        let mut undo = Vec::new();
        for entry in group {
            match random.below(4) {
                0 => {}
                1 => {
                    let choices = random.next();
                    undo.push(self.disk.apply(entry, |n| choices >> (n % 32) & 1 == 1)?);
                }
                _ => undo.push(self.disk.apply(entry, |_| true)?),
            }
        }
        self.check(|| format!("some of the entries {at}..{}", at + group.len()));
        while let Some(last) = undo.pop() {
            self.disk.undo(last);
        }
        Ok(())
    }

    fn run(
        &mut self,
        entries: &[Entry],
        subsets: usize,
        random: &mut Random,
    ) -> Result<(), String> {
        let mut group_end = 0;
        for (at, entry) in entries.iter().enumerate() {
            if entry.is_plain() && at >= group_end {
                let rest = entries.get(at..).unwrap_or(&[]);
                let group = rest.split(|e| !e.is_plain()).next().unwrap_or(&[]);
                group_end = at + group.len();
                for _ in 0..subsets {
                    self.subset(at, group, random)?;
                }
            }
            match &entry.change {
                Change::Mark(text) => {
                    if let Some(count) = text.strip_prefix("flushed-") {
                        self.acknowledged =
                            count.parse().map_err(|e| format!("mark {text}: {e}"))?;
                    }
                }
                Change::None => continue,
                Change::Write(_) | Change::Discard(_) => {
                    self.torn(at, entry, random)?;
                    self.disk.apply(entry, |_| true)?;
                }
            }
            self.check(|| format!("prefix of {} entries", at + 1));
        }
        Ok(())
    }
}

fn replay(args: &[String]) -> Result<bool, String> {
    let (tail, args): (Vec<_>, Vec<_>) = args.iter().partition(|a| *a == "--tail");
    let [log, before, data_len, operations, seed, subsets, hot_limit] = args[..] else {
        return Err("usage: pristine-replay LOG DISK-BEFORE DATA-BYTES OPERATIONS SEED SUBSETS HOT-EXTENTS [--tail]".to_owned());
    };
    let number = |text: &str| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
    let size = |text: &str| usize::try_from(number(text)?).map_err(|e| e.to_string());
    let entries = log::read(Path::new(log))?;
    let placement = if tail.is_empty() {
        Placement::Separate
    } else {
        Placement::Tail
    };
    let before = std::fs::read(before).map_err(|e| format!("cannot read {before}: {e}"))?;
    let model = Model::read(Path::new(operations))?;
    let writes = entries.iter().filter(|e| e.len() > 0).count();
    let marks = entries
        .iter()
        .filter(|e| matches!(&e.change, Change::Mark(m) if m.starts_with("flushed-")))
        .count();
    println!(
        "{writes} writes, {marks} acknowledged flushes, {} operations on {} blocks",
        model.operations,
        model.touched_blocks()
    );
    // A recording without these proves nothing.
    if writes == 0 || marks == 0 {
        return Err("the recording is empty".to_owned());
    }
    let mut replay = Replay {
        disk: Disk::new(before, size(data_len)?, placement)?,
        model,
        hot_limit: size(hot_limit)?,
        acknowledged: 0,
        states: 0,
        wrong: 0,
        worst_over: 0,
    };
    replay.check(|| "the disk before".to_owned());
    replay.run(&entries, size(subsets)?, &mut Random(number(seed)? | 1))?;
    // At the end the device was stopped in order: the map is exact.
    let dirty = replay.disk.recover().map_err(|e| e.to_string())?;
    let exact = (0..dirty.len() * 64)
        .all(|b| dirty[b / 64] >> (b % 64) & 1 == u64::from(replay.model.touched(b as u64)));
    let changed = (0..dirty.len() * 64).any(|b| replay.disk.is_changed(b));
    if !exact || !changed {
        println!("wrong: after the stop in order the map is not what was written");
        replay.wrong += 1;
    }
    println!("most blocks called dirty untouched: {}", replay.worst_over);
    println!("{} states, {} wrong", replay.states, replay.wrong);
    Ok(replay.wrong == 0)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match replay(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("pristine-replay: {e}");
            ExitCode::from(2)
        }
    }
}
