// SPDX-License-Identifier: GPL-2.0

//! `pristine device activate` and `deactivate`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use pristine_device::dm::{self, Activation, Dm, Managed};
use pristine_device::{block, module};
use pristine_metadata::shared::table::{Features, DEFAULT_CHECKPOINT_MS, DEFAULT_HOT_EXTENTS};
use pristine_metadata::shared::{Error as Core, SECTOR_SIZE};
use pristine_metadata::{dump, Access, Metadata, Select, Superblock};
use serde::Serialize;

use super::{percent, Where};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_bytes, human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device activate root /dev/vda --metadata /dev/vdb1
  mount /dev/mapper/root /mnt
  pristine device map root

The metadata is checked first: that it belongs to DATA, that nothing asks for a check, that no block is stale
(or --stale is given, and pristined is started then).
The kernel module is loaded if it is not; --module says from where.";

pub const DEACTIVATE_EXAMPLES: &str = "\
Examples:
  umount /mnt
  pristine device deactivate root";

/// Options of `activate`.
#[derive(Args, Debug)]
pub struct ActivateArgs {
    /// Name of the managed device below /dev/mapper
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    place: Where,
    /// The kernel module's file, or a directory of modules; by default /lib/modules of the running kernel
    #[arg(long, value_name = "PATH")]
    module: Option<PathBuf>,
    /// Most extents with a live write intent, 16 to 65536
    #[arg(long, value_name = "N", default_value_t = DEFAULT_HOT_EXTENTS)]
    #[arg(value_parser = clap::value_parser!(u32).range(16..=65536))]
    hot_extents: u32,
    /// Longest time a change waits for a checkpoint, in ms; 0 for never
    #[arg(long, value_name = "MS", default_value_t = DEFAULT_CHECKPOINT_MS)]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=3_600_000))]
    checkpoint_ms: u32,
    /// Longest time a read of a stale block waits for pristined, in ms; 0 for as long as it takes
    #[arg(long, value_name = "MS", default_value_t = 0, requires = "stale")]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=3_600_000))]
    fetch_timeout_ms: u32,
    /// Activate it although blocks are stale: reads of these wait for pristined
    #[arg(long)]
    stale: bool,
}

/// Options of `deactivate`.
#[derive(Args, Debug)]
pub struct DeactivateArgs {
    /// Name of the managed device
    #[arg(value_name = "NAME")]
    name: String,
    /// How long to wait for who has it open, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u64).range(0..=3600))]
    wait: u64,
}

#[derive(Serialize)]
struct Activated {
    name: String,
    path: String,
    major: u32,
    minor: u32,
    bytes: u64,
    blocks: u64,
    dirty: u64,
    meta_uuid: String,
}

pub fn activate(args: &ActivateArgs, ui: &Ui) -> Outcome {
    let name = args.name.as_str();
    dm::check_name(name)?;
    refuse_active(name)?;
    let sb = ready(args)?;
    module::load(args.module.as_deref())?;
    let dm = Dm::open()?;
    let managed = dm
        .activate(
            name,
            &Activation {
                data: &args.place.data,
                metadata: args.place.metadata.as_deref(),
                sectors: sb.geometry.sectors(),
                meta_uuid: sb.meta_uuid,
                features: Features {
                    hot_extents: args.hot_extents,
                    checkpoint_ms: args.checkpoint_ms,
                    fetch_timeout_ms: args.fetch_timeout_ms,
                    // Who activates read the metadata; the kernel makes sure that it reads the same.
                    meta_uuid: Some(sb.meta_uuid),
                    ..Features::default()
                },
            },
        )
        .map_err(|e| match e {
            pristine_device::Error::Exists { name } => already_active(&name),
            e => e.into(),
        })?;
    let done = activated(&managed);
    ui.result(&done, |out| {
        let path = ui.paint(Style::Bold, &done.path);
        writeln!(
            out,
            "{path} is active: {}, {} of {} blocks dirty ({})",
            human_bytes(done.bytes),
            human_count(done.dirty),
            human_count(done.blocks),
            percent(done.dirty, done.blocks)
        )
    })
}

fn activated(managed: &Managed) -> Activated {
    Activated {
        name: managed.device.name.clone(),
        path: managed.path().display().to_string(),
        major: managed.device.major,
        minor: managed.device.minor,
        bytes: managed.sectors * SECTOR_SIZE,
        blocks: managed.status.blocks,
        dirty: managed.status.dirty,
        meta_uuid: dump::uuid_text(&managed.status.meta_uuid),
    }
}

fn already_active(name: &str) -> Failure {
    Failure::new(Code::Busy, format!("{name} is already active")).hint(format!(
        "pristine device status {name} shows it; pristine device deactivate {name} stops it"
    ))
}

/// Says that the name is taken before anything else could look wrong because of it.
fn refuse_active(name: &str) -> Outcome {
    if !Path::new("/sys/module/dm_mod").exists() {
        return Ok(());
    }
    match Dm::open()?.device(name) {
        Err(pristine_device::Error::NoSuchDevice { .. }) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(device) if device.uuid.starts_with(dm::UUID_PREFIX) => Err(already_active(name)),
        Ok(_) => Err(Failure::new(
            Code::Busy,
            format!("{name} is the name of another device-mapper device"),
        )
        .hint("choose another name; dmsetup info shows what it is")),
    }
}

/// Checks offline whether the device may be started, and says why not.
fn ready(args: &ActivateArgs) -> Outcome<Superblock> {
    for device in [&args.place.data].into_iter().chain(&args.place.metadata) {
        block::number(device).map_err(|e| {
            let failure = Failure::from(e);
            match device.is_file() {
                true => failure.hint("attach the image file first: losetup --find --show FILE"),
                false => failure,
            }
        })?;
    }
    let mut metadata =
        Metadata::open(&args.place.devices(), Access::ReadExclusive).map_err(explain_in_use)?;
    let sb = *metadata.superblock();
    let path = args.place.metadata.as_ref().unwrap_or(&args.place.data);
    if sb.needs_check {
        let error = pristine_metadata::Error::Metadata {
            path: path.clone(),
            source: Core::NeedsCheck,
        };
        return Err(error.into());
    }
    let (planes, _) = metadata.load()?;
    let stale = planes.count(Select::Stale);
    if stale > 0 && !args.stale {
        let what = format!(
            "{} of {} blocks are stale: what is on the disk there is not the master's",
            human_count(stale),
            human_count(planes.blocks())
        );
        let hint = if sb.provisioning {
            "provisioning has not finished: run the agent, it goes on where it was"
        } else {
            "run the agent, which fetches them; with --stale, reads of them wait for pristined"
        };
        return Err(Failure::new(Code::Stale, what).hint(hint));
    }
    Ok(sb)
}

fn explain_in_use(error: pristine_metadata::Error) -> Failure {
    match &error {
        pristine_metadata::Error::InUse { path, by: Some(by) } => {
            let managed = by
                .strip_prefix("/dev/mapper/")
                .filter(|name| Dm::open().is_ok_and(|dm| dm.managed(name).is_ok()));
            match managed {
                Some(name) => Failure::new(
                    Code::Busy,
                    format!("{} is already active as {name}", path.display()),
                )
                .hint(format!(
                    "pristine device status {name} shows it; pristine device deactivate {name} stops it"
                )),
                None => error.into(),
            }
        }
        _ => error.into(),
    }
}

#[derive(Serialize)]
struct Deactivated {
    name: String,
    blocks: u64,
    dirty: u64,
}

pub fn deactivate(args: &DeactivateArgs, ui: &Ui) -> Outcome {
    let dm = Dm::open()?;
    let managed = dm.managed(&args.name)?;
    dm.remove(&args.name, Duration::from_secs(args.wait))?;
    let done = Deactivated {
        name: args.name.clone(),
        blocks: managed.status.blocks,
        dirty: managed.status.dirty,
    };
    ui.result(&done, |out| {
        writeln!(
            out,
            "{} is not active any more: {} of {} blocks were dirty ({})",
            ui.paint(Style::Bold, &done.name),
            human_count(done.dirty),
            human_count(done.blocks),
            percent(done.dirty, done.blocks)
        )
    })
}
