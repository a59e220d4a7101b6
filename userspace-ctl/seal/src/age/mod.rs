// SPDX-License-Identifier: GPL-2.0

//! Files of [age](https://age-encryption.org/v1), as far as keys need them: small ones, for X25519 recipients.
//!
//! `age` and `age-keygen` take what is made here, and their files and identities are taken here; tests do both with the real
//! ones. The crate `age` does all of age, passphrases, SSH keys and plug-ins too, and is larger than the rest of the agent;
//! the part that is needed here is this.

mod file;
mod keys;

use zeroize::Zeroizing;

pub use file::{decrypt, encrypt, MAX_LEN};
pub use keys::{Identities, Identity, Recipient};

/// What is wrong with a key, an identity, or a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AgeError {
    /// Text that is no recipient.
    #[error("{0:?} is not an age recipient of the kind age1..., as age-keygen makes them")]
    Recipient(String),
    /// Text that is no identity. It is not shown: it may be a secret with a typing error.
    #[error("line {line} is not an age identity of the kind AGE-SECRET-KEY-1..., as age-keygen makes them")]
    Identity {
        /// The line, from 1.
        line: usize,
    },
    /// A file with identities has none.
    #[error("there is no identity in it (AGE-SECRET-KEY-1...)")]
    NoIdentity,
    /// The identities are encrypted themselves.
    #[error("it is encrypted; decrypt it first: age -d")]
    EncryptedIdentity,
    /// The file is not one of age's.
    #[error("it is not an age file: {0}")]
    Format(&'static str),
    /// None of the identities opens it.
    #[error("it is encrypted to others")]
    NotForUs,
    /// It was changed, or cut.
    #[error("it was changed or damaged: its authentication fails")]
    Damaged,
    /// The system has no random numbers.
    #[error("the system has no random numbers: {0}")]
    Random(String),
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], AgeError> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(bytes.as_mut()).map_err(|error| AgeError::Random(error.to_string()))?;
    Ok(*bytes)
}
