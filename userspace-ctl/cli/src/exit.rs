// SPDX-License-Identifier: GPL-2.0

//! Exit codes, and the one type in which every command reports its failure.
//!
//! A command returns [`Outcome`]. A [`Failure`] says what went wrong, why, and what to do about it:
//!
//! ```text
//! pristine: error: cannot read the store /srv/store: no such directory
//! hint: create it by publishing an image: pristine image publish IMAGE /srv/store --channel NAME
//! ```

use std::fmt;
use std::io;

use serde::Serialize;

/// Exit codes; stable, documented in `pristine --help` and in the manual page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Anything that has no code of its own.
    Failure = 1,
    /// The command line is wrong (clap exits with the same code).
    Usage = 2,
    /// What was named does not exist: a file, a channel, an image, a device.
    NotFound = 3,
    /// Data was read, and is damaged: a wrong digest, a wrong checksum, a cut object.
    Damaged = 4,
    /// Data belongs to another device, image or generation.
    Identity = 5,
    /// Reading, writing or the network failed.
    Io = 6,
    /// In use by someone else, or someone else was faster.
    Busy = 7,
    /// A format version, a feature or a kernel that this program does not support.
    Unsupported = 8,
    /// Not allowed: privileges are missing, or the store is read-only.
    Denied = 9,
    /// A device is too small for what is to be on it.
    TooSmall = 10,
    /// Something of value is where something else was to be written.
    Exists = 11,
    /// Blocks are stale, so the agent must fetch them before the device can be used.
    Stale = 12,
    /// The kernel module is not loaded, or not found.
    NoModule = 13,
    /// An earlier failure asks for a check before the device is used again.
    NeedsCheck = 14,
    /// Not signed by a trusted key, expired, or older than allowed.
    Untrusted = 15,
    /// Encrypted, and no identity opens it.
    NoKey = 16,
}

impl Code {
    /// All codes, in order.
    pub const ALL: [Code; 16] = [
        Code::Failure,
        Code::Usage,
        Code::NotFound,
        Code::Damaged,
        Code::Identity,
        Code::Io,
        Code::Busy,
        Code::Unsupported,
        Code::Denied,
        Code::TooSmall,
        Code::Exists,
        Code::Stale,
        Code::NoModule,
        Code::NeedsCheck,
        Code::Untrusted,
        Code::NoKey,
    ];

    /// The number that the process exits with.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The stable name of the code in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Code::Failure => "failure",
            Code::Usage => "usage",
            Code::NotFound => "not-found",
            Code::Damaged => "damaged",
            Code::Identity => "identity",
            Code::Io => "io",
            Code::Busy => "busy",
            Code::Unsupported => "unsupported",
            Code::Denied => "denied",
            Code::TooSmall => "too-small",
            Code::Exists => "exists",
            Code::Stale => "stale",
            Code::NoModule => "no-module",
            Code::NeedsCheck => "needs-check",
            Code::Untrusted => "untrusted",
            Code::NoKey => "no-key",
        }
    }

    /// What the code means, for help texts.
    pub fn meaning(self) -> &'static str {
        match self {
            Code::Failure => "any other failure",
            Code::Usage => "the command line is wrong",
            Code::NotFound => "what was named does not exist",
            Code::Damaged => "damaged data: wrong digest, wrong checksum, truncated",
            Code::Identity => "data of another device, image or generation",
            Code::Io => "input/output or the network failed",
            Code::Busy => "in use, or another publisher was faster",
            Code::Unsupported => "unsupported format version, feature or kernel",
            Code::Denied => "not permitted, or read-only",
            Code::TooSmall => "a device is too small",
            Code::Exists => "something would be overwritten",
            Code::Stale => "blocks are stale: the agent must fetch them first",
            Code::NoModule => "the kernel module is not loaded",
            Code::NeedsCheck => "the metadata must be checked first",
            Code::Untrusted => "not signed by a trusted key, expired, or older than allowed",
            Code::NoKey => "encrypted, and no identity that was given opens it",
        }
    }
}

/// The table of exit codes as help text.
pub fn table() -> String {
    let mut text = String::from("Exit codes:\n   0  success\n");
    for code in Code::ALL {
        text.push_str(&format!("  {:>2}  {}\n", code.number(), code.meaning()));
    }
    text
}

/// What a command returns.
pub type Outcome<T = ()> = Result<T, Failure>;

/// A failure: a code, what went wrong, why, and what to do.
#[derive(Debug, Serialize)]
pub struct Failure {
    #[serde(serialize_with = "code_name")]
    code: Code,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

fn code_name<S: serde::Serializer>(code: &Code, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(code.name())
}

impl Failure {
    /// A failure with a code and what went wrong ("cannot read /dev/sdb1").
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Failure {
            code,
            what: what.into(),
            why: None,
            hint: None,
        }
    }

    /// A failure caused by an I/O error; the code follows from the error's kind.
    pub fn io(what: impl Into<String>, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Denied,
            io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock => Code::Busy,
            io::ErrorKind::Unsupported => Code::Unsupported,
            _ => Code::Io,
        };
        Failure::new(code, what).why(error)
    }

    /// Adds the cause.
    pub fn why(mut self, why: impl fmt::Display) -> Self {
        self.why = Some(why.to_string());
        self
    }

    /// Adds what the user can do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The exit code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// What can be done about it, if something can.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(why) = &self.why {
            write!(f, ": {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_in_the_table() {
        let table = table();
        for (index, code) in Code::ALL.iter().enumerate() {
            assert_eq!(usize::from(code.number()), index + 1);
            assert!(table.contains(code.meaning()));
        }
    }

    #[test]
    fn io_errors_are_classified() {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        let failure = Failure::io("cannot open x", &missing);
        assert_eq!(failure.code(), Code::NotFound);
        assert!(failure.to_string().starts_with("cannot open x: "));
    }
}
