// SPDX-License-Identifier: GPL-2.0

//! `pristine device revert`.

use std::io::{self, Write};

use clap::Args;
use pristine_device::dm::{Dm, Managed};
use pristine_metadata::shared::table::Hex;
use pristine_metadata::{
    Access, Changes, Devices, Metadata, Originals, Planes, Select, Superblock,
};
use serde::Serialize;

use super::change::{change_active, name_of, refuse_unchecked, refuse_without_image};
use super::{active, percent, Where};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_bytes, human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device revert /dev/vda --metadata /dev/vdb1 --dry-run   how much would be taken back
  pristine device revert /dev/vda --metadata /dev/vdb1             take it back
  umount /srv && pristine device revert srv                        of a device that is active
  pristine device revert /dev/vda --metadata /dev/vdb1 --undo      from the undo area, without a network

The device must not be active, or nobody may have it open: a file system would go on with what it remembers, and --force is for
readers that do not mind. A device that was suspended is resumed. All blocks that changed become stale, in one step that a power cut cannot divide, however
many there are; nothing is fetched and the data device is not written to. From then on the changes are lost: the device shows
its image again, with stale blocks fetched by the helper while it is active, or by the agent before that. It is what the
agent does at each boot with pristine.revert=instant.

With --undo the originals that the device's undo area keeps (pristine device format --undo) are written back, and need not be
fetched; only blocks without one, if the area got full, become stale. It can be cut and run again.

Exit codes of this command:
   0  nothing is dirty any more (or was); with --dry-run: always, if the metadata can be read
   4  the metadata is damaged: pristine device repair
   5  it belongs to another data device, or names no image that stale blocks could be fetched from
   7  the device is mounted or in use
  14  the metadata must be checked first";

/// Options of `revert`.
#[derive(Args, Debug)]
pub struct RevertArgs {
    #[command(flatten)]
    place: Where,
    /// Put back the originals that the undo area has; only what has none becomes stale
    #[arg(long)]
    undo: bool,
    /// Also if the active device is open: whoever has it open goes on with what it remembers
    #[arg(long)]
    force: bool,
    /// Say what would become stale, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Reverted {
    blocks: u64,
    block_bytes: u64,
    /// Blocks that were dirty, and are not any more, or would not be.
    reverted: u64,
    /// Of those, put back from the undo area.
    undone: u64,
    /// Originals in the undo area that are damaged.
    damaged: u64,
    /// All stale blocks afterwards.
    stale: u64,
    image: String,
    generation: u64,
    dry_run: bool,
}

pub fn run(args: &RevertArgs, ui: &Ui) -> Outcome {
    let active = match &args.place.metadata {
        Some(_) => None,
        None => active(&args.place.data)?,
    };
    let done = match active {
        Some((dm, managed)) => {
            let done = revert_active(args, &dm, &managed, ui)?;
            if done.stale > 0 && !done.dry_run {
                let name = &managed.device.name;
                ui.note(format!(
                    "reads of stale blocks wait for a helper: start pristined for {name}, unless it serves it already"
                ));
            }
            done
        }
        None => {
            let access = match args.dry_run {
                true => Access::ReadExclusive,
                false => Access::Write,
            };
            revert(&args.place.devices(), access, args, ui)?
        }
    };
    ui.result(&done, |out| write(out, &done, ui))
}

/// Takes the changes of metadata back that no kernel uses now.
fn revert(devices: &Devices, access: Access, args: &RevertArgs, ui: &Ui) -> Outcome<Reverted> {
    let dry_run = args.dry_run;
    let mut metadata = Metadata::open(devices, access)?;
    let sb = *metadata.superblock();
    refuse_unchecked(devices, &sb)?;
    let (mut planes, _) = metadata.load()?;
    let reverted = planes.count(Select::Dirty);
    let mut undone = 0;
    let mut damaged = 0;
    if args.undo {
        refuse_without_area(devices, &sb)?;
        let bar = ui.count_bar("reading originals", 1);
        let originals = Originals::read(&mut metadata, &mut |at, of| {
            bar.set_length(of);
            bar.set_position(at);
        });
        bar.finish_and_clear();
        damaged = originals.damaged();
        let missing = originals.missing(&planes, Select::Dirty);
        undone = reverted - missing;
        if missing > 0 {
            refuse_without_image(&name_of(devices), &sb.image_id)?;
        }
        if dry_run {
            // As it would be.
            let stale = originals.missing(&planes, Select::NotClean);
            planes.make_stale();
            return Ok(reverted_to(
                &sb,
                &planes,
                (reverted, undone, damaged),
                stale,
                true,
            ));
        }
        let bar = ui.count_bar("putting back", 1);
        originals.restore(&mut metadata, &mut planes, &mut |at, of| {
            bar.set_length(of);
            bar.set_position(at);
        })?;
        bar.finish_and_clear();
    } else {
        refuse_without_image(&name_of(devices), &sb.image_id)?;
    }
    if planes.make_stale() > 0 && !dry_run {
        metadata.commit(&planes, &Changes::default())?;
    }
    let stale = planes.count(Select::Stale);
    Ok(reverted_to(
        &sb,
        &planes,
        (reverted, undone, damaged),
        stale,
        dry_run,
    ))
}

fn reverted_to(
    sb: &Superblock,
    planes: &Planes,
    (reverted, undone, damaged): (u64, u64, u64),
    stale: u64,
    dry_run: bool,
) -> Reverted {
    Reverted {
        blocks: planes.blocks(),
        block_bytes: sb.geometry.block_size(),
        reverted,
        undone,
        damaged,
        stale,
        image: Hex(&sb.image_id).to_string(),
        generation: sb.generation,
        dry_run,
    }
}

/// Of an active device that nobody has open.
fn revert_active(args: &RevertArgs, dm: &Dm, managed: &Managed, ui: &Ui) -> Outcome<Reverted> {
    let name = managed.device.name.as_str();
    let status = &managed.status;
    if args.dry_run {
        let kept = match (&status.undo, args.undo) {
            (Some(undo), true) => status.dirty.saturating_sub(undo.missing),
            (None, true) => return Err(without_area(name)),
            (_, false) => 0,
        };
        if kept < status.dirty || !args.undo {
            refuse_without_image(name, &status.image)?;
        }
        return Ok(Reverted {
            blocks: status.blocks,
            block_bytes: status.block_size,
            reverted: status.dirty,
            undone: kept,
            damaged: 0,
            stale: status.stale.saturating_add(status.dirty - kept),
            image: Hex(&status.image).to_string(),
            generation: status.generation,
            dry_run: true,
        });
    }
    change_active(dm, managed, args.force, |devices| {
        revert(devices, Access::WriteSuspended, args, ui)
    })
}

fn refuse_without_area(devices: &Devices, sb: &Superblock) -> Outcome {
    if sb.layout.undo_pages != 0 {
        return Ok(());
    }
    Err(without_area(&name_of(devices)))
}

fn without_area(name: &str) -> Failure {
    Failure::new(Code::Usage, format!("{name} has no undo area"))
        .hint("it is made when a device is formatted: pristine device format --undo SIZE; without --undo changed blocks become stale")
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
    if done.undone > 0 {
        writeln!(
            out,
            "  undone {} blocks, from the undo area",
            human_count(done.undone)
        )?;
    }
    if done.damaged > 0 {
        let what = format!(
            "{} originals in the undo area are damaged, and were not used",
            human_count(done.damaged)
        );
        writeln!(out, "  {}", ui.paint(Style::Warn, &what))?;
    }
    if done.stale == 0 {
        return Ok(());
    }
    writeln!(
        out,
        "  stale  {} blocks, to be fetched from image {} (generation {})",
        human_count(done.stale),
        done.image.get(..16).unwrap_or(&done.image),
        done.generation
    )
}
