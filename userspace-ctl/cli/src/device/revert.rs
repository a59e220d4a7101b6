// SPDX-License-Identifier: GPL-2.0

//! `pristine device revert`.

use std::io::{self, Write};

use clap::Args;
use pristine_metadata::shared::table::Hex;
use pristine_metadata::shared::Error as Core;
use pristine_metadata::{Access, Changes, Metadata, Select, Superblock};
use serde::Serialize;

use super::{percent, Where};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_bytes, human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device revert /dev/vda --metadata /dev/vdb1 --dry-run   how much would be taken back
  pristine device revert /dev/vda --metadata /dev/vdb1             take it back

The device must not be active. All blocks that changed become stale, in one step that a power cut cannot divide, however
many there are; nothing is fetched and the data device is not written to. From then on the changes are lost: the device shows
its image again, with stale blocks fetched by the helper while it is active, or by the agent before that. It is what the
agent does at each boot with pristine.revert=instant.

Exit codes of this command:
   0  nothing is dirty any more (or was); with --dry-run: always, if the metadata can be read
   4  the metadata is damaged: pristine device repair
   5  it belongs to another data device, or names no image that stale blocks could be fetched from
   7  the device is active, mounted or in use
  14  the metadata must be checked first";

/// Options of `revert`.
#[derive(Args, Debug)]
pub struct RevertArgs {
    #[command(flatten)]
    place: Where,
    /// Say what would become stale, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Reverted {
    blocks: u64,
    block_bytes: u64,
    /// Blocks that became stale now, or would.
    reverted: u64,
    /// All stale blocks afterwards.
    stale: u64,
    image: String,
    generation: u64,
    dry_run: bool,
}

pub fn run(args: &RevertArgs, ui: &Ui) -> Outcome {
    let access = if args.dry_run {
        Access::ReadExclusive
    } else {
        Access::Write
    };
    let mut metadata = Metadata::open(&args.place.devices(), access)?;
    let sb = *metadata.superblock();
    refuse(args, &sb)?;
    let (mut planes, _) = metadata.load()?;
    let reverted = planes.make_stale();
    if reverted > 0 && !args.dry_run {
        metadata.commit(&planes, &Changes::default())?;
    }
    let done = Reverted {
        blocks: planes.blocks(),
        block_bytes: sb.geometry.block_size(),
        reverted,
        stale: planes.count(Select::Stale),
        image: Hex(&sb.image_id).to_string(),
        generation: sb.generation,
        dry_run: args.dry_run,
    };
    ui.result(&done, |out| write(out, &done, ui))
}

/// Refuses what would leave a device that nobody can start.
fn refuse(args: &RevertArgs, sb: &Superblock) -> Outcome {
    let path = args.place.metadata.as_ref().unwrap_or(&args.place.data);
    if sb.needs_check {
        let error = pristine_metadata::Error::Metadata {
            path: path.clone(),
            source: Core::NeedsCheck,
        };
        return Err(error.into());
    }
    if sb.image_id == [0; 32] {
        let what = format!(
            "{} names no image, so blocks that become stale could be fetched from nowhere",
            path.display()
        );
        return Err(Failure::new(Code::Identity, what)
            .hint("a device belongs to an image when the agent has filled it from one"));
    }
    Ok(())
}

fn write(out: &mut dyn Write, done: &Reverted, ui: &Ui) -> io::Result<()> {
    if done.reverted == 0 {
        writeln!(out, "{}", ui.paint(Style::Good, "nothing is dirty"))?;
    } else {
        let word = if done.dry_run {
            ui.paint(Style::Warn, "would be reverted")
        } else {
            ui.paint(Style::Good, "reverted")
        };
        writeln!(
            out,
            "{word}: {} of {} blocks were dirty ({}, {})",
            human_count(done.reverted),
            human_count(done.blocks),
            human_bytes(done.reverted.saturating_mul(done.block_bytes)),
            percent(done.reverted, done.blocks)
        )?;
    }
    writeln!(
        out,
        "  stale  {} blocks, to be fetched from image {} (generation {})",
        human_count(done.stale),
        done.image.get(..16).unwrap_or(&done.image),
        done.generation
    )
}
