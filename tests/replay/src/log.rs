// SPDX-License-Identifier: GPL-2.0

//! What dm-log-writes records (drivers/md/dm-log-writes.c).
//!
//! A header, then entries, each a sector of its own with the written bytes behind it. A write with FUA is
//! logged when it completes, other writes when a flush made them durable: those come right before the flush.

use std::fs;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// What an entry does to the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These bytes were written.
    Write(Vec<u8>),
    /// This many bytes were discarded; on the recorded disk they read as zeros from then on.
    Discard(u64),
    /// Nothing: a flush without data.
    None,
    /// Nothing: a mark that the workload made.
    Mark(String),
}

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The first byte that changes.
    pub offset: u64,
    /// What changes.
    pub change: Change,
    /// Everything before was made durable first.
    pub flush: bool,
    /// It was durable when it completed.
    pub fua: bool,
}

impl Entry {
    /// A write that nothing had made durable by itself: it may have been lost until the flush that follows.
    pub fn is_plain(&self) -> bool {
        !self.flush && !self.fua && matches!(self.change, Change::Write(_) | Change::Discard(_))
    }

    /// Bytes that it changes.
    pub fn len(&self) -> u64 {
        match &self.change {
            Change::Write(bytes) => bytes.len() as u64,
            Change::Discard(len) => *len,
            Change::None | Change::Mark(_) => 0,
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Result<u64, String> {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    field
        .map(u64::from_le_bytes)
        .ok_or_else(|| format!("the log ends at byte {at}"))
}

/// Reads a log.
pub fn read(path: &Path) -> Result<Vec<Entry>, String> {
    let bytes = fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    if number(&bytes, 0)? != MAGIC || number(&bytes, 8)? != VERSION {
        return Err(format!("{} is no log of dm-log-writes", path.display()));
    }
    let count = number(&bytes, 16)?;
    let unit = number(&bytes, 24)? & 0xffff_ffff;
    let size = usize::try_from(unit).map_err(|e| e.to_string())?;
    let mut at = size;
    let mut entries = Vec::new();
    for n in 0..count {
        let (sector, sectors) = (number(&bytes, at)?, number(&bytes, at + 8)?);
        let (flags, mark_len) = (number(&bytes, at + 16)?, number(&bytes, at + 24)?);
        let data = at + size;
        let len = usize::try_from(sectors * unit).map_err(|e| e.to_string())?;
        at = data;
        let change = if flags & MARK != 0 {
            let from = data - size + 32;
            let to = from + usize::try_from(mark_len).map_err(|e| e.to_string())?;
            let text = bytes.get(from..to).ok_or(format!("entry {n} is cut"))?;
            Change::Mark(
                String::from_utf8_lossy(text)
                    .trim_end_matches('\0')
                    .to_owned(),
            )
        } else if flags & DISCARD != 0 {
            Change::Discard(len as u64)
        } else if len == 0 {
            Change::None
        } else {
            at += len;
            let bytes = bytes
                .get(data..data + len)
                .ok_or(format!("entry {n} is cut"))?;
            Change::Write(bytes.to_vec())
        };
        entries.push(Entry {
            offset: sector * unit,
            change,
            flush: flags & FLUSH != 0,
            fua: flags & FUA != 0,
        });
    }
    Ok(entries)
}
