// SPDX-License-Identifier: GPL-2.0

//! Publishing an image: from one store to another, and onto a channel.
//!
//! Packs first, then the manifest, then the release in the channel's history and its pointer: at each instant the
//! target holds complete images only, and a publish that was cut goes on where it stopped, for what is there is not
//! sent again. A [lease](crate::lease) keeps garbage collection from removing what is not yet needed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc};

use pristine_image::{Digest, FormatError, ImageId, Manifest, PackId};
use pristine_trust::{Policy, Signature, Signer};

use crate::error::{Error, Result};
use crate::history::{append, check_signers, NewRelease};
use crate::lease::{Lease, LeaseOptions};
use crate::object::{ChannelName, ObjectName};
use crate::pin::check_complete;
use crate::reader::{Found, ImageReader, ImageSelector};
use crate::release::SignedRelease;
use crate::retry::{CancelToken, RetryPolicy};
use crate::sealed::{stored_image, StoreKey, StoredImage};
use crate::store::{Revision, Store};

/// How to publish.
#[derive(Clone, Debug)]
pub struct PublishOptions {
    /// Find out what would be sent, and send nothing.
    pub dry_run: bool,
    /// Seconds since 1970 to note as the time of publishing; `None` for now.
    pub time: Option<u64>,
    /// When the release expires, in seconds since 1970.
    pub expires: Option<u64>,
    /// The oldest generation that a machine may still accept; `None` for what the release before said.
    pub oldest: Option<u64>,
    /// Who signs the release.
    pub signers: Vec<Arc<dyn Signer>>,
    /// Which deltas to make, from what the channel had before.
    #[cfg(feature = "build")]
    pub deltas: crate::delta::DeltaOptions,
    /// Which releases may be promoted.
    pub trust: Policy,
    /// How often reads of the source and writes to the target are tried again.
    pub retry: RetryPolicy,
    /// Packs on their way at once, at least 1. Default 4.
    pub parallel: usize,
    /// How the lease on the target is taken.
    pub lease: LeaseOptions,
    /// Stops the transfer.
    pub cancel: CancelToken,
}

impl Default for PublishOptions {
    fn default() -> Self {
        PublishOptions {
            dry_run: false,
            time: None,
            expires: None,
            oldest: None,
            signers: Vec::new(),
            #[cfg(feature = "build")]
            deltas: crate::delta::DeltaOptions::default(),
            trust: Policy::default(),
            retry: RetryPolicy::default(),
            parallel: 4,
            lease: LeaseOptions::default(),
            cancel: CancelToken::new(),
        }
    }
}

/// What was published, or would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The release that the channel points to now, or would, though without signatures then.
    pub release: SignedRelease,
    /// The channel pointed to such a release before; its generation did not change.
    pub unchanged: bool,
    /// Objects (packs and manifest) sent.
    pub sent_objects: u64,
    /// Bytes of content sent.
    pub sent_bytes: u64,
    /// Objects that the target had.
    pub present_objects: u64,
    /// Their bytes.
    pub present_bytes: u64,
    /// Bytes of deltas made.
    pub delta_bytes: u64,
    /// Bytes of deltas that were made and not kept, as they would have saved little.
    pub delta_left_out: u64,
    /// Runs of the boot trace that the image has from the one before.
    pub trace_runs: u64,
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
    check_sealing(image, target.as_ref())?;
    let lease = take_lease(target, "publish", options)?;
    let moved = Moved {
        before: target.read_pointer(channel)?,
        image: image.image(),
        size: image.size(),
        plan: Plan::make(image, target, options)?,
    };
    let source = Some(image);
    move_channel(
        lease.as_ref(),
        moved,
        source,
        target,
        channel,
        options,
        progress,
    )
}

/// Makes what `from` names in a store the next generation of `channel` there; no data is copied.
///
/// That takes no key, also if the image is encrypted; without one it is not looked at whether the image has the size that the
/// store says, and the boot trace of what the channel had is not made the image's own.
///
/// # Errors
/// [`Error::Untrusted`] if `from` is a channel whose release is not trusted,
/// [`Error::Conflict`] if another publisher moved the channel since this began, [`Error::NotFound`] or
/// [`Error::NoImage`] if the image or a part of it is not there, and what can go wrong with the store.
pub fn promote(
    store: &Arc<dyn Store>,
    from: &ImageSelector,
    channel: &ChannelName,
    options: &PublishOptions,
) -> Result<Published> {
    let lease = take_lease(store, "promote", options)?;
    let (retry, cancel) = (options.retry, &options.cancel);
    let before = store.read_pointer(channel)?;
    let found = Found::look_up(store.as_ref(), from, &options.trust, retry, cancel)?;
    let image = found.image;
    let stored = stored_image(store, image, retry, cancel)?;
    check_complete(store, image, &stored, cancel)?;
    let stated = found.release.as_ref().map(|signed| signed.release().size);
    let reader = match ImageReader::open_found(Arc::clone(store), found, retry, cancel) {
        Ok(reader) => Some(reader),
        Err(Error::NoKey { .. }) => None,
        Err(error) => return Err(error),
    };
    let reader = reader.as_ref();
    let moved = Moved {
        before,
        image,
        size: reader.map_or(stated.unwrap_or(stored.size), ImageReader::size),
        plan: Plan::of_stored(&stored),
    };
    move_channel(
        lease.as_ref(),
        moved,
        reader,
        store,
        channel,
        options,
        &|_, _| (),
    )
}

/// Makes sure that an encrypted image stays encrypted, and by the key that its id is made with.
fn check_sealing(image: &ImageReader, target: &dyn Store) -> Result<()> {
    let blinding = image.manifest().blinding();
    let sealing = target.sealing_key().map(StoreKey::blinding);
    match blinding == sealing.as_ref() {
        true => Ok(()),
        false => Err(target.unsupported(format!(
            "take image {}: it is to be encrypted with the store key that its id is made with, and with that alone",
            image.image()
        ))),
    }
}

/// Keeps garbage collection away. Before anything is looked at: what is there now must be there later.
fn take_lease(
    store: &Arc<dyn Store>,
    purpose: &str,
    options: &PublishOptions,
) -> Result<Option<Lease>> {
    if options.dry_run {
        return Ok(None);
    }
    Lease::write(store, purpose, &options.lease, &options.cancel, &|_| ()).map(Some)
}

/// What a channel is moved to.
struct Moved {
    /// Where it was before anything else was looked at: whoever moves it from then on is noticed.
    before: Option<(SignedRelease, Revision)>,
    image: ImageId,
    size: u64,
    plan: Plan,
}

/// Sends what is to be sent, and moves the channel. `image` is what it is sent from; `None` if it cannot be opened here.
fn move_channel(
    lease: Option<&Lease>,
    moved: Moved,
    image: Option<&ImageReader>,
    target: &Arc<dyn Store>,
    channel: &ChannelName,
    options: &PublishOptions,
    progress: &dyn Fn(u64, u64),
) -> Result<Published> {
    let Moved { before, plan, .. } = moved;
    let new = NewRelease {
        image: moved.image,
        size: moved.size,
        published: options.time,
        expires: options.expires,
        oldest: options.oldest,
    };
    let current = before.as_ref().map(|(current, _)| current);
    let same = current.filter(|current| is_same(current, &new, options));
    let unchanged = same.is_some();
    let release = match same {
        Some(same) => same.clone(),
        None => SignedRelease::unsigned(new.after(channel, current.map(SignedRelease::release))),
    };
    if !unchanged && !options.dry_run {
        // Before anything is sent.
        check_signers(channel, current, &options.signers)?;
    }
    let mut published = Published {
        release,
        unchanged,
        sent_objects: plan.packs.len() as u64 + u64::from(plan.manifest.is_some()),
        sent_bytes: plan.bytes,
        present_objects: plan.present_objects,
        present_bytes: plan.present_bytes,
        delta_bytes: 0,
        delta_left_out: 0,
        trace_runs: 0,
    };
    let Some(lease) = lease else {
        return Ok(published);
    };
    if let Some(image) = image {
        let send = Send {
            source: image.store(),
            target: target.as_ref(),
            lease,
            options,
        };
        plan.carry_out(image, &send, progress)?;
        // Before the channel moves: who follows it at once finds them.
        #[cfg(feature = "build")]
        if !unchanged {
            lease.keep()?;
            let (deltas, retry, cancel) = (&options.deltas, options.retry, &options.cancel);
            // All of the image is in the target now; where it came from may have only what was new.
            let id = ImageSelector::Id(image.image());
            let image = &ImageReader::open(Arc::clone(target), &id, retry, cancel)?;
            let made = crate::delta::put_deltas(target, channel, image, deltas, retry, cancel)?;
            for delta in made.iter().filter(|delta| !delta.present) {
                match delta.left_out {
                    true => published.delta_left_out += delta.bytes,
                    false => published.delta_bytes += delta.bytes,
                }
            }
            published.trace_runs =
                crate::trace::inherit_trace(target, channel, image, retry, cancel)?;
        }
    }
    if !unchanged {
        lease.keep()?;
        published.release = append(
            target.as_ref(),
            channel,
            before.as_ref(),
            &new,
            &options.signers,
        )?;
    }
    Ok(published)
}

/// Whether the channel is as it would be afterwards. A new time to expire makes a new release.
fn is_same(current: &SignedRelease, new: &NewRelease, options: &PublishOptions) -> bool {
    let release = current.release();
    let signed_by = |signer: &Arc<dyn Signer>| {
        let signatures = current.signatures().iter().filter_map(|s| s.parse().ok());
        signatures
            .into_iter()
            .any(|s: Signature| s.key_id() == signer.key_id())
    };
    release.image == new.image
        && new.expires.is_none()
        && new
            .oldest
            .is_none_or(|oldest| release.oldest == Some(oldest))
        && options.signers.iter().all(signed_by)
}

/// A pack to be sent.
struct SendPack {
    id: PackId,
    len: u64,
    /// What it takes in the target.
    stored: u64,
}

/// What is to be sent.
#[derive(Default)]
struct Plan {
    packs: Vec<SendPack>,
    /// Length of the manifest, if it is to be sent, and what it takes in the target.
    manifest: Option<(u64, u64)>,
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
        let mut plan = Plan::default();
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
                let stored = target.stored_lens(image.manifest()).manifest;
                plan.manifest = Some((len, stored));
                plan.bytes += stored;
                None
            }
        };
        let manifest = theirs
            .as_ref()
            .map_or(image.manifest(), ImageReader::manifest);
        // With what it takes to find packs that are encrypted.
        let target = theirs
            .as_ref()
            .map_or_else(|| Arc::clone(target), ImageReader::shared_store);
        let lens = target.stored_lens(manifest).packs;
        for (pack, stored) in manifest.frames().packs().iter().zip(lens) {
            options.cancel.check()?;
            let object = ObjectName::Pack(pack.id);
            match target.size(&object)? {
                Some(len) if len == pack.len => plan.present(stored),
                Some(len) => {
                    return Err(Error::Truncated {
                        location: target.location().to_owned(),
                        object: object.to_string(),
                        len,
                        needed: pack.len,
                    });
                }
                None => {
                    plan.packs.push(SendPack {
                        id: pack.id,
                        len: pack.len,
                        stored,
                    });
                    plan.bytes += stored;
                }
            }
        }
        Ok(plan)
    }

    /// Of an image that is in the target.
    fn of_stored(stored: &StoredImage) -> Self {
        let mut plan = Plan::default();
        plan.present(stored.manifest_len);
        for (_, len) in &stored.packs {
            plan.present(*len);
        }
        plan
    }

    fn present(&mut self, len: u64) {
        self.present_objects += 1;
        self.present_bytes += len;
    }

    /// Sends the packs, several at once, and then the manifest.
    fn carry_out(
        &self,
        image: &ImageReader,
        send: &Send<'_>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        let mut done = 0;
        progress(done, self.bytes);
        let next = AtomicUsize::new(0);
        let threads = self.packs.len().min(send.options.parallel.max(1));
        std::thread::scope(|scope| {
            let (sender, sent) = mpsc::channel();
            for _ in 0..threads {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || {
                    let index = || next.fetch_add(1, Ordering::Relaxed);
                    while let Some(pack) = self.packs.get(index()) {
                        let result = send.pack(pack.id, pack.len);
                        let failed = result.is_err();
                        // Nobody listens after the first error.
                        if sender.send(result.map(|()| pack.stored)).is_err() || failed {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for result in sent {
                match result {
                    Ok(len) => done += len,
                    Err(error) => {
                        next.store(self.packs.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
                progress(done, self.bytes);
            }
            Ok(())
        })?;
        if let Some((len, stored)) = self.manifest {
            send.manifest(image.image(), len)?;
            done += stored;
            progress(done, self.bytes);
        }
        Ok(())
    }
}

/// From where to where.
struct Send<'a> {
    source: &'a dyn Store,
    target: &'a dyn Store,
    lease: &'a Lease,
    options: &'a PublishOptions,
}

impl Send<'_> {
    fn pack(&self, id: PackId, len: u64) -> Result<()> {
        let object = ObjectName::Pack(id);
        let bytes = read_checked(self.source, &object, len, self.options, |bytes| {
            if Digest::of(bytes).as_bytes() == id.as_bytes() {
                Ok(())
            } else {
                Err(FormatError::Checksum("its content".to_owned()))
            }
        })?;
        self.put(&object, &bytes)
    }

    fn manifest(&self, image: ImageId, len: u64) -> Result<()> {
        let object = ObjectName::Manifest(image);
        let bytes = read_checked(self.source, &object, len, self.options, |bytes| {
            Manifest::parse(bytes, Some(&image))?.check_all(bytes)
        })?;
        self.put(&object, &bytes)
    }

    fn put(&self, object: &ObjectName, bytes: &[u8]) -> Result<()> {
        let options = self.options;
        options.retry.run(&options.cancel, Error::is_transient, || {
            self.lease.keep()?;
            self.target.put(object, bytes).map(drop)
        })
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
