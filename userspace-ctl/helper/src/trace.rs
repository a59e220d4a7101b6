// SPDX-License-Identifier: GPL-2.0

//! The boot trace: in which order blocks were asked for, so that the next boot finds them before it asks.
//!
//! It is text, the same for all machines with the image (blocks are those of the image, 4 KiB), and ends with the CRC32C
//! of all lines before the last:
//!
//! ```text
//! pristine-trace 1
//! image 7f83b1657ff1fc53b92dc18148a1d65dfc2d4b1fa3d677284addd200126d9069
//! 0 2
//! 8 31
//! crc32c 5f1a03bc
//! ```
//!
//! Each line in the middle is a run: its first block and its length. A trace only says what to fetch first. One that is
//! damaged or of another image is ignored, with a warning.

use std::io::Write;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pristine_image::ImageId;

/// The first line.
const HEADING: &str = "pristine-trace 1";
/// Most runs of a trace.
const MAX_RUNS: usize = 65_536;
/// Most bytes of a trace.
pub const MAX_BYTES: u64 = 4 << 20;

/// The name of an image's trace in a directory.
pub fn file_name(image: &ImageId) -> String {
    format!("{image}.trace")
}

/// Why a trace is ignored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// Not a trace at all, or of a later version.
    #[error("it does not begin with {HEADING:?}")]
    Heading,
    /// Its checksum is wrong or missing.
    #[error("its checksum is wrong")]
    Checksum,
    /// Of another image.
    #[error("it is of another image: {0:?}")]
    Image(String),
    /// A line is no run of blocks.
    #[error("{0:?} is no run of blocks")]
    Run(String),
}

/// Writes a trace.
pub fn format(image: &ImageId, runs: &[Range<u64>]) -> Vec<u8> {
    let mut text = format!("{HEADING}\nimage {image}\n").into_bytes();
    for run in runs.iter().take(MAX_RUNS) {
        // Writing to memory does not fail.
        let _ = writeln!(text, "{} {}", run.start, run.end - run.start);
    }
    let checksum = crc32c::crc32c(&text);
    let _ = writeln!(text, "crc32c {checksum:08x}");
    text
}

/// Reads the trace of an image.
///
/// # Errors
///
/// [`TraceError`].
pub fn parse(bytes: &[u8], image: &ImageId) -> Result<Vec<Range<u64>>, TraceError> {
    let text = std::str::from_utf8(bytes).map_err(|_| TraceError::Heading)?;
    let mut lines = text.lines();
    if lines.next() != Some(HEADING) {
        return Err(TraceError::Heading);
    }
    let body = text.strip_suffix('\n').unwrap_or(text);
    let last_at = body.rfind('\n').map_or(0, |at| at + 1);
    let (body, last) = text.split_at(last_at);
    let stated = last.trim_end().strip_prefix("crc32c ");
    let stated = stated.and_then(|hex| u32::from_str_radix(hex, 16).ok());
    if stated != Some(crc32c::crc32c(body.as_bytes())) {
        return Err(TraceError::Checksum);
    }
    let mut lines = body.lines().skip(1);
    let of = lines.next().unwrap_or_default();
    if of != format!("image {image}") {
        return Err(TraceError::Image(of.chars().take(80).collect()));
    }
    let run = |line: &str| {
        let (first, count) = line.split_once(' ')?;
        let (first, count): (u64, u64) = (first.parse().ok()?, count.parse().ok()?);
        (count > 0).then_some(first..first.checked_add(count)?)
    };
    lines
        .take(MAX_RUNS)
        .map(|line| run(line).ok_or_else(|| TraceError::Run(line.chars().take(80).collect())))
        .collect()
}

#[derive(Debug, Default)]
struct Recorded {
    runs: Vec<Range<u64>>,
    ended: bool,
}

/// Records a trace.
#[derive(Debug)]
pub struct Recorder {
    recorded: Mutex<Recorded>,
    until: Instant,
}

impl Recorder {
    /// Records what is asked for from now on, for `time`.
    pub fn new(time: Duration) -> Self {
        Self {
            recorded: Mutex::default(),
            until: Instant::now() + time,
        }
    }

    /// Somebody asked for these image blocks.
    pub fn note(&self, blocks: Range<u64>) {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        if recorded.ended || Instant::now() > self.until {
            return;
        }
        let room = recorded.runs.len() < MAX_RUNS;
        match recorded.runs.last_mut() {
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            _ if room => recorded.runs.push(blocks),
            _ => recorded.ended = true,
        }
    }

    /// Ends the recording.
    pub fn end(&self) {
        self.recorded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ended = true;
    }

    /// What was recorded, once that has ended: nothing more will come.
    pub fn ended(&self) -> Option<Vec<Range<u64>>> {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        if !recorded.ended && Instant::now() <= self.until {
            return None;
        }
        recorded.ended = true;
        Some(recorded.runs.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageId {
        "ab".repeat(32).parse().unwrap()
    }

    #[test]
    fn round_trip() {
        for runs in [vec![], vec![0..2, 8..39, 7..8]] {
            let text = format(&image(), &runs);
            assert_eq!(parse(&text, &image()), Ok(runs));
        }
    }

    #[test]
    fn garbage_is_told() {
        let good = format(&image(), &[0..2, 8..39]);
        for cut in 0..good.len() - 1 {
            assert!(parse(&good[..cut], &image()).is_err(), "cut at {cut}");
        }
        for at in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(parse(&bad, &image()).is_err(), "byte {at}");
        }
        let other = "cd".repeat(32).parse().unwrap();
        assert!(matches!(parse(&good, &other), Err(TraceError::Image(_))));
        assert_eq!(parse(b"\xff\xfe", &image()), Err(TraceError::Heading));
        assert_eq!(parse(b"", &image()), Err(TraceError::Heading));
        let with = |line: &str| {
            let mut text = format!("{HEADING}\nimage {}\n{line}\n", image()).into_bytes();
            let checksum = crc32c::crc32c(&text);
            let _ = writeln!(text, "crc32c {checksum:08x}");
            text
        };
        assert_eq!(parse(&with("5 1\n7 2"), &image()), Ok(vec![5..6, 7..9]));
        for line in ["5", "5 0", "x 1", "18446744073709551615 2", "-1 1"] {
            let parsed = parse(&with(line), &image());
            assert!(matches!(parsed, Err(TraceError::Run(_))), "{line}");
        }
    }

    #[test]
    fn neighbours_are_one_run_and_time_ends_it() {
        let recorder = Recorder::new(Duration::from_secs(60));
        for run in [0..1, 1..4, 9..10, 4..5] {
            recorder.note(run);
        }
        assert_eq!(recorder.ended(), None);
        recorder.end();
        recorder.note(100..101);
        assert_eq!(recorder.ended(), Some(vec![0..4, 9..10, 4..5]));
        let over = Recorder::new(Duration::ZERO);
        std::thread::sleep(Duration::from_millis(1));
        over.note(0..1);
        assert_eq!(over.ended(), Some(vec![]));
    }
}
