// SPDX-License-Identifier: GPL-2.0

//! `pristine image delta`

use std::io::{self, Write};
use std::time::Instant;

use clap::Args;
use pristine_image::delta::make::MakeOptions;
use pristine_store::update::{Before, Update};
use pristine_store::{put_delta, CancelToken, ImageSelector, RetryPolicy};
use serde::Serialize;

use super::{open, open_image, parse_selector, short};
use crate::exit::{Code, Failure, Outcome};
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image delta`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image delta /srv/store stable canary
  pristine image delta /srv/store 3f1c…  9a70… --level 22
  What would change, without making it?
    pristine image delta /srv/store stable canary --dry-run

Machines that hold OLD then fetch the delta instead of blocks; without one they fetch what their disk does not hold. \
Publishing makes the delta from the image that the channel had before by itself (--deltas). A delta may be removed at \
any time: nothing depends on it.

JSON fields: old, new, store, bytes, present, blocks_changed, blocks_moved, blocks_new, elapsed_ms, dry_run.")]
pub struct DeltaArgs {
    /// Store that has both images and takes the delta
    store: String,
    /// Image that machines come from, by id or channel
    #[arg(value_name = "OLD", value_parser = parse_selector)]
    old: ImageSelector,
    /// Image that they go to, by id or channel
    #[arg(value_name = "NEW", value_parser = parse_selector)]
    new: ImageSelector,
    #[command(flatten)]
    trust: TrustArgs,
    /// zstd level: 1 is fast, 22 is small
    #[arg(long, default_value_t = 19, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// Threads [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
    /// Only say what would change; make nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Report {
    old: String,
    new: String,
    store: String,
    bytes: Option<u64>,
    present: bool,
    blocks_changed: u64,
    blocks_moved: u64,
    blocks_new: u64,
    elapsed_ms: u64,
    dry_run: bool,
}

pub(super) fn run(args: &DeltaArgs, ui: &Ui) -> Outcome {
    let begin = Instant::now();
    let store = match args.dry_run {
        true => open(&args.store)?,
        false => super::open_to_write(&args.store)?,
    };
    let policy = args.trust.policy()?;
    let old = open_image(&store, Some(&args.old), &policy)?;
    let new = open_image(&store, Some(&args.new), &policy)?;
    if old.image() == new.image() {
        let what = format!("{} and {} are the same image", args.old, args.new);
        return Err(Failure::new(Code::Usage, what)
            .hint("give the image that machines come from, then the one they go to"));
    }
    let cancel = CancelToken::new();
    let (mut bytes, mut present) = (None, false);
    if !args.dry_run {
        let options = MakeOptions {
            level: args.level,
            threads: args.threads,
            ..MakeOptions::default()
        };
        let bar = ui.count_bar("making the delta", 0);
        let made = put_delta(
            &old,
            &new,
            // With the key of an encrypted image, so that the delta is encrypted, too.
            match new.manifest().blinding() {
                Some(_) => new.store(),
                None => store.as_ref(),
            },
            &options,
            &|done, total| {
                bar.set_length(total);
                bar.set_position(done);
            },
            &cancel,
        );
        bar.finish_and_clear();
        let made = made?;
        (bytes, present) = (Some(made.bytes), made.present);
    }
    let before = Before::Image(old.image());
    let update = Update::plan(
        &store,
        &before,
        new.image(),
        None,
        RetryPolicy::default(),
        &cancel,
    )?;
    let update = update
        .ok_or_else(|| Failure::new(Code::NotFound, format!("image {} is gone", old.image())))?;
    let cost = update.cost()?;
    let report = Report {
        old: old.image().to_string(),
        new: new.image().to_string(),
        store: store.location().to_owned(),
        bytes: bytes.or(cost.delta),
        present: present || args.dry_run && cost.delta.is_some(),
        blocks_changed: cost.changed,
        blocks_moved: cost.moved,
        blocks_new: cost.new,
        elapsed_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
        dry_run: args.dry_run,
    };
    ui.result(&report, |out| print(&report, ui, out))
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "{} {} to {}",
        ui.paint(Style::Bold, "from"),
        short(&report.old),
        short(&report.new)
    )?;
    writeln!(
        out,
        "{} blocks change: {} are elsewhere on the old image, {} are new",
        human_count(report.blocks_changed),
        human_count(report.blocks_moved),
        human_count(report.blocks_new),
    )?;
    match (report.bytes, report.present) {
        (Some(bytes), true) => writeln!(
            out,
            "the delta is there: {bytes} bytes ({})",
            human_bytes(bytes)
        ),
        (Some(bytes), false) => {
            writeln!(out, "the delta has {bytes} bytes ({})", human_bytes(bytes))
        }
        (None, _) => writeln!(out, "nothing was made (dry run)"),
    }
}
