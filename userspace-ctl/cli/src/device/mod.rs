// SPDX-License-Identifier: GPL-2.0

//! `pristine device …`: managed devices.

mod activate;
mod change;
mod check;
mod dump;
mod error;
mod fetch;
mod format;
mod grid;
mod grow;
mod map;
mod probe;
mod repair;
mod revert;
mod status;
mod update;
mod watch;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pristine_device::dm::{Dm, Managed};
use pristine_metadata::shared::state::Mode;
use pristine_metadata::Devices;

use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

/// What can be done with managed devices.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Write fresh metadata for a data device
    #[command(after_long_help = format::EXAMPLES)]
    Format(format::FormatArgs),
    /// Start a managed device: /dev/mapper/NAME
    #[command(after_long_help = activate::EXAMPLES)]
    Activate(activate::ActivateArgs),
    /// Stop a managed device; its exact state is on disk afterwards
    #[command(after_long_help = activate::DEACTIVATE_EXAMPLES)]
    Deactivate(activate::DeactivateArgs),
    /// Show one managed device in detail, or all of them in a table
    #[command(visible_alias = "list", after_long_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// Show live how a device does: what is stale, how fast that gets less, how many reads wait for it
    #[command(after_long_help = watch::EXAMPLES)]
    Watch(watch::WatchArgs),
    /// Draw a disk as a picture: which parts are clean, dirty, stale
    #[command(after_long_help = map::EXAMPLES)]
    Map(map::MapArgs),
    /// Write the exact state of an active device to its metadata now
    #[command(after_long_help = status::CHECKPOINT_EXAMPLES)]
    Checkpoint(status::CheckpointArgs),
    /// Check the metadata of a device that is not active, or an image of it
    #[command(after_long_help = check::EXAMPLES)]
    Check(check::CheckArgs),
    /// Write damaged metadata anew from what is still known
    #[command(after_long_help = repair::EXAMPLES)]
    Repair(repair::RepairArgs),
    /// Make a managed device as large as its data device has become
    #[command(after_long_help = grow::EXAMPLES)]
    Grow(grow::GrowArgs),
    /// Take all changes back at once, on a device that nobody has open
    #[command(after_long_help = revert::EXAMPLES)]
    Revert(revert::RevertArgs),
    /// Go over to another generation of the image at once; what differs is fetched when it is needed
    #[command(after_long_help = update::EXAMPLES)]
    Update(update::UpdateArgs),
    /// Print all of the metadata, decoded
    #[command(after_long_help = dump::EXAMPLES)]
    Dump(dump::DumpArgs),
    /// Say what a device is to Pristine, if anything
    #[command(after_long_help = probe::EXAMPLES)]
    Probe(probe::ProbeArgs),
}

/// Runs a `device` command.
pub fn run(command: Command, ui: &Ui) -> Outcome {
    match command {
        Command::Format(args) => format::run(&args, ui),
        Command::Activate(args) => activate::activate(&args, ui),
        Command::Deactivate(args) => activate::deactivate(&args, ui),
        Command::Status(args) => status::status(&args, ui),
        Command::Watch(args) => watch::run(&args, ui),
        Command::Map(args) => map::run(&args, ui),
        Command::Checkpoint(args) => status::checkpoint(&args, ui),
        Command::Check(args) => check::run(&args, ui),
        Command::Repair(args) => repair::run(&args, ui),
        Command::Grow(args) => grow::run(&args, ui),
        Command::Revert(args) => revert::run(&args, ui),
        Command::Update(args) => update::run(&args, ui),
        Command::Dump(args) => dump::run(&args, ui),
        Command::Probe(args) => probe::run(&args, ui),
    }
}

/// A data device and where its metadata is.
#[derive(Args, Debug)]
pub struct Where {
    /// The data device (or an image file of it)
    #[arg(value_name = "DATA")]
    data: PathBuf,
    /// The metadata device; without it the metadata is in a reserved tail of DATA
    #[arg(short, long, value_name = "DEVICE")]
    metadata: Option<PathBuf>,
}

impl Where {
    fn devices(&self) -> Devices {
        Devices::new(&self.data, self.metadata.as_ref())
    }
}

/// The same for commands that can look at a metadata device alone.
#[derive(Args, Debug)]
pub struct LooseWhere {
    /// The data device (or an image file of it)
    #[arg(value_name = "DATA", required_unless_present = "metadata")]
    data: Option<PathBuf>,
    /// The metadata device; without it the metadata is in a reserved tail of DATA
    #[arg(short, long, value_name = "DEVICE")]
    metadata: Option<PathBuf>,
}

impl LooseWhere {
    fn devices(&self) -> Outcome<Devices> {
        match (&self.data, &self.metadata) {
            (Some(data), metadata) => Ok(Devices::new(data, metadata.as_ref())),
            (None, Some(metadata)) => Ok(Devices::MetadataOnly {
                metadata: metadata.clone(),
            }),
            (None, None) => Err(Failure::new(Code::Usage, "no device was given")),
        }
    }
}

/// The active device that `device` names, if it names one: by its name, or by its path below /dev/mapper.
fn active(device: &Path) -> Outcome<Option<(Dm, Managed)>> {
    let text = device.to_string_lossy();
    let name = text.strip_prefix("/dev/mapper/").unwrap_or(&text);
    if name.contains('/') || !Path::new("/sys/module/dm_mod").exists() {
        return Ok(None);
    }
    let dm = Dm::open()?;
    match dm.managed(name) {
        Ok(managed) => Ok(Some((dm, managed))),
        // It may be a file's name, or a data device that is another target's.
        Err(_) if device.exists() => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Refuses what takes metadata that works.
fn refuse_read_only(managed: &Managed) -> Outcome {
    if managed.status.mode == Mode::ReadWrite {
        return Ok(());
    }
    let name = &managed.device.name;
    let what = format!("{name} is read-only since its metadata failed");
    Err(Failure::new(Code::Io, what).hint(format!(
        "stop it, and look at the metadata: pristine device deactivate {name}; pristine device check"
    )))
}

/// Parses `4096`, `4K`, `1.5G`; powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or("").to_ascii_uppercase();
    let shift = match unit.trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        _ => return Err(format!("{unit} is no unit; K, M, G, T and P are")),
    };
    let bad = || format!("{text} is not a size such as 4096, 4K or 1.5G");
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(bad);
    }
    let value: f64 = digits.parse().map_err(|_| bad())?;
    let bytes = value * (1u64 << shift) as f64;
    if !(0.0..9e18).contains(&bytes) || shift == 0 {
        return Err(bad());
    }
    Ok(bytes as u64)
}

/// Parses a size that is a power of two; gives its log2.
fn parse_shift(text: &str) -> Result<u32, String> {
    let bytes = parse_size(text)?;
    if !bytes.is_power_of_two() {
        return Err(format!("{text} is not a power of two"));
    }
    Ok(bytes.trailing_zeros())
}

/// `12.3 %`; a share that is not nothing never shows as nothing.
fn percent(part: u64, whole: u64) -> String {
    if whole == 0 || part == 0 {
        return "0 %".into();
    }
    if part == whole {
        return "100 %".into();
    }
    let share = part as f64 * 100.0 / whole as f64;
    if share < 0.01 {
        "< 0.01 %".into()
    } else if share < 1.0 {
        format!("{share:.2} %")
    } else {
        format!("{:.1} %", share.min(99.9))
    }
}

/// A device as people know it: `/dev/vda` for `254:0`.
fn device_name(number: &str) -> String {
    std::fs::read_link(Path::new("/sys/dev/block").join(number))
        .ok()
        .and_then(|link| {
            link.file_name()
                .map(|n| format!("/dev/{}", n.to_string_lossy()))
        })
        .unwrap_or_else(|| number.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_understood() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("4K"), Ok(4096));
        assert_eq!(parse_size("4kib"), Ok(4096));
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert!(parse_size("x").is_err());
        assert!(parse_size("").is_err());
        assert!(parse_size("1.5").is_err());
        assert!(parse_size("99999999999P").is_err());
        assert_eq!(parse_shift("1M"), Ok(20));
        assert!(parse_shift("3K").is_err());
    }

    #[test]
    fn shares_are_never_rounded_away() {
        assert_eq!(percent(0, 100), "0 %");
        assert_eq!(percent(1, 1_000_000), "< 0.01 %");
        assert_eq!(percent(999_999, 1_000_000), "99.9 %");
        assert_eq!(percent(5, 5), "100 %");
        assert_eq!(percent(1, 200), "0.50 %");
    }
}
