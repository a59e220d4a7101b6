// SPDX-License-Identifier: GPL-2.0

//! What can go wrong, and what the machine's owner can do about it.

use std::fmt;

/// The kinds of failure; each has an exit code of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The configuration makes no sense or is not complete.
    Config,
    /// A device did not appear, is in use, or failed.
    Device,
    /// The data device is smaller than the image with its metadata.
    TooSmall,
    /// There is no network.
    Network,
    /// The store does not answer, or what it serves is not what was published.
    Store,
    /// The metadata is damaged, or belongs to another device, or to a newer format.
    Metadata,
    /// The kernel module or device-mapper refused.
    Activation,
    /// The root file system cannot be mounted, or holds no system.
    Root,
    /// The agent itself failed.
    Internal,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 9] = [
        Kind::Config,
        Kind::Device,
        Kind::TooSmall,
        Kind::Network,
        Kind::Store,
        Kind::Metadata,
        Kind::Activation,
        Kind::Root,
        Kind::Internal,
    ];

    /// The exit code when the agent is not process 1.
    pub const fn code(self) -> u8 {
        match self {
            Kind::Config => 2,
            Kind::Device => 3,
            Kind::TooSmall => 4,
            Kind::Network => 5,
            Kind::Store => 6,
            Kind::Metadata => 7,
            Kind::Activation => 8,
            Kind::Root => 9,
            Kind::Internal => 10,
        }
    }

    /// The kind with an exit code.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|k| i32::from(k.code()) == code)
    }

    /// What it means, for the help.
    pub const fn meaning(self) -> &'static str {
        match self {
            Kind::Config => "the configuration makes no sense",
            Kind::Device => "a device is missing, in use, or failed",
            Kind::TooSmall => "a device is smaller than what must fit on it",
            Kind::Network => "there is no network",
            Kind::Store => "the store does not serve the image",
            Kind::Metadata => "the metadata cannot be used",
            Kind::Activation => "the kernel did not activate the device",
            Kind::Root => "the root file system cannot be used",
            Kind::Internal => "the agent itself failed",
        }
    }

    /// Whether trying again can help without anybody changing anything.
    pub const fn may_pass(self) -> bool {
        matches!(
            self,
            Kind::Device | Kind::Network | Kind::Store | Kind::Internal
        )
    }

    /// Whether it is the store's doing, for which there is a policy of its own (`pristine.offline`).
    pub const fn is_offline(self) -> bool {
        matches!(self, Kind::Network | Kind::Store)
    }
}

/// A failure: what went wrong, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// What went wrong and why.
    pub what: String,
    /// What to do; may be empty.
    pub advice: String,
}

impl Failure {
    /// A failure without advice.
    pub fn new(kind: Kind, what: impl fmt::Display) -> Self {
        Self {
            kind,
            what: what.to_string(),
            advice: String::new(),
        }
    }

    /// Adds what to do about it.
    pub fn advise(mut self, advice: impl fmt::Display) -> Self {
        self.advice = advice.to_string();
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

impl From<crate::config::ConfigError> for Failure {
    fn from(error: crate::config::ConfigError) -> Self {
        Failure::new(Kind::Config, error)
            .advise("correct the kernel command line or /etc/pristine/agent.conf in the initramfs")
    }
}

impl From<pristine_metadata::Error> for Failure {
    fn from(error: pristine_metadata::Error) -> Self {
        use pristine_metadata::Class;
        let (kind, advice) = match error.class() {
            Class::TooSmall => (Kind::TooSmall, "use a larger device, or an image that fits"),
            Class::AlreadyFormatted => (
                Kind::Metadata,
                "if what it holds may be lost, start once with pristine.provision=force",
            ),
            Class::NotFormatted | Class::Damaged | Class::NeedsCheck | Class::Identity | Class::Unsupported => (
                Kind::Metadata,
                "look at it with `pristine device check`; pristine.damaged=reprovision fills the disk again",
            ),
            Class::InUse => (Kind::Device, "something else uses the device; is the data device right?"),
            Class::NotFound | Class::Denied | Class::Io => {
                (Kind::Device, "check the disk and its connection")
            }
            Class::Usage => (Kind::Config, "check pristine.data and pristine.metadata"),
        };
        Failure::new(kind, error).advise(advice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_unique_and_found_again() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_code(kind.code().into()), Some(kind));
        }
        assert_eq!(Kind::from_code(0), None);
        assert_eq!(Kind::from_code(101), None);
    }
}
