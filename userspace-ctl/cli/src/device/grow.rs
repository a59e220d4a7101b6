// SPDX-License-Identifier: GPL-2.0

//! `pristine device grow`.

use std::path::PathBuf;

use clap::Args;
use pristine_device::dm::{Dm, Managed};
use pristine_metadata::shared::{PAGE_SIZE, SECTOR_SIZE};
use pristine_metadata::{preview_growth, Access, Devices, GrowOptions, Growth, Stores, Superblock};
use serde::Serialize;

use super::{active, device_name, parse_size, refuse_read_only};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_bytes, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  lvextend -L +10G vg/root && pristine device grow root && resize2fs /dev/mapper/root
  pristine device grow /dev/vda --metadata /dev/vdb1     of a device that is not active
  pristine device grow disk.img --from 2G                metadata in the tail: the file had 2 GiB before
  pristine device grow root --size 20G --dry-run

Enlarge the data device first. All states are kept; what is new is dirty, so that a revert makes it zero as the image is
there. A power cut leaves the old size in force, and then the same command goes on, or the new one.

An active device grows while it is used; its metadata must be on a device of its own. If that is too small for the
larger maps, enlarge it, too. Metadata in the reserved tail of the data device moves to the new end: the device must not be
active, and must have grown by more than the metadata takes. Where it lies is searched for, which reads the whole device,
unless --from says what size the device had. A managed device cannot shrink.

Exit codes of this command:
   0  it is that large now (or was); with --dry-run: it can be
   3  there is no such device, or no metadata
   4  the metadata is damaged: pristine device repair
   5  the metadata is another device's, or the device has shrunk
   7  the device is in use
  10  the data device or the metadata device is too small
  14  the metadata must be checked first";

/// Options of `grow`.
#[derive(Args, Debug)]
pub struct GrowArgs {
    /// An active device's name, or the data device (or an image file of it) of one that is not active
    #[arg(value_name = "NAME|DATA")]
    device: PathBuf,
    /// The metadata device, if DATA is given; without it the metadata is in a reserved tail of DATA
    #[arg(short, long, value_name = "DEVICE")]
    metadata: Option<PathBuf>,
    /// How much to manage; by default all that the data device has
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    size: Option<u64>,
    /// The size that the data device had, if the metadata is in its tail
    #[arg(long, value_name = "BYTES", value_parser = parse_size, conflicts_with = "metadata")]
    from: Option<u64>,
    /// Say what would become of it, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Grown {
    device: String,
    /// Whether it was active.
    active: bool,
    managed_bytes_before: u64,
    managed_bytes: u64,
    data_bytes_before: u64,
    data_bytes: u64,
    /// Blocks that it has more than before; they are dirty.
    new_blocks: u64,
    block_bytes: u64,
    /// Whether anything was to be done.
    changed: bool,
    dry_run: bool,
}

pub fn run(args: &GrowArgs, ui: &Ui) -> Outcome {
    let active = match args.metadata.is_some() || args.from.is_some() {
        true => None,
        false => active(&args.device)?,
    };
    let done = match active {
        Some((dm, managed)) => grow_active(args, &dm, &managed)?,
        None => grow_offline(args, ui)?,
    };
    ui.result(&done, |out| {
        let size = human_bytes(done.managed_bytes);
        if !done.changed {
            let text = format!("{} is {size} already", done.device);
            return writeln!(out, "{}", ui.paint(Style::Good, &text));
        }
        let word = match done.dry_run {
            true => ui.paint(Style::Warn, "would grow"),
            false => ui.paint(Style::Good, "grew"),
        };
        writeln!(
            out,
            "{} {word} from {} to {size}: {} new, all dirty",
            done.device,
            human_bytes(done.managed_bytes_before),
            human_bytes(done.new_blocks.saturating_mul(done.block_bytes)),
        )
    })
}

fn grow_active(args: &GrowArgs, dm: &Dm, managed: &Managed) -> Outcome<Grown> {
    let name = &managed.device.name;
    let data = device_name(&managed.data);
    let Some(metadata) = &managed.metadata else {
        let what =
            format!("the metadata of {name} is in the reserved tail of {data}, and must move");
        return Err(Failure::new(Code::Usage, what).hint(format!(
            "stop it first: pristine device deactivate {name}; pristine device grow {data}"
        )));
    };
    refuse_read_only(managed)?;
    let devices = Devices::new(data, Some(device_name(metadata)));
    let options = GrowOptions {
        managed_bytes: args.size,
        from_bytes: None,
    };
    let (before, after) = preview_growth(Stores::open(&devices, Access::Read)?, &options)?;
    let done = grown(name, true, &before, &after, args);
    // A device that is suspended waits to be grown, by who tried before.
    if (done.changed || managed.device.suspended) && !args.dry_run {
        dm.grow(managed, after.geometry.sectors())?;
    }
    Ok(done)
}

fn grow_offline(args: &GrowArgs, ui: &Ui) -> Outcome<Grown> {
    let devices = Devices::new(&args.device, args.metadata.as_ref());
    let access = match args.dry_run {
        true => Access::ReadExclusive,
        false => Access::Write,
    };
    let options = GrowOptions {
        managed_bytes: args.size,
        from_bytes: args.from,
    };
    let stores = Stores::open(&devices, access)?;
    let mut bar = None;
    let growth = Growth::plan(stores, &options, &mut |pages, of| {
        let bar = bar.get_or_insert_with(|| ui.bytes_bar("search", of * PAGE_SIZE as u64));
        bar.set_position(pages * PAGE_SIZE as u64);
        if pages == of {
            bar.finish_and_clear();
        }
    })?;
    let name = args.device.display().to_string();
    let done = grown(&name, false, growth.before(), growth.after(), args);
    if growth.is_needed() && !args.dry_run {
        growth.apply()?;
    }
    Ok(done)
}

fn grown(
    device: &str,
    active: bool,
    before: &Superblock,
    after: &Superblock,
    args: &GrowArgs,
) -> Grown {
    let blocks = |sb: &Superblock| sb.geometry.blocks();
    Grown {
        device: device.into(),
        active,
        managed_bytes_before: before.geometry.sectors() * SECTOR_SIZE,
        managed_bytes: after.geometry.sectors() * SECTOR_SIZE,
        data_bytes_before: before.data_sectors * SECTOR_SIZE,
        data_bytes: after.data_sectors * SECTOR_SIZE,
        new_blocks: blocks(after) - blocks(before).min(blocks(after)),
        block_bytes: after.geometry.block_size(),
        changed: before != after,
        dry_run: args.dry_run,
    }
}
