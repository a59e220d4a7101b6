// SPDX-License-Identifier: GPL-2.0

//! Digests and the names made of them.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use crate::BLOCK_SIZE;

/// Bytes in a digest (BLAKE3-256).
pub const DIGEST_LEN: usize = 32;

static ZERO_BLOCK: LazyLock<Digest> = LazyLock::new(|| Digest::of(&[0; BLOCK_SIZE]));

/// A BLAKE3-256 digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; DIGEST_LEN]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// The digest of a block of zeros.
    pub fn zero_block() -> Self {
        *ZERO_BLOCK
    }

    /// A digest from its bytes.
    pub const fn from_bytes(bytes: [u8; DIGEST_LEN]) -> Self {
        Digest(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; DIGEST_LEN] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // At once: a server writes many of them, and each call of the formatter costs more than all digits.
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 2 * DIGEST_LEN];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest of 64 lower-case hexadecimal digits")]
pub struct ParseDigestError(String);

impl FromStr for Digest {
    type Err = ParseDigestError;

    /// Parses 64 lower-case hexadecimal digits; there is one spelling of each name.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDigestError(text.chars().take(80).collect());
        let digits = text.as_bytes();
        if digits.len() != 2 * DIGEST_LEN {
            return Err(error());
        }
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; DIGEST_LEN];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let high = value(pair[0]).ok_or_else(error)?;
            let low = value(pair[1]).ok_or_else(error)?;
            *byte = (high << 4) | low;
        }
        Ok(Digest(bytes))
    }
}

macro_rules! digest_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Digest);

        impl $name {
            /// The name that is this digest.
            pub const fn new(digest: Digest) -> Self {
                $name(digest)
            }

            /// The name from the digest's 32 bytes.
            pub const fn from_bytes(bytes: [u8; DIGEST_LEN]) -> Self {
                $name(Digest::from_bytes(bytes))
            }

            /// The digest's 32 bytes.
            pub fn as_bytes(&self) -> &[u8; DIGEST_LEN] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseDigestError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map($name)
            }
        }
    };
}

digest_name!(
    /// The name of an image: the Merkle root over its blocks, see [`crate::merkle`].
    ImageId
);
digest_name!(
    /// The name of a pack: the digest of its bytes.
    PackId
);

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole chunks without an early exit, which the compiler turns into vector instructions.
    let mut chunks = bytes.chunks_exact(256);
    chunks.all(|chunk| chunk.iter().fold(0, |sum, byte| sum | byte) == 0)
        && bytes.chunks_exact(256).remainder().iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        let digest = Digest::of(b"pristine");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert_eq!(digest.to_string().len(), 64);
    }

    #[test]
    fn only_one_spelling() {
        let text = Digest::of(b"pristine").to_string();
        assert!(text.to_uppercase().parse::<Digest>().is_err());
        assert!(text[1..].parse::<Digest>().is_err());
        assert!(format!("{text}0").parse::<Digest>().is_err());
        assert!("../".repeat(22)[..64].parse::<Digest>().is_err());
    }

    #[test]
    fn zeros_are_found() {
        let mut block = vec![0; 4096];
        assert!(is_zero(&block));
        block[4095] = 1;
        assert!(!is_zero(&block));
        assert!(is_zero(&[0; 3]));
        assert!(!is_zero(&[0, 0, 1]));
    }
}
