// SPDX-License-Identifier: GPL-2.0

//! One change of the metadata of a managed device that is active.
//!
//! While it is suspended its metadata is exact and the kernel does not use it; then the table is loaded anew, because a target
//! takes image and stale blocks from the disk alone. The change itself is one commit, so a power cut leaves what was before it or
//! what is after it. If this program dies between the two, the device stays suspended; the kernel does not resume the old table
//! with another image or other stale blocks than it had, and the same command, run again, goes on.
//!
//! Whoever opens the device after it was suspended waits, and sees the image: with the last who closed it all that was
//! remembered of its content has gone. So the count of openers is taken then, and not before.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pristine_device::block;
use pristine_device::dm::{Dm, Managed};
use pristine_metadata::shared::superblock::ImageId;
use pristine_metadata::shared::table::Features;
use pristine_metadata::shared::Error as Core;
use pristine_metadata::{Access, Devices, Metadata, Superblock};
use rustix::fs::{fadvise, flock, Advice, FlockOperation};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{device_name, refuse_read_only};
use crate::exit::{Code, Failure, Outcome};

/// How long another command that changes the same device is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// The devices of one that is active.
pub fn devices_of(managed: &Managed) -> Devices {
    Devices::new(
        device_name(&managed.data),
        managed.metadata.as_deref().map(device_name),
    )
}

/// Calls `change` with the devices of an active device while it is suspended, and lets the kernel go on with what the
/// metadata says then, whether that succeeded or not. With `force` it may be open meanwhile.
pub fn change_active<R>(
    dm: &Dm,
    managed: &Managed,
    force: bool,
    change: impl FnOnce(&Devices) -> Outcome<R>,
) -> Outcome<R> {
    let name = managed.device.name.as_str();
    refuse_read_only(managed)?;
    refuse_open(dm, name, force)?;
    let devices = devices_of(managed);
    let _alone = alone(name, &devices)?;
    outlast_signals()?;
    dm.suspend(name)?;
    let done = refuse_open(dm, name, force).and_then(|()| change(&devices));
    // Whatever became of it, the kernel takes what is on the disk now.
    let now = Managed {
        features: features_now(&managed.features, &devices),
        ..managed.clone()
    };
    let resumed = dm.reload(&now);
    let done = done?;
    resumed?;
    if force {
        // Whoever has it open remembers what it was; what is not dirty there may be forgotten.
        let _ = File::open(now.path()).map(|file| fadvise(&file, 0, None, Advice::DontNeed));
    }
    Ok(done)
}

/// A table that says which image it wants says the new one. If the metadata cannot be read, the kernel says so.
fn features_now(features: &Features, devices: &Devices) -> Features {
    let mut now = *features;
    if now.image.is_none() && now.generation.is_none() {
        return now;
    }
    if let Ok(metadata) = Metadata::open(devices, Access::Read) {
        let sb = metadata.superblock();
        now.image = now.image.map(|_| sb.image_id);
        now.generation = now.generation.map(|_| sb.generation);
    }
    now
}

/// Keeps other commands from the metadata as long as the result lives: two that suspend a device would both write to it.
fn alone(name: &str, devices: &Devices) -> Outcome<File> {
    let path = path_of(devices);
    let cannot = |error: &io::Error| Failure::io(format!("cannot lock {}", path.display()), error);
    let file = File::open(path).map_err(|e| cannot(&e))?;
    let begin = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // udev holds such a lock, too, when it looks at a device.
            Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = format!("another command changes {name}");
                return Err(Failure::new(Code::Busy, what).hint("try again when it has ended"));
            }
            Err(error) => return Err(cannot(&error.into())),
        }
    }
}

/// From here on Ctrl-C does not end the process: it would leave a suspended device behind.
fn outlast_signals() -> Outcome {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))
            .map_err(|e| Failure::io("cannot handle signals", &e))?;
    }
    Ok(())
}

fn refuse_open(dm: &Dm, name: &str, force: bool) -> Outcome {
    let device = dm.device(name)?;
    if device.open_count == 0 || force {
        return Ok(());
    }
    let by = block::user(device.major, device.minor);
    let what = match by {
        Some(by) => format!("{name} is in use by {by}"),
        None => format!("{name} is in use"),
    };
    Err(Failure::new(Code::Busy, what).hint(
        "unmount it first (or --force); the device that the system runs on is reverted and updated at the next boot, \
         with pristine.revert=instant at once",
    ))
}

/// Refuses what would leave a device that nobody can start.
pub fn refuse_unchecked(devices: &Devices, sb: &Superblock) -> Outcome {
    if sb.needs_check {
        let error = pristine_metadata::Error::Metadata {
            path: path_of(devices).into(),
            source: Core::NeedsCheck,
        };
        return Err(error.into());
    }
    Ok(())
}

/// Refuses blocks to become stale that nobody could fetch.
pub fn refuse_without_image(name: &str, image: &ImageId) -> Outcome {
    if *image != [0; 32] {
        return Ok(());
    }
    let what =
        format!("{name} names no image, so blocks that become stale could be fetched from nowhere");
    Err(Failure::new(Code::Identity, what)
        .hint("a device belongs to an image when the agent has filled it from one"))
}

/// Where the metadata is.
pub fn path_of(devices: &Devices) -> &Path {
    devices
        .metadata()
        .or(devices.data())
        .unwrap_or(Path::new(""))
}

/// The same for messages.
pub fn name_of(devices: &Devices) -> String {
    path_of(devices).display().to_string()
}
