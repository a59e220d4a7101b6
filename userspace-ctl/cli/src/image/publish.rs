// SPDX-License-Identifier: GPL-2.0

//! `pristine image publish`

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use pristine_image::delta::make::MakeOptions;
use pristine_image::BLOCK_SIZE;
use pristine_store::{
    open_for_writing, publish, ChannelName, DeltaOptions, HttpOptions, ImageSelector, NewRelease,
    PublishOptions, Published, SignedRelease, Store,
};
use serde::Serialize;

use super::{open, open_image, parse_channel, parse_selector, short};
use crate::exit::{Code, Outcome};
use crate::ui::{human_bytes, Style, Ui};

/// Arguments of `pristine image publish`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image publish build/debian.pri /srv/store --channel stable
  pristine image publish build/debian.pri /srv/store --channel stable --dry-run
  To an object store; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY:
    pristine image publish build/debian.pri s3://images/lab --channel stable
  Promote what canary points to:
    pristine image publish /srv/store /srv/store --image canary --channel stable

Packs and manifest come first, the channel moves last: machines see the old generation or the new one, never a part. \
A publish that was interrupted goes on where it stopped when it is run again. If another publisher moves the \
channel meanwhile, this one fails with exit code 7 and leaves the channel alone.

JSON fields: channel, generation, image, image_bytes, unchanged, sent_objects, sent_bytes, present_objects, \
present_bytes, delta_bytes, elapsed_ms, dry_run.")]
pub struct PublishArgs {
    /// Where the image is: a built image, or any other store (directory or URL)
    from: String,
    /// Store to publish to: a directory, made if it is missing, or s3://BUCKET/PREFIX?endpoint=URL&region=NAME
    to: String,
    /// Channel to move to the image
    #[arg(long, value_name = "NAME", value_parser = parse_channel)]
    channel: ChannelName,
    /// Which image, by id or channel; needed if there are several
    #[arg(long, value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: Option<ImageSelector>,
    /// Make deltas from so many images that the channel had last, so that machines fetch little
    #[arg(long, value_name = "N", default_value_t = 1)]
    deltas: usize,
    /// zstd level of the deltas: 1 is fast, 22 is small
    #[arg(long, value_name = "LEVEL", default_value_t = 19, value_parser = clap::value_parser!(i32).range(1..=22))]
    delta_level: i32,
    /// Only say what would be sent, to the byte (without deltas, which are not made then)
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Report {
    channel: String,
    generation: u64,
    image: String,
    image_bytes: u64,
    unchanged: bool,
    sent_objects: u64,
    sent_bytes: u64,
    present_objects: u64,
    present_bytes: u64,
    delta_bytes: u64,
    elapsed_ms: u64,
    dry_run: bool,
}

pub(super) fn run(args: &PublishArgs, ui: &Ui) -> Outcome {
    let begin = Instant::now();
    let source = open(&args.from)?;
    let image = open_image(&source, args.image.as_ref())?;
    let target = open_target(&args.to, args.dry_run)?;
    let bar = ui.bytes_bar("publishing", 0);
    let delta_bar = bar.clone();
    let options = PublishOptions {
        dry_run: args.dry_run,
        deltas: DeltaOptions {
            count: args.deltas,
            make: MakeOptions {
                level: args.delta_level,
                ..MakeOptions::default()
            },
            progress: Arc::new(move |done, total| {
                delta_bar.set_prefix("making the delta");
                delta_bar.set_length(total * BLOCK_SIZE as u64);
                delta_bar.set_position(done * BLOCK_SIZE as u64);
            }),
        },
        ..PublishOptions::default()
    };
    let published = match target {
        Some(target) => {
            let published = publish(&image, &target, &args.channel, &options, &|done, total| {
                bar.set_length(total);
                bar.set_position(done);
            });
            bar.finish_and_clear();
            let published = published?;
            for remark in target.remarks() {
                ui.note(remark);
            }
            published
        }
        None => dry_run_on_nothing(&image, &args.channel),
    };
    let release = published.release.release();
    let report = Report {
        channel: args.channel.to_string(),
        generation: release.generation,
        image: release.image.to_string(),
        image_bytes: release.size,
        unchanged: published.unchanged,
        sent_objects: published.sent_objects,
        sent_bytes: published.sent_bytes,
        present_objects: published.present_objects,
        present_bytes: published.present_bytes,
        delta_bytes: published.delta_bytes,
        elapsed_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
        dry_run: args.dry_run,
    };
    ui.result(&report, |out| print(&report, ui, out))
}

/// The store to publish to; `None` for one that does not exist and must not be made.
fn open_target(to: &str, dry_run: bool) -> Outcome<Option<Arc<dyn Store>>> {
    if !dry_run {
        return Ok(Some(open_for_writing(to, HttpOptions::default())?));
    }
    match open(to) {
        Err(error) if error.code() == Code::NotFound && !Path::new(to).exists() => Ok(None),
        result => result.map(Some),
    }
}

/// What publishing to an empty store would take: everything.
fn dry_run_on_nothing(image: &pristine_store::ImageReader, channel: &ChannelName) -> Published {
    let packs = image.manifest().frames().packs();
    let bytes: u64 = packs.iter().map(|pack| pack.len).sum();
    let new = NewRelease {
        image: image.image(),
        size: image.size(),
        published: None,
        expires: None,
        oldest: None,
    };
    Published {
        release: SignedRelease::unsigned(new.after(channel, None)),
        unchanged: false,
        sent_objects: packs.len() as u64 + 1,
        sent_bytes: bytes + image.manifest().head().file_len(),
        present_objects: 0,
        present_bytes: 0,
        delta_bytes: 0,
    }
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let (would, sent) = match report.dry_run {
        true => ("would be ", "to send"),
        false => ("is ", "sent"),
    };
    if report.unchanged {
        writeln!(
            out,
            "{} is at image {} already (generation {})",
            ui.paint(Style::Bold, &report.channel),
            short(&report.image),
            report.generation
        )?;
    } else {
        writeln!(
            out,
            "{} {would}at generation {}: image {}",
            ui.paint(Style::Bold, &report.channel),
            report.generation,
            report.image
        )?;
    }
    writeln!(
        out,
        "{sent}: {} objects, {} bytes ({}); there before: {} objects ({})",
        report.sent_objects,
        report.sent_bytes,
        human_bytes(report.sent_bytes),
        report.present_objects,
        human_bytes(report.present_bytes),
    )?;
    if report.delta_bytes > 0 {
        let bytes = report.delta_bytes;
        writeln!(
            out,
            "made: a delta from what the channel had, {bytes} bytes ({})",
            human_bytes(bytes)
        )?;
    }
    if report.dry_run {
        writeln!(out, "nothing was sent (dry run)")?;
    }
    Ok(())
}
