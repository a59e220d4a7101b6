// SPDX-License-Identifier: GPL-2.0

//! Sealed manifests and deltas: a head, the content in chunks, a public part, and the digest of all that.
//!
//! The head says which store key it takes. The public part is for who has no key and yet looks after the store: which
//! packs belong to an image, how large that is, and whom it is encrypted to. With the key, all of it is authentic.

use std::fmt::Write;
use std::ops::Range;

use pristine_image::{Digest, FormatError, PackId};

use crate::chunks;
use crate::key::{KeyId, StoreKey};
use crate::pack::{check, DIGEST_LEN};

const MAGIC: [u8; 8] = *b"\x89PRISTE\n";
const VERSION: u32 = 1;
const CHECKED: usize = 128;
/// Bytes in a head.
pub const HEAD_LEN: u64 = 160;
/// The longest public part.
pub const MAX_PUBLIC_LEN: u64 = 64 << 20;
/// The longest content: that of a manifest of the largest image is below it.
const MAX_CONTENT: u64 = 1 << 40;

const WHAT: &str = "the head of an encrypted object";

/// Whether an object begins as a sealed one does.
pub fn is_sealed(start: &[u8]) -> bool {
    start.starts_with(&MAGIC)
}

/// The head of a sealed object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The store key that it takes.
    pub key: KeyId,
    /// Bytes of the content.
    pub len: u64,
    /// Bytes of the public part.
    pub public_len: u64,
    salt: [u8; 32],
    public: Digest,
}

impl Head {
    /// Parses the first [`HEAD_LEN`] bytes of an object.
    ///
    /// # Errors
    /// [`FormatError`]: not a sealed object, newer, truncated or damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some(head) = bytes.first_chunk::<{ HEAD_LEN as usize }>() else {
            return Err(FormatError::Truncated {
                what: WHAT,
                needed: HEAD_LEN - (bytes.len() as u64).min(HEAD_LEN),
                have: bytes.len() as u64,
            });
        };
        let invalid = |why: &str| FormatError::invalid(WHAT, why);
        if !is_sealed(head) {
            return Err(invalid("it does not begin as one does"));
        }
        let version = u32_at(head, 8);
        if version > VERSION {
            return Err(FormatError::NewerVersion {
                found: version,
                supported: VERSION,
            });
        }
        if Digest::of(&head[..CHECKED]).as_bytes()[..] != head[CHECKED..] {
            return Err(FormatError::Checksum(WHAT.to_owned()));
        }
        let features = u32_at(head, 12);
        if features != 0 {
            return Err(FormatError::UnknownFeatures(u64::from(features)));
        }
        let (len, public_len) = (u64_at(head, 16), u64_at(head, 24));
        if version == 0 || head[112..CHECKED] != [0; 16] {
            return Err(invalid("version 0, or a reserved field in use"));
        }
        if len > MAX_CONTENT || public_len > MAX_PUBLIC_LEN {
            return Err(invalid("it claims more than makes sense"));
        }
        Ok(Head {
            len,
            public_len,
            key: KeyId::from_bytes(array_at(head, 32)),
            salt: array_at(head, 48),
            public: Digest::from_bytes(array_at(head, 80)),
        })
    }

    fn checked(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_LEN as usize);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend(0u32.to_le_bytes());
        out.extend(self.len.to_le_bytes());
        out.extend(self.public_len.to_le_bytes());
        out.extend(self.key.as_bytes());
        out.extend(self.salt);
        out.extend(self.public.as_bytes());
        out.resize(CHECKED, 0);
        out
    }

    /// Bytes of the whole object.
    pub fn object_len(&self) -> u64 {
        self.public_range().end + DIGEST_LEN
    }

    /// The bytes of the object that hold a range of the content.
    ///
    /// # Errors
    /// [`FormatError::Truncated`] if the content ends before.
    pub fn range(&self, range: &Range<u64>) -> Result<Range<u64>, FormatError> {
        if range.end > self.len {
            return Err(FormatError::Truncated {
                what: "an encrypted object",
                needed: range.end - self.len,
                have: self.len,
            });
        }
        let stored = chunks::sealed_range(range);
        Ok(HEAD_LEN + stored.start..HEAD_LEN + stored.end)
    }

    /// The bytes of the object that hold the public part.
    pub fn public_range(&self) -> Range<u64> {
        let start = HEAD_LEN + chunks::sealed_len(self.len);
        start..start + self.public_len
    }

    /// Decrypts the bytes of [`Head::range`], of the object with this path.
    ///
    /// # Errors
    /// [`FormatError::Checksum`] for what was not sealed there.
    pub fn open(
        &self,
        key: &StoreKey,
        path: &str,
        range: &Range<u64>,
        stored: &[u8],
    ) -> Result<Vec<u8>, FormatError> {
        let what = "an object";
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let key = key.object_key(path, &self.checked());
        let first = range.start / chunks::CHUNK;
        let mut content = chunks::open(&key, first, stored, what)?;
        let skip = (range.start - first * chunks::CHUNK) as usize;
        let len = range.end.saturating_sub(range.start) as usize;
        if content.len() < skip + len {
            return Err(FormatError::Checksum("an object, which is cut,".to_owned()));
        }
        content.drain(..skip);
        content.truncate(len);
        Ok(content)
    }

    /// Checks the public part and parses it.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn public(&self, bytes: &[u8]) -> Result<Public, FormatError> {
        if bytes.len() as u64 != self.public_len || Digest::of(bytes) != self.public {
            let what = "the public part of an encrypted object";
            return Err(FormatError::Checksum(what.to_owned()));
        }
        Public::parse(bytes)
    }

    /// Checks a whole object as far as that takes no key; returns its public part.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn check_all(bytes: &[u8]) -> Result<(Self, Public), FormatError> {
        let head = Head::parse(bytes)?;
        if bytes.len() as u64 != head.object_len() {
            let why = format!("{} bytes, not {}", bytes.len(), head.object_len());
            return Err(FormatError::invalid("an encrypted object", why));
        }
        check(bytes, "an encrypted object")?;
        let range = head.public_range();
        let public = bytes.get(range.start as usize..range.end as usize);
        let public = head.public(public.unwrap_or_default())?;
        Ok((head, public))
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    if let Some(part) = bytes.get(at..at + N) {
        array.copy_from_slice(part);
    }
    array
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// What everybody may know of a sealed object: text in lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Public {
    /// The image's size in bytes; of deltas none is told.
    pub size: Option<u64>,
    /// Whom it was encrypted to, as text, when it was made.
    pub recipients: Vec<String>,
    /// The packs that it needs, by their names in the store, and their lengths there.
    pub packs: Vec<(PackId, u64)>,
}

impl Public {
    /// The lines.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = String::new();
        if let Some(size) = self.size {
            text.push_str(&format!("size {size}\n"));
        }
        for recipient in &self.recipients {
            text.push_str(&format!("recipient {recipient}\n"));
        }
        for (id, len) in &self.packs {
            // Writing to a string does not fail.
            let _ = writeln!(text, "pack {id} {len}");
        }
        text.into_bytes()
    }

    /// Parses the lines; those that begin with an unknown word are ignored.
    ///
    /// # Errors
    /// [`FormatError::Invalid`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let invalid =
            |why: String| FormatError::invalid("the public part of an encrypted object", why);
        let text = std::str::from_utf8(bytes).map_err(|error| invalid(error.to_string()))?;
        let mut public = Public::default();
        // Not `lines()`, which takes a carriage return for a part of the end.
        for (number, line) in (1..).zip(text.split_terminator('\n')) {
            let wrong = || invalid(format!("line {number} is wrong"));
            let (word, rest) = line.split_once(' ').ok_or_else(wrong)?;
            match word {
                "size" => public.size = Some(rest.parse().map_err(|_| wrong())?),
                // It is shown to people: nothing that a terminal would obey.
                "recipient" if rest.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                    public.recipients.push(rest.to_owned());
                }
                "recipient" => return Err(wrong()),
                "pack" => {
                    let (id, len) = rest.split_once(' ').ok_or_else(wrong)?;
                    let id = id.parse().map_err(|_| wrong())?;
                    public.packs.push((id, len.parse().map_err(|_| wrong())?));
                }
                _ => (),
            }
        }
        Ok(public)
    }
}

/// Bytes of an object with so much content and this public part.
pub fn sealed_len(content: u64, public: &Public) -> u64 {
    HEAD_LEN + chunks::sealed_len(content) + public.encode().len() as u64 + DIGEST_LEN
}

/// Seals the object with this path.
///
/// # Errors
/// [`FormatError::Invalid`] if it is too long.
pub fn seal(
    key: &StoreKey,
    path: &str,
    public: &Public,
    content: &[u8],
) -> Result<Vec<u8>, FormatError> {
    let public = public.encode();
    if public.len() as u64 > MAX_PUBLIC_LEN || content.len() as u64 > MAX_CONTENT {
        return Err(FormatError::invalid(
            "an encrypted object",
            "it would be too long",
        ));
    }
    let public_digest = Digest::of(&public);
    let head = Head {
        key: key.id(),
        len: content.len() as u64,
        public_len: public.len() as u64,
        salt: key.salt(path, public_digest.as_bytes(), content),
        public: public_digest,
    };
    let checked = head.checked();
    let mut out = checked.clone();
    out.extend(Digest::of(&checked).as_bytes());
    out.extend(chunks::seal(&key.object_key(path, &checked), content)?);
    out.extend(public);
    let digest = Digest::of(&out);
    out.extend(digest.as_bytes());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "images/x.manifest";

    fn public() -> Public {
        Public {
            size: Some(8192),
            recipients: vec!["age1x".to_owned()],
            packs: vec![(PackId::from_bytes([5; 32]), 77)],
        }
    }

    #[test]
    fn recipients_are_words() {
        for bad in ["age1x\r", "age1x y", "\x1b[2J", "\u{202e}age1x"] {
            let text = format!("size 4096\nrecipient {bad}\n");
            assert!(Public::parse(text.as_bytes()).is_err(), "{bad:?}");
        }
        assert_eq!(Public::parse(&public().encode()).unwrap(), public());
    }

    #[test]
    fn objects_round_trip() {
        let key = StoreKey::from_bytes([9; 32]);
        let content: Vec<u8> = (0..10_000).map(|n| (n % 239) as u8).collect();
        let sealed = seal(&key, PATH, &public(), &content).unwrap();
        assert!(is_sealed(&sealed));
        assert_eq!(sealed.len() as u64, sealed_len(10_000, &public()));
        let (head, found) = Head::check_all(&sealed).unwrap();
        assert_eq!((head.key, head.len, found), (key.id(), 10_000, public()));
        for range in [0..10_000, 0..1, 4095..4097, 9_999..10_000, 5..5] {
            let at = head.range(&range).unwrap();
            let stored = &sealed[at.start as usize..at.end as usize];
            let opened = head.open(&key, PATH, &range, stored).unwrap();
            assert_eq!(opened, content[range.start as usize..range.end as usize]);
        }
        assert!(head.range(&(0..10_001)).is_err());
        // The same again is the same, so that putting it again changes nothing.
        assert_eq!(seal(&key, PATH, &public(), &content).unwrap(), sealed);
        // A key and a nonce never meet two contents.
        let other = seal(&key, PATH, &Public::default(), &content).unwrap();
        assert_ne!(other[160..4256], sealed[160..4256]);
    }

    #[test]
    fn nothing_opens_elsewhere_or_with_another_head() {
        let key = StoreKey::from_bytes([9; 32]);
        let sealed = seal(&key, PATH, &public(), &[1; 5000]).unwrap();
        let (head, _) = Head::check_all(&sealed).unwrap();
        let at = head.range(&(0..5000)).unwrap();
        let stored = &sealed[at.start as usize..at.end as usize];
        assert!(head.open(&key, PATH, &(0..5000), stored).is_ok());
        assert!(head
            .open(&key, "images/y.manifest", &(0..5000), stored)
            .is_err());
        let stranger = StoreKey::from_bytes([8; 32]);
        assert!(head.open(&stranger, PATH, &(0..5000), stored).is_err());
        // Whoever serves it can make the head's own check right again.
        for at in [16, 24, 32, 48, 80] {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(Head::parse(&bad).is_err(), "byte {at}");
            let check = Digest::of(&bad[..CHECKED]);
            bad[CHECKED..HEAD_LEN as usize].copy_from_slice(check.as_bytes());
            let forged = Head::parse(&bad).unwrap();
            assert!(
                forged.open(&key, PATH, &(0..4999), stored).is_err(),
                "byte {at}"
            );
        }
    }

    #[test]
    fn damage_shows_without_a_key() {
        let key = StoreKey::from_bytes([9; 32]);
        let sealed = seal(&key, PATH, &public(), &[1; 5000]).unwrap();
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 4;
            assert!(Head::check_all(&bad).is_err(), "byte {at}");
        }
        for len in [0, 7, 159, 160, sealed.len() - 1] {
            assert!(Head::check_all(&sealed[..len]).is_err());
        }
        for bad in ["pack", "pack x 1", "size x", "nothing", "pack  1"] {
            assert!(Public::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert_eq!(Public::parse(b"later things\n").unwrap(), Public::default());
    }
}
