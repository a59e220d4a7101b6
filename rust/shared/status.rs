// SPDX-License-Identifier: GPL-2.0

//! The grammar of the INFO status line.
//!
//! ```text
//! <mode> <block size> <extent size> <dirty>/<blocks> <stale> <hot>/<most hot> <log used>/<log pages>
//!   <checkpoint> <generation> <image> <meta uuid> [undo <state> <used>/<pages> <missing>]
//!
//!   mode         rw; ro after a failure of the metadata device; fail if it never had its state
//!   sizes        in bytes
//!   dirty, stale in blocks; dirty is what memory knows, a superset of what changed
//!   checkpoint   sequence number of the last one
//!   image        hex, or "-" when there is none
//!   undo         of a device with an undo area: its state is open, full, or failed (it could not be written); pages used
//!                of those it has; dirty blocks whose original it does not have, so that a revert needs the master
//! ```

use core::fmt;
use core::str::FromStr;

use super::state::Mode;
use super::superblock::{ImageId, Uuid};
use super::table::{parse_hex, Hex};
use super::undo::State;

/// What the INFO line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What the device does with writes.
    pub mode: Mode,
    /// Bytes in a block.
    pub block_size: u64,
    /// Bytes in an extent.
    pub extent_size: u64,
    /// Dirty blocks.
    pub dirty: u64,
    /// All blocks.
    pub blocks: u64,
    /// Stale blocks.
    pub stale: u64,
    /// Extents with a live intent.
    pub hot: u64,
    /// Most of them.
    pub hot_limit: u64,
    /// Log records since the checkpoint.
    pub log_used: u64,
    /// Pages of the log ring.
    pub log_pages: u64,
    /// Sequence of the last checkpoint.
    pub checkpoint: u64,
    /// Generation of the image.
    pub generation: u64,
    /// The image, all zero when there is none.
    pub image: ImageId,
    /// Identity of the metadata.
    pub meta_uuid: Uuid,
    /// The undo area, if there is one.
    pub undo: Option<UndoStatus>,
}

/// What the INFO line says of an undo area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoStatus {
    /// Whether it takes more.
    pub state: State,
    /// Pages used.
    pub used: u64,
    /// Pages that it has.
    pub pages: u64,
    /// Dirty blocks whose original is not in it. After a crash it may be too small by what the crash cut.
    pub missing: u64,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {}/{} {} {}/{} {}/{} {} {} ",
            self.mode,
            self.block_size,
            self.extent_size,
            self.dirty,
            self.blocks,
            self.stale,
            self.hot,
            self.hot_limit,
            self.log_used,
            self.log_pages,
            self.checkpoint,
            self.generation,
        )?;
        if self.image == [0; 32] {
            f.write_str("-")?;
        } else {
            write!(f, "{}", Hex(&self.image))?;
        }
        write!(f, " {}", Hex(&self.meta_uuid))?;
        if let Some(undo) = &self.undo {
            write!(
                f,
                " undo {} {}/{} {}",
                undo.state.word(),
                undo.used,
                undo.pages,
                undo.missing
            )?;
        }
        Ok(())
    }
}

/// A status line that does not follow the grammar: the word that is wrong or missing, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadStatus(pub u32);

impl fmt::Display for BadStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "status line: word {} is missing or not understood",
            self.0
        )
    }
}

impl core::error::Error for BadStatus {}

impl FromStr for Status {
    type Err = BadStatus;

    /// Words after the known ones are left for later versions.
    fn from_str(line: &str) -> Result<Self, BadStatus> {
        let mut words = line.split_ascii_whitespace();
        let mut at = 0;
        let mut next = || {
            at += 1;
            words
                .next()
                .map(|w| (w, BadStatus(at)))
                .ok_or(BadStatus(at))
        };
        let number = |(w, e): (&str, BadStatus)| w.parse::<u64>().map_err(|_| e);
        let pair = |(w, e): (&str, BadStatus)| {
            let (a, b) = w.split_once('/').ok_or(e)?;
            Ok::<_, BadStatus>((
                a.parse::<u64>().map_err(|_| e)?,
                b.parse::<u64>().map_err(|_| e)?,
            ))
        };
        let (word, e) = next()?;
        let mode = Mode::from_word(word).ok_or(e)?;
        let block_size = number(next()?)?;
        let extent_size = number(next()?)?;
        let (dirty, blocks) = pair(next()?)?;
        let stale = number(next()?)?;
        let (hot, hot_limit) = pair(next()?)?;
        let (log_used, log_pages) = pair(next()?)?;
        let checkpoint = number(next()?)?;
        let generation = number(next()?)?;
        let (word, e) = next()?;
        let image = if word == "-" {
            [0; 32]
        } else {
            parse_hex(word).ok_or(e)?
        };
        let (word, e) = next()?;
        let meta_uuid = parse_hex(word).ok_or(e)?;
        let undo = match next() {
            Ok(("undo", _)) => {
                let (word, e) = next()?;
                let state = State::from_word(word).ok_or(e)?;
                let (used, pages) = pair(next()?)?;
                Some(UndoStatus {
                    state,
                    used,
                    pages,
                    missing: number(next()?)?,
                })
            }
            _ => None,
        };
        Ok(Self {
            mode,
            block_size,
            extent_size,
            dirty,
            blocks,
            stale,
            hot,
            hot_limit,
            log_used,
            log_pages,
            checkpoint,
            generation,
            image,
            meta_uuid,
            undo,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::string::ToString;

    #[test]
    fn round_trip() {
        let status = Status {
            mode: Mode::ReadOnly,
            block_size: 4096,
            extent_size: 1 << 20,
            dirty: 3,
            blocks: 4000,
            stale: 0,
            hot: 2,
            hot_limit: 256,
            log_used: 1,
            log_pages: 64,
            checkpoint: 9,
            generation: 4,
            image: [0xab; 32],
            meta_uuid: [1; 16],
            undo: None,
        };
        assert_eq!(status.to_string().parse(), Ok(status));
        let undone = Status {
            undo: Some(UndoStatus {
                state: State::Full,
                used: 60,
                pages: 64,
                missing: 2,
            }),
            ..status
        };
        assert_eq!(undone.to_string().parse(), Ok(undone));
        let bare = Status {
            image: [0; 32],
            ..status
        };
        assert_eq!(bare.to_string().parse(), Ok(bare));
        assert_eq!("rw 4096 x".parse::<Status>(), Err(BadStatus(3)));
        assert_eq!("".parse::<Status>(), Err(BadStatus(1)));
    }
}
