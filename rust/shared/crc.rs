// SPDX-License-Identifier: GPL-2.0

//! CRC32C (Castagnoli), as in RFC 3720: the kernel's own in the module, the `crc32c` crate elsewhere.

/// The CRC32C of `data` appended to data whose CRC32C is `crc` (0 to start).
#[cfg(MODULE)]
pub fn crc32c(crc: u32, data: &[u8]) -> u32 {
    crate::dm::crc32c(crc, data)
}

/// The CRC32C of `data` appended to data whose CRC32C is `crc` (0 to start).
#[cfg(not(MODULE))]
pub fn crc32c(crc: u32, data: &[u8]) -> u32 {
    ::crc32c::crc32c_append(crc, data)
}

#[cfg(test)]
mod tests {
    /// The check value of the CRC catalogue, so that the kernel's and the crate's cannot differ unseen.
    #[test]
    fn check_value() {
        assert_eq!(super::crc32c(0, b"123456789"), 0xe306_9283);
        assert_eq!(
            super::crc32c(super::crc32c(0, b"1234"), b"56789"),
            0xe306_9283
        );
    }
}
