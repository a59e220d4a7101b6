// SPDX-License-Identifier: GPL-2.0

//! Secret keys: making them, keeping them in files of minisign's, and signing.

use std::fmt;
use std::io::Cursor;

use base64::engine::general_purpose::STANDARD;
use base64::Engine;
use minisign::{KeyPair, SecretKeyBox};

use crate::key::{KeyId, PublicKey};
use crate::signature::Signature;
use crate::signer::{SignError, Signer};

/// What minisign writes over the signatures that it makes.
const SIGNATURE_COMMENT: &str = "signature from pristine secret key";

/// A secret key cannot be made or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SecretKeyError {
    /// It is no secret key of minisign's.
    #[error("not a secret key of minisign's: {0}")]
    NotAKey(String),
    /// It is protected by a password.
    #[error("the key is protected by a password, and none was given")]
    NeedsPassword,
    /// The password is wrong, or the file is damaged.
    #[error("wrong password, or a damaged key")]
    WrongPassword,
    /// A key cannot be made.
    #[error("cannot make a key: {0}")]
    Make(String),
}

/// A secret key as it is in a file, perhaps still protected by a password.
#[derive(Clone)]
pub struct LockedKey {
    text: String,
    bytes: Vec<u8>,
    encrypted: bool,
    /// As minisign writes keys without a password.
    no_checksum: bool,
}

/// The checksum is the end of a key.
const CHECKSUM_LEN: usize = 32;

fn not_a_key(error: minisign::PError) -> SecretKeyError {
    SecretKeyError::NotAKey(error.to_string())
}

impl LockedKey {
    /// Reads the content of a file.
    ///
    /// # Errors
    /// [`SecretKeyError::NotAKey`].
    pub fn parse(text: &str) -> Result<Self, SecretKeyError> {
        let not = |why: &str| SecretKeyError::NotAKey(why.to_owned());
        let mut lines = text.lines();
        let (Some(comment), Some(key)) = (lines.next(), lines.next()) else {
            return Err(not("it has less than two lines"));
        };
        if !comment.starts_with("untrusted comment:") {
            return Err(not("it does not begin with \"untrusted comment:\""));
        }
        let bytes = STANDARD.decode(key.trim());
        let bytes = bytes.map_err(|_| not("its second line is not base64"))?;
        let encrypted = match bytes.get(..4) {
            Some(b"EdSc") => true,
            Some(b"Ed\0\0") => false,
            _ if bytes.len() == 42 => return Err(not("it is a public key")),
            _ => return Err(not("its algorithm is not known")),
        };
        let checksum = bytes.len().checked_sub(CHECKSUM_LEN);
        let checksum = checksum.and_then(|at| bytes.get(at..)).unwrap_or_default();
        Ok(LockedKey {
            text: format!("{comment}\n{}\n", key.trim()),
            encrypted,
            no_checksum: checksum.iter().all(|byte| *byte == 0),
            bytes,
        })
    }

    /// Whether it takes a password to use it.
    pub fn needs_password(&self) -> bool {
        self.encrypted
    }

    /// The key, ready to sign. With a password this takes a second and tens of megabytes of memory, by design; a key made
    /// by minisign itself takes a gigabyte.
    ///
    /// # Errors
    /// [`SecretKeyError`].
    pub fn unlock(self, password: Option<&str>) -> Result<SecretKey, SecretKeyError> {
        let locked = SecretKeyBox::from(self.text);
        let secret = match (self.encrypted, password) {
            (true, None) => return Err(SecretKeyError::NeedsPassword),
            (true, Some(password)) => locked
                .into_secret_key(Some(password.to_owned()))
                .map_err(|_| SecretKeyError::WrongPassword)?,
            (false, _) if self.no_checksum => {
                minisign::SecretKey::from_bytes(&self.bytes).map_err(not_a_key)?
            }
            (false, _) => locked.into_unencrypted_secret_key().map_err(not_a_key)?,
        };
        SecretKey::new(secret)
    }
}

/// A secret key, ready to sign.
pub struct SecretKey {
    secret: minisign::SecretKey,
    public: PublicKey,
}

impl SecretKey {
    fn new(secret: minisign::SecretKey) -> Result<Self, SecretKeyError> {
        let public = minisign::PublicKey::from_secret_key(&secret).map_err(not_a_key)?;
        let public = public.to_base64().parse();
        let public = public.map_err(|e| SecretKeyError::NotAKey(format!("{e}")))?;
        let key = SecretKey { secret, public };
        // There may have been no checksum, and nothing would verify what a damaged key signs.
        let trial = key.sign(b"trial", "trial");
        let signature: Option<Signature> = trial.ok().and_then(|text| text.parse().ok());
        match signature.filter(|s| s.verify(&key.public, b"trial")) {
            Some(_) => Ok(key),
            None => Err(SecretKeyError::NotAKey("it is damaged".to_owned())),
        }
    }

    /// Makes a key. Gives also the content of the file to keep it in, protected by the password if there is one.
    ///
    /// # Errors
    /// [`SecretKeyError::Make`].
    pub fn generate(password: Option<&str>) -> Result<(Self, String), SecretKeyError> {
        let make = |error: minisign::PError| SecretKeyError::Make(error.to_string());
        let (pair, kind) = match password {
            Some("") => return Err(SecretKeyError::Make("the password is empty".to_owned())),
            Some(password) => {
                let pair = KeyPair::generate_encrypted_keypair(Some(password.to_owned()));
                (pair, "encrypted secret key")
            }
            None => (KeyPair::generate_unencrypted_keypair(), "secret key"),
        };
        let KeyPair { pk, sk } = pair.map_err(make)?;
        let public = pk.to_base64().parse::<PublicKey>();
        let public = public.map_err(|error| SecretKeyError::Make(error.to_string()))?;
        let comment = format!("pristine {kind} {}", public.id());
        let text = sk.to_box(Some(&comment)).map_err(make)?.into_string();
        let locked = LockedKey::parse(&text)?;
        let key = match password {
            // It was locked when it was made.
            Some(_) => locked.unlock(password)?,
            None => SecretKey { secret: sk, public },
        };
        Ok((key, text))
    }

    /// The public key that goes with it.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }
}

impl fmt::Debug for SecretKey {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({})", self.public.id())
    }
}

impl fmt::Debug for LockedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockedKey(encrypted: {})", self.encrypted)
    }
}

impl Signer for SecretKey {
    fn sign(&self, text: &[u8], comment: &str) -> Result<String, SignError> {
        let fail = |why: String| SignError {
            key: self.key_id(),
            why,
        };
        if comment.contains(['\n', '\r']) {
            return Err(fail("the comment has several lines".to_owned()));
        }
        let signature = minisign::sign(
            None,
            &self.secret,
            Cursor::new(text),
            Some(comment),
            Some(SIGNATURE_COMMENT),
        );
        let signature = signature.map_err(|error| fail(error.to_string()))?;
        Ok(signature.into_string())
    }

    fn key_id(&self) -> KeyId {
        self.public.id()
    }
}
