// SPDX-License-Identifier: GPL-2.0

//! What the agent says: on the console, where somebody may be looking, and in the kernel's log, where it stays.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// The words before each message.
pub const NAME: &str = "pristine-agent";

static DEBUG: AtomicBool = AtomicBool::new(false);

/// Whether [`debug`] says anything.
pub fn set_debug(on: bool) {
    DEBUG.store(on, Ordering::Relaxed);
}

fn write(level: u8, text: &str) {
    // In one write, so that messages of several processes do not mix. If the console is gone, nothing can be done.
    let _ = std::io::stderr().write_all(format!("{NAME}: {text}\n").as_bytes());
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // Level 7 whatever it is, but for errors, so that it does not appear on the console twice. The kernel
        // takes about 1000 bytes a line.
        let mut end = text.len().min(900);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let _ = writeln!(kmsg, "<{level}>{NAME}: {}", text.get(..end).unwrap_or(""));
    }
}

/// Something that is good to know.
pub fn say(text: impl Display) {
    write(7, &text.to_string());
}

/// Something that may be wrong.
pub fn warn(text: impl Display) {
    write(7, &format!("warning: {text}"));
}

/// What failed, and what to do.
pub fn error(failure: &crate::failure::Failure) {
    write(7, &format!("error: {}", failure.what));
    if !failure.advice.is_empty() {
        write(7, &format!("what to do: {}", failure.advice));
    }
}

/// Something for who looks for a fault.
pub fn debug(text: impl Display) {
    if DEBUG.load(Ordering::Relaxed) {
        write(7, &text.to_string());
    }
}
