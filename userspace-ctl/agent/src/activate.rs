// SPDX-License-Identifier: GPL-2.0

//! The managed device.

use std::path::Path;
use std::time::Duration;

use pristine_device::dm::{Activation, Dm, Managed};
use pristine_device::{module, Class, Error};
use pristine_metadata::Superblock;
use pristine_shared::table::Features;

use crate::config::Config;
use crate::console::{debug, say};
use crate::failure::{Failure, Kind};

/// Where the agent's own initramfs has the target's module.
const OWN_MODULE: &str = "/lib/pristine/dm-pristine.ko";

fn failure(error: Error) -> Failure {
    let advice = match error.class() {
        Class::Unsupported => {
            "make the initramfs again with the module for the kernel that runs (scripts/initramfs)"
        }
        Class::NotFound | Class::NoModule => {
            "is dm-pristine.ko in the initramfs? pristine.module names its file"
        }
        Class::Busy => "something else uses the device; is the data device right?",
        _ => "the kernel's messages (dmesg) say why",
    };
    Failure::new(Kind::Activation, error).advise(advice)
}

/// Removes the managed device if an earlier attempt left it, so that its metadata can be opened again.
///
/// # Errors
///
/// It is in use.
pub fn deactivate(name: &str) -> Result<(), Failure> {
    // Without the target's module there can be no such device.
    if !module::is_loaded(module::MODULE) {
        return Ok(());
    }
    let dm = Dm::open().map_err(failure)?;
    match dm.remove(name, Duration::from_secs(10)) {
        Ok(()) => {
            say(format_args!(
                "removed {name}, which an earlier attempt left"
            ));
            Ok(())
        }
        Err(Error::NoSuchDevice { .. }) => Ok(()),
        Err(e) => Err(failure(e)),
    }
}

/// Loads the target's module and activates the managed device. The kernel is told which metadata, image and generation
/// are meant, and refuses others.
///
/// # Errors
///
/// The kernel's refusal.
pub fn activate(
    config: &Config,
    data: &Path,
    metadata: Option<&Path>,
    superblock: &Superblock,
) -> Result<Managed, Failure> {
    let own = Path::new(OWN_MODULE);
    let file = config
        .module
        .as_deref()
        .or_else(|| own.exists().then_some(own));
    module::load(file).map_err(failure)?;
    let has_image = superblock.image_id != [0; 32];
    let features = Features {
        meta_uuid: Some(superblock.meta_uuid),
        image: has_image.then_some(superblock.image_id),
        generation: has_image.then_some(superblock.generation),
        ..Features::default()
    };
    let dm = Dm::open().map_err(failure)?;
    let managed = dm
        .activate(
            &config.name,
            &Activation {
                data,
                metadata,
                sectors: superblock.geometry.sectors(),
                meta_uuid: superblock.meta_uuid,
                features,
            },
        )
        .map_err(failure)?;
    let path = managed.path();
    debug(format_args!("{}: {}", path.display(), managed.status));
    say(format_args!("{} is active", path.display()));
    Ok(managed)
}
