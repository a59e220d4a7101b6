// SPDX-License-Identifier: GPL-2.0

//! Whoever can sign: a secret key in a file, or anything else that makes minisign's signatures.

use std::fmt::Debug;

use crate::key::KeyId;

/// A signature could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot sign with key {key}: {why}")]
pub struct SignError {
    /// The key.
    pub key: KeyId,
    /// What went wrong.
    pub why: String,
}

/// Makes signatures.
pub trait Signer: Debug + Send + Sync {
    /// A signature of `text`: the four lines of a `.minisig` file, each with its end. It covers `comment` too.
    ///
    /// # Errors
    /// [`SignError`].
    fn sign(&self, text: &[u8], comment: &str) -> Result<String, SignError>;

    /// The id of the key.
    fn key_id(&self) -> KeyId;
}
