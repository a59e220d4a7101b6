// SPDX-License-Identifier: GPL-2.0

//! Keys, signatures in minisign's format, and what makes a release trusted.

mod key;
mod signature;
mod signer;

pub use key::{KeyId, ParseKeyError, PublicKey};
pub use signature::{ParseSignatureError, Signature};
pub use signer::{SignError, Signer};
