// SPDX-License-Identifier: GPL-2.0

//! Disks seen through something: a part of one, and one whose free bytes are zero.

use std::io;
use std::ops::Range;

use super::Ranges;
use crate::ReadAt;

/// A part of a disk, as a disk of its own.
#[derive(Clone, Debug)]
pub struct Window<'a> {
    disk: &'a dyn ReadAt,
    range: Range<u64>,
}

impl<'a> Window<'a> {
    /// Bytes `range` of `disk`; what of it lies beyond the disk's end is cut off.
    pub fn new(disk: &'a dyn ReadAt, range: Range<u64>) -> Self {
        let end = range.end.min(disk.len());
        Window {
            disk,
            range: range.start.min(end)..end,
        }
    }
}

impl ReadAt for Window<'_> {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.disk.read_at(self.range.start + offset, buffer)
    }

    fn is_hole(&self, range: Range<u64>) -> bool {
        let start = self.range.start;
        self.disk
            .is_hole(start.saturating_add(range.start)..start.saturating_add(range.end))
    }

    fn prefetch(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        let start = self.range.start;
        let shifted = ranges.iter().map(|r| start + r.start..start + r.end);
        self.disk.prefetch(&shifted.collect::<Vec<_>>())
    }
}

/// A disk with zeros in place of what is free. What is free is not even read.
#[derive(Debug)]
pub struct Zeroed {
    disk: Box<dyn ReadAt>,
    free: Ranges,
}

impl Zeroed {
    /// `disk` with zeros in `free`.
    pub fn new(disk: Box<dyn ReadAt>, free: Ranges) -> Self {
        Zeroed { disk, free }
    }
}

impl ReadAt for Zeroed {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.saturating_add(buffer.len() as u64);
        let mut at = offset;
        let free = self.free.in_range(offset..end);
        for range in free.chain(std::iter::once(end..end)) {
            let index = |position: u64| (position - offset) as usize;
            if at < range.start {
                let used = &mut buffer[index(at)..index(range.start)];
                self.disk.read_at(at, used)?;
            }
            buffer[index(range.start)..index(range.end)].fill(0);
            at = range.end;
        }
        Ok(())
    }

    fn is_hole(&self, range: Range<u64>) -> bool {
        let used = self.free.complement(range);
        let mut used = used.iter();
        // Each part would be asked for; with many, reading is as quick.
        used.len() <= 4 && used.all(|part| self.disk.is_hole(part))
    }

    fn prefetch(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        self.disk.prefetch(ranges)
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.disk.is_unchanged()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Memory(Vec<u8>);

    impl ReadAt for Memory {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            let at = offset as usize;
            buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
            Ok(())
        }
    }

    #[test]
    fn what_is_free_reads_as_zeros() {
        let memory = Memory((1..=100).collect());
        let free = Ranges::of(vec![0..10, 20..21, 90..100]);
        let zeroed = Zeroed::new(Box::new(memory), free.clone());
        let mut all = vec![7; 100];
        zeroed.read_at(0, &mut all).unwrap();
        for (at, byte) in all.iter().enumerate() {
            let expected = match free.touches(at as u64..at as u64 + 1) {
                true => 0,
                false => at + 1,
            };
            assert_eq!(usize::from(*byte), expected);
        }
        let mut part = vec![7; 4];
        zeroed.read_at(18, &mut part).unwrap();
        assert_eq!(part, [19, 20, 0, 22]);
        assert!(zeroed.is_hole(2..9) && !zeroed.is_hole(5..15));
        let window = Window::new(&zeroed, 15..95);
        window.read_at(5, &mut part).unwrap();
        assert_eq!(part, [0, 22, 23, 24]);
        assert!(window.read_at(78, &mut part).is_err());
        assert_eq!(Window::new(&zeroed, 90..200).len(), 10);
    }
}
