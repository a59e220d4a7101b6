// SPDX-License-Identifier: GPL-2.0

//! An image that is not encrypted, as it is to be published encrypted.

use std::ops::Range;
use std::sync::Arc;

use pristine_image::manifest::blind;
use pristine_image::{merkle, ImageId, PackId};
use pristine_seal::StoreKey;

use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::reader::{ImageReader, ImageSelector};
use crate::retry::{CancelToken, RetryPolicy};
use crate::store::{Store, Traffic};

/// What an image that is not encrypted is called once it is, with this key.
pub fn sealed_id(image: &ImageId, key: &StoreKey) -> ImageId {
    merkle::blinded(image, &key.blinding())
}

/// The image as it is to be published to a store that seals with `key`: with the id that it has there. All else of it is
/// read from where it is.
///
/// # Errors
/// [`Error::Unsupported`] if its packs lie elsewhere (references), and what can go wrong with the store.
pub fn seal_image(
    image: &ImageReader,
    key: &StoreKey,
    cancel: &CancelToken,
) -> Result<ImageReader> {
    let store = image.shared_store();
    let retry = RetryPolicy::default();
    let object = ObjectName::Manifest(image.image());
    for pack in image.manifest().frames().packs() {
        cancel.check()?;
        refuse_reference(store.as_ref(), &pack.id)?;
    }
    let len = image.manifest().head().file_len();
    let bytes = retry.run(cancel, Error::is_transient, || store.get(&object, len))?;
    let format = |error| Error::format(store.location(), &object, error);
    let (id, manifest) = blind(&bytes, &key.blinding()).map_err(format)?;
    let blinded: Arc<dyn Store> = Arc::new(Blinded {
        inner: store,
        id,
        manifest,
    });
    ImageReader::open(blinded, &ImageSelector::Id(id), retry, cancel)
}

/// What lies where everybody reads it cannot be encrypted.
fn refuse_reference(store: &dyn Store, pack: &PackId) -> Result<()> {
    // Its own kind of object, so that a store that follows references does not hide it.
    match store.size(&ObjectName::Reference(*pack))? {
        None => Ok(()),
        Some(_) => Err(Error::Unsupported {
            location: store.location().to_owned(),
            what: format!(
                "have this image encrypted: pack {pack} is a reference to what is published elsewhere; build the image \
                 without --reference"
            ),
        }),
    }
}

/// A store that has one image under the id that it has when it is encrypted.
#[derive(Debug)]
struct Blinded {
    inner: Arc<dyn Store>,
    id: ImageId,
    manifest: Vec<u8>,
}

impl Blinded {
    fn manifest(&self, object: &ObjectName) -> Option<&[u8]> {
        (*object == ObjectName::Manifest(self.id)).then_some(&self.manifest)
    }
}

impl Store for Blinded {
    fn location(&self) -> &str {
        self.inner.location()
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        match self.manifest(object) {
            Some(manifest) => Ok(manifest.to_vec()),
            None => self.inner.get(object, limit),
        }
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        match self.manifest(object) {
            Some(manifest) => {
                let part = manifest.get(range.start as usize..range.end as usize);
                part.map(<[u8]>::to_vec).ok_or_else(|| Error::Truncated {
                    location: self.location().to_owned(),
                    object: object.to_string(),
                    len: manifest.len() as u64,
                    needed: range.end,
                })
            }
            None => self.inner.get_range(object, range),
        }
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        match self.manifest(object) {
            Some(manifest) => Ok(manifest[..manifest.len().min(len as usize)].to_vec()),
            None => self.inner.get_start(object, len),
        }
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        match self.manifest(object) {
            Some(manifest) => Ok(Some(manifest.len() as u64)),
            None => self.inner.size(object),
        }
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }
}
