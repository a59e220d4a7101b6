// SPDX-License-Identifier: GPL-2.0

//! `pristine image show`

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Write};

use clap::Args;
use pristine_image::DIGESTS_PER_PAGE;
use pristine_store::{history, pins, Error, ErrorKind, ImageId, ImageReader, ImageSelector, Store};
use pristine_trust::time;
use serde::Serialize;

use super::{open, open_image, parse_selector, short};
use crate::exit::Outcome;
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image show`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image show build/debian.pri
  pristine image show http://server:8080 stable

The whole manifest is read, and no pack.

JSON fields: store, image, name, created, image_bytes, blocks, blocks_zero, blocks_unique, blocks_duplicate, \
stored_bytes (frames that it needs, and the manifest), manifest_bytes, packs, pack_bytes (whole packs), frames, \
frame_bytes, file_systems (by partition number, or \"disk\": type, uuid, label, used, free, in blocks), info (all notes), \
generations (channel, generation, published, expires, parent, current), pins (name, until).")]
pub struct ShowArgs {
    /// The store, a directory or a URL
    store: String,
    /// The image, by id or channel; needed if there are several
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: Option<ImageSelector>,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    store: String,
    image: String,
    name: Option<String>,
    created: Option<u64>,
    image_bytes: u64,
    blocks: u64,
    blocks_zero: u64,
    blocks_unique: u64,
    blocks_duplicate: u64,
    stored_bytes: u64,
    manifest_bytes: u64,
    packs: u64,
    pack_bytes: u64,
    frames: u64,
    frame_bytes: u64,
    file_systems: BTreeMap<String, BTreeMap<String, String>>,
    info: BTreeMap<String, String>,
    generations: Vec<NamedBy>,
    pins: Vec<PinReport>,
}

/// A release that names the image.
#[derive(Serialize)]
struct NamedBy {
    channel: String,
    generation: u64,
    published: u64,
    expires: Option<u64>,
    parent: Option<String>,
    /// Whether the channel points to it.
    current: bool,
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
    let info: BTreeMap<_, _> = manifest
        .info()
        .entries()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let table = manifest.frames();
    let frames = (0..table.frames()).filter_map(|index| table.frame(index));
    let frame_bytes: u64 = frames.map(|frame| u64::from(frame.len)).sum();
    let (zero, unique) = count(&image, ui)?;
    let manifest_bytes = manifest.head().file_len();
    let report = Report {
        store: store.location().to_owned(),
        image: image.image().to_string(),
        name: info.get("name").cloned(),
        created: info.get("created").and_then(|text| text.parse().ok()),
        image_bytes: image.size(),
        blocks: image.blocks(),
        blocks_zero: zero,
        blocks_unique: unique,
        blocks_duplicate: image.blocks() - zero - unique,
        stored_bytes: frame_bytes + manifest_bytes,
        manifest_bytes,
        packs: table.packs().len() as u64,
        pack_bytes: table.packs().iter().map(|pack| pack.len).sum(),
        frames: u64::from(table.frames()),
        frame_bytes,
        file_systems: file_systems(&info),
        info,
        generations: generations(store.as_ref(), &image)?,
        pins: pins_of(store.as_ref(), image.image())?,
    };
    ui.result(&report, |out| print(&report, ui, out))
}

/// Zero blocks and distinct other ones.
fn count(image: &ImageReader, ui: &Ui) -> Outcome<(u64, u64)> {
    let manifest = image.manifest();
    let bar = ui.count_bar("reading", manifest.pages());
    let mut zero = 0;
    // A slot is a distinct block; of frames that other images share, not all are this image's.
    let mut slots: HashSet<u64> = HashSet::new();
    for number in 0..manifest.pages() {
        if manifest.page_range(number).is_empty() {
            let blocks = manifest.page_blocks(number);
            zero += (blocks.end - blocks.start).min(DIGESTS_PER_PAGE as u64);
        } else {
            for block in image.page(number)?.blocks() {
                match block.slot {
                    Some(slot) => drop(slots.insert(slot)),
                    None => zero += 1,
                }
            }
        }
        bar.set_position(number + 1);
    }
    bar.finish_and_clear();
    Ok((zero, slots.len() as u64))
}

/// The `fs.` notes, by partition.
fn file_systems(info: &BTreeMap<String, String>) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut found: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (key, value) in info {
        let Some(key) = key.strip_prefix("fs.") else {
            continue;
        };
        let (place, key) = match key.split_once('.') {
            Some((number, key)) => (number, key),
            None => ("disk", key),
        };
        let notes = found.entry(place.to_owned()).or_default();
        notes.insert(key.to_owned(), value.clone());
    }
    found
}

fn generations(store: &dyn Store, image: &ImageReader) -> Outcome<Vec<NamedBy>> {
    let channels = match store.channels() {
        Ok(channels) => channels,
        // A plain web server lists nothing; the channel that it was opened by is known.
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            let release = image
                .release()
                .map(|signed| signed.release().channel.clone());
            release.into_iter().collect()
        }
        Err(error) => return Err(error.into()),
    };
    let mut named = Vec::new();
    for channel in channels {
        let releases = match history(store, &channel) {
            Ok(releases) => releases,
            // A damaged channel is `verify`'s business.
            Err(Error::Pointer { .. } | Error::Unsupported { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let last = releases.last().map(|(generation, _)| *generation);
        for (generation, release) in releases {
            let Ok(release) = release else { continue };
            let release = release.release();
            if release.image == image.image() {
                named.push(NamedBy {
                    channel: channel.to_string(),
                    generation,
                    published: release.published,
                    expires: release.expires,
                    parent: release.parent.map(|parent| parent.to_string()),
                    current: Some(generation) == last,
                });
            }
        }
    }
    Ok(named)
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
    let label = |text: &str| ui.paint(Style::Bold, &format!("{text:<9}"));
    writeln!(out, "{} {}", label("image"), report.image)?;
    if let Some(name) = &report.name {
        writeln!(out, "{} {name}", label("name"))?;
    }
    if let Some(created) = report.created {
        writeln!(out, "{} {}", label("created"), time(created))?;
    }
    writeln!(
        out,
        "{} {} in {} blocks: {} distinct, {} duplicates, {} zero",
        label("size"),
        human_bytes(report.image_bytes),
        human_count(report.blocks),
        human_count(report.blocks_unique),
        human_count(report.blocks_duplicate),
        human_count(report.blocks_zero),
    )?;
    writeln!(
        out,
        "{} {} in {} frames of {} packs ({} in all), and a manifest of {}",
        label("stored"),
        human_bytes(report.frame_bytes),
        human_count(report.frames),
        human_count(report.packs),
        human_bytes(report.pack_bytes),
        human_bytes(report.manifest_bytes),
    )?;
    for (place, notes) in &report.file_systems {
        let place = match place.as_str() {
            "disk" => String::new(),
            number => format!("partition {number}: "),
        };
        let note = |key: &str| notes.get(key).map(String::as_str);
        let mut line = place + note("type").unwrap_or("unknown");
        for key in ["label", "uuid"] {
            if let Some(value) = note(key) {
                line.push_str(&format!(", {key} {value}"));
            }
        }
        if let (Some(used), Some(free)) = (note("used"), note("free")) {
            line.push_str(&format!(", {used} blocks used, {free} free"));
        }
        writeln!(out, "{} {line}", label("contents"))?;
    }
    for release in &report.generations {
        let current = if release.current { ", current" } else { "" };
        let parent = match &release.parent {
            Some(parent) => format!(", after image {}", short(parent)),
            None => String::new(),
        };
        writeln!(
            out,
            "{} {} generation {}{current}, published {}{parent}",
            label("release"),
            release.channel,
            release.generation,
            time(release.published),
        )?;
    }
    if report.generations.is_empty() {
        writeln!(out, "{} none", label("release"))?;
    }
    for pin in &report.pins {
        let until = pin.until.map_or("for good".to_owned(), |until| {
            format!("until {}", time(until))
        });
        writeln!(out, "{} {} {until}", label("pin"), pin.name)?;
    }
    Ok(())
}
