// SPDX-License-Identifier: GPL-2.0

//! Keys, signatures in minisign's format, and what makes a release trusted.
//!
//! Whoever fetches images needs [`Policy`] and nothing secret; the feature `sign` adds secret keys. The real `minisign`
//! verifies what is signed here, with the keys that are made here, and the other way round.

mod key;
mod keys;
mod policy;
#[cfg(feature = "sign")]
mod secret;
mod signature;
mod signer;

pub use key::{KeyId, ParseKeyError, PublicKey};
pub use keys::{Keys, KeysError, KEYS_DIRECTORY, KEY_SUFFIX};
pub use policy::{now, time, Policy, Terms, TrustError, Trusted};
#[cfg(feature = "sign")]
pub use secret::{LockedKey, SecretKey, SecretKeyError};
pub use signature::{ParseSignatureError, Signature};
pub use signer::{SignError, Signer};
