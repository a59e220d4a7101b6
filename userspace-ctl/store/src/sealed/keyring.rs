// SPDX-License-Identifier: GPL-2.0

//! Store keys, as identities open them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pristine_seal::age::{Identities, Identity, Recipient, MAX_LEN};
use pristine_seal::{KeyId, StoreKey, UnwrapError};

use crate::error::{Error, Result};
use crate::object::{ObjectKind, ObjectName};
use crate::store::{Put, Store};

/// Where machines have their identity, as `age-keygen` makes it.
pub const IDENTITY_FILE: &str = "/etc/pristine/identity";
/// Names files of identities.
pub const IDENTITY_VARIABLE: &str = "PRISTINE_IDENTITY";

/// Identities, and the store keys that they opened.
#[derive(Debug, Default)]
pub struct Keyring {
    identities: Vec<Identity>,
    keys: Mutex<HashMap<KeyId, StoreKey>>,
}

/// The wrapped key of a recipient.
fn wrapped(key: KeyId, recipient: &Recipient) -> ObjectName {
    ObjectName::Key {
        key,
        tag: KeyId::from_bytes(recipient.tag()),
    }
}

impl Keyring {
    /// With these identities.
    pub fn new(identities: Vec<Identity>) -> Self {
        Keyring {
            identities,
            keys: Mutex::default(),
        }
    }

    /// With a key that is at hand, as who makes it has it.
    pub fn with_key(self, key: StoreKey) -> Self {
        self.keep(key);
        self
    }

    /// With the identities in files such as `age-keygen` makes.
    ///
    /// # Errors
    /// [`Error::Credentials`] for a file that cannot be read or holds none.
    pub fn read(paths: &[impl AsRef<Path>]) -> Result<Self> {
        let mut identities = Vec::new();
        for path in paths {
            let path = path.as_ref();
            let unusable = |why: String| Error::Credentials {
                what: format!("the identity {}", path.display()),
                why,
            };
            let text = fs::read_to_string(path).map_err(|error| unusable(error.to_string()))?;
            let parsed: std::result::Result<Identities, _> = text.parse();
            identities.extend(parsed.map_err(|error| unusable(error.to_string()))?.0);
        }
        Ok(Keyring::new(identities))
    }

    /// With the identities in `given`; else those that `$PRISTINE_IDENTITY` names, with colons between them; else those of
    /// [`IDENTITY_FILE`], if it is there. `None` if there are none.
    ///
    /// # Errors
    /// As [`Keyring::read`].
    pub fn configured(given: &[PathBuf]) -> Result<Option<Self>> {
        if !given.is_empty() {
            return Keyring::read(given).map(Some);
        }
        let variable = std::env::var_os(IDENTITY_VARIABLE).filter(|value| !value.is_empty());
        if let Some(variable) = variable {
            let paths: Vec<PathBuf> = std::env::split_paths(&variable).collect();
            return Keyring::read(&paths).map(Some);
        }
        let default = Path::new(IDENTITY_FILE);
        // Only root can read it, and others need not be told.
        match fs::File::open(default) {
            Ok(_) => Keyring::read(&[default]).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// The identities.
    pub fn identities(&self) -> &[Identity] {
        &self.identities
    }

    fn keep(&self, key: StoreKey) {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.insert(key.id(), key);
    }

    fn known(&self, id: KeyId) -> Option<StoreKey> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.get(&id).cloned()
    }

    /// A store key, from the store if it is not known yet; if there is none, says why.
    ///
    /// # Errors
    /// What can go wrong with the store; [`Error::Credentials`] for a wrapped key that is damaged.
    pub fn key(
        &self,
        store: &dyn Store,
        id: KeyId,
    ) -> Result<std::result::Result<StoreKey, String>> {
        if let Some(key) = self.known(id) {
            return Ok(Ok(key));
        }
        let mut why = match self.identities.as_slice() {
            [] => "no identity was given".to_owned(),
            [one] => format!("it is not encrypted to {}", one.recipient()),
            more => format!("it is encrypted to none of the {} identities", more.len()),
        };
        for identity in &self.identities {
            let object = wrapped(id, &identity.recipient());
            let file = match store.get(&object, MAX_LEN) {
                Err(Error::NotFound { .. }) => continue,
                file => file?,
            };
            match StoreKey::unwrap(&file, std::slice::from_ref(identity), id) {
                Ok(key) => {
                    self.keep(key.clone());
                    return Ok(Ok(key));
                }
                Err(error @ (UnwrapError::Age(_) | UnwrapError::OtherKey { .. })) => {
                    why = format!("{object} is of no use: {error}");
                }
                Err(error) => why = error.to_string(),
            }
        }
        Ok(Err(why))
    }
}

/// Puts a store key into a store, wrapped for each of `recipients` that does not have it there; returns those that got it.
///
/// # Errors
/// [`Error::Age`], and what can go wrong with the store.
pub fn put_key(
    store: &dyn Store,
    key: &StoreKey,
    recipients: &[Recipient],
) -> Result<Vec<Recipient>> {
    let mut added = Vec::new();
    for recipient in recipients {
        let object = wrapped(key.id(), recipient);
        if store.size(&object)?.is_some() {
            continue;
        }
        let file = key.wrap(std::slice::from_ref(recipient))?;
        if store.put(&object, &file)? == Put::Created {
            added.push(*recipient);
        }
    }
    Ok(added)
}

/// The wrapped copies of a store key that a store has.
///
/// # Errors
/// [`Error::Unsupported`] if the store cannot tell, and what can go wrong with it.
pub fn recipients_of(store: &dyn Store, id: KeyId) -> Result<Vec<ObjectName>> {
    let listed = store.list(ObjectKind::Key)?;
    let objects = listed.into_iter().map(|listed| listed.object);
    Ok(objects
        .filter(|object| matches!(object, ObjectName::Key { key, .. } if *key == id))
        .collect())
}
