// SPDX-License-Identifier: GPL-2.0

//! Keeping the process alive and able to work while the machine waits for it: the device that it serves may hold the
//! root, and be what memory is freed by writing to.

use std::fmt::Display;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::mm::{mlockall, MlockAllFlags};
use rustix::process::configure_io_flusher_behavior;

use crate::log;

/// The name with which systemd leaves a process alone.
pub const SURVIVOR: &str = "@pristined";

/// Makes the process one that neither waits for its own pages nor for I/O that waits for it, and that is not killed
/// when memory is short. What is refused (without privileges, in a container) is told and does no harm otherwise.
pub fn protect() {
    let told = |what: &str, result: Result<(), &dyn Display>| {
        if let Err(error) = result {
            log::warn(format_args!("cannot {what}: {error}"));
        }
    };
    let locked = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    told(
        "keep its memory from being paged out",
        locked.as_ref().map(drop).map_err(|e| e as &dyn Display),
    );
    // Allocations of this process must not wait for writes to the device that it serves.
    let flusher = configure_io_flusher_behavior(true);
    told(
        "be exempt from writing back memory",
        flusher.as_ref().map(drop).map_err(|e| e as &dyn Display),
    );
    let oom = std::fs::write("/proc/self/oom_score_adj", "-1000");
    told(
        "be exempt from the OOM killer",
        oom.as_ref().map(drop).map_err(|e| e as &dyn Display),
    );
}

/// Whether the process has a name with which systemd leaves it alone.
pub fn survives() -> bool {
    std::env::args_os()
        .next()
        .is_some_and(|name| name.to_string_lossy().starts_with('@'))
}

/// Starts this program again, as the same process, with the name [`SURVIVOR`]. Returns only if that fails.
pub fn become_survivor() -> io::Error {
    Command::new("/proc/self/exe")
        .arg0(SURVIVOR)
        .args(std::env::args_os().skip(1))
        .exec()
}
