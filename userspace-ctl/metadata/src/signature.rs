// SPDX-License-Identifier: GPL-2.0

//! What else a device may hold, so that it is not overwritten by mistake.

use pristine_shared::{Page, PAGE_SIZE};

use crate::error::Result;
use crate::storage::{Storage, StorageExt};

struct Signature {
    what: &'static str,
    at: usize,
    magic: &'static [u8],
}

const fn sig(what: &'static str, at: usize, magic: &'static [u8]) -> Signature {
    Signature { what, at, magic }
}

/// The more telling ones first: a boot sector's mark is also on many file systems.
const SIGNATURES: &[Signature] = &[
    sig("a GPT partition table", 512, b"EFI PART"),
    sig("a LUKS volume", 0, b"LUKS\xba\xbe"),
    sig("an LVM physical volume", 512 + 24, b"LVM2 001"),
    sig("an LVM physical volume", 24, b"LVM2 001"),
    sig("an xfs file system", 0, b"XFSB"),
    sig("a squashfs file system", 0, b"hsqs"),
    sig("an ext2, ext3 or ext4 file system", 1024 + 56, b"\x53\xef"),
    sig("an f2fs file system", 1024, b"\x10\x20\xf5\xf2"),
    sig("an erofs file system", 1024, b"\xe2\xe1\xf5\xe0"),
    sig("an md RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    sig("an md RAID member", 4096, b"\xfc\x4e\x2b\xa9"),
    sig(
        "a bcache device",
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca",
    ),
    sig("swap space", 4086, b"SWAPSPACE2"),
    sig("a btrfs file system", 65536 + 64, b"_BHRfS_M"),
    sig("an ISO 9660 file system", 32769, b"CD001"),
    sig("an NTFS file system", 3, b"NTFS    "),
    sig("an exFAT file system", 3, b"EXFAT   "),
    sig("a FAT file system", 54, b"FAT1"),
    sig("a FAT file system", 82, b"FAT32"),
    sig("a partition table", 510, b"\x55\xaa"),
];

/// Names what a device holds, if it is something known.
pub(crate) fn probe<S: Storage>(device: &mut S) -> Result<Option<&'static str>> {
    let mut page: Page = [0; PAGE_SIZE];
    let mut loaded = None;
    for signature in SIGNATURES {
        let number = (signature.at / PAGE_SIZE) as u64;
        if number >= device.pages() {
            continue;
        }
        if loaded != Some(number) {
            device.read_page(number, &mut page)?;
            loaded = Some(number);
        }
        let at = signature.at % PAGE_SIZE;
        if page.get(at..at + signature.magic.len()) == Some(signature.magic) {
            return Ok(Some(signature.what));
        }
    }
    Ok(None)
}

/// The end in bytes of what the start of a data device says is on it, if it says so: an ext file system or a GPT.
pub(crate) fn content_end<S: Storage>(device: &mut S) -> Result<Option<(&'static str, u64)>> {
    let mut page: Page = [0; PAGE_SIZE];
    if device.pages() == 0 {
        return Ok(None);
    }
    device.read_page(0, &mut page)?;
    let u32_at = |at: usize| {
        page.get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if page.get(512..520) == Some(b"EFI PART") {
        // AlternateLBA: where the backup table lies, the last thing of a GPT.
        return Ok(Some((
            "a GPT partition table",
            u64_at(512 + 32).saturating_add(1).saturating_mul(512),
        )));
    }
    if page.get(1080..1082) == Some(b"\x53\xef") {
        let block_shift = 10 + u32_at(1024 + 24).min(6);
        // INCOMPAT_64BIT: the high half of the block count is valid.
        let high = if u32_at(1024 + 96) & 0x80 != 0 {
            u64::from(u32_at(1024 + 0x150))
        } else {
            0
        };
        let blocks = u64::from(u32_at(1024 + 4)) | high << 32;
        return Ok(Some((
            "an ext file system",
            blocks.saturating_mul(1 << block_shift),
        )));
    }
    Ok(None)
}
