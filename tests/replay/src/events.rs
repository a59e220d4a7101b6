// SPDX-License-Identifier: GPL-2.0

//! What a disk saw, in the order in which it saw it.
//!
//! The file is a row of events, each a kind (one byte), an id, an offset and a length (eight bytes each, little-endian) and,
//! for writes and marks, that many bytes.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

const WRITE: u8 = 1;
const WRITE_FUA: u8 = 2;
const CLEAR: u8 = 3;
const CLEAR_FUA: u8 = 4;
const FLUSH: u8 = 5;
const DONE: u8 = 6;
const MARK: u8 = 7;
const HEADER: usize = 25;

/// What a write does to the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These bytes are written.
    Write(Vec<u8>),
    /// So many bytes are discarded or zeroed; they read as zeros from then on.
    Clear(u64),
}

impl Change {
    /// Bytes that it changes.
    pub fn len(&self) -> usize {
        match self {
            Self::Write(bytes) => bytes.len(),
            Self::Clear(len) => usize::try_from(*len).unwrap_or(usize::MAX),
        }
    }
}

/// One event. The disk may do what it was asked at any time from the request on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A write was asked for.
    Write {
        /// The request.
        id: u64,
        /// The first byte that changes.
        offset: u64,
        /// What changes.
        change: Change,
        /// It is durable when it is done.
        fua: bool,
    },
    /// A flush was asked for: of the writes to its device all that were done before are durable when the flush is done.
    Flush {
        /// The request.
        id: u64,
        /// The first byte of the device.
        offset: u64,
        /// Bytes of the device.
        len: u64,
    },
    /// The request with this id was answered.
    Done(u64),
    /// The workload says something; it is true from here on at the latest.
    Mark(String),
}

impl Event {
    /// Appends the event to a file.
    pub fn write_to(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, id, offset, len, bytes): (u8, u64, u64, u64, &[u8]) = match self {
            Self::Write {
                id,
                offset,
                change,
                fua,
            } => match change {
                Change::Write(bytes) => (
                    if *fua { WRITE_FUA } else { WRITE },
                    *id,
                    *offset,
                    bytes.len() as u64,
                    bytes,
                ),
                Change::Clear(len) => (
                    if *fua { CLEAR_FUA } else { CLEAR },
                    *id,
                    *offset,
                    *len,
                    &[],
                ),
            },
            Self::Flush { id, offset, len } => (FLUSH, *id, *offset, *len, &[]),
            Self::Done(id) => (DONE, *id, 0, 0, &[]),
            Self::Mark(text) => (MARK, 0, 0, text.len() as u64, text.as_bytes()),
        };
        to.write_all(&[kind])?;
        for number in [id, offset, len] {
            to.write_all(&number.to_le_bytes())?;
        }
        to.write_all(bytes)
    }
}

fn next(bytes: &[u8]) -> Option<(Event, usize)> {
    let header = bytes.get(..HEADER)?;
    let number = |at: usize| {
        let field: Option<[u8; 8]> = header.get(at..at + 8).and_then(|b| b.try_into().ok());
        field.map(u64::from_le_bytes)
    };
    let (kind, id, offset, len) = (*header.first()?, number(1)?, number(9)?, number(17)?);
    let payload = || bytes.get(HEADER..HEADER + usize::try_from(len).ok()?);
    let write = |change, fua| Event::Write {
        id,
        offset,
        change,
        fua,
    };
    Some(match kind {
        WRITE | WRITE_FUA => {
            let data = payload()?;
            (
                write(Change::Write(data.to_vec()), kind == WRITE_FUA),
                HEADER + data.len(),
            )
        }
        CLEAR | CLEAR_FUA => (write(Change::Clear(len), kind == CLEAR_FUA), HEADER),
        FLUSH => (Event::Flush { id, offset, len }, HEADER),
        DONE => (Event::Done(id), HEADER),
        MARK => {
            let text = payload()?;
            let mark = Event::Mark(String::from_utf8_lossy(text).into_owned());
            (mark, HEADER + text.len())
        }
        _ => return None,
    })
}

/// Reads all events of a file.
pub fn read(path: &Path) -> Result<Vec<Event>, String> {
    let bytes = fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let mut events = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = bytes.get(at..).unwrap_or(&[]);
        let (event, len) =
            next(rest).ok_or_else(|| format!("{}: no event at byte {at}", path.display()))?;
        events.push(event);
        at += len;
    }
    Ok(events)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let events = [
            Event::Write {
                id: 7,
                offset: 512,
                change: Change::Write(vec![3; 1024]),
                fua: true,
            },
            Event::Done(7),
            Event::Write {
                id: 8,
                offset: 0,
                change: Change::Clear(1 << 40),
                fua: false,
            },
            Event::Flush {
                id: 9,
                offset: 4096,
                len: 1 << 40,
            },
            Event::Mark("flushed 12".to_owned()),
        ];
        let mut bytes = Vec::new();
        for event in &events {
            event.write_to(&mut bytes).unwrap();
        }
        let mut at = 0;
        for event in &events {
            let (got, len) = next(&bytes[at..]).unwrap();
            assert_eq!(got, *event);
            at += len;
        }
        assert_eq!(at, bytes.len());
    }
}
