// SPDX-License-Identifier: GPL-2.0

//! Each block once in a store, whatever the number of images that hold it.
//!
//! A build into a store refers to the blocks that the store's packs hold ([`known_blocks`]). An image that was built
//! elsewhere is put into new packs for a store that has part of it ([`repack`]).

use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::sync::Arc;

use pristine_image::{build, BuildError, BuildOptions, ImageId, Known, PackId, Source};

use crate::blocks::ImageBlocks;
use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::reader::{ImageReader, ImageSelector};
use crate::retry::{CancelToken, RetryPolicy};
use crate::sealed::{sealed_id, StoreKey};
use crate::store::{Store, StorePacks};

/// What the packs of a store hold.
#[derive(Debug, Default)]
pub struct KnownBlocks {
    /// The blocks.
    pub known: Arc<Known>,
    /// Images that they were read from.
    pub images: u64,
    /// Images that could not be read, and why; their packs are not used.
    pub skipped: Vec<String>,
}

/// Finds what the packs of a store hold, by the manifests of `images`, or of all its images: the oldest first, so that
/// a block's place does not change with what is added. `progress` gets images done, and all.
///
/// # Errors
/// What can go wrong with the store; an image that is damaged is skipped.
pub fn known_blocks(
    store: &Arc<dyn Store>,
    images: Option<&[ImageId]>,
    cancel: &CancelToken,
    progress: &dyn Fn(u64, u64),
) -> Result<KnownBlocks> {
    let mut found = KnownBlocks::default();
    let ids = match images {
        Some(images) => images.to_vec(),
        None => store.images()?,
    };
    let sealing = store.sealing_key().map(StoreKey::blinding);
    let mut readers = Vec::new();
    for id in ids {
        cancel.check()?;
        let selector = ImageSelector::Id(id);
        match ImageReader::open(Arc::clone(store), &selector, RetryPolicy::default(), cancel) {
            // Encrypted blocks are of use only to images with the same key.
            Ok(reader) if reader.manifest().blinding() != sealing.as_ref() => (),
            Err(Error::NoKey { .. }) => (),
            Ok(reader) => {
                let created = reader.manifest().info().get("created");
                let created = created
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(u64::MAX);
                readers.push(((created, id), reader));
            }
            Err(error @ Error::Cancelled) => return Err(error),
            Err(error) => found.skipped.push(error.to_string()),
        }
    }
    readers.sort_by_key(|(key, _)| *key);
    let mut known = Known::new();
    let mut packs: HashMap<PackId, bool> = HashMap::new();
    let total = readers.len() as u64;
    for (_, reader) in readers {
        cancel.check()?;
        for pack in reader.manifest().frames().packs() {
            if let Entry::Vacant(entry) = packs.entry(pack.id) {
                entry.insert(store.size(&ObjectName::Pack(pack.id))? == Some(pack.len));
            }
        }
        let usable = |id: &PackId| packs.get(id).copied().unwrap_or(false);
        let page = |number| Ok::<_, Error>(reader.page(number)?.as_ref().clone());
        match known.add(reader.manifest(), usable, page) {
            Ok(()) => found.images += 1,
            Err(error) if error.is_corruption() => found.skipped.push(error.to_string()),
            Err(error) => return Err(error),
        }
        progress(found.images, total);
    }
    found.known = Arc::new(known);
    Ok(found)
}

/// Fails if a pack of an image's manifest is not in the store, for it was removed since it was found there.
///
/// # Errors
/// [`Error::NotFound`], and what can go wrong with the store.
pub fn check_packs(store: &dyn Store, manifest: &pristine_image::Manifest) -> Result<()> {
    for pack in manifest.frames().packs() {
        let object = ObjectName::Pack(pack.id);
        if store.size(&object)?.is_none() {
            return Err(Error::NotFound {
                location: store.location().to_owned(),
                object: object.to_string(),
            });
        }
    }
    Ok(())
}

/// Puts those blocks of `image` that `target` lacks into packs of their own, in `scratch`, and returns the image as it
/// is to be published from there: its other packs are in `target`. It is not encrypted, nor is what is put in `scratch`;
/// for a target that encrypts, [`crate::sealed::seal_image`] comes after this. `None` if that would not save anything: the target
/// has the image, or whole packs of it, or nothing of it; `scratch` is not made then. `progress` gets the bytes of the image that are done.
///
/// # Errors
/// What can go wrong with the stores.
pub fn repack(
    image: &ImageReader,
    target: &Arc<dyn Store>,
    scratch: &dyn Fn() -> Result<Arc<dyn Store>>,
    cancel: &CancelToken,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Option<ImageReader>> {
    let manifest = image.manifest();
    let there = match target.sealing_key() {
        Some(key) => sealed_id(&image.image(), key),
        None => image.image(),
    };
    let encrypted = manifest.blinding().is_some();
    if encrypted || target.size(&ObjectName::Manifest(there))?.is_some() {
        return Ok(None);
    }
    let mut sent = Vec::new();
    for pack in manifest.frames().packs() {
        sent.push(target.size(&ObjectName::Pack(pack.id))?.is_none());
    }
    if !sent.contains(&true) {
        return Ok(None);
    }
    let known = known_blocks(target, None, cancel, &|_, _| ())?.known;
    if known.is_empty() || !saves(image, &known, &sent)? {
        return Ok(None);
    }
    let id = ImageSelector::Id(image.image());
    let open = |store| ImageReader::open(store, &id, RetryPolicy::default(), cancel);
    let blocks = ImageBlocks::new(Arc::new(open(image.shared_store())?));
    let source = Source::new(image.store().location(), Box::new(blocks));
    let options = BuildOptions {
        info: manifest.info().clone(),
        known,
        ..BuildOptions::default()
    };
    let scratch = scratch()?;
    let mut packs = StorePacks(scratch.as_ref());
    let built = build(&source, &options, &mut packs, progress, cancel.flag());
    let built = built.map_err(|error| match error {
        BuildError::Cancelled => Error::Cancelled,
        error => Error::io(
            "cannot put the image into new packs",
            std::io::Error::other(error),
        ),
    })?;
    scratch.put(&ObjectName::Manifest(built.image), &built.manifest)?;
    Ok(Some(open(scratch)?))
}

/// Whether a block of a pack that would be sent is known.
fn saves(image: &ImageReader, known: &Known, sent: &[bool]) -> Result<bool> {
    let table = image.manifest().frames();
    for number in 0..image.manifest().pages() {
        if image.manifest().page_range(number).is_empty() {
            continue;
        }
        for block in image.page(number)?.blocks() {
            let Some(frame) = block.slot.and_then(|slot| table.frame_of(slot)) else {
                continue;
            };
            let is_sent = sent.get(frame.pack as usize).copied().unwrap_or(false);
            if is_sent && known.holds(&block.digest) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
