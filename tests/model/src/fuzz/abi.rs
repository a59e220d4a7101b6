// SPDX-License-Identifier: GPL-2.0

//! The arguments of the ioctls, as the module takes them from a caller that it does not trust.

use pristine_shared::abi::{
    self, AnswerArgs, CheckpointArgs, HydrateArgs, MapArgs, NextArgs, Refusal,
};
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
    match command % 5 {
        0 => map(&argument(data), blocks),
        1 => checkpoint(&argument(data)),
        2 => next(&argument(data)),
        3 => answer(&argument(data)),
        _ => {
            // The block size is the device's too.
            let shift = 12 + u32::from(command) / 5 % 9;
            hydrate(&argument(data), blocks, shift);
        }
    }
}

fn checkpoint(args: &CheckpointArgs) {
    let version = abi::verify_version(args.version);
    assert_eq!(version.is_ok(), args.version == 1);
    assert_eq!(args.verify().is_ok(), args.reserved == 0);
}

/// What is accepted bounds what is allocated, and how long a thread sleeps.
fn next(args: &NextArgs) {
    let good = args.reserved == 0
        && args.count != 0
        && u64::from(args.count) * 32 <= 2048
        && args.wait_ms <= 60_000;
    assert_eq!(args.verify().is_ok(), good);
}

/// An answer is an error, zeros or data, and never two of them.
fn answer(args: &AnswerArgs) {
    let (error, zeroes, data) = (args.error != 0, args.flags == 1, args.bytes != 0);
    let one = u32::from(error) + u32::from(zeroes) + u32::from(data) == 1;
    let within = args.error < 4096 && args.flags < 2 && args.bytes <= 1 << 20;
    let good = args.reserved == 0 && one && within;
    assert_eq!(args.verify().is_ok(), good, "{args:?}");
}

/// What is offered lies on the device, and its data in a buffer of bounded size.
fn hydrate(args: &HydrateArgs, blocks: u64, shift: u32) {
    match args.run(blocks, shift) {
        Ok(run) => {
            assert!(run.start == args.first && run.start < run.end && run.end <= blocks);
            assert_eq!(run.len(), args.blocks);
            match args.flags {
                0 => assert!(run.len() << shift <= 1 << 20),
                1 => assert_eq!(args.data, 0),
                flags => panic!("flags {flags} are accepted"),
            }
        }
        Err(Refusal::PastEnd) => {
            let end = u128::from(args.first) + u128::from(args.blocks);
            assert!(end > u128::from(blocks));
        }
        Err(Refusal::Invalid) => {
            let long = u128::from(args.blocks) << shift > 1 << 20;
            let bad = match args.flags {
                0 => long,
                1 => args.data != 0,
                _ => true,
            };
            assert!(bad || args.blocks == 0, "{args:?}");
        }
        Err(Refusal::Version) => panic!("the version is looked at before"),
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
