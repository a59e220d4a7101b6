// SPDX-License-Identifier: GPL-2.0

//! Block states and device modes, and which may follow which.

use core::fmt;

/// The state of a block as the two planes tell it.
///
/// The stale bit outranks the dirty one: while it is set, the local content is not to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Local content is the master's.
    Clean,
    /// Changed here since.
    Dirty,
    /// Local content is worthless: the truth is in the store.
    Stale,
}

impl BlockState {
    /// The state that the bits of the two planes mean.
    pub fn from_bits(dirty: bool, stale: bool) -> Self {
        match (dirty, stale) {
            (_, true) => Self::Stale,
            (true, false) => Self::Dirty,
            (false, false) => Self::Clean,
        }
    }
}

impl fmt::Display for BlockState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clean => "clean",
            Self::Dirty => "dirty",
            Self::Stale => "stale",
        })
    }
}

/// What a device does with writes. Modes only get worse while a device is loaded; see [`Mode::worse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything works.
    ReadWrite,
    /// The metadata failed: writes are refused, reads go on (rule 6 of the contract).
    ReadOnly,
    /// The device never got as far as having its state: all I/O is refused.
    Failed,
}

impl Mode {
    /// The number that stands for the mode in an atomic and in the ioctl ABI.
    pub const fn code(self) -> u32 {
        match self {
            Self::ReadWrite => 0,
            Self::ReadOnly => 1,
            Self::Failed => 2,
        }
    }

    /// The mode with number `code`; an unknown number is [`Mode::Failed`].
    pub const fn from_code(code: u32) -> Self {
        match code {
            0 => Self::ReadWrite,
            1 => Self::ReadOnly,
            _ => Self::Failed,
        }
    }

    /// The worse of two modes.
    pub const fn worse(self, other: Self) -> Self {
        if other.code() > self.code() {
            other
        } else {
            self
        }
    }

    /// The mode's word in the status line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::ReadWrite => "rw",
            Self::ReadOnly => "ro",
            Self::Failed => "fail",
        }
    }

    /// The mode that `word` names.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::ReadWrite, Self::ReadOnly, Self::Failed]
            .into_iter()
            .find(|m| m.word() == word)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_only_get_worse() {
        assert_eq!(Mode::ReadWrite.worse(Mode::ReadOnly), Mode::ReadOnly);
        assert_eq!(Mode::ReadOnly.worse(Mode::ReadWrite), Mode::ReadOnly);
        assert_eq!(Mode::from_code(77), Mode::Failed);
        for m in [Mode::ReadWrite, Mode::ReadOnly, Mode::Failed] {
            assert_eq!(Mode::from_word(m.word()), Some(m));
            assert_eq!(Mode::from_code(m.code()), m);
        }
    }

    #[test]
    fn stale_outranks_dirty() {
        assert_eq!(BlockState::from_bits(true, true), BlockState::Stale);
    }
}
