// SPDX-License-Identifier: GPL-2.0

//! What can be wrong with metadata, and how it is said.

use core::fmt;

/// A structure of the on-disk format, named in errors so that the reader knows where to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure {
    /// A superblock copy: 0 or 1.
    Superblock(u8),
    /// The label in the last page of the data device.
    Label,
    /// An index page of a checkpoint area: (area, page of the index).
    Index(u8, u32),
    /// A plane page of a checkpoint area: (area, page, counted through both planes).
    Plane(u8, u32),
    /// A log record: its sequence number.
    Log(u64),
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock(copy) => write!(f, "superblock copy {copy}"),
            Self::Label => write!(f, "data device label"),
            Self::Index(area, page) => write!(f, "checkpoint area {area} index page {page}"),
            Self::Plane(area, page) => write!(f, "checkpoint area {area} plane page {page}"),
            Self::Log(seq) => write!(f, "log record {seq}"),
        }
    }
}

/// Why metadata cannot be used.
///
/// Every variant is a refusal: nothing is guessed and nothing is changed by whoever returns one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// There is no Pristine metadata here at all (neither anchor has the magic).
    NotFormatted,
    /// The structure does not have its magic.
    BadMagic(Structure),
    /// The structure's CRC does not match its content.
    BadChecksum(Structure),
    /// The structure is older or newer than what refers to it, or belongs to other metadata.
    Mismatched(Structure),
    /// A field of the structure is outside its range.
    BadField(Structure, &'static str),
    /// The format version is newer than this software: (found, newest known).
    NewerVersion(u32, u32),
    /// Feature bits that this software does not know and must know to use the metadata.
    UnknownFeatures(u64),
    /// The log ends at this record, though later records exist: a record was damaged or lost.
    LogGap(u64),
    /// Records that the checkpoint still needs were overwritten; the first of them.
    LogOverwritten(u64),
    /// The data device does not have the size the metadata was made for: (found, expected), in sectors.
    DataSize(u64, u64),
    /// The managed size asked for is not the one in the metadata: (found, expected), in sectors.
    ManagedSize(u64, u64),
    /// The data device carries another UUID than the metadata names.
    DataUuid,
    /// The metadata device carries another UUID than was asked for.
    MetaUuid,
    /// The metadata is of another image than was asked for.
    ImageId,
    /// The metadata is of another generation than was asked for: (found, expected).
    Generation(u64, u64),
    /// The metadata in the reserved tail cannot stay where it is when the device grows.
    TailMoves,
    /// An earlier failure left the metadata in need of `pristine device check`.
    NeedsCheck,
    /// Blocks are stale and nobody here can fetch them: how many.
    StaleBlocks(u64),
    /// The device is too small for its metadata: (found, needed), in pages.
    TooSmall(u64, u64),
    /// A device parameter is out of range.
    BadGeometry(&'static str),
    /// Reading or writing a page failed: its number on the device.
    Io(u64),
}

/// Result of the shared core.
pub type Result<T = ()> = core::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFormatted => write!(f, "no pristine metadata found"),
            Self::BadMagic(s) => write!(f, "{s} is not there (bad magic)"),
            Self::BadChecksum(s) => write!(f, "{s} is damaged (bad checksum)"),
            Self::Mismatched(s) => {
                write!(f, "{s} does not belong to this metadata's current state")
            }
            Self::BadField(s, field) => write!(f, "{s} is damaged (field {field} out of range)"),
            Self::NewerVersion(found, known) => {
                write!(
                    f,
                    "metadata format version {found} is newer than the {known} known here"
                )
            }
            Self::UnknownFeatures(bits) => write!(f, "metadata needs unknown features {bits:#x}"),
            Self::LogGap(seq) => write!(f, "log record {seq} is missing though later ones exist"),
            Self::LogOverwritten(seq) => {
                write!(f, "log record {seq} was overwritten before its checkpoint")
            }
            Self::DataSize(found, expected) => {
                write!(
                    f,
                    "data device has {found} sectors, the metadata was made for {expected}"
                )
            }
            Self::ManagedSize(found, expected) => {
                write!(
                    f,
                    "target length is {found} sectors, the metadata manages {expected}"
                )
            }
            Self::DataUuid => write!(f, "metadata belongs to another data device (UUID differs)"),
            Self::MetaUuid => write!(f, "metadata device is not the one asked for (UUID differs)"),
            Self::ImageId => write!(f, "metadata belongs to another image"),
            Self::Generation(found, expected) => {
                write!(f, "metadata is of generation {found}, not {expected}")
            }
            Self::TailMoves => write!(
                f,
                "metadata in the reserved tail must move, which is done while the device is not active"
            ),
            Self::NeedsCheck => write!(f, "metadata needs a check after an earlier failure"),
            Self::StaleBlocks(n) => write!(
                f,
                "{n} blocks are stale since the table was loaded; load it again"
            ),
            Self::TooSmall(found, needed) => {
                write!(
                    f,
                    "device has {found} pages of 4 KiB, its metadata needs {needed}"
                )
            }
            Self::BadGeometry(what) => write!(f, "{what} out of range"),
            Self::Io(page) => write!(f, "I/O error at metadata page {page}"),
        }
    }
}

impl core::error::Error for Error {}

impl Error {
    /// Whether this says that two things that should belong together do not (rule 5 of the contract).
    pub fn is_identity(&self) -> bool {
        matches!(
            self,
            Self::DataSize(..)
                | Self::ManagedSize(..)
                | Self::DataUuid
                | Self::MetaUuid
                | Self::ImageId
                | Self::Generation(..)
        )
    }

    /// Whether this says that bytes on the device are damaged.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::BadMagic(_)
                | Self::BadChecksum(_)
                | Self::Mismatched(_)
                | Self::BadField(..)
                | Self::LogGap(_)
                | Self::LogOverwritten(_)
                | Self::NeedsCheck
        )
    }
}
