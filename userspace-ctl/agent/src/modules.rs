// SPDX-License-Identifier: GPL-2.0

//! Loading kernel modules: those that the initramfs lists, in its order.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::console::{debug, warn};
use crate::failure::{Failure, Kind};

/// Files of modules in the order in which they are to be loaded, one a line; made with the initramfs.
pub const LIST: &str = "/etc/pristine/modules";

/// The modules of the list, except the target's own, which is loaded when the disk is right.
pub fn listed(list: &Path) -> Vec<PathBuf> {
    fs::read_to_string(list)
        .unwrap_or_default()
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(PathBuf::from)
        .collect()
}

/// Loads the file of a module, unpacked. One that is loaded already is fine.
///
/// # Errors
///
/// The kernel's refusal.
pub fn load(path: &Path) -> Result<(), Failure> {
    let fail = |why: String| {
        Failure::new(
            Kind::Activation,
            format!("cannot load {}: {why}", path.display()),
        )
    };
    let file = File::open(path).map_err(|e| fail(e.to_string()))?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => {
            debug(format_args!("loaded {}", path.display()));
            Ok(())
        }
        // "Exec format error" is what the kernel answers to a module of another kernel.
        Err(Errno::NOEXEC) => Err(fail("it was made for another kernel".into()).advise(
            "make the initramfs again for the kernel that runs: its release is in the kernel's first messages",
        )),
        Err(e) => Err(fail(e.to_string())),
    }
}

/// Loads all that the list has. A driver that does not load may be one that this machine does not need, so
/// that is a warning; if it was needed, its device does not appear, which is a failure with a name.
pub fn load_listed(list: &Path) {
    for path in listed(list) {
        if let Err(failure) = load(&path) {
            warn(failure);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_comments() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("modules");
        fs::write(&list, "# drivers\n/lib/a.ko\n\n /lib/b.ko \n").unwrap();
        assert_eq!(
            listed(&list),
            [Path::new("/lib/a.ko"), Path::new("/lib/b.ko")]
        );
        assert!(listed(&dir.path().join("none")).is_empty());
    }
}
