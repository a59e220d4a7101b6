// SPDX-License-Identifier: GPL-2.0

//! What can go wrong with metadata, for people and for programs.

use std::io;
use std::path::PathBuf;

use pristine_shared::error::Error as Core;
use pristine_shared::PAGE_SIZE;

/// Result of this crate.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// What a program decides on; the text of an [`Error`] is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// There is no metadata.
    NotFormatted,
    /// There is metadata, or something else of value, where metadata was to be written.
    AlreadyFormatted,
    /// Bytes on the device are damaged.
    Damaged,
    /// An earlier failure asks for a check.
    NeedsCheck,
    /// The metadata belongs to another data device, image or generation.
    Identity,
    /// Mounted, active or open elsewhere.
    InUse,
    /// A device is too small.
    TooSmall,
    /// A newer format version, or unknown features.
    Unsupported,
    /// No such file or device.
    NotFound,
    /// Not allowed.
    Denied,
    /// Reading or writing failed.
    Io,
    /// What was asked for makes no sense.
    Usage,
}

/// A failure: what was being done, to what, why it failed, and where it helps what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device or file cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The device or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A device or file is claimed by somebody else.
    #[error("{} is in use{}", path.display(), by.as_ref().map(|b| format!(" by {b}")).unwrap_or_default())]
    InUse {
        /// The device or file.
        path: PathBuf,
        /// Who holds it, if that is known.
        by: Option<String>,
    },
    /// It is neither a block device nor a regular file.
    #[error("{} is neither a block device nor a regular file", path.display())]
    NotABlockDevice {
        /// What it is.
        path: PathBuf,
    },
    /// Reading, writing or syncing failed.
    #[error("cannot {action} {}{}: {source}", path.display(), page.map(|p| format!(" at page {p}")).unwrap_or_default())]
    Io {
        /// "read", "write", "flush".
        action: &'static str,
        /// The device or file.
        path: PathBuf,
        /// Which page, if it was one.
        page: Option<u64>,
        /// Why.
        source: io::Error,
    },
    /// What the shared core found wrong.
    #[error("{}: {source}", path.display())]
    Metadata {
        /// The device or file that holds the metadata.
        path: PathBuf,
        /// What is wrong.
        source: Core,
    },
    /// The data device carries no label, so it is not the one that the metadata knows.
    #[error(
        "{} carries no label of pristine, so it is not the data device that {} was made for",
        data.display(),
        metadata.display()
    )]
    NoLabel {
        /// The data device.
        data: PathBuf,
        /// The metadata device.
        metadata: PathBuf,
    },
    /// The metadata of the data device is on a device of its own, which was not given.
    #[error("{} keeps its metadata on a separate device", data.display())]
    NeedsMetadataDevice {
        /// The data device.
        data: PathBuf,
    },
    /// Whose metadata it is can only be told together with its data device, which was not given.
    #[error("{} is repaired together with its data device alone", metadata.display())]
    NeedsDataDevice {
        /// The metadata device.
        metadata: PathBuf,
    },
    /// What is lost cannot be made up without guessing.
    #[error("{} cannot be repaired: {what}", path.display())]
    Irreparable {
        /// The device that holds the metadata.
        path: PathBuf,
        /// What is lost.
        what: &'static str,
    },
    /// A device is too small.
    #[error("{} is too small: it has {found} bytes, {what} needs {needed}", path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// What does not fit.
        what: String,
        /// Bytes there are.
        found: u64,
        /// Bytes it takes.
        needed: u64,
    },
    /// A device is smaller than it was, or was to be made so.
    #[error(
        "{}: a managed device cannot shrink, from {expected} bytes to {found}",
        path.display()
    )]
    Shrinks {
        /// The data device.
        path: PathBuf,
        /// Bytes there are, or that were asked for.
        found: u64,
        /// Bytes it had.
        expected: u64,
    },
    /// The metadata in the reserved tail would have to be written over itself.
    #[error(
        "{} has too little new room for its metadata to move: {missing} bytes are missing",
        path.display()
    )]
    NoRoomToMove {
        /// The data device.
        path: PathBuf,
        /// Bytes by which it would have to be larger.
        missing: u64,
    },
    /// There is no metadata at the end of the size that was given.
    #[error("{} had no metadata at its end when it had {from} bytes", path.display())]
    NoTail {
        /// The data device.
        path: PathBuf,
        /// The size that was given.
        from: u64,
    },
    /// Metadata of several formats was found, and which is the device's own cannot be known.
    #[error(
        "{} holds metadata of several devices, made for {} bytes",
        path.display(),
        sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
    )]
    Ambiguous {
        /// The data device.
        path: PathBuf,
        /// The sizes that each was made for.
        sizes: Vec<u64>,
    },
    /// There is metadata already.
    #[error("{} holds pristine metadata already{}", path.display(), if *usable { "" } else { ", though damaged" })]
    AlreadyFormatted {
        /// The device that holds it.
        path: PathBuf,
        /// Whether it can be used.
        usable: bool,
    },
    /// Something else is there.
    #[error("{} holds {what}, which would be lost", path.display())]
    HoldsData {
        /// The device.
        path: PathBuf,
        /// What it holds.
        what: String,
    },
    /// The same device was given twice.
    #[error("{} and {} are the same device", data.display(), metadata.display())]
    SameDevice {
        /// The data device.
        data: PathBuf,
        /// The metadata device.
        metadata: PathBuf,
    },
    /// The image is larger than what is managed.
    #[error(
        "the image has {image} bytes, the managed device only {managed}: it must be formatted anew"
    )]
    ImageTooLarge {
        /// Bytes of the image.
        image: u64,
        /// Bytes managed.
        managed: u64,
    },
    /// A commit through a handle that was opened for reading.
    #[error("{} was opened for reading only", path.display())]
    ReadOnly {
        /// The device.
        path: PathBuf,
    },
    /// Planes of another geometry were given.
    #[error("the planes have {found} blocks, the metadata {expected}")]
    WrongPlanes {
        /// Blocks of the planes.
        found: u64,
        /// Blocks of the metadata.
        expected: u64,
    },
    /// Random numbers are not to be had.
    #[error("cannot get random bytes for a UUID: {source}")]
    Random {
        /// Why.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn core(path: impl Into<PathBuf>, source: Core) -> Self {
        let path = path.into();
        match source {
            Core::TooSmall(found, needed) => Self::TooSmall {
                path,
                what: "its metadata".into(),
                found: found.saturating_mul(PAGE_SIZE as u64),
                needed: needed.saturating_mul(PAGE_SIZE as u64),
            },
            source => Self::Metadata { path, source },
        }
    }

    /// What kind of failure this is.
    pub fn class(&self) -> Class {
        match self {
            Self::Open { source, .. } | Self::Io { source, .. } | Self::Random { source } => {
                match source.kind() {
                    io::ErrorKind::NotFound => Class::NotFound,
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                        Class::Denied
                    }
                    _ => Class::Io,
                }
            }
            Self::InUse { .. } => Class::InUse,
            Self::NotABlockDevice { .. }
            | Self::SameDevice { .. }
            | Self::ReadOnly { .. }
            | Self::WrongPlanes { .. }
            | Self::NeedsMetadataDevice { .. }
            | Self::NeedsDataDevice { .. } => Class::Usage,
            Self::Irreparable { .. } => Class::Damaged,
            Self::NoLabel { .. } | Self::Shrinks { .. } | Self::Ambiguous { .. } => Class::Identity,
            Self::NoTail { .. } => Class::NotFormatted,
            Self::TooSmall { .. } | Self::ImageTooLarge { .. } | Self::NoRoomToMove { .. } => {
                Class::TooSmall
            }
            Self::AlreadyFormatted { .. } | Self::HoldsData { .. } => Class::AlreadyFormatted,
            Self::Metadata { source, .. } => match source {
                Core::NotFormatted => Class::NotFormatted,
                Core::NewerVersion(..) | Core::UnknownFeatures(_) => Class::Unsupported,
                Core::NeedsCheck => Class::NeedsCheck,
                Core::TooSmall(..) => Class::TooSmall,
                Core::BadGeometry(_) | Core::TailMoves => Class::Usage,
                Core::Io(_) => Class::Io,
                e if e.is_identity() => Class::Identity,
                _ => Class::Damaged,
            },
        }
    }

    /// What can be done about it, where that is known: words for people, in terms of the `pristine` command.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::InUse { .. } => "unmount it, or stop what uses it, first",
            Self::NeedsMetadataDevice { .. } => "say which one: --metadata DEVICE",
            Self::NeedsDataDevice { .. } => "say which one it is",
            Self::Irreparable { .. } => {
                "start anew: pristine device format --force, then let the agent provision the device"
            }
            Self::AlreadyFormatted { .. } => {
                "pristine device dump shows what is there; --force overwrites it"
            }
            Self::HoldsData { .. } => "choose another device, or overwrite it with --force",
            Self::ImageTooLarge { .. } => {
                "a larger image needs a new format: pristine device format"
            }
            Self::NoLabel { .. } => {
                "check which disk is which: the data device may have been replaced"
            }
            Self::TooSmall { .. } => "use a larger device, or manage less of it (--size)",
            Self::Shrinks { .. } => {
                "give the data device its old size again, or start anew: pristine device format"
            }
            Self::NoRoomToMove { .. } => "enlarge the device further",
            Self::NoTail { .. } => "without --from the metadata is searched for",
            Self::Ambiguous { .. } => {
                "say with --from which size the device had before it was enlarged"
            }
            Self::Metadata { source, .. } => match source {
                Core::NotFormatted => "pristine device format makes fresh metadata",
                Core::NeedsCheck => "pristine device repair",
                Core::NewerVersion(..) | Core::UnknownFeatures(_) => "use a newer pristine",
                Core::DataSize(found, expected) if found > expected => {
                    "if the device was enlarged, pristine device grow takes the new size; else check which disk is which"
                }
                Core::DataSize(..) => {
                    "check which disk is which: this is another data device, or it was made smaller"
                }
                Core::DataUuid => "check which disk is which: every format gives a new identity",
                e if e.is_damage() => {
                    "pristine device check shows all the damage, pristine device repair mends it"
                }
                _ => return None,
            },
            _ => return None,
        })
    }

    /// The shared core's error, if it is one.
    pub fn as_core(&self) -> Option<Core> {
        match self {
            Self::Metadata { source, .. } => Some(*source),
            _ => None,
        }
    }
}
