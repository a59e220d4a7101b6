// SPDX-License-Identifier: GPL-2.0

//! Text for userspace: status lines and answers to messages.

use core::fmt;

/// A buffer of device-mapper's, always NUL-terminated. What does not fit is left out, and device-mapper, which
/// sees the buffer full, tells userspace to come back with a larger one.
pub struct Output<'a> {
    buffer: &'a mut [u8],
    used: usize,
}

impl<'a> Output<'a> {
    pub(super) fn new(buffer: &'a mut [u8]) -> Self {
        if let Some(first) = buffer.first_mut() {
            *first = 0;
        }
        Self { buffer, used: 0 }
    }
}

impl fmt::Write for Output<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte is kept for the NUL.
        let room = self
            .buffer
            .len()
            .saturating_sub(1)
            .saturating_sub(self.used);
        let bytes = text.as_bytes();
        let fits = bytes.len().min(room);
        if let (Some(to), Some(from)) = (
            self.buffer.get_mut(self.used..self.used + fits),
            bytes.get(..fits),
        ) {
            to.copy_from_slice(from);
        }
        self.used += fits;
        if let Some(end) = self.buffer.get_mut(self.used) {
            *end = 0;
        }
        if fits < bytes.len() {
            return Err(fmt::Error);
        }
        Ok(())
    }
}
