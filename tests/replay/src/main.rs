// SPDX-License-Identifier: GPL-2.0

//! Every state that a power cut can leave a disk in, recovered with the real recovery code and checked.
//!
//! `pristine-replay disk` is a disk that records what it is asked (see [`server`]). `pristine-replay check` reads such a
//! recording, or one of dm-log-writes, and tries, after every event that changes what may be on the disk:
//!
//! - what is durable alone, and with all that is under way (the prefixes);
//! - the last write torn at the sectors of its pages;
//! - random choices of what is under way, each write torn at random.
//!
//! In each state recovery must succeed, every block that differs from the master and is not stale must be recovered as
//! dirty, what is durable by flush or FUA must be there, no block may hold what nobody wrote, and no more may be dirty
//! than the hot extents explain. A stale block counts for what the master holds there: so none may be stale that has
//! durable content of its own, and none may be valid before the master's content or that of a write lies there. A
//! sample of the states is handed to a command that has the kernel recover them. The last line of
//! output has the counts and ends with `<n> wrong`; the exit status is 1 if any is.

mod crash;
mod disk;
mod events;
mod log;
mod model;
mod sample;
mod server;
mod steps;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser};
use pristine_shared::layout::Placement;

use crash::Explorer;
use disk::{read_sparse, Disk};
use events::Event;
use model::Model;
use sample::Sampler;
use steps::Steps;

/// A small generator of random numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        high ^ high >> 32
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 8) % n.max(1)
    }
}

#[derive(Parser)]
#[command(about)]
enum Command {
    /// Serves a disk to the kernel's nbd driver, on standard input, and records what it is asked
    ///
    /// Or two: each has a cache of its own, and a flush of one says nothing of what was written to the other.
    Disk {
        /// What the disk holds
        #[arg(long)]
        before: PathBuf,
        /// Where the recording goes
        #[arg(long)]
        log: PathBuf,
        /// The socket that marks come to
        #[arg(long)]
        marks: PathBuf,
        /// From this byte on it is another disk, served on standard output
        #[arg(long)]
        split: Option<usize>,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Longest time that an answer is held back, in microseconds
        #[arg(long, default_value_t = 2000)]
        hold: u64,
    },
    /// Checks the states that a recording passed through
    Check(Box<Check>),
}

#[derive(Args)]
struct Check {
    log: PathBuf,
    /// The recording is one of dm-log-writes
    #[arg(long)]
    log_writes: bool,
    /// What the disk held before: the data device, behind it the metadata device
    #[arg(long)]
    before: PathBuf,
    /// The master image: what the data device held when its metadata was new, if it is not what it held before
    #[arg(long)]
    master: Option<PathBuf>,
    /// Bytes of the data device
    #[arg(long)]
    data_bytes: usize,
    /// The metadata lies in the tail of the data device
    #[arg(long)]
    tail: bool,
    /// The device grows to this many managed sectors when it becomes active
    #[arg(long)]
    grow: Option<u64>,
    /// What the workload did
    #[arg(long)]
    operations: PathBuf,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Random choices for each event
    #[arg(long, default_value_t = 4)]
    subsets: usize,
    /// Most extents that may be hot
    #[arg(long)]
    hot: u64,
    /// How many states the kernel recovers, too
    #[arg(long, default_value_t = 0)]
    sample: usize,
    /// Where the files of such a state are
    #[arg(long, default_value = ".")]
    sample_dir: PathBuf,
    /// IMAGE:SHOWS:MASTER, several in order: all that the workload does is that the device goes from one to the next, each in
    /// one step (see the module `steps`); a mark `step N` says that one is done
    #[arg(long)]
    step: Vec<String>,
    /// What has the kernel recover a state
    #[arg(last = true)]
    command: Vec<String>,
}

fn check(args: Check) -> Result<bool, String> {
    let events = if args.log_writes {
        log::read(&args.log)?
    } else {
        events::read(&args.log)?
    };
    let placement = if args.tail {
        Placement::Tail
    } else {
        Placement::Separate
    };
    let model = Model::read(&args.operations)?;
    let touched: Vec<u64> = model.touched();
    let operations = model.operations();
    let disk = Disk::new(
        read_sparse(&args.before)?,
        args.master.as_deref().map(read_sparse).transpose()?,
        args.data_bytes,
        placement,
        args.grow,
        model,
    )?;
    let stale = disk.stale_at_start();
    let mut random = Random::new(args.seed);
    let writes: Vec<_> = (events.iter().enumerate())
        .filter_map(|(at, e)| matches!(e, Event::Write { .. }).then_some(at))
        .collect();
    let sampler = (args.sample > 0).then(|| {
        let (dir, count) = (&args.sample_dir, args.sample);
        Sampler::new(dir, args.command, count, &writes, &mut random)
    });
    let steps = match args.step.is_empty() {
        true => None,
        false => Some(Steps::read(&args.step)?),
    };
    let told = steps.is_none();
    let mut explorer = Explorer::new(
        disk,
        steps,
        &touched,
        args.hot,
        args.subsets,
        random,
        sampler.as_ref(),
    )?;
    explorer.run(&events)?;
    explorer.finish()?;
    let counts = explorer.counts;
    println!(
        "{operations} operations on {} blocks, {} writes, {} durable marks, {} under way at most, {} blocks dirty untouched at most",
        touched.len(),
        counts.writes,
        counts.durable_marks,
        counts.most_pending,
        counts.most_over
    );
    if stale != 0 {
        println!(
            "{stale} blocks stale at first, {} at last, {} states in which the log alone called some valid, {} blocks fetched at most",
            counts.stale_at_end, counts.told, counts.most_fetched
        );
        if told && (counts.told == 0 || counts.stale_at_end == stale) {
            return Err("no block was called valid".to_owned());
        }
    }
    println!(
        "{} states, {} torn, {} subsets, {} in the kernel, {} wrong",
        counts.states, counts.torn, counts.subsets, counts.sampled, counts.wrong
    );
    // A recording without these proves nothing.
    if counts.writes == 0 || counts.durable_marks == 0 {
        return Err("the recording is empty".to_owned());
    }
    Ok(counts.wrong == 0)
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Disk {
            before,
            log,
            marks,
            split,
            seed,
            hold,
        } => read_sparse(&before)
            .and_then(|disk| {
                let hold = Duration::from_micros(hold);
                server::serve(disk, split, &log, &marks, seed, hold)
            })
            .map(|()| true),
        Command::Check(args) => check(*args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("pristine-replay: {e}");
            ExitCode::from(2)
        }
    }
}
