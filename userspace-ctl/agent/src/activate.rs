// SPDX-License-Identifier: GPL-2.0

//! The managed device.

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::failure::{Failure, Kind};

/// Removes the managed device if an earlier attempt left it.
pub fn deactivate(_name: &str) -> Result<(), Failure> {
    Ok(())
}

/// Loads the target's module and activates the managed device.
pub fn activate(
    _config: &Config,
    _data: &Path,
    _metadata: Option<&Path>,
) -> Result<PathBuf, Failure> {
    Err(Failure::new(Kind::Activation, "not there yet"))
}
