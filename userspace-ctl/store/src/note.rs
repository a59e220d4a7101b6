// SPDX-License-Identifier: GPL-2.0

//! The small objects of a store that come and go: pins and leases.
//!
//! Everything else in a store, but the pointers of its channels, never changes. A note is at most 4 KiB of text of the
//! form
//!
//! ```text
//! pristine-pin 1
//! image 5c1f...
//! until 1795339400
//! ```
//!
//! with the note's kind (`pristine-pin`, `pristine-lease`) in the first line and one `key value` in each line after it,
//! in any order; unknown keys are ignored.

use std::fmt;
use std::str::FromStr;

use crate::object::{ChannelName, ParseChannelError};

/// The most bytes of a note.
pub const MAX_NOTE_LEN: u64 = 4096;

/// What a note is about; each kind has a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NoteKind {
    /// `pins/<name>`: an image to be kept.
    Pin,
    /// `leases/<name>`: somebody is writing to the store, or collecting garbage in it.
    Lease,
}

impl NoteKind {
    /// The directory of these notes.
    pub fn directory(self) -> &'static str {
        match self {
            NoteKind::Pin => "pins",
            NoteKind::Lease => "leases",
        }
    }

    /// The first line of these notes.
    fn heading(self) -> &'static str {
        match self {
            NoteKind::Pin => "pristine-pin 1",
            NoteKind::Lease => "pristine-lease 1",
        }
    }
}

/// Names a note; the name has the form of a channel's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NoteName {
    kind: NoteKind,
    name: ChannelName,
}

impl NoteName {
    /// The note of a kind and a name.
    ///
    /// # Errors
    /// If the name is not of the form of a channel's.
    pub fn new(kind: NoteKind, name: &str) -> Result<Self, ParseChannelError> {
        let name = ChannelName::from_str(name)?;
        Ok(NoteName { kind, name })
    }

    /// Its kind.
    pub fn kind(&self) -> NoteKind {
        self.kind
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// Its path in the store.
    pub fn path(&self) -> String {
        format!("{}/{}", self.kind.directory(), self.name)
    }
}

impl fmt::Display for NoteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            NoteKind::Pin => write!(f, "pin {}", self.name),
            NoteKind::Lease => write!(f, "lease {}", self.name),
        }
    }
}

/// A note in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Noted {
    /// Its name.
    pub name: NoteName,
    /// When it was written, in milliseconds since 1970 by the store's clock.
    pub modified: u64,
}

/// Writes a note's text.
pub fn encode(kind: NoteKind, fields: &[(&str, String)]) -> Vec<u8> {
    let mut text = format!("{}\n", kind.heading());
    for (key, value) in fields {
        // A line is a field: what comes from outside must not make two of one.
        let value: String = value
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        text.push_str(&format!("{key} {value}\n"));
    }
    text.into_bytes()
}

/// The value of a key in a note; `None` if it has none, or is no note of this kind.
pub fn field<'a>(kind: NoteKind, bytes: &'a [u8], key: &str) -> Option<&'a str> {
    let text = std::str::from_utf8(bytes).ok()?;
    let rest = text.strip_prefix(kind.heading())?.strip_prefix('\n')?;
    let mut lines = rest.lines().filter_map(|line| line.split_once(' '));
    lines
        .find(|(found, _)| *found == key)
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_round_trip() {
        let fields = [("image", "ab".to_owned()), ("by", "me\nuntil 9".to_owned())];
        let bytes = encode(NoteKind::Pin, &fields);
        assert_eq!(field(NoteKind::Pin, &bytes, "image"), Some("ab"));
        assert_eq!(field(NoteKind::Pin, &bytes, "by"), Some("meuntil 9"));
        assert_eq!(field(NoteKind::Pin, &bytes, "until"), None);
        assert_eq!(field(NoteKind::Lease, &bytes, "image"), None);
        assert_eq!(field(NoteKind::Pin, b"\xff", "image"), None);
    }

    #[test]
    fn names_stay_in_their_directory() {
        let note = NoteName::new(NoteKind::Pin, "release-9").unwrap();
        assert_eq!(note.path(), "pins/release-9");
        for bad in ["", "../channels/stable", "a/b", ".x"] {
            assert!(NoteName::new(NoteKind::Pin, bad).is_err(), "{bad}");
        }
    }
}
