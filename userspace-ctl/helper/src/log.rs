// SPDX-License-Identifier: GPL-2.0

//! What the helper says: on standard error, or in the kernel's log, where it stays whatever becomes of the file systems.
//! Both are opened at the start.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Mutex, OnceLock, PoisonError};

static KMSG: OnceLock<Option<Mutex<File>>> = OnceLock::new();
static LAST_WARNING: Mutex<Option<String>> = Mutex::new(None);

/// Sends messages to the kernel's log from now on; to standard error still if that cannot be opened.
pub fn to_kernel_log() {
    KMSG.get_or_init(|| {
        let file = OpenOptions::new().write(true).open("/dev/kmsg");
        file.ok().map(Mutex::new)
    });
}

fn put(priority: u8, word: &str, text: &dyn Display) {
    if let Some(Some(kmsg)) = KMSG.get() {
        let line = format!("<{priority}>pristined: {word}{text}\n");
        let mut kmsg = kmsg.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody could be told if it fails.
        let _ = kmsg.write_all(line.as_bytes());
    } else {
        let _ = writeln!(std::io::stderr().lock(), "pristined: {word}{text}");
    }
}

/// Something worth knowing.
pub fn info(text: impl Display) {
    put(6, "", &text);
}

/// Something that somebody should look at. The last one is in the state file.
pub fn warn(text: impl Display) {
    let text = text.to_string();
    put(4, "warning: ", &text);
    *LAST_WARNING.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
}

/// What ends the helper.
pub fn error(text: impl Display) {
    put(3, "error: ", &text);
}

/// The last warning.
pub fn last_warning() -> Option<String> {
    let last = LAST_WARNING.lock();
    last.unwrap_or_else(PoisonError::into_inner).clone()
}
