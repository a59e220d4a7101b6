// SPDX-License-Identifier: GPL-2.0

//! The values that settings can have.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// An enumeration of words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(format!("not one of {}", [$($word),+].join(", "))),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word,)+ })
            }
        }
    };
}

words! {
    /// When changes are taken back.
    Revert {
        /// At once, without fetching: what changed becomes stale, and comes while the system runs.
        Instant = "instant",
        /// Before the system starts.
        Eager = "eager",
        /// Before the system starts, from the originals that the disk keeps; only what has none comes from the store.
        Undo = "undo",
        /// Never: what changed stays.
        Off = "off",
    }
}
words! {
    /// Whether a disk may be filled with the image.
    Provision {
        /// If it has no metadata yet.
        Auto = "auto",
        /// Likewise, but the system starts at once, and the blocks come while it runs.
        Instant = "instant",
        /// Never.
        Never = "never",
        /// In any case, whatever it holds.
        Force = "force",
    }
}
words! {
    /// What is fetched that nobody asked for, while the system runs.
    Hydrate {
        /// All that is stale, when the device is idle.
        Idle = "idle",
        /// All that is stale, as fast as it goes.
        Full = "full",
        /// Nothing: blocks stay stale until they are read.
        Off = "off",
    }
}
words! {
    /// What happens when the store does not serve.
    Offline {
        /// Try again until it does.
        Wait = "wait",
        /// Boot what is on the disk, if there is a system on it.
        BootAsIs = "boot-as-is",
        /// A failure like any other.
        Refuse = "refuse",
    }
}
words! {
    /// What happens to metadata that cannot be used.
    Damaged {
        /// A failure; somebody must look.
        Refuse = "refuse",
        /// The disk is filled from the image again.
        Reprovision = "reprovision",
    }
}
words! {
    /// What follows a failure.
    OnError {
        /// Everything again, after a while that grows to a minute.
        Retry = "retry",
        /// A shell on the console; everything again when it ends.
        Shell = "shell",
        /// The machine starts again.
        Reboot = "reboot",
        /// The machine goes off.
        Poweroff = "poweroff",
    }
}
words! {
    /// What follows success.
    Then {
        /// The system starts.
        Boot = "boot",
        /// The machine goes off.
        Poweroff = "poweroff",
        /// The machine starts again.
        Reboot = "reboot",
    }
}

/// A block device by name or by what is known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// A path.
    Path(PathBuf),
    /// UUID of a GPT partition.
    PartUuid(String),
    /// Name of a GPT partition.
    PartLabel(String),
    /// Serial number of a disk.
    Serial(String),
}

impl FromStr for DeviceSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let spec = match text.split_once('=') {
            Some((_, "")) => return Err("nothing follows the =".into()),
            Some(("PARTUUID", v)) => Self::PartUuid(v.to_ascii_lowercase()),
            Some(("PARTLABEL", v)) => Self::PartLabel(v.into()),
            Some(("SERIAL", v)) => Self::Serial(v.into()),
            _ if text.starts_with('/') => Self::Path(text.into()),
            _ => return Err("not a path, PARTUUID=, PARTLABEL= or SERIAL=".into()),
        };
        Ok(spec)
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(p) => write!(f, "{}", p.display()),
            Self::PartUuid(v) => write!(f, "PARTUUID={v}"),
            Self::PartLabel(v) => write!(f, "PARTLABEL={v}"),
            Self::Serial(v) => write!(f, "SERIAL={v}"),
        }
    }
}

/// Where images come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSpec {
    /// A web server.
    Http(String),
    /// A directory.
    Directory(PathBuf),
}

impl FromStr for StoreSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("http://") {
            Some(rest) if !rest.is_empty() && !rest.starts_with('/') => Ok(Self::Http(text.into())),
            None if text.starts_with('/') => Ok(Self::Directory(text.into())),
            None if text.starts_with("https://") => {
                Err("https is not supported here; http is safe, as each block is verified".into())
            }
            _ => Err("neither http://HOST... nor a directory".into()),
        }
    }
}

impl fmt::Display for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(url) => f.write_str(url),
            Self::Directory(path) => write!(f, "{}", path.display()),
        }
    }
}

/// All stores that have the image, the preferred one first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreList {
    /// At least one.
    pub stores: Vec<StoreSpec>,
    /// After this time without an answer the next one is asked; `None` for the defaults.
    pub timeout: Option<Duration>,
}

impl StoreList {
    /// Whether one of them is reached over the network.
    pub fn needs_network(&self) -> bool {
        let over_network = |store: &StoreSpec| matches!(store, StoreSpec::Http(_));
        self.stores.iter().any(over_network)
    }
}

impl From<StoreSpec> for StoreList {
    fn from(store: StoreSpec) -> Self {
        Self {
            stores: vec![store],
            timeout: None,
        }
    }
}

impl fmt::Display for StoreList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, store) in self.stores.iter().enumerate() {
            write!(f, "{}{store}", if n > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// Which image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSpec {
    /// The one that a channel points to.
    Channel(String),
    /// This very one.
    Id([u8; 32]),
}

impl FromStr for ImageSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(id) = pristine_shared::table::parse_hex(text) {
            return Ok(Self::Id(id));
        }
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if text.is_empty() || text.starts_with('.') || !text.chars().all(good) {
            return Err(
                "not the name of a channel (letters, digits, - _ .) nor an image id".into(),
            );
        }
        Ok(Self::Channel(text.into()))
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Channel(name) => f.write_str(name),
            Self::Id(id) => write!(f, "{}", pristine_shared::table::Hex(id)),
        }
    }
}

/// How the network comes up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IpSpec {
    /// Ask a DHCP server.
    Dhcp,
    /// It is up already, or not needed.
    Off,
    /// These addresses.
    Static {
        /// The machine's own.
        address: Ipv4Addr,
        /// Bits of the network, 0 to 32.
        prefix: u8,
        /// The way to other networks.
        gateway: Option<Ipv4Addr>,
        /// Name servers.
        dns: Vec<IpAddr>,
    },
}

impl FromStr for IpSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "dhcp" => return Ok(Self::Dhcp),
            "off" => return Ok(Self::Off),
            _ => {}
        }
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or("");
        let (address, prefix) = first
            .split_once('/')
            .ok_or("not dhcp, off or ADDRESS/PREFIX[,GATEWAY[,DNS...]]")?;
        let address = address
            .parse()
            .map_err(|_| format!("{address} is not an IPv4 address"))?;
        let prefix: u8 = prefix
            .parse()
            .ok()
            .filter(|p| *p <= 32)
            .ok_or_else(|| format!("{prefix} is not a number of bits from 0 to 32"))?;
        let gateway = match parts.next() {
            None | Some("") => None,
            Some(g) => Some(
                g.parse()
                    .map_err(|_| format!("{g} is not an IPv4 address"))?,
            ),
        };
        let dns = parts
            .map(|d| d.parse().map_err(|_| format!("{d} is not an IP address")))
            .collect::<Result<_, _>>()?;
        Ok(Self::Static {
            address,
            prefix,
            gateway,
            dns,
        })
    }
}
/// How blocks are shared with neighbours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peers {
    /// The port on which they are served.
    pub port: u16,
    /// The networks that are; none for those that the helper takes by itself.
    pub from: Vec<ipnet::IpNet>,
    /// Bytes per second that may be given, as the helper reads it.
    pub rate: Option<String>,
}
