// SPDX-License-Identifier: GPL-2.0

//! The boot trace: in which order blocks were asked for, so that the next boot finds them before it asks.
//!
//! What it looks like and what it may hold, [`pristine_image::trace`] says. There are two: the one that this machine recorded
//! (in a directory, [`file_name`]), and the one that the store has for all machines with the image. The first is
//! followed first; it is this machine's own.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pristine_image::trace::MAX_RUNS;
pub use pristine_image::trace::{each_once, format, parse, MAX_BYTES};
use pristine_image::ImageId;

/// The name of an image's trace in a directory.
pub fn file_name(image: &ImageId) -> String {
    format!("{image}.trace")
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
