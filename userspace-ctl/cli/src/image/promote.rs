// SPDX-License-Identifier: GPL-2.0

//! `pristine image promote`

use std::io::{self, Write};

use clap::Args;
use pristine_store::{promote, ChannelName, ImageSelector, PublishOptions};
use serde::Serialize;

use super::publish::ReleaseArgs;
use super::{list_hint, parse_channel, parse_selector, short};
use crate::exit::Outcome;
use crate::ui::{Style, Ui};

/// Arguments of `pristine image promote`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  What canary is at becomes the next generation of stable:
    pristine image promote /srv/store canary --channel stable --key mill.key
  Back to an image of before, by its id (see pristine channel list):
    pristine image promote /srv/store 5c1f...ab --channel stable

No data is copied; the image must be complete in the store. An encrypted image takes no identity; with one (--identity), its \
boot trace is inherited as ever. If another publisher moves the channel meanwhile, this one \
fails with exit code 7 and leaves the channel alone.

JSON fields: channel, generation, image, image_bytes, unchanged, dry_run.")]
pub struct PromoteArgs {
    /// The store: a directory or s3://BUCKET/PREFIX
    store: String,
    /// Which image: the channel that is at it, or its id
    #[arg(value_name = "CHANNEL|ID", value_parser = parse_selector)]
    from: ImageSelector,
    /// Channel to move to the image
    #[arg(long, value_name = "NAME", value_parser = parse_channel)]
    channel: ChannelName,
    #[command(flatten)]
    release: ReleaseArgs,
    /// Only say what would happen
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
    dry_run: bool,
}

pub(super) fn run(args: &PromoteArgs, ui: &Ui) -> Outcome {
    let store = match args.dry_run {
        true => super::open(&args.store)?,
        false => super::open_to_write(&args.store)?,
    };
    let signers = args.release.sign.signers(args.dry_run)?;
    let options = PublishOptions {
        dry_run: args.dry_run,
        expires: args.release.expires(),
        oldest: args.release.oldest,
        signers,
        trust: args.release.trust.policy()?,
        ..PublishOptions::default()
    };
    let promoted = promote(&store, &args.from, &args.channel, &options)
        .map_err(|error| list_hint(error, &args.from, &args.store))?;
    for remark in store.remarks() {
        ui.note(remark);
    }
    let release = promoted.release.release();
    let report = Report {
        channel: args.channel.to_string(),
        generation: release.generation,
        image: release.image.to_string(),
        image_bytes: release.size,
        unchanged: promoted.unchanged,
        dry_run: args.dry_run,
    };
    ui.result(&report, |out| print(&report, ui, out))
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let (image, generation) = (short(&report.image), report.generation);
    let channel = ui.paint(Style::Bold, &report.channel);
    match (report.unchanged, report.dry_run) {
        (true, _) => writeln!(out, "{channel} is at image {image} already (generation {generation})"),
        (false, true) => writeln!(
            out,
            "{channel} would be at generation {generation}: image {image}\nnothing was changed (dry run)"
        ),
        (false, false) => writeln!(out, "{channel} is at generation {generation}: image {image}"),
    }
}
