// SPDX-License-Identifier: GPL-2.0

//! Blocks that a record must call valid before the next flush is answered.
//!
//! Notes are numbered as they are added. A flush *seals* those that are there: their blocks' content is durable when the
//! data device has answered it, and from then on they may be recorded. A note that was added later must wait for
//! a later flush, so nothing is merged into a sealed one.

use core::ops::DerefMut;

use super::geometry::Run;

/// Notes that there is room for.
pub const CAPACITY: usize = 4096;

/// The notes. `S` holds [`CAPACITY`] runs.
#[derive(Debug)]
pub struct Notes<S> {
    runs: S,
    len: usize,
    /// Number of the first note in `runs`.
    first: u64,
    /// One past the number of the last sealed note.
    sealed: u64,
    /// Room that [`Notes::add`] leaves to [`Notes::add_promised`].
    reserve: usize,
}

impl<S: DerefMut<Target = [Run]>> Notes<S> {
    /// No notes; `reserve` of the room is for [`Notes::add_promised`] alone.
    pub fn new(runs: S, reserve: usize) -> Self {
        Self {
            runs,
            len: 0,
            first: 0,
            sealed: 0,
            reserve,
        }
    }

    /// One past the number of the last note.
    pub fn end(&self) -> u64 {
        self.first + self.len as u64 // CAST: usize to u64.
    }

    /// Notes that there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether so many are there that a checkpoint should make them superfluous.
    pub fn is_filling_up(&self) -> bool {
        self.len > self.runs.len() / 2
    }

    /// Whether one more note can be promised to [`Notes::add_promised`].
    pub fn has_room(&self) -> bool {
        self.len + self.reserve < self.runs.len()
    }

    /// Adds a note; `false` if there is no room.
    #[must_use]
    pub fn add(&mut self, run: Run) -> bool {
        self.merge(run) || (self.has_room() && self.append(run))
    }

    /// Adds a note for which room was reserved.
    #[must_use]
    pub fn add_promised(&mut self, run: Run) -> bool {
        self.merge(run) || self.append(run)
    }

    fn merge(&mut self, run: Run) -> bool {
        if self.end() == self.sealed {
            return false;
        }
        let last = self.len.checked_sub(1).and_then(|i| self.runs.get_mut(i));
        match last {
            Some(last) if run.start <= last.end && last.start <= run.end => {
                last.start = last.start.min(run.start);
                last.end = last.end.max(run.end);
                true
            }
            _ => false,
        }
    }

    fn append(&mut self, run: Run) -> bool {
        let Some(slot) = self.runs.get_mut(self.len) else {
            return false;
        };
        *slot = run;
        self.len += 1;
        true
    }

    /// Seals the notes; returns one past the number of the last.
    pub fn seal(&mut self) -> u64 {
        self.sealed = self.end();
        self.sealed
    }

    /// The notes with numbers below `end`, oldest first.
    pub fn until(&self, end: u64) -> &[Run] {
        // CAST: No more than the notes that there are.
        let count = end.saturating_sub(self.first).min(self.len as u64) as usize;
        self.runs.get(..count).unwrap_or(&[])
    }

    /// Drops the notes with numbers below `end`: the metadata have them.
    pub fn drop_until(&mut self, end: u64) {
        let count = self.until(end).len();
        if let Some(runs) = self.runs.get_mut(..self.len) {
            runs.copy_within(count.., 0);
        }
        self.len -= count;
        self.first += count as u64; // CAST: usize to u64.
    }

    /// Drops all notes.
    pub fn clear(&mut self) {
        self.first = self.end();
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::vec::Vec;

    fn run(start: u64, end: u64) -> Run {
        Run { start, end }
    }

    fn notes(room: usize, reserve: usize) -> Notes<Vec<Run>> {
        Notes::new((0..room).map(|_| run(0, 0)).collect(), reserve)
    }

    #[test]
    fn notes_that_touch_become_one() {
        let mut notes = notes(4, 0);
        assert!(notes.is_empty());
        assert!(notes.add(run(10, 12)));
        assert!(notes.add(run(12, 14)));
        assert!(notes.add(run(8, 11)));
        assert!(notes.add(run(9, 10)));
        assert_eq!(notes.until(u64::MAX), [run(8, 14)]);
        assert!(notes.add(run(15, 16)));
        // Only the last one is looked at.
        assert!(notes.add(run(7, 8)));
        assert_eq!((notes.len(), notes.end()), (3, 3));
    }

    #[test]
    fn nothing_is_merged_into_a_sealed_note() {
        let mut notes = notes(8, 0);
        assert!(notes.add(run(0, 4)));
        let end = notes.seal();
        assert!(notes.add(run(4, 5)));
        assert!(notes.add_promised(run(5, 6)));
        assert_eq!(notes.until(end), [run(0, 4)]);
        assert_eq!(notes.until(notes.end()), [run(0, 4), run(4, 6)]);
        // Also when the sealed one is gone, and when none is left.
        notes.drop_until(end);
        assert_eq!(notes.until(end), []);
        assert!(notes.add(run(6, 7)));
        assert_eq!(notes.until(notes.end()), [run(4, 7)]);
        let end = notes.seal();
        assert_eq!(end, 2);
        notes.drop_until(end);
        assert!(notes.is_empty());
        assert!(notes.add(run(7, 8)));
        assert_eq!(notes.until(end), []);
        assert_eq!(notes.end(), 3);
    }

    #[test]
    fn dropping_keeps_what_came_later() {
        let mut notes = notes(4, 0);
        for n in 0..4 {
            assert!(notes.add(run(10 * n, 10 * n + 1)));
        }
        assert!(!notes.add(run(50, 51)));
        notes.drop_until(2);
        assert_eq!(notes.until(4), [run(20, 21), run(30, 31)]);
        // What is gone is not dropped again.
        notes.drop_until(2);
        notes.drop_until(0);
        assert_eq!((notes.len(), notes.end()), (2, 4));
        assert_eq!(notes.until(3), [run(20, 21)]);
        assert!(notes.add(run(50, 51)));
        notes.drop_until(u64::MAX);
        assert_eq!((notes.len(), notes.end()), (0, 5));
        assert!(notes.add(run(60, 61)));
        notes.clear();
        assert_eq!((notes.len(), notes.end()), (0, 6));
        assert_eq!(notes.until(u64::MAX), []);
    }

    #[test]
    fn room_is_kept_for_what_was_promised() {
        let mut notes = notes(6, 2);
        for n in 0..4 {
            assert!(notes.add(run(10 * n, 10 * n + 1)));
        }
        assert!(notes.is_filling_up());
        assert!(!notes.add(run(100, 101)));
        // What needs no room of its own is taken.
        assert!(notes.add(run(31, 32)));
        assert!(notes.add_promised(run(100, 101)));
        assert!(notes.add_promised(run(110, 111)));
        assert!(!notes.add_promised(run(120, 121)));
        assert!(notes.add_promised(run(111, 112)));
        assert!(!notes.add(run(120, 121)));
        notes.drop_until(3);
        assert!(!notes.is_filling_up());
        assert!(notes.add(run(120, 121)));
    }
}
