// SPDX-License-Identifier: GPL-2.0

//! Exit codes. Up to 14 they are those of `pristine`.

use std::fmt::{self, Display};

use pristine_device::Class;

/// Exit codes; stable, documented in `pristined --help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Anything that has no code of its own.
    Failure = 1,
    /// The command line is wrong (clap exits with the same code).
    Usage = 2,
    /// There is no such managed device.
    NotFound = 3,
    /// The device means another image or generation.
    Identity = 5,
    /// The kernel failed otherwise.
    Io = 6,
    /// The device has a helper.
    Busy = 7,
    /// The module or the image is of another release.
    Unsupported = 8,
    /// Privileges are missing.
    Denied = 9,
    /// The kernel module is not loaded.
    NoModule = 13,
    /// Another helper took the device over.
    TakenOver = 20,
    /// The device went away.
    Gone = 21,
}

impl Code {
    /// All codes, in order.
    pub const ALL: [Code; 11] = [
        Code::Failure,
        Code::Usage,
        Code::NotFound,
        Code::Identity,
        Code::Io,
        Code::Busy,
        Code::Unsupported,
        Code::Denied,
        Code::NoModule,
        Code::TakenOver,
        Code::Gone,
    ];

    /// The number that the process exits with.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// What the code means, for the help text.
    pub fn meaning(self) -> &'static str {
        match self {
            Code::Failure => "any other failure",
            Code::Usage => "the command line or the configuration is wrong",
            Code::NotFound => "there is no such managed device",
            Code::Identity => "the device means another image or generation",
            Code::Io => "the kernel failed",
            Code::Busy => "the device has a helper: use --take-over",
            Code::Unsupported => "the kernel module is of another release",
            Code::Denied => "not permitted",
            Code::NoModule => "the kernel module is not loaded",
            Code::TakenOver => "another helper took the device over",
            Code::Gone => "the device went away",
        }
    }
}

/// The table of exit codes as help text.
pub fn table() -> String {
    let mut text = String::from(
        "Exit codes:\n   0  nothing is stale (any more), or it was asked to stop (SIGTERM)\n",
    );
    for code in Code::ALL {
        text.push_str(&format!("  {:>2}  {}\n", code.number(), code.meaning()));
    }
    text
}

/// A failure: a code, what went wrong, and what to do.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    what: String,
    hint: Option<String>,
}

impl Failure {
    /// A failure with a code and what went wrong.
    pub fn new(code: Code, what: impl Display) -> Self {
        Self {
            code,
            what: what.to_string(),
            hint: None,
        }
    }

    /// Adds what can be done about it.
    pub fn hint(mut self, hint: &str) -> Self {
        self.hint = Some(hint.to_owned());
        self
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.hint {
            Some(hint) => write!(f, " (hint: {hint})"),
            None => Ok(()),
        }
    }
}

impl From<pristine_device::Error> for Failure {
    fn from(error: pristine_device::Error) -> Self {
        let code = match error.class() {
            Class::NoModule => Code::NoModule,
            Class::Unsupported => Code::Unsupported,
            Class::NotFound => Code::NotFound,
            Class::Busy => Code::Busy,
            Class::Denied => Code::Denied,
            Class::Usage => Code::Usage,
            Class::NotFormatted | Class::Identity | Class::Damaged | Class::Stale => Code::Failure,
            Class::Io => Code::Io,
        };
        let failure = Failure::new(code, &error);
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_in_the_table() {
        let table = table();
        for code in Code::ALL {
            assert!(table.contains(&format!("{:>2}  {}", code.number(), code.meaning())));
        }
    }
}
