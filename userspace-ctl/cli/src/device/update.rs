// SPDX-License-Identifier: GPL-2.0

//! `pristine device update`.

use std::io::{self, Write};
use std::ops::Range;

use clap::Args;
use pristine_device::dm::{Dm, Managed};
use pristine_image::BLOCK_SIZE;
use pristine_metadata::shared::table::Hex;
use pristine_metadata::{
    Access, Changes, Devices, Image, Initial, Metadata, Planes, Run, Select, Superblock,
};
use pristine_store::{
    may_go_back, modified, news, CancelToken, Found, ImageId, ImageReader, ImageSelector, News,
    RetryPolicy, SignedRelease, TrustPolicy,
};
use serde::Serialize;

use super::change::{change_active, devices_of, name_of, refuse_unchecked, refuse_without_image};
use super::{active, percent, Where};
use crate::exit::{Code, Failure, Outcome};
use crate::image;
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  umount /srv && pristine device update srv --store http://10.0.2.2:8080 --image lab
  pristine device update srv --store /srv/store --image lab --dry-run        what would change
  pristine device update /dev/vda --metadata /dev/vdb1 --store /srv/store --image lab      of one that is not active

The blocks that differ between the image that the device has and the one that the channel is at (or that is named by its id)
become stale, and the device's image is the new one, in one step that a power cut cannot divide. Of the store only manifests are
read. Stale blocks are fetched by pristined while the device is active, by the agent before that; a pristined that serves the
device goes over to the new image by itself, if one of its stores has it. If the store does not know the old image any
more, all blocks become stale.

What was changed on the device would not fit to another image: that is taken back (--revert), or it is refused. A device
that is active must not be open, as with `pristine device revert`; one that was suspended is resumed.

JSON fields: device, active, blocks, block_bytes, from_image, from_generation, image, generation, modified, old_image_known, reverted,
stale (afterwards; null with dry_run), changed, dry_run.

Exit codes of this command:
   0  it has that generation now (or had); with --dry-run: it could have
   3  the store has no such channel or image
   4  the metadata or the store is damaged
   5  the metadata belongs to another data device, or names no image
   7  the device is mounted or in use
  10  the image is larger than the device
  11  blocks were changed here, and --revert is not given
  12  the device is not filled yet: the agent does that
  14  the metadata must be checked first
  15  the release is not trusted, or older than the device's generation, without --allow-older";

/// Options of `update`.
#[derive(Args, Debug)]
pub struct UpdateArgs {
    #[command(flatten)]
    place: Where,
    /// Store: a directory or a URL
    #[arg(long, value_name = "STORE")]
    store: String,
    /// Channel, or an image by its id
    #[arg(long, visible_alias = "channel", value_name = "CHANNEL|ID", value_parser = image::parse_selector)]
    image: ImageSelector,
    #[command(flatten)]
    trust: TrustArgs,
    /// Take back what was changed on the device
    #[arg(long)]
    revert: bool,
    /// Go back to an older generation if the channel is at one, as far as the device's own release allows
    #[arg(long)]
    allow_older: bool,
    /// Also if the active device is open: whoever has it open goes on with what it remembers
    #[arg(long)]
    force: bool,
    /// Say what would become stale, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Updated {
    device: String,
    active: bool,
    blocks: u64,
    block_bytes: u64,
    from_image: String,
    from_generation: u64,
    image: String,
    generation: u64,
    /// Blocks that the modified list names.
    modified: u64,
    /// Whether the store has the old image; if not, the list names all blocks.
    old_image_known: bool,
    /// Dirty blocks that became stale, or would.
    reverted: u64,
    /// All stale blocks afterwards.
    stale: Option<u64>,
    changed: bool,
    dry_run: bool,
}

/// What the device is to have.
struct Target {
    image: Image,
    /// In image blocks; `None` if the old image is not known.
    modified: Option<Vec<Run>>,
}

pub fn run(args: &UpdateArgs, ui: &Ui) -> Outcome {
    let active = match &args.place.metadata {
        Some(_) => None,
        None => active(&args.place.data)?,
    };
    let done = match &active {
        Some((dm, managed)) => update_active(args, dm, managed, ui)?,
        None => update_offline(args, ui)?,
    };
    if done.changed && !done.dry_run && done.stale != Some(0) {
        if let Some((_, managed)) = &active {
            ui.note(format!(
                "reads of stale blocks wait for a helper: start pristined for {}, unless it serves it already",
                managed.device.name
            ));
        }
    }
    ui.result(&done, |out| write(out, &done, ui))
}

fn update_active(args: &UpdateArgs, dm: &Dm, managed: &Managed, ui: &Ui) -> Outcome<Updated> {
    let name = managed.device.name.as_str();
    let devices = devices_of(managed);
    // What it has does not change while it is active, but by a command like this one.
    let sb = *Metadata::open(&devices, Access::Read)?.superblock();
    let mut done = Updated {
        active: true,
        ..of(name, &sb, args)
    };
    let Some(target) = look_up(args, &sb, name, &mut done, ui)? else {
        // A command that did not live to the end may have left it so.
        if managed.device.suspended && !args.dry_run {
            change_active(dm, managed, args.force, |_| Ok(()))?;
        }
        return Ok(done);
    };
    if args.dry_run {
        done.reverted = managed.status.dirty;
        return Ok(done);
    }
    refuse_changes(args, name, managed.status.dirty)?;
    change_active(dm, managed, args.force, |devices| {
        let mut metadata = Metadata::open(devices, Access::WriteSuspended)?;
        set_generation(args, name, &mut metadata, &sb, &target, &mut done)
    })?;
    Ok(done)
}

fn update_offline(args: &UpdateArgs, ui: &Ui) -> Outcome<Updated> {
    let devices: Devices = args.place.devices();
    let name = name_of(&devices);
    let access = match args.dry_run {
        true => Access::ReadExclusive,
        false => Access::Write,
    };
    let mut metadata = Metadata::open(&devices, access)?;
    let sb = *metadata.superblock();
    refuse_unchecked(&devices, &sb)?;
    let mut done = of(&name, &sb, args);
    let Some(target) = look_up(args, &sb, &name, &mut done, ui)? else {
        return Ok(done);
    };
    if args.dry_run {
        done.reverted = metadata.load()?.0.count(Select::Dirty);
        return Ok(done);
    }
    set_generation(args, &name, &mut metadata, &sb, &target, &mut done)?;
    Ok(done)
}

fn of(name: &str, sb: &Superblock, args: &UpdateArgs) -> Updated {
    Updated {
        device: name.to_owned(),
        active: false,
        blocks: sb.geometry.blocks(),
        block_bytes: sb.geometry.block_size(),
        from_image: Hex(&sb.image_id).to_string(),
        from_generation: sb.generation,
        image: Hex(&sb.image_id).to_string(),
        generation: sb.generation,
        modified: 0,
        old_image_known: true,
        reverted: 0,
        stale: None,
        changed: false,
        dry_run: args.dry_run,
    }
}

/// What the channel is at, and what differs; `None` if the device has that already.
fn look_up(
    args: &UpdateArgs,
    sb: &Superblock,
    name: &str,
    done: &mut Updated,
    ui: &Ui,
) -> Outcome<Option<Target>> {
    refuse_without_image(name, &sb.image_id)?;
    if sb.provisioning {
        let what = format!("{name} is not filled yet");
        return Err(Failure::new(Code::Stale, what)
            .hint("run the agent: it goes on where it was, with the newest generation"));
    }
    let store = image::open(&args.store)?;
    let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
    let policy = args.trust.policy()?;
    let found = Found::look_up(store.as_ref(), &args.image, &policy, retry, &cancel)?;
    let generation = found.release.as_ref().map(SignedRelease::release);
    let generation = generation.map_or(0, |release| release.generation);
    let has = (sb.generation, &sb.image_id);
    if args.allow_older {
        refuse_too_old(store.as_ref(), &policy, &found, has)?;
    }
    match news((generation, found.image.as_bytes()), has, args.allow_older) {
        News::Current => return Ok(None),
        News::Older(generation) => {
            let what = format!(
                "the channel is at generation {generation}, which is older than {name}'s, {}",
                sb.generation
            );
            return Err(Failure::new(Code::Untrusted, what)
                .hint("--allow-older goes back, if that is what you want"));
        }
        News::Moved => {}
    }
    let same = *found.image.as_bytes() == sb.image_id;
    let new = ImageReader::open_found(store, found, retry, &cancel)?;
    let image = Image {
        id: *new.image().as_bytes(),
        generation,
        bytes: new.size(),
    };
    let managed = sb.geometry.sectors().saturating_mul(512);
    if image.bytes > managed {
        let what = format!(
            "the image has {}, {name} only {}",
            human_bytes(image.bytes),
            human_bytes(managed)
        );
        return Err(Failure::new(Code::TooSmall, what).hint("pristine device grow --help"));
    }
    let runs = match same {
        // The same content under another number.
        true => Some(Vec::new()),
        false => {
            let bar = ui.count_bar("comparing manifests", 1);
            let runs = modified(ImageId::from_bytes(sb.image_id), &new, retry, &cancel);
            bar.finish_and_clear();
            runs?
        }
    };
    let as_run = |blocks: Range<u64>| Run {
        start: blocks.start,
        end: blocks.end,
    };
    let target = Target {
        image,
        modified: runs.map(|runs| runs.into_iter().map(as_run).collect()),
    };
    let mut only = Planes::new(sb.geometry, Initial::Clean);
    only.outdate(target.modified.as_deref(), BLOCK_SIZE as u64);
    done.modified = only.count(Select::Stale);
    done.old_image_known = target.modified.is_some();
    done.image = Hex(&image.id).to_string();
    done.generation = image.generation;
    done.changed = true;
    Ok(Some(target))
}

/// Refuses to go back further than the release allows that the device has.
fn refuse_too_old(
    store: &dyn pristine_store::Store,
    policy: &TrustPolicy,
    found: &Found,
    has: (u64, &[u8; 32]),
) -> Outcome {
    let Some(release) = found.release.as_ref().map(SignedRelease::release) else {
        return Ok(());
    };
    Ok(may_go_back(store, &release.channel, policy, has, release)?)
}

/// The one step: image, generation and stale blocks change together.
fn set_generation(
    args: &UpdateArgs,
    name: &str,
    metadata: &mut Metadata,
    expected: &Superblock,
    target: &Target,
    done: &mut Updated,
) -> Outcome {
    let sb = metadata.superblock();
    let has = |sb: &Superblock| (sb.meta_uuid, sb.image_id, sb.generation, sb.needs_check);
    if has(sb) != has(expected) {
        let what = format!("{name} was changed by somebody else meanwhile");
        return Err(Failure::new(Code::Busy, what).hint("run it again"));
    }
    let (mut planes, _) = metadata.load()?;
    refuse_changes(args, name, planes.count(Select::Dirty))?;
    planes.outdate(target.modified.as_deref(), BLOCK_SIZE as u64);
    // What the list names is stale by that already.
    done.reverted = planes.make_stale();
    let changes = Changes {
        image: Some(target.image),
        ..Changes::default()
    };
    metadata.commit(&planes, &changes)?;
    done.stale = Some(planes.count(Select::Stale));
    Ok(())
}

/// Half of one image and half of what somebody wrote to another is neither.
fn refuse_changes(args: &UpdateArgs, name: &str, dirty: u64) -> Outcome {
    if dirty == 0 || args.revert {
        return Ok(());
    }
    let what = format!(
        "{} blocks of {name} were changed since they were the image's, and do not fit to another one",
        human_count(dirty)
    );
    Err(Failure::new(Code::Exists, what).hint("--revert takes the changes back"))
}

fn write(out: &mut dyn Write, done: &Updated, ui: &Ui) -> io::Result<()> {
    let short = |image: &str| image.get(..16).unwrap_or(image).to_owned();
    let device = ui.paint(Style::Bold, &done.device);
    if !done.changed {
        return writeln!(
            out,
            "{device} {}: image {}, generation {}",
            ui.paint(Style::Good, "has that generation already"),
            short(&done.image),
            done.generation
        );
    }
    let word = match done.dry_run {
        true => ui.paint(Style::Warn, "would go"),
        false => ui.paint(Style::Good, "went"),
    };
    writeln!(
        out,
        "{device} {word} from image {} (generation {}) to {} (generation {})",
        short(&done.from_image),
        done.from_generation,
        short(&done.image),
        done.generation
    )?;
    let bytes = human_bytes(done.modified.saturating_mul(done.block_bytes));
    writeln!(
        out,
        "  modified  {} of {} blocks ({bytes}, {})",
        human_count(done.modified),
        human_count(done.blocks),
        percent(done.modified, done.blocks)
    )?;
    if !done.old_image_known {
        let what =
            "the store does not have the old image: nobody knows what is the same in the new one";
        writeln!(out, "  {}", ui.paint(Style::Warn, what))?;
    }
    if done.reverted > 0 {
        let what = format!(
            "{} blocks that were changed here",
            human_count(done.reverted)
        );
        writeln!(out, "  reverted  {what}")?;
    }
    match done.stale {
        Some(stale) if stale > 0 => writeln!(
            out,
            "  stale     {} blocks, to be fetched when they are needed",
            human_count(stale)
        ),
        _ => Ok(()),
    }
}
