// SPDX-License-Identifier: GPL-2.0

//! `struct dm_ioctl` and what follows it, as bytes.
//!
//! Built and read by offsets into a byte buffer: the kernel fills it with offsets of its own, and each is checked.

use std::io;

use super::Target;
use crate::ioctl::DM_HEADER;

/// Out: a table is in use.
pub(super) const ACTIVE_PRESENT: u32 = 1 << 5;
/// In: suspend (rather than resume). Out: it is suspended.
pub(super) const SUSPEND: u32 = 1 << 1;
/// In: give parameters instead of status.
pub(super) const STATUS_TABLE: u32 = 1 << 4;
/// Out: the buffer was too small.
const BUFFER_FULL: u32 = 1 << 8;
/// In: do not flush before the status is taken.
pub(super) const NOFLUSH: u32 = 1 << 11;
/// Out: a message was answered.
const DATA_OUT: u32 = 1 << 16;

/// The udev cookie that says "this event is not spurious" (DM_UDEV_PRIMARY_SOURCE_FLAG in the flags' half); the other
/// half is the number of a semaphore that nobody waits for.
pub(super) const UDEV_PRIMARY_SOURCE: u32 = (0x40 << 16) | 0x5052;

const NAME_LEN: usize = 128;
const UUID_LEN: usize = 129;
const NAME_AT: usize = 48;
const UUID_AT: usize = NAME_AT + NAME_LEN;
/// Bytes of `struct dm_target_spec`.
const SPEC: usize = 40;
const KIND_LEN: usize = 16;

/// Room for answers to begin with, and most that is tried.
const FIRST_ROOM: usize = 16 << 10;
const MOST_ROOM: usize = 4 << 20;

/// The ioctls used here, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    ListDevices = 2,
    DevCreate = 3,
    DevRemove = 4,
    DevSuspend = 6,
    DevStatus = 7,
    TableLoad = 9,
    TableClear = 10,
    TableStatus = 12,
    TargetMessage = 14,
}

/// One call: what goes in, and after [`Call::run`] what came out.
#[derive(Clone, Debug)]
pub(super) struct Call {
    command: Command,
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) flags: u32,
    pub(super) event_nr: u32,
    pub(super) open_count: i32,
    pub(super) dev: u64,
    target_count: u32,
    payload: Vec<u8>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_ne_bytes)
}

/// The text up to the first NUL.
fn text_at(bytes: &[u8], at: usize, most: usize) -> String {
    let field = bytes.get(at..).unwrap_or(&[]);
    let field = field.get(..most.min(field.len())).unwrap_or(&[]);
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or(&[])).into_owned()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + value.len()) {
        to.copy_from_slice(value);
    }
}

impl Call {
    pub(super) fn new(command: Command, name: &str) -> Self {
        Self {
            command,
            name: name.into(),
            uuid: String::new(),
            flags: 0,
            event_nr: 0,
            open_count: 0,
            dev: 0,
            target_count: 0,
            payload: Vec::new(),
        }
    }

    /// A table of one target from sector 0.
    pub(super) fn set_table(&mut self, sectors: u64, kind: &str, parameters: &str) {
        let mut bytes = vec![0; (SPEC + parameters.len() + 1).next_multiple_of(8)];
        put(&mut bytes, 8, &sectors.to_ne_bytes());
        let next = u32::try_from(bytes.len()).unwrap_or(0);
        put(&mut bytes, 20, &next.to_ne_bytes());
        put(
            &mut bytes,
            24,
            kind.get(..KIND_LEN - 1).unwrap_or(kind).as_bytes(),
        );
        put(&mut bytes, SPEC, parameters.as_bytes());
        self.payload = bytes;
        self.target_count = 1;
    }

    /// A message for sector 0.
    pub(super) fn set_message(&mut self, text: &str) {
        let mut bytes = vec![0; 8 + text.len() + 1];
        put(&mut bytes, 8, text.as_bytes());
        self.payload = bytes;
    }

    /// Makes the call, with as much room as its answer turns out to need.
    pub(super) fn run(self, ioctl: impl Fn(u32, &mut [u8]) -> io::Result<()>) -> io::Result<Self> {
        let mut room = FIRST_ROOM.max(DM_HEADER + self.payload.len());
        loop {
            let mut buffer = self.encode(room);
            ioctl(self.command as u32, &mut buffer)?;
            if u32_at(&buffer, 28) & BUFFER_FULL == 0 || room >= MOST_ROOM {
                return Ok(self.decode(&buffer));
            }
            room *= 4;
        }
    }

    fn encode(&self, room: usize) -> Vec<u8> {
        let mut buffer = vec![0; room];
        let size = u32::try_from(room).unwrap_or(u32::MAX);
        // Version 4.0.0 is the ABI; the kernel answers with its own minor.
        put(&mut buffer, 0, &4u32.to_ne_bytes());
        put(&mut buffer, 12, &size.to_ne_bytes());
        // CAST: 312 fits.
        put(&mut buffer, 16, &(DM_HEADER as u32).to_ne_bytes());
        put(&mut buffer, 20, &self.target_count.to_ne_bytes());
        put(&mut buffer, 28, &self.flags.to_ne_bytes());
        put(&mut buffer, 32, &self.event_nr.to_ne_bytes());
        let name = self.name.as_bytes();
        put(
            &mut buffer,
            NAME_AT,
            name.get(..name.len().min(NAME_LEN - 1)).unwrap_or(&[]),
        );
        let uuid = self.uuid.as_bytes();
        put(
            &mut buffer,
            UUID_AT,
            uuid.get(..uuid.len().min(UUID_LEN - 1)).unwrap_or(&[]),
        );
        put(&mut buffer, DM_HEADER, &self.payload);
        buffer
    }

    fn decode(self, buffer: &[u8]) -> Self {
        let size = (u32_at(buffer, 12) as usize).min(buffer.len());
        let start = (u32_at(buffer, 16) as usize).clamp(DM_HEADER, buffer.len());
        let answered = text_at(buffer, NAME_AT, NAME_LEN);
        Self {
            command: self.command,
            name: if answered.is_empty() {
                self.name
            } else {
                answered
            },
            uuid: text_at(buffer, UUID_AT, UUID_LEN),
            flags: u32_at(buffer, 28),
            event_nr: u32_at(buffer, 32),
            // CAST: the bits of a signed number.
            open_count: u32_at(buffer, 24) as i32,
            dev: u64_at(buffer, 40),
            target_count: u32_at(buffer, 20),
            payload: buffer.get(start..size.max(start)).unwrap_or(&[]).to_vec(),
        }
    }

    /// The names in an answer of [`Command::ListDevices`].
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut at = 0;
        // An entry: the device's number, the offset of the next entry, the name.
        while u64_at(&self.payload, at) != 0 {
            names.push(text_at(&self.payload, at + 12, NAME_LEN));
            let next = u32_at(&self.payload, at + 8) as usize;
            if next == 0 {
                break;
            }
            at += next;
        }
        names
    }

    /// The targets in an answer of [`Command::TableStatus`].
    pub(super) fn targets(&self) -> Result<Vec<Target>, &'static str> {
        let mut targets = Vec::new();
        let mut at = 0;
        for _ in 0..self.target_count {
            if at + SPEC > self.payload.len() {
                return Err("a target lies outside the answer");
            }
            let next = u32_at(&self.payload, at + 20) as usize;
            targets.push(Target {
                start: u64_at(&self.payload, at),
                length: u64_at(&self.payload, at + 8),
                kind: text_at(&self.payload, at + 24, KIND_LEN),
                text: text_at(&self.payload, at + SPEC, self.payload.len()),
            });
            // Offsets count from the first target.
            if next <= at {
                break;
            }
            at = next;
        }
        Ok(targets)
    }

    /// The answer to a message.
    pub(super) fn text(&self) -> String {
        if self.flags & DATA_OUT == 0 {
            return String::new();
        }
        text_at(&self.payload, 0, self.payload.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_laid_out_as_the_kernel_reads_it() {
        let mut call = Call::new(Command::TableLoad, "root");
        call.set_table(4096, "pristine", "254:0 -");
        let seen = std::cell::RefCell::new(Vec::new());
        call.run(|command, buffer| {
            assert_eq!(command, 9);
            *seen.borrow_mut() = buffer.to_vec();
            Ok(())
        })
        .unwrap();
        let buffer = seen.into_inner();
        assert_eq!(u32_at(&buffer, 12) as usize, buffer.len());
        assert_eq!(text_at(&buffer, 48, 128), "root");
        assert_eq!(u64_at(&buffer, 312 + 8), 4096);
        assert_eq!(u32_at(&buffer, 312 + 20), 48);
        assert_eq!(text_at(&buffer, 312 + 24, 16), "pristine");
        assert_eq!(text_at(&buffer, 312 + 40, 100), "254:0 -");
    }

    #[test]
    fn answers_are_read_with_care() {
        let mut call = Call::new(Command::TableStatus, "x");
        call.target_count = 3;
        // Nothing there, offsets out of range, and a loop.
        assert!(call.targets().is_err());
        call.payload = vec![0xff; 60];
        let _ = call.targets();
        call.payload = vec![0; 100];
        assert_eq!(call.targets().unwrap().len(), 1);
        call.payload = vec![0xff; 13];
        assert_eq!(call.names().len(), 1);
    }

    #[test]
    fn a_full_buffer_is_tried_again_with_more_room() {
        let sizes = std::cell::RefCell::new(Vec::new());
        Call::new(Command::ListDevices, "")
            .run(|_, buffer| {
                let full = buffer.len() < 200_000;
                put(
                    buffer,
                    28,
                    &(if full { BUFFER_FULL } else { 0 }).to_ne_bytes(),
                );
                sizes.borrow_mut().push(buffer.len());
                Ok(())
            })
            .unwrap();
        assert_eq!(*sizes.borrow(), [16 << 10, 64 << 10, 256 << 10]);
    }
}
