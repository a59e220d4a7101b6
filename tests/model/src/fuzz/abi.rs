// SPDX-License-Identifier: GPL-2.0

//! The arguments of the ioctls, as the module takes them from a caller that it does not trust.

use pristine_shared::abi::{self, CheckpointArgs, MapArgs, Refusal};
use pristine_shared::checkpoint::Plane;
use pristine_shared::geometry::MAX_BLOCKS;
use zerocopy::{FromBytes, IntoBytes};

/// The bytes as an argument, filled up with zeros: what the module copies from userspace.
fn argument<T: FromBytes + IntoBytes>(data: &[u8]) -> T {
    let mut argument = T::new_zeroed();
    let bytes = argument.as_mut_bytes();
    let len = data.len().min(bytes.len());
    bytes[..len].copy_from_slice(&data[..len]);
    argument
}

pub(super) fn run(data: &[u8]) {
    let Some((blocks, data)) = data.split_first_chunk() else {
        return;
    };
    // The number of blocks is the device's, and any that a geometry allows.
    let blocks = u64::from_le_bytes(*blocks) % MAX_BLOCKS + 1;
    let Some((&command, data)) = data.split_first() else {
        return;
    };
    if command & 1 == 0 {
        map(&argument(data), blocks);
    } else {
        let args: CheckpointArgs = argument(data);
        let version = abi::verify_version(args.version);
        assert_eq!(version.is_ok(), args.version == 1);
        assert_eq!(args.verify().is_ok(), args.reserved == 0);
    }
}

fn map(args: &MapArgs, blocks: u64) {
    let plane = args.verify();
    assert_eq!(
        plane,
        match (args.words > 65536, args.plane) {
            (false, 0) => Ok(Plane::Dirty),
            (false, 1) => Ok(Plane::Stale),
            _ => Err(Refusal::Invalid),
        }
    );
    // What is allocated and copied for an accepted argument: bounded, within the device, and all of it wanted.
    let all = blocks.div_ceil(64);
    match args.range(blocks) {
        Ok(range) => {
            assert!(range.start == args.first_word && range.start < all);
            assert!(range.start <= range.end && range.end <= all);
            let count = range.end - range.start;
            assert!(count == args.words || (count < args.words && range.end == all));
            if plane.is_ok() {
                assert!(count * 8 <= 512 << 10);
            }
        }
        Err(e) => {
            assert_eq!(e, Refusal::PastEnd);
            assert!(args.first_word >= all);
        }
    }
}
