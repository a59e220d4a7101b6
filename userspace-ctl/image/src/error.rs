// SPDX-License-Identifier: GPL-2.0

//! What can be wrong with a manifest or a pack.

use crate::digest::ImageId;

/// A manifest, a page of it or a frame of a pack is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The object begins with other bytes than a manifest.
    #[error("this is not a Pristine manifest")]
    NotAManifest,
    /// The object ends too early.
    #[error("{what} is truncated: {needed} more bytes needed, {have} there")]
    Truncated {
        /// The structure that is cut.
        what: &'static str,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// Made by a newer program.
    #[error("the manifest has format version {found}, this program reads up to version {supported}; upgrade pristine")]
    NewerVersion {
        /// The manifest's version.
        found: u32,
        /// The newest version that this program reads.
        supported: u32,
    },
    /// The manifest needs features that this program lacks.
    #[error("the manifest needs features that this program does not know (bits {0:#x}); upgrade pristine")]
    UnknownFeatures(u64),
    /// The manifest has a section that must be understood and is not.
    #[error("the manifest has a required section of unknown type {0}; upgrade pristine")]
    UnknownSection(u32),
    /// A checksum says that the bytes are not those that were written.
    #[error("{0} is damaged: its checksum is wrong")]
    Checksum(String),
    /// A field has an impossible value.
    #[error("{what} is damaged: {why}")]
    Invalid {
        /// The structure.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The manifest belongs to another image than the one asked for.
    #[error("the manifest is that of image {found}, not of {expected}")]
    WrongImage {
        /// The image that was asked for.
        expected: ImageId,
        /// The image that the manifest describes.
        found: ImageId,
    },
}

impl FormatError {
    /// [`FormatError::Invalid`] from its two texts.
    pub fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        FormatError::Invalid {
            what: what.into(),
            why: why.into(),
        }
    }

    /// Whether a newer program would read it, as opposed to damage.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            FormatError::NewerVersion { .. }
                | FormatError::UnknownFeatures(_)
                | FormatError::UnknownSection(_)
        )
    }
}
