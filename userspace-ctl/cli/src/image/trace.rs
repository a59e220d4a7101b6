// SPDX-License-Identifier: GPL-2.0

//! `pristine image trace`

use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use pristine_image::{trace, BLOCK_SIZE};
use pristine_store::{
    open_for_writing, put_trace, read_trace, HttpOptions, ImageId, ImageSelector, ObjectName,
};
use serde::Serialize;

use super::{open, open_image, parse_selector, short};
use crate::exit::{Code, Failure, Outcome};
use crate::key::TrustArgs;
use crate::ui::{human_bytes, Ui};

/// `pristine image trace ...`
#[derive(Subcommand, Debug)]
pub enum TraceCommand {
    /// Share what a machine recorded, so that all machines with the image prefetch in that order
    Publish(PublishArgs),
    /// Show the trace of an image
    Show(ShowArgs),
    /// Remove the trace of an image
    Remove(RemoveArgs),
}

/// Arguments of `pristine image trace publish`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristined records a boot; take what it has from one machine and give it to all:
    scp machine:/run/pristine/3f1c….trace . && pristine image trace publish /srv/store stable 3f1c….trace
  Another one instead:
    pristine image trace publish /srv/store stable 3f1c….trace --replace --dry-run

A trace is a hint: it says what to fetch first, and each block is verified as ever. Garbage collection removes it with its \
image. The channel's next generation inherits it when that is published: what moved in the image is followed. Caches may go on \
giving out a trace that was replaced.

JSON fields: store, image, runs, blocks, bytes, replaced, unchanged, dry_run.")]
pub struct PublishArgs {
    /// The store: a directory or s3://BUCKET/PREFIX
    store: String,
    /// Which image, by id or channel
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: ImageSelector,
    /// What pristined recorded, /run/pristine/IMAGE.trace on the machine; - for standard input
    file: PathBuf,
    /// Take the place of the trace that the image has
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    trust: TrustArgs,
    /// Only say what would be published
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `pristine image trace show`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image trace show /srv/store stable
  pristine image trace show http://10.0.2.2:8080 stable --runs

JSON fields: store, image, runs, blocks, bytes, order (first, blocks each; with --runs).")]
pub struct ShowArgs {
    /// The store: a directory or a URL
    store: String,
    /// Which image, by id or channel
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: ImageSelector,
    /// Each run of blocks, in order
    #[arg(long)]
    runs: bool,
    #[command(flatten)]
    trust: TrustArgs,
}

/// Arguments of `pristine image trace remove`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image trace remove /srv/store stable

Machines then fetch in the image's order what nobody asks for.

JSON fields: store, image, dry_run.")]
pub struct RemoveArgs {
    /// The store: a directory or s3://BUCKET/PREFIX
    store: String,
    /// Which image, by id or channel
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: ImageSelector,
    #[command(flatten)]
    trust: TrustArgs,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
}

/// Runs a command.
pub(super) fn run(command: &TraceCommand, ui: &Ui) -> Outcome {
    match command {
        TraceCommand::Publish(args) => publish(args, ui),
        TraceCommand::Show(args) => show(args, ui),
        TraceCommand::Remove(args) => remove(args, ui),
    }
}

#[derive(Serialize)]
struct Published {
    store: String,
    image: String,
    runs: usize,
    blocks: u64,
    bytes: u64,
    replaced: bool,
    unchanged: bool,
    dry_run: bool,
}

fn blocks(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}

fn publish(args: &PublishArgs, ui: &Ui) -> Outcome {
    let store = match args.dry_run {
        true => open(&args.store)?,
        false => {
            open(&args.store)?;
            open_for_writing(&args.store, HttpOptions::default())?
        }
    };
    let reader = open_image(&store, Some(&args.image), &args.trust.policy()?)?;
    let image = reader.image();
    let runs = read_file(args, image)?;
    if let Some(run) = runs.iter().find(|run| run.end > reader.blocks()) {
        let what = format!(
            "{}: it names block {}, but the image has {}",
            args.file.display(),
            run.end - 1,
            reader.blocks()
        );
        return Err(Failure::new(Code::Damaged, what));
    }
    let object = ObjectName::Trace(image);
    // One of garbage is as good as none, but has to be replaced all the same.
    let there = store.size(&object)?.is_some();
    let unchanged =
        there && read_trace(store.as_ref(), image).is_ok_and(|t| t.as_ref() == Some(&runs));
    if there && !unchanged && !args.replace {
        let what = format!("image {} has a boot trace already", short(&image));
        return Err(Failure::new(Code::Exists, what).hint("--replace puts this one in its place"));
    }
    if !args.dry_run && !unchanged {
        if there {
            store.remove(&object)?;
        }
        put_trace(store.as_ref(), image, &runs)?;
    }
    let report = Published {
        store: store.location().to_owned(),
        image: image.to_string(),
        runs: runs.len(),
        blocks: blocks(&runs),
        bytes: blocks(&runs) * BLOCK_SIZE as u64,
        replaced: there && !unchanged,
        unchanged,
        dry_run: args.dry_run,
    };
    ui.result(&report, |out| {
        let image = short(&report.image);
        let what = format!(
            "{} runs, {} of content",
            report.runs,
            human_bytes(report.bytes)
        );
        match (report.unchanged, report.dry_run) {
            (true, _) => writeln!(out, "image {image} has this boot trace already: {what}"),
            (false, true) => writeln!(
                out,
                "would be published for image {image}: {what}\nnothing was sent (dry run)"
            ),
            (false, false) => writeln!(out, "published for image {image}: {what}"),
        }
    })
}

fn read_file(args: &PublishArgs, image: ImageId) -> Outcome<Vec<Range<u64>>> {
    let name = args.file.display();
    let cannot = |error: io::Error| {
        let code = match error.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            _ => Code::Io,
        };
        Failure::new(code, format!("cannot read {name}: {error}"))
    };
    let mut bytes = Vec::new();
    // One byte more than may be tells that it is too large.
    let limit = trace::MAX_BYTES + 1;
    match args.file.as_os_str() == "-" {
        true => io::stdin().lock().take(limit).read_to_end(&mut bytes),
        false => std::fs::File::open(&args.file)
            .and_then(|file| file.take(limit).read_to_end(&mut bytes)),
    }
    .map_err(cannot)?;
    trace::parse(&bytes, &image).map_err(|error| {
        Failure::new(Code::Damaged, format!("{name}: {error}"))
            .hint("pristined records one for each image: /run/pristine/IMAGE.trace")
    })
}

#[derive(Serialize)]
struct Shown {
    store: String,
    image: String,
    runs: usize,
    blocks: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<Vec<Run>>,
}

#[derive(Serialize)]
struct Run {
    first: u64,
    blocks: u64,
}

fn none(image: ImageId, store: &str) -> Failure {
    let what = format!("image {} has no boot trace in {store}", short(&image));
    Failure::new(Code::NotFound, what).hint("publish one: pristine image trace publish --help")
}

fn show(args: &ShowArgs, ui: &Ui) -> Outcome {
    let store = open(&args.store)?;
    let image = open_image(&store, Some(&args.image), &args.trust.policy()?)?.image();
    let runs = read_trace(store.as_ref(), image)?.ok_or_else(|| none(image, &args.store))?;
    let report = Shown {
        store: store.location().to_owned(),
        image: image.to_string(),
        runs: runs.len(),
        blocks: blocks(&runs),
        bytes: blocks(&runs) * BLOCK_SIZE as u64,
        order: args.runs.then(|| {
            let run = |run: &Range<u64>| Run {
                first: run.start,
                blocks: run.end - run.start,
            };
            runs.iter().map(run).collect()
        }),
    };
    ui.result(&report, |out| show_text(&report, out))
}

fn show_text(report: &Shown, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "image {}: a boot asks for {} in {} runs",
        short(&report.image),
        human_bytes(report.bytes),
        report.runs
    )?;
    for run in report.order.iter().flatten() {
        writeln!(out, "{} {}", run.first, run.blocks)?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Removed {
    store: String,
    image: String,
    dry_run: bool,
}

fn remove(args: &RemoveArgs, ui: &Ui) -> Outcome {
    let store = match args.dry_run {
        true => open(&args.store)?,
        false => {
            open(&args.store)?;
            open_for_writing(&args.store, HttpOptions::default())?
        }
    };
    let image = open_image(&store, Some(&args.image), &args.trust.policy()?)?.image();
    let object = ObjectName::Trace(image);
    if store.size(&object)?.is_none() {
        return Err(none(image, &args.store));
    }
    if !args.dry_run {
        store.remove(&object)?;
    }
    let report = Removed {
        store: store.location().to_owned(),
        image: image.to_string(),
        dry_run: args.dry_run,
    };
    ui.result(&report, |out| {
        let would = if args.dry_run { "would be " } else { "" };
        writeln!(
            out,
            "{would}removed: the boot trace of image {}",
            short(&report.image)
        )
    })
}
