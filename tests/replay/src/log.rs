// SPDX-License-Identifier: GPL-2.0

//! What dm-log-writes records (drivers/md/dm-log-writes.c), as events.
//!
//! A header, then entries, each a sector of its own with the written bytes behind it. A write with FUA is
//! logged when it completes, other writes when a flush made them durable: those come right before the flush. So what this
//! recorder knows of the order is less than the disk itself does ([`crate::server`]): a plain write is never seen
//! before the FUA writes that came after it, and of two flushes under way at once the later one may be logged first.

use std::fs;
use std::path::Path;

use crate::events::{Change, Event};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

fn number(bytes: &[u8], at: usize) -> Result<u64, String> {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    field
        .map(u64::from_le_bytes)
        .ok_or_else(|| format!("the log ends at byte {at}"))
}

/// Reads a log.
pub fn read(path: &Path) -> Result<Vec<Event>, String> {
    let bytes = fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    if number(&bytes, 0)? != MAGIC || number(&bytes, 8)? != VERSION {
        return Err(format!("{} is no log of dm-log-writes", path.display()));
    }
    let count = number(&bytes, 16)?;
    let unit = number(&bytes, 24)? & 0xffff_ffff;
    let size = usize::try_from(unit).map_err(|e| e.to_string())?;
    let mut at = size;
    let mut events = Vec::new();
    for n in 0..count {
        let (sector, sectors) = (number(&bytes, at)?, number(&bytes, at + 8)?);
        let (flags, mark_len) = (number(&bytes, at + 16)?, number(&bytes, at + 24)?);
        let data = at + size;
        let len = usize::try_from(sectors * unit).map_err(|e| e.to_string())?;
        at = data;
        if flags & MARK != 0 {
            let from = data - size + 32;
            let to = from + usize::try_from(mark_len).map_err(|e| e.to_string())?;
            let text = bytes.get(from..to).ok_or(format!("entry {n} is cut"))?;
            let text = String::from_utf8_lossy(text);
            events.push(Event::Mark(
                text.trim_end_matches('\0').replace('-', " ").to_owned(),
            ));
            continue;
        }
        if flags & FLUSH != 0 {
            let id = 2 * n;
            let (offset, len) = (0, u64::MAX);
            events.extend([Event::Flush { id, offset, len }, Event::Done(id)]);
        }
        if len == 0 {
            continue;
        }
        let change = if flags & DISCARD != 0 {
            Change::Clear(len as u64)
        } else {
            at += len;
            let bytes = bytes
                .get(data..data + len)
                .ok_or(format!("entry {n} is cut"))?;
            Change::Write(bytes.to_vec())
        };
        let id = 2 * n + 1;
        events.push(Event::Write {
            id,
            offset: sector * unit,
            change,
            fua: flags & FUA != 0,
        });
        events.push(Event::Done(id));
    }
    Ok(events)
}
