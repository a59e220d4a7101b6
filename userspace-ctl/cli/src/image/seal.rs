// SPDX-License-Identifier: GPL-2.0

//! Whether an image is published encrypted, with which store key, and to whom.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use pristine_store::sealed::{put_key, Identity, KeyId, Recipient, StoreKey};
use pristine_store::{
    stored_image, CancelToken, ChannelName, Error, ErrorKind, ImageReader, Keyring, ObjectKind,
    ObjectName, RetryPolicy, SealedStore, Store, StoredImage,
};

use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

/// Whom to encrypt to.
#[derive(Args, Debug)]
pub(super) struct RecipientArgs {
    /// Encrypt to this age recipient (age1..., see `pristine key new --age`); repeatable
    #[arg(long, value_name = "RECIPIENT", value_parser = parse_recipient)]
    encrypt_to: Vec<Recipient>,
    /// Encrypt to the age recipients in this file, one a line; repeatable
    #[arg(long, value_name = "FILE")]
    recipients_file: Vec<PathBuf>,
}

impl RecipientArgs {
    /// All of them, each once.
    pub(super) fn recipients(&self) -> Outcome<Vec<Recipient>> {
        let mut all = self.encrypt_to.clone();
        for path in &self.recipients_file {
            let text = fs::read_to_string(path)
                .map_err(|error| Failure::io(format!("cannot read {}", path.display()), &error))?;
            let before = all.len();
            for (number, line) in (1..).zip(text.lines()) {
                let line = line.trim();
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                all.push(parse_recipient(line).map_err(|why| {
                    let what = format!("line {number} of {} is wrong", path.display());
                    Failure::new(Code::Usage, what).why(why)
                })?);
            }
            if all.len() == before {
                let what = format!("there is no recipient in {}", path.display());
                return Err(Failure::new(Code::Usage, what));
            }
        }
        let mut once = Vec::new();
        for recipient in all {
            if !once.contains(&recipient) {
                once.push(recipient);
            }
        }
        Ok(once)
    }
}

pub(super) fn parse_recipient(text: &str) -> Result<Recipient, String> {
    let parsed: Result<Recipient, _> = text.parse();
    parsed.map_err(|error| error.to_string())
}

/// How an image is published.
#[derive(Args, Debug)]
pub(super) struct SealArgs {
    #[command(flatten)]
    recipients: RecipientArgs,
    /// Publish in the clear although the channel is encrypted
    #[arg(long, conflicts_with_all = ["encrypt_to", "recipients_file"])]
    unencrypted: bool,
}

/// A store key, and whom it is to be wrapped for.
pub(super) struct Sealing {
    pub(super) key: StoreKey,
    recipients: Vec<Recipient>,
    /// Whom manifests say that they are encrypted to.
    names: Vec<String>,
    /// Made just now.
    pub(super) is_new: bool,
}

impl Sealing {
    /// The store as it takes what is encrypted.
    pub(super) fn over(&self, store: Arc<dyn Store>) -> Arc<dyn Store> {
        let key = self.key.clone();
        Arc::new(SealedStore::sealing(store, key, self.names.clone()))
    }

    /// Puts the key where its recipients find it; before anything that needs it.
    pub(super) fn put_key(&self, store: &dyn Store) -> Outcome {
        put_key(store, &self.key, &self.recipients)?;
        Ok(())
    }
}

/// What a store says of an image, or of none.
fn stored(store: &Arc<dyn Store>, image: pristine_store::ImageId) -> Outcome<Option<StoredImage>> {
    let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
    match stored_image(store, image, retry, &cancel) {
        Ok(stored) => Ok(Some(stored)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A store key, opened by one of the identities.
fn opened(keyring: &Keyring, store: &Arc<dyn Store>, key: KeyId) -> Outcome<Option<StoreKey>> {
    let below = store.below();
    let store = below.as_ref().unwrap_or(store);
    Ok(keyring.key(store.as_ref(), key)?.ok())
}

/// A store key that is in a store and that one of the identities opens.
fn any_key(keyring: &Keyring, store: &Arc<dyn Store>) -> Outcome<Option<StoreKey>> {
    let tags: Vec<KeyId> = keyring.identities().iter().map(tag).collect();
    if tags.is_empty() {
        return Ok(None);
    }
    let mut ids: Vec<KeyId> = Vec::new();
    for listed in store.list(ObjectKind::Key)? {
        if let ObjectName::Key { key, tag } = listed.object {
            if tags.contains(&tag) {
                ids.push(key);
            }
        }
    }
    ids.sort();
    for id in ids {
        if let Some(key) = opened(keyring, store, id)? {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

fn tag(identity: &Identity) -> KeyId {
    KeyId::from_bytes(identity.recipient().tag())
}

impl SealArgs {
    /// How `image` is to be published to a channel in `target`, where nothing may be yet; `None` for in the clear.
    pub(super) fn sealing(
        &self,
        image: &ImageReader,
        target: Option<&Arc<dyn Store>>,
        channel: &ChannelName,
        ui: &Ui,
    ) -> Outcome<Option<Sealing>> {
        let recipients = self.recipients.recipients()?;
        let keyring = Keyring::configured(&[])?.unwrap_or_default();
        let mut names: Vec<String> = recipients.iter().map(ToString::to_string).collect();
        let mut with = |key, said: Vec<String>, is_new| {
            names.extend(
                said.into_iter()
                    .filter(|name| !names.contains(name))
                    .collect::<Vec<_>>(),
            );
            Ok(Some(Sealing {
                key,
                recipients: recipients.clone(),
                names: std::mem::take(&mut names),
                is_new,
            }))
        };
        // An encrypted image has its id by its key.
        if image.manifest().blinding().is_some() {
            if self.unencrypted {
                let what = format!("image {} is encrypted where it is", image.image());
                return Err(Failure::new(Code::Usage, what).hint(
                    "to publish it in the clear, write it out and build it again: pristine image export",
                ));
            }
            let source = image.shared_store();
            let said = stored(&source, image.image())?;
            let key = match said.as_ref().and_then(|said| said.key) {
                Some(id) => opened(&keyring, &source, id)?,
                None => None,
            };
            let said = said.map(|said| said.recipients).unwrap_or_default();
            return match key {
                Some(key) => with(key, said, false),
                None => Err(Failure::new(Code::NoKey, "the image's key is gone")),
            };
        }
        let current = match target {
            Some(store) => match store.read_pointer(channel)? {
                Some((release, _)) => stored(store, release.release().image)?,
                None => None,
            },
            None => None,
        };
        let of_channel = current.as_ref().and_then(|current| current.key);
        if self.unencrypted || (recipients.is_empty() && of_channel.is_none()) {
            return Ok(None);
        }
        if let (Some(id), Some(store)) = (of_channel, target) {
            if let Some(key) = opened(&keyring, store, id)? {
                let said = current.map(|current| current.recipients);
                return with(key, said.unwrap_or_default(), false);
            }
            if recipients.is_empty() {
                let what = format!("channel {channel} is encrypted (store key {id})");
                return Err(Failure::new(Code::NoKey, what)
                    .why("no identity that was given opens it")
                    .hint(
                        "give one (--identity FILE), or say whom to encrypt to (--encrypt-to age1...); --unencrypted \
                         publishes in the clear",
                    ));
            }
        }
        if let Some(store) = target {
            if let Some(key) = any_key(&keyring, store)? {
                return with(key, Vec::new(), false);
            }
        }
        if !keyring.identities().is_empty()
            && !keyring
                .identities()
                .iter()
                .any(|identity| recipients.contains(&identity.recipient()))
        {
            ui.note("the image is not encrypted to any identity that was given: it cannot be read again with them");
        }
        let key = StoreKey::generate().map_err(Error::from)?;
        with(key, Vec::new(), true)
    }
}
