// SPDX-License-Identifier: GPL-2.0

//! Public keys, and the ids that tell them apart.

use std::fmt;
use std::str::FromStr;

use base64::engine::general_purpose::STANDARD;
use base64::Engine;

/// The number of a key, which its signatures carry. Chance alone keeps two keys from having the same, so it says which
/// key to try, and proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub [u8; 8]);

impl fmt::Display for KeyId {
    /// As minisign shows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", u64::from_le_bytes(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no public key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a public key of minisign's: {0}")]
pub struct ParseKeyError(pub(crate) &'static str);

/// A public key: who has its secret key can sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    base64: String,
    id: KeyId,
    label: Option<String>,
    key: minisign_verify::PublicKey,
}

impl PublicKey {
    /// Its id.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The key as one word, as `minisign -P` takes it: 56 characters, `RW...`.
    pub fn base64(&self) -> &str {
        &self.base64
    }

    /// What people call it, if they do: a file's name, say.
    pub fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }

    /// The same key with a label.
    pub fn with_label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// The key as a file that `minisign -p` takes.
    pub fn to_file(&self) -> String {
        let Self { id, base64, .. } = self;
        format!("untrusted comment: minisign public key {id}\n{base64}\n")
    }

    /// The key for the library that verifies.
    pub(crate) fn inner(&self) -> &minisign_verify::PublicKey {
        &self.key
    }
}

impl FromStr for PublicKey {
    type Err = ParseKeyError;

    /// Takes the one word, or a `.pub` file, which has a comment in the line before.
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        let mut word = lines.next().ok_or(ParseKeyError("it is empty"))?;
        if word.starts_with("untrusted comment:") {
            word = lines
                .next()
                .ok_or(ParseKeyError("nothing follows the comment"))?;
            // With a password and without: "EdScB2", "Ed\0\0B2".
            if word.starts_with("RWRTY0Iy") || word.starts_with("RWQAAEIy") {
                return Err(ParseKeyError("it is a secret key"));
            }
        }
        if lines.next().is_some() {
            return Err(ParseKeyError("it has more lines than a key"));
        }
        let bytes = STANDARD.decode(word);
        let bytes = bytes.map_err(|_| ParseKeyError("it is not base64"))?;
        let [b'E', b'd', rest @ ..] = bytes.as_slice() else {
            return Err(ParseKeyError("it is not an Ed25519 key"));
        };
        let id = rest
            .first_chunk()
            .filter(|_| rest.len() == 40)
            .ok_or(ParseKeyError("it has the wrong length"))?;
        let key = minisign_verify::PublicKey::from_base64(word);
        let key = key.map_err(|_| ParseKeyError("it cannot be decoded"))?;
        Ok(PublicKey {
            base64: word.to_owned(),
            id: KeyId(*id),
            label: None,
            key,
        })
    }
}

impl fmt::Display for PublicKey {
    /// The id, with the label if it has one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.label {
            Some(label) => write!(f, "{} ({label})", self.id),
            None => write!(f, "{}", self.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";

    #[test]
    fn keys_are_read_and_shown_as_minisign_does() {
        let key: PublicKey = KEY.parse().unwrap();
        assert_eq!(key.id().to_string(), "E7620F1842B4E81F");
        assert_eq!(key.base64(), KEY);
        assert_eq!(key.to_file().parse(), Ok(key.clone()));
        assert_eq!(
            key.with_label("mill").to_string(),
            "E7620F1842B4E81F (mill)"
        );
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let comment = "untrusted comment: x";
        for bad in [
            "",
            "x",
            comment,
            &KEY[1..],
            &KEY[..55],
            &format!("{KEY}AAAA"),
            &format!("{KEY}\n{KEY}"),
            &format!("{comment}\n{KEY}\n{KEY}"),
            &KEY.replace("RW", "RX"),
            &KEY.replace('Q', "\u{e9}"),
        ] {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad}");
        }
        let secret = format!("{comment}\nRWRTY0Iyabc\n").parse::<PublicKey>();
        assert!(secret.unwrap_err().to_string().contains("secret"));
    }
}
