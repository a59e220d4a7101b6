// SPDX-License-Identifier: GPL-2.0

//! Fields of structures on disks. Reading beyond the end of a structure or a disk is an answer, not a fault.

use super::{FsError, Result};
use crate::ReadAt;

/// Bytes `at..at + len` of a disk.
pub(super) fn read(disk: &dyn ReadAt, at: u64, len: usize) -> Result<Vec<u8>> {
    let end = at.checked_add(len as u64);
    if end.is_none_or(|end| end > disk.len()) {
        return Err(FsError::refused(format!(
            "it points to byte {at}, which is beyond its end"
        )));
    }
    let mut buffer = vec![0; len];
    disk.read_at(at, &mut buffer)?;
    Ok(buffer)
}

/// Whether the disk has these bytes there; false beyond its end.
pub(super) fn has(disk: &dyn ReadAt, at: u64, magic: &[u8]) -> Result<bool> {
    if disk.len() < at + magic.len() as u64 {
        return Ok(false);
    }
    Ok(read(disk, at, magic.len())? == magic)
}

/// Fields of a structure; what lies beyond its end reads as zero.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn array<const N: usize>(self, at: usize) -> [u8; N] {
        let mut array = [0; N];
        if let Some(bytes) = at.checked_add(N).and_then(|end| self.0.get(at..end)) {
            array.copy_from_slice(bytes);
        }
        array
    }

    pub(super) fn u8(self, at: usize) -> u8 {
        let [byte] = self.array(at);
        byte
    }

    pub(super) fn le16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn le32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(super) fn le64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    pub(super) fn be16(self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    pub(super) fn be32(self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    pub(super) fn be64(self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    /// Bytes from `at` on, fewer at the end.
    pub(super) fn from(self, at: usize) -> Fields<'a> {
        Fields(self.0.get(at..).unwrap_or_default())
    }

    /// Text that ends with a zero byte or after `len` bytes.
    pub(super) fn text(self, at: usize, len: usize) -> String {
        let bytes = self.from(at).0;
        let bytes = bytes.get(..len).unwrap_or(bytes);
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).trim_end().to_owned()
    }

    /// 16 bytes as a UUID.
    pub(super) fn uuid(self, at: usize) -> String {
        uuid(self.array(at))
    }
}

/// A UUID's usual spelling.
pub(super) fn uuid(bytes: [u8; 16]) -> String {
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

/// CRC-32C as ext4 and jbd2 use it: from `seed`, without the inversions at both ends.
pub(super) fn crc32c_raw(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// CRC-32C of `bytes` in which the four bytes at `at` are taken for zero.
pub(super) fn crc32c_without(bytes: &[u8], at: usize) -> u32 {
    let (before, rest) = bytes.split_at(at.min(bytes.len()));
    let after = rest.get(4..).unwrap_or_default();
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    crc32c::crc32c_append(crc, after)
}

/// The CRC-32 of Ethernet, as GPT uses it.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// CRC-16 (polynomial 8005, reflected), as ext4's group descriptors had it before CRC-32C.
pub(super) fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte), |crc, _| {
            (crc >> 1) ^ (0xa001 & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_known_ones() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(!crc32c_raw(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
        let mut bytes = *b"12345\0\0\0\0";
        let expected = crc32c::crc32c(&bytes);
        bytes[5..].copy_from_slice(b"9999");
        assert_eq!(crc32c_without(&bytes, 5), expected);
    }

    #[test]
    fn fields_beyond_the_end_are_zero() {
        let fields = Fields(&[1, 2, 3]);
        assert_eq!(
            (fields.le16(0), fields.be16(0), fields.le16(2)),
            (0x201, 0x102, 0)
        );
        assert_eq!(fields.le64(usize::MAX), 0);
        assert_eq!(Fields(b"name \0x").text(0, 7), "name");
    }
}
