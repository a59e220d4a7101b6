// SPDX-License-Identifier: GPL-2.0

//! `pristine image gc`

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use pristine_store::{collect, open_for_writing, Amount, Collected, GcOptions, HttpOptions};
use serde::Serialize;

use super::publish::parse_duration;
use super::short;
use crate::exit::Outcome;
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image gc`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  What would go?
    pristine image gc /srv/store --dry-run
  Keep five generations of each channel:
    pristine image gc /srv/store --keep 5

Kept are the current generation of each channel and those before it (--keep), pinned images (pristine image pin), and \
whatever was stored within the time of --grace. All else is removed: images first, then packs that no image needs. The \
history of channels stays. While somebody publishes to the store nothing is removed (exit code 7), and publishers wait \
while this runs. It can be interrupted at any time, and run again.

JSON fields: kept_images (image, why), removed_images, removed, removed_packs, kept, young (objects, bytes each), \
ended_pins, writers, dry_run.")]
pub struct GcArgs {
    /// The store: a directory or s3://BUCKET/PREFIX
    store: String,
    /// Generations of each channel to keep, the current one included
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    keep: u64,
    /// Keep what is younger than this, like 12h, 7d or 0h: machines may still be reading it
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_grace)]
    grace: u64,
    /// Only say what would be removed, to the byte
    #[arg(long)]
    dry_run: bool,
}

fn parse_grace(text: &str) -> Result<u64, String> {
    match text {
        "0" | "0h" => Ok(0),
        text => parse_duration(text),
    }
}

#[derive(Serialize)]
struct Report {
    kept_images: Vec<Kept>,
    removed_images: Vec<String>,
    removed: Sum,
    removed_packs: Sum,
    kept: Sum,
    young: Sum,
    ended_pins: Vec<String>,
    writers: Vec<String>,
    dry_run: bool,
}

#[derive(Serialize)]
struct Kept {
    image: String,
    why: String,
}

#[derive(Serialize)]
struct Sum {
    objects: u64,
    bytes: u64,
}

impl From<Amount> for Sum {
    fn from(amount: Amount) -> Self {
        Sum {
            objects: amount.objects,
            bytes: amount.bytes,
        }
    }
}

pub(super) fn run(args: &GcArgs, ui: &Ui) -> Outcome {
    let store = match args.dry_run {
        true => super::open(&args.store)?,
        // A place that is no store must not become one by this.
        false => {
            super::open(&args.store)?;
            open_for_writing(&args.store, HttpOptions::default())?
        }
    };
    let options = GcOptions {
        keep: args.keep,
        grace: Duration::from_secs(args.grace),
        dry_run: args.dry_run,
        ..GcOptions::default()
    };
    let bar = ui.count_bar("removing", 0);
    let collected = collect(&store, &options, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report(collected?, args.dry_run);
    ui.result(&report, |out| print(&report, ui, out))
}

fn report(collected: Collected, dry_run: bool) -> Report {
    let kept = collected.kept_images.into_iter();
    let removed = collected.removed_images.iter();
    Report {
        kept_images: kept
            .map(|(image, why)| Kept {
                image: image.to_string(),
                why,
            })
            .collect(),
        removed_images: removed.map(ToString::to_string).collect(),
        removed: collected.removed.into(),
        removed_packs: collected.removed_packs.into(),
        kept: collected.kept.into(),
        young: collected.young.into(),
        ended_pins: collected.ended_pins,
        writers: collected.writers,
        dry_run,
    }
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    for kept in &report.kept_images {
        writeln!(out, "keep   image {} ({})", short(&kept.image), kept.why)?;
    }
    for image in &report.removed_images {
        let remove = ui.paint(Style::Warn, "remove");
        writeln!(out, "{remove} image {}", short(image))?;
    }
    for pin in &report.ended_pins {
        writeln!(out, "remove pin {pin}, which has ended")?;
    }
    let sum = |sum: &Sum| {
        let (objects, bytes) = (human_count(sum.objects), human_bytes(sum.bytes));
        format!("{objects} objects, {} bytes ({bytes})", sum.bytes)
    };
    let (removed, stay) = match report.dry_run {
        true => ("to remove", "would stay"),
        false => ("removed", "stay"),
    };
    writeln!(
        out,
        "{removed}: {}; {stay}: {}",
        sum(&report.removed),
        sum(&report.kept)
    )?;
    if report.young.objects > 0 {
        let young = sum(&report.young);
        writeln!(
            out,
            "of what stays nothing needs {young}, but it is young (--grace)"
        )?;
    }
    for writer in &report.writers {
        writeln!(out, "somebody is at work in the store: {writer}")?;
    }
    if report.dry_run {
        writeln!(out, "nothing was removed (dry run)")?;
    }
    Ok(())
}
