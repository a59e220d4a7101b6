// SPDX-License-Identifier: GPL-2.0

//! Swap space: the header is kept, the rest is free. A hibernated system lies in swap space too; its signature is
//! another one, and then all is kept.
//!
//! The header is `union swap_header` of Linux's `include/linux/swap.h`; the signature stands at the end of the first
//! page, whose size is that of the machine that made it.

use super::bytes::{has, read, Fields};
use super::{Contents, FsError, Kind, Ranges, Result};
use crate::ReadAt;

const PAGE_SIZES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];
const SIGNATURE: &[u8; 10] = b"SWAPSPACE2";
/// What takes the signature's place while a system sleeps there (kernel, uswsusp, TuxOnIce).
const ASLEEP: [&[u8]; 6] = [
    b"S1SUSPEND",
    b"S2SUSPEND",
    b"ULSUSPEND",
    b"LINHIB0001",
    b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",
    b"TOI",
];

fn find(disk: &dyn ReadAt) -> Result<Option<(u64, bool)>> {
    for page in PAGE_SIZES {
        let at = page - SIGNATURE.len() as u64;
        if has(disk, at, SIGNATURE)? {
            return Ok(Some((page, false)));
        }
        for magic in ASLEEP {
            if has(disk, at, magic)? {
                return Ok(Some((page, true)));
            }
        }
    }
    Ok(None)
}

pub(super) fn probe(disk: &dyn ReadAt) -> Result<bool> {
    Ok(find(disk)?.is_some())
}

pub(super) fn contents(disk: &dyn ReadAt) -> Result<Contents> {
    let Some((page, asleep)) = find(disk)? else {
        return Err(FsError::refused("it is no swap space"));
    };
    if asleep {
        return Err(FsError::refused("a hibernated system lies in it"));
    }
    let header = read(disk, 0, page as usize)?;
    let f = Fields(&header);
    let pages = u64::from(f.le32(1028)) + 1;
    let size = pages * page;
    if f.le32(1024) != 1 || size > disk.len() {
        return Err(FsError::refused("its header is of another version or size"));
    }
    Ok(Contents {
        kind: Kind::Swap,
        uuid: Some(f.uuid(1036)),
        label: Some(f.text(1052, 16)),
        size,
        free: Ranges::of(std::iter::once(page..size).collect()),
        dead: Ranges::new(),
    })
}
