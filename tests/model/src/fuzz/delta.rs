// SPDX-License-Identifier: GPL-2.0

//! Deltas, as a machine takes them from a store that it does not trust.

use pristine_image::delta::{decode_frame, Delta, DeltaHead, PageChange, Run, Step};
use pristine_image::{merkle, Digest, BLOCK_SIZE, DIGESTS_PER_PAGE};

const OLD_BLOCKS: u64 = 700;
const NEW_BLOCKS: u64 = DIGESTS_PER_PAGE as u64 + 40;

pub(super) fn run(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else {
        return;
    };
    match kind % 3 {
        0 => {
            let _ = DeltaHead::parse(data)
                .map(|head| Delta::parse(head, data.get(160..).unwrap_or_default()));
        }
        1 => frame(data),
        _ => map(data),
    }
}

/// A frame yields what it must, or nothing.
fn frame(data: &[u8]) {
    let references = [b'r'; 2 * BLOCK_SIZE];
    for blocks in [1, 3] {
        if let Ok(content) = decode_frame(data, &references, blocks) {
            assert_eq!(content.len() as u64, blocks * BLOCK_SIZE as u64);
        }
    }
}

/// A delta whose page hashes are right and whose runs and frames are `data`.
fn map(data: &[u8]) {
    let Some((frames, data)) = data.split_first_chunk() else {
        return;
    };
    let frames = u64::from(u16::from_le_bytes(*frames));
    let hash = |byte: u8| Digest::from_bytes([byte; 32]);
    let (old, new) = ([hash(1)], [hash(2), hash(3)]);
    let sizes = [OLD_BLOCKS, NEW_BLOCKS].map(|blocks| blocks * BLOCK_SIZE as u64);
    // The first page has a hash in both images, the second in the new one alone.
    let mut map = vec![0x23, 0x03];
    for digest in [&old[0], &new[0], &new[1]] {
        map.extend_from_slice(digest.as_bytes());
    }
    map.extend_from_slice(data);
    // One raw block, so that the input is what it looks like.
    let mut stored = 0xfd2f_b528u32.to_le_bytes().to_vec();
    stored.push(0xa0);
    stored.extend((map.len() as u32).to_le_bytes());
    stored.extend(&((map.len() as u32) << 3 | 1).to_le_bytes()[..3]);
    stored.extend_from_slice(&map);
    let mut head = b"\x89PRISTD\n\x01\0\0\0\0\0\0\0".to_vec();
    head.extend(sizes[0].to_le_bytes());
    head.extend(sizes[1].to_le_bytes());
    head.extend(merkle::root(sizes[0], old.iter()).as_bytes());
    head.extend(merkle::root(sizes[1], new.iter()).as_bytes());
    let lens = [
        stored.len() as u64,
        map.len() as u64,
        160 + stored.len() as u64 + frames,
        0,
    ];
    head.extend(lens.iter().flat_map(|len| len.to_le_bytes()));
    let mut covered = head.clone();
    covered.extend_from_slice(&stored);
    head.extend(Digest::of(&covered).as_bytes());
    let Ok(head) = DeltaHead::parse(&head) else {
        unreachable!("the head is right");
    };
    if let Ok(delta) = Delta::parse(head, &stored) {
        check(&delta, 160 + stored.len() as u64 + frames);
    }
}

/// What an update relies on.
fn check(delta: &Delta, file_len: u64) {
    let mut slot = 0;
    assert_eq!((delta.pages(), delta.blocks()), (2, NEW_BLOCKS));
    for page in 0..delta.pages() {
        assert!(matches!(delta.change(page), Some(PageChange::Changed(_))));
        let blocks = delta.page_blocks(page);
        let mut at = blocks.start;
        for run in delta.steps(page) {
            let Ok(Run { block, count, step }) = run else {
                unreachable!("a run that parse let pass");
            };
            assert!(block == at && count > 0);
            at += count;
            match step {
                Step::Same => assert!(at <= OLD_BLOCKS),
                Step::Zero => (),
                Step::Move(from) => assert!(from + count <= OLD_BLOCKS),
                Step::Again(from) => assert!(from + count <= block),
                Step::New(first) => {
                    assert_eq!(first, slot);
                    slot += count;
                }
            }
        }
        assert_eq!(at, blocks.end);
    }
    assert_eq!(slot, delta.slots());
    let (mut slot, mut end) = (0, delta.head().map_range().end);
    for (index, frame) in delta.frames().iter().enumerate() {
        assert!(frame.offset == end && frame.first_slot == slot && frame.blocks > 0);
        end += u64::from(frame.len);
        assert_eq!(delta.frame_of(slot), Some(index));
        slot += frame.blocks;
        assert!(delta
            .references(frame)
            .all(|range| range.start < range.end && range.end <= OLD_BLOCKS));
    }
    assert!(delta.frames().is_empty() || slot == delta.slots());
    assert!(end == file_len);
    assert_eq!(delta.frame_of(slot), None);
}
