// SPDX-License-Identifier: GPL-2.0

//! Options about keys that several commands have.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use pristine_store::{Signer, TrustPolicy};
use pristine_trust::{Keys, KeysError, LockedKey, SecretKey, SecretKeyError, KEYS_DIRECTORY};

use crate::exit::{Code, Failure, Outcome};

/// A password for secret keys, where there is no terminal to ask for it.
pub const PASSWORD_VARIABLE: &str = "PRISTINE_KEY_PASSWORD";

/// Whose signatures are trusted.
#[derive(Args, Debug)]
pub struct TrustArgs {
    /// Directory of public keys, one of which must have signed what a channel is at
    /// [default: /etc/pristine/keys, if there are keys]
    #[arg(long, value_name = "DIR")]
    trusted_keys: Option<PathBuf>,
}

impl TrustArgs {
    /// The directory.
    pub fn directory(&self) -> &Path {
        let default = Path::new(KEYS_DIRECTORY);
        self.trusted_keys.as_deref().unwrap_or(default)
    }

    /// The trusted keys. A directory that was named must hold some.
    pub fn keys(&self) -> Outcome<Keys> {
        let keys = Keys::read_directory(self.directory())?;
        match &self.trusted_keys {
            Some(directory) if keys.is_empty() => {
                let what = format!("there are no keys (*.pub) in {}", directory.display());
                let hint = format!(
                    "add one: pristine key trust KEY.pub --trusted-keys {}",
                    directory.display()
                );
                Err(Failure::new(Code::NotFound, what).hint(hint))
            }
            _ => Ok(keys),
        }
    }

    /// What makes a release trusted: a signature of one of the keys; if there are none, nothing is needed.
    pub fn policy(&self) -> Outcome<TrustPolicy> {
        Ok(TrustPolicy::with_keys(self.keys()?))
    }
}

/// Where the passwords of keys come from.
#[derive(Args, Debug)]
pub struct PasswordArgs {
    /// Read the passwords of keys from this file, one a line in the keys' order, the last for all that follow
    /// [default: $PRISTINE_KEY_PASSWORD, else the terminal]
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
}

impl PasswordArgs {
    /// The password of the key `number` (from 0), if it does not have to be asked for.
    fn given(&self, number: usize) -> Outcome<Option<String>> {
        let Some(path) = &self.password_file else {
            let variable = std::env::var(PASSWORD_VARIABLE);
            return Ok(variable.ok().filter(|password| !password.is_empty()));
        };
        let text = fs::read_to_string(path)
            .map_err(|error| Failure::io(format!("cannot read {}", path.display()), &error))?;
        let line = text.lines().nth(number).or_else(|| text.lines().last());
        match line.filter(|line| !line.is_empty()) {
            Some(password) => Ok(Some(password.to_owned())),
            None => {
                let what = format!("there is no password in {}", path.display());
                Err(Failure::new(Code::Usage, what))
            }
        }
    }

    /// The password of a key that is there.
    fn password(&self, number: usize, key: &Path) -> Outcome<String> {
        match self.given(number)? {
            Some(password) => Ok(password),
            None => ask(&format!("Password of {}: ", key.display())),
        }
    }

    /// The password of a key that is being made.
    pub fn new_password(&self, key: &Path) -> Outcome<String> {
        if let Some(password) = self.given(0)? {
            return Ok(password);
        }
        let password = ask(&format!("New password for {}: ", key.display()))?;
        if password.is_empty() {
            return Err(Failure::new(Code::Usage, "the password is empty")
                .hint("--no-password makes a key without one"));
        }
        if ask("The same again: ")? != password {
            return Err(Failure::new(Code::Usage, "the passwords differ"));
        }
        Ok(password)
    }
}

fn ask(prompt: &str) -> Outcome<String> {
    rpassword::prompt_password(prompt).map_err(|error| {
        Failure::new(
            Code::Usage,
            "a password is needed, and there is no terminal to ask",
        )
        .why(error)
        .hint(format!("give --password-file FILE or ${PASSWORD_VARIABLE}"))
    })
}

/// Who signs.
#[derive(Args, Debug)]
pub struct SignArgs {
    /// Sign with this secret key; several times for several keys, as while keys are changed
    #[arg(long = "key", value_name = "FILE")]
    keys: Vec<PathBuf>,
    #[command(flatten)]
    password: PasswordArgs,
}

impl SignArgs {
    /// The keys, ready to sign. For a dry run it is only made sure that they are there and are keys: nobody is asked for
    /// a password, and there are none.
    pub fn signers(&self, dry_run: bool) -> Outcome<Vec<Arc<dyn Signer>>> {
        let mut signers: Vec<Arc<dyn Signer>> = Vec::new();
        for (number, path) in self.keys.iter().enumerate() {
            if dry_run {
                locked_key(path)?;
                continue;
            }
            let key = secret_key(path, number, &self.password)?;
            if signers.iter().any(|s| s.key_id() == key.key_id()) {
                let what = format!("{} is given twice (key {})", path.display(), key.key_id());
                return Err(Failure::new(Code::Usage, what));
            }
            signers.push(Arc::new(key));
        }
        Ok(signers)
    }
}

/// What to say of a key that is of no use.
fn useless(path: &Path, error: SecretKeyError) -> Failure {
    let what = format!("cannot use the key {}", path.display());
    match error {
        SecretKeyError::WrongPassword => Failure::new(Code::Denied, what).why(error),
        _ => Failure::new(Code::Usage, what)
            .why(error)
            .hint("make a key: pristine key new NAME"),
    }
}

/// Reads the secret key in a file, as it is there.
fn locked_key(path: &Path) -> Outcome<LockedKey> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::io(format!("cannot read the key {}", path.display()), &error))?;
    LockedKey::parse(&text).map_err(|error| useless(path, error))
}

/// Reads the secret key in a file, the one with this number among several.
pub fn secret_key(path: &Path, number: usize, password: &PasswordArgs) -> Outcome<SecretKey> {
    let locked = locked_key(path)?;
    let password = match locked.needs_password() {
        true => Some(password.password(number, path)?),
        false => None,
    };
    locked
        .unlock(password.as_deref())
        .map_err(|error| useless(path, error))
}

impl From<KeysError> for Failure {
    fn from(error: KeysError) -> Self {
        match &error {
            KeysError::Read { path, error } => {
                Failure::io(format!("cannot read {}", path.display()), error)
            }
            KeysError::Key { .. } => Failure::new(Code::Usage, error.to_string())
                .hint("files *.pub there are trusted keys: remove or correct this one"),
        }
    }
}
