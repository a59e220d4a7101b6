// SPDX-License-Identifier: GPL-2.0

//! How fast to hydrate: behind everything that the machine itself does, and no faster than allowed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::demand::Queue;
use crate::stop::Stop;

/// How long the device must have been quiet.
const QUIET: Duration = Duration::from_millis(200);
/// However busy the machine is, hydration takes a step after this time, so that it ends.
const STARVED: Duration = Duration::from_secs(1);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(25);
/// This many I/Os between two looks are no load to speak of.
const FEW: u64 = 2;

/// What to hydrate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Hydrate {
    /// Nothing but what is asked for, and what came with it
    Off,
    /// Everything, when the device is idle (and a little when it is not)
    #[default]
    Idle,
    /// Everything, as fast as it goes; requests come first nevertheless
    Full,
}

/// The device's own counters, in a file that stays open.
#[derive(Debug)]
pub struct Load {
    stat: Option<File>,
    last: Mutex<(u64, Option<Instant>)>,
}

impl Load {
    /// Of the block device with this number.
    pub fn open(major: u32, minor: u32) -> Self {
        Self {
            stat: File::open(format!("/sys/dev/block/{major}:{minor}/stat")).ok(),
            last: Mutex::default(),
        }
    }

    /// Of no device: it is never busy.
    pub fn none() -> Self {
        Self {
            stat: None,
            last: Mutex::default(),
        }
    }

    /// Whether it is doing I/O, or was a moment ago.
    pub fn is_busy(&self) -> bool {
        let mut text = [0; 512];
        let read = self
            .stat
            .as_ref()
            .and_then(|f| f.read_at(&mut text, 0).ok());
        let text = text.get(..read.unwrap_or(0)).unwrap_or_default();
        let Some((done, in_flight)) = parse(&String::from_utf8_lossy(text)) else {
            return false;
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, active) = *last;
        let now = Instant::now();
        let more = done.wrapping_sub(before);
        let active = if in_flight > 0 || more > FEW {
            Some(now)
        } else {
            active
        };
        *last = (done, active);
        active.is_some_and(|at| now - at < QUIET)
    }
}

/// I/Os done and in flight, from the text of `stat`.
fn parse(text: &str) -> Option<(u64, u64)> {
    let fields: Vec<u64> = text
        .split_ascii_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    // Reads, writes, and requests in flight: fields 1, 5 and 9.
    Some((
        fields.first()?.wrapping_add(*fields.get(4)?),
        *fields.get(8)?,
    ))
}

/// A rate, kept to over any second.
#[derive(Debug)]
struct Bucket {
    /// When the bytes so far are paid for.
    paid: Instant,
}

/// Lets hydration go on when it is its turn.
#[derive(Debug)]
pub struct Pace<'a> {
    mode: Hydrate,
    /// Bytes per second.
    rate: Option<u64>,
    bucket: Mutex<Bucket>,
    load: &'a Load,
}

impl<'a> Pace<'a> {
    /// At most `rate` bytes per second.
    pub fn new(mode: Hydrate, rate: Option<u64>, load: &'a Load) -> Self {
        Self {
            mode,
            rate: rate.filter(|r| *r > 0),
            bucket: Mutex::new(Bucket {
                paid: Instant::now(),
            }),
            load,
        }
    }

    /// Waits until `bytes` may be hydrated. What is `urgent` (the machine will want it in a moment) waits for requests
    /// alone, not for the device to be idle. Whether the helper goes on.
    pub fn wait(&self, bytes: u64, urgent: bool, queue: &Queue, stop: &Stop) -> bool {
        let begin = Instant::now();
        loop {
            let recently = match (self.mode, urgent) {
                (Hydrate::Idle, false) => QUIET,
                _ => Duration::ZERO,
            };
            let asked = queue.is_busy(recently);
            let busy = self.mode == Hydrate::Idle && !urgent && self.load.is_busy();
            if !(asked || busy) || begin.elapsed() >= STARVED {
                break;
            }
            if !stop.sleep(LOOK) {
                return false;
            }
        }
        self.pay(bytes, stop)
    }

    fn pay(&self, bytes: u64, stop: &Stop) -> bool {
        let Some(rate) = self.rate else {
            return !stop.is_stopping();
        };
        let until = {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            let from = bucket.paid.max(Instant::now());
            let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
            bucket.paid = from + cost;
            from
        };
        stop.sleep(until.saturating_duration_since(Instant::now())) && !stop.is_stopping()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = " 10 0 80 3 20 0 160 5 2 8 8 0 0 0 0 0 0\n";
        assert_eq!(parse(text), Some((30, 2)));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_rate_is_kept() {
        let load = Load::none();
        let pace = Pace::new(Hydrate::Full, Some(1 << 20), &load);
        let (queue, stop) = (Queue::default(), Stop::default());
        let begin = Instant::now();
        for _ in 0..4 {
            assert!(pace.wait(128 << 10, false, &queue, &stop));
        }
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(370), "{took:?}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
}
