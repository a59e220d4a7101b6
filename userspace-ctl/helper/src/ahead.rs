// SPDX-License-Identifier: GPL-2.0

//! Read-ahead: who reads stale blocks one after the other finds the next ones there.
//!
//! A request costs a way to the store and back whatever its length, so a reader that asks for the next blocks only when it
//! has the last ones waits most of its time. Requests that follow each other are a stream; once it is long enough, what
//! lies before it is fetched and offered to the kernel, in steps that grow up to 4 MiB.
//!
//! What was offered is not asked for, so a stream that goes well would be seen no more. One block in the middle of each step
//! is therefore kept back: it is unpacked here, the reader's request for it is answered at once, and it says that it is
//! time for the next step.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::channel::MAX_FETCH;
use crate::units::Units;

/// So many bytes in a row are a stream.
const STREAM: u64 = 256 << 10;
/// The first step of a stream, in bytes, and the largest one.
const STEPS: Range<u64> = 512 << 10..4 << 20;
/// Requests of a stream lie no further apart than this, in bytes: some blocks between them may not be stale, and several
/// readers of one file are not quite in order.
const GAP: u64 = 128 << 10;
/// Streams that are known at a time.
const MAX_STREAMS: usize = 16;
/// Pieces that wait; of more, the oldest are of readers that have gone on without them.
const MAX_PIECES: usize = 64;

/// Requests that follow each other, in device blocks.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Where it was first seen.
    start: u64,
    /// The end of what was asked for.
    end: u64,
    /// Blocks of its requests.
    seen: u64,
    /// The end of what was fetched ahead.
    ahead: u64,
    /// Blocks of the last step.
    step: u64,
}

/// A part of a step, in device blocks, at most [`MAX_FETCH`] bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What to fetch.
    pub blocks: Range<u64>,
    /// The block that is not to be offered.
    pub marker: u64,
}

#[derive(Debug, Default)]
struct Inner {
    /// The one that was used last is the last.
    streams: VecDeque<Stream>,
    pieces: VecDeque<Piece>,
}

/// The streams, and what is to be fetched ahead of them.
#[derive(Debug)]
pub struct Ahead {
    inner: Mutex<Inner>,
    changed: Condvar,
    units: Units,
    /// Blocks of the device.
    blocks: u64,
}

impl Ahead {
    /// For a device of so many blocks.
    pub fn new(units: Units, blocks: u64) -> Self {
        Self {
            inner: Mutex::default(),
            changed: Condvar::new(),
            units,
            blocks,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody asked for these device blocks.
    pub fn note(&self, run: &Range<u64>) {
        let gap = GAP / self.units.bytes();
        let mut inner = self.lock();
        let follows = |stream: &Stream| {
            let from = stream.end.saturating_sub(gap).max(stream.start);
            (from..=stream.end.max(stream.ahead) + gap).contains(&run.start)
        };
        let known = inner.streams.iter().rposition(follows);
        let mut stream = match known.and_then(|at| inner.streams.remove(at)) {
            Some(stream) => stream,
            None => Stream {
                start: run.start,
                end: run.start,
                seen: 0,
                ahead: run.start,
                step: 0,
            },
        };
        stream.end = stream.end.max(run.end);
        stream.seen += run.end - run.start;
        let step = self.next_step(&mut stream);
        if inner.streams.len() == MAX_STREAMS {
            inner.streams.pop_front();
        }
        inner.streams.push_back(stream);
        if step.is_empty() {
            return;
        }
        let marker = step.start + (step.end - step.start) / 2;
        let most = (MAX_FETCH / self.units.bytes()).max(1);
        let mut at = step.start;
        while at < step.end {
            let end = step.end.min(at + most);
            inner.pieces.push_back(Piece {
                blocks: at..end,
                marker,
            });
            at = end;
        }
        while inner.pieces.len() > MAX_PIECES {
            inner.pieces.pop_front();
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// What to fetch ahead of a stream now.
    fn next_step(&self, stream: &mut Stream) -> Range<u64> {
        let blocks = |bytes: u64| (bytes / self.units.bytes()).max(1);
        let before = stream.ahead.saturating_sub(stream.end);
        // Reads that lie near each other by chance leave most of it out.
        let dense = stream.seen >= blocks(STREAM) && stream.seen * 2 >= stream.end - stream.start;
        // The marker is in the middle of the last step.
        if (stream.step == 0 && !dense) || before > stream.step / 2 + 1 {
            return 0..0;
        }
        stream.step = (stream.step * 2).clamp(blocks(STEPS.start), blocks(STEPS.end));
        let from = stream.ahead.max(stream.end);
        let step = from.min(self.blocks)..(from + stream.step).min(self.blocks);
        stream.ahead = step.end.max(stream.ahead);
        step
    }

    /// The next piece to fetch; none after `time`.
    pub fn pop(&self, time: Duration) -> Option<Piece> {
        let inner = self.lock();
        let empty = |inner: &mut Inner| inner.pieces.is_empty();
        let waited = self.changed.wait_timeout_while(inner, time, empty);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inner.pieces.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead() -> Ahead {
        Ahead::new(Units::new(12).unwrap(), 10_000)
    }

    fn pieces(ahead: &Ahead) -> Vec<Piece> {
        std::iter::from_fn(|| ahead.pop(Duration::ZERO)).collect()
    }

    /// What was fetched ahead, and the marker.
    fn step(ahead: &Ahead) -> Option<(Range<u64>, u64)> {
        let pieces = pieces(ahead);
        assert!(pieces.iter().all(|p| p.blocks.end - p.blocks.start <= 256));
        assert!(pieces
            .windows(2)
            .all(|p| p[0].blocks.end == p[1].blocks.start));
        let (first, last) = (pieces.first()?, pieces.last()?);
        Some((first.blocks.start..last.blocks.end, first.marker))
    }

    #[test]
    fn a_stream_is_fetched_ahead_in_growing_steps() {
        let ahead = ahead();
        ahead.note(&(100..132));
        assert_eq!(step(&ahead), None);
        ahead.note(&(132..164));
        assert_eq!(step(&ahead), Some((164..292, 228)));
        // The marker is what is asked for next, and says that it is time.
        ahead.note(&(228..229));
        assert_eq!(step(&ahead), Some((292..548, 420)));
        ahead.note(&(230..231));
        assert_eq!(step(&ahead), None, "not yet");
        ahead.note(&(420..421));
        assert_eq!(step(&ahead), Some((548..1060, 804)));
        ahead.note(&(804..805));
        assert_eq!(step(&ahead), Some((1060..2084, 1572)));
        ahead.note(&(1572..1573));
        assert_eq!(step(&ahead), Some((2084..3108, 2596)), "no larger");
        // It goes on where the reader had to wait as well.
        ahead.note(&(3108..3140));
        assert_eq!(step(&ahead), Some((3140..4164, 3652)));
    }

    #[test]
    fn what_is_not_in_a_row_is_left_alone() {
        let ahead = ahead();
        for n in 0..1000u64 {
            ahead.note(&(n * 7919 % 10_000..n * 7919 % 10_000 + 1));
        }
        let random: u64 = pieces(&ahead)
            .iter()
            .map(|p| p.blocks.end - p.blocks.start)
            .sum();
        // Some lie beside each other by chance.
        assert!(random < 2000, "{random}");
        assert!(ahead.lock().streams.len() <= MAX_STREAMS);
    }

    #[test]
    fn it_ends_with_the_device_and_several_streams_go_on_at_once() {
        let ahead = ahead();
        for n in 0..2 {
            ahead.note(&(9800 + n * 32..9832 + n * 32));
            ahead.note(&(500 + n * 32..532 + n * 32));
        }
        let found = pieces(&ahead);
        assert_eq!(found[0].blocks, 9864..9992);
        assert_eq!(found[1].blocks, 564..692);
        ahead.note(&(9928..9929));
        assert_eq!(step(&ahead).unwrap().0, 9992..10_000);
        ahead.note(&(9999..10_000));
        assert_eq!(step(&ahead), None);
    }
}
