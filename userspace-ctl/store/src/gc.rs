// SPDX-License-Identifier: GPL-2.0

//! Garbage collection: removes the images that nothing needs any more, and the packs that no image needs.
//!
//! Kept are the images of
//! - each channel's current generation and the generations before it, so many as asked for;
//! - pins that have not ended;
//! - manifests that were stored only a short time ago (the grace), and packs likewise: of builds and copies by
//!   programs that take no [lease](crate::lease), and for machines that are still reading.
//!
//! Nothing else can come to need an image meanwhile, for whoever moves a channel, pins or publishes takes a lease and
//! looks only then, see [`crate::lease`].
//!
//! Manifests go first, then what belongs to them, then packs. Wherever it is cut, there is no manifest whose packs are
//! gone, and the next collection removes what is left. Wrapped copies of a store key go with the last image that takes that
//! key. The history of channels stays: it is small, and a record.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use pristine_image::{ImageId, PackId};
use pristine_seal::KeyId;

use crate::error::{Error, Result};
use crate::history::history;
use crate::lease::{self, Lease, LeaseOptions};
use crate::note::NoteName;
use crate::object::{ObjectKind, ObjectName};
use crate::pin::pins;
use crate::retry::{CancelToken, RetryPolicy};
use crate::sealed::{stored_image, StoredImage};
use crate::store::{Listed, Store};

/// How to collect.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Generations of each channel that are kept, the current one included; at least 1. Default 3.
    pub keep: u64,
    /// How old an object must be to be removed. Default 24 hours.
    pub grace: Duration,
    /// Find out what would be removed, and remove nothing.
    pub dry_run: bool,
    /// How reads are tried again.
    pub retry: RetryPolicy,
    /// How the lease is taken.
    pub lease: LeaseOptions,
    /// Stops it; what was removed until then stays removed.
    pub cancel: CancelToken,
}

impl Default for GcOptions {
    fn default() -> Self {
        GcOptions {
            keep: 3,
            grace: Duration::from_secs(24 * 3600),
            dry_run: false,
            retry: RetryPolicy::default(),
            lease: LeaseOptions::default(),
            cancel: CancelToken::new(),
        }
    }
}

/// Numbers of objects and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, listed: &Listed) {
        self.objects += 1;
        self.bytes += listed.len;
    }
}

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Images that stay, and why: for people.
    pub kept_images: Vec<(ImageId, String)>,
    /// Images that go.
    pub removed_images: Vec<ImageId>,
    /// All objects that go.
    pub removed: Amount,
    /// Of these, packs.
    pub removed_packs: Amount,
    /// All objects that stay, without the history.
    pub kept: Amount,
    /// Of these, what nothing needs but is too young to be removed.
    pub young: Amount,
    /// Pins that ended, which go too.
    pub ended_pins: Vec<String>,
    /// Who writes to the store, if this is a dry run: the next collection would have to wait.
    pub writers: Vec<String>,
}

/// Removes what nothing needs. `progress` gets the objects removed and the objects to remove.
///
/// # Errors
/// [`Error::InUse`] while anybody writes to the store, or another collection runs. [`Error::NoImage`],
/// [`Error::Format`], [`Error::Pointer`] or [`Error::Note`] if it cannot be told what is needed: nothing is removed
/// then. What can go wrong with the store; collecting again goes on.
pub fn collect(
    store: &Arc<dyn Store>,
    options: &GcOptions,
    progress: &dyn Fn(u64, u64),
) -> Result<Collected> {
    let lease = match options.dry_run {
        true => None,
        false => Some(Lease::collect(store, &options.lease)?),
    };
    let now = match &lease {
        Some(lease) => lease.since(),
        // A clock of whole seconds must not make young what was stored in this one.
        None => options
            .lease
            .clock
            .unix()
            .saturating_add(1)
            .saturating_mul(1000),
    };
    let survey = Survey::make(store, options, now)?;
    let mut collected = survey.collected;
    let Some(lease) = lease else {
        collected.writers = lease::holders(store.as_ref())?;
        return Ok(collected);
    };
    let total = survey.garbage.len() as u64;
    progress(0, total);
    for (done, object) in (1..).zip(&survey.garbage) {
        options.cancel.check()?;
        lease.keep()?;
        store.remove(object)?;
        progress(done, total);
    }
    lease.keep()?;
    for note in survey
        .ended
        .iter()
        .chain(&lease::dead(store.as_ref(), &lease)?)
    {
        store.remove_note(note)?;
    }
    Ok(collected)
}

/// What is there, and what of it is needed.
struct Survey {
    collected: Collected,
    /// In the order in which it is to be removed.
    garbage: Vec<ObjectName>,
    ended: Vec<NoteName>,
}

/// What the images that stay need.
#[derive(Default)]
struct Needed {
    packs: HashSet<PackId>,
    keys: HashSet<KeyId>,
}

impl Needed {
    fn add(&mut self, image: &StoredImage) {
        self.packs.extend(image.packs.iter().map(|(id, _)| *id));
        self.keys.extend(image.key);
    }
}

/// Why an image is needed.
struct Root {
    why: String,
    /// Whether it must be there; otherwise it may have been removed before.
    must: bool,
}

impl Survey {
    fn make(store: &Arc<dyn Store>, options: &GcOptions, now: u64) -> Result<Self> {
        let grace = u64::try_from(options.grace.as_millis()).unwrap_or(u64::MAX);
        let young = |listed: &Listed| listed.modified.saturating_add(grace) > now;
        let mut ended = Vec::new();
        let mut roots = channel_roots(store.as_ref(), options)?;
        for (name, pin) in pins(store.as_ref())? {
            let pin = pin?;
            if pin.holds_at(options.lease.clock.unix()) {
                let why = name.to_string();
                roots.entry(pin.image).or_insert(Root { why, must: true });
            } else {
                ended.push(name);
            }
        }
        let manifests = store.list(ObjectKind::Manifest)?;
        let mut needed = Needed::default();
        let mut images: BTreeMap<ImageId, String> = BTreeMap::new();
        for (image, root) in roots {
            match stored_image(store, image, options.retry, &options.cancel) {
                Ok(stored) => {
                    needed.add(&stored);
                    images.insert(image, root.why);
                }
                Err(Error::NoImage { .. }) if !root.must => (),
                Err(error) => return Err(error),
            }
        }
        for listed in manifests.iter().filter(|listed| young(listed)) {
            let ObjectName::Manifest(image) = listed.object else {
                continue;
            };
            if images.contains_key(&image) {
                continue;
            }
            match stored_image(store, image, options.retry, &options.cancel) {
                Ok(stored) => needed.add(&stored),
                // It is kept, but of no use: nobody needs its packs.
                Err(error) if error.is_corruption() => (),
                Err(Error::NoImage { .. }) => (),
                Err(error) => return Err(error),
            }
        }
        let mut survey = Survey {
            collected: Collected {
                ended_pins: ended.iter().map(|note| note.name().to_owned()).collect(),
                ..Collected::default()
            },
            garbage: Vec::new(),
            ended,
        };
        for listed in &manifests {
            survey.sort(listed, young(listed), &images, &needed);
        }
        // Packs last: see above.
        let rest = ObjectKind::ALL.into_iter().filter(|kind| {
            !matches!(
                kind,
                ObjectKind::Manifest | ObjectKind::Pack | ObjectKind::Release
            )
        });
        for kind in rest.chain([ObjectKind::Pack]) {
            options.cancel.check()?;
            for listed in &store.list(kind)? {
                survey.sort(listed, young(listed), &images, &needed);
            }
        }
        survey.collected.kept_images = images.into_iter().collect();
        Ok(survey)
    }

    /// Keeps an object or lets it go.
    fn sort(
        &mut self,
        listed: &Listed,
        young: bool,
        images: &BTreeMap<ImageId, String>,
        needed: &Needed,
    ) {
        let is_needed = match listed.object {
            ObjectName::Manifest(image) => images.contains_key(&image),
            ObjectName::Pack(pack) | ObjectName::Reference(pack) => needed.packs.contains(&pack),
            // Of use to whoever has the old image, which the store need not have any more.
            ObjectName::Delta { new, .. } => images.contains_key(&new),
            ObjectName::Trace(image) => images.contains_key(&image),
            ObjectName::Key { key, .. } => needed.keys.contains(&key),
            ObjectName::Release(_) => true,
        };
        let collected = &mut self.collected;
        if is_needed || young {
            collected.kept.add(listed);
            if !is_needed {
                collected.young.add(listed);
            }
            return;
        }
        collected.removed.add(listed);
        match listed.object {
            ObjectName::Manifest(image) => collected.removed_images.push(image),
            ObjectName::Pack(_) => collected.removed_packs.add(listed),
            _ => (),
        }
        self.garbage.push(listed.object);
    }
}

/// The images that channels need.
fn channel_roots(store: &dyn Store, options: &GcOptions) -> Result<BTreeMap<ImageId, Root>> {
    let mut roots: BTreeMap<ImageId, Root> = BTreeMap::new();
    let keep = usize::try_from(options.keep.max(1)).unwrap_or(usize::MAX);
    for channel in store.channels()? {
        options.cancel.check()?;
        // The current one is the last.
        let releases = history(store, &channel)?;
        let kept = releases.len().saturating_sub(keep);
        for (age, (generation, release)) in releases.into_iter().skip(kept).rev().enumerate() {
            let release = release?;
            let why = format!("channel {channel}, generation {generation}");
            let must = age == 0;
            let root = roots.entry(release.release().image);
            let root = root.or_insert(Root { why, must });
            root.must |= must;
        }
    }
    Ok(roots)
}
