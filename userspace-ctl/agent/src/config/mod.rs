// SPDX-License-Identifier: GPL-2.0

//! What the agent is told to do: the kernel command line over a file in the initramfs.
//!
//! The file (`/etc/pristine/agent.conf`) has lines `key = value`; `#` begins a comment. On the kernel command line
//! the same keys carry the prefix `pristine.`, and win. An unknown key is a warning, because an older agent must
//! boot with a newer configuration; a value that makes no sense is an error, because guessing could cost a disk.

mod settings;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use pristine_store::Token;
use pristine_trust::Keys;

use crate::store_master::Access;

pub use settings::Settings;
pub use values::{
    Damaged, DeviceSpec, Hydrate, ImageSpec, IpSpec, Offline, OnError, Peers, Provision, Revert,
    StoreList, StoreSpec, Then,
};

/// The prefix of the agent's keys on the kernel command line.
pub const PREFIX: &str = "pristine.";

/// All keys with what they mean, in the order of the documentation.
pub const KEYS: &[(&str, &str)] = &[
    (
        "data",
        "the data device: /dev/NAME, PARTUUID=, PARTLABEL= or SERIAL=",
    ),
    (
        "metadata",
        "the metadata device, written as data is; tail (default): the end of the data device",
    ),
    (
        "store",
        "where images are: http://HOST[:PORT][/PATH], or a directory; several times, or separated by commas: what the \
         first one does not serve, the next one does",
    ),
    (
        "fetch-timeout",
        "seconds without a byte after which a store is given up for the next one, 1 to 600 (default: 15, or 5 if there \
         are several); a whole answer may take this and its length at 64 KiB/s",
    ),
    (
        "token",
        "what the store's server asks for (pristine token new); better in the file than on the command line, \
         which all users can read",
    ),
    (
        "identity",
        "the file with the age identity that opens encrypted images (default: /etc/pristine/identity, if it is there)",
    ),
    (
        "image",
        "the channel to follow, or an image id (64 hexadecimal digits)",
    ),
    (
        "name",
        "name of the managed device, /dev/mapper/NAME (default: root)",
    ),
    (
        "revert",
        "eager (default): back to the image before the system starts; instant: at once, \
         fetching while it runs; undo: before it starts, from what the undo area keeps, so that no network is needed; \
         off: keep changes",
    ),
    (
        "undo",
        "size of the undo area of a disk that is filled from now on, such as 512M (default: off, none); when it is full, \
         what changes then is taken back from the store",
    ),
    (
        "provision",
        "auto (default): fill a disk without metadata; instant: while the system runs; never; \
         force: fill it again now",
    ),
    (
        "allow-older",
        "yes or no (default): follow the channel to an older generation than the disk has",
    ),
    (
        "key",
        "a public key, RW...: releases must be signed by one of these, or of those in /etc/pristine/keys; several \
         times, or separated by commas",
    ),
    (
        "signed",
        "yes or no (default): refuse to work without a key",
    ),
    (
        "oldest",
        "the oldest generation of the channel that is accepted (default: any)",
    ),
    (
        "hydrate",
        "stale blocks that nobody asks for: idle (default): fetch them in quiet moments; full; off",
    ),
    (
        "hydrate-rate",
        "bytes per second that this may take, such as 500K or 20M (default: no limit)",
    ),
    (
        "peers",
        "on: give blocks of the image to neighbours and take theirs, by pristined, as `pristine serve --peers` introduces \
         them; off (default)",
    ),
    (
        "peers-port",
        "the port on which neighbours are served (default: 7117)",
    ),
    (
        "peers-from",
        "networks that are served, such as 10.1.0.0/16, separated by commas (default: the private ones)",
    ),
    (
        "peers-rate",
        "bytes per second that may be given, such as 5M (default: 32M)",
    ),
    (
        "offline",
        "when the store does not serve: wait (default), boot-as-is where that is safe, refuse",
    ),
    (
        "damaged",
        "metadata that cannot be used: refuse (default), or reprovision the whole disk",
    ),
    (
        "onerror",
        "after a failure: retry (default), shell, reboot, poweroff",
    ),
    (
        "then",
        "when the disk is right: boot (default), poweroff, reboot",
    ),
    (
        "ip",
        "dhcp (default), off, or ADDRESS/PREFIX[,GATEWAY[,DNS...]]",
    ),
    (
        "interface",
        "the network interface, auto (default): the first that works",
    ),
    ("rootfs", "file system of the root, auto (default)"),
    ("rootflags", "mount options of the root, besides ro"),
    ("init", "the system's first program (default: /sbin/init)"),
    ("module", "the kernel module's file, auto (default)"),
    (
        "device-timeout",
        "seconds to wait for the devices to appear (default: 30)",
    ),
    (
        "network-timeout",
        "seconds to wait for an address (default: 30)",
    ),
    (
        "parallel",
        "requests to the store at a time, 1 to 64 (default: 8)",
    ),
    ("debug", "yes or no (default): say more"),
];

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A line of the file is no `key = value`.
    #[error("{file}, line {line}: {text:?} is not of the form key = value")]
    Syntax {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// A value is none of those that the key can have.
    #[error("{key}={value}: {why} ({key} is {meaning})")]
    Value {
        /// The key, with its prefix.
        key: String,
        /// The value.
        value: String,
        /// What is wrong with it.
        why: String,
        /// What the key means.
        meaning: &'static str,
    },
    /// A key that has no default is missing.
    #[error("pristine.{key} is not set: {meaning}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What it means.
        meaning: &'static str,
    },
}

fn meaning(key: &str) -> &'static str {
    KEYS.iter().find(|(k, _)| *k == key).map_or("", |(_, m)| m)
}

/// The whole configuration, valid.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // KEYS says what each means.
pub struct Config {
    pub data: DeviceSpec,
    pub metadata: Option<DeviceSpec>,
    pub store: StoreList,
    pub token: Option<Token>,
    pub identity: Option<PathBuf>,
    pub image: ImageSpec,
    pub name: String,
    pub revert: Revert,
    /// In bytes; 0 for none.
    pub undo: u64,
    pub provision: Provision,
    pub allow_older: bool,
    pub keys: Keys,
    pub signed: bool,
    pub oldest: u64,
    pub hydrate: Hydrate,
    pub hydrate_rate: Option<String>,
    /// Whether to share blocks with neighbours, and how.
    pub peers: Option<Peers>,
    pub offline: Offline,
    pub damaged: Damaged,
    pub on_error: OnError,
    pub then: Then,
    pub ip: IpSpec,
    pub interface: Option<String>,
    pub rootfs: Option<String>,
    pub rootflags: String,
    pub init: String,
    pub module: Option<PathBuf>,
    pub device_timeout: Duration,
    pub network_timeout: Duration,
    pub parallel: usize,
    pub debug: bool,
}

impl Config {
    /// What opens the store.
    pub fn access(&self) -> Access {
        Access {
            token: self.token.clone(),
            identity: self.identity.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
