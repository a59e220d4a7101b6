// SPDX-License-Identifier: GPL-2.0

//! What the kernel writes to its log while something is tried: device-mapper says there, and nowhere else, why it
//! refuses a table.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

/// A place in the kernel's log.
pub(crate) struct Mark(Option<File>);

impl Mark {
    /// Where the log ends now.
    pub(crate) fn now() -> Self {
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open("/dev/kmsg")
            .and_then(|mut f| f.seek(SeekFrom::End(0)).map(|_| f));
        Self(file.ok())
    }

    /// What was written since that looks as if it had to do with us, in one line.
    pub(crate) fn since(mut self) -> Option<String> {
        let file = self.0.as_mut()?;
        let mut lines = Vec::new();
        // A record at a time; at most a few, so that a chatty kernel does not keep us.
        let mut record = [0; 8192];
        for _ in 0..200 {
            let Ok(n) = file.read(&mut record) else { break };
            let text = String::from_utf8_lossy(record.get(..n).unwrap_or(&[])).into_owned();
            let Some((_, message)) = text.split_once(';') else {
                continue;
            };
            let message = message.lines().next().unwrap_or("").trim();
            let ours = ["device-mapper", "pristine", "module", "Unknown symbol"];
            if ours.iter().any(|word| message.contains(word)) {
                lines.push(message.to_owned());
            }
        }
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}
