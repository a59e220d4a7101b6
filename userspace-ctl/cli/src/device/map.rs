// SPDX-License-Identifier: GPL-2.0

//! `pristine device map`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::Args;
use pristine_device::control::{Control, Id, Plane};
use pristine_device::dm::Dm;
use pristine_metadata::{Access, Devices, Geometry, Initial, Metadata, Planes, Run, Select};
use serde::Serialize;

use super::grid::{self, Look};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

pub const EXAMPLES: &str = "\
Examples:
  pristine device map root                          an active device, as the kernel sees it now
  pristine device map /dev/vda --metadata /dev/vdb1 a device that is not active
  pristine device map --metadata meta.img           a metadata image alone
  pristine device map root --json | jq '.runs[] | select(.state == \"dirty\")'

Each cell stands for the same number of blocks; one dirty block is enough to make it a dirty one. The active
device knows its dirty blocks exactly; what is on disk after a power cut may call more of them dirty, never fewer.";

/// Options of `map`.
#[derive(Args, Debug)]
pub struct MapArgs {
    /// Name of an active managed device, or the data device of one that is not
    #[arg(value_name = "NAME|DATA", required_unless_present = "metadata")]
    device: Option<String>,
    /// The metadata device, for a device that is not active
    #[arg(short, long, value_name = "DEVICE")]
    metadata: Option<std::path::PathBuf>,
    /// Draw with ASCII characters alone; the default where the locale is not UTF-8
    #[arg(long)]
    ascii: bool,
    /// Draw for this many columns; by default those of the terminal
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// Draw at most this many rows
    #[arg(long, value_name = "N", default_value_t = 16)]
    rows: usize,
}

#[derive(Serialize)]
struct Map {
    device: String,
    active: bool,
    block_bytes: u64,
    blocks: u64,
    clean: u64,
    dirty: u64,
    stale: u64,
    /// All blocks in order, none left out.
    runs: Vec<JsonRun>,
}

#[derive(Serialize)]
struct JsonRun {
    start: u64,
    blocks: u64,
    state: &'static str,
}

pub fn run(args: &MapArgs, ui: &Ui) -> Outcome {
    let name = args.device.as_deref().and_then(active_name);
    let (title, active, planes) = match (name, &args.device, &args.metadata) {
        (Some(name), _, None) => (name.clone(), true, active(&name)?),
        (_, Some(device), None) if !device.contains('/') && !Path::new(device).exists() => {
            return Err(Failure::new(
                Code::NotFound,
                format!("there is neither an active device nor a file named {device}"),
            )
            .hint("pristine device list shows the active ones"));
        }
        (_, Some(data), metadata) => {
            let devices = Devices::new(data, metadata.as_ref());
            (data.clone(), false, offline(&devices, ui)?)
        }
        (_, None, Some(metadata)) => {
            let devices = Devices::MetadataOnly {
                metadata: metadata.clone(),
            };
            let title = metadata.display().to_string();
            (title, false, offline(&devices, ui)?)
        }
        (_, None, None) => return Err(Failure::new(Code::Usage, "no device was given")),
    };
    let look = Look {
        width: args.width.unwrap_or_else(terminal_width).clamp(20, 1000),
        rows: args.rows.clamp(1, 1000),
        ascii: args.ascii || !utf8(),
        color: ui.color(),
    };
    let map = Map {
        device: title,
        active,
        block_bytes: planes.geometry().block_size(),
        blocks: planes.blocks(),
        clean: planes.count(Select::Clean),
        dirty: planes.count(Select::Dirty),
        stale: planes.count(Select::Stale),
        runs: if ui.json() { runs(&planes) } else { Vec::new() },
    };
    ui.result(&map, |out| {
        out.write_all(grid::draw(&map.device, &planes, &look).as_bytes())
    })
}

/// The name of an active device that `device` means: its name, or its path below /dev/mapper or as /dev/dm-N.
fn active_name(device: &str) -> Option<String> {
    let dm = Path::new("/sys/module/dm_pristine")
        .exists()
        .then(Dm::open)?
        .ok()?;
    let name = device.strip_prefix("/dev/mapper/").unwrap_or(device);
    if !name.contains('/') && dm.managed(name).is_ok() {
        return Some(name.into());
    }
    let rdev = std::fs::metadata(device).ok()?.rdev();
    let all = dm.all_managed().ok()?;
    all.into_iter()
        .map(|m| m.device)
        .find(|d| rdev != 0 && (d.major, d.minor) == number(rdev))
        .map(|d| d.name)
}

fn number(rdev: u64) -> (u32, u32) {
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

/// The planes of an active device, from the kernel.
fn active(name: &str) -> Outcome<Planes> {
    let managed = Dm::open()?.managed(name)?;
    let (block_size, extent_size) = (managed.status.block_size, managed.status.extent_size);
    let geometry = Geometry::new(
        managed.sectors,
        block_size.trailing_zeros(),
        extent_size.trailing_zeros(),
    )
    .map_err(|e| {
        Failure::new(Code::Unsupported, format!("the kernel's status of {name}")).why(e)
    })?;
    let id = Id {
        major: managed.device.major,
        minor: managed.device.minor,
    };
    let control = Control::open()?;
    let mut planes = Planes::new(geometry, Initial::Clean);
    let words = planes.dirty.len();
    for (plane, to) in [
        (Plane::Dirty, &mut planes.dirty),
        (Plane::Stale, &mut planes.stale),
    ] {
        *to = control.plane(id, plane, geometry.blocks())?;
        to.resize(words, 0);
    }
    Ok(planes)
}

/// The planes as they are on disk.
fn offline(devices: &Devices, ui: &Ui) -> Outcome<Planes> {
    let held = devices.data().into_iter().chain(devices.metadata());
    for path in held {
        let block = pristine_device::block::number(path).is_ok();
        if block && pristine_device::block::is_in_use(path).unwrap_or(false) {
            ui.warn(format!(
                "{} is in use: shown is what is on disk; if it is active, pristine device map NAME knows better",
                path.display()
            ));
            break;
        }
    }
    let (planes, _) = Metadata::open(devices, Access::Read)?.load()?;
    Ok(planes)
}

/// All blocks as runs of one state.
fn runs(planes: &Planes) -> Vec<JsonRun> {
    let mut runs: Vec<(Run, &'static str)> = Vec::new();
    for (select, state) in [
        (Select::Clean, "clean"),
        (Select::Dirty, "dirty"),
        (Select::Stale, "stale"),
    ] {
        runs.extend(planes.runs(select).map(|run| (run, state)));
    }
    runs.sort_unstable_by_key(|(run, _)| run.start);
    runs.into_iter()
        .map(|(run, state)| JsonRun {
            start: run.start,
            blocks: run.len(),
            state,
        })
        .collect()
}

fn terminal_width() -> usize {
    let from_env = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    rustix::termios::tcgetwinsize(std::io::stdout())
        .ok()
        .map(|size| usize::from(size.ws_col))
        .filter(|columns| *columns > 0)
        .or(from_env)
        .unwrap_or(80)
}

/// Whether the locale says that the terminal takes UTF-8.
fn utf8() -> bool {
    ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
        .is_some_and(|v| {
            let v = v.to_ascii_lowercase();
            v.contains("utf-8") || v.contains("utf8")
        })
}
