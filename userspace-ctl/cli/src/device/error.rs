// SPDX-License-Identifier: GPL-2.0

//! Failures of the libraries as failures of the command.

use pristine_device as device;
use pristine_metadata as metadata;

use crate::exit::{Code, Failure};

impl From<metadata::Error> for Failure {
    fn from(error: metadata::Error) -> Self {
        use metadata::Class;
        let code = match error.class() {
            Class::NotFormatted | Class::NotFound => Code::NotFound,
            Class::AlreadyFormatted => Code::Exists,
            Class::Damaged => Code::Damaged,
            Class::NeedsCheck => Code::NeedsCheck,
            Class::Identity => Code::Identity,
            Class::InUse => Code::Busy,
            Class::TooSmall => Code::TooSmall,
            Class::Unsupported => Code::Unsupported,
            Class::Denied => Code::Denied,
            Class::Io => Code::Io,
            Class::Usage => Code::Usage,
        };
        let failure = Failure::new(code, error.to_string());
        if let metadata::Error::InUse { by: Some(by), .. } = &error {
            if let Some(name) = by.strip_prefix("/dev/mapper/") {
                return failure.hint(format!("pristine device deactivate {name}"));
            }
        }
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<device::Error> for Failure {
    fn from(error: device::Error) -> Self {
        use device::Class;
        let code = match error.class() {
            Class::NoModule => Code::NoModule,
            Class::Unsupported => Code::Unsupported,
            Class::NotFound => Code::NotFound,
            Class::Busy => Code::Busy,
            Class::Denied => Code::Denied,
            Class::Usage => Code::Usage,
            Class::NotFormatted => Code::NotFound,
            Class::Identity => Code::Identity,
            Class::Damaged => Code::Damaged,
            Class::Stale => Code::Stale,
            Class::Io => Code::Io,
        };
        let failure = Failure::new(code, error.to_string());
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}
