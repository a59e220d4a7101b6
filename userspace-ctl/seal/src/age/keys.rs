// SPDX-License-Identifier: GPL-2.0

//! Recipients (public keys) and identities (secret keys) of age.

use std::fmt;
use std::str::FromStr;

use bech32::primitives::decode::CheckedHrpstring;
use bech32::{Bech32, Hrp};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::{random, AgeError};

const RECIPIENT: Hrp = Hrp::parse_unchecked("age");
const IDENTITY: Hrp = Hrp::parse_unchecked("age-secret-key-");

/// Whom something is encrypted to: `age1...`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Recipient(pub(super) [u8; 32]);

impl Recipient {
    /// What its copy of a store key is called: a digest of its text, which says as much of it as itself.
    pub fn tag(&self) -> [u8; 16] {
        let digest = blake3::derive_key("pristine 2026-11 sealed recipient", &self.0);
        let mut tag = [0; 16];
        tag.copy_from_slice(&digest[..16]);
        tag
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = bech32::encode::<Bech32>(RECIPIENT, &self.0).map_err(|_| fmt::Error)?;
        f.write_str(&text)
    }
}

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Recipient {
    type Err = AgeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let key = decode(RECIPIENT, text);
        key.map(|key| Recipient(*key))
            .ok_or_else(|| AgeError::Recipient(text.chars().take(80).collect()))
    }
}

/// 32 bytes in Bech32, in one case of letters, of this kind.
fn decode(kind: Hrp, text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let parsed = CheckedHrpstring::new::<Bech32>(text).ok()?;
    // The comparison of kinds ignores case, as Bech32 does.
    if parsed.hrp() != kind {
        return None;
    }
    let bytes: Zeroizing<Vec<u8>> = Zeroizing::new(parsed.byte_iter().collect());
    bytes.as_slice().try_into().ok().map(Zeroizing::new)
}

/// The secret key of a recipient: `AGE-SECRET-KEY-1...`.
#[derive(Clone)]
pub struct Identity(StaticSecret);

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.recipient())
    }
}

impl Identity {
    /// A new identity.
    ///
    /// # Errors
    /// [`AgeError::Random`].
    pub fn generate() -> Result<Self, AgeError> {
        Ok(Identity(StaticSecret::from(random::<32>()?)))
    }

    /// Its recipient.
    pub fn recipient(&self) -> Recipient {
        Recipient(PublicKey::from(&self.0).to_bytes())
    }

    /// Its text, which is secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        let text = bech32::encode_upper::<Bech32>(IDENTITY, self.0.as_bytes());
        // 32 bytes are never too long for Bech32.
        Zeroizing::new(text.unwrap_or_default())
    }

    pub(super) fn secret(&self) -> &StaticSecret {
        &self.0
    }

    fn parse(text: &str) -> Option<Self> {
        // As age does: in capitals alone.
        if text.chars().any(|c| c.is_ascii_lowercase()) {
            return None;
        }
        decode(IDENTITY, text).map(|key| Identity(StaticSecret::from(*key)))
    }
}

/// The identities in a file such as `age-keygen` makes: one a line, with empty lines and comments (`#`).
#[derive(Clone, Debug)]
pub struct Identities(pub Vec<Identity>);

impl FromStr for Identities {
    type Err = AgeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with("age-encryption.org/") || text.starts_with("-----BEGIN AGE") {
            return Err(AgeError::EncryptedIdentity);
        }
        let mut identities = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            identities.push(Identity::parse(text).ok_or(AgeError::Identity { line })?);
        }
        match identities.is_empty() {
            true => Err(AgeError::NoIdentity),
            false => Ok(Identities(identities)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // From age's own documentation and test suite (testkit: the identity of all X25519 vectors).
    const SECRET: &str =
        "AGE-SECRET-KEY-1XMWWC06LY3EE5RYTXM9MFLAZ2U56JJJ36S0MYPDRWSVLUL66MV4QX3S7F6";
    const PUBLIC: &str = "age1xmwwc06ly3ee5rytxm9mflaz2u56jjj36s0mypdrwsvlul66mv4q47ryef";

    #[test]
    fn text_round_trips() {
        let identity = Identity::parse(SECRET).unwrap();
        assert_eq!(identity.to_text().as_str(), SECRET);
        let made = Identity::generate().unwrap();
        let text = made.recipient().to_string();
        assert!(text.starts_with("age1") && text.len() == 62, "{text}");
        assert_eq!(text.parse(), Ok(made.recipient()));
        assert_eq!(
            Identity::parse(&made.to_text()).unwrap().recipient(),
            made.recipient()
        );
        assert!(!format!("{made:?}").contains("SECRET"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for bad in ["", "age1", "ssh-ed25519 AAAA", SECRET, &PUBLIC[..61]] {
            assert!(bad.parse::<Recipient>().is_err(), "{bad}");
        }
        let lower = SECRET.to_lowercase();
        for bad in ["", PUBLIC, &lower, &SECRET[..70]] {
            assert!(Identity::parse(bad).is_none(), "{bad}");
        }
        let file = format!("# made by hand\n\n{SECRET}\n");
        assert_eq!(file.parse::<Identities>().unwrap().0.len(), 1);
        let wrong = format!("# x\n{SECRET}x\n")
            .parse::<Identities>()
            .unwrap_err();
        assert_eq!(wrong, AgeError::Identity { line: 2 });
        assert!(!wrong.to_string().contains("XMWWC"));
        assert!(matches!(
            "#\n".parse::<Identities>(),
            Err(AgeError::NoIdentity)
        ));
        assert!(matches!(
            "age-encryption.org/v1\n".parse::<Identities>(),
            Err(AgeError::EncryptedIdentity)
        ));
    }
}
