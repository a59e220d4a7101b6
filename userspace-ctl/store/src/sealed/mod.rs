// SPDX-License-Identifier: GPL-2.0

//! Encrypted images in a store.
//!
//! A [`SealedStore`] lies over any other store and shows what is encrypted there as if it were not; all that reads and
//! writes images works on it unchanged, and still verifies each block against the image's id. It is given identities (a
//! [`Keyring`]). Manifests and deltas say themselves which store key they take; packs are those of an image
//! ([`Store::view_of`]). What is not encrypted passes through.
//!
//! Who looks after a store without a key (garbage collection, a server, a check for damage) reads the public part of
//! manifests: [`stored_image`].

mod keyring;
#[cfg(feature = "build")]
mod publish;
mod view;

use std::sync::Arc;

use pristine_image::{ImageId, Manifest, PackId};
use pristine_seal::object::{Head, Public, HEAD_LEN};
use pristine_seal::pack;

use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::reader::{ImageReader, ImageSelector};
use crate::retry::{CancelToken, RetryPolicy};
use crate::store::Store;

pub use keyring::{put_key, recipients_of, Keyring, IDENTITY_FILE, IDENTITY_VARIABLE};
pub use pristine_seal::age::{AgeError, Identities, Identity, Recipient};
pub use pristine_seal::object::is_sealed;
pub use pristine_seal::{KeyId, StoreKey};
#[cfg(feature = "build")]
pub use publish::{seal_image, sealed_id};
pub use view::SealedStore;

/// What anybody sees of an image in a store, encrypted or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredImage {
    /// Bytes of the manifest as it is stored.
    pub manifest_len: u64,
    /// The image's size in bytes.
    pub size: u64,
    /// The packs that it needs, by their names in the store, and their lengths there.
    pub packs: Vec<(PackId, u64)>,
    /// The store key that it takes, if it is encrypted.
    pub key: Option<KeyId>,
    /// Whom it was encrypted to when it was published.
    pub recipients: Vec<String>,
}

/// Reads what takes no key of an image. Of an encrypted one this proves nothing: only the key tells whether it is right.
///
/// # Errors
/// As [`ImageReader::open`], but for [`Error::NoKey`].
pub fn stored_image(
    store: &Arc<dyn Store>,
    image: ImageId,
    retry: RetryPolicy,
    cancel: &CancelToken,
) -> Result<StoredImage> {
    let below = store.below();
    let store = below.as_ref().unwrap_or(store);
    let object = ObjectName::Manifest(image);
    let worth = |error: &Error| error.is_transient() || error.is_corruption();
    let sealed = retry.run(cancel, worth, || {
        let start = match store.get_start(&object, HEAD_LEN) {
            Err(Error::NotFound { location, .. }) => {
                return Err(Error::NoImage { location, image })
            }
            start => start?,
        };
        if !is_sealed(&start) {
            return Ok(None);
        }
        public_part(store.as_ref(), &object, &start).map(Some)
    })?;
    if let Some((head, public)) = sealed {
        return Ok(StoredImage {
            manifest_len: head.object_len(),
            size: public.size.unwrap_or(0),
            packs: public.packs,
            key: Some(head.key),
            recipients: public.recipients,
        });
    }
    let selector = ImageSelector::Id(image);
    let image = ImageReader::open(Arc::clone(store), &selector, retry, cancel)?;
    let packs = image.manifest().frames().packs();
    Ok(StoredImage {
        manifest_len: image.manifest().head().file_len(),
        size: image.size(),
        packs: packs.iter().map(|pack| (pack.id, pack.len)).collect(),
        key: None,
        recipients: Vec::new(),
    })
}

/// The public part of an image's manifest.
fn public_of(manifest: &Manifest, key: &StoreKey, recipients: &[String]) -> Public {
    let packs = manifest.frames().packs().iter();
    Public {
        size: Some(manifest.size()),
        recipients: recipients.to_vec(),
        packs: packs
            .map(|found| (pack::name(key, &found.id), pack::sealed_len(found.len)))
            .collect(),
    }
}

/// The head of a sealed object that begins with `start`, and its public part.
fn public_part(store: &dyn Store, object: &ObjectName, start: &[u8]) -> Result<(Head, Public)> {
    let format = |error| Error::format(store.location(), object, error);
    let head = Head::parse(start).map_err(format)?;
    let range = head.public_range();
    let bytes = match range.is_empty() {
        true => Vec::new(),
        false => store.get_range(object, range)?,
    };
    let public = head.public(&bytes).map_err(format)?;
    Ok((head, public))
}

/// The error for a sealed object that nobody has a key for; `start` is how it begins.
pub(crate) fn no_key(store: &dyn Store, object: &ObjectName, start: &[u8], why: &str) -> Error {
    let head = match Head::parse(start) {
        Ok(head) => head,
        Err(error) => return Error::format(store.location(), object, error),
    };
    // For people: without it the error says the rest.
    let recipients = public_part(store, object, start).map(|(_, public)| public.recipients);
    Error::NoKey {
        location: store.location().to_owned(),
        object: object.to_string(),
        key: head.key,
        why: why.to_owned(),
        recipients: recipients.unwrap_or_default(),
    }
}

/// The error for a sealed object where no identity was given.
pub(crate) fn no_identity(store: &dyn Store, object: &ObjectName, start: &[u8]) -> Error {
    no_key(store, object, start, "no identity was given")
}
