// SPDX-License-Identifier: GPL-2.0

//! Boot traces: any runs are written and read again; a changed text is refused, or says something that is allowed.

use arbitrary::Arbitrary;
use pristine_image::{trace, ImageId, MAX_BLOCKS};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    runs: Vec<(u32, u16)>,
    flips: Vec<(u16, u8)>,
    /// Lines that are put before the checksum.
    lines: Vec<&'a str>,
    good_checksum: bool,
}

pub(super) fn run(data: &[u8]) {
    let image = ImageId::from_bytes([7; 32]);
    parsed(data, &image);
    let Some(input) = super::read::<Input<'_>>(data) else {
        return;
    };
    let runs: Vec<_> = input
        .runs
        .iter()
        .map(|&(first, count)| (u64::from(first / 2), u64::from(count)))
        .map(|(first, count)| first..first + count)
        .collect();
    let mut text = trace::format(&image, &runs);
    let read = trace::parse(&text, &image).unwrap();
    assert_eq!(read, trace::each_once(&runs));
    let all: u64 = runs.iter().map(|run| run.end - run.start).sum();
    for run in runs.iter().filter(|_| all <= trace::MAX_TRACE_BLOCKS) {
        let has = |block: &u64| read.iter().any(|run| run.contains(block));
        assert!(run.is_empty() || has(&run.start) && has(&(run.end - 1)));
    }
    // Another text: it may be refused, but not do harm.
    let end = text.len() - "crc32c 00000000\n".len();
    let checksum = text.split_off(end);
    for line in &input.lines {
        text.extend(line.bytes());
        text.push(b'\n');
    }
    for &(at, bits) in &input.flips {
        let len = text.len();
        text[usize::from(at) % len] ^= bits;
    }
    if input.good_checksum {
        let checksum = crc32c::crc32c(&text);
        text.extend(format!("crc32c {checksum:08x}\n").bytes());
    } else {
        text.extend(checksum);
    }
    parsed(&text, &image);
}

/// What any text yields is within the limits, and stays what it is when it is written.
fn parsed(bytes: &[u8], image: &ImageId) {
    let Ok(runs) = trace::parse(bytes, image) else {
        return;
    };
    assert!(runs.len() <= trace::MAX_RUNS);
    let blocks: u64 = runs.iter().map(|run| run.end - run.start).sum();
    assert!(blocks <= trace::MAX_TRACE_BLOCKS);
    assert!(runs
        .iter()
        .all(|run| !run.is_empty() && run.end <= MAX_BLOCKS));
    let mut sorted = runs.clone();
    sorted.sort_by_key(|run| run.start);
    assert!(sorted.windows(2).all(|pair| pair[0].end <= pair[1].start));
    let again = trace::format(image, &runs);
    assert_eq!(trace::parse(&again, image).as_ref(), Ok(&runs));
}
