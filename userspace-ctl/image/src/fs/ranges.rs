// SPDX-License-Identifier: GPL-2.0

//! Sets of bytes of a disk.

use std::ops::Range;

/// Ranges of bytes: ascending, none empty, none touching the next. 16 bytes of memory each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// No bytes.
    pub fn new() -> Self {
        Ranges::default()
    }

    /// The set of the bytes in `ranges`, which may be in any order and overlap.
    pub fn of(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.into_iter().collect()
    }

    /// Adds a range that begins at or after the beginning of the last one.
    pub(crate) fn push(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
    }

    /// The ranges.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Range<u64>> + '_ {
        self.0.iter().cloned()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of bytes.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// The byte after the last one.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |range| range.end)
    }

    /// The parts of it that lie in `within`, ascending.
    pub fn in_range(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.0.partition_point(|range| range.end <= within.start);
        let rest = self.0.get(first..).unwrap_or_default().iter();
        let touching = rest.take_while(move |range| range.start < within.end);
        touching.map(move |range| range.start.max(within.start)..range.end.min(within.end))
    }

    /// Whether it has any byte of `range`.
    pub fn touches(&self, range: Range<u64>) -> bool {
        self.in_range(range).next().is_some()
    }

    /// Whether it has all bytes of `range`.
    pub fn covers(&self, range: Range<u64>) -> bool {
        range.is_empty() || self.in_range(range.clone()).next() == Some(range)
    }

    /// The bytes of `within` that are not in it.
    pub fn complement(&self, within: Range<u64>) -> Ranges {
        let mut rest = Ranges::new();
        let mut at = within.start;
        for range in self.in_range(within.clone()) {
            rest.push(at..range.start);
            at = range.end;
        }
        rest.push(at..within.end);
        rest
    }

    /// The bytes of it that are not in `other`.
    pub fn without(&self, other: &Ranges) -> Ranges {
        let parts = self.iter().flat_map(|range| other.complement(range).0);
        parts.collect()
    }
}

impl FromIterator<Range<u64>> for Ranges {
    /// Of ranges in ascending order of their beginnings.
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Ranges::new();
        for range in ranges {
            set.push(range);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_bytes() {
        let set = Ranges::of(vec![30..40, 0..10, 5..12, 12..15, 50..50]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0..15, 30..40]);
        assert_eq!((set.total(), set.end()), (25, 40));
        assert_eq!(set.in_range(10..35).collect::<Vec<_>>(), [10..15, 30..35]);
        assert_eq!(set.in_range(15..30).count(), 0);
        assert!(set.covers(2..15) && !set.covers(2..16) && !set.covers(14..31));
        assert!(set.touches(14..31) && !set.touches(15..30));
        let rest = set.complement(5..60);
        assert_eq!(rest.iter().collect::<Vec<_>>(), [15..30, 40..60]);
        let without = set.without(&Ranges::of(vec![3..4, 14..32]));
        assert_eq!(without.iter().collect::<Vec<_>>(), [0..3, 4..14, 32..40]);
        assert_eq!(Ranges::new().complement(3..4).total(), 1);
    }
}
