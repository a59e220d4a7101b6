// SPDX-License-Identifier: GPL-2.0

//! Files of age with little in them.
//!
//! The format is <https://age-encryption.org/v1>: a text header with a stanza for each recipient, in which the file's key
//! is encrypted, its HMAC, and then the content in chunks of 64 KiB. Here there is one chunk, the last one.

use base64::prelude::{Engine, BASE64_STANDARD_NO_PAD};
use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::keys::{Identity, Recipient};
use super::{random, AgeError};

/// The longest file that is read: of a thousand recipients.
pub const MAX_LEN: u64 = 256 << 10;

const MAGIC: &str = "age-encryption.org/v1\n";
const X25519_INFO: &[u8] = b"age-encryption.org/v1/X25519";
/// Bytes of the key that a file is encrypted with.
const FILE_KEY: usize = 16;
/// Characters of a full line of a stanza's body.
const LINE: usize = 64;
/// A file of one chunk has so much content at most.
const CHUNK: usize = 64 << 10;
const NONCE: usize = 16;

fn derive(key: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut derived = Zeroizing::new([0; 32]);
    // It fails for more than 255 hashes only.
    let _ = Hkdf::<Sha256>::new(Some(salt), key).expand(info, derived.as_mut());
    derived
}

fn header_mac(file_key: &[u8], header: &[u8]) -> Result<Hmac<Sha256>, AgeError> {
    let key = derive(file_key, &[], b"header");
    let mac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(key.as_ref());
    let mut mac = mac.map_err(|_| AgeError::Damaged)?;
    mac.update(header);
    Ok(mac)
}

/// The nonce of the only chunk: number 0, and the last one.
fn last_chunk() -> Nonce {
    let mut nonce = Nonce::default();
    nonce[11] = 1;
    nonce
}

fn wrapping_key(
    secret: &StaticSecret,
    other: &[u8; 32],
    share: &[u8; 32],
    recipient: &[u8; 32],
) -> Option<Zeroizing<[u8; 32]>> {
    let shared = secret.diffie_hellman(&PublicKey::from(*other));
    // A point of low order, which makes a secret that everybody knows.
    if !shared.was_contributory() {
        return None;
    }
    let mut salt = [0; 64];
    salt[..32].copy_from_slice(share);
    salt[32..].copy_from_slice(recipient);
    Some(derive(shared.as_bytes(), &salt, X25519_INFO))
}

/// Encrypts a little text to all of `recipients`.
///
/// # Errors
/// [`AgeError::Random`]; [`AgeError::Recipient`] for a key of low order; [`AgeError::Format`] for no recipients, and for
/// more than 64 KiB.
pub fn encrypt(recipients: &[Recipient], content: &[u8]) -> Result<Vec<u8>, AgeError> {
    if recipients.is_empty() || content.len() > CHUNK {
        return Err(AgeError::Format(
            "it would have no recipient, or too much in it",
        ));
    }
    let file_key = Zeroizing::new(random::<FILE_KEY>()?);
    let mut header = MAGIC.to_owned();
    for recipient in recipients {
        let secret = StaticSecret::from(random::<32>()?);
        let share = PublicKey::from(&secret).to_bytes();
        let key = wrapping_key(&secret, &recipient.0, &share, &recipient.0)
            .ok_or_else(|| AgeError::Recipient(recipient.to_string()))?;
        let body = ChaCha20Poly1305::new((&*key).into())
            .encrypt(&Nonce::default(), file_key.as_ref())
            .map_err(|_| AgeError::Damaged)?;
        // 32 bytes are one line, shorter than a full one.
        header.push_str(&format!(
            "-> X25519 {}\n{}\n",
            BASE64_STANDARD_NO_PAD.encode(share),
            BASE64_STANDARD_NO_PAD.encode(body)
        ));
    }
    header.push_str("---");
    let mac = header_mac(file_key.as_ref(), header.as_bytes())?.finalize();
    let mut file = header.into_bytes();
    let mac = BASE64_STANDARD_NO_PAD.encode(mac.into_bytes());
    file.extend(format!(" {mac}\n").into_bytes());
    let nonce = random::<NONCE>()?;
    file.extend(nonce);
    let key = derive(file_key.as_ref(), &nonce, b"payload");
    let sealed = ChaCha20Poly1305::new((&*key).into()).encrypt(&last_chunk(), content);
    file.extend(sealed.map_err(|_| AgeError::Damaged)?);
    Ok(file)
}

/// Decrypts a file by one of `identities`; it may be armored.
///
/// # Errors
/// [`AgeError::Format`], [`AgeError::NotForUs`], [`AgeError::Damaged`].
pub fn decrypt(file: &[u8], identities: &[Identity]) -> Result<Vec<u8>, AgeError> {
    if file.len() as u64 > MAX_LEN {
        return Err(AgeError::Format("it is too long for a key"));
    }
    let binary;
    let file = match file.starts_with(b"-----BEGIN") {
        true => {
            binary = dearmor(file).ok_or(AgeError::Format("its armor is wrong"))?;
            &binary
        }
        false => file,
    };
    let header = Header::parse(file)?;
    let file_key = header.file_key(identities).ok_or(AgeError::NotForUs)?;
    let mac = header_mac(file_key.as_ref(), header.covered)?;
    mac.verify_slice(&header.mac)
        .map_err(|_| AgeError::Damaged)?;
    let (nonce, sealed) = header
        .payload
        .split_at_checked(NONCE)
        .ok_or(AgeError::Format("it is cut"))?;
    let key = derive(file_key.as_ref(), nonce, b"payload");
    ChaCha20Poly1305::new((&*key).into())
        .decrypt(&last_chunk(), sealed)
        .map_err(|_| AgeError::Damaged)
}

/// What age's `-a` makes: Base64 in lines between two others.
fn dearmor(file: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(file).ok()?.trim();
    let inner = text
        .strip_prefix("-----BEGIN AGE ENCRYPTED FILE-----")?
        .strip_suffix("-----END AGE ENCRYPTED FILE-----")?;
    let joined: String = inner.split_whitespace().collect();
    BASE64_STANDARD_NO_PAD
        .decode(joined.trim_end_matches('='))
        .ok()
}

struct Header<'a> {
    /// The encrypted file keys of X25519 stanzas, each with the share of who encrypted it.
    stanzas: Vec<([u8; 32], Vec<u8>)>,
    covered: &'a [u8],
    mac: [u8; 32],
    payload: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, AgeError> {
        let bad = |why| AgeError::Format(why);
        let mut at = MAGIC.len();
        if !file.starts_with(MAGIC.as_bytes()) {
            return Err(bad("it does not begin as one of version 1 does"));
        }
        let mut stanzas = Vec::new();
        loop {
            let (line, next) = line(file, at).ok_or(bad("its header is cut"))?;
            if let Some(mac) = line.strip_prefix("--- ") {
                let mac = BASE64_STANDARD_NO_PAD.decode(mac).ok();
                return Ok(Header {
                    stanzas,
                    covered: &file[..at + 3],
                    mac: mac
                        .and_then(|mac| mac.try_into().ok())
                        .ok_or(bad("its header has no MAC"))?,
                    payload: &file[next..],
                });
            }
            let words = line.strip_prefix("-> ").ok_or(bad("its header is wrong"))?;
            let (body, next) = body(file, next).ok_or(bad("a recipient's part is wrong"))?;
            at = next;
            // Those of other kinds are for others.
            if let Some(share) = words.strip_prefix("X25519 ") {
                let share = BASE64_STANDARD_NO_PAD.decode(share).ok();
                let share = share.and_then(|share| share.try_into().ok());
                stanzas.push((share.ok_or(bad("a recipient's part is wrong"))?, body));
            }
        }
    }

    fn file_key(&self, identities: &[Identity]) -> Option<Zeroizing<[u8; FILE_KEY]>> {
        let all = identities
            .iter()
            .flat_map(|identity| self.stanzas.iter().map(move |stanza| (identity, stanza)));
        all.into_iter().find_map(|(identity, (share, body))| {
            let recipient = identity.recipient().0;
            let key = wrapping_key(identity.secret(), share, share, &recipient)?;
            let opened =
                ChaCha20Poly1305::new((&*key).into()).decrypt(&Nonce::default(), body.as_slice());
            let opened = Zeroizing::new(opened.ok()?);
            opened.as_slice().try_into().ok().map(Zeroizing::new)
        })
    }
}

/// The line at a place, without its end, and where the next one begins.
fn line(file: &[u8], at: usize) -> Option<(&str, usize)> {
    let rest = file.get(at..)?;
    let len = rest.iter().position(|&byte| byte == b'\n')?;
    Some((std::str::from_utf8(&rest[..len]).ok()?, at + len + 1))
}

/// The body of a stanza: full lines, and one that is not full.
fn body(file: &[u8], mut at: usize) -> Option<(Vec<u8>, usize)> {
    let mut text = String::new();
    loop {
        let (line, next) = line(file, at)?;
        if line.len() > LINE {
            return None;
        }
        text.push_str(line);
        at = next;
        if line.len() < LINE {
            return Some((BASE64_STANDARD_NO_PAD.decode(text).ok()?, at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identities(count: usize) -> Vec<Identity> {
        (0..count).map(|_| Identity::generate().unwrap()).collect()
    }

    #[test]
    fn each_recipient_opens_it_and_nobody_else() {
        let all = identities(3);
        let recipients = [all[0].recipient(), all[1].recipient()];
        let file = encrypt(&recipients, b"secret").unwrap();
        for identity in &all[..2] {
            assert_eq!(
                decrypt(&file, std::slice::from_ref(identity)).unwrap(),
                b"secret"
            );
        }
        assert_eq!(decrypt(&file, &all[2..]), Err(AgeError::NotForUs));
        assert_eq!(decrypt(&file, &[]), Err(AgeError::NotForUs));
        assert_eq!(decrypt(&file, &all).unwrap(), b"secret");
        assert!(encrypt(&[], b"secret").is_err());
    }

    #[test]
    fn no_changed_or_cut_file_opens() {
        let all = identities(1);
        let file = encrypt(&[all[0].recipient()], b"secret").unwrap();
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(decrypt(&bad, &all).is_err(), "byte {at}");
            assert!(decrypt(&file[..at], &all).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn stanzas_of_other_kinds_are_skipped() {
        // Not by the MAC, which is wrong then: parsing gets past them.
        let all = identities(1);
        let file = encrypt(&[all[0].recipient()], b"secret").unwrap();
        let mut odd = MAGIC.as_bytes().to_vec();
        let full = "A".repeat(64);
        odd.extend(format!("-> grease x y z\n{full}\n{full}\n\n").into_bytes());
        odd.extend(&file[MAGIC.len()..]);
        let header = Header::parse(&odd).unwrap();
        assert_eq!(header.stanzas.len(), 1);
        assert_eq!(decrypt(&odd, &all), Err(AgeError::Damaged));
    }
}
