// SPDX-License-Identifier: GPL-2.0

//! Whether the committer lets others run before it writes a record, so that more writes share it, and before it ends.
//!
//! On a CPU of its own the committer need not: while a record is being written, writes gather for the next. Where the writer
//! waits for the committer's CPU, the first write to a cold extent woke the committer, which had the CPU at once, and most
//! records told of one write. To give way once before each record made it 32 at queue depth 32, and the write
//! to a cold extent cost a fifth less (`make bench-cost`, `randwrite_4k_cold_qd32`). To give way once more when nothing waits lets
//! the writers, who were just answered, queue the next writes while the committer is still there: nobody needs to wake
//! it, and the scheduler changes tasks twice for each record, not four times.
//!
//! It is only worth it if those who run are the writers, and if they are soon done; else a write would wait for another
//! task's time slice. So what came of it is looked at each time, and after failures it is tried ever more rarely.

/// Writes with which a record is worth its price: to wait for more would save little.
const ENOUGH: u64 = 32;
/// Longest that it may take, in microseconds: less than a time slice, which is 700 at least.
const LIMIT_US: u64 = 500;
/// Most records that are written without trying.
const MAX_PAUSE: u32 = 1023;

/// What was learnt so far.
#[derive(Debug, Default)]
pub struct Patience {
    /// Records still to be written without trying.
    left: u32,
    /// Records that were to be written without trying after the last failure.
    pause: u32,
}

impl Patience {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { left: 0, pause: 0 }
    }

    /// Whether to give way before a record for `waiting` writes is made or, if there are none, before the committer ends.
    pub fn gives_way(&mut self, waiting: u64) -> bool {
        if waiting >= ENOUGH || (waiting == 0 && self.pause != 0) {
            return false;
        }
        match self.left.checked_sub(1) {
            Some(left) => self.left = left,
            None => return true,
        }
        false
    }

    /// It took `us` microseconds, and `more` writes came.
    pub fn learn(&mut self, more: u64, us: u64) {
        self.pause = if more != 0 && us <= LIMIT_US {
            0
        } else {
            (self.pause * 2 + 1).min(MAX_PAUSE)
        };
        self.left = self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `records` it gives way before, if nothing ever comes of it.
    fn tries(patience: &mut Patience, records: u32, us: u64, more: u64) -> u32 {
        let mut tries = 0;
        for _ in 0..records {
            if patience.gives_way(1) {
                tries += 1;
                patience.learn(more, us);
            }
        }
        tries
    }

    #[test]
    fn success_goes_on() {
        assert_eq!(tries(&mut Patience::new(), 1000, LIMIT_US, 31), 1000);
    }

    #[test]
    fn failures_get_rare() {
        // 1 + 2 + 4 … records for each try.
        assert_eq!(tries(&mut Patience::new(), 1023, 1, 0), 10);
        assert_eq!(tries(&mut Patience::new(), 1023, LIMIT_US + 1, 31), 10);
        let mut patience = Patience::new();
        tries(&mut patience, 1 << 20, 1, 0);
        assert_eq!(tries(&mut patience, 10 * (MAX_PAUSE + 1), 1, 0), 10);
    }

    #[test]
    fn one_success_makes_up_for_failures() {
        let mut patience = Patience::new();
        tries(&mut patience, 1 << 20, 1, 0);
        while !patience.gives_way(1) {}
        patience.learn(1, 1);
        assert_eq!(tries(&mut patience, 100, 1, 1), 100);
    }

    #[test]
    fn enough_is_enough() {
        let mut patience = Patience::new();
        assert!(patience.gives_way(ENOUGH - 1));
        assert!(!patience.gives_way(ENOUGH));
    }

    #[test]
    fn who_failed_last_does_not_linger() {
        let mut patience = Patience::new();
        assert!(patience.gives_way(0));
        patience.learn(0, 1);
        assert!(!patience.gives_way(0));
        assert!(!patience.gives_way(1), "one record without trying");
        assert!(patience.gives_way(1));
        patience.learn(1, 1);
        assert!(patience.gives_way(0));
    }
}
