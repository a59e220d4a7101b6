// SPDX-License-Identifier: GPL-2.0

//! `pristine device format`.

use clap::{Args, ValueEnum};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::table::{parse_hex, Hex};
use pristine_metadata::shared::{PAGE_SIZE, SECTOR_SIZE};
use pristine_metadata::{dump, format, FormatOptions, Image, Initial};
use serde::Serialize;

use super::{parse_shift, parse_size, percent, Where};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_bytes, human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  Track the changes of /dev/vda from now on, metadata on a partition of its own:
      pristine device format /dev/vda --metadata /dev/vdb1
  The same with the metadata at the end of the data device (about 0.1 % of it):
      pristine device format /dev/vda
  With room for the originals of what changes, so that a revert needs no network:
      pristine device format /dev/vda --metadata /dev/vdb1 --undo 512M
  An empty disk that the agent is to fill from an image of 2 GiB:
      pristine device format /dev/vda --initial stale --image ID --image-size 2G --provisioning

Nothing is written to the managed part of DATA. Metadata that exists, and a metadata device that holds
something else, are overwritten only with --force. A format that is cut leaves the old metadata, none, or
the new.";

/// What all blocks start as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum InitialArg {
    /// The content is the master's: changes count from now on
    Clean,
    /// The content is the machine's own: a revert replaces all of it
    Dirty,
    /// The content is worthless: everything is to be fetched
    Stale,
}

/// Options of `format`.
#[derive(Args, Debug)]
pub struct FormatArgs {
    #[command(flatten)]
    place: Where,
    /// How much to manage; by default the image's size, or all there is
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    size: Option<u64>,
    /// What all blocks start as; clean unless an image is given
    #[arg(long, value_name = "STATE", value_enum)]
    initial: Option<InitialArg>,
    /// Unit of tracking, a power of two from 4K to 1M
    #[arg(long, value_name = "BYTES", value_parser = parse_shift, default_value = "4K")]
    block_size: u32,
    /// Unit of write intent, a power of two up to 64M
    #[arg(long, value_name = "BYTES", value_parser = parse_shift, default_value = "1M")]
    extent_size: u32,
    /// Records of the log; by default one for each 8 MiB managed, 16 to 1024
    #[arg(long, value_name = "N")]
    log_pages: Option<u64>,
    /// Keep the originals of blocks that change in an area of this size, for reverts that need no network
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    undo: Option<u64>,
    /// Id of the master image (64 hex digits)
    #[arg(long, value_name = "ID", requires = "image_size", requires = "initial")]
    image: Option<String>,
    /// Size of the master image
    #[arg(long, value_name = "BYTES", value_parser = parse_size, requires = "image")]
    image_size: Option<u64>,
    /// Generation of the master image
    #[arg(long, value_name = "N", default_value_t = 0, requires = "image")]
    generation: u64,
    /// Note that the device is yet to be filled from its image
    #[arg(long, requires = "image")]
    provisioning: bool,
    /// Overwrite metadata or other data that is there
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct Formatted {
    data: String,
    metadata: Option<String>,
    meta_uuid: String,
    data_uuid: String,
    managed_bytes: u64,
    blocks: u64,
    block_bytes: u64,
    extent_bytes: u64,
    metadata_bytes: u64,
    log_pages: u64,
    undo_bytes: u64,
    state: &'static str,
    image: Option<String>,
}

pub fn run(args: &FormatArgs, ui: &Ui) -> Outcome {
    let image = match (&args.image, args.image_size) {
        (Some(id), Some(bytes)) => Some(Image {
            id: parse_hex(id).ok_or_else(|| {
                Failure::new(Code::Usage, format!("{id} is not an image id"))
                    .hint("an image id is 64 hex digits; pristine image list shows them")
            })?,
            generation: args.generation,
            bytes,
        }),
        _ => None,
    };
    let (initial, state) = match args.initial {
        None | Some(InitialArg::Clean) => (Initial::Clean, "clean"),
        Some(InitialArg::Dirty) => (Initial::Dirty, "dirty"),
        Some(InitialArg::Stale) => (Initial::Stale, "stale"),
    };
    let options = FormatOptions {
        block_shift: args.block_size,
        extent_shift: args.extent_size,
        managed_bytes: args.size,
        log_pages: args.log_pages,
        image,
        initial,
        provisioning: args.provisioning,
        undo_bytes: args.undo.unwrap_or(0),
        force: args.force,
    };
    let metadata = format(&args.place.devices(), &options)?;
    let sb = metadata.superblock();
    let (geometry, layout) = (&sb.geometry, &sb.layout);
    let pages = pristine_metadata::shared::layout::Layout::total_pages(geometry, layout.log_pages);
    let formatted = Formatted {
        data: args.place.data.display().to_string(),
        metadata: args
            .place
            .metadata
            .as_ref()
            .map(|p| p.display().to_string()),
        meta_uuid: dump::uuid_text(&sb.meta_uuid),
        data_uuid: dump::uuid_text(&sb.data_uuid),
        managed_bytes: geometry.sectors() * SECTOR_SIZE,
        blocks: geometry.blocks(),
        block_bytes: geometry.block_size(),
        extent_bytes: geometry.extent_size(),
        metadata_bytes: pages * PAGE_SIZE as u64,
        log_pages: layout.log_pages,
        undo_bytes: layout.undo_pages * PAGE_SIZE as u64,
        state,
        image: image.map(|i| Hex(&i.id).to_string()),
    };
    let at = match layout.placement {
        Placement::Separate => "on the metadata device",
        Placement::Tail => "at the end of the data device",
    };
    ui.result(&formatted, |out| {
        let f = &formatted;
        let title = ui.paint(Style::Bold, &f.data);
        writeln!(out, "{title} is formatted")?;
        writeln!(
            out,
            "  managed   {} ({} blocks of {}), all {}",
            human_bytes(f.managed_bytes),
            human_count(f.blocks),
            human_bytes(f.block_bytes),
            f.state
        )?;
        writeln!(
            out,
            "  metadata  {} {at}, {} of what is managed",
            human_bytes(f.metadata_bytes),
            percent(f.metadata_bytes, f.managed_bytes)
        )?;
        if f.undo_bytes != 0 {
            writeln!(out, "  undo      {} {at}", human_bytes(f.undo_bytes))?;
        }
        writeln!(out, "  uuid      {}", f.meta_uuid)?;
        if let Some(image) = &f.image {
            writeln!(out, "  image     {image}")?;
        }
        Ok(())
    })
}
