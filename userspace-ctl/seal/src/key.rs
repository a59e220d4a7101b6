// SPDX-License-Identifier: GPL-2.0

//! The store key, and what follows from it.

use std::fmt;
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::age::{self, AgeError, Identity, Recipient};

/// First words of what a wrapped store key says.
const TEXT: &str = "pristine-store-key 1 ";

const ID: &str = "pristine 2026-11 sealed store key id";
const BLINDING: &str = "pristine 2026-11 sealed image blinding";
const PACK_NAME: &str = "pristine 2026-11 sealed pack name";
const PACK_KEY: &str = "pristine 2026-11 sealed pack key";
const OBJECT_SALT: &str = "pristine 2026-11 sealed object salt";
const OBJECT_KEY: &str = "pristine 2026-11 sealed object key";

/// What a store key is called: it says nothing of the key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId([u8; 16]);

impl KeyId {
    /// The id from its bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        KeyId(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not 32 lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not 32 lower-case hexadecimal digits")]
pub struct ParseKeyIdError(String);

impl FromStr for KeyId {
    type Err = ParseKeyIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = unhex(text).ok_or_else(|| ParseKeyIdError(text.chars().take(80).collect()))?;
        Ok(KeyId(bytes))
    }
}

/// `2 * N` lower-case hexadecimal digits.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (value(pair[0])? << 4) | value(pair[1])?;
    }
    Some(bytes)
}

/// A wrapped store key that yields none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnwrapError {
    /// The file is no use to these identities, or damaged.
    #[error(transparent)]
    Age(#[from] AgeError),
    /// It holds something else, or another key.
    #[error("it holds no store key {expected}")]
    OtherKey {
        /// The key that should be there.
        expected: KeyId,
    },
}

/// The key of what is sealed in a store.
#[derive(Clone)]
pub struct StoreKey(Zeroizing<[u8; 32]>);

impl fmt::Debug for StoreKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreKey({})", self.id())
    }
}

impl StoreKey {
    /// A new key.
    ///
    /// # Errors
    /// [`AgeError::Random`] if the system has no random numbers.
    pub fn generate() -> Result<Self, AgeError> {
        Ok(StoreKey(Zeroizing::new(age::random()?)))
    }

    /// A key from its bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        StoreKey(Zeroizing::new(bytes))
    }

    fn derive(&self, context: &str, data: &[&[u8]]) -> [u8; 32] {
        let key = Zeroizing::new(blake3::derive_key(context, self.0.as_ref()));
        let mut hasher = blake3::Hasher::new_keyed(&key);
        for part in data {
            hasher.update(part);
        }
        *hasher.finalize().as_bytes()
    }

    /// What it is called.
    pub fn id(&self) -> KeyId {
        let mut id = [0; 16];
        id.copy_from_slice(&self.derive(ID, &[])[..16]);
        KeyId(id)
    }

    /// The number that goes into the ids of images: without it nobody can tell what an id stands for.
    pub fn blinding(&self) -> [u8; 32] {
        self.derive(BLINDING, &[])
    }

    /// What a pack is called in the store; `pack` is the digest of its content.
    pub fn pack_name(&self, pack: &[u8; 32]) -> [u8; 32] {
        self.derive(PACK_NAME, &[pack])
    }

    /// The key of a pack; `pack` is the digest of its content, so that a key has one content.
    pub(crate) fn pack_key(&self, pack: &[u8; 32]) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.derive(PACK_KEY, &[pack]))
    }

    /// A number that stands for all of an object's content, public part included, and says nothing of it.
    pub(crate) fn salt(&self, path: &str, public: &[u8; 32], content: &[u8]) -> [u8; 32] {
        let path_len = (path.len() as u64).to_le_bytes();
        self.derive(OBJECT_SALT, &[&path_len, path.as_bytes(), public, content])
    }

    /// The key of an object with this path and head. As the head has the salt, a key has one content.
    pub(crate) fn object_key(&self, path: &str, head: &[u8]) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.derive(OBJECT_KEY, &[head, path.as_bytes()]))
    }

    /// An age file with the key, for all of `recipients`.
    ///
    /// # Errors
    /// [`AgeError::Random`], and [`AgeError::Recipient`] for one that nothing can be encrypted to.
    pub fn wrap(&self, recipients: &[Recipient]) -> Result<Vec<u8>, AgeError> {
        let mut text = Zeroizing::new(String::with_capacity(TEXT.len() + 65));
        text.push_str(TEXT);
        for byte in self.0.iter() {
            text.push_str(&format!("{byte:02x}"));
        }
        text.push('\n');
        age::encrypt(recipients, text.as_bytes())
    }

    /// The key `id` from an age file, by one of `identities`.
    ///
    /// # Errors
    /// [`UnwrapError`].
    pub fn unwrap(bytes: &[u8], identities: &[Identity], id: KeyId) -> Result<Self, UnwrapError> {
        let text = Zeroizing::new(age::decrypt(bytes, identities)?);
        let key = std::str::from_utf8(&text)
            .ok()
            .and_then(|text| text.strip_prefix(TEXT))
            .and_then(|rest| unhex(rest.trim_end()))
            .map(StoreKey::from_bytes);
        key.filter(|key| key.id() == id)
            .ok_or(UnwrapError::OtherKey { expected: id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_a_key_differs() {
        let (one, other) = (StoreKey::from_bytes([1; 32]), StoreKey::from_bytes([2; 32]));
        assert_ne!(one.id(), other.id());
        assert_ne!(one.blinding(), other.blinding());
        let pack = [7; 32];
        let all = [
            one.pack_name(&pack),
            other.pack_name(&pack),
            one.pack_name(&[8; 32]),
            *one.pack_key(&pack),
            *one.object_key("images/x", b"head"),
            *one.object_key("images/y", b"head"),
            one.salt("a", &pack, b"bc"),
            one.salt("ab", &pack, b"c"),
        ];
        for (index, key) in all.iter().enumerate() {
            assert!(!all[..index].contains(key));
        }
        assert_eq!(one.id().to_string().parse(), Ok(one.id()));
        assert!(!format!("{one:?}").contains("0101"));
    }

    #[test]
    fn a_wrapped_key_is_the_one_that_was_named() {
        let identity = Identity::generate().unwrap();
        let key = StoreKey::generate().unwrap();
        let file = key.wrap(&[identity.recipient()]).unwrap();
        let identities = [identity];
        assert_eq!(
            StoreKey::unwrap(&file, &identities, key.id()).unwrap().0,
            key.0
        );
        let other = StoreKey::generate().unwrap().id();
        assert!(matches!(
            StoreKey::unwrap(&file, &identities, other),
            Err(UnwrapError::OtherKey { .. })
        ));
        let text = age::encrypt(&[identities[0].recipient()], b"hello").unwrap();
        assert!(StoreKey::unwrap(&text, &identities, key.id()).is_err());
    }
}
