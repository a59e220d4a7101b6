// SPDX-License-Identifier: GPL-2.0

//! What can go wrong when a format is read or written.

use std::io;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// A source cannot be read, or an export cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation on a file failed.
    #[error("cannot {what}: {error}")]
    Io {
        /// What was tried, like "open disk.img".
        what: String,
        /// Why it failed.
        error: io::Error,
    },
    /// The input is cut or has wrong content.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// The file or the part of it.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The input tries something that no honest program writes.
    #[error("{what} is refused: {why}")]
    Unsafe {
        /// The file or the entry.
        what: String,
        /// What it tries.
        why: String,
    },
    /// The input is of a kind that this program does not read.
    #[error("{what} cannot be read: {why}")]
    Unsupported {
        /// The file.
        what: String,
        /// Why, and what to do.
        why: String,
    },
    /// Unpacked, the input would be larger than allowed.
    #[error("{what} unpacks to more than the limit of {limit} bytes")]
    TooLarge {
        /// The file.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The target of an export is too small.
    #[error("{what} has {len} bytes, the image has {needed}")]
    TooSmall {
        /// The target.
        what: String,
        /// Its size in bytes.
        len: u64,
        /// The image's size in bytes.
        needed: u64,
    },
    /// The target of an export is there already.
    #[error("{what} exists")]
    Exists {
        /// The target.
        what: String,
    },
    /// In use: mounted, or being written by another process.
    #[error("{what} is in use: {why}")]
    Busy {
        /// The file or device.
        what: String,
        /// By whom or how.
        why: String,
    },
    /// Something that was named is not there.
    #[error("{what}: {why}")]
    NotFound {
        /// The file.
        what: String,
        /// What is missing.
        why: String,
    },
    /// The options do not fit the input.
    #[error("{0}")]
    Usage(String),
    /// Another program that is needed failed, or is not there.
    #[error("{program}: {why}")]
    Tool {
        /// The program.
        program: &'static str,
        /// What it said.
        why: String,
    },
    /// A store or a server failed.
    #[error(transparent)]
    Store(#[from] pristine_store::Error),
    /// A source cannot be opened.
    #[error(transparent)]
    Build(#[from] pristine_image::BuildError),
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, error: impl Into<io::Error>) -> Self {
        let (what, error) = (what.into(), error.into());
        // What our own readers say has its context already.
        match error.downcast::<Error>() {
            Ok(inner) => inner,
            Err(error) => Error::Io { what, error },
        }
    }

    pub(crate) fn damaged(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Damaged {
            what: what.into(),
            why: why.into(),
        }
    }

    pub(crate) fn unsupported(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Unsupported {
            what: what.into(),
            why: why.into(),
        }
    }

    pub(crate) fn refused(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Unsafe {
            what: what.into(),
            why: why.into(),
        }
    }
}

/// For what reads through the traits of `std`; [`Error::io`] takes it out again.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { error, .. } => error.kind(),
            Error::Damaged { .. } | Error::Unsafe { .. } => io::ErrorKind::InvalidData,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::TooLarge { .. } => io::ErrorKind::FileTooLarge,
            Error::NotFound { .. } => io::ErrorKind::NotFound,
            Error::Cancelled => io::ErrorKind::Interrupted,
            Error::Build(pristine_image::BuildError::Open { error, .. }) => error.kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// The error of this crate that an I/O error carries, if it does.
pub fn from_io(error: io::Error) -> std::result::Result<Error, io::Error> {
    error.downcast::<Error>()
}
