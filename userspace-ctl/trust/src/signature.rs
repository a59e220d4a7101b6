// SPDX-License-Identifier: GPL-2.0

//! Signatures in minisign's format, the content of a `.minisig` file:
//!
//! ```text
//! untrusted comment: signature from minisign secret key
//! base64(algorithm, key id, signature of the text or of its BLAKE2b-512)
//! trusted comment: timestamp:1795253000
//! base64(signature of the signature and the trusted comment)
//! ```

use std::fmt;
use std::str::FromStr;

use base64::engine::general_purpose::STANDARD;
use base64::Engine;

use crate::key::{KeyId, PublicKey};

/// Text that is no signature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a signature of minisign's: {0}")]
pub struct ParseSignatureError(&'static str);

/// A signature. It proves nothing before [`Signature::verify`].
#[derive(Clone)]
pub struct Signature {
    id: KeyId,
    inner: minisign_verify::Signature,
}

impl Signature {
    /// The id of the key that it claims to be made with.
    pub fn key_id(&self) -> KeyId {
        self.id
    }

    /// The trusted comment, which the signature covers as well.
    pub fn trusted_comment(&self) -> &str {
        self.inner.trusted_comment()
    }

    /// Whether it is `key`'s signature of `text`, of the text's hash (as minisign makes them) or of the text itself (as
    /// it did until 2021).
    pub fn verify(&self, key: &PublicKey, text: &[u8]) -> bool {
        key.inner().verify(text, &self.inner, true).is_ok()
    }
}

impl FromStr for Signature {
    type Err = ParseSignatureError;

    fn from_str(text: &str) -> Result<Self, ParseSignatureError> {
        let mut lines = text.lines();
        let mut next = || lines.next().ok_or(ParseSignatureError("it is truncated"));
        let (comment, first, trusted, _) = (next()?, next()?, next()?, next()?);
        if !comment.starts_with("untrusted comment: ") {
            return Err(ParseSignatureError("it has no untrusted comment"));
        }
        if !trusted.starts_with("trusted comment: ") {
            return Err(ParseSignatureError("it has no trusted comment"));
        }
        if lines.next().is_some() {
            return Err(ParseSignatureError("it has more than four lines"));
        }
        let bytes = STANDARD.decode(first);
        let bytes = bytes.map_err(|_| ParseSignatureError("it is not base64"))?;
        let id = bytes.get(2..10).and_then(|id| id.try_into().ok());
        let id = id.ok_or(ParseSignatureError("it is too short"))?;
        let inner = minisign_verify::Signature::decode(text)
            .map_err(|_| ParseSignatureError("it cannot be decoded"))?;
        Ok(Signature {
            id: KeyId(id),
            inner,
        })
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let comment = self.trusted_comment();
        write!(f, "Signature({}, {comment:?})", self.id)
    }
}
