// SPDX-License-Identifier: GPL-2.0

//! What can go wrong with a store, and whether trying again helps.

use std::io;
use std::path::PathBuf;

use pristine_image::{FormatError, ImageId};
use pristine_seal::age::AgeError;
use pristine_seal::KeyId;
use pristine_trust::TrustError;

use crate::object::{ChannelName, ObjectName};

/// Result of store operations.
pub type Result<T> = std::result::Result<T, Error>;

/// An operation on a store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server could not be reached.
    #[error("cannot reach {location}: {why}")]
    Unreachable {
        /// The store.
        location: String,
        /// What the network says.
        why: String,
    },
    /// The server was reached, and then too slow.
    #[error("{location} did not answer in time: {why}")]
    Timeout {
        /// The store.
        location: String,
        /// Which step took too long.
        why: String,
    },
    /// The server answered with an error.
    #[error("{location} answered HTTP {status} for {object}")]
    Status {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
        /// The HTTP status.
        status: u16,
    },
    /// The connection ended in the middle of an object.
    #[error("{location} stopped after {got} of {expected} bytes of {object}")]
    Cut {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
        /// Bytes that were due.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The server's answer makes no sense.
    #[error("{location} gave a wrong answer for {object}: {why}")]
    Protocol {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
        /// What is wrong.
        why: String,
    },
    /// The object is not in the store.
    #[error("{object} is not in {location}")]
    NotFound {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
    },
    /// The object is shorter than it must be.
    #[error("{object} in {location} is truncated: it has {len} bytes, {needed} are needed")]
    Truncated {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
        /// Its length.
        len: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The object is longer than makes sense.
    #[error("{object} in {location} has more than the {limit} bytes that make sense")]
    TooLarge {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A manifest or a pack is damaged, of a newer version or of another image.
    #[error("{object} in {location}: {error}")]
    Format {
        /// The store.
        location: String,
        /// What was read.
        object: String,
        /// What is wrong with it.
        error: FormatError,
    },
    /// A block's content is not what the image's id vouches for, also when fetched again.
    #[error(
        "block {block} from {object} in {location} has the wrong content, in {attempts} attempts"
    )]
    Content {
        /// The store.
        location: String,
        /// The pack it was in.
        object: String,
        /// The block of the image.
        block: u64,
        /// How often it was fetched.
        attempts: u32,
    },
    /// A channel's pointer, or an entry of its history, is damaged.
    #[error("the release on channel {channel} in {location} is damaged: {why}")]
    Pointer {
        /// The store.
        location: String,
        /// The channel.
        channel: ChannelName,
        /// What is wrong.
        why: String,
    },
    /// The pointer or the store was made by a newer program.
    #[error("{what} in {location} has format version {found}, this program knows {supported}; upgrade pristine")]
    Newer {
        /// The store.
        location: String,
        /// The structure.
        what: String,
        /// Its version.
        found: u64,
        /// The newest version known.
        supported: u64,
    },
    /// Somebody else moved the channel's pointer in the meantime.
    #[error("channel {channel} in {location} was moved meanwhile, {now}; nothing was changed")]
    Conflict {
        /// The store.
        location: String,
        /// The channel.
        channel: ChannelName,
        /// What it points to now.
        now: String,
    },
    /// A release is not trusted.
    #[error("generation {generation} of channel {channel} in {location} is not trusted: {error}")]
    Untrusted {
        /// The store.
        location: String,
        /// The channel.
        channel: ChannelName,
        /// The release's generation, as it says.
        generation: u64,
        /// Why.
        error: TrustError,
    },
    /// A release cannot be made as it is asked for.
    #[error("cannot make a release on channel {channel}: {why}")]
    BadRelease {
        /// The channel.
        channel: ChannelName,
        /// What is wrong.
        why: String,
    },
    /// A release could not be signed.
    #[error(transparent)]
    Sign(#[from] pristine_trust::SignError),
    /// The store cannot be written to this way.
    #[error("{location} is read-only: {why}")]
    ReadOnly {
        /// The store.
        location: String,
        /// Why.
        why: String,
    },
    /// The service was reached, and does not let this through: credentials, permissions, limits.
    #[error("{location} refuses {object}: {why}")]
    Refused {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
        /// What the service says.
        why: String,
    },
    /// A pin or a lease is damaged.
    #[error("{note} in {location} is damaged")]
    Note {
        /// The store.
        location: String,
        /// Which one.
        note: String,
    },
    /// A lease of this program ran out, so that somebody may have cleaned up what it relies on.
    #[error("the lease on {location} was not renewed in time: {why}")]
    LeaseLost {
        /// The store.
        location: String,
        /// What happened.
        why: String,
    },
    /// Somebody else works on the store, and what was asked for cannot be done meanwhile.
    #[error("{location} is in use: {who}")]
    InUse {
        /// The store.
        location: String,
        /// Who, and what for.
        who: String,
    },
    /// The directory is no store.
    #[error("{} is not a Pristine store: {why}", .path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// The store cannot do this.
    #[error("{location} cannot {what}")]
    Unsupported {
        /// The store.
        location: String,
        /// What it cannot do.
        what: String,
    },
    /// Not a URL or a path of a store.
    #[error("{location:?} is not a store: {why}")]
    BadLocation {
        /// The text.
        location: String,
        /// What is wrong.
        why: String,
    },
    /// A token, a certificate or a key cannot be used.
    #[error("cannot use {what}: {why}")]
    Credentials {
        /// Which.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The store has no such image.
    #[error("image {image} is not in {location}")]
    NoImage {
        /// The store.
        location: String,
        /// The image.
        image: ImageId,
    },
    /// What was asked for is encrypted, and there is no key for it.
    #[error("{object} in {location} is encrypted (store key {key}): {why}{}", for_whom(.recipients))]
    NoKey {
        /// The store.
        location: String,
        /// What was asked for.
        object: String,
        /// The store key that it takes.
        key: KeyId,
        /// Why there is none.
        why: String,
        /// Whom it was encrypted to when it was published.
        recipients: Vec<String>,
    },
    /// An age key cannot be used.
    #[error(transparent)]
    Age(#[from] AgeError),
    /// A delta could not be made.
    #[error("cannot make the delta from image {old} to image {new}: {why}")]
    Delta {
        /// The old image.
        old: ImageId,
        /// The new image.
        new: ImageId,
        /// Why.
        why: String,
    },
    /// A file system operation failed.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        error: io::Error,
    },
    /// Who receives the blocks refused one.
    #[error("cannot write fetched blocks: {0}")]
    Sink(io::Error),
    /// The caller cancelled the operation.
    #[error("cancelled")]
    Cancelled,
}

/// What kind of failure it is, for exit codes and policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Unreachable, timeouts, error statuses, cut connections.
    Network,
    /// What was asked for is not there.
    NotFound,
    /// Content is wrong: damaged, truncated, not what the id vouches for.
    Damaged,
    /// A release that is not signed by a trusted key, has expired or was rolled back.
    Untrusted,
    /// Encrypted, and there is no identity that opens it.
    NoKey,
    /// Made by a newer program, or not possible with this store.
    Unsupported,
    /// Another publisher was faster.
    Conflict,
    /// The store is read-only or access was denied.
    Denied,
    /// Local input/output failed.
    Io,
    /// The receiver of blocks failed.
    Sink,
    /// A wrong argument.
    Usage,
    /// Cancelled by the caller.
    Cancelled,
}

/// Whom something was encrypted to, as the end of a sentence.
fn for_whom(recipients: &[String]) -> String {
    match recipients {
        [] => String::new(),
        some => format!("; it was encrypted to {}", some.join(", ")),
    }
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, error: impl Into<io::Error>) -> Self {
        Error::Io {
            what: what.into(),
            error: error.into(),
        }
    }

    pub(crate) fn format(location: &str, object: &ObjectName, error: FormatError) -> Self {
        Error::Format {
            location: location.to_owned(),
            object: object.to_string(),
            error,
        }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Status {
                status: 401 | 403, ..
            } => ErrorKind::Denied,
            Error::Unreachable { .. }
            | Error::Timeout { .. }
            | Error::Status { .. }
            | Error::Cut { .. }
            | Error::Protocol { .. } => ErrorKind::Network,
            Error::NotFound { .. } | Error::NoImage { .. } | Error::NotAStore { .. } => {
                ErrorKind::NotFound
            }
            Error::Format { error, .. } if error.is_unsupported() => ErrorKind::Unsupported,
            Error::Truncated { .. }
            | Error::TooLarge { .. }
            | Error::Format { .. }
            | Error::Content { .. }
            | Error::Pointer { .. }
            | Error::Note { .. } => ErrorKind::Damaged,
            Error::Newer { .. } | Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::Untrusted { .. } => ErrorKind::Untrusted,
            Error::NoKey { .. } => ErrorKind::NoKey,
            Error::BadLocation { .. }
            | Error::Age(_)
            | Error::Credentials { .. }
            | Error::BadRelease { .. }
            | Error::Sign(_) => ErrorKind::Usage,
            Error::Conflict { .. } | Error::InUse { .. } | Error::LeaseLost { .. } => {
                ErrorKind::Conflict
            }
            Error::ReadOnly { .. } | Error::Refused { .. } => ErrorKind::Denied,
            Error::Io { error, .. } => match error.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    ErrorKind::Denied
                }
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            },
            Error::Delta { .. } => ErrorKind::Io,
            Error::Sink(_) => ErrorKind::Sink,
            Error::Cancelled => ErrorKind::Cancelled,
        }
    }

    /// Whether the same request may well succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Unreachable { .. }
            | Error::Timeout { .. }
            | Error::Cut { .. }
            | Error::Protocol { .. } => true,
            Error::Status { status, .. } => *status >= 500 || matches!(status, 408 | 425 | 429),
            _ => false,
        }
    }

    /// Whether what arrived was wrong, and another copy may be right.
    pub fn is_corruption(&self) -> bool {
        match self {
            Error::Format { error, .. } => !error.is_unsupported(),
            Error::Truncated { .. } | Error::Content { .. } | Error::Pointer { .. } => true,
            _ => false,
        }
    }
}
