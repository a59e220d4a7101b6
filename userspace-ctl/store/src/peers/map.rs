// SPDX-License-Identifier: GPL-2.0

//! What a peer has, in sections.

use std::ops::Range;

/// Blocks of a section: 4 MiB. A peer says that it has one if it has at least half of its blocks.
pub const SECTION: u64 = 1024;

/// The sections that a peer has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SectionMap {
    bits: Vec<u8>,
    sections: u64,
}

impl SectionMap {
    /// An empty map of a device of `blocks` image blocks.
    pub fn new(blocks: u64) -> Self {
        let sections = blocks.div_ceil(SECTION);
        SectionMap {
            // CAST: an eighth of the sections of a device.
            bits: vec![0; sections.div_ceil(8) as usize],
            sections,
        }
    }

    /// Sections in all.
    pub fn sections(&self) -> u64 {
        self.sections
    }

    /// Adds a section.
    pub fn set(&mut self, section: u64) {
        let at = usize::try_from(section / 8).ok();
        if let Some(byte) = at.and_then(|at| self.bits.get_mut(at)) {
            *byte |= 1 << (section % 8);
        }
    }

    /// Takes a section out.
    pub fn unset(&mut self, section: u64) {
        let at = usize::try_from(section / 8).ok();
        if let Some(byte) = at.and_then(|at| self.bits.get_mut(at)) {
            *byte &= !(1 << (section % 8));
        }
    }

    /// Whether it has a section.
    pub fn has(&self, section: u64) -> bool {
        let at = usize::try_from(section / 8).ok();
        let byte = at.and_then(|at| self.bits.get(at));
        byte.is_some_and(|byte| byte >> (section % 8) & 1 == 1)
    }

    /// How many it has.
    pub fn count(&self) -> u64 {
        self.bits
            .iter()
            .map(|byte| u64::from(byte.count_ones()))
            .sum()
    }

    /// The bits of `sections`, whose start is a multiple of 8, as far as there are any.
    pub fn part(&self, sections: Range<u64>) -> &[u8] {
        let end = sections.end.min(self.sections).div_ceil(8);
        let range = usize::try_from(sections.start / 8)
            .ok()
            .zip(usize::try_from(end).ok());
        range
            .and_then(|(a, z)| self.bits.get(a..z))
            .unwrap_or_default()
    }

    /// Takes bits in, from section `first` on, a multiple of 8.
    pub fn put(&mut self, first: u64, bits: &[u8]) {
        for (section, byte) in (first / 8..).zip(bits) {
            let place = usize::try_from(section).ok();
            if let Some(place) = place.and_then(|at| self.bits.get_mut(at)) {
                *place = *byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_the_whole() {
        let mut map = SectionMap::new(SECTION * 20 + 1);
        assert_eq!(map.sections(), 21);
        for section in [0, 7, 8, 20, 21, 99, u64::MAX] {
            map.set(section);
        }
        let has: Vec<u64> = (0..30).filter(|section| map.has(*section)).collect();
        // The last byte has room for more than there is, which does no harm: nobody asks for it.
        assert_eq!(has, [0, 7, 8, 20, 21]);
        let mut copy = SectionMap::new(SECTION * 20 + 1);
        for first in [0, 8, 16, 24] {
            copy.put(first, map.part(first..first + 8));
        }
        assert_eq!(copy, map);
        assert!(map.part(8000..9000).is_empty());
        assert_eq!(map.count(), 5);
    }
}
