// SPDX-License-Identifier: GPL-2.0

//! Whose releases count: the keys in the settings and those in the initramfs, and the time that it is at least.
//!
//! An image that is named by its id needs no signature: the id comes from the settings or from the disk's own metadata, and
//! says what each block is. A channel names an image by a release, and with keys that must be signed by one of them. One that
//! is not is as good as none: `pristine.offline` decides whether the machine boots what it has.

use std::path::Path;
use std::time::UNIX_EPOCH;

use pristine_store::{Release, TrustPolicy};
use pristine_trust::{time, Keys, KEYS_DIRECTORY};

use crate::config::Config;
use crate::failure::{Failure, Kind};

/// What makes a release trusted on this machine: the keys of the settings and of the initramfs.
///
/// # Errors
///
/// Keys that cannot be read, or none with `pristine.signed`.
pub fn policy(config: &Config) -> Result<TrustPolicy, Failure> {
    policy_with(config, Path::new(KEYS_DIRECTORY))
}

/// As [`policy`], with the keys of another directory.
///
/// # Errors
///
/// As [`policy`].
pub fn policy_with(config: &Config, directory: &Path) -> Result<TrustPolicy, Failure> {
    let mut keys = config.keys.clone();
    let found = Keys::read_directory(directory).map_err(|error| {
        Failure::new(Kind::Config, error)
            .advise("correct it, and make the initramfs again; files *.pub there are trusted keys")
    })?;
    keys.extend(found);
    if config.signed && keys.is_empty() {
        let what = format!(
            "pristine.signed is set, and there is no key, neither pristine.key nor in {}",
            directory.display()
        );
        return Err(Failure::new(Kind::Config, what)
            .advise("trust a key (pristine key trust KEY.pub) and make the initramfs again"));
    }
    Ok(TrustPolicy {
        keys,
        oldest: config.oldest,
        not_before: built(),
        clock: None,
    })
}

/// When this program was made, in seconds since 1970, which is certainly past; 0 if that is not known.
fn built() -> u64 {
    let modified = std::fs::metadata("/proc/self/exe").and_then(|m| m.modified());
    let since = modified
        .ok()
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |duration| duration.as_secs())
}

/// Warns that the clock is wrong, so that nobody knows whether a release has expired.
pub fn warn_of_clock(release: &Release) {
    if let Some(expires) = release.expires {
        crate::console::warn(format_args!(
            "the clock is behind: generation {} was published at {}, later than it is here; it is trusted until {}",
            release.generation,
            time(release.published),
            time(expires)
        ));
    }
}
