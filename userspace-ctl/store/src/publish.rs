// SPDX-License-Identifier: GPL-2.0

//! Publishing an image: from one store to another, and onto a channel.
//!
//! Packs first, then the manifest, then the pointer: at each instant the target holds complete images only, and a
//! publish that was cut goes on where it stopped, for what is there is not sent again.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pristine_image::{Digest, FormatError, Manifest, PackId};

use crate::error::{Error, Result};
use crate::object::{ChannelName, ObjectName};
use crate::pointer::Pointer;
use crate::reader::{ImageReader, ImageSelector};
use crate::retry::{CancelToken, RetryPolicy};
use crate::store::Store;

/// How to publish.
#[derive(Clone, Debug, Default)]
pub struct PublishOptions {
    /// Find out what would be sent, and send nothing.
    pub dry_run: bool,
    /// Seconds since 1970 to note as the time of publishing; `None` for now.
    pub time: Option<u64>,
    /// How often reads of the source are tried again.
    pub retry: RetryPolicy,
    /// Stops the transfer.
    pub cancel: CancelToken,
}

/// What was published, or would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Where the channel points now, or would.
    pub pointer: Pointer,
    /// The channel pointed to this image before; its generation did not change.
    pub unchanged: bool,
    /// Objects (packs and manifest) sent.
    pub sent_objects: u64,
    /// Bytes of content sent.
    pub sent_bytes: u64,
    /// Objects that the target had.
    pub present_objects: u64,
    /// Their bytes.
    pub present_bytes: u64,
}

/// Copies what `target` lacks of an image from the store that `image` was opened from, and moves `channel` to it.
/// `progress` gets the bytes sent and the bytes to send.
///
/// # Errors
/// [`Error::Conflict`] if another publisher moved the channel since this began: all objects are there then, and the
/// channel is as the other left it. Otherwise what can go wrong with either store; publishing again goes on.
pub fn publish(
    image: &ImageReader,
    target: &Arc<dyn Store>,
    channel: &ChannelName,
    options: &PublishOptions,
    progress: &dyn Fn(u64, u64),
) -> Result<Published> {
    // Read first: whoever moves it from here on is noticed.
    let before = target.read_pointer(channel)?;
    let plan = Plan::make(image, target, options)?;
    let unchanged = before
        .as_ref()
        .is_some_and(|(p, _)| p.image == image.image());
    let pointer = match &before {
        Some((pointer, _)) if unchanged => pointer.clone(),
        _ => Pointer {
            channel: channel.clone(),
            generation: before.as_ref().map_or(0, |(p, _)| p.generation) + 1,
            image: image.image(),
            size: image.size(),
            published: options.time.unwrap_or_else(now),
        },
    };
    let published = Published {
        pointer,
        unchanged,
        sent_objects: plan.packs.len() as u64 + u64::from(plan.manifest.is_some()),
        sent_bytes: plan.bytes,
        present_objects: plan.present_objects,
        present_bytes: plan.present_bytes,
    };
    if options.dry_run {
        return Ok(published);
    }
    plan.carry_out(image, target.as_ref(), options, progress)?;
    if !unchanged {
        let revision = before.as_ref().map(|(_, revision)| revision);
        target.swap_pointer(revision, &published.pointer)?;
    }
    Ok(published)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |duration| duration.as_secs())
}

/// What is to be sent.
struct Plan {
    packs: Vec<(PackId, u64)>,
    /// Length of the manifest, if it is to be sent.
    manifest: Option<u64>,
    bytes: u64,
    present_objects: u64,
    present_bytes: u64,
}

impl Plan {
    fn make(
        image: &ImageReader,
        target: &Arc<dyn Store>,
        options: &PublishOptions,
    ) -> Result<Self> {
        let name = ObjectName::Manifest(image.image());
        let mut plan = Plan {
            packs: Vec::new(),
            manifest: None,
            bytes: 0,
            present_objects: 0,
            present_bytes: 0,
        };
        // If the target has the image, its manifest counts: it may have come in other packs.
        let theirs = match target.size(&name)? {
            Some(len) => {
                plan.present(len);
                let selector = ImageSelector::Id(image.image());
                let retry = options.retry;
                Some(ImageReader::open(
                    Arc::clone(target),
                    &selector,
                    retry,
                    &options.cancel,
                )?)
            }
            None => {
                let len = image.manifest().head().file_len();
                plan.manifest = Some(len);
                plan.bytes += len;
                None
            }
        };
        let manifest = theirs
            .as_ref()
            .map_or(image.manifest(), ImageReader::manifest);
        for pack in manifest.frames().packs() {
            options.cancel.check()?;
            let object = ObjectName::Pack(pack.id);
            match target.size(&object)? {
                Some(len) if len == pack.len => plan.present(len),
                Some(len) => {
                    return Err(Error::Truncated {
                        location: target.location().to_owned(),
                        object: object.to_string(),
                        len,
                        needed: pack.len,
                    });
                }
                None => {
                    plan.packs.push((pack.id, pack.len));
                    plan.bytes += pack.len;
                }
            }
        }
        Ok(plan)
    }

    fn present(&mut self, len: u64) {
        self.present_objects += 1;
        self.present_bytes += len;
    }

    fn carry_out(
        &self,
        image: &ImageReader,
        target: &dyn Store,
        options: &PublishOptions,
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        let source = image.store();
        let mut done = 0;
        progress(done, self.bytes);
        for (id, len) in &self.packs {
            let object = ObjectName::Pack(*id);
            let bytes = read_checked(source, &object, *len, options, |bytes| {
                if Digest::of(bytes).as_bytes() == id.as_bytes() {
                    Ok(())
                } else {
                    Err(FormatError::Checksum("its content".to_owned()))
                }
            })?;
            target.put(&object, &bytes)?;
            done += len;
            progress(done, self.bytes);
        }
        if let Some(len) = self.manifest {
            let object = ObjectName::Manifest(image.image());
            let bytes = read_checked(source, &object, len, options, |bytes| {
                Manifest::parse(bytes, Some(&image.image()))?.check_all(bytes)
            })?;
            target.put(&object, &bytes)?;
            done += len;
            progress(done, self.bytes);
        }
        Ok(())
    }
}

/// Reads a whole object, again if it arrives damaged.
pub(crate) fn read_checked(
    source: &dyn Store,
    object: &ObjectName,
    len: u64,
    options: &PublishOptions,
    check: impl Fn(&[u8]) -> std::result::Result<(), FormatError>,
) -> Result<Vec<u8>> {
    let worth = |error: &Error| error.is_transient() || error.is_corruption();
    options.retry.run(&options.cancel, worth, || {
        let bytes = source.get(object, len)?;
        check(&bytes).map_err(|error| Error::format(source.location(), object, error))?;
        Ok(bytes)
    })
}
