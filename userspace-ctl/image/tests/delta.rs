// SPDX-License-Identifier: GPL-2.0

//! Deltas that are good, old, cut and forged.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::noise;
use pristine_image::delta::make::{make, BlockVisitor, Content, MakeError, MakeOptions};
use pristine_image::delta::{
    compare, decode_frame, Comparison, Delta, DeltaHead, DigestList, PageChange, Step,
};
use pristine_image::{is_zero, Digest, FormatError, BLOCK_SIZE, DIGESTS_PER_PAGE};

struct Memory(Vec<u8>);

impl Content for Memory {
    fn read(&self, blocks: &[Range<u64>]) -> io::Result<Vec<u8>> {
        let bytes = |r: &Range<u64>| r.start as usize * BLOCK_SIZE..r.end as usize * BLOCK_SIZE;
        Ok(blocks
            .iter()
            .flat_map(|r| self.0[bytes(r)].to_vec())
            .collect())
    }

    fn visit(&self, visit: &BlockVisitor<'_>) -> io::Result<()> {
        for (block, content) in (0..).zip(self.0.chunks(BLOCK_SIZE)) {
            if !is_zero(content) {
                visit(block, content);
            }
        }
        Ok(())
    }
}

fn digests(image: &[u8]) -> DigestList {
    let digest = |block: &[u8]| match is_zero(block) {
        true => Digest::zero_block(),
        false => Digest::of(block),
    };
    DigestList::new(image.chunks(BLOCK_SIZE).map(digest).collect())
}

fn compared(old: &[u8], new: &[u8]) -> Comparison {
    compare::<FormatError>(&digests(old), &digests(new)).unwrap()
}

fn made(old: &[u8], new: &[u8]) -> Vec<u8> {
    let options = MakeOptions {
        frame_blocks: 4,
        reference_blocks: 16,
        ..MakeOptions::default()
    };
    let (old_content, new_content) = (Memory(old.to_vec()), Memory(new.to_vec()));
    let cancel = AtomicBool::new(false);
    make(
        &compared(old, new),
        &old_content,
        64,
        &new_content,
        &options,
        &|_, _| (),
        &cancel,
    )
    .unwrap()
}

fn parse(bytes: &[u8]) -> Result<Delta, FormatError> {
    let head = DeltaHead::parse(bytes)?;
    let map = head.map_range();
    let map = bytes
        .get(map.start as usize..map.end as usize)
        .unwrap_or_default();
    Delta::parse(head, map)
}

/// The new image from the old one, with everything in memory.
fn applied(delta: &Delta, bytes: &[u8], old: &[u8]) -> Vec<u8> {
    let mut new = vec![0; delta.blocks() as usize * BLOCK_SIZE];
    let same = new.len().min(old.len());
    new[..same].copy_from_slice(&old[..same]);
    let content = Memory(old.to_vec());
    let range =
        |first: u64, count: u64| first as usize * BLOCK_SIZE..(first + count) as usize * BLOCK_SIZE;
    for page in 0..delta.pages() {
        if delta.change(page) == Some(PageChange::Zero) {
            let blocks = delta.page_blocks(page);
            new[range(blocks.start, blocks.end - blocks.start)].fill(0);
        }
        for run in delta.steps(page).map(Result::unwrap) {
            let target = range(run.block, run.count);
            match run.step {
                Step::Same => (),
                Step::Zero => new[target].fill(0),
                Step::Move(from) => new[target].copy_from_slice(&old[range(from, run.count)]),
                Step::Again(from) => new.copy_within(range(from, run.count), target.start),
                Step::New(slot) => {
                    for slot in slot..slot + run.count {
                        let frame = &delta.frames()[delta.frame_of(slot).unwrap()];
                        let references: Vec<_> = delta.references(frame).collect();
                        let stored = &bytes
                            [frame.offset as usize..frame.offset as usize + frame.len as usize];
                        let references = content.read(&references).unwrap();
                        let data = decode_frame(stored, &references, frame.blocks).unwrap();
                        let at = (slot - frame.first_slot) as usize * BLOCK_SIZE;
                        let block = run.block + slot - delta_first(delta, page, run.block);
                        new[range(block, 1)].copy_from_slice(&data[at..at + BLOCK_SIZE]);
                    }
                }
            }
        }
    }
    new
}

/// The slot of a block that begins a run of new ones.
fn delta_first(delta: &Delta, page: u64, block: u64) -> u64 {
    let run = delta
        .steps(page)
        .map(Result::unwrap)
        .find(|run| run.block == block)
        .unwrap();
    match run.step {
        Step::New(slot) => slot,
        other => panic!("{other:?}"),
    }
}

/// Of all that a delta knows: a block that changed a little, moved and repeated ones, zeros, new content, an unchanged
/// page, a page that became zero, and an image that grew into a page that is not full.
fn golden_images() -> (Vec<u8>, Vec<u8>) {
    let page = DIGESTS_PER_PAGE * BLOCK_SIZE;
    let mut old = noise(1, 40 * BLOCK_SIZE);
    old.resize(page, 0);
    old.extend(noise(2, 8 * BLOCK_SIZE));
    old.resize(2 * page, 0);
    old.extend(noise(3, BLOCK_SIZE));
    old.resize(3 * page, 0);
    let mut new = old.clone();
    new[3 * BLOCK_SIZE + 100] ^= 1;
    new[10 * BLOCK_SIZE..12 * BLOCK_SIZE].copy_from_slice(&old[20 * BLOCK_SIZE..22 * BLOCK_SIZE]);
    new[15 * BLOCK_SIZE..16 * BLOCK_SIZE].fill(0);
    let fresh = noise(4, 3 * BLOCK_SIZE);
    new[50 * BLOCK_SIZE..53 * BLOCK_SIZE].copy_from_slice(&fresh);
    new[60 * BLOCK_SIZE..63 * BLOCK_SIZE].copy_from_slice(&fresh);
    new[2 * page..].fill(0);
    new.extend(&old[5 * BLOCK_SIZE..9 * BLOCK_SIZE]);
    (old, new)
}

/// Deltas that were published must stay readable.
///
/// The file was made by `PRISTINE_WRITE_GOLDEN=1 cargo test -p pristine-image --test delta golden`, once for each version
/// of the format; those of old versions are never made again.
#[test]
fn golden_file_of_version_1_is_read() {
    let (old, new) = golden_images();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1.delta");
    if std::env::var_os("PRISTINE_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, made(&old, &new)).unwrap();
    }
    let bytes = std::fs::read(path).unwrap();
    let delta = parse(&bytes).unwrap();
    assert_eq!(delta.head().old, digests(&old).image());
    assert_eq!(delta.head().new, digests(&new).image());
    assert_eq!(delta.head().file_len, bytes.len() as u64);
    assert!(matches!(delta.change(1), Some(PageChange::Same(_))));
    assert_eq!(delta.change(2), Some(PageChange::Zero));
    assert!(applied(&delta, &bytes, &old) == new);
}

#[test]
fn what_changed_a_little_costs_a_little() {
    let (old, new) = golden_images();
    let bytes = made(&old, &new);
    let delta = parse(&bytes).unwrap();
    assert!(applied(&delta, &bytes, &old) == new);
    // A changed byte, three blocks of noise, and some hundred bytes of map.
    assert!(bytes.len() < 3 * BLOCK_SIZE + 1024, "{}", bytes.len());
    let comparison = compared(&old, &new);
    assert_eq!((comparison.moved, delta.slots()), (2 + 4, 4));
    // The same images give the same delta.
    assert!(made(&old, &new) == bytes);
}

#[test]
fn the_way_back_works_as_well() {
    let (old, new) = golden_images();
    let bytes = made(&new, &old);
    let delta = parse(&bytes).unwrap();
    assert!(applied(&delta, &bytes, &new) == old);
}

#[test]
fn damage_and_other_images_are_refused() {
    let (old, new) = golden_images();
    let bytes = made(&old, &new);
    let head = DeltaHead::parse(&bytes).unwrap();
    let end = head.map_range().end as usize;
    for at in 0..end {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(parse(&bad).is_err(), "byte {at}");
        assert!(parse(&bytes[..at]).is_err(), "{at} bytes");
    }
    let mut newer = bytes.clone();
    newer[8] = 2;
    assert!(parse(&newer).unwrap_err().is_unsupported());
}

#[test]
fn frames_need_their_references() {
    let old = noise(5, 8 * BLOCK_SIZE);
    let mut new = old.clone();
    for block in new.chunks_mut(BLOCK_SIZE) {
        block[7] ^= 1;
    }
    let bytes = made(&old, &new);
    let delta = parse(&bytes).unwrap();
    let frame = &delta.frames()[0];
    let stored = &bytes[frame.offset as usize..][..frame.len as usize];
    let references: Vec<_> = delta.references(frame).collect();
    let good = Memory(old.clone()).read(&references).unwrap();
    assert!(decode_frame(stored, &good, frame.blocks).is_ok());
    let mut other = good.clone();
    other[BLOCK_SIZE + 9] ^= 1;
    // Unless the byte is not used, which it is here.
    assert!(decode_frame(stored, &other, frame.blocks).is_err());
    assert!(decode_frame(stored, &good[..BLOCK_SIZE], frame.blocks).is_err());
    assert!(decode_frame(stored, &good, frame.blocks - 1).is_err());
    assert!(decode_frame(stored, &good, u64::MAX).is_err());
}

#[test]
fn a_bomb_costs_no_memory() {
    let bomb = zstd::bulk::compress(&vec![0; 256 << 20], 3).unwrap();
    assert!(decode_frame(&bomb, &[], 4).is_err());
}

#[test]
fn impossible_options_are_refused() {
    let (old, new) = (noise(1, BLOCK_SIZE), noise(2, BLOCK_SIZE));
    for options in [
        MakeOptions {
            level: 0,
            ..MakeOptions::default()
        },
        MakeOptions {
            level: 23,
            ..MakeOptions::default()
        },
        MakeOptions {
            frame_blocks: 0,
            ..MakeOptions::default()
        },
        MakeOptions {
            frame_blocks: 4097,
            ..MakeOptions::default()
        },
        MakeOptions {
            reference_blocks: 8193,
            ..MakeOptions::default()
        },
    ] {
        let content = Memory(new.clone());
        let cancel = AtomicBool::new(false);
        let result = make(
            &compared(&old, &new),
            &content,
            1,
            &content,
            &options,
            &|_, _| (),
            &cancel,
        );
        assert!(matches!(result, Err(MakeError::Option(_))), "{options:?}");
    }
}
