// SPDX-License-Identifier: GPL-2.0

//! Boot traces: in which order a boot asked for blocks, so that the next boot finds them before it asks.
//!
//! `FORMAT.md` describes the text. A trace only says what to fetch first: whatever it says, blocks are verified like
//! any others. So that one of garbage or malice costs nothing either, it names no block twice and has limits.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::ops::Range;

use crate::delta::ImageDigests;
use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::{DIGESTS_PER_PAGE, MAX_BLOCKS};

/// The first line.
const HEADING: &str = "pristine-trace 1";
/// What a trace is called in messages.
const WHAT: &str = "the boot trace";
/// Most runs of a trace.
pub const MAX_RUNS: usize = 65_536;
/// Most blocks of a trace: 16 GiB.
pub const MAX_TRACE_BLOCKS: u64 = 4 << 20;
/// Most bytes of a trace.
pub const MAX_BYTES: u64 = 4 << 20;

/// Writes the trace of an image. Of a block that comes twice only the first counts, and what is more than a trace may have
/// is left out.
pub fn format(image: &ImageId, runs: &[Range<u64>]) -> Vec<u8> {
    let mut text = format!("{HEADING}\nimage {image}\n");
    for run in each_once(runs) {
        // Writing to memory does not fail.
        let _ = writeln!(text, "{} {}", run.start, run.end - run.start);
    }
    let checksum = crc32c::crc32c(text.as_bytes());
    let _ = writeln!(text, "crc32c {checksum:08x}");
    text.into_bytes()
}

/// Reads the trace of an image: runs of its blocks, of which no two overlap.
///
/// # Errors
/// [`FormatError`] if it is no trace, damaged, of another image, or larger than a trace may be.
pub fn parse(bytes: &[u8], image: &ImageId) -> Result<Vec<Range<u64>>, FormatError> {
    let invalid = |why: String| FormatError::invalid(WHAT, why);
    let heading = || invalid(format!("it does not begin with {HEADING:?}"));
    if bytes.len() as u64 > MAX_BYTES {
        return Err(invalid(format!("it is larger than {MAX_BYTES} bytes")));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| heading())?;
    if text.lines().next() != Some(HEADING) {
        return Err(heading());
    }
    let body = text.strip_suffix('\n').unwrap_or(text);
    let last_at = body.rfind('\n').map_or(0, |at| at + 1);
    let (body, last) = text.split_at(last_at);
    let stated = last.trim_end().strip_prefix("crc32c ");
    let stated = stated.and_then(|hex| u32::from_str_radix(hex, 16).ok());
    if stated != Some(crc32c::crc32c(body.as_bytes())) {
        return Err(FormatError::Checksum(WHAT.to_owned()));
    }
    let mut lines = body.lines().skip(1);
    let of = lines.next().unwrap_or_default();
    if of != format!("image {image}") {
        let of: String = of.chars().take(80).collect();
        return Err(invalid(format!(
            "it is of another image than {image}: {of:?}"
        )));
    }
    let run = |line: &str| {
        let (first, count) = line.split_once(' ')?;
        let (first, count): (u64, u64) = (first.parse().ok()?, count.parse().ok()?);
        let end = first.checked_add(count).filter(|end| *end <= MAX_BLOCKS)?;
        (count > 0).then_some(first..end)
    };
    let runs = lines
        .map(|line| {
            let shown: String = line.chars().take(80).collect();
            run(line).ok_or_else(|| invalid(format!("{shown:?} is no run of blocks")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(each_once(&runs))
}

/// The same order with each block once, as much as a trace may have. Runs that follow each other are one.
pub fn each_once(runs: &[Range<u64>]) -> Vec<Range<u64>> {
    // What is there already, by its start.
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    let mut once: Vec<Range<u64>> = Vec::new();
    let mut left = MAX_TRACE_BLOCKS;
    for run in runs {
        let mut at = run.start;
        while at < run.end && left > 0 {
            let before = seen.range(..=at).next_back().map(|(_, end)| *end);
            if let Some(end) = before.filter(|end| *end > at) {
                at = end;
                continue;
            }
            let next = seen
                .range(at..)
                .next()
                .map_or(u64::MAX, |(start, _)| *start);
            let part = at..run.end.min(next).min(at.saturating_add(left));
            left -= part.end - part.start;
            at = part.end;
            seen.insert(part.start, part.end);
            let room = once.len() < MAX_RUNS;
            match once.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ if room => once.push(part),
                _ => return once,
            }
        }
    }
    once
}

/// The trace of `old` as one for `new`, an image that came from it. A block whose content is elsewhere in `new` is
/// followed there. One whose content is gone keeps its place: file systems keep what they are asked for at each boot
/// (tables, directories) where it was. Zeros are left out.
///
/// It reads those pages of the manifests that it needs; memory is some 100 bytes for each block of the trace.
///
/// # Errors
/// Those of the digests.
pub fn inherit<E>(
    runs: &[Range<u64>],
    old: &dyn ImageDigests<E>,
    new: &dyn ImageDigests<E>,
) -> Result<Vec<Range<u64>>, E> {
    let runs = each_once(runs);
    let mut blocks: Vec<u64> = runs.iter().cloned().flatten().collect();
    blocks.retain(|block| *block < old.blocks());
    blocks.sort_unstable();
    let (before, now) = (digests_at(&blocks, old)?, digests_at(&blocks, new)?);
    // Content that is not where it was, and where it is instead.
    let mut moved: HashMap<Digest, Option<u64>> = HashMap::new();
    for (block, digest) in &before {
        if now.get(block) != Some(digest) && *digest != Digest::zero_block() {
            moved.insert(*digest, None);
        }
    }
    let mut missing = moved.len();
    // CAST: 1024.
    let per_page = DIGESTS_PER_PAGE as u64;
    for page in 0..new.blocks().div_ceil(per_page) {
        if missing == 0 {
            break;
        }
        let there = page * per_page < old.blocks();
        if there && old.page_hash(page)? == new.page_hash(page)? {
            continue;
        }
        for (at, digest) in (page * per_page..).zip(new.digests(page)?) {
            if let Some(place @ None) = moved.get_mut(&digest) {
                *place = Some(at);
                missing -= 1;
            }
        }
    }
    let mut inherited: Vec<Range<u64>> = Vec::new();
    for block in runs.into_iter().flatten() {
        let Some(digest) = before.get(&block) else {
            continue;
        };
        let is_zero = *digest == Digest::zero_block();
        let place = match moved.get(digest).copied().flatten() {
            // The same content may be in its place and have gone from another.
            Some(place) if now.get(&block) != Some(digest) => place,
            _ => block,
        };
        if is_zero || place >= new.blocks() {
            continue;
        }
        match inherited.last_mut() {
            Some(last) if last.end == place => last.end += 1,
            _ => inherited.push(place..place + 1),
        }
    }
    Ok(each_once(&inherited))
}

/// The digests of some blocks, in ascending order, as far as the image has them.
fn digests_at<E>(blocks: &[u64], image: &dyn ImageDigests<E>) -> Result<HashMap<u64, Digest>, E> {
    // CAST: 1024.
    let per_page = DIGESTS_PER_PAGE as u64;
    let mut digests = HashMap::new();
    for blocks in blocks.chunk_by(|a, b| a / per_page == b / per_page) {
        let Some(first) = blocks.first().filter(|first| **first < image.blocks()) else {
            break;
        };
        let page = image.digests(first / per_page)?;
        for block in blocks {
            // CAST: below 1024.
            if let Some(digest) = page.get((block % per_page) as usize) {
                digests.insert(*block, *digest);
            }
        }
    }
    Ok(digests)
}

#[cfg(test)]
// A single run of blocks is a trace, too.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;
    use crate::delta::DigestList;

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
    fn each_block_comes_once_and_there_are_limits() {
        let once = |runs: &[Range<u64>]| each_once(runs);
        assert_eq!(once(&[5..9, 0..20, 5..9]), [5..9, 0..5, 9..20]);
        assert_eq!(once(&[3..4, 4..5, 2..3]), [3..5, 2..3]);
        assert_eq!(once(&[0..10, 2..3, 9..12]), [0..12]);
        let all = once(&[7..8, 0..MAX_BLOCKS]);
        assert_eq!(
            all.iter().map(|run| run.end - run.start).sum::<u64>(),
            MAX_TRACE_BLOCKS
        );
        let many: Vec<_> = (0..100_000u64).map(|n| n * 2..n * 2 + 1).collect();
        assert_eq!(once(&many).len(), MAX_RUNS);
        assert!((format(&image(), &many).len() as u64) < MAX_BYTES);
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
        let says = |bytes: &[u8], image: &ImageId, text: &str| {
            let error = parse(bytes, image).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        says(&good, &"cd".repeat(32).parse().unwrap(), "another image");
        says(b"\xff\xfe", &image(), "does not begin with");
        says(b"", &image(), "does not begin with");
        says(&vec![b'x'; 5 << 20], &image(), "larger than");
        let with = |line: &str| {
            let mut text = format!("{HEADING}\nimage {}\n{line}\n", image()).into_bytes();
            let checksum = crc32c::crc32c(&text);
            text.extend(format!("crc32c {checksum:08x}\n").bytes());
            text
        };
        assert_eq!(parse(&with("5 1\n7 2"), &image()), Ok(vec![5..6, 7..9]));
        for line in [
            "5",
            "5 0",
            "x 1",
            "18446744073709551615 2",
            "-1 1",
            "4294967296 1",
        ] {
            says(&with(line), &image(), "is no run of blocks");
        }
    }

    fn digests(content: &[u8]) -> DigestList {
        let digest = |byte: &u8| match byte {
            0 => Digest::zero_block(),
            byte => Digest::of(&[*byte]),
        };
        DigestList::new(content.iter().map(digest).collect())
    }

    #[test]
    fn the_next_image_inherits_the_order() {
        // Two pages; a file moves from the first to the second, a table stays and changes, something goes.
        let mut old = vec![0; 2000];
        old[10..14].copy_from_slice(&[1, 2, 3, 4]);
        old[100] = 9;
        old[1990..1992].copy_from_slice(&[7, 7]);
        let mut new = old[..1991].to_vec();
        new[10..14].copy_from_slice(&[1, 0, 0, 0]);
        new[1500..1503].copy_from_slice(&[2, 3, 4]);
        new[100] = 10;
        new[1] = 7;
        let (old, new) = (digests(&old), digests(&new));
        let inherit = |runs: &[Range<u64>]| -> Vec<Range<u64>> {
            super::inherit::<FormatError>(runs, &old, &new).unwrap()
        };
        assert_eq!(
            inherit(&[100..101, 10..14, 500..600]),
            [100..101, 10..11, 1500..1503]
        );
        // What is still there stays there, what was cut off is found elsewhere, and what there never was is left out.
        assert_eq!(inherit(&[1990..2500]), [1990..1991, 1..2]);
        assert_eq!(inherit(&[]), []);
    }
}
