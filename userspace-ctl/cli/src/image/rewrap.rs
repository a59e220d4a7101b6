// SPDX-License-Identifier: GPL-2.0

//! `pristine image rewrap`

use clap::Args;
use pristine_store::sealed::{put_key, recipients_of, KeyId, Recipient};
use pristine_store::{
    stored_image, CancelToken, Error, ErrorKind, Found, ImageSelector, Keyring, ObjectName,
    RetryPolicy, Store,
};
use serde::Serialize;
use std::sync::Arc;

use super::seal::{parse_recipient, RecipientArgs};
use super::{open, open_to_write, parse_selector, writer_lease};
use crate::exit::{Code, Failure, Outcome};
use crate::key::TrustArgs;
use crate::ui::Ui;

/// Arguments of `pristine image rewrap`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image rewrap /srv/store --encrypt-to age1... --identity mine.key
  pristine image rewrap /srv/store stable --recipients-file machines.txt
  pristine image rewrap /srv/store --remove age1...

All images that were encrypted with the same store key are opened at once, for it is the key that is encrypted to each \
recipient; packs and manifests stay as they are. It takes an identity that opens the key. Who is removed cannot fetch the key \
any more, but may have kept it: to shut somebody out of what comes next, publish it with a new key, that is without \
--identity and with --encrypt-to, to another channel or store.

JSON fields: store, keys (key, added, removed, copies).")]
pub struct RewrapArgs {
    /// The store: a directory or s3://...
    store: String,
    /// The image whose key is meant, by id or channel [default: the keys of all images]
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: Option<ImageSelector>,
    #[command(flatten)]
    recipients: RecipientArgs,
    /// Take this recipient's copy of the key out of the store; repeatable
    #[arg(long, value_name = "RECIPIENT", value_parser = parse_recipient)]
    remove: Vec<Recipient>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Report {
    store: String,
    keys: Vec<Key>,
    dry_run: bool,
}

#[derive(Serialize)]
struct Key {
    key: String,
    added: Vec<String>,
    removed: Vec<String>,
    /// Recipients that have a copy now.
    copies: Option<usize>,
}

fn copy_of(key: KeyId, recipient: &Recipient) -> ObjectName {
    ObjectName::Key {
        key,
        tag: KeyId::from_bytes(recipient.tag()),
    }
}

/// The store keys of the images that are meant, each with one of these images.
fn keys_of(args: &RewrapArgs, store: &Arc<dyn Store>) -> Outcome<Vec<KeyId>> {
    let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
    let images = match &args.image {
        Some(selector) => {
            let policy = args.trust.policy()?;
            vec![Found::look_up(store.as_ref(), selector, &policy, retry, &cancel)?.image]
        }
        None => store.images()?,
    };
    let mut keys = Vec::new();
    for image in images {
        let stored = stored_image(store, image, retry, &cancel);
        match stored {
            Ok(stored) => keys.extend(stored.key),
            // One that is damaged does not keep the others from being opened.
            Err(error) if error.is_corruption() && args.image.is_none() => (),
            Err(error) => return Err(error.into()),
        }
    }
    keys.sort();
    keys.dedup();
    match keys.is_empty() {
        true => {
            let what = match &args.image {
                Some(selector) => format!("{selector} is not encrypted"),
                None => format!("nothing in {} is encrypted", args.store),
            };
            Err(Failure::new(Code::NotFound, what))
        }
        false => Ok(keys),
    }
}

pub(super) fn run(args: &RewrapArgs, ui: &Ui) -> Outcome {
    let recipients = args.recipients.recipients()?;
    if recipients.is_empty() && args.remove.is_empty() {
        return Err(Failure::new(
            Code::Usage,
            "nobody to open the key to, and nobody to remove",
        )
        .hint("give --encrypt-to age1..., --recipients-file FILE or --remove age1..."));
    }
    if let Some(both) = args.remove.iter().find(|r| recipients.contains(r)) {
        let what = format!("{both} is to be added and removed");
        return Err(Failure::new(Code::Usage, what));
    }
    let store = open(&args.store)?;
    let store = match args.dry_run {
        true => store,
        false => open_to_write(&args.store)?,
    };
    let _lease = match args.dry_run {
        true => None,
        false => Some(writer_lease(&store, "rewrap", ui)?),
    };
    let keyring = Keyring::configured(&[])?.unwrap_or_default();
    let below = store.below();
    let plain = below.as_ref().unwrap_or(&store).as_ref();
    let mut report = Report {
        store: store.location().to_owned(),
        keys: Vec::new(),
        dry_run: args.dry_run,
    };
    for id in keys_of(args, &store)? {
        let key = keyring.key(plain, id)?.map_err(|why| Error::NoKey {
            location: plain.location().to_owned(),
            object: "what is to be opened to others".to_owned(),
            key: id,
            why,
            recipients: Vec::new(),
        })?;
        let mut added = Vec::new();
        for recipient in &recipients {
            if plain.size(&copy_of(id, recipient))?.is_none() {
                added.push(*recipient);
            }
        }
        let mut removed = Vec::new();
        for recipient in &args.remove {
            if plain.size(&copy_of(id, recipient))?.is_some() {
                removed.push(*recipient);
            }
        }
        // A key that nobody can open any more is a store that nobody can read any more.
        let copies = match recipients_of(plain, id) {
            Ok(copies) => Some(copies.len() + added.len() - removed.len()),
            Err(error) if error.kind() == ErrorKind::Unsupported => None,
            Err(error) => return Err(error.into()),
        };
        if !removed.is_empty() && copies == Some(0) {
            let what = format!("nobody could open store key {id} any more");
            return Err(Failure::new(Code::Usage, what)
                .hint("open it to somebody else in the same step: --encrypt-to age1..."));
        }
        if !args.dry_run {
            put_key(plain, &key, &added)?;
            for recipient in &removed {
                plain.remove(&copy_of(id, recipient))?;
            }
        }
        report.keys.push(Key {
            key: id.to_string(),
            added: added.iter().map(ToString::to_string).collect(),
            removed: removed.iter().map(ToString::to_string).collect(),
            copies,
        });
    }
    ui.result(&report, |out| {
        for key in &report.keys {
            writeln!(out, "store key {}", key.key)?;
            let would = if args.dry_run { "would be " } else { "" };
            for recipient in &key.added {
                writeln!(out, "  {would}opened to {recipient}")?;
            }
            for recipient in &key.removed {
                writeln!(out, "  {would}taken from {recipient}")?;
            }
            if key.added.is_empty() && key.removed.is_empty() {
                writeln!(out, "  nothing to do")?;
            }
        }
        Ok(())
    })
}
