// SPDX-License-Identifier: GPL-2.0

//! What the agent says: on the console, where somebody may be looking, and in the kernel's log, where it stays.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The words before each message.
pub const NAME: &str = "pristine-agent";

/// After so long without a message, one says that the agent is still there.
const SILENCE: Duration = Duration::from_secs(30);

static DEBUG: AtomicBool = AtomicBool::new(false);
static WATCHED: AtomicBool = AtomicBool::new(false);
/// When the last message was said, and which.
static LAST: Mutex<Option<(Instant, String)>> = Mutex::new(None);

/// Breaks silences from now on: whatever the agent waits for, the console says that it does.
pub fn watch_silence() {
    if WATCHED.swap(true, Ordering::Relaxed) {
        return;
    }
    // Without the thread there are no such messages, and everything else works.
    let _ = std::thread::Builder::new()
        .name("silence".into())
        .spawn(|| {
            let begin = Instant::now();
            loop {
                std::thread::sleep(Duration::from_secs(5));
                let last = LAST.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(text) = silence(last, Instant::now()) {
                    // Not noted as the last message, which is what one wants to read again.
                    put(
                        7,
                        &format!("still there after {} s: {text}", begin.elapsed().as_secs()),
                    );
                    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some((at, _)) = last.as_mut() {
                        *at = Instant::now();
                    }
                }
            }
        });
}

/// The last message, if it was said too long ago.
fn silence(last: Option<(Instant, String)>, now: Instant) -> Option<String> {
    let (at, text) = last?;
    (now.saturating_duration_since(at) >= SILENCE).then_some(text)
}

/// Whether [`debug`] says anything.
pub fn set_debug(on: bool) {
    DEBUG.store(on, Ordering::Relaxed);
}

fn write(level: u8, text: &str) {
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), text.to_owned()));
    put(level, text);
}

fn put(level: u8, text: &str) {
    // In one write, so that messages of several processes do not mix. If the console is gone, nothing can be done.
    let _ = std::io::stderr().write_all(format!("{NAME}: {text}\n").as_bytes());
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // Level 7 whatever it is, but for errors, so that it does not appear on the console twice. The kernel
        // takes about 1000 bytes a line.
        let mut end = text.len().min(900);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        // In one write: each is a record of its own.
        let record = format!("<{level}>{NAME}: {}\n", text.get(..end).unwrap_or(""));
        let _ = kmsg.write_all(record.as_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_broken_with_the_last_message() {
        let now = Instant::now();
        let said = Some((now, "waiting".to_owned()));
        assert_eq!(silence(said.clone(), now + Duration::from_secs(29)), None);
        let text = silence(said, now + Duration::from_secs(31));
        assert_eq!(text.as_deref(), Some("waiting"));
        assert_eq!(silence(None, now), None);
    }
}
