// SPDX-License-Identifier: GPL-2.0

//! The history of a channel: making its next release, and reading those that were made.
//!
//! A release is written to `releases/<channel>/<generation>` first, which nobody can do twice, and then the pointer is
//! moved to it. So the history holds all that the pointer ever held. A publisher that loses a race, or dies between the
//! two, leaves an entry that the pointer never held: its number is not used again.

use std::sync::Arc;

use pristine_image::ImageId;
use pristine_trust::{now, Signer};

use crate::error::{Error, Result};
use crate::object::{ChannelName, ObjectName, ReleaseName};
use crate::release::{Release, SignedRelease, MAX_RELEASE_LEN};
use crate::store::{Put, Revision, Store};

/// Entries of unfinished publishers that are passed over before it is called a race.
const MAX_SKIPPED: u64 = 64;

/// What a new release is to say.
#[derive(Clone, Debug)]
pub struct NewRelease {
    /// The image.
    pub image: ImageId,
    /// Its size in bytes.
    pub size: u64,
    /// Seconds since 1970 to note as the time of publishing; `None` for now.
    pub published: Option<u64>,
    /// When it expires, in seconds since 1970.
    pub expires: Option<u64>,
    /// The oldest generation that a machine may still accept; `None` for what the release before said.
    pub oldest: Option<u64>,
}

impl NewRelease {
    /// The release that follows `before`.
    pub fn after(&self, channel: &ChannelName, before: Option<&Release>) -> Release {
        Release {
            channel: channel.clone(),
            generation: before.map_or(0, |release| release.generation) + 1,
            image: self.image,
            size: self.size,
            published: self.published.unwrap_or_else(now),
            expires: self.expires,
            oldest: self.oldest.or(before.and_then(|release| release.oldest)),
            parent: before.map(|release| release.image),
        }
    }
}

/// Makes a release the next generation of a channel, signed with each of `signers`: writes it into the history and moves
/// the pointer. `before` is what [`Store::read_pointer`] gave when the caller began; all objects of the image must be in
/// the store already. What was signed once stays signed.
///
/// # Errors
/// [`Error::Conflict`] if another publisher moved the channel meanwhile, which then is as the other left it;
/// [`Error::Sign`], [`Error::BadRelease`], and what can go wrong with the store.
pub fn append(
    store: &dyn Store,
    channel: &ChannelName,
    before: Option<&(SignedRelease, Revision)>,
    new: &NewRelease,
    signers: &[Arc<dyn Signer>],
) -> Result<SignedRelease> {
    check_signers(channel, before.map(|(current, _)| current), signers)?;
    if let Some((current, _)) = before {
        // One from before there was a history.
        let name = ReleaseName::new(channel, current.release().generation);
        store.put(&ObjectName::Release(name), current.encode().as_bytes())?;
    }
    let mut release = new.after(channel, before.map(|(current, _)| current.release()));
    let first = release.generation;
    let revision = before.map(|(_, revision)| revision);
    loop {
        let signed = sign(&release, signers)?;
        let object = ObjectName::Release(ReleaseName::new(channel, release.generation));
        let put = store.put(&object, signed.encode().as_bytes())?;
        if put == Put::Created || store.get(&object, MAX_RELEASE_LEN)? == signed.encode().as_bytes()
        {
            store.swap_pointer(revision, &signed)?;
            return Ok(signed);
        }
        // Either another publisher is about to move the pointer, or one died before it did.
        let now = store.read_pointer(channel)?;
        let moved = now.as_ref().map(|(_, revision)| revision) != revision;
        if moved || release.generation - first >= MAX_SKIPPED {
            let now = now.map(|(current, _)| current.release().generation);
            return Err(Error::Conflict {
                location: store.location().to_owned(),
                channel: channel.clone(),
                now: match now {
                    Some(generation) => format!("to generation {generation}"),
                    None => "by a publisher that is still at it".to_owned(),
                },
            });
        }
        release.generation += 1;
    }
}

/// Whether a release that these sign may follow: one after a signed one is signed.
pub(crate) fn check_signers(
    channel: &ChannelName,
    before: Option<&SignedRelease>,
    signers: &[Arc<dyn Signer>],
) -> Result<()> {
    if signers.is_empty() && before.is_some_and(|release| !release.signatures().is_empty()) {
        let why = "the one before is signed, and machines may refuse one that is not; sign it";
        return Err(Error::BadRelease {
            channel: channel.clone(),
            why: why.to_owned(),
        });
    }
    Ok(())
}

fn sign(release: &Release, signers: &[Arc<dyn Signer>]) -> Result<SignedRelease> {
    let mut signed = SignedRelease::unsigned(release.clone());
    let bad = |why| Error::BadRelease {
        channel: release.channel.clone(),
        why,
    };
    if release.oldest.is_some_and(|o| o > release.generation) {
        let generation = release.generation;
        let why = format!("the oldest allowed generation is above its own, which is {generation}");
        return Err(bad(why));
    }
    if release
        .expires
        .is_some_and(|time| time <= release.published)
    {
        return Err(bad("it would expire before it is published".to_owned()));
    }
    for signer in signers {
        let comment = format!(
            "pristine channel {} generation {}",
            release.channel, release.generation
        );
        let signature = signer.sign(signed.text().as_bytes(), &comment)?;
        signed.add_signature(&signature).map_err(bad)?;
    }
    Ok(signed)
}

/// An entry of a channel's history.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Pointer`] for damage, and what can go wrong on the way.
pub fn read_release(
    store: &dyn Store,
    channel: &ChannelName,
    generation: u64,
) -> Result<SignedRelease> {
    let object = ObjectName::Release(ReleaseName::new(channel, generation));
    let bytes = store.get(&object, MAX_RELEASE_LEN)?;
    let signed = SignedRelease::parse(&bytes, channel, store.location())?;
    let found = signed.release().generation;
    if found != generation {
        return Err(Error::Pointer {
            location: store.location().to_owned(),
            channel: channel.clone(),
            why: format!("generation {found} is in the place of generation {generation}"),
        });
    }
    Ok(signed)
}

/// The releases of a channel, the oldest first and the current one last; of those that cannot be read the generation and
/// why. Empty if there is no such channel.
///
/// # Errors
/// As [`Store::releases`] and [`Store::read_pointer`].
pub fn history(
    store: &dyn Store,
    channel: &ChannelName,
) -> Result<Vec<(u64, Result<SignedRelease>)>> {
    let Some((current, _)) = store.read_pointer(channel)? else {
        return Ok(Vec::new());
    };
    let last = current.release().generation;
    let before = store.releases(channel)?.into_iter().filter(|g| *g < last);
    let mut releases: Vec<_> = before
        .map(|generation| (generation, read_release(store, channel, generation)))
        .collect();
    releases.push((last, Ok(current)));
    Ok(releases)
}
