// SPDX-License-Identifier: GPL-2.0

//! `pristine image list`

use std::io::{self, Write};

use clap::Args;
use pristine_store::{stored_image, CancelToken, ImageSelector, RetryPolicy};
use pristine_trust::time;
use serde::Serialize;

use super::{open, open_image, short};
use crate::channel::signers::{cell, distrust, signed_by, SignedBy};
use crate::exit::{Code, Outcome};
use crate::key::TrustArgs;
use crate::ui::{human_bytes, Style, Table, Ui};

/// Arguments of `pristine image list`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image list /srv/store
  pristine image list http://server:8080 --json

JSON fields: store, channels (channel, generation, image, image_bytes, published, expires, signed_by (key, label, trusted), \
untrusted; or channel, error), images (image, \
name, created, image_bytes, stored_bytes, packs, encrypted, channels; or image, error). An object that cannot be read is listed \
with its error; `verify` says more. A ? after a key says that it is not trusted here; `pristine channel list` shows the releases \
before.")]
pub struct ListArgs {
    /// The store, a directory or a URL
    store: String,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    store: String,
    channels: Vec<Channel>,
    images: Vec<Image>,
}

#[derive(Serialize)]
struct Channel {
    channel: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    published: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    signed_by: Vec<SignedBy>,
    /// Why the release is not trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    untrusted: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct Image {
    image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stored_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    packs: Option<u64>,
    /// The store key that it takes, and that no identity opens.
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypted: Option<String>,
    channels: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

pub(super) fn run(args: &ListArgs, ui: &Ui) -> Outcome {
    let store = open(&args.store)?;
    let policy = args.trust.policy()?;
    let mut channels = Vec::new();
    for channel in store.channels()? {
        let mut entry = Channel {
            channel: channel.to_string(),
            generation: None,
            image: None,
            image_bytes: None,
            published: None,
            expires: None,
            signed_by: Vec::new(),
            untrusted: None,
            error: None,
        };
        match store.read_pointer(&channel) {
            Ok(Some((signed, _))) => {
                let release = signed.release();
                entry.generation = Some(release.generation);
                entry.image = Some(release.image.to_string());
                entry.image_bytes = Some(release.size);
                entry.published = Some(release.published);
                entry.expires = release.expires;
                entry.signed_by = signed_by(&signed, &policy.keys);
                entry.untrusted = distrust(&signed, &policy);
            }
            // Gone since it was listed.
            Ok(None) => continue,
            Err(error) => entry.error = Some(error.to_string()),
        }
        channels.push(entry);
    }
    let mut images = Vec::new();
    for id in store.images()? {
        let text = id.to_string();
        let pointing = channels
            .iter()
            .filter(|c| c.image.as_deref() == Some(text.as_str()));
        let mut image = Image {
            image: text.clone(),
            name: None,
            created: None,
            image_bytes: None,
            stored_bytes: None,
            packs: None,
            encrypted: None,
            channels: pointing.map(|channel| channel.channel.clone()).collect(),
            error: None,
        };
        match open_image(&store, Some(&ImageSelector::Id(id)), &policy) {
            Ok(reader) => {
                let manifest = reader.manifest();
                let packs = manifest.frames().packs();
                let info = |key: &str| manifest.info().get(key);
                image.name = info("name").map(str::to_owned);
                image.created = info("created").and_then(|text| text.parse().ok());
                image.image_bytes = Some(manifest.size());
                let pack_bytes: u64 = packs.iter().map(|pack| pack.len).sum();
                image.stored_bytes = Some(pack_bytes + manifest.head().file_len());
                image.packs = Some(packs.len() as u64);
            }
            Err(failure) if failure.code() == Code::NoKey => {
                let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
                match stored_image(&store, id, retry, &cancel) {
                    Ok(stored) => {
                        let packs: u64 = stored.packs.iter().map(|(_, len)| *len).sum();
                        image.encrypted = stored.key.map(|key| key.to_string());
                        image.image_bytes = Some(stored.size);
                        image.stored_bytes = Some(packs + stored.manifest_len);
                        image.packs = Some(stored.packs.len() as u64);
                    }
                    Err(error) => image.error = Some(error.to_string()),
                }
            }
            Err(failure) => image.error = Some(failure.to_string()),
        }
        images.push(image);
    }
    // The newest first.
    images.sort_by_key(|image| std::cmp::Reverse(image.created));
    let report = Report {
        store: store.location().to_owned(),
        channels,
        images,
    };
    ui.result(&report, |out| print(&report, ui, out))
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let text = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    if report.channels.is_empty() {
        writeln!(out, "no channels")?;
    } else {
        let heading = [
            "CHANNEL",
            "GENERATION",
            "IMAGE",
            "SIZE",
            "PUBLISHED",
            "EXPIRES",
            "SIGNED BY",
        ];
        let mut table = Table::new(&heading, &[1, 3]);
        for channel in &report.channels {
            table.row(vec![
                channel.channel.clone(),
                text(channel.generation.map(|generation| generation.to_string())),
                text(channel.image.as_ref().map(short)),
                text(channel.image_bytes.map(human_bytes)),
                text(channel.published.map(time)),
                text(channel.expires.map(time)),
                cell(&channel.signed_by),
            ]);
        }
        table.write(ui, out)?;
    }
    writeln!(out)?;
    if report.images.is_empty() {
        writeln!(out, "no images")?;
    } else {
        let heading = ["IMAGE", "NAME", "SIZE", "STORED", "CREATED", "CHANNELS"];
        let mut table = Table::new(&heading, &[2, 3]);
        for image in &report.images {
            table.row(vec![
                short(&image.image),
                match image.encrypted {
                    Some(_) => "(encrypted)".to_owned(),
                    None => text(image.name.clone()),
                },
                text(image.image_bytes.map(human_bytes)),
                text(image.stored_bytes.map(human_bytes)),
                text(image.created.map(time)),
                image.channels.join(" "),
            ]);
        }
        table.write(ui, out)?;
    }
    for channel in &report.channels {
        if let Some(why) = &channel.untrusted {
            let label = ui.paint(Style::Bad, "not trusted:");
            writeln!(out, "{label} {}: {why}", channel.channel)?;
        }
    }
    let channel_errors = report.channels.iter().filter_map(|c| c.error.as_ref());
    let image_errors = report.images.iter().filter_map(|i| i.error.as_ref());
    for error in channel_errors.chain(image_errors) {
        writeln!(out, "{} {error}", ui.paint(Style::Bad, "damaged:"))?;
    }
    Ok(())
}
