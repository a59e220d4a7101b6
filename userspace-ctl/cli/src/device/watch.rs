// SPDX-License-Identifier: GPL-2.0

//! `pristine device watch`.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use clap::Args;
use pristine_device::control::{Control, Id};
use pristine_device::dm::Dm;
use pristine_metadata::shared::abi::FetchStatsArgs;
use serde::Serialize;

use super::fetch::{hit_rate, human_micros, human_seconds, mean, reads};
use crate::exit::{Failure, Outcome};
use crate::ui::{human_bytes, human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device watch root                    a line each second, until Ctrl-C
  pristine device watch root --interval 5 --count 12
  pristine device watch root --json | jq .stale

HYDRATED is how much less is stale, per second; LEFT is how long the rest takes at that rate. MISSES are requests to the
helper, of which read-ahead makes some; HITS is the share of reads that needed none; LATENCY is how long those that were
answered took on average. With --json each line is one object.";

/// Options of `watch`.
#[derive(Args, Debug)]
pub struct WatchArgs {
    /// Name of the managed device
    #[arg(value_name = "NAME")]
    name: String,
    /// Seconds between two lines
    #[arg(short, long, value_name = "S", default_value_t = 1.0, value_parser = interval)]
    interval: f64,
    /// End after so many lines
    #[arg(short = 'n', long, value_name = "N")]
    count: Option<u64>,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    match (0.05..=86_400.0).contains(&seconds) {
        true => Ok(seconds),
        false => Err("from 0.05 to 86400 seconds".into()),
    }
}

/// Counters at one time.
#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    dirty: u64,
    fetch: FetchStatsArgs,
    /// Reads that the device completed.
    reads: u64,
}

/// What is shown.
#[derive(Debug, Serialize, PartialEq)]
struct Line {
    name: String,
    helper: bool,
    blocks: u64,
    block_bytes: u64,
    dirty: u64,
    stale: u64,
    /// Per second.
    hydrated_bytes: u64,
    /// Seconds; missing if nothing moves.
    #[serde(skip_serializing_if = "Option::is_none")]
    eta: Option<u64>,
    misses_per_second: f64,
    reads_per_second: f64,
    /// Share of reads, 0 to 1; missing without reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    hit_rate: Option<f64>,
    /// Of requests that were answered meanwhile; missing without any.
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_us: Option<u64>,
    open: u64,
    errors: u64,
}

impl Line {
    fn new(name: &str, blocks: u64, block_bytes: u64, before: &Sample, now: &Sample) -> Self {
        let seconds = (now.at - before.at).as_secs_f64().max(1e-3);
        let per_second = |count: u64| (count as f64 / seconds * 10.0).round() / 10.0;
        let (old, new) = (&before.fetch, &now.fetch);
        let misses = new.requests.wrapping_sub(old.requests);
        let reads = now.reads.wrapping_sub(before.reads);
        let done = old.stale.saturating_sub(new.stale);
        let rate = done as f64 / seconds;
        let ended = |s: &FetchStatsArgs| s.requests.wrapping_sub(s.open);
        let answered = ended(new).wrapping_sub(ended(old));
        let latency = new.latency_us.wrapping_sub(old.latency_us);
        Self {
            name: name.to_owned(),
            helper: new.attached != 0,
            blocks,
            block_bytes,
            dirty: now.dirty,
            stale: new.stale,
            hydrated_bytes: (rate * block_bytes as f64) as u64,
            eta: (done > 0).then(|| (new.stale as f64 / rate) as u64),
            misses_per_second: per_second(misses),
            reads_per_second: per_second(reads),
            hit_rate: hit_rate(misses, reads),
            latency_us: (answered > 0).then(|| mean(latency, answered)),
            open: new.open,
            errors: new.errors,
        }
    }

    fn cells(&self) -> [String; 9] {
        let blocks = |n: u64| human_bytes(n.saturating_mul(self.block_bytes));
        let dash = || "-".to_owned();
        [
            blocks(self.dirty),
            blocks(self.stale),
            format!("{}/s", human_bytes(self.hydrated_bytes)),
            self.eta.map_or_else(dash, human_seconds),
            format!("{:.1}/s", self.misses_per_second),
            format!("{:.1}/s", self.reads_per_second),
            self.hit_rate
                .map_or_else(dash, |share| format!("{:.1} %", share * 100.0)),
            self.latency_us.map_or_else(dash, human_micros),
            match (self.helper, self.open) {
                (true, 0) => dash(),
                (true, open) => human_count(open),
                (false, 0) if self.stale == 0 => dash(),
                // It is longer than its column.
                (false, open) => format!("  {} NO HELPER", human_count(open)),
            },
        ]
    }
}

const HEADING: [&str; 9] = [
    "DIRTY", "STALE", "HYDRATED", "LEFT", "MISSES", "READS", "HITS", "LATENCY", "OPEN",
];
const WIDTHS: [usize; 9] = [11, 11, 13, 12, 10, 11, 8, 9, 5];
/// Lines between two headings.
const PAGE: u64 = 20;

fn row(cells: &[String; 9]) -> String {
    let padded: Vec<String> = cells
        .iter()
        .zip(WIDTHS)
        .map(|(cell, width)| format!("{cell:>width$}"))
        .collect();
    padded.concat()
}

pub fn run(args: &WatchArgs, ui: &Ui) -> Outcome {
    let managed = Dm::open()?.managed(&args.name)?;
    let id = Id {
        major: managed.device.major,
        minor: managed.device.minor,
    };
    let (blocks, block_bytes) = (managed.status.blocks, managed.status.block_size);
    let control = Control::open()?;
    let mut before = sample(&control, id)?;
    let mut shown = 0;
    while args.count.is_none_or(|count| shown < count) {
        std::thread::sleep(Duration::from_secs_f64(args.interval));
        let now = sample(&control, id)?;
        let line = Line::new(&args.name, blocks, block_bytes, &before, &now);
        let written = show(&line, shown % PAGE == 0, ui);
        match written {
            Ok(()) => {}
            // Who reads it has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::io("cannot write to standard output", &error)),
        }
        before = now;
        shown += 1;
    }
    Ok(())
}

fn show(line: &Line, heading: bool, ui: &Ui) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if ui.json() {
        serde_json::to_writer(&mut out, line)?;
        writeln!(out)?;
        return out.flush();
    }
    if heading {
        let heading = row(&HEADING.map(str::to_owned));
        writeln!(out, "{}", ui.paint(Style::Bold, &heading))?;
    }
    let text = row(&line.cells());
    match !line.helper && line.stale > 0 {
        true => writeln!(out, "{}", ui.paint(Style::Bad, &text))?,
        false => writeln!(out, "{text}")?,
    }
    out.flush()
}

fn sample(control: &Control, id: Id) -> Outcome<Sample> {
    Ok(Sample {
        at: Instant::now(),
        dirty: control.stats(id)?.dirty,
        fetch: control.fetch_stats(id)?,
        reads: reads(id),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, stale: u64, requests: u64, reads: u64) -> Sample {
        Sample {
            at,
            dirty: 3,
            fetch: FetchStatsArgs {
                attached: 1,
                stale,
                requests,
                latency_us: requests * 500,
                ..FetchStatsArgs::default()
            },
            reads,
        }
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let begin = Instant::now();
        let before = sample(begin, 3000, 10, 100);
        let now = sample(begin + Duration::from_secs(2), 2000, 30, 300);
        let line = Line::new("root", 4000, 4096, &before, &now);
        assert_eq!((line.hydrated_bytes, line.eta), (500 * 4096, Some(4)));
        assert_eq!(
            (line.misses_per_second, line.reads_per_second),
            (10.0, 100.0)
        );
        assert_eq!((line.hit_rate, line.latency_us), (Some(0.9), Some(500)));
        let cells = line.cells();
        assert_eq!(cells[2], "2.0 MiB/s");
        assert_eq!(cells[6], "90.0 %");
        assert_eq!(row(&cells).len(), WIDTHS.iter().sum::<usize>());
    }

    #[test]
    fn nothing_is_made_up_of_nothing() {
        let begin = Instant::now();
        let before = sample(begin, 50, 10, 100);
        let line = Line::new("root", 4000, 4096, &before, &before);
        assert_eq!(
            (line.eta, line.hit_rate, line.latency_us),
            (None, None, None)
        );
        assert_eq!(line.cells()[3], "-");
    }
}
