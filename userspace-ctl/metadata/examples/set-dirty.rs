// SPDX-License-Identifier: GPL-2.0

//! Puts the blocks of a device that is not active into a pattern: what `tests/bench/activation` and `tests/bench/revert`
//! load.
//!
//! ```text
//! set-dirty <data device> <metadata device> empty|first-half|alternate|full|spread:<MiB>
//! ```
//!
//! `spread` makes so many MiB dirty, in pieces of 64 KiB at equal distances over the whole device, as use would.

use std::process::ExitCode;

use pristine_metadata::{Access, BlockState, Changes, Devices, Metadata, Run};

fn set(data: &str, metadata: &str, pattern: &str) -> Result<(), String> {
    let devices = Devices::new(data, Some(metadata));
    let mut metadata = Metadata::open(&devices, Access::Write).map_err(|e| e.to_string())?;
    let (mut planes, _) = metadata.load().map_err(|e| e.to_string())?;
    let blocks = planes.blocks();
    let run = |start, end| Run { start, end };
    planes.set(run(0, blocks), BlockState::Clean);
    match pattern {
        "empty" => {}
        "first-half" => planes.set(run(0, blocks / 2), BlockState::Dirty),
        "full" => planes.set(run(0, blocks), BlockState::Dirty),
        // Bit by bit it would take minutes in an emulated machine. A last word that is not whole stays clean.
        "alternate" => {
            let whole = usize::try_from(blocks / 64).map_err(|e| e.to_string())?;
            for word in planes.dirty.iter_mut().take(whole) {
                *word = 0x5555_5555_5555_5555;
            }
        }
        _ => {
            let mib: u64 = pattern
                .strip_prefix("spread:")
                .and_then(|n| n.parse().ok())
                .ok_or_else(|| format!("no pattern {pattern}"))?;
            let piece = (64 << 10) / planes.geometry().block_size();
            let pieces = mib * 16;
            let distance = (blocks / pieces.max(1)).max(piece);
            for n in 0..pieces {
                planes.set(run(n * distance, n * distance + piece), BlockState::Dirty);
            }
        }
    }
    metadata
        .commit(&planes, &Changes::default())
        .map_err(|e| e.to_string())
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [data, metadata, pattern] = words.as_slice() else {
        eprintln!(
            "usage: set-dirty <data device> <metadata device> empty|first-half|alternate|full|spread:<MiB>"
        );
        return ExitCode::from(2);
    };
    match set(data, metadata, pattern) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("set-dirty: {e}");
            ExitCode::FAILURE
        }
    }
}
