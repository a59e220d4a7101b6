// SPDX-License-Identifier: GPL-2.0

//! Sets of public keys, and directories that hold them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::key::{KeyId, ParseKeyError, PublicKey};

/// Where a machine's trusted keys are, unless it is told otherwise.
pub const KEYS_DIRECTORY: &str = "/etc/pristine/keys";
/// How the files of public keys end.
pub const KEY_SUFFIX: &str = ".pub";

/// A directory of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The directory or a file in it cannot be read.
    #[error("cannot read {}: {error}", .path.display())]
    Read {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file holds no public key. It is not passed over: who put it there wants it to be trusted, or to be gone.
    #[error("{} is {error}", .path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: ParseKeyError,
    },
}

/// Public keys that are trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    keys: Vec<PublicKey>,
}

impl Keys {
    /// The keys of the files `*.pub` in a directory, labelled with the files' names. A directory that is missing holds
    /// none.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn read_directory(path: &Path) -> Result<Self, KeysError> {
        let read = |path: &Path, error| KeysError::Read {
            path: path.to_owned(),
            error,
        };
        let entries = match fs::read_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            entries => entries.map_err(|error| read(path, error))?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| read(path, error))?.file_name();
            let Some(label) = name.to_str().and_then(|name| name.strip_suffix(KEY_SUFFIX)) else {
                continue;
            };
            if !label.is_empty() && !label.starts_with('.') {
                files.push((label.to_owned(), path.join(&name)));
            }
        }
        files.sort();
        let mut keys = Self::default();
        for (label, file) in files {
            let text = fs::read_to_string(&file).map_err(|error| read(&file, error))?;
            let key: PublicKey = text.parse().map_err(|error| KeysError::Key {
                path: file.clone(),
                error,
            })?;
            keys.add(key.with_label(label));
        }
        Ok(keys)
    }

    /// Adds a key, unless it is there.
    pub fn add(&mut self, key: PublicKey) {
        if !self.keys.iter().any(|k| k.base64() == key.base64()) {
            self.keys.push(key);
        }
    }

    /// Adds all keys of another set.
    pub fn extend(&mut self, other: Keys) {
        other.keys.into_iter().for_each(|key| self.add(key));
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// All keys.
    pub fn iter(&self) -> impl Iterator<Item = &PublicKey> {
        self.keys.iter()
    }

    /// The keys with this id: seldom more than one.
    pub fn with_id(&self, id: KeyId) -> impl Iterator<Item = &PublicKey> {
        self.keys.iter().filter(move |key| key.id() == id)
    }
}
