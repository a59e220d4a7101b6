// SPDX-License-Identifier: GPL-2.0

//! `dm-pristine`: a device-mapper target that knows which blocks of a disk differ from its master image.
//!
//! | module | what it is | `unsafe` |
//! | --- | --- | --- |
//! | [`shared`] | formats, recovery, grammars: the pure core that userspace is built from, too | none |
//! | [`dm`] | device-mapper, bios and I/O as safe Rust types | all of it |
//! | [`target`] | the target `pristine` and the device `/dev/pristine` | none |

use kernel::miscdevice::MiscDeviceOptions;
use kernel::prelude::*;

// In these two, `pub` marks the interface of the layer, not of the crate.
#[allow(unreachable_pub)]
mod dm;
// Userspace uses what the module does not.
#[allow(unreachable_pub, dead_code)]
mod shared;
#[deny(unsafe_code)]
mod target;

#[cfg(CONFIG_KUNIT)]
mod kunit;

module! {
    type: Module,
    name: "dm_pristine",
    authors: ["The Pristine developers"],
    description: "Device-mapper target that tracks changes against a master image",
    license: "GPL v2",
    alias: ["dm-pristine"],
}

/// The module. The fields are dropped in their order: nobody can come in by the device when the target goes.
#[pin_data]
struct Module {
    #[pin]
    _control: dm::ControlDevice<target::Control>,
    _reboot: dm::RebootNotifier<target::Pristine>,
    _target: dm::Registration<target::Pristine>,
}

impl kernel::InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _target: dm::Registration::new(module)?,
            _reboot: dm::RebootNotifier::register()?,
            _control <- dm::ControlDevice::register(module, MiscDeviceOptions { name: c"pristine" }),
        })
    }
}
