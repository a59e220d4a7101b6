// SPDX-License-Identifier: GPL-2.0

//! `pristine image show`

use std::io::{self, Write};

use clap::Args;
use pristine_store::{history, pins, Error, ImageId, ImageSelector, Store};
use pristine_trust::time;
use serde::Serialize;

use super::{open, open_image, parse_selector};
use crate::exit::Outcome;
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image show`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image show build/debian.pri
  pristine image show /srv/store stable
  pristine image show http://server:8080 stable --json

JSON fields: store, image, image_bytes, blocks, packs, pack_bytes, manifest_bytes, info (key to value), generations \
(channel, generation, current, published), pins (name, until). What the store cannot list is left out.")]
pub struct ShowArgs {
    /// The store: a directory or a URL
    store: String,
    /// Which image, by id or channel; needed if there are several
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: Option<ImageSelector>,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    store: String,
    image: String,
    image_bytes: u64,
    blocks: u64,
    packs: u64,
    pack_bytes: u64,
    manifest_bytes: u64,
    info: std::collections::BTreeMap<String, String>,
    generations: Vec<Generation>,
    pins: Vec<PinReport>,
}

#[derive(Serialize)]
struct Generation {
    channel: String,
    generation: u64,
    current: bool,
    published: u64,
}

#[derive(Serialize)]
struct PinReport {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<u64>,
}

pub(super) fn run(args: &ShowArgs, ui: &Ui) -> Outcome {
    let store = open(&args.store)?;
    let image = open_image(&store, args.image.as_ref(), &args.trust.policy()?)?;
    let manifest = image.manifest();
    let packs = manifest.frames().packs();
    let info = manifest.info().entries();
    let report = Report {
        store: store.location().to_owned(),
        image: image.image().to_string(),
        image_bytes: image.size(),
        blocks: image.blocks(),
        packs: packs.len() as u64,
        pack_bytes: packs.iter().map(|pack| pack.len).sum(),
        manifest_bytes: manifest.head().file_len(),
        info: info
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
        generations: generations(store.as_ref(), image.image())?,
        pins: pins_of(store.as_ref(), image.image())?,
    };
    ui.result(&report, |out| print(&report, ui, out))
}

/// Where the image is or was; nothing if the store cannot tell.
fn generations(store: &dyn Store, image: ImageId) -> Outcome<Vec<Generation>> {
    let channels = match store.channels() {
        Err(Error::Unsupported { .. }) => return Ok(Vec::new()),
        channels => channels?,
    };
    let mut found = Vec::new();
    for channel in channels {
        let releases = history(store, &channel)?;
        let last = releases.last().map(|(generation, _)| *generation);
        for (generation, release) in releases {
            // One that cannot be read is told of by `pristine channel list`.
            let Some(release) = release.ok().filter(|r| r.release().image == image) else {
                continue;
            };
            found.push(Generation {
                channel: channel.to_string(),
                generation,
                current: Some(generation) == last,
                published: release.release().published,
            });
        }
    }
    Ok(found)
}

fn pins_of(store: &dyn Store, image: ImageId) -> Outcome<Vec<PinReport>> {
    let pins = match pins(store) {
        Err(Error::Unsupported { .. }) => return Ok(Vec::new()),
        pins => pins?,
    };
    let of_image = pins.into_iter().filter_map(|(name, pin)| {
        let pin = pin.ok().filter(|pin| pin.image == image)?;
        Some(PinReport {
            name: name.name().to_owned(),
            until: pin.until,
        })
    });
    Ok(of_image.collect())
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let label = |text: &str| ui.paint(Style::Bold, &format!("{text:<10}"));
    writeln!(out, "{} {}", label("image"), report.image)?;
    let (size, blocks) = (human_bytes(report.image_bytes), human_count(report.blocks));
    writeln!(out, "{} {size} in {blocks} blocks of 4 KiB", label("size"))?;
    writeln!(
        out,
        "{} {} in {} packs (other images may share them), and a manifest of {}",
        label("stored"),
        human_bytes(report.pack_bytes),
        report.packs,
        human_bytes(report.manifest_bytes)
    )?;
    for (key, value) in &report.info {
        let value = match key.as_str() {
            "created" => value.parse().map_or(value.clone(), time),
            _ => value.clone(),
        };
        writeln!(out, "{} {value}", label(key))?;
    }
    for generation in &report.generations {
        writeln!(
            out,
            "{} {} generation {}{}, published {}",
            label("channel"),
            generation.channel,
            generation.generation,
            if generation.current { " (current)" } else { "" },
            time(generation.published)
        )?;
    }
    for pin in &report.pins {
        let until = pin.until.map_or("for good".to_owned(), |until| {
            format!("until {}", time(until))
        });
        writeln!(out, "{} {} {until}", label("pin"), pin.name)?;
    }
    Ok(())
}
