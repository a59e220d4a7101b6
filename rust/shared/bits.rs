// SPDX-License-Identifier: GPL-2.0

//! Runs of bits as masks of 64-bit words, the form in which planes are kept in memory and on disk.

use super::geometry::Run;

/// Bits in a word.
pub const WORD_BITS: u64 = 64;

/// The words that `run` touches, each with the mask of the bits of `run` in it.
#[inline]
pub fn words(run: Run) -> impl Iterator<Item = (usize, u64)> {
    let mut at = run.start;
    core::iter::from_fn(move || {
        if at >= run.end {
            return None;
        }
        let word = at / WORD_BITS;
        // The first bit past this word; 0 past the last word that a u64 can number bits of.
        let next = (at | (WORD_BITS - 1)).wrapping_add(1);
        let mut mask = u64::MAX << (at % WORD_BITS);
        if next == 0 || next > run.end {
            // CAST: Less than 64.
            mask &= u64::MAX.wrapping_shr((WORD_BITS - run.end % WORD_BITS) as u32);
            at = run.end;
        } else {
            at = next;
        }
        // CAST: Whoever has that many bits in memory has them in an array.
        Some((word as usize, mask))
    })
}

/// Words needed for `bits` bits.
pub const fn words_for(bits: u64) -> u64 {
    bits.div_ceil(WORD_BITS)
}

/// The next run of equal bits in `words` from bit `from`, below bit `limit`: (its bits, the run).
pub fn next_run(word: impl Fn(usize) -> u64, from: u64, limit: u64) -> Option<(bool, Run)> {
    if from >= limit {
        return None;
    }
    let get = |bit: u64| usize::try_from(bit / WORD_BITS).map(&word).unwrap_or(0);
    let value = (get(from) >> (from % WORD_BITS)) & 1 == 1;
    let mut at = from;
    while at < limit {
        let w = get(at);
        // Bits that differ from `value` become ones.
        let differ = (if value { !w } else { w }) >> (at % WORD_BITS);
        if differ != 0 {
            at += u64::from(differ.trailing_zeros());
            break;
        }
        at = (at / WORD_BITS + 1) * WORD_BITS;
    }
    Some((
        value,
        Run {
            start: from,
            end: at.min(limit),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::vec::Vec;

    #[test]
    fn masks() {
        let all: Vec<_> = words(Run { start: 3, end: 130 }).collect();
        assert_eq!(all, [(0, u64::MAX << 3), (1, u64::MAX), (2, 3)]);
        assert_eq!(
            words(Run { start: 5, end: 6 }).collect::<Vec<_>>(),
            [(0, 32)]
        );
        assert_eq!(words(Run { start: 5, end: 5 }).count(), 0);
        assert_eq!(
            words(Run { start: 0, end: 64 }).collect::<Vec<_>>(),
            [(0, u64::MAX)]
        );
    }

    #[test]
    fn runs() {
        let plane = [0u64, 0xff00, u64::MAX, 1];
        let mut at = 0;
        let mut found = Vec::new();
        while let Some((v, run)) = next_run(|i| plane[i], at, 4 * 64 - 10) {
            found.push((v, run.start, run.end));
            at = run.end;
        }
        assert_eq!(
            found,
            [
                (false, 0, 72),
                (true, 72, 80),
                (false, 80, 128),
                (true, 128, 193),
                (false, 193, 246)
            ]
        );
    }
}
